//! `guest stats`, `disk stats` and `net stats`: what the vCPUs and devices of a guest, or of all, have counted.

use std::time::Duration;

use anyhow::Result;
use sepal_schema::{
    guest_capnp::{guest, observer, statistics},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args, calls,
    figures::{self, Balloon, Direction, Disk, Figures, GuestMemory, Network, Stats, Vcpu},
    manager::Manager,
    place::Place,
    show, status, table,
};

/// `guest stats`.
pub(crate) async fn stats(handle: &Handle, place: &Place, args: &args::Stats) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    match &args.name {
        Some(name) => {
            let guest = calls::lookup(&manager.client, name).await?;
            show(&of_guest(&guest), args.json).await
        }
        None => show_guests(&figures::of_all(&manager.client).await?, args.json),
    }
}

/// The facet with the figures.
fn of_guest(guest: &guest::Client) -> statistics::Client {
    guest.statistics_request().send().pipeline.get_statistics()
}

/// Shows all figures.
pub(crate) async fn show(statistics: &statistics::Client, json: bool) -> Result<u8> {
    show_all(&figures::of(statistics).await?, json)
}

/// Shows what an observer sees of them.
pub(crate) async fn show_seen(observer: &observer::Client, json: bool) -> Result<u8> {
    let response = observer.stats_request().send().promise.await?;
    show_all(&Stats::read_result(response.get()?)?, json)
}

fn show_all(stats: &Stats, json: bool) -> Result<u8> {
    if json {
        show::print_json(stats)?;
        return Ok(status::SUCCESS);
    }
    let mut text = table::facts(&facts(stats));
    text.push_str(&vcpu_table(&stats.vcpus));
    text.push_str(&reason_table(&stats.vcpus));
    if !stats.disks.is_empty() {
        text.push_str(&disk_table(&stats.disks));
    }
    if !stats.networks.is_empty() {
        text.push_str(&network_table(&stats.networks));
    }
    show::print(text.as_bytes())?;
    Ok(status::SUCCESS)
}

fn facts(stats: &Stats) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    // What would be told as 0.0s is of now.
    if stats.age_seconds >= 0.05 {
        let age = table::duration(ns(stats.age_seconds));
        facts.push(("age", format!("{age}: its component has told nothing since")));
    }
    facts.push(("uptime", table::duration(ns(stats.uptime_seconds))));
    let memory = &stats.memory;
    let resident = match memory.resident_bytes {
        0 => String::new(),
        bytes => format!(
            ", {} resident on the host, {} of it shared",
            table::short(bytes),
            table::short(memory.shared_bytes)
        ),
    };
    facts.push(("memory", format!("{}{resident}", table::short(memory.guest_bytes))));
    if let Some(balloon) = &stats.balloon {
        balloon_facts(balloon, &mut facts);
    }
    facts.push(("serial output lost", format!("{} bytes", stats.serial_dropped)));
    facts
}

