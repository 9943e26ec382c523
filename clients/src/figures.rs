//! The figures of guests, as Rust values and as JSON: what `stats`, `top` and `metrics` show.
//!
//! They come from components, which a guest may have taken over: names are made fit for a terminal, and a text that is none does not spoil the rest.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use sepal_schema::{
    device_capnp::{balloon_controller::mem_stat, device_stats},
    error::Error,
    guest_capnp::{VcpuState, statistics, stats},
    manager_capnp::guest_manager,
};
use serde::Serialize;

use crate::{devices::PAGE, show};

/// The figures of a guest; as JSON the names are the protocol's.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Stats {
    /// How long ago the component told them.
    pub(crate) age_seconds: f64,
    pub(crate) uptime_seconds: f64,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) memory: Memory,
    pub(crate) serial_dropped: u64,
    pub(crate) disks: Vec<Disk>,
    pub(crate) networks: Vec<Network>,
    pub(crate) balloon: Option<Balloon>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) state: &'static str,
    pub(crate) exits: u64,
    pub(crate) io_exits: u64,
    pub(crate) mmio_exits: u64,
    pub(crate) other_exits: u64,
    pub(crate) assists: u64,
    pub(crate) reasons: BTreeMap<String, u64>,
    pub(crate) cpu_time_seconds: f64,
}

/// Memory of the component's process on the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Memory {
    pub(crate) guest_bytes: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) shared_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Disk {
    pub(crate) name: String,
    pub(crate) read_operations: u64,
    pub(crate) write_operations: u64,
    pub(crate) other_operations: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) errors: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Network {
    pub(crate) name: String,
    pub(crate) received: Direction,
    pub(crate) sent: Direction,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Direction {
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    pub(crate) dropped: u64,
    pub(crate) errors: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Balloon {
    pub(crate) current_bytes: u64,
    pub(crate) requested_bytes: u64,
    pub(crate) reported_bytes: u64,
    /// None if the guest has not told.
    pub(crate) memory: Option<GuestMemory>,
}

/// What the guest said about its memory; what it left out is not there.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct GuestMemory {
    /// How long before the figures were told it said so.
    pub(crate) age_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) swapped_in_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) swapped_out_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) free_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) total_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) available_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disk_caches_bytes: Option<u64>,
}

/// A guest that runs, and its figures.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    pub(crate) name: String,
    /// As people write it, or empty.
    pub(crate) uuid: String,
    pub(crate) stats: Result<Stats, Error>,
}

/// The figures of all guests that run, sorted by name.
pub(crate) async fn of_all(manager: &guest_manager::Client) -> Result<Vec<Figures>> {
    let mut all: Vec<Figures> = Vec::new();
    loop {
        let mut request = manager.stats_request();
        if let Some(last) = all.last() {
            request.get().set_after(&last.name[..]);
        }
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        let guests = answer.get_guests()?;
        for guest in guests {
            let name = text(guest.get_name())?;
            // Whoever answers with the same page for ever is not read for ever.
            if all.last().is_some_and(|last| last.name >= name) {
                bail!("the guest manager tells guests out of their order");
            }
            all.push(Figures {
                name,
                uuid: uuid(guest.get_uuid()?),
                stats: match guest.has_error() {
                    true => Err(Error::read(guest.get_error()?)?),
                    false => Ok(Stats::read(guest.get_stats()?)?),
                },
            });
        }
        if !answer.get_more() || guests.is_empty() {
            return Ok(all);
        }
    }
}

/// A UUID as people write it; empty if it is none.
fn uuid(bytes: &[u8]) -> String {
    uuid::Uuid::from_slice(bytes).map_or_else(|_| String::new(), |uuid| uuid.to_string())
}

/// The figures of a guest.
pub(crate) async fn of(statistics: &statistics::Client) -> Result<Stats> {
    let response = statistics.get_request().send().promise.await?;
    Stats::read_result(response.get()?)
}

/// What a vCPU does, in a word.
pub(crate) fn state_name(state: VcpuState) -> &'static str {
    match state {
        VcpuState::Stopped => "stopped",
        VcpuState::Running => "running",
        VcpuState::Halted => "halted",
        VcpuState::Paused => "paused",
    }
}

/// A text of a component's, fit for a terminal.
fn text(from: capnp::Result<capnp::text::Reader<'_>>) -> Result<String, capnp::Error> {
    let text = String::from_utf8_lossy(from?.as_bytes()).into_owned();
    Ok(text.chars().filter(|c| !c.is_control()).collect())
}

