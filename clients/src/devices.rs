//! `guest balloon`, `mem`, `disk` and `net`.

use anyhow::{Context, Result};
use sepal_schema::{
    config::{
        device::{DiskFormat, DiskMode},
        show_mac,
    },
    device_capnp::{balloon_controller, disk_controller, mem_controller, net_controller},
    error::{Error, Kind, Outcome, read_completion},
    guest_capnp::guest,
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::{BalloonCommand, DiskCommand, LinkState, MemCommand, NetCommand},
    calls,
    manager::Manager,
    place::Place,
    show, stats, status, table,
};

/// Bytes of a balloon's page.
pub(crate) const PAGE: u64 = 4096;

/// A facet out of an answer that has it or an error.
macro_rules! facet {
    ($guest:expr, $request:ident) => {{
        let response = $guest.$request().send().promise.await?;
        response.get()?.outcome()?.get_controller()?
    }};
}

async fn lookup(handle: &Handle, place: &Place, name: &str) -> Result<(Manager, guest::Client)> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    Ok((manager, guest))
}

/// A text of a guest's, fit for a terminal.
pub(crate) fn fit(text: capnp::text::Reader<'_>) -> Result<String> {
    Ok(text.to_str()?.chars().filter(|c| !c.is_control()).collect())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Balloon {
    current_bytes: u64,
    requested_bytes: u64,
    /// None if the guest does not tell.
    memory: Option<Vec<MemoryStat>>,
}

#[derive(Serialize)]
struct MemoryStat {
    tag: u16,
    name: &'static str,
    value: u64,
}

/// The names of the tags (virtio 1.2, section 5.5.6.4), and whether they count bytes.
fn stat_name(tag: u16) -> (&'static str, bool) {
    match tag {
        0 => ("swapped in", true),
        1 => ("swapped out", true),
        2 => ("major faults", false),
        3 => ("minor faults", false),
        4 => ("free", true),
        5 => ("total", true),
        6 => ("available", true),
        7 => ("disk caches", true),
        8 => ("huge pages had", false),
        9 => ("huge pages missed", false),
        _ => ("another", false),
    }
}

/// `guest balloon`.
pub(crate) async fn balloon(handle: &Handle, place: &Place, args: &BalloonCommand) -> Result<u8> {
    let name = match args {
        BalloonCommand::Set { name, .. } => name,
        BalloonCommand::Stats(named) => &named.name,
    };
    let (_manager, guest) = lookup(handle, place, name).await?;
    let balloon: balloon_controller::Client = facet!(guest, balloon_controller_request);
    match args {
        BalloonCommand::Set { size, .. } => set_balloon(&balloon, *size).await,
        BalloonCommand::Stats(named) => show_balloon(&balloon, named.json).await,
    }
}

/// Asks for a balloon of this size, in bytes.
pub(crate) async fn set_balloon(balloon: &balloon_controller::Client, size: u64) -> Result<u8> {
    let pages = u32::try_from(size / PAGE).map_err(|_| Error::bad_config("size", "the balloon is too large"))?;
    let mut request = balloon.request_balloon_size_request();
    request.get().set_pages(pages);
    read_completion(request.send().promise.await?.get()?)?;
    Ok(status::SUCCESS)
}

/// Shows a balloon's size, and what the guest says about its memory.
pub(crate) async fn show_balloon(balloon: &balloon_controller::Client, json: bool) -> Result<u8> {
    let found = balloon_stats(balloon).await?;
    if json {
        show::print_json(&found)?;
        return Ok(status::SUCCESS);
    }
    let mut facts = vec![
        ("current", table::size(found.current_bytes)),
        ("requested", table::size(found.requested_bytes)),
    ];
    match &found.memory {
        Some(stats) => facts.extend(stats.iter().map(|stat| match stat_name(stat.tag) {
            (name, true) => (name, table::size(stat.value)),
            (name, false) => (name, stat.value.to_string()),
        })),
        None => facts.push(("memory", "the guest's driver does not tell".into())),
    }
    show::print(table::facts(&facts).as_bytes())?;
    Ok(status::SUCCESS)
}

async fn balloon_stats(balloon: &balloon_controller::Client) -> Result<Balloon> {
    use balloon_controller::{size_result, stats_result};
    let size = balloon.get_balloon_size_request().send().promise;
    let stats = balloon.get_mem_stats_request().send().promise.await?;
    let size = size.await?;
    let (current, requested) = match size.get()?.which()? {
        size_result::Size(size) => (size.get_current_pages(), size.get_requested_pages()),
        size_result::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let memory = match stats.get()?.which()? {
        stats_result::Stats(stats) => {
            let stat = |stat: balloon_controller::mem_stat::Reader<'_>| MemoryStat {
                tag: stat.get_tag(),
                name: stat_name(stat.get_tag()).0,
                value: stat.get_value(),
            };
            Some(stats?.iter().map(stat).collect())
        }
        stats_result::Error(error) => match Error::read(error?)? {
            error if error.kind == Kind::NotSupported => None,
            error => return Err(error.into()),
        },
    };
    Ok(Balloon {
        current_bytes: u64::from(current) * PAGE,
        requested_bytes: u64::from(requested) * PAGE,
        memory,
    })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    block_bytes: u64,
    region_bytes: u64,
    usable_bytes: u64,
    plugged_bytes: u64,
    requested_bytes: u64,
}

/// `guest mem`.
pub(crate) async fn mem(handle: &Handle, place: &Place, args: &MemCommand) -> Result<u8> {
    let name = match args {
        MemCommand::Request { name, .. } => name,
        MemCommand::Show(named) => &named.name,
    };
    let (_manager, guest) = lookup(handle, place, name).await?;
    let memory: mem_controller::Client = facet!(guest, mem_controller_request);
    match args {
        MemCommand::Request { size, .. } => set_memory(&memory, *size).await,
        MemCommand::Show(named) => show_memory(&memory, named.json).await,
    }
}

/// Asks for this much to be plugged, in bytes.
pub(crate) async fn set_memory(memory: &mem_controller::Client, size: u64) -> Result<u8> {
    let mut request = memory.request_size_request();
    request.get().set_bytes(size);
    read_completion(request.send().promise.await?.get()?)?;
    Ok(status::SUCCESS)
}

/// Shows how much is plugged, requested and possible.
pub(crate) async fn show_memory(memory: &mem_controller::Client, json: bool) -> Result<u8> {
    use mem_controller::size_result::Which;
    let response = memory.get_mem_size_request().send().promise.await?;
    let found = match response.get()?.which()? {
        Which::Size(size) => {
            let size = size?;
            Memory {
                block_bytes: size.get_block_size(),
                region_bytes: size.get_region_size(),
                usable_bytes: size.get_usable_region_size(),
                plugged_bytes: size.get_plugged_size(),
                requested_bytes: size.get_requested_size(),
            }
        }
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    if json {
        show::print_json(&found)?;
        return Ok(status::SUCCESS);
    }
    let facts = [
        ("plugged", table::size(found.plugged_bytes)),
        ("requested", table::size(found.requested_bytes)),
        ("usable", table::size(found.usable_bytes)),
        ("region", table::size(found.region_bytes)),
        ("block", table::size(found.block_bytes)),
    ];
    show::print(table::facts(&facts).as_bytes())?;
    Ok(status::SUCCESS)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Disk {
    name: String,
    id: String,
    mode: &'static str,
    format: &'static str,
    bytes: u64,
    block_size: u32,
    queues: u16,
    direct: bool,
}

fn mode_name(mode: DiskMode) -> &'static str {
    match mode {
        DiskMode::ReadWrite => "rw",
        DiskMode::ReadOnly => "ro",
        DiskMode::VolatileWrite => "volatile",
    }
}

fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Unspecified | DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

/// `guest disk`.
pub(crate) async fn disk(handle: &Handle, place: &Place, args: &DiskCommand) -> Result<u8> {
    match args {
        DiskCommand::List(named) => {
            let (_manager, guest) = lookup(handle, place, &named.name).await?;
            let disks: disk_controller::Client = facet!(guest, disk_controller_request);
            list_disks(&disks, named.json).await?;
        }
        DiskCommand::Resize {
            name,
            disk,
            size,
            shrink,
        } => {
            let (_manager, guest) = lookup(handle, place, name).await?;
            let disks: disk_controller::Client = facet!(guest, disk_controller_request);
            resize(&disks, disk, *size, *shrink).await?;
        }
        DiskCommand::Stats(named) => {
            let (_manager, guest) = lookup(handle, place, &named.name).await?;
            stats::disks(&guest, named.json).await?;
        }
    }
    Ok(status::SUCCESS)
}

/// Gives a disk another size, in bytes; a smaller one, which loses what is behind it, only with `shrink`.
pub(crate) async fn resize(disks: &disk_controller::Client, disk: &str, size: u64, shrink: bool) -> Result<()> {
    let mut request = disks.resize_request();
    request.get().set_disk(disk);
    request.get().set_bytes(size);
    request.get().set_shrink(shrink);
    match read_completion(request.send().promise.await?.get()?) {
        Err(error) if error.about == "shrink" => Err(error).context(format!("--shrink cuts {disk} all the same")),
        outcome => Ok(outcome?),
    }
}

/// Shows the disks.
pub(crate) async fn list_disks(disks: &disk_controller::Client, json: bool) -> Result<()> {
    use disk_controller::list_result::Which;
    let response = disks.list_request().send().promise.await?;
    let list = match response.get()?.which()? {
        Which::Disks(disks) => disks?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let disk = |disk: disk_controller::disk::Reader<'_>| {
        Ok::<_, anyhow::Error>(Disk {
            name: fit(disk.get_name()?)?,
            id: fit(disk.get_id()?)?,
            mode: mode_name(disk.get_mode()?),
            format: format_name(disk.get_format()?),
            bytes: disk.get_bytes(),
            block_size: disk.get_block_size(),
            queues: disk.get_queues(),
            direct: disk.get_direct(),
        })
    };
    let found = list.iter().map(disk).collect::<Result<Vec<_>>>()?;
    if json {
        return show::print_json(&found);
    }
    let rows = found.into_iter().map(|disk| {
        [
            disk.name,
            if disk.id.is_empty() { "-".into() } else { disk.id },
            disk.mode.into(),
            disk.format.into(),
            table::short(disk.bytes),
            disk.block_size.to_string(),
            disk.queues.to_string(),
            if disk.direct { "yes" } else { "no" }.into(),
        ]
    });
    let headings = ["NAME", "ID", "MODE", "FORMAT", "SIZE", "BLOCK", "QUEUES", "DIRECT"];
    show::print(table::table(&headings, rows).as_bytes())?;
    Ok(())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Network {
    name: String,
    mac: String,
    mtu: u16,
    queue_pairs: u16,
    link: &'static str,
    kind: &'static str,
}

/// `guest net`.
pub(crate) async fn net(handle: &Handle, place: &Place, args: &NetCommand) -> Result<u8> {
    match args {
        NetCommand::List(named) => {
            let (_manager, guest) = lookup(handle, place, &named.name).await?;
            let networks: net_controller::Client = facet!(guest, net_controller_request);
            list_networks(&networks, named.json).await?;
        }
        NetCommand::Link { name, network, state } => {
            let (_manager, guest) = lookup(handle, place, name).await?;
            let networks: net_controller::Client = facet!(guest, net_controller_request);
            set_link(&networks, network, *state).await?;
        }
        NetCommand::Stats(named) => {
            let (_manager, guest) = lookup(handle, place, &named.name).await?;
            stats::networks(&guest, named.json).await?;
        }
    }
    Ok(status::SUCCESS)
}

/// Plugs a cable in or out.
pub(crate) async fn set_link(networks: &net_controller::Client, network: &str, state: LinkState) -> Result<()> {
    let mut request = networks.set_link_request();
    request.get().set_network(network);
    request.get().set_up(state == LinkState::Up);
    Ok(read_completion(request.send().promise.await?.get()?)?)
}

/// Shows the network devices.
pub(crate) async fn list_networks(networks: &net_controller::Client, json: bool) -> Result<()> {
    use net_controller::{list_result::Which, network::Kind as Link};
    let response = networks.list_request().send().promise.await?;
    let list = match response.get()?.which()? {
        Which::Networks(networks) => networks?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let network = |network: net_controller::network::Reader<'_>| {
        let mac = <[u8; 6]>::try_from(network.get_mac()?).unwrap_or_default();
        Ok::<_, anyhow::Error>(Network {
            name: fit(network.get_name()?)?,
            mac: show_mac(mac),
            mtu: network.get_mtu(),
            queue_pairs: network.get_queue_pairs(),
            link: if network.get_link_up() { "up" } else { "down" },
            kind: match network.get_kind()? {
                Link::Tap => "tap",
                Link::Socket => "socket",
            },
        })
    };
    let found = list.iter().map(network).collect::<Result<Vec<_>>>()?;
    if json {
        return show::print_json(&found);
    }
    let rows = found.into_iter().map(|network| {
        [
            network.name,
            network.mac,
            network.kind.into(),
            network.link.into(),
            network.mtu.to_string(),
            network.queue_pairs.to_string(),
        ]
    });
    show::print(table::table(&["NAME", "MAC", "KIND", "LINK", "MTU", "QUEUES"], rows).as_bytes())?;
    Ok(())
}
