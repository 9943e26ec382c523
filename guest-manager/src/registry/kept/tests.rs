//! Definitions in the registry: names, UUIDs, and what is left when something ends.

use proptest::prelude::*;

use sepal_schema::{config::RestartPolicy, info::GuestStatus};

use super::*;
use crate::{
    model::Ending,
    registry::{Limits, Registry},
};

fn now() -> Moment {
    Moment::default()
}

fn uuid(number: u8) -> Uuid {
    Uuid::from_bytes([number; 16])
}

fn registry(guests: usize, remembered: usize) -> Registry {
    Registry::new(Limits {
        guests,
        remembered,
        ..Limits::default()
    })
}

fn kept(uuid: Uuid) -> Kept {
    Kept {
        uuid,
        autostart: false,
        durable: false,
        restart: Restart::default(),
        descriptor: None,
    }
}

/// A definition of a guest with so much memory that begins again as often as it fails.
fn of_size(uuid: Uuid, memory_mib: u64) -> Kept {
    let mut kept = kept(uuid);
    kept.durable = true;
    kept.restart.policy = RestartPolicy::OnFailure;
    kept.descriptor = Some(GuestDescriptor {
        memory_mib,
        ..GuestDescriptor::default()
    });
    kept
}

fn define(registry: &mut Registry, name: &str, wanted: Option<Uuid>) -> Result<Uuid, Error> {
    let claim = registry.claim(
        name,
        wanted,
        Uuid::from_u128(u128::MAX - u128::from(registry.last_id)),
        true,
    )?;
    let uuid = claim.uuid;
    registry.keep(name, kept(uuid), Some(claim), now());
    Ok(uuid)
}

fn begin(registry: &mut Registry, name: &str, origin: Origin, wanted: Option<Uuid>) -> Result<(GuestId, u64), Error> {
    let id = registry.reserve(name, origin, now())?;
    let fresh = Uuid::from_u128(id.0.into());
    let created = registry.check_identity(id, wanted).and_then(|()| {
        let creation = registry.create(id, GuestDescriptor::default(), now())?;
        registry.identify(id, wanted, fresh);
        Ok(creation.generation)
    });
    match created {
        Ok(generation) => Ok((id, generation)),
        Err(error) => {
            registry.release(id, killed(), now());
            Err(error)
        }
    }
}

fn killed() -> Ending {
    Ending::new(sepal_schema::report::Reason::Killed, "killed")
}

fn info(registry: &Registry, name: &str) -> Option<sepal_schema::info::GuestInfo> {
    registry.info(registry.lookup(name).ok()?, now())
}

fn last_event(registry: &Registry) -> EventKind {
    let mut cursor = registry.log().cursor(1);
    registry.log().next(&mut cursor).unwrap().0.kind.clone()
}

#[test]
fn a_defined_guest_is_there_whether_it_runs_or_not() {
    let mut registry = registry(4, 4);
    let uuid = define(&mut registry, "web", None).unwrap();
    assert_eq!(last_event(&registry), EventKind::Defined);
    let there = info(&registry, "web").unwrap();
    assert_eq!(
        (there.status, there.upkeep.defined, there.upkeep.uuid),
        (GuestStatus::NotStarted, true, Some(uuid))
    );
    let (id, generation) = begin(&mut registry, "web", Origin::Definition, Some(uuid)).unwrap();
    assert_eq!(last_event(&registry), EventKind::Starting);
    registry.ended(id, generation, killed(), 0, now());
    let there = info(&registry, "web").unwrap();
    assert_eq!((there.status, there.upkeep.uuid), (GuestStatus::Stopped, Some(uuid)));
    let (_, generation) = begin(&mut registry, "web", Origin::Definition, Some(uuid)).unwrap();
    assert_eq!(generation, 2);
    registry.let_go("web", now());
    let there = info(&registry, "web").unwrap();
    assert!(
        there.status == GuestStatus::Starting && !there.upkeep.defined,
        "what runs goes on"
    );
    registry.remove("web", now()).unwrap_err();
}

