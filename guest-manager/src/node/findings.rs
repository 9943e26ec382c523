//! What is not as it should be with a host, and what to do about it: decided from facts alone.

use sepal_runner::{Layer, host::Subject};
pub use sepal_schema::node_capnp::node_info::finding::Severity;

use super::{Facts, kvm};
use crate::capacity;

/// Less available memory than this holds no guest of the default size.
const LITTLE_MEMORY: u64 = 256 << 20;
/// Less room than this on a disk is soon none.
const LITTLE_DISK: u64 = 64 << 20;
/// Room for fewer guests than this is little.
const FEW_GUESTS: u64 = 16;
/// Most broken files that are told.
const MAX_BROKEN: usize = 4;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub about: &'static str,
    /// A sentence for a person.
    pub what: String,
    /// What to do about it, as a clause.
    pub remedy: String,
}

fn found(severity: Severity, about: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        severity,
        about,
        what: what.into(),
        remedy: remedy.into(),
    }
}

/// All that is not as it should be, worst first.
pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut all = of_kvm(facts);
    all.extend(of_layers(facts));
    all.extend(of_limits(facts));
    all.extend(of_the_rest(facts));
    // Stable: what belongs together stays together.
    all.sort_by_key(|finding| finding.severity as u16);
    all
}

fn of_kvm(facts: &Facts) -> Vec<Finding> {
    if let Some((why, remedy)) = &facts.kvm.refused {
        let what = format!("No guest can be started: {why}.");
        return vec![found(Severity::Problem, "kvm", what, remedy)];
    }
    let mut all = Vec::new();
    if facts.kvm.api_version != kvm::API_VERSION {
        let what = format!(
            "KVM has the version {} of its interface, and {} is needed.",
            facts.kvm.api_version,
            kvm::API_VERSION
        );
        all.push(found(Severity::Problem, "kvm", what, "use a kernel of 5.13 or newer"));
    }
    let missing: Vec<_> = facts
        .kvm
        .capabilities
        .iter()
        .filter(|capability| capability.needed && capability.value == 0)
        .map(|capability| capability.name)
        .collect();
    if !missing.is_empty() {
        let what = format!("KVM lacks what guests need: {}.", missing.join(", "));
        all.push(found(Severity::Problem, "kvm", what, "use a kernel of 5.13 or newer"));
    }
    if !facts.hardware {
        let what = "The host's CPU gives KVM no hardware virtualization: guest kernels run, but many times slower.";
        let remedy = "enable virtualization in the firmware, or nested virtualization where the host is itself a guest, and load kvm_intel or kvm_amd";
        all.push(found(Severity::Warning, "kvm", what, remedy));
    }
    all
}

fn of_layers(facts: &Facts) -> Vec<Finding> {
    let lacking = facts.layers().filter(|(_, offered, ..)| !offered);
    lacking
        .map(|(layer, _, detail, remedy)| match layer {
            Layer::HostUid => {
                let what = format!("The layer {layer} of the jail is missing: {detail}.");
                found(Severity::Note, layer.name(), what, remedy)
            }
            Layer::Cgroup => {
                let what = format!("Guests cannot have limits of memory, threads and processor time: {detail}.");
                found(Severity::Warning, layer.name(), what, remedy)
            }
            _ => {
                let what = format!(
                    "The layer {layer} of the jail is missing ({detail}): guests start only if that is waived (--waive-layer {layer})."
                );
                found(Severity::Problem, layer.name(), what, remedy)
            }
        })
        .collect()
}