fn balloon_facts(balloon: &Balloon, facts: &mut Vec<(&'static str, String)>) {
    let size = format!(
        "{} of {} requested",
        table::size(balloon.current_bytes),
        table::size(balloon.requested_bytes)
    );
    facts.push(("balloon", size));
    facts.push(("pages given back", table::size(balloon.reported_bytes)));
    if let Some(memory) = &balloon.memory {
        facts.push(("memory in the guest", guest_memory(memory)));
    }
}

fn guest_memory(memory: &GuestMemory) -> String {
    let sizes = [
        ("total", memory.total_bytes),
        ("free", memory.free_bytes),
        ("available", memory.available_bytes),
        ("in disk caches", memory.disk_caches_bytes),
        ("swapped in", memory.swapped_in_bytes),
        ("swapped out", memory.swapped_out_bytes),
    ];
    let size = |(name, bytes): (&str, Option<u64>)| Some(format!("{} {name}", table::short(bytes?)));
    let mut parts: Vec<_> = sizes.into_iter().filter_map(size).collect();
    let faults = [
        ("major faults", memory.major_faults),
        ("minor faults", memory.minor_faults),
    ];
    parts.extend(
        faults
            .into_iter()
            .filter_map(|(name, count)| Some(format!("{} {name}", count?))),
    );
    let age = table::duration(ns(memory.age_seconds));
    format!("{} ({age} before)", parts.join(", "))
}

fn vcpu_table(vcpus: &[Vcpu]) -> String {
    let rows = vcpus.iter().map(|vcpu| {
        let counts = [
            vcpu.exits,
            vcpu.io_exits,
            vcpu.mmio_exits,
            vcpu.other_exits,
            vcpu.assists,
        ];
        let [a, b, c, d, e] = counts.map(|count| count.to_string());
        let time = table::duration(ns(vcpu.cpu_time_seconds));
        [vcpu.index.to_string(), vcpu.state.to_owned(), a, b, c, d, e, time]
    });
    let headings = ["VCPU", "STATE", "EXITS", "I/O", "MMIO", "OTHERS", "ASSISTS", "CPU TIME"];
    table::table(&headings, rows)
}

fn reason_table(vcpus: &[Vcpu]) -> String {
    let rows = vcpus.iter().flat_map(|vcpu| {
        let row = |(reason, count): (&String, &u64)| [vcpu.index.to_string(), reason.clone(), count.to_string()];
        vcpu.reasons.iter().map(row)
    });
    let mut rows = rows.peekable();
    match rows.peek() {
        Some(_) => table::table(&["VCPU", "REASON", "EXITS"], rows),
        None => String::new(),
    }
}

/// The figures of a guest among others, as JSON.
#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
    uuid: &'a str,
    #[serde(flatten)]
    stats: Option<&'a Stats>,
    error: Option<String>,
}

impl<'a> From<&'a Figures> for Named<'a> {
    fn from(figures: &'a Figures) -> Self {
        Self {
            name: &figures.name,
            uuid: &figures.uuid,
            stats: figures.stats.as_ref().ok(),
            error: figures.stats.as_ref().err().map(|error| error.message.clone()),
        }
    }
}

fn show_guests(guests: &[Figures], json: bool) -> Result<u8> {
    if json {
        show::print_json(&guests.iter().map(Named::from).collect::<Vec<_>>())?;
    } else {
        show::print(guest_table(guests).as_bytes())?;
    }
    Ok(status::SUCCESS)
}

fn guest_table(guests: &[Figures]) -> String {
    let rows = guests.iter().map(|figures| {
        let name = figures.name.clone();
        let Ok(stats) = &figures.stats else {
            let [a, b, c, d, e, f, g, h] = std::array::from_fn(|_| "-".to_owned());
            return [name, a, b, c, d, e, f, g, h];
        };
        let bytes = [
            stats.memory.resident_bytes,
            stats.disk_bytes(|disk| disk.read_bytes),
            stats.disk_bytes(|disk| disk.written_bytes),
            stats.network_bytes(|network| network.received),
            stats.network_bytes(|network| network.sent),
        ];
        let [resident, read, written, received, sent] = bytes.map(table::short);
        [
            name,
            table::duration(ns(stats.cpu_seconds())),
            resident,
            read,
            written,
            received,
            sent,
            stats.exits().to_string(),
            table::duration(ns(stats.uptime_seconds)),
        ]
    });
    let headings = [
        "NAME", "CPU TIME", "MEMORY", "READ", "WRITTEN", "RECEIVED", "SENT", "EXITS", "UPTIME",
    ];
    table::table(&headings, rows)
}

fn ns(seconds: f64) -> u64 {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// `guest disk stats`.
pub(crate) async fn disks(guest: &guest::Client, json: bool) -> Result<()> {
    let disks = figures::of(&of_guest(guest)).await?.disks;
    match json {
        true => show::print_json(&disks),
        false => show::print(disk_table(&disks).as_bytes()).map(drop),
    }
}

/// `guest net stats`.
pub(crate) async fn networks(guest: &guest::Client, json: bool) -> Result<()> {
    let networks = figures::of(&of_guest(guest)).await?.networks;
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
