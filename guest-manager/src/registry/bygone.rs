//! Guests of an earlier manager that do not go on, as far as its last events tell of them: how those ended that it remembered, and how far the creations under
//! each name were counted.

use std::{collections::HashMap, rc::Rc};

use sepal_schema::report::StopReport;

use super::{Origin, Registry, entry::Entry};
use crate::{
    durable::chronicle::Past,
    model::{EventKind, GuestId},
};

/// Who was behind a name.
#[derive(Debug)]
pub(super) struct Bygone {
    pub(super) id: GuestId,
    generation: u64,
    /// How it ended, and the number of the event that told it; none: it had not.
    stop: Option<(u64, StopReport)>,
}

/// All names of an earlier manager that have not been taken again.
#[derive(Debug, Default)]
pub(super) struct Names(HashMap<String, Bygone>);

impl Names {
    /// An event of that manager; returns whose it is. `fresh` gives an id that nobody has.
    pub(super) fn note(&mut self, past: &Past, fresh: impl FnOnce() -> GuestId) -> GuestId {
        let known = self.0.remove(&past.guest);
        let mut bygone = match (known, &past.kind) {
            (Some(known), EventKind::Defined) => Bygone { id: fresh(), ..known },
            (Some(known), _) => known,
            (None, _) => Bygone {
                id: fresh(),
                generation: 0,
                stop: None,
            },
        };
        let id = bygone.id;
        bygone.generation = bygone.generation.max(past.generation);
        match &past.kind {
            // Nothing is remembered of it, and its name is counted anew.
            EventKind::Removed => return id,
            EventKind::Stopped(report) => bygone.stop = Some((past.sequence, report.clone())),
            EventKind::Defined | EventKind::Starting => bygone.stop = None,
            _ => {}
        }
        self.0.insert(past.guest.clone(), bygone);
        id
    }

    /// The name is somebody's again, who goes on, or begins with the generation after this one.
    pub(super) fn take(&mut self, name: &str) -> Option<Bygone> {
        self.0.remove(name)
    }
}

impl Bygone {
    /// How far the creations under its name were counted.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }
}

impl Registry {
    /// Remembers the guests of an earlier manager that had ended, as it did; after all that go on have been taken over.
    pub(crate) fn remember_bygone(&mut self) {
        let mut past: Vec<_> = std::mem::take(&mut self.past.0).into_iter().collect();
        // In the order in which they ended, the last ones last: as many as are remembered.
        past.sort_by_key(|(_, bygone)| bygone.stop.as_ref().map_or(0, |(told, _)| *told));
        let ended = |(name, bygone): &&(String, Bygone)| bygone.stop.is_some() && !self.names.contains_key(&**name);
        let mut surplus = past.iter().filter(ended).count().saturating_sub(self.limits.remembered);
        for (name, bygone) in past {
            let there = self.names.get(&*name).and_then(|id| self.entries.get(id));
            let rests = |entry: &Entry| entry.upkeep.defined && entry.remembered();
            match (there.map(|entry| (entry.id, rests(entry))), &bygone.stop) {
                (Some((id, true)), _) => self.go_on_counting(id, bygone),
                // It goes on, and has all that there is to know.
                (Some(_), _) => {}
                (None, Some(_)) if surplus > 0 => surplus -= 1,
                (None, Some(_)) => self.remember(name.into(), bygone),
                // It ended with that manager, as those do that do not go on without it.
                (None, None) => drop(self.past.0.insert(name, bygone)),
            }
        }
    }

    /// A name that is defined is the one whose events are known, which may know of later runs than the disk does.
    fn go_on_counting(&mut self, id: GuestId, bygone: Bygone) {
        let Some(mut entry) = self.entries.remove(&id) else {
            return;
        };
        entry.id = bygone.id;
        match bygone.stop {
            Some((_, stop)) if bygone.generation >= entry.generation => entry.has_ended(stop),
            // Another run had begun, and nobody has told how it ended.
            None if bygone.generation > entry.generation => entry.ended_somehow(),
            _ => {}
        }
        entry.generation = entry.generation.max(bygone.generation);
        self.names.insert(entry.name.clone(), entry.id);
        self.entries.insert(entry.id, entry);
    }