impl Stats {
    /// Reads what a guest's statistics answer.
    ///
    /// # Errors
    /// What kept them from answering.
    pub(crate) fn read_result(result: statistics::stats_result::Reader<'_>) -> Result<Self> {
        use statistics::stats_result::Which;
        match result.which()? {
            Which::Stats(stats) => Ok(Self::read(stats?)?),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    fn read(from: stats::Reader<'_>) -> Result<Self, capnp::Error> {
        let devices = from.get_devices()?;
        let memory = from.get_memory()?;
        Ok(Self {
            age_seconds: show::seconds(from.get_age_ns()),
            uptime_seconds: show::seconds(from.get_uptime_ns()),
            vcpus: from.get_vcpus()?.iter().map(Vcpu::read).collect::<Result<_, _>>()?,
            memory: Memory {
                guest_bytes: memory.get_guest(),
                resident_bytes: memory.get_resident(),
                shared_bytes: memory.get_shared(),
            },
            serial_dropped: from.get_serial_dropped(),
            disks: devices.get_disks()?.iter().map(Disk::read).collect::<Result<_, _>>()?,
            networks: devices
                .get_networks()?
                .iter()
                .map(Network::read)
                .collect::<Result<_, _>>()?,
            balloon: match devices.has_balloon() {
                true => Some(Balloon::read(devices.get_balloon()?)?),
                false => None,
            },
        })
    }

    /// CPU time of all vCPUs.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.vcpus.iter().map(|vcpu| vcpu.cpu_time_seconds).sum()
    }

    /// Exits of all vCPUs.
    pub(crate) fn exits(&self) -> u64 {
        sum(self.vcpus.iter().map(|vcpu| vcpu.exits))
    }

    /// Bytes of all disks, one way.
    pub(crate) fn disk_bytes(&self, way: impl Fn(&Disk) -> u64) -> u64 {
        sum(self.disks.iter().map(way))
    }

    /// Bytes of all network cards, one way.
    pub(crate) fn network_bytes(&self, way: impl Fn(&Network) -> Direction) -> u64 {
        sum(self.networks.iter().map(|network| way(network).bytes))
    }
}

/// What a component tells is no reason to panic.
fn sum(counts: impl Iterator<Item = u64>) -> u64 {
    counts.fold(0, u64::saturating_add)
}

impl Vcpu {
    fn read(from: stats::vcpu::Reader<'_>) -> Result<Self, capnp::Error> {
        let mut reasons = BTreeMap::new();
        for reason in from.get_reasons()? {
            reasons.insert(text(reason.get_reason())?, reason.get_count());
        }
        Ok(Self {
            index: from.get_index(),
            // One that this version does not know runs as far as anybody can tell.
            state: from.get_state().map_or("unknown", state_name),
            exits: from.get_exits(),
            io_exits: from.get_io_exits(),
            mmio_exits: from.get_mmio_exits(),
            other_exits: from.get_other_exits(),
            assists: from.get_assists(),
            reasons,
            cpu_time_seconds: show::seconds(from.get_cpu_time_ns()),
        })
    }
}

impl Disk {
    fn read(from: device_stats::disk::Reader<'_>) -> Result<Self, capnp::Error> {
        Ok(Self {
            name: text(from.get_name())?,
            read_operations: from.get_read_operations(),
            write_operations: from.get_write_operations(),
            other_operations: from.get_other_operations(),
            read_bytes: from.get_read_bytes(),
            written_bytes: from.get_written_bytes(),
            errors: from.get_errors(),
        })
    }
}

impl Network {
    fn read(from: device_stats::network::Reader<'_>) -> Result<Self, capnp::Error> {
        Ok(Self {
            name: text(from.get_name())?,
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
}

impl Balloon {
    fn read(from: device_stats::balloon::Reader<'_>) -> Result<Self, capnp::Error> {
        let memory = from.get_memory()?;
        let age_seconds = show::seconds(from.get_memory_age_ns());
        Ok(Self {
            current_bytes: u64::from(from.get_current_pages()) * PAGE,
            requested_bytes: u64::from(from.get_requested_pages()) * PAGE,
            reported_bytes: from.get_reported_bytes(),
            memory: (!memory.is_empty()).then(|| GuestMemory::read(memory.iter(), age_seconds)),
        })
    }
}

impl GuestMemory {
    /// Tags as virtio 1.2 numbers them, section 5.5.6.4.
    fn read<'a>(stats: impl Iterator<Item = mem_stat::Reader<'a>>, age_seconds: f64) -> Self {
        let mut memory = Self {
            age_seconds,
            ..Self::default()
        };
        for stat in stats {
            let field = match stat.get_tag() {
                0 => &mut memory.swapped_in_bytes,
                1 => &mut memory.swapped_out_bytes,
                2 => &mut memory.major_faults,
                3 => &mut memory.minor_faults,
                4 => &mut memory.free_bytes,
                5 => &mut memory.total_bytes,
                6 => &mut memory.available_bytes,
                7 => &mut memory.disk_caches_bytes,
                _ => continue,
            };
            *field = Some(stat.get_value());
        }
        memory
    }
}
