//! From a configuration to the machine's devices: the one place that knows both.
//!
//! ```text
//!   GuestConfig --requests--> Requests --make--> DeviceSpecs for the machine
//!     (control loop: only      (the build's        '-> Handles for the facets, events and statistics
//!      what is in it)           thread: files)
//! ```

use std::{ops::Range, os::fd::OwnedFd};

use rustix::rand::GetRandomFlags;
use sepal_devices::{
    rate::RateLimit,
    vhost_user::{self, VhostUser, VhostUserHandle},
    virtio::{
        balloon::{Balloon, BalloonConfig, BalloonHandle},
        block::{self, Block, BlockConfig, BlockHandle},
        console::{Console, ConsoleConfig, ConsoleHandle, PortConfig},
        device::{DeviceKind, VirtioDevice},
        memory::{MemoryDevice, MemoryDeviceConfig, MemoryHandle},
        net::{Net, NetBackend, NetConfig, NetHandle},
        rng::{Rng, RngConfig},
        vsock::{Vsock, VsockConfig, VsockHandle},
    },
    watchdog::WatchdogAction,
};
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{self, Backend, Disk, DiskFormat, DiskMode, Link, Network},
    },
    error::{Error, Kind},
};

use crate::machine::{DeviceSpec, Guards};

/// The device types of virtio that have a name of their own here.
const FILE_SYSTEM: u16 = 26;
/// Bytes of a balloon's page.
const PAGE: u64 = 4096;

/// The devices that a machine is to have.
#[derive(Default)]
pub struct Requests {
    /// Those on the PCI bus, in the order in which the guest finds them.
    pci: Vec<Request>,
    guards: Guards,
}

struct Request {
    name: String,
    what: What,
}

enum What {
    Block(BlockConfig, DiskFormat),
    Net(NetConfig),
    Console(ConsoleConfig),
    Rng(RngConfig),
    Balloon(BalloonConfig),
    Memory(device::MemoryDevice),
    Vsock(VsockConfig),
    VhostUser(OwnedFd, vhost_user::Settings),
}

/// The host's side of a machine's devices; clones lead to the same devices.
#[derive(Clone, Default)]
pub struct Handles {
    pub(super) disks: Vec<DiskHandle>,
    pub(super) networks: Vec<(String, NetHandle)>,
    pub(super) console: Option<ConsoleHandle>,
    pub(super) balloon: Option<LimitedBalloon>,
    pub(super) memory: Option<MemoryHandle>,
    pub(super) vsock: Option<VsockHandle>,
    pub(super) vhost_user: Vec<(String, VhostUserHandle)>,
}

/// A balloon, and how large it can be.
#[derive(Clone)]
pub(super) struct LimitedBalloon {
    pub(super) handle: BalloonHandle,
    /// Pages of 4096 bytes that the guest has.
    pub(super) most_pages: u32,
}

/// What a machine's memory is like, which some devices have to know.
pub(super) struct Place {
    /// Bytes of RAM.
    pub(super) ram: u64,
    /// Where the memory for a memory device lies.
    pub(super) device_region: Range<u64>,
}

/// A disk, and what its guest's configuration said about it.
#[derive(Clone)]
pub(super) struct DiskHandle {
    pub(super) name: String,
    pub(super) format: DiskFormat,
    pub(super) handle: BlockHandle,
}

impl Requests {
    /// Those that watch over the guest.
    pub(super) fn guards(&self) -> Guards {
        self.guards.clone()
    }

    /// What `config` asks for; its files and sockets are taken out of it. `consoles` are the sockets of the console's ports.
    ///
    /// # Errors
    /// `BAD_CONFIG` naming the field: something is left to be opened, which a component never does. `NOT_SUPPORTED`.
    pub(super) fn of(config: &mut GuestConfig, consoles: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut requests = Self {
            guards: guards(config)?,
            ..Self::default()
        };
        for (i, disk) in std::mem::take(&mut config.disks).into_iter().enumerate() {
            requests.push(format!("disk{i}"), block(i, disk)?);
        }
        for (i, network) in std::mem::take(&mut config.networks).into_iter().enumerate() {
            requests.push(format!("net{i}"), net(i, network)?);
        }
        if let Some(console) = config.console {
            requests.push("console".into(), What::Console(ports(console, consoles)));
        }
        if let Some(rng) = config.rng {
            let rate = rate(rng.rate_limit());
            requests.push("rng".into(), What::Rng(RngConfig { rate }));
        }
        if let Some(balloon) = config.balloon {
            let config = BalloonConfig {
                deflate_on_oom: balloon.deflate_on_oom,
                page_reporting: balloon.free_page_reporting,
            };
            requests.push("balloon".into(), What::Balloon(config));
        }
        if let Some(vsock) = &config.vsock {
            requests.push("vsock".into(), What::Vsock(VsockConfig::new(vsock.cid.into())));
        }
        if let Some(memory) = config.memory_device {
            requests.push("memory".into(), What::Memory(memory));
        }
        for (i, share) in std::mem::take(&mut config.shares).into_iter().enumerate() {
            requests.push(format!("share{i}"), share_device(i, share)?);
        }
        for (i, device) in std::mem::take(&mut config.vhost_user).into_iter().enumerate() {
            let kind = match device.device_type {
                FILE_SYSTEM => DeviceKind::FileSystem,
                other => DeviceKind::Other(other),
            };
            let settings = vhost_user::Settings {
                kind,
                queue_sizes: vec![device.queue_size(); device.queues().into()],
                config: vhost_user::ConfigSource::BackEnd,
            };
            let socket = socket(&format!("vhostUser[{i}].backend"), device.backend)?;
            requests.push(format!("vhost-user{i}"), What::VhostUser(socket, settings));
        }
        Ok(requests)
    }

