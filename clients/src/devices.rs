//! `guest balloon`, `mem`, `disk` and `net`.

use anyhow::Result;
use sepal_schema::{
    config::{
        device::{DiskFormat, DiskMode},
        show_mac,
    },
    device_capnp::{balloon_controller, device_stats, disk_controller, mem_controller, net_controller},
    error::{Error, Kind, Outcome, read_completion},
    guest_capnp::{guest, statistics},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::{BalloonCommand, DiskCommand, LinkState, MemCommand, NetCommand},
    calls,
    manager::Manager,
    place::Place,
    show, status, table,
};

/// Bytes of a balloon's page.
const PAGE: u64 = 4096;

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
fn fit(text: capnp::text::Reader<'_>) -> Result<String> {
    Ok(text.to_str()?.chars().filter(|c| !c.is_control()).collect())
}

fn mebibytes(bytes: u64) -> String {
    match bytes % (1 << 20) {
        0 => format!("{} MiB", bytes >> 20),
        _ => format!("{bytes} bytes"),
    }
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
        BalloonCommand::Set { size, .. } => {
            let pages =
                u32::try_from(size / PAGE).map_err(|_| Error::bad_config("size", "the balloon is too large"))?;
            let mut request = balloon.request_balloon_size_request();
            request.get().set_pages(pages);
            read_completion(request.send().promise.await?.get()?)?;
        }
        BalloonCommand::Stats(named) => {
            let found = balloon_stats(&balloon).await?;
            if named.json {
                show::print_json(&found)?;
                return Ok(status::SUCCESS);
            }
            let mut facts = vec![
                ("current", mebibytes(found.current_bytes)),
                ("requested", mebibytes(found.requested_bytes)),
            ];
            match &found.memory {
                Some(stats) => facts.extend(stats.iter().map(|stat| match stat_name(stat.tag) {
                    (name, true) => (name, mebibytes(stat.value)),
                    (name, false) => (name, stat.value.to_string()),
                })),
                None => facts.push(("memory", "the guest's driver does not tell".into())),
            }
            show::print(table::facts(&facts).as_bytes())?;
        }
    }
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
        MemCommand::Request { size, .. } => {
            let mut request = memory.request_size_request();
            request.get().set_bytes(*size);
            read_completion(request.send().promise.await?.get()?)?;
        }
        MemCommand::Show(named) => {
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
            if named.json {
                show::print_json(&found)?;
                return Ok(status::SUCCESS);
            }
            let facts = [
                ("plugged", mebibytes(found.plugged_bytes)),
                ("requested", mebibytes(found.requested_bytes)),
                ("usable", mebibytes(found.usable_bytes)),
                ("region", mebibytes(found.region_bytes)),
                ("block", mebibytes(found.block_bytes)),
            ];
            show::print(table::facts(&facts).as_bytes())?;
        }
    }
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
        DiskCommand::Resize { name, disk, size } => {
            let (_manager, guest) = lookup(handle, place, name).await?;
            let disks: disk_controller::Client = facet!(guest, disk_controller_request);
            let mut request = disks.resize_request();
            request.get().set_disk(disk);
            request.get().set_bytes(*size);
            read_completion(request.send().promise.await?.get()?)?;
        }
        DiskCommand::Stats(named) => {
            let (_manager, guest) = lookup(handle, place, &named.name).await?;
            disk_stats(&guest, named.json).await?;
        }
    }
    Ok(status::SUCCESS)
}

async fn list_disks(disks: &disk_controller::Client, json: bool) -> Result<()> {
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
            mebibytes(disk.bytes),
            disk.block_size.to_string(),
            disk.queues.to_string(),
            if disk.direct { "yes" } else { "no" }.into(),
        ]
    });
    let headings = ["NAME", "ID", "MODE", "FORMAT", "SIZE", "BLOCK", "QUEUES", "DIRECT"];
    show::print(table::table(&headings, rows).as_bytes())?;
    Ok(())
}

/// What the devices of a guest have counted.
async fn stats(guest: &guest::Client) -> Result<capnp::capability::Response<statistics::stats_result::Owned>> {
    Ok(calls::observer(guest).stats_request().send().promise.await?)
}

