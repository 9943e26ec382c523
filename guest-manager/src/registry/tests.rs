//! The registry against examples, and against invariants under any sequence of operations.

use proptest::prelude::*;

use sepal_schema::info::GuestStatus;

use super::*;
use crate::model::Event;

fn at(ns: u64) -> Moment {
    Moment {
        monotonic_ns: ns,
        unix_ns: 1_000_000 + ns,
    }
}

fn registry(guests: usize, remembered: usize) -> Registry {
    Registry::new(Limits {
        guests,
        remembered,
        events: KEPT,
    })
}

fn killed() -> Ending {
    Ending::new(Reason::Killed, "killed")
}

fn died() -> Ending {
    Ending::failed(
        Reason::VmmTerminated,
        Error::new(Kind::VmmTerminated, "killed by signal 9 (SIGKILL)"),
    )
}

fn kind<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Kind {
    outcome.unwrap_err().kind
}

fn create(registry: &mut Registry, id: GuestId) -> u64 {
    registry
        .create(id, GuestDescriptor::default(), at(1))
        .unwrap()
        .generation
}

fn run(registry: &mut Registry, name: &str) -> (GuestId, u64) {
    let id = registry.reserve(name, Origin::Launch, at(0)).unwrap();
    let generation = create(registry, id);
    assert!(registry.created(id, generation));
    registry.run(id, generation).unwrap();
    registry.started(id, generation, at(10));
    (id, generation)
}

fn events(registry: &Registry) -> Vec<Event> {
    let mut cursor = registry.log().cursor(KEPT);
    std::iter::from_fn(|| registry.log().next(&mut cursor))
        .map(|(event, _)| (*event).clone())
        .collect()
}

fn status(registry: &Registry, id: GuestId) -> GuestStatus {
    registry.info(id, at(0)).unwrap().status
}

#[test]
fn a_guest_runs_and_ends() {
    let mut registry = registry(4, 4);
    let (id, generation) = run(&mut registry, "web");
    let info = registry.info(id, at(25)).unwrap();
    assert_eq!(
        (info.status, info.generation, info.uptime_ns),
        (GuestStatus::Running, 1, 15)
    );
    let report = registry.ended(id, generation, killed(), 0, at(40)).unwrap();
    assert_eq!((report.uptime_ns, report.time_ns), (30, 1_000_040));
    let info = registry.info(id, at(99)).unwrap();
    assert_eq!(
        (info.status, info.uptime_ns, info.stop),
        (GuestStatus::Stopped, 0, Some(report.clone()))
    );
    let kinds: Vec<EventKind> = events(&registry).into_iter().map(|event| event.kind).collect();
    let expected = [
        EventKind::Defined,
        EventKind::Starting,
        EventKind::Started,
        EventKind::Stopped(report),
    ];
    assert_eq!(kinds, expected);
}

#[test]
fn a_name_is_taken_until_its_guest_has_ended() {
    let mut registry = registry(4, 4);
    let (id, generation) = run(&mut registry, "web");
    assert_eq!(
        kind(registry.reserve("web", Origin::Launch, at(0))),
        Kind::AlreadyRunning
    );
    registry.stopping(id, generation, at(0));
    assert_eq!(
        kind(registry.reserve("web", Origin::Lifecycle, at(0))),
        Kind::AlreadyRunning
    );
    registry.ended(id, generation, killed(), 0, at(0));
    let again = registry.reserve("web", Origin::Launch, at(0)).unwrap();
    assert_ne!(again, id);
    assert_eq!(registry.take_forgotten(), [id]);
    assert_eq!(
        create(&mut registry, again),
        2,
        "the generation goes on under the same name"
    );
}

#[test]
fn a_held_name_is_free_when_it_is_let_go_of() {
    let mut registry = registry(4, 4);
    let id = registry.reserve("mine", Origin::Lifecycle, at(0)).unwrap();
    let generation = create(&mut registry, id);
    registry.ended(id, generation, killed(), 0, at(0));
    assert_eq!(
        kind(registry.reserve("mine", Origin::Launch, at(0))),
        Kind::AlreadyRunning
    );
    assert_eq!(kind(registry.remove("mine", at(0))), Kind::AlreadyRunning);
    registry.release(id, killed(), at(0));
    assert_eq!(kind(registry.lookup("mine")), Kind::NotFound);
    registry.reserve("mine", Origin::Lifecycle, at(0)).unwrap();
}

