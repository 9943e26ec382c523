//! What can be done to a guest's devices: the capabilities of the protocol, each over the handles of its kind.
//!
//! Nothing here waits for a device but by its answer; the answers come from the devices' threads.

use std::time::Duration;

use capnp::{capability::Rc as ServerRc, struct_list};
use futures::channel::oneshot;
use sepal_devices::virtio::{
    balloon::{MemoryStats, StatsError},
    block::{self, ResizeError},
    memory::{self, MemoryHandle},
    net::NetBackendKind,
};
use sepal_schema::{
    config::device::DiskMode,
    device_capnp::{
        balloon_controller, balloon_controller::mem_stat, device_stats, disk_controller, mem_controller, net_controller,
    },
    error::{Error, Kind, write_completion},
    facet_capnp::facet,
    guest_capnp::{console, output, serial},
};

use super::{
    devices::{DiskHandle, Handles, LimitedBalloon},
    guest::GuestServer,
};

/// How long a guest may take to tell about its memory.
const STATS_PATIENCE: Duration = Duration::from_secs(2);

type Reply = Result<(), capnp::Error>;

/// A list of a guest's devices, of which there are 32 at most.
fn length(of: usize) -> u32 {
    of as u32
}

fn not_found(what: &str, name: &str) -> Error {
    let message = format!("the guest has no {what} \"{}\"", name.escape_debug());
    Error::new(Kind::NotFound, message).about(what)
}

fn mode(mode: block::DiskMode) -> DiskMode {
    match mode {
        block::DiskMode::ReadWrite => DiskMode::ReadWrite,
        block::DiskMode::ReadOnly => DiskMode::ReadOnly,
        block::DiskMode::Volatile => DiskMode::VolatileWrite,
    }
}

fn resize_error(name: &str, error: &ResizeError) -> Error {
    let kind = match error {
        ResizeError::NotSupported { .. } => Kind::NotSupported,
        ResizeError::Size { .. } | ResizeError::Cuts { .. } => Kind::BadConfig,
        ResizeError::Host { .. } => Kind::NoStorage,
        ResizeError::Gone => Kind::NotRunning,
        _ => Kind::InternalError,
    };
    let about = match error {
        ResizeError::Cuts { .. } => "shrink",
        _ => name,
    };
    Error::new(kind, format!("{name}: {error}")).about(about)
}

/// Asks a disk for another size, and waits until its driver has been told.
async fn resize(disk: Result<DiskHandle, Error>, bytes: u64, shrink: bool) -> Result<(), Error> {
    let DiskHandle { name, handle, .. } = disk?;
    let (sender, receiver) = oneshot::channel();
    handle.resize(bytes, shrink, move |result| {
        // Nobody listens any more if the call was dropped.
        let _ = sender.send(result);
    });
    let result = receiver.await.unwrap_or(Err(ResizeError::Gone));
    result.map(|_| ()).map_err(|error| resize_error(&name, &error))
}

