//! Whenever a manager is killed between the events that it told and the record of them, the next one tells what follows, and nothing twice.

use sepal_schema::report::Reason;

use super::*;
use crate::{
    model::{Ending, Event, Moment},
    registry::Limits,
};

const NAME: &str = "web";

type Step = fn(&mut Registry, GuestId);

/// A life with everything in it that is told once in a generation, or is one of two.
const LIFE: [Step; 10] = [
    |registry, id| {
        let generation = generation(registry, id);
        assert!(registry.created(id, generation));
        registry.run(id, generation).unwrap();
    },
    |registry, id| registry.started(id, generation(registry, id), at(10)),
    |registry, id| registry.paused(id, generation(registry, id), true, at(11)),
    |registry, id| registry.paused(id, generation(registry, id), false, at(12)),
    |registry, id| registry.shutting_down(id, generation(registry, id), at(13)),
    |registry, id| {
        let ending = Ending::new(Reason::VmmTerminated, "it died");
        assert!(
            registry
                .restarting(id, generation(registry, id), ending, 5, at(14))
                .is_some()
        );
    },
    |registry, id| assert!(registry.again(id, generation(registry, id), at(15)).is_some()),
    |registry, id| {
        let generation = generation(registry, id);
        assert!(registry.created(id, generation));
        registry.run(id, generation).unwrap();
    },
    |registry, id| registry.started(id, generation(registry, id), at(20)),
    |registry, id| {
        let ending = Ending::new(Reason::Crash, "it crashed");
        assert!(
            registry
                .ended(id, generation(registry, id), ending, 5, at(21))
                .is_some()
        );
    },
];

fn at(ns: u64) -> Moment {
    Moment {
        monotonic_ns: ns,
        unix_ns: ns,
    }
}

fn generation(registry: &Registry, id: GuestId) -> u64 {
    registry.entries[&id].generation
}

fn events_of(registry: &Registry) -> Vec<Event> {
    registry.log().after(0).cloned().collect()
}

fn told(events: &[Event]) -> Vec<(u64, u64, Discriminant<EventKind>)> {
    let told = |event: &Event| (event.sequence, event.generation, discriminant(&event.kind));
    events.iter().map(told).collect()
}

/// What is on record of the guest.
fn record(registry: &Registry, id: GuestId) -> Restored {
    let entry = &registry.entries[&id];
    Restored {
        name: NAME.into(),
        uuid: None,
        generation: entry.generation,
        phase: match entry.phase {
            Phase::Creating => RestoredPhase::Creating,
            Phase::Restarting => RestoredPhase::Restarting,
            Phase::Stopped | Phase::Died => RestoredPhase::Ended,
            _ => RestoredPhase::Launching,
        },
        started_ns: entry.started_at,
        paused: entry.paused,
        detached: true,
        asked: entry.shutdown_told,
        restart: Restart::default(),
        restarts: 0,
        failures: 0,
        descriptor: None,
        layers: Vec::new(),
        stop: entry.stop.clone(),
    }
}

fn begin() -> (Registry, GuestId) {
    let mut registry = Registry::new(Limits::default());
    let id = registry.reserve(NAME, Origin::Launch, at(0)).unwrap();
    registry.create(id, GuestDescriptor::default(), at(1)).unwrap();
    (registry, id)
}

#[test]
fn nothing_is_told_twice_whenever_a_manager_is_killed() {
    let (mut whole, id) = begin();
    for step in LIFE {
        step(&mut whole, id);
    }
    let whole = told(&events_of(&whole));
    for killed_in in 0..LIFE.len() {
        let (mut before, id) = begin();
        for step in &LIFE[..killed_in] {
            step(&mut before, id);
        }
        // That is told, and not on record.
        let record = record(&before, id);
        LIFE[killed_in](&mut before, id);
        let past = events_of(&before).into_iter().map(|event| Past {
            sequence: event.sequence,
            time_ns: event.time_ns,
            guest: event.guest.to_string(),
            generation: event.generation,
            kind: event.kind,
        });
        let mut next = Registry::new(Limits::default());
        next.restore_events(past.collect());
        let id = next.restore(record).unwrap();
        for step in &LIFE[killed_in..] {
            step(&mut next, id);
        }
        assert_eq!(told(&events_of(&next)), whole, "killed in step {killed_in}");
    }
}