#[test]
fn letting_go_of_a_running_guest_ends_it() {
    let mut registry = registry(4, 4);
    let id = registry.reserve("", Origin::Lifecycle, at(0)).unwrap();
    create(&mut registry, id);
    assert_eq!(registry.release(id, killed(), at(3)).unwrap().reason, Reason::Killed);
    let kinds: Vec<EventKind> = events(&registry).into_iter().map(|event| event.kind).collect();
    assert!(matches!(
        kinds[..],
        [
            EventKind::Defined,
            EventKind::Starting,
            EventKind::Stopped(_),
            EventKind::Removed
        ]
    ));
}

#[test]
fn names_are_checked_and_chosen() {
    let mut registry = registry(4, 4);
    assert_eq!(kind(registry.reserve("../x", Origin::Launch, at(0))), Kind::BadConfig);
    registry.reserve("guest-1", Origin::Launch, at(0)).unwrap();
    let id = registry.reserve("", Origin::Launch, at(0)).unwrap();
    assert_eq!(&*registry.name(id).unwrap(), "guest-2");
}

#[test]
fn run_needs_a_creation_that_worked_and_happens_once() {
    let mut registry = registry(4, 4);
    let id = registry.reserve("a", Origin::Lifecycle, at(0)).unwrap();
    assert_eq!(kind(registry.run(id, 0)), Kind::NotCreated);
    let generation = create(&mut registry, id);
    assert_eq!(kind(registry.run(id, generation)), Kind::NotCreated);
    assert_eq!(
        kind(registry.create(id, GuestDescriptor::default(), at(0))),
        Kind::AlreadyRunning
    );
    registry.created(id, generation);
    registry.run(id, generation).unwrap();
    assert_eq!(kind(registry.run(id, generation)), Kind::AlreadyRunning);
    assert_eq!(
        kind(registry.create(id, GuestDescriptor::default(), at(0))),
        Kind::AlreadyRunning
    );
}

#[test]
fn creating_again_ends_what_was_created_and_not_run() {
    let mut registry = registry(4, 4);
    let id = registry.reserve("a", Origin::Lifecycle, at(0)).unwrap();
    let first = create(&mut registry, id);
    registry.created(id, first);
    let second = registry.create(id, GuestDescriptor::default(), at(0)).unwrap();
    assert_eq!(second.generation, 2);
    assert_eq!(second.replaced.unwrap().reason, Reason::Killed);
}

#[test]
fn what_comes_late_for_an_older_generation_changes_nothing() {
    let mut registry = registry(4, 4);
    let id = registry.reserve("a", Origin::Lifecycle, at(0)).unwrap();
    let old = create(&mut registry, id);
    registry.ended(id, old, killed(), 0, at(0));
    let new = create(&mut registry, id);
    registry.created(id, new);
    let before = events(&registry);
    assert_eq!(registry.ended(id, old, died(), 0, at(0)), None);
    assert!(!registry.created(id, old));
    registry.started(id, old, at(0));
    registry.stopping(id, old, at(0));
    registry.paused(id, old, true, at(0));
    let late = sepal_schema::news::DeviceNews::Recovered { device: "rng".into() };
    registry.device_news(id, old, late, at(0));
    assert_eq!(status(&registry, id), GuestStatus::Starting);
    assert_eq!(events(&registry), before);
}

#[test]
fn a_component_that_dies_is_told_from_a_guest_that_ends() {
    let mut registry = registry(4, 4);
    for origin in [Origin::Launch, Origin::Lifecycle] {
        let id = registry.reserve("", origin, at(0)).unwrap();
        let generation = create(&mut registry, id);
        registry.ended(id, generation, died(), 0, at(0));
        assert_eq!(status(&registry, id), GuestStatus::VmmUnexpectedTermination);
        let again = registry.create(id, GuestDescriptor::default(), at(0));
        assert_eq!(
            again.is_ok(),
            origin == Origin::Lifecycle,
            "what was launched is only remembered"
        );
    }
}

#[test]
fn the_oldest_ended_guest_is_forgotten() {
    let mut registry = registry(9, 2);
    let started: Vec<_> = ["a", "b", "c"].map(|name| run(&mut registry, name)).into();
    for (id, generation) in [started[1], started[0], started[2]] {
        registry.ended(id, generation, killed(), 0, at(0));
    }
    assert_eq!(registry.ids(), [started[0].0, started[2].0]);
    assert_eq!(registry.take_forgotten(), [started[1].0]);
}