impl disk_controller::Server for GuestServer {
    async fn list(
        self: ServerRc<Self>,
        _: disk_controller::ListParams,
        mut results: disk_controller::ListResults,
    ) -> Reply {
        match self.devices() {
            Ok(devices) => {
                let mut list = results.get().init_disks(length(devices.disks.len()));
                for (i, disk) in devices.disks.iter().enumerate() {
                    let info = disk.handle.info();
                    let mut to = list.reborrow().get(length(i));
                    to.set_name(&disk.name);
                    to.set_id(&info.id);
                    to.set_mode(mode(info.mode));
                    to.set_format(disk.format);
                    to.set_bytes(info.bytes);
                    to.set_block_size(info.block_size);
                    to.set_queues(info.queues);
                    to.set_direct(info.direct);
                }
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn resize(
        self: ServerRc<Self>,
        params: disk_controller::ResizeParams,
        mut results: disk_controller::ResizeResults,
    ) -> Reply {
        let (disk, bytes, shrink) = {
            let params = params.get()?;
            let name = params.get_disk()?.to_str()?;
            let is_it = |disk: &&DiskHandle| disk.name == name || (!name.is_empty() && disk.handle.info().id == name);
            let find = |devices: Handles| {
                let found = devices.disks.iter().find(is_it).cloned();
                found.ok_or_else(|| not_found("disk", name))
            };
            let disk = self.devices().and_then(find);
            (disk, params.get_bytes(), params.get_shrink())
        };
        write_completion(&resize(disk, bytes, shrink).await, results.get());
        Ok(())
    }
}

impl net_controller::Server for GuestServer {
    async fn list(
        self: ServerRc<Self>,
        _: net_controller::ListParams,
        mut results: net_controller::ListResults,
    ) -> Reply {
        use sepal_schema::device_capnp::net_controller::network::Kind as Link;
        match self.devices() {
            Ok(devices) => {
                let mut list = results.get().init_networks(length(devices.networks.len()));
                for (i, (name, handle)) in devices.networks.iter().enumerate() {
                    let info = handle.info();
                    let mut to = list.reborrow().get(length(i));
                    to.set_name(name);
                    to.set_mac(&info.mac);
                    to.set_mtu(info.mtu);
                    to.set_queue_pairs(info.queue_pairs);
                    to.set_link_up(info.link_up);
                    to.set_kind(match info.backend {
                        NetBackendKind::Tap => Link::Tap,
                        NetBackendKind::Stream => Link::Socket,
                    });
                }
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn set_link(
        self: ServerRc<Self>,
        params: net_controller::SetLinkParams,
        mut results: net_controller::SetLinkResults,
    ) -> Reply {
        let params = params.get()?;
        let name = params.get_network()?.to_str()?;
        let outcome = self.devices().and_then(|devices| {
            let found = devices.networks.iter().find(|(other, _)| other == name);
            let (_, handle) = found.ok_or_else(|| not_found("network device", name))?;
            handle.set_link(params.get_up());
            Ok(())
        });
        write_completion(&outcome, results.get());
        Ok(())
    }
}

fn no_balloon() -> Error {
    Error::new(Kind::DeviceNotPresent, "the guest has no balloon").about("balloon")
}

fn stats_error(error: StatsError) -> Error {
    let kind = match error {
        StatsError::NotSupported => Kind::NotSupported,
        StatsError::TimedOut => Kind::TimedOut,
        StatsError::Reset => Kind::Cancelled,
        StatsError::Busy => Kind::NoResources,
        StatsError::Gone => Kind::NotRunning,
    };
    Error::new(kind, error.to_string()).about("balloon")
}

impl GuestServer {
    fn balloon(&self) -> Result<LimitedBalloon, Error> {
        self.devices()?.balloon.ok_or_else(no_balloon)
    }

    fn memory(&self) -> Result<MemoryHandle, Error> {
        let gone = || Error::new(Kind::DeviceNotPresent, "the guest has no memory device").about("memoryDevice");
        self.devices()?.memory.ok_or_else(gone)
    }
}

impl balloon_controller::Server for GuestServer {
    async fn get_balloon_size(
        self: ServerRc<Self>,
        _: balloon_controller::GetBalloonSizeParams,
        mut results: balloon_controller::GetBalloonSizeResults,
    ) -> Reply {
        match self.balloon() {
            Ok(balloon) => {
                let size = balloon.handle.size();
                let mut to = results.get().init_size();
                to.set_current_pages(size.current);
                to.set_requested_pages(size.requested);
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn request_balloon_size(
        self: ServerRc<Self>,
        params: balloon_controller::RequestBalloonSizeParams,
        mut results: balloon_controller::RequestBalloonSizeResults,
    ) -> Reply {
        let pages = params.get()?.get_pages();
        let outcome = self.balloon().and_then(|LimitedBalloon { handle, most_pages }| {
            if pages > most_pages {
                let message = format!("a balloon of {pages} pages was asked for; the guest has {most_pages}");
                return Err(Error::bad_config("pages", message));
            }
            handle.set_target(pages);
            Ok(())
        });
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn get_mem_stats(
        self: ServerRc<Self>,
        _: balloon_controller::GetMemStatsParams,
        mut results: balloon_controller::GetMemStatsResults,
    ) -> Reply {
        let (sender, receiver) = oneshot::channel();
        let asked = self.balloon().map(|balloon| {
            balloon.handle.request_stats(STATS_PATIENCE, move |stats| {
                // Nobody listens any more if the call was dropped.
                let _ = sender.send(stats);
            });
        });
        let stats = match asked {
            Ok(()) => receiver.await.unwrap_or(Err(StatsError::Gone)).map_err(stats_error),
            Err(error) => Err(error),
        };
        match stats {
            Ok(stats) => {
                let list = results.get().init_stats(length(stats.stats.len()));
                write_memory(&stats, list);
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

impl mem_controller::Server for GuestServer {
    async fn get_mem_size(
        self: ServerRc<Self>,
        _: mem_controller::GetMemSizeParams,
        mut results: mem_controller::GetMemSizeResults,
    ) -> Reply {
        match self.memory() {
            Ok(memory) => {
                let sizes = memory.sizes();
                let mut to = results.get().init_size();
                to.set_block_size(sizes.block);
                to.set_region_size(sizes.region);
                to.set_usable_region_size(sizes.usable);
                to.set_plugged_size(sizes.plugged);
                to.set_requested_size(sizes.requested);
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn request_size(
        self: ServerRc<Self>,
        params: mem_controller::RequestSizeParams,
        mut results: mem_controller::RequestSizeResults,
    ) -> Reply {
        let bytes = params.get()?.get_bytes();
        let refused = |error: memory::BadRequest| Error::bad_config("bytes", error.to_string());
        let outcome = self.memory().and_then(|memory| memory.request(bytes).map_err(refused));
        write_completion(&outcome, results.get());
        Ok(())
    }
}

/// A port of the console. Its bytes go through the socket that the guest manager has; only its size is the device's.
pub(super) struct ConsoleServer {
    pub(super) guest: GuestServer,
    pub(super) port: usize,
}

impl facet::Server for ConsoleServer {}

impl output::Server for ConsoleServer {}

impl serial::Server for ConsoleServer {}

impl console::Server for ConsoleServer {
    async fn resize(self: ServerRc<Self>, params: console::ResizeParams, mut results: console::ResizeResults) -> Reply {
        let params = params.get()?;
        let outcome = self.guest.devices().and_then(|devices| {
            let gone = || Error::new(Kind::DeviceNotPresent, "the guest has no console").about("console");
            let resized = devices
                .console
                .ok_or_else(gone)?
                .resize(self.port, params.get_columns(), params.get_rows());
            resized.map_err(|error| Error::new(Kind::DeviceNotPresent, error.to_string()).about("console"))
        });
        write_completion(&outcome, results.get());
        Ok(())
    }
}

/// Writes what the guest said about its memory, into a list that is as long.
fn write_memory(stats: &MemoryStats, mut to: struct_list::Builder<'_, mem_stat::Owned>) {
    for (i, stat) in (0..).zip(&stats.stats) {
        let mut to = to.reborrow().get(i);
        to.set_tag(stat.tag);
        to.set_value(stat.value);
    }
}

/// Writes what the devices have counted.
pub(super) fn write_stats(devices: &Handles, mut to: device_stats::Builder<'_>) {
    let mut list = to.reborrow().init_disks(length(devices.disks.len()));
    for (i, disk) in devices.disks.iter().enumerate() {
        let stats = disk.handle.stats();
        let mut to = list.reborrow().get(length(i));
        to.set_name(&disk.name);
        to.set_read_operations(stats.reads);
        to.set_write_operations(stats.writes);
        to.set_other_operations(stats.flushes.saturating_add(stats.discards).saturating_add(stats.ids));
        to.set_read_bytes(stats.read_bytes);
        to.set_written_bytes(stats.written_bytes);
        to.set_errors(stats.errors);
    }
    if let Some(LimitedBalloon { handle, .. }) = &devices.balloon {
        let mut to = to.reborrow().init_balloon();
        let size = handle.size();
        to.set_current_pages(size.current);
        to.set_requested_pages(size.requested);
        to.set_reported_bytes(handle.stats().reported);
        if let Some(stats) = handle.latest_stats() {
            to.set_memory_age_ns(u64::try_from(stats.age().as_nanos()).unwrap_or(u64::MAX));
            write_memory(&stats, to.init_memory(length(stats.stats.len())));
        }
    }
    let mut list = to.init_networks(length(devices.networks.len()));
    for (i, (name, handle)) in devices.networks.iter().enumerate() {
        let stats = handle.stats();
        let mut to = list.reborrow().get(length(i));
        to.set_name(name);
        to.set_received_frames(stats.received.frames);
        to.set_received_bytes(stats.received.bytes);
        to.set_received_dropped(stats.received.dropped);
        to.set_received_errors(stats.received.errors);
        to.set_sent_frames(stats.sent.frames);
        to.set_sent_bytes(stats.sent.bytes);
        to.set_sent_dropped(stats.sent.dropped);
        to.set_sent_errors(stats.sent.errors);
    }
}