fn devices<'a>(
    response: &'a capnp::capability::Response<statistics::stats_result::Owned>,
) -> Result<device_stats::Reader<'a>> {
    use statistics::stats_result::Which;
    match response.get()?.which()? {
        Which::Stats(stats) => Ok(stats?.get_devices()?),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DiskStats {
    name: String,
    read_operations: u64,
    write_operations: u64,
    other_operations: u64,
    read_bytes: u64,
    written_bytes: u64,
    errors: u64,
}

async fn disk_stats(guest: &guest::Client, json: bool) -> Result<()> {
    let response = stats(guest).await?;
    let disk = |disk: device_stats::disk::Reader<'_>| {
        Ok::<_, anyhow::Error>(DiskStats {
            name: fit(disk.get_name()?)?,
            read_operations: disk.get_read_operations(),
            write_operations: disk.get_write_operations(),
            other_operations: disk.get_other_operations(),
            read_bytes: disk.get_read_bytes(),
            written_bytes: disk.get_written_bytes(),
            errors: disk.get_errors(),
        })
    };
    let found = devices(&response)?
        .get_disks()?
        .iter()
        .map(disk)
        .collect::<Result<Vec<_>>>()?;
    if json {
        return show::print_json(&found);
    }
    let rows = found.into_iter().map(|disk| {
        let counts = [
            disk.read_operations,
            disk.read_bytes,
            disk.write_operations,
            disk.written_bytes,
            disk.other_operations,
            disk.errors,
        ];
        let [a, b, c, d, e, f] = counts.map(|count| count.to_string());
        [disk.name, a, b, c, d, e, f]
    });
    let headings = [
        "NAME",
        "READS",
        "BYTES READ",
        "WRITES",
        "BYTES WRITTEN",
        "OTHERS",
        "ERRORS",
    ];
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
            let mut request = networks.set_link_request();
            request.get().set_network(network);
            request.get().set_up(*state == LinkState::Up);
            read_completion(request.send().promise.await?.get()?)?;
        }
        NetCommand::Stats(named) => {
            let (_manager, guest) = lookup(handle, place, &named.name).await?;
            net_stats(&guest, named.json).await?;
        }
    }
    Ok(status::SUCCESS)
}

async fn list_networks(networks: &net_controller::Client, json: bool) -> Result<()> {
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

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NetworkStats {
    name: String,
    received: Direction,
    sent: Direction,
}

#[derive(Serialize)]
struct Direction {
    frames: u64,
    bytes: u64,
    dropped: u64,
    errors: u64,
}

async fn net_stats(guest: &guest::Client, json: bool) -> Result<()> {
    let response = stats(guest).await?;
    let network = |network: device_stats::network::Reader<'_>| {
        Ok::<_, anyhow::Error>(NetworkStats {
            name: fit(network.get_name()?)?,
            received: Direction {
                frames: network.get_received_frames(),
                bytes: network.get_received_bytes(),
                dropped: network.get_received_dropped(),
                errors: network.get_received_errors(),
            },
            sent: Direction {
                frames: network.get_sent_frames(),
                bytes: network.get_sent_bytes(),
                dropped: network.get_sent_dropped(),
                errors: network.get_sent_errors(),
            },
        })
    };
    let found = devices(&response)?
        .get_networks()?
        .iter()
        .map(network)
        .collect::<Result<Vec<_>>>()?;
    if json {
        return show::print_json(&found);
    }
    let rows = found.into_iter().flat_map(|network| {
        let row = |way: &str, counts: &Direction| {
            let counts = [counts.frames, counts.bytes, counts.dropped, counts.errors];
            let [a, b, c, d] = counts.map(|count| count.to_string());
            [network.name.clone(), way.to_owned(), a, b, c, d]
        };
        [row("received", &network.received), row("sent", &network.sent)]
    });
    let headings = ["NAME", "DIRECTION", "FRAMES", "BYTES", "DROPPED", "ERRORS"];
    show::print(table::table(&headings, rows).as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(mebibytes(3 << 20), "3 MiB");
        assert_eq!(mebibytes(4096), "4096 bytes");
    }
}