fn of_limits(facts: &Facts) -> Vec<Finding> {
    let (room, mut all) = (&facts.room, Vec::new());
    let guests = capacity::guests_by_descriptors(room.descriptors);
    if let (Some(guests), Some(most)) = (guests.filter(|&guests| guests < FEW_GUESTS), room.descriptors.most) {
        let what = format!(
            "The guest manager may have {most} descriptors, of which {} are in use: there is room for about {guests} more guests.",
            room.descriptors.used
        );
        let severity = if guests == 0 {
            Severity::Problem
        } else {
            Severity::Warning
        };
        all.push(found(
            severity,
            "limits",
            what,
            "raise its limit (ulimit -n, LimitNOFILE= of its service)",
        ));
    }
    if let (Some(left), Some(most)) = (room.tasks.left(), room.tasks.most)
        && left < FEW_GUESTS * 8
    {
        let what = format!(
            "{} of the {most} tasks (threads) that there may be are there.",
            room.tasks.used
        );
        let remedy =
            "raise the limit that is nearest (kernel.pid_max, kernel.threads-max, ulimit -u, TasksMax= of its service)";
        all.push(found(Severity::Warning, "limits", what, remedy));
    }
    if let Some(left) = facts.guests.left().filter(|&left| left == 0) {
        let what = format!("There are {} guests, and {left} more are allowed.", facts.guests.used);
        all.push(found(
            Severity::Warning,
            "limits",
            what,
            "start the guest manager with a larger --max-guests",
        ));
    }
    if let Some(available) = room.available {
        let mib = available >> 20;
        if available < LITTLE_MEMORY {
            let what = format!("The host has {mib} MiB of memory left, which no guest of the default size fits into.");
            all.push(found(
                Severity::Warning,
                "memory",
                what,
                "end what is not needed, or give guests less (--memory)",
            ));
        }
        if room.memory.used > facts.memory_bytes && facts.memory_bytes > 0 {
            let what = format!(
                "Guests were promised {} MiB of memory, and the host has {} MiB in all: it may run out.",
                room.memory.used >> 20,
                facts.memory_bytes >> 20
            );
            let remedy =
                "limit what is promised (--max-memory), or give guests balloons (--balloon) and see `guest pressure`";
            all.push(found(Severity::Warning, "memory", what, remedy));
        }
    }
    all
}

fn of_the_rest(facts: &Facts) -> Vec<Finding> {
    let mut all = Vec::new();
    let uring = facts.probe(Subject::IoUring).filter(|uring| !uring.available);
    if let Some(uring) = uring {
        let what = format!(
            "Disks are slower than they could be, without io_uring: {}.",
            uring.detail
        );
        let remedy = uring.remedy.as_deref().unwrap_or_default();
        all.push(found(Severity::Warning, "io_uring", what, remedy));
    }
    for disk in &facts.disks {
        let (purpose, folder) = (disk.purpose, disk.folder.display());
        match disk.free_bytes {
            None => {
                let what = format!("The folder {folder}, for {purpose}, cannot be looked at.");
                all.push(found(
                    Severity::Warning,
                    "disk",
                    what,
                    "make it, or name another (--state, --scratch)",
                ));
            }
            Some(free) if free < LITTLE_DISK => {
                let what = format!("The disk of {folder}, for {purpose}, has {} MiB left.", free >> 20);
                all.push(found(
                    Severity::Warning,
                    "disk",
                    what,
                    "make room there, or name another folder (--state, --scratch)",
                ));
            }
            Some(_) => {}
        }
    }
    if let Some(why) = &facts.no_pressure {
        let what = format!("The guest manager is not told when the host runs short of memory: {why}.");
        let remedy =
            "use a kernel with CONFIG_PSI, and psi=1 on its command line; before Linux 6.5, run the manager as root";
        all.push(found(Severity::Note, "pressure", what, remedy));
    }
    if !facts.huge_pages {
        let what = "Huge pages (launch --huge-pages) have no effect on this host.";
        let remedy = "write advise to /sys/kernel/mm/transparent_hugepage/shmem_enabled";
        all.push(found(Severity::Note, "huge pages", what, remedy));
    }
    if !facts.tun {
        let what = "Guests cannot have taps or bridges (launch --net tap): /dev/net/tun is missing.";
        all.push(found(
            Severity::Note,
            "network",
            what,
            "load the kernel's module tun; in a container, hand the device in",
        ));
    }
    if !facts.passt {
        let what = "Guests cannot have networks without privilege (launch --net user): the program passt is missing.";
        all.push(found(
            Severity::Note,
            "network",
            what,
            "install passt, and see that it is on the guest manager's PATH",
        ));
    }
    for what in facts.broken_state.iter().take(MAX_BROKEN) {
        let remedy = "put back a copy of the file and start the manager again, or define the guest anew";
        all.push(found(
            Severity::Warning,
            "state",
            format!("In the state folder, {what}."),
            remedy,
        ));
    }
    if !facts.keeps_state {
        let what = "This guest manager keeps no definitions, and its guests end with it.";
        all.push(found(Severity::Note, "state", what, "start it with --state DIR"));
    }
    all
}