    fn remember(&mut self, name: Rc<str>, bygone: Bygone) {
        let Some((_, stop)) = bygone.stop else { return };
        self.endings += 1;
        let mut entry = Entry {
            generation: bygone.generation,
            ended_as: self.endings,
            ..Entry::new(bygone.id, name.clone(), Origin::Launch)
        };
        entry.has_ended(stop);
        self.names.insert(name, bygone.id);
        self.entries.insert(bygone.id, entry);
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::{
        crash::CrashReport,
        info::{GuestDescriptor, GuestStatus},
        report::Reason,
    };

    use super::{
        super::{Kept, Limits, Runs},
        *,
    };
    use crate::model::{Ending, Moment};

    fn past(events: &[(&str, u64, EventKind)]) -> Vec<Past> {
        let event = |(sequence, (guest, generation, kind)): (u64, &(&str, u64, EventKind))| Past {
            sequence,
            time_ns: sequence,
            guest: (*guest).to_owned(),
            generation: *generation,
            kind: kind.clone(),
        };
        (7..).zip(events).map(event).collect()
    }

    fn stopped(reason: Reason) -> EventKind {
        EventKind::Stopped(Ending::new(reason, "why").report(3, Moment::now()))
    }

    fn kept() -> Kept {
        Kept {
            uuid: uuid::Uuid::from_bytes([7; 16]),
            autostart: false,
            durable: false,
            restart: sepal_schema::config::Restart::default(),
            descriptor: None,
        }
    }

    #[test]
    fn who_had_ended_is_remembered_and_names_go_on_being_counted() {
        let limits = Limits {
            remembered: 2,
            ..Limits::default()
        };
        let (mut registry, now) = (Registry::new(limits), Moment::now());
        for name in ["defined", "never"] {
            registry.keep(name, kept(), None, now);
        }
        registry.restore_events(past(&[
            ("oldest", 1, EventKind::Starting),
            ("oldest", 1, stopped(Reason::Shutdown)),
            ("gone", 3, stopped(Reason::Shutdown)),
            ("gone", 3, EventKind::Removed),
            ("died", 2, stopped(Reason::VmmTerminated)),
            ("defined", 5, stopped(Reason::Crash)),
            ("again", 1, stopped(Reason::Crash)),
            ("again", 1, EventKind::Defined),
            ("again", 2, EventKind::Starting),
            ("shut", 9, stopped(Reason::Shutdown)),
        ]));
        registry.remember_bygone();
        let told = |name: &str| {
            let id = registry.lookup(name).ok()?;
            let info = registry.info(id, now)?;
            Some((info.status, info.generation, info.stop.map(|stop| stop.reason)))
        };
        assert_eq!(told("shut"), Some((GuestStatus::Stopped, 9, Some(Reason::Shutdown))));
        let died = GuestStatus::VmmUnexpectedTermination;
        assert_eq!(told("died"), Some((died, 2, Some(Reason::VmmTerminated))));
        assert_eq!(told("defined"), Some((GuestStatus::Stopped, 5, Some(Reason::Crash))));
        assert_eq!(told("never"), Some((GuestStatus::NotStarted, 0, None)));
        for name in ["oldest", "gone", "again"] {
            assert_eq!(told(name), None, "{name}");
        }
        // Its events are its own still.
        let id = registry.lookup("defined").unwrap();
        assert!(registry.log().next(&mut registry.log().cursor_of(id, 9)).is_some());
        for (name, origin, generation) in [
            ("again", Origin::Launch, 3),
            ("shut", Origin::Launch, 10),
            ("defined", Origin::Definition, 6),
            ("gone", Origin::Launch, 1),
        ] {
            let id = registry.reserve(name, origin, now).unwrap();
            let creation = registry.create(id, GuestDescriptor::default(), now).unwrap();
            assert_eq!(creation.generation, generation, "{name}");
        }
    }

    #[test]
    fn of_what_the_disk_and_the_events_know_the_later_run_counts() {
        let report = |reason| Ending::new(reason, "why").report(3, Moment::now());
        // The last run that the disk knows; what the events tell.
        let cases = [
            (5, vec![(6, stopped(Reason::Shutdown))], 6, Some(Reason::Shutdown)),
            (5, vec![(5, stopped(Reason::Shutdown))], 5, Some(Reason::Shutdown)),
            (5, vec![(4, stopped(Reason::Shutdown))], 5, Some(Reason::Crash)),
            (5, vec![(5, EventKind::Starting)], 5, Some(Reason::Crash)),
            (5, vec![(6, EventKind::Starting)], 6, None),
            (5, vec![], 5, Some(Reason::Crash)),
        ];
        for (generation, events, last, reason) in cases {
            let (mut registry, now) = (Registry::new(Limits::default()), Moment::now());
            let id = registry.keep("web", kept(), None, now);
            let crash = CrashReport {
                report: report(Reason::Crash),
                generation,
                last_lines: Vec::new(),
                registers: Vec::new(),
                output: String::new(),
            };
            let runs = Runs {
                stop: Some(crash.report.clone()),
                crashes: vec![crash.into()],
                generation,
            };
            registry.restore_runs(id, runs.clone());
            let events: Vec<_> = events.into_iter().map(|(of, kind)| ("web", of, kind)).collect();
            registry.restore_events(past(&events));
            registry.remember_bygone();
            let id = registry.lookup("web").unwrap();
            let found = registry.past_runs(id).unwrap();
            assert_eq!(
                (found.generation, found.stop.map(|stop| stop.reason)),
                (last, reason),
                "{events:?}"
            );
            assert_eq!(found.crashes, runs.crashes);
            let id = registry.reserve("web", Origin::Definition, now).unwrap();
            assert_eq!(registry.past_runs(id), None);
            let creation = registry.create(id, GuestDescriptor::default(), now).unwrap();
            assert_eq!(creation.generation, last + 1);
        }
    }
}