#[test]
fn there_are_at_most_so_many_guests() {
    let mut registry = registry(2, 9);
    let (id, generation) = run(&mut registry, "a");
    run(&mut registry, "b");
    assert_eq!(kind(registry.reserve("c", Origin::Launch, at(0))), Kind::NoResources);
    registry.ended(id, generation, killed(), 0, at(0));
    assert!(registry.reserve("c", Origin::Launch, at(0)).is_ok());
}

#[test]
fn pausing_is_told_when_it_changes_something() {
    let mut registry = registry(4, 4);
    let (id, generation) = run(&mut registry, "a");
    for paused in [false, true, true, false] {
        registry.paused(id, generation, paused, at(0));
    }
    let kinds: Vec<EventKind> = events(&registry).into_iter().skip(3).map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKind::Paused, EventKind::Resumed]);
}

#[test]
fn what_a_component_tells_goes_with_it() {
    let mut registry = registry(4, 4);
    let id = registry.reserve("a", Origin::Lifecycle, at(0)).unwrap();
    let layer = LayerInfo {
        name: "seccomp".into(),
        state: sepal_schema::info::LayerState::Holds,
        detail: String::new(),
    };
    registry.layers(id, vec![layer.clone()]);
    assert!(registry.info(id, at(0)).unwrap().layers.is_empty());
    registry.component(id, 7);
    registry.layers(id, vec![layer]);
    assert_eq!(registry.info(id, at(0)).unwrap().layers.len(), 1);
    registry.component(id, 0);
    let info = registry.info(id, at(0)).unwrap();
    assert!(info.layers.is_empty() && info.component_pid == 0);
}

