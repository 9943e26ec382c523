//! What there is to know about guests, as metrics: their names, units and labels. Pure.
//!
//! Each guest is told apart by the label `name`; seconds and bytes are the units. What a guest has not is left out, and so are the figures of one whose
//! component has told none.

use sepal_schema::info::{GuestInfo, GuestStatus, status_name};
use uuid::Uuid;

use super::text::{Exposition, Family, Kind, Samples, Value};
use crate::figures::{Balloon, Direction, Disk, Figures, GuestMemory, Stats};

/// What is told at a time.
#[derive(Default)]
pub(super) struct Snapshot {
    /// Of the guest manager; none if there is none to be reached, and then nothing else is known.
    pub(super) version: Option<String>,
    pub(super) guests: Vec<GuestInfo>,
    pub(super) figures: Vec<Figures>,
}

/// All states of a guest, by their names.
const STATUSES: [GuestStatus; 7] = [
    GuestStatus::NotStarted,
    GuestStatus::Starting,
    GuestStatus::Running,
    GuestStatus::Stopping,
    GuestStatus::Stopped,
    GuestStatus::VmmUnexpectedTermination,
    GuestStatus::CrashLoop,
];
/// All states of a vCPU; "unknown" is one that this version does not know.
const VCPU_STATES: [&str; 5] = ["stopped", "running", "halted", "paused", "unknown"];

/// A family, and where its values are.
type Of<T, V> = (Family, fn(&T) -> V);

const fn counter(name: &'static str, unit: &'static str, help: &'static str) -> Family {
    family(name, Kind::Counter, unit, help)
}

const fn gauge(name: &'static str, unit: &'static str, help: &'static str) -> Family {
    family(name, Kind::Gauge, unit, help)
}

const fn family(name: &'static str, kind: Kind, unit: &'static str, help: &'static str) -> Family {
    Family { name, kind, unit, help }
}

/// The text of a snapshot.
pub(super) fn write(snapshot: &Snapshot) -> String {
    let mut text = Exposition::default();
    let up = gauge("sepal_up", "", "Whether the guest manager can be reached.");
    text.family(up, |samples| samples.add(&[], u64::from(snapshot.version.is_some())));
    let info = family("sepal_manager", Kind::Info, "", "The guest manager.");
    if let Some(version) = &snapshot.version {
        text.family(info, |samples| samples.add(&[("version", version)], 1_u64));
        write_infos(&mut text, &snapshot.guests);
        write_figures(&mut text, &snapshot.figures);
    }
    text.finish()
}

fn write_infos(text: &mut Exposition, guests: &[GuestInfo]) {
    let all = gauge("sepal_guests", "", "Guests, by status.");
    text.family(all, |samples| {
        for status in STATUSES {
            let count = guests.iter().filter(|guest| guest.status == status).count();
            samples.add(&[("status", status_name(status))], count as u64);
        }
    });
    let info = family("sepal_guest", Kind::Info, "", "What a guest is.");
    text.family(info, |samples| {
        for guest in guests {
            let kernel = guest.descriptor.as_ref().map_or("", |descriptor| &descriptor.kernel);
            let uuid = guest.upkeep.uuid.as_ref().map_or_else(String::new, Uuid::to_string);
            let labels = [
                ("name", &guest.name[..]),
                ("uuid", &uuid),
                ("kernel", kernel),
                ("defined", yes_or_no(guest.upkeep.defined)),
                ("durable", yes_or_no(guest.upkeep.durable)),
            ];
            samples.add(&labels, 1_u64);
        }
    });
    let statuses = STATUSES.map(status_name);
    text.states(
        ("sepal_guest_status", "Where a guest is in its life."),
        &statuses,
        |states| {
            for guest in guests {
                states.add(&[("name", &guest.name)], status_name(guest.status));
            }
        },
    );
    let mut each = |family: Family, value: fn(&GuestInfo) -> Option<Value>| {
        text.family(family, |samples| {
            for guest in guests {
                if let Some(value) = value(guest) {
                    samples.add(&[("name", &guest.name)], value);
                }
            }
        });
    };
    each(gauge("sepal_guest_paused", "", "Whether a guest is paused."), |guest| {
        Some(u64::from(guest.paused).into())
    });
    each(
        counter(
            "sepal_guest_creations",
            "",
            "How often a guest was created under its name.",
        ),
        |guest| Some(guest.generation.into()),
    );
    each(
        counter(
            "sepal_guest_restarts",
            "",
            "How often a guest was begun again by itself since somebody started it.",
        ),
        |guest| Some(u64::from(guest.upkeep.restarts).into()),
    );
    each(
        gauge(
            "sepal_guest_failures",
            "",
            "How many runs of a guest in a row have failed.",
        ),
        |guest| Some(u64::from(guest.upkeep.failures).into()),
    );
    each(
        gauge(
            "sepal_guest_problems",
            "",
            "How much is not as it should be with a guest.",
        ),
        |guest| Some((guest.problems.len() as u64).into()),
    );
    each(gauge("sepal_guest_vcpus", "", "vCPUs of a guest."), |guest| {
        Some(u64::from(guest.descriptor.as_ref()?.cpus).into())
    });
}

fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// Those of which there are figures.
fn known(figures: &[Figures]) -> impl Iterator<Item = (&str, &Stats)> {
    figures
        .iter()
        .filter_map(|figures| Some((&figures.name[..], figures.stats.as_ref().ok()?)))
}

/// Writes a family with one sample for each guest that has it.
fn each(text: &mut Exposition, figures: &[Figures], family: Family, value: impl Fn(&Stats) -> Option<Value>) {
    text.family(family, |samples| {
        for (name, stats) in known(figures) {
            if let Some(value) = value(stats) {
                samples.add(&[("name", name)], value);
            }
        }
    });
}

fn write_figures(text: &mut Exposition, figures: &[Figures]) {
    each(
        text,
        figures,
        gauge(
            "sepal_guest_statistics_age_seconds",
            "seconds",
            "How long ago a guest's component told its figures.",
        ),
        |stats| Some(stats.age_seconds.into()),
    );
    each(
        text,
        figures,
        gauge(
            "sepal_guest_uptime_seconds",
            "seconds",
            "How long a guest has been running.",
        ),
        |stats| Some(stats.uptime_seconds.into()),
    );
    write_vcpus(text, figures);
    write_memory(text, figures);
    write_disks(text, figures);
    write_networks(text, figures);
    each(
        text,
        figures,
        counter(
            "sepal_guest_serial_dropped_bytes",
            "bytes",
            "Output of a guest's serial port that was lost because nobody took it.",
        ),
        |stats| Some(stats.serial_dropped.into()),
    );
}

fn write_vcpus(text: &mut Exposition, figures: &[Figures]) {
    let time = counter(
        "sepal_guest_vcpu_cpu_seconds",
        "seconds",
        "CPU time of a vCPU's thread.",
    );
    text.family(time, |samples| {
        for (name, stats) in known(figures) {
            for vcpu in &stats.vcpus {
                let index = vcpu.index.to_string();
                samples.add(&[("name", name), ("vcpu", &index)], vcpu.cpu_time_seconds);
            }
        }
    });
    let exits = counter(
        "sepal_guest_vcpu_exits",
        "",
        "Exits of a vCPU to its component, by KVM's reasons.",
    );
    text.family(exits, |samples| {
        for (name, stats) in known(figures) {
            for vcpu in &stats.vcpus {
                let index = vcpu.index.to_string();
                for (reason, count) in &vcpu.reasons {
                    samples.add(&[("name", name), ("vcpu", &index), ("reason", reason)], *count);
                }
            }
        }
    });
    let help = "What a vCPU does: halted waits for an interrupt, as far as that can be told.";
    text.states(("sepal_guest_vcpu_state", help), &VCPU_STATES, |states| {
        for (name, stats) in known(figures) {
            for vcpu in &stats.vcpus {
                states.add(&[("name", name), ("vcpu", &vcpu.index.to_string())], vcpu.state);
            }
        }
    });
}