#[test]
fn what_rests_is_told_as_it_would_be_started() {
    let mut registry = registry(4, 4);
    let uuid = define(&mut registry, "web", None).unwrap();
    let replace = |registry: &mut Registry, memory_mib| {
        let claim = registry.claim("web", None, uuid, true).unwrap();
        registry.keep("web", of_size(uuid, memory_mib), Some(claim), now());
    };
    let told = |registry: &Registry| {
        let info = info(registry, "web").unwrap();
        let descriptor = info.descriptor.unwrap();
        (
            descriptor.memory_mib,
            descriptor.devices.len(),
            info.upkeep.durable,
            info.upkeep.restart.policy,
        )
    };
    replace(&mut registry, 64);
    assert_eq!(told(&registry), (64, 0, true, RestartPolicy::OnFailure));
    // This run is made of something else, and says so as long as it lasts.
    let run = |registry: &mut Registry| {
        let id = registry.reserve("web", Origin::Definition, now()).unwrap();
        let descriptor = GuestDescriptor {
            memory_mib: 64,
            devices: vec!["serial".into()],
            ..GuestDescriptor::default()
        };
        let creation = registry.create(id, descriptor, now()).unwrap();
        registry.set_restart(id, Restart::default());
        (id, creation.generation)
    };
    let (id, generation) = run(&mut registry);
    replace(&mut registry, 128);
    assert_eq!(told(&registry), (64, 1, false, RestartPolicy::Never));
    registry.ended(id, generation, killed(), 0, now());
    assert_eq!(told(&registry), (128, 0, true, RestartPolicy::OnFailure));
    // Nothing was replaced since: all is known of what it is made of.
    let (id, generation) = run(&mut registry);
    registry.ended(id, generation, killed(), 0, now());
    assert_eq!(told(&registry), (64, 1, true, RestartPolicy::OnFailure));
    registry.keep("web", of_size(uuid, 128), None, now());
    assert_eq!(told(&registry).0, 64, "whether it starts by itself is no part of it");
    replace(&mut registry, 256);
    assert_eq!(told(&registry).0, 256);
}

#[test]
fn undefined_it_is_gone_unless_it_runs() {
    let mut registry = registry(4, 4);
    define(&mut registry, "web", None).unwrap();
    assert_eq!(registry.remove("web", now()).unwrap_err().kind, Kind::AlreadyBound);
    registry.let_go("web", now());
    assert_eq!(
        (last_event(&registry), info(&registry, "web")),
        (EventKind::Removed, None)
    );
    let (id, generation) = begin(&mut registry, "web", Origin::Launch, None).unwrap();
    define(&mut registry, "web", None).unwrap();
    registry.let_go("web", now());
    registry.ended(id, generation, killed(), 0, now());
    registry.remove("web", now()).unwrap();
}

#[test]
fn only_start_takes_a_name_that_is_defined() {
    let mut registry = registry(4, 4);
    define(&mut registry, "web", None).unwrap();
    for origin in [Origin::Launch, Origin::Lifecycle] {
        let error = registry.reserve("web", origin, now()).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyBound, "name"));
    }
    let id = registry.reserve("web", Origin::Definition, now()).unwrap();
    assert_eq!(
        registry.reserve("web", Origin::Definition, now()).unwrap_err().kind,
        Kind::AlreadyRunning
    );
    registry.release(id, killed(), now());
    assert!(info(&registry, "web").unwrap().upkeep.defined);
    let held = registry.reserve("mine", Origin::Lifecycle, now()).unwrap();
    assert_eq!(
        define(&mut registry, "mine", None).unwrap_err().kind,
        Kind::AlreadyRunning
    );
    registry.release(held, killed(), now());
    define(&mut registry, "mine", None).unwrap();
}