/// One operation on one of few names, with a generation that may be stale.
#[derive(Debug, Clone)]
enum Op {
    Reserve(usize, bool),
    Create(usize),
    Created(usize, u64),
    Run(usize),
    Started(usize, u64),
    ShuttingDown(usize, u64),
    Stopping(usize, u64),
    Paused(usize, u64, bool),
    Ended(usize, u64, bool),
    Restarting(usize, u64, bool),
    Again(usize, u64),
    Hold(usize, u64),
    Release(usize),
    Remove(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0usize..4;
    let back = 0u64..2;
    prop_oneof![
        (name.clone(), any::<bool>()).prop_map(|(n, launch)| Op::Reserve(n, launch)),
        name.clone().prop_map(Op::Create),
        (name.clone(), back.clone()).prop_map(|(n, b)| Op::Created(n, b)),
        name.clone().prop_map(Op::Run),
        (name.clone(), back.clone()).prop_map(|(n, b)| Op::Started(n, b)),
        (name.clone(), back.clone()).prop_map(|(n, b)| Op::ShuttingDown(n, b)),
        (name.clone(), back.clone()).prop_map(|(n, b)| Op::Stopping(n, b)),
        (name.clone(), back.clone(), any::<bool>()).prop_map(|(n, b, p)| Op::Paused(n, b, p)),
        (name.clone(), back.clone(), any::<bool>()).prop_map(|(n, b, d)| Op::Ended(n, b, d)),
        (name.clone(), back.clone(), any::<bool>()).prop_map(|(n, b, d)| Op::Restarting(n, b, d)),
        (name.clone(), back.clone()).prop_map(|(n, b)| Op::Again(n, b)),
        (name.clone(), back).prop_map(|(n, b)| Op::Hold(n, b)),
        name.clone().prop_map(Op::Release),
        name.prop_map(Op::Remove),
    ]
}

fn apply(registry: &mut Registry, op: &Op, now: Moment) {
    let name = |n: &usize| format!("g{n}");
    let find = |registry: &Registry, n: &usize, back: u64| {
        let id = registry.lookup(&name(n)).ok()?;
        Some((id, registry.info(id, now)?.generation.saturating_sub(back)))
    };
    match op {
        Op::Reserve(n, launch) => {
            let origin = if *launch { Origin::Launch } else { Origin::Lifecycle };
            let _ = registry.reserve(&name(n), origin, now);
        }
        Op::Remove(n) => drop(registry.remove(&name(n), now)),
        Op::Create(n) | Op::Run(n) | Op::Release(n) => {
            let Some((id, generation)) = find(registry, n, 0) else {
                return;
            };
            match op {
                Op::Create(_) => drop(registry.create(id, GuestDescriptor::default(), now)),
                Op::Run(_) => drop(registry.run(id, generation)),
                _ => drop(registry.release(id, killed(), now)),
            }
        }
        Op::Created(n, back) => {
            let Some((id, generation)) = find(registry, n, *back) else {
                return;
            };
            registry.created(id, generation);
        }
        Op::Started(n, back)
        | Op::ShuttingDown(n, back)
        | Op::Stopping(n, back)
        | Op::Again(n, back)
        | Op::Hold(n, back) => {
            let Some((id, generation)) = find(registry, n, *back) else {
                return;
            };
            match op {
                Op::Started(..) => registry.started(id, generation, now),
                Op::ShuttingDown(..) => registry.shutting_down(id, generation, now),
                Op::Again(..) => drop(registry.again(id, generation, now)),
                Op::Hold(..) => registry.hold(id, generation, now),
                _ => registry.stopping(id, generation, now),
            }
        }
        Op::Paused(n, back, paused) => {
            let Some((id, generation)) = find(registry, n, *back) else {
                return;
            };
            registry.paused(id, generation, *paused, now);
        }
        Op::Ended(n, back, component) | Op::Restarting(n, back, component) => {
            let Some((id, generation)) = find(registry, n, *back) else {
                return;
            };
            let ending = if *component { died() } else { killed() };
            match op {
                Op::Ended(..) => registry.ended(id, generation, ending, 0, now),
                _ => registry.restarting(id, generation, ending, 0, now),
            };
        }
    }
}

#[test]
fn a_guest_that_begins_again_keeps_its_name_and_counts_its_generations() {
    let mut registry = registry(4, 4);
    let (id, generation) = run(&mut registry, "web");
    registry.paused(id, generation, true, at(11));
    let reset = Ending::new(Reason::Reset, "by ACPI");
    let report = registry.restarting(id, generation, reset, 0, at(30)).unwrap();
    assert_eq!((report.reason, report.uptime_ns), (Reason::Reset, 20));
    // What comes late of the run that is over changes nothing.
    registry.started(id, generation, at(31));
    registry.paused(id, generation, false, at(31));
    let info = registry.info(id, at(32)).unwrap();
    assert_eq!(
        (info.status, info.generation, info.paused),
        (GuestStatus::Starting, 1, false)
    );
    assert_eq!(info.stop, Some(report));
    assert_eq!(
        kind(registry.reserve("web", Origin::Launch, at(33))),
        Kind::AlreadyRunning
    );

    assert_eq!(registry.again(id, generation, at(34)), Some(2));
    assert_eq!(registry.again(id, generation, at(34)), None);
    assert!(registry.created(id, 2) && !registry.created(id, 1));
    registry.hold(id, 2, at(35));
    assert_eq!(kind(registry.run(id, 2)), Kind::AlreadyRunning);
    assert!(registry.info(id, at(36)).unwrap().paused);
    registry.paused(id, 2, false, at(37));
    registry.started(id, 2, at(38));
    let info = registry.info(id, at(40)).unwrap();
    assert_eq!(
        (info.status, info.uptime_ns, info.paused),
        (GuestStatus::Running, 2, false)
    );
}

#[test]
fn a_stop_wins_over_a_restart() {
    let mut registry = registry(4, 4);
    let (id, generation) = run(&mut registry, "web");
    registry.stopping(id, generation, at(11));
    assert_eq!(registry.restarting(id, generation, killed(), 0, at(12)), None);
    registry.ended(id, generation, killed(), 0, at(13)).unwrap();

    let (id, generation) = run(&mut registry, "db");
    registry.restarting(id, generation, killed(), 0, at(14)).unwrap();
    registry.stopping(id, generation, at(15));
    assert_eq!(registry.again(id, generation, at(16)), None);
    registry.ended(id, generation, killed(), 0, at(17)).unwrap();
}

#[test]
fn a_crash_is_told_before_what_follows() {
    let mut registry = registry(4, 4);
    let (id, generation) = run(&mut registry, "web");
    registry.restarting(id, generation, died(), 0, at(20)).unwrap();
    let again = registry.again(id, generation, at(21)).unwrap();
    registry.ended(id, again, died(), 0, at(22)).unwrap();
    let told = events(&registry).split_off(3);
    assert!(matches!(
        told.iter().map(|event| &event.kind).collect::<Vec<_>>()[..],
        [
            EventKind::Crashed(_),
            EventKind::Restarting(_),
            EventKind::Starting,
            EventKind::Crashed(_),
            EventKind::Stopped(_)
        ]
    ));
    // What was killed did not crash.
    let (id, generation) = run(&mut registry, "db");
    let forced = died().by(sepal_schema::report::Rung::Killed);
    registry.ended(id, generation, forced, 0, at(23)).unwrap();
    let last = events(&registry).split_off(11);
    assert!(
        matches!(
            last[..],
            [Event {
                kind: EventKind::Stopped(_),
                ..
            }]
        ),
        "{last:?}"
    );
}

/// What a subscriber can conclude about one guest from its events alone.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Seen {
    #[default]
    Nothing,
    Defined,
    Starting,
    /// Paused before its first instruction.
    Held,
    Started,
    /// A vCPU or the component failed, and what becomes of the guest comes next.
    Crashed,
    Restarting,
    Ended,
    Removed,
}