    fn push(&mut self, name: String, what: What) {
        self.pci.push(Request { name, what });
    }

    /// Bytes of memory that a memory device needs; 0 without one.
    pub(super) fn device_bytes(&self) -> u64 {
        let memory = self.pci.iter().find_map(|request| match &request.what {
            What::Memory(memory) => Some(memory),
            _ => None,
        });
        memory.map_or(0, |memory| memory.region_size)
    }

    /// What the devices are called.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let guards = [
            (self.guards.watchdog.is_some(), "watchdog"),
            (self.guards.generation_id.is_some(), "generation-id"),
            (self.guards.instance_id.is_some(), "instance-id"),
            (self.guards.panic_device, "panic"),
        ];
        let guards = guards.into_iter().filter(|(there, _)| *there).map(|(_, name)| name);
        self.pci.iter().map(|request| request.name.as_str()).chain(guards)
    }

    /// Makes the devices. Reads images and greets other processes, so it may take its time.
    ///
    /// # Errors
    /// `DEVICE_INITIALIZATION_FAILURE` or, for a process that does not serve, `FAILED_SERVICE_CONNECT`, naming the device.
    pub(super) fn make(self, place: &Place) -> Result<(Vec<DeviceSpec>, Handles), Error> {
        let (mut specs, mut handles) = (Vec::new(), Handles::default());
        for Request { name, what } in self.pci {
            let device = make(&name, what, place, &mut handles)?;
            specs.push(DeviceSpec { name, device });
        }
        Ok((specs, handles))
    }
}

fn make(name: &str, what: What, place: &Place, handles: &mut Handles) -> Result<Box<dyn VirtioDevice>, Error> {
    let name = name.to_owned();
    Ok(match what {
        What::Block(config, format) => {
            let (device, handle) = Block::new(config).map_err(|error| failed(&name, &error))?;
            handles.disks.push(DiskHandle { name, format, handle });
            Box::new(device)
        }
        What::Net(config) => {
            let (device, handle) = Net::new(config).map_err(|error| failed(&name, &error))?;
            handles.networks.push((name, handle));
            Box::new(device)
        }
        What::Console(config) => {
            let (device, handle) = Console::new(config).map_err(|error| failed(&name, &error))?;
            handles.console = Some(handle);
            Box::new(device)
        }
        What::Rng(config) => Box::new(Rng::new(config).map_err(|error| failed(&name, &error))?.0),
        What::Balloon(config) => {
            let (device, handle) = Balloon::new(config).map_err(|error| failed(&name, &error))?;
            let most_pages = u32::try_from(place.ram / PAGE).unwrap_or(u32::MAX);
            handles.balloon = Some(LimitedBalloon { handle, most_pages });
            Box::new(device)
        }
        What::Memory(memory) => {
            let config = MemoryDeviceConfig {
                block_size: memory.block_size(),
                // Aligned to 2 GiB, which is more than can be asked for.
                region: place.device_region.clone(),
                requested: memory.requested,
            };
            let (device, handle) = MemoryDevice::new(config).map_err(|error| failed(&name, &error))?;
            handles.memory = Some(handle);
            Box::new(device)
        }
        What::Vsock(config) => {
            let (device, handle) = Vsock::new(config).map_err(|error| failed(&name, &error))?;
            handles.vsock = Some(handle);
            Box::new(device)
        }
        What::VhostUser(socket, settings) => {
            let (device, handle) = VhostUser::connect(socket, settings).map_err(|error| Error {
                kind: Kind::FailedServiceConnect,
                ..failed(&name, &error)
            })?;
            handles.vhost_user.push((name, handle));
            Box::new(device)
        }
    })
}

fn failed(name: &str, error: &dyn std::error::Error) -> Error {
    Error::new(Kind::DeviceInitializationFailure, format!("{name}: {error}")).about(name)
}