#[cfg(test)]
mod tests {
    use sepal_runner::host::Finding as Probe;

    use super::*;
    use crate::{
        capacity::{Room, Used},
        node::{Capability, Disk, Kvm},
    };

    fn good() -> Facts {
        Facts {
            memory_bytes: 8 << 30,
            kvm: Kvm {
                api_version: kvm::API_VERSION,
                max_vcpus: 64,
                capabilities: vec![Capability {
                    name: "KVM_CAP_IRQFD",
                    value: 1,
                    needed: true,
                }],
                refused: None,
            },
            hardware: true,
            room: Room {
                available: Some(4 << 30),
                descriptors: Used {
                    used: 30,
                    most: Some(20_000),
                },
                ..Room::default()
            },
            guests: Used {
                used: 1,
                most: Some(256),
            },
            huge_pages: true,
            tun: true,
            passt: true,
            keeps_state: true,
            ..Facts::default()
        }
    }

    fn lacks(subject: Subject) -> Probe {
        Probe {
            subject,
            available: false,
            detail: "it is not there".into(),
            remedy: Some("get it".into()),
        }
    }

    #[test]
    fn a_host_that_offers_everything_has_none() {
        assert_eq!(findings(&good()), []);
    }

    #[test]
    fn each_lack_is_told_with_a_remedy_and_the_worst_first() {
        let mut facts = good();
        facts.hardware = false;
        facts.kvm.capabilities[0].value = 0;
        facts.kvm.api_version = 11;
        facts.probes = vec![
            lacks(Subject::IoUring),
            lacks(Subject::Layer(Layer::Landlock)),
            lacks(Subject::Layer(Layer::HostUid)),
            lacks(Subject::Layer(Layer::Cgroup)),
        ];
        facts.room = Room {
            memory: Used {
                used: 9 << 30,
                most: None,
            },
            available: Some(1 << 20),
            descriptors: Used {
                used: 1000,
                most: Some(1024),
            },
            tasks: Used {
                used: 4000,
                most: Some(4096),
            },
        };
        facts.guests = Used {
            used: 256,
            most: Some(256),
        };
        facts.no_pressure = Some("no".into());
        (facts.huge_pages, facts.tun, facts.passt, facts.keeps_state) = (false, false, false, false);
        facts.disks = [None, Some(1), Some(1 << 40)]
            .map(|free_bytes| Disk {
                purpose: "definitions",
                folder: "/x".into(),
                free_bytes,
            })
            .into();
        facts.broken_state = vec!["web.sepal is broken".into()];
        let all = findings(&facts);
        assert!(all.is_sorted_by_key(|finding| finding.severity as u16));
        assert!(
            all.iter()
                .all(|finding| finding.what.ends_with('.') && !finding.remedy.is_empty()),
            "{all:#?}"
        );
        let count = |severity| all.iter().filter(|finding| finding.severity == severity).count();
        assert_eq!(
            [Severity::Problem, Severity::Warning, Severity::Note].map(count),
            [4, 10, 6],
            "{all:#?}"
        );
        let text = format!("{all:?}");
        for word in [
            "KVM_CAP_IRQFD",
            "--waive-layer landlock",
            "1000 are in use",
            "4000 of the 4096",
            "9216 MiB",
            "web.sepal is broken",
        ] {
            assert!(text.contains(word), "{word}");
        }
    }

    #[test]
    fn without_kvm_nothing_else_is_said_about_it() {
        let mut facts = good();
        facts.kvm = Kvm {
            refused: Some(("/dev/kvm cannot be opened (No such file)".into(), "load it".into())),
            ..Kvm::default()
        };
        facts.hardware = false;
        let all = findings(&facts);
        assert_eq!(
            (all.len(), all[0].severity, &*all[0].remedy),
            (1, Severity::Problem, "load it")
        );
    }
}
