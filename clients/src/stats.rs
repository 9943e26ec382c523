//! `guest stats`, `disk stats` and `net stats`: what a guest's vCPUs and devices have counted.

use std::time::Duration;

use anyhow::Result;
use sepal_schema::{
    device_capnp::device_stats,
    error::Error,
    guest_capnp::{guest, observer, statistics, stats},
    transport::Handle,
};
use serde::Serialize;

use crate::{args::Named, calls, devices::fit, manager::Manager, place::Place, show, status, table};

/// Bytes of a balloon's page.
const PAGE: u64 = 4096;

/// The figures of a guest, as JSON; the names are the protocol's.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Stats {
    /// How long ago the component told them.
    age_seconds: f64,
    vcpus: Vec<Vcpu>,
    serial_dropped: u64,
    disks: Vec<Disk>,
    networks: Vec<Network>,
    balloon: Option<Balloon>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Vcpu {
    index: u8,
    exits: u64,
    io_exits: u64,
    mmio_exits: u64,
    other_exits: u64,
    assists: u64,
    cpu_time_seconds: f64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Disk {
    name: String,
    read_operations: u64,
    write_operations: u64,
    other_operations: u64,
    read_bytes: u64,
    written_bytes: u64,
    errors: u64,
}

#[derive(Serialize)]
struct Network {
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

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Balloon {
    current_bytes: u64,
    requested_bytes: u64,
    reported_bytes: u64,
}

/// `guest stats`.
pub(crate) async fn stats(handle: &Handle, place: &Place, args: &Named) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    show(&of_guest(&guest), args.json).await
}

/// The facet with the figures.
fn of_guest(guest: &guest::Client) -> statistics::Client {
    guest.statistics_request().send().pipeline.get_statistics()
}

/// Shows all figures.
pub(crate) async fn show(statistics: &statistics::Client, json: bool) -> Result<u8> {
    show_all(&get(statistics).await?, json)
}

/// Shows what an observer sees of them.
pub(crate) async fn show_seen(observer: &observer::Client, json: bool) -> Result<u8> {
    let response = observer.stats_request().send().promise.await?;
    show_all(&read_result(response.get()?)?, json)
}

fn show_all(stats: &Stats, json: bool) -> Result<u8> {
    if json {
        show::print_json(stats)?;
        return Ok(status::SUCCESS);
    }
    let mut facts = Vec::new();
    if stats.age_seconds > 0.0 {
        let age = table::duration(ns(stats.age_seconds));
        facts.push(("age", format!("{age}: the component has not answered since")));
    }
    if let Some(balloon) = &stats.balloon {
        let of = |bytes| table::size(bytes);
        facts.push((
            "balloon",
            format!(
                "{} of {} requested",
                of(balloon.current_bytes),
                of(balloon.requested_bytes)
            ),
        ));
        facts.push(("pages given back", of(balloon.reported_bytes)));
    }
    facts.push(("serial output lost", format!("{} bytes", stats.serial_dropped)));
    let vcpus = stats.vcpus.iter().map(|vcpu| {
        let counts = [
            vcpu.exits,
            vcpu.io_exits,
            vcpu.mmio_exits,
            vcpu.other_exits,
            vcpu.assists,
        ];
        let [a, b, c, d, e] = counts.map(|count| count.to_string());
        [
            vcpu.index.to_string(),
            a,
            b,
            c,
            d,
            e,
            table::duration(ns(vcpu.cpu_time_seconds)),
        ]
    });
    let headings = ["VCPU", "EXITS", "I/O", "MMIO", "OTHERS", "ASSISTS", "CPU TIME"];
    let mut text = table::facts(&facts);
    text.push_str(&table::table(&headings, vcpus));
    if !stats.disks.is_empty() {
        text.push_str(&disk_table(&stats.disks));
    }
    if !stats.networks.is_empty() {
        text.push_str(&network_table(&stats.networks));
    }
    show::print(text.as_bytes())?;
    Ok(status::SUCCESS)
}

fn ns(seconds: f64) -> u64 {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// `guest disk stats`.
pub(crate) async fn disks(guest: &guest::Client, json: bool) -> Result<()> {
    let disks = get(&of_guest(guest)).await?.disks;
    match json {
        true => show::print_json(&disks),
        false => show::print(disk_table(&disks).as_bytes()).map(drop),
    }
}

/// `guest net stats`.
pub(crate) async fn networks(guest: &guest::Client, json: bool) -> Result<()> {
    let networks = get(&of_guest(guest)).await?.networks;
    match json {
        true => show::print_json(&networks),
        false => show::print(network_table(&networks).as_bytes()).map(drop),
    }
}

fn disk_table(disks: &[Disk]) -> String {
    let rows = disks.iter().map(|disk| {
        let counts = [
            disk.read_operations,
            disk.read_bytes,
            disk.write_operations,
            disk.written_bytes,
            disk.other_operations,
            disk.errors,
        ];
        let [a, b, c, d, e, f] = counts.map(|count| count.to_string());
        [disk.name.clone(), a, b, c, d, e, f]
    });
    let headings = [
        "DISK",
        "READS",
        "BYTES READ",
        "WRITES",
        "BYTES WRITTEN",
        "OTHERS",
        "ERRORS",
    ];
    table::table(&headings, rows)
}

fn network_table(networks: &[Network]) -> String {
    let rows = networks.iter().flat_map(|network| {
        let row = |way: &str, counts: &Direction| {
            let counts = [counts.frames, counts.bytes, counts.dropped, counts.errors];
            let [a, b, c, d] = counts.map(|count| count.to_string());
            [network.name.clone(), way.to_owned(), a, b, c, d]
        };
        [row("received", &network.received), row("sent", &network.sent)]
    });
    let headings = ["NETWORK", "DIRECTION", "FRAMES", "BYTES", "DROPPED", "ERRORS"];
    table::table(&headings, rows)
}

async fn get(statistics: &statistics::Client) -> Result<Stats> {
    let response = statistics.get_request().send().promise.await?;
    read_result(response.get()?)
}

fn read_result(result: statistics::stats_result::Reader<'_>) -> Result<Stats> {
    use statistics::stats_result::Which;
    match result.which()? {
        Which::Stats(stats) => read(stats?),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

fn read(from: stats::Reader<'_>) -> Result<Stats> {
    let devices = from.get_devices()?;
    let vcpu = |vcpu: stats::vcpu::Reader<'_>| Vcpu {
        index: vcpu.get_index(),
        exits: vcpu.get_exits(),
        io_exits: vcpu.get_io_exits(),
        mmio_exits: vcpu.get_mmio_exits(),
        other_exits: vcpu.get_other_exits(),
        assists: vcpu.get_assists(),
        cpu_time_seconds: show::seconds(vcpu.get_cpu_time_ns()),
    };
    let balloon = |balloon: device_stats::balloon::Reader<'_>| Balloon {
        current_bytes: u64::from(balloon.get_current_pages()) * PAGE,
        requested_bytes: u64::from(balloon.get_requested_pages()) * PAGE,
        reported_bytes: balloon.get_reported_bytes(),
    };
    Ok(Stats {
        age_seconds: show::seconds(from.get_age_ns()),
        vcpus: from.get_vcpus()?.iter().map(vcpu).collect(),
        serial_dropped: from.get_serial_dropped(),
        disks: devices.get_disks()?.iter().map(disk).collect::<Result<_>>()?,
        networks: devices.get_networks()?.iter().map(network).collect::<Result<_>>()?,
        balloon: match devices.has_balloon() {
            true => Some(balloon(devices.get_balloon()?)),
            false => None,
        },
    })
}

fn disk(from: device_stats::disk::Reader<'_>) -> Result<Disk> {
    Ok(Disk {
        name: fit(from.get_name()?)?,
        read_operations: from.get_read_operations(),
        write_operations: from.get_write_operations(),
        other_operations: from.get_other_operations(),
        read_bytes: from.get_read_bytes(),
        written_bytes: from.get_written_bytes(),
        errors: from.get_errors(),
    })
}

fn network(from: device_stats::network::Reader<'_>) -> Result<Network> {
    Ok(Network {
        name: fit(from.get_name()?)?,
        received: Direction {
            frames: from.get_received_frames(),
            bytes: from.get_received_bytes(),
            dropped: from.get_received_dropped(),
            errors: from.get_received_errors(),
        },
        sent: Direction {
            frames: from.get_sent_frames(),
            bytes: from.get_sent_bytes(),
            dropped: from.get_sent_dropped(),
            errors: from.get_sent_errors(),
        },
    })
}