#[test]
fn a_uuid_is_one_guests() {
    let mut registry = registry(8, 8);
    define(&mut registry, "web", Some(uuid(1))).unwrap();
    let error = define(&mut registry, "db", Some(uuid(1))).unwrap_err();
    assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyBound, "uuid"));
    assert!(info(&registry, "db").is_none());
    assert_eq!(
        begin(&mut registry, "other", Origin::Launch, Some(uuid(1)))
            .unwrap_err()
            .about,
        "uuid"
    );
    let (id, generation) = begin(&mut registry, "other", Origin::Launch, Some(uuid(2))).unwrap();
    assert_eq!(define(&mut registry, "db", Some(uuid(2))).unwrap_err().about, "uuid");
    assert_eq!(
        define(&mut registry, "other", Some(uuid(3))).unwrap_err().about,
        "uuid",
        "what runs keeps its own"
    );
    registry.ended(id, generation, killed(), 0, now());
    define(&mut registry, "db", Some(uuid(2))).unwrap();
    assert_eq!(
        define(&mut registry, "web", None).unwrap(),
        uuid(1),
        "a definition keeps its own"
    );
    define(&mut registry, "web", Some(uuid(5))).unwrap();
    define(&mut registry, "third", Some(uuid(1))).unwrap();
}

#[test]
fn what_runs_becomes_a_defined_one() {
    let mut registry = registry(4, 1);
    let (id, generation) = begin(&mut registry, "web", Origin::Launch, None).unwrap();
    let has = info(&registry, "web").unwrap().upkeep.uuid.unwrap();
    assert_eq!(define(&mut registry, "web", None).unwrap(), has);
    registry.ended(id, generation, killed(), 0, now());
    for name in ["a", "b", "c"] {
        let (id, generation) = begin(&mut registry, name, Origin::Launch, None).unwrap();
        registry.ended(id, generation, killed(), 0, now());
    }
    let there = info(&registry, "web").unwrap();
    assert_eq!(there.status, GuestStatus::Stopped, "how it ended stays known");
    assert!(
        registry.take_forgotten().contains(&id),
        "what is kept elsewhere does not"
    );
    assert!(info(&registry, "a").is_none());
    begin(&mut registry, "web", Origin::Definition, Some(has)).unwrap();
}

#[test]
fn a_claim_that_fails_leaves_no_trace() {
    let mut registry = registry(4, 4);
    let claim = registry.claim("web", None, uuid(1), false).unwrap();
    assert!(registry.is_defined("web"));
    registry.unclaim(claim, now());
    assert!(info(&registry, "web").is_none() && registry.log().last() == 0);
    define(&mut registry, "web", Some(uuid(1))).unwrap();
    assert_eq!(
        registry.claim("web", None, uuid(9), false).unwrap_err().kind,
        Kind::AlreadyBound
    );
    let claim = registry.claim("web", Some(uuid(2)), uuid(9), true).unwrap();
    registry.unclaim(claim, now());
    let there = info(&registry, "web").unwrap().upkeep;
    assert_eq!((there.defined, there.uuid), (true, Some(uuid(1))));
}

#[test]
fn what_was_forgotten_while_it_was_claimed_does_not_stay() {
    // One that was launched and never created; and two that ended, where one is remembered.
    let mut registry = registry(4, 1);
    let id = registry.reserve("web", Origin::Launch, now()).unwrap();
    let claim = registry.claim("web", None, uuid(1), false).unwrap();
    registry.release(id, killed(), now());
    registry.unclaim(claim, now());
    assert!(info(&registry, "web").is_none());
    for (i, name) in (2..).zip(["first", "second"]) {
        let (id, generation) = begin(&mut registry, name, Origin::Launch, Some(uuid(i))).unwrap();
        let claim = (name == "second").then(|| registry.claim("first", None, uuid(9), false).unwrap());
        registry.ended(id, generation, killed(), 0, now());
        if let Some(claim) = claim {
            registry.unclaim(claim, now());
        }
    }
    assert!(info(&registry, "first").is_none() && info(&registry, "second").is_some());
    assert_eq!(last_event(&registry), EventKind::Removed);
}

