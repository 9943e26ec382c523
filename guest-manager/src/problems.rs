//! Sentences for a person about what is not as it should be with a guest, from what the manager knows without asking anyone.

use sepal_schema::info::{GuestInfo, GuestStatus, LayerState, MAX_PROBLEMS};

use crate::host::Host;

/// What the sentences are made from.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// The guest, problems not filled in yet.
    pub info: &'a GuestInfo,
    /// Devices that broke in this generation, each with its reason.
    pub failures: &'a [(String, String)],
    /// What it got from the host and is not as it should be, in whole sentences.
    pub notes: &'a [String],
    /// The host.
    pub host: Host,
    /// Memory that the host can give away, in MiB; none where it does not say.
    pub available_mib: Option<u64>,
    /// Bytes of serial output that are no longer kept.
    pub output_lost: u64,
    /// It goes on without its manager, and its keeper has not answered this one.
    pub unreached: bool,
    /// Its component was asked for something, and has not answered for long.
    pub silent: bool,
}

/// The problems, the gravest first, at most as many as an answer carries.
pub fn problems(facts: &Facts<'_>) -> Vec<String> {
    let info = facts.info;
    let live = matches!(
        info.status,
        GuestStatus::Starting | GuestStatus::Running | GuestStatus::Stopping
    );
    let mut found = Vec::new();
    if info.status == GuestStatus::VmmUnexpectedTermination {
        found.push("The guest's component died. Launching or creating the guest again starts a new one.".to_owned());
    }
    if live && facts.silent {
        let text = "The guest's component does not answer: it stands still, or has too much to do. The guest may run on; stopping it by force works.";
        found.push(text.to_owned());
    }
    if facts.unreached {
        let text = "The keeper of an earlier guest manager, which holds this guest, does not answer: it stands still, has too much to do, or its key \
                    cannot be used (the guest manager's log says that). The guest may run on, and is taken over when the keeper answers.";
        found.push(text.to_owned());
    }
    let waived: Vec<_> = info
        .layers
        .iter()
        .filter(|layer| layer.state == LayerState::Waived)
        .collect();
    if let [first, ..] = waived[..] {
        let names: Vec<&str> = waived.iter().map(|layer| layer.name.as_str()).collect();
        let names = names.join(", ");
        found.push(format!(
            "The jail lacks what the configuration allowed to be missing: {names} ({}: {}).",
            first.name, first.detail
        ));
    }
    for (device, reason) in facts.failures {
        found.push(format!("The device {device} broke and was quarantined: {reason}."));
    }
    if live && info.paused {
        found.push("The guest is paused: its vCPUs wait to be resumed.".to_owned());
    }
    if live {
        found.extend_from_slice(facts.notes);
    }
    let memory = info.descriptor.as_ref().map(|descriptor| descriptor.memory_mib);
    if let (true, Some(memory), Some(available)) = (live, memory, facts.available_mib)
        && memory > available
    {
        found.push(format!(
            "The guest may use {memory} MiB of memory, and the host has {available} MiB left: it may run out."
        ));
    }
    if facts.output_lost > 0 {
        let lost = facts.output_lost;
        found.push(format!(
            "The first {lost} bytes of the serial output are no longer kept."
        ));
    }
    if live && facts.host.unassisted {
        let text = "The host's CPU gives KVM no hardware virtualization: guest kernels run, but many times slower.";
        found.push(text.to_owned());
    }
    found.truncate(MAX_PROBLEMS);
    found
}

#[cfg(test)]
mod tests {
    use sepal_schema::info::{GuestDescriptor, LayerInfo, Upkeep};

    use super::*;

    fn guest() -> GuestInfo {
        GuestInfo {
            name: "web".into(),
            status: GuestStatus::Running,
            generation: 1,
            uptime_ns: 1,
            descriptor: Some(GuestDescriptor {
                memory_mib: 256,
                ..GuestDescriptor::default()
            }),
            stop: None,
            problems: vec![],
            layers: vec![],
            component_pid: 7,
            paused: false,
            detached: false,
            upkeep: Upkeep::default(),
        }
    }

    fn of<'a>(info: &'a GuestInfo, change: impl FnOnce(&mut Facts<'a>)) -> Vec<String> {
        let mut facts = Facts {
            info,
            failures: &[],
            notes: &[],
            host: Host::default(),
            available_mib: Some(1024),
            output_lost: 0,
            unreached: false,
            silent: false,
        };
        change(&mut facts);
        problems(&facts)
    }

    #[test]
    fn a_guest_as_it_should_be_has_none() {
        assert!(of(&guest(), |_| ()).is_empty());
    }

    #[test]
    fn each_problem_is_told() {
        let layer = |name: &str, state| LayerInfo {
            name: name.into(),
            state,
            detail: "no cgroup".into(),
        };
        let layers = vec![layer("cgroup", LayerState::Waived), layer("seccomp", LayerState::Holds)];
        let info = GuestInfo {
            paused: true,
            layers,
            ..guest()
        };
        let failures = [("rng".to_owned(), "a descriptor loop".to_owned())];
        let notes = ["What it writes is kept in memory.".to_owned()];
        let told = of(&info, |facts| {
            facts.failures = &failures;
            facts.notes = &notes;
            facts.host.unassisted = true;
            facts.available_mib = Some(100);
            facts.output_lost = 17;
            facts.silent = true;
        });
        let expected = [
            "does not answer",
            "cgroup",
            "rng",
            "paused",
            "kept in memory",
            "100 MiB",
            "17 bytes",
            "hardware virtualization",
        ];
        assert_eq!(told.len(), expected.len());
        for (sentence, word) in told.iter().zip(expected) {
            assert!(sentence.contains(word), "{sentence}");
        }
        assert!(!told[1].contains("seccomp"));
    }

    #[test]
    fn one_that_nobody_has_reached_is_told_so() {
        let told = of(&guest(), |facts| facts.unreached = true);
        assert!(told.len() == 1 && told[0].contains("does not answer"), "{told:?}");
    }

    #[test]
    fn what_only_concerns_a_live_guest_is_not_told_of_an_ended_one() {
        let info = GuestInfo {
            status: GuestStatus::VmmUnexpectedTermination,
            paused: true,
            ..guest()
        };
        let notes = ["What it writes is kept in memory.".to_owned()];
        let told = of(&info, |facts| {
            facts.notes = &notes;
            facts.host.unassisted = true;
            facts.available_mib = Some(1);
            facts.silent = true;
        });
        assert_eq!(told.len(), 1);
    }

    #[test]
    fn there_are_at_most_eight() {
        let failures = vec![("disk".to_owned(), "broken".to_owned()); 20];
        assert_eq!(of(&guest(), |facts| facts.failures = &failures).len(), 8);
    }
}