fn write_memory(text: &mut Exposition, figures: &[Figures]) {
    let mut memory = |name, help, value: fn(&Stats) -> u64| {
        each(text, figures, gauge(name, "bytes", help), |stats| {
            Some(value(stats).into())
        });
    };
    memory(
        "sepal_guest_memory_bytes",
        "Memory that a guest has, plugged memory included.",
        |stats| stats.memory.guest_bytes,
    );
    memory(
        "sepal_guest_resident_memory_bytes",
        "Memory of the host that a guest's component has, guest memory included.",
        |stats| stats.memory.resident_bytes,
    );
    memory(
        "sepal_guest_resident_shared_memory_bytes",
        "How much of the resident memory is shared memory or files, as guest memory is.",
        |stats| stats.memory.shared_bytes,
    );
    let mut balloon = |family, value: fn(&Balloon) -> Option<Value>| {
        each(text, figures, family, |stats| value(stats.balloon.as_ref()?));
    };
    balloon(
        gauge(
            "sepal_guest_balloon_bytes",
            "bytes",
            "Memory that a guest lends back to the host.",
        ),
        |balloon| Some(balloon.current_bytes.into()),
    );
    balloon(
        gauge(
            "sepal_guest_balloon_requested_bytes",
            "bytes",
            "Memory that a guest is asked to lend back.",
        ),
        |balloon| Some(balloon.requested_bytes.into()),
    );
    balloon(
        counter(
            "sepal_guest_balloon_reported_bytes",
            "bytes",
            "Memory that a guest gave back by free page reporting.",
        ),
        |balloon| Some(balloon.reported_bytes.into()),
    );
    balloon(
        gauge(
            "sepal_guest_inside_age_seconds",
            "seconds",
            "How long before its figures a guest told about its memory.",
        ),
        |balloon| Some(balloon.memory.as_ref()?.age_seconds.into()),
    );
    let told: [Of<GuestMemory, Option<u64>>; 8] = [
        (
            gauge("sepal_guest_inside_size_bytes", "bytes", "Memory by the guest's count."),
            |memory| memory.total_bytes,
        ),
        (
            gauge(
                "sepal_guest_inside_free_bytes",
                "bytes",
                "Memory that the guest does not use.",
            ),
            |memory| memory.free_bytes,
        ),
        (
            gauge(
                "sepal_guest_inside_available_bytes",
                "bytes",
                "Memory that the guest could have without swapping.",
            ),
            |memory| memory.available_bytes,
        ),
        (
            gauge(
                "sepal_guest_inside_caches_bytes",
                "bytes",
                "Memory that caches the guest's files.",
            ),
            |memory| memory.disk_caches_bytes,
        ),
        (
            counter(
                "sepal_guest_inside_swapped_in_bytes",
                "bytes",
                "Memory that the guest swapped in.",
            ),
            |memory| memory.swapped_in_bytes,
        ),
        (
            counter(
                "sepal_guest_inside_swapped_out_bytes",
                "bytes",
                "Memory that the guest swapped out.",
            ),
            |memory| memory.swapped_out_bytes,
        ),
        (
            counter(
                "sepal_guest_inside_major_faults",
                "",
                "Page faults in the guest that waited for a disk.",
            ),
            |memory| memory.major_faults,
        ),
        (
            counter(
                "sepal_guest_inside_minor_faults",
                "",
                "Page faults in the guest that did not.",
            ),
            |memory| memory.minor_faults,
        ),
    ];
    for (family, value) in told {
        each(text, figures, family, |stats| {
            Some(value(stats.balloon.as_ref()?.memory.as_ref()?)?.into())
        });
    }
}

fn write_disks(text: &mut Exposition, figures: &[Figures]) {
    let operations = counter(
        "sepal_guest_disk_operations",
        "",
        "Operations of a guest's disk, by what they do.",
    );
    text.family(operations, |samples| {
        for (name, stats) in known(figures) {
            for disk in &stats.disks {
                let mut add = |operation, count: u64| {
                    samples.add(&[("name", name), ("disk", &disk.name), ("operation", operation)], count);
                };
                add("read", disk.read_operations);
                add("write", disk.write_operations);
                add("other", disk.other_operations);
            }
        }
    });
    let counts: [Of<Disk, u64>; 3] = [
        (
            counter(
                "sepal_guest_disk_read_bytes",
                "bytes",
                "Bytes read from a guest's disk.",
            ),
            |disk| disk.read_bytes,
        ),
        (
            counter(
                "sepal_guest_disk_written_bytes",
                "bytes",
                "Bytes written to a guest's disk.",
            ),
            |disk| disk.written_bytes,
        ),
        (
            counter(
                "sepal_guest_disk_errors",
                "",
                "Operations of a guest's disk that failed.",
            ),
            |disk| disk.errors,
        ),
    ];
    for (family, value) in counts {
        text.family(family, |samples| {
            for (name, stats) in known(figures) {
                for disk in &stats.disks {
                    samples.add(&[("name", name), ("disk", &disk.name)], value(disk));
                }
            }
        });
    }
}

fn write_networks(text: &mut Exposition, figures: &[Figures]) {
    let counts: [Of<Direction, u64>; 4] = [
        (
            counter(
                "sepal_guest_network_bytes",
                "bytes",
                "Bytes of frames, as the guest sees them.",
            ),
            |way| way.bytes,
        ),
        (
            counter("sepal_guest_network_frames", "", "Frames, as the guest sees them."),
            |way| way.frames,
        ),
        (
            counter("sepal_guest_network_dropped_frames", "", "Frames that were dropped."),
            |way| way.dropped,
        ),
        (
            counter(
                "sepal_guest_network_errors",
                "",
                "Frames that could not be sent or received.",
            ),
            |way| way.errors,
        ),
    ];
    for (family, value) in counts {
        text.family(family, |samples| {
            for (name, stats) in known(figures) {
                for network in &stats.networks {
                    let add = |samples: &mut Samples<'_>, direction, way| {
                        let labels = [("name", name), ("network", &network.name[..]), ("direction", direction)];
                        samples.add(&labels, value(way));
                    };
                    add(samples, "received", &network.received);
                    add(samples, "sent", &network.sent);
                }
            }
        });
    }
}