/// The devices that watch over a guest.
fn guards(config: &GuestConfig) -> Result<Guards, Error> {
    let id = config.generation_id.then(|| {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, GetRandomFlags::empty()).map(|_| id)
    });
    let id = id.transpose().map_err(|error| {
        let message = format!("the host gives no random number for the generation id: {error}");
        Error::new(Kind::DeviceInitializationFailure, message).about("generationId")
    })?;
    Ok(Guards {
        panic_device: config.panic_device,
        generation_id: id,
        instance_id: config.instance_id,
        watchdog: config.watchdog.map(|action| match action {
            device::WatchdogAction::Reset => WatchdogAction::Reset,
            device::WatchdogAction::Stop => WatchdogAction::Stop,
            device::WatchdogAction::None => WatchdogAction::Nothing,
        }),
    })
}

fn rate(limit: device::RateLimit) -> RateLimit {
    RateLimit {
        bytes_per_second: limit.bytes_per_second,
        operations_per_second: limit.operations_per_second,
        burst_bytes: limit.burst_bytes,
        burst_operations: limit.burst_operations,
    }
}

/// An open file of a configuration; nothing else is of use to a component.
pub(super) fn descriptor(field: &str, file: File) -> Result<Option<OwnedFd>, Error> {
    match file {
        File::None => Ok(None),
        File::Fd(fd) => Ok(Some(fd)),
        File::Bytes(_) | File::Upload(_) | File::Path(_) => Err(unopened(field)),
    }
}

fn unopened(field: &str) -> Error {
    Error::bad_config(
        field,
        format!("a component takes the {field} as an open descriptor only"),
    )
}

fn needed(field: String, file: File) -> Result<OwnedFd, Error> {
    descriptor(&field, file)?.ok_or_else(|| unopened(&field))
}

fn block(i: usize, disk: Disk) -> Result<What, Error> {
    let field = |name: &str| format!("disks[{i}].{name}");
    let (block_size, queues) = (disk.block_size(), disk.queues());
    let files = disk.backing.into_iter().enumerate();
    let backing = files.map(|(j, below)| needed(field(&format!("backing[{j}]")), below.file));
    let config = BlockConfig {
        mode: match disk.mode {
            DiskMode::ReadWrite => block::DiskMode::ReadWrite,
            DiskMode::ReadOnly => block::DiskMode::ReadOnly,
            DiskMode::VolatileWrite => block::DiskMode::Volatile,
        },
        format: match disk.format {
            DiskFormat::Unspecified | DiskFormat::Raw => block::DiskFormat::Raw,
            DiskFormat::Qcow2 => block::DiskFormat::Qcow2,
        },
        backing: backing.collect::<Result<_, _>>()?,
        direct: disk.direct,
        block_size,
        queues,
        rate_limit: rate(disk.rate_limit),
        scratch: descriptor(&field("scratch"), disk.scratch)?,
        ..BlockConfig::new(disk.id, needed(field("image"), disk.image)?)
    };
    let format = match disk.format {
        DiskFormat::Unspecified => DiskFormat::Raw,
        format => format,
    };
    Ok(What::Block(config, format))
}

fn net(i: usize, network: Network) -> Result<What, Error> {
    let field = format!("networks[{i}]");
    let mtu = network.mtu();
    let Some(mac) = network.mac else {
        let message = "a component chooses no address; the guest manager supplies one";
        return Err(Error::bad_config(format!("{field}.mac"), message));
    };
    let backend = match network.link {
        Link::Tap(queues) => NetBackend::Tap(queues),
        Link::Socket(socket) => NetBackend::Stream(socket),
        Link::User | Link::TapNamed(_) | Link::Bridge(_) => return Err(unopened(&field)),
    };
    let limit = rate(network.rate_limit);
    Ok(What::Net(NetConfig {
        mac,
        mtu,
        backend,
        offloads: network.offloads.unwrap_or(true),
        link_up: !network.link_down,
        receive_limit: limit,
        send_limit: limit,
    }))
}

fn ports(console: device::Console, sockets: Vec<OwnedFd>) -> ConsoleConfig {
    let mut sockets = sockets.into_iter();
    let port = |i| PortConfig {
        name: if i == 0 { String::new() } else { format!("port{i}") },
        host: sockets.next(),
    };
    ConsoleConfig {
        ports: (0..console.ports()).map(port).collect(),
        consoles: console.console_ports().into(),
    }
}

fn share_device(i: usize, share: device::Share) -> Result<What, Error> {
    let config = vhost_user::fs_config(&share.tag, share.queues().into())
        .map_err(|error| Error::bad_config(format!("shares[{i}].tag"), error.to_string()))?;
    // A queue of high priority comes before those of requests (virtio 1.2, section 5.11.2).
    let queues = usize::from(share.queues()) + 1;
    let settings = vhost_user::Settings {
        kind: DeviceKind::FileSystem,
        queue_sizes: vec![device::DEFAULT_QUEUE_SIZE; queues],
        config: vhost_user::ConfigSource::Given(config),
    };
    Ok(What::VhostUser(
        socket(&format!("shares[{i}].backend"), share.backend)?,
        settings,
    ))
}

fn socket(field: &str, backend: Backend) -> Result<OwnedFd, Error> {
    match backend {
        Backend::Socket(socket) => Ok(socket),
        Backend::Path(_) => Err(unopened(field)),
    }
}