#[test]
fn chosen_names_and_limits_leave_definitions_alone() {
    let mut registry = registry(2, 4);
    for name in ["guest-1", "guest-2", "web"] {
        define(&mut registry, name, None).unwrap();
    }
    let id = registry.reserve("", Origin::Launch, now()).unwrap();
    assert_eq!(&*registry.name(id).unwrap(), "guest-3");
    begin(&mut registry, "web", Origin::Definition, None).unwrap();
    assert_eq!(
        begin(&mut registry, "guest-1", Origin::Definition, None)
            .unwrap_err()
            .kind,
        Kind::NoResources
    );
    for number in 3..MAX_DEFINITIONS {
        define(&mut registry, &format!("d{number}"), None).unwrap();
    }
    assert_eq!(
        define(&mut registry, "too-many", None).unwrap_err().kind,
        Kind::NoResources
    );
    define(&mut registry, "web", None).unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Define(u8, Option<u8>, bool),
    Undefine(u8),
    Start(u8),
    Launch(u8, Option<u8>),
    Hold(u8),
    End(u8),
    Release(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0u8..4;
    let uuid = prop::option::of(1u8..4);
    prop_oneof![
        (name.clone(), uuid.clone(), any::<bool>()).prop_map(|(n, u, ok)| Step::Define(n, u, ok)),
        name.clone().prop_map(Step::Undefine),
        name.clone().prop_map(Step::Start),
        (name.clone(), uuid).prop_map(|(n, u)| Step::Launch(n, u)),
        name.clone().prop_map(Step::Hold),
        name.clone().prop_map(Step::End),
        name.prop_map(Step::Release),
    ]
}

proptest! {
    #[test]
    fn names_and_uuids_are_unique_and_definitions_stay(steps in prop::collection::vec(step(), 0..60)) {
        let mut registry = registry(3, 2);
        let mut defined = std::collections::BTreeMap::new();
        for step in steps {
            match step {
                Step::Define(name, wanted, works) => {
                    let name = format!("n{name}");
                    let fresh = Uuid::from_u128(1 << 100 | u128::from(registry.last_id));
                    let Ok(claim) = registry.claim(&name, wanted.map(uuid), fresh, true) else { continue };
                    let its = claim.uuid;
                    if works {
                        registry.keep(&name, kept(its), Some(claim), now());
                        defined.insert(name, its);
                    } else {
                        registry.unclaim(claim, now());
                    }
                }
                Step::Undefine(name) => {
                    let name = format!("n{name}");
                    if defined.remove(&name).is_some() {
                        registry.let_go(&name, now());
                    }
                }
                Step::Start(name) => {
                    let name = format!("n{name}");
                    if let Some(its) = defined.get(&name) {
                        let _ = begin(&mut registry, &name, Origin::Definition, Some(*its));
                    }
                }
                Step::Launch(name, wanted) => {
                    let _ = begin(&mut registry, &format!("n{name}"), Origin::Launch, wanted.map(uuid));
                }
                Step::Hold(name) => {
                    let _ = registry.reserve(&format!("n{name}"), Origin::Lifecycle, now());
                }
                Step::End(name) => {
                    if let Ok(id) = registry.lookup(&format!("n{name}")) {
                        let generation = registry.info(id, now()).unwrap().generation;
                        registry.ended(id, generation, killed(), 0, now());
                    }
                }
                Step::Release(name) => {
                    if let Ok(id) = registry.lookup(&format!("n{name}")) && registry.entries[&id].origin == Origin::Lifecycle {
                        registry.release(id, killed(), now());
                    }
                }
            }
            registry.take_forgotten();
            let infos: Vec<_> = registry.ids().into_iter().map(|id| registry.info(id, now()).unwrap()).collect();
            for (name, its) in &defined {
                let there = infos.iter().find(|info| info.name == *name).expect("a defined guest is there");
                prop_assert!(there.upkeep.defined);
                prop_assert_eq!(there.upkeep.uuid, Some(*its));
            }
            let others = infos.iter().filter(|info| info.upkeep.defined).count();
            prop_assert_eq!(others, defined.len());
            let entries = registry.entries.values().filter(|entry| !entry.is_gone());
            let mut uuids: Vec<_> = entries.filter_map(|entry| entry.upkeep.uuid).collect();
            let count = uuids.len();
            uuids.sort_unstable();
            uuids.dedup();
            prop_assert_eq!(uuids.len(), count);
        }
    }
}