proptest! {
    /// Any sequence of operations keeps the limits, and tells every guest's life in order, each generation ending exactly once.
    #[test]
    fn lives_are_told_in_order(ops in prop::collection::vec(op(), 0..150)) {
        let mut registry = registry(3, 2);
        for (step, op) in ops.iter().enumerate() {
            apply(&mut registry, op, at(step as u64));
            let infos: Vec<_> = registry.ids().iter().map(|&id| registry.info(id, at(0)).unwrap()).collect();
            prop_assert!(infos.windows(2).all(|pair| pair[0].name < pair[1].name));
            prop_assert_eq!(infos.len(), registry.entries.len());
            let remembered = registry.entries.values().filter(|entry| entry.remembered()).count();
            prop_assert_eq!(registry.log.counted(), registry.entries.len(), "nothing is kept for guests that are gone");
            prop_assert!(remembered <= 2 && infos.len() - remembered <= 3);
            for info in infos {
                let ended = matches!(info.status, GuestStatus::Stopped | GuestStatus::VmmUnexpectedTermination);
                // A guest that has begun again remembers how it ended before.
                prop_assert!(info.stop.is_some() || !ended);
                prop_assert!(info.stop.is_none() || info.status != GuestStatus::NotStarted);
                prop_assert!(!info.paused || !ended && info.status != GuestStatus::NotStarted);
            }
        }
        let mut lives: HashMap<GuestId, (Seen, u64)> = HashMap::new();
        for (i, event) in events(&registry).iter().enumerate() {
            prop_assert_eq!(event.sequence, i as u64 + 1);
            let (seen, generation) = lives.entry(event.id).or_default();
            let next = match (&event.kind, *seen) {
                (EventKind::Defined, Seen::Nothing) => Seen::Defined,
                (EventKind::Starting, Seen::Defined | Seen::Ended | Seen::Restarting) => Seen::Starting,
                (EventKind::Paused, Seen::Starting) => Seen::Held,
                (EventKind::Resumed, Seen::Held) => Seen::Starting,
                (EventKind::Started, Seen::Starting | Seen::Held) => Seen::Started,
                (EventKind::Paused | EventKind::Resumed, Seen::Started) => Seen::Started,
                (EventKind::ShuttingDown, Seen::Starting | Seen::Held | Seen::Started | Seen::Restarting) => *seen,
                (EventKind::Crashed(_), Seen::Starting | Seen::Held | Seen::Started | Seen::Restarting) => Seen::Crashed,
                (EventKind::Restarting(_), Seen::Starting | Seen::Held | Seen::Started | Seen::Crashed) => Seen::Restarting,
                (EventKind::Stopped(_), Seen::Starting | Seen::Held | Seen::Started | Seen::Restarting | Seen::Crashed) => {
                    Seen::Ended
                }
                (EventKind::Removed, Seen::Defined | Seen::Ended) => Seen::Removed,
                (kind, seen) => panic!("{kind:?} after {seen:?}"),
            };
            prop_assert_eq!(event.generation, *generation + u64::from(event.kind == EventKind::Starting)
                + if *seen == Seen::Nothing { event.generation } else { 0 });
            (*seen, *generation) = (next, event.generation);
        }
    }
}
