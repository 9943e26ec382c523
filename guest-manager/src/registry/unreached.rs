//! Guests that go on with a keeper that does not answer: their names and UUIDs are theirs until it does.
//!
//! ```text
//!   (free), Defined, ended --miss--> Unreached --restore--> as it was found          the keeper has answered
//!                                        |------found_missing--> (free), Defined     it has, and holds no such guest
//!                                        '------ended----------> Died                it has ended, and the guest with it
//! ```

use std::rc::Rc;

use sepal_schema::{error::Error, info::Upkeep};
use uuid::Uuid;

use super::{
    Origin, Registry,
    crashes::Crashes,
    entry::{Entry, Phase, taken},
};
use crate::model::{GuestId, Moment};

/// The longest name, in characters (`sepal_schema::config::check_name`), less what tells it from another.
const LONGEST: usize = 56;

impl Entry {
    /// Whether this stands for the guest with this UUID, which nobody has reached yet.
    pub(super) fn stands_for(&self, uuid: Option<Uuid>) -> bool {
        self.phase == Phase::Unreached && self.upkeep.uuid == uuid
    }
}

impl Registry {
    /// There is such a guest, as far as an earlier manager has noted, and its keeper does not answer.
    ///
    /// # Errors
    /// `ALREADY_RUNNING`: its name is taken.
    pub(crate) fn miss(&mut self, name: &Rc<str>, uuid: Uuid, generation: u64) -> Result<GuestId, Error> {
        let (mut upkeep, mut kept, mut crashes) = (Upkeep::default(), None, Crashes::default());
        if let Some(entry) = self.names.get(name).and_then(|id| self.entries.get(id)) {
            if !entry.remembered() {
                return Err(taken(entry));
            }
            upkeep = entry.kept_for(Origin::Definition)?;
            (kept, crashes) = (entry.kept.clone(), entry.crashes.clone());
        }
        self.last_id += 1;
        let id = GuestId(self.last_id);
        if let Some(old) = self.names.insert(name.clone(), id) {
            self.entries.remove(&old);
            self.forgotten.push(old);
        }
        upkeep.uuid = Some(uuid);
        upkeep.durable = true;
        let entry = Entry {
            phase: Phase::Unreached,
            generation,
            upkeep,
            kept,
            crashes,
            ..Entry::new(id, name.clone(), Origin::Launch)
        };
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// Whether the keeper of this guest does not answer.
    pub(crate) fn is_unreached(&self, id: GuestId) -> bool {
        self.entries
            .get(&id)
            .is_some_and(|entry| entry.phase == Phase::Unreached)
    }

    /// Its keeper has answered, and holds it not: unless it was taken over meanwhile, there is no such guest.
    pub(crate) fn found_missing(&mut self, id: GuestId, now: Moment) {
        if self.is_unreached(id) {
            self.forget(id, now);
        }
    }

    /// A name for a guest that comes late, whose own is somebody else's by now: its own, or one like it.
    pub(crate) fn late_name(&self, name: &str, uuid: Uuid) -> Rc<str> {
        let is_free = |name: &str| {
            let entry = self.names.get(name).and_then(|id| self.entries.get(id));
            entry.is_none_or(|entry| entry.remembered() || entry.stands_for(Some(uuid)))
        };
        if is_free(name) {
            return name.into();
        }
        let begin: String = name.chars().take(LONGEST).collect();
        // Ends: there are at most as many names as limits allow. One that is defined is for its definition.
        let mut others = (2..).map(|number: u64| format!("{begin}-{number}"));
        let free = others.find(|other| !self.names.contains_key(&**other));
        free.map_or_else(|| begin.as_str().into(), Rc::from)
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::{
        error::Kind,
        info::{GuestDescriptor, GuestStatus},
        report::Reason,
    };

    use super::{super::Limits, *};
    use crate::model::Ending;

    const UUID: Uuid = Uuid::from_bytes([7; 16]);

    fn missed() -> (Registry, GuestId, Rc<str>) {
        let (mut registry, name) = (Registry::new(Limits::default()), Rc::from("web"));
        let id = registry.miss(&name, UUID, 4).unwrap();
        (registry, id, name)
    }

    #[test]
    fn a_name_is_its_own_until_the_keeper_answers() {
        let (mut registry, id, name) = missed();
        let now = Moment::now();
        assert!(registry.is_unreached(id));
        let info = registry.info(id, now).unwrap();
        assert_eq!(
            (info.status, info.generation, info.upkeep.uuid),
            (GuestStatus::Starting, 4, Some(UUID))
        );
        for origin in [Origin::Launch, Origin::Definition, Origin::Lifecycle] {
            let error = registry.reserve("web", origin, now).unwrap_err();
            assert_eq!(error.kind, Kind::AlreadyRunning);
            assert!(error.message.contains("does not answer"), "{}", error.message);
        }
        let other = registry.reserve("other", Origin::Launch, now).unwrap();
        assert_eq!(
            registry.check_identity(other, Some(UUID)).unwrap_err().kind,
            Kind::AlreadyBound
        );
        assert!(registry.remove("web", now).is_err() && registry.miss(&name, UUID, 4).is_err());
        registry.found_missing(id, now);
        assert!(registry.lookup("web").is_err());
        registry.reserve("web", Origin::Launch, now).unwrap();
    }

    #[test]
    fn one_whose_keeper_ends_has_died() {
        let (mut registry, id, _) = missed();
        let now = Moment::now();
        let ending = Ending::new(Reason::VmmTerminated, "its keeper ended");
        registry.ended(id, 4, ending, 0, now).unwrap();
        let info = registry.info(id, now).unwrap();
        assert_eq!(
            (info.status, info.generation),
            (GuestStatus::VmmUnexpectedTermination, 4)
        );
        registry.found_missing(id, now);
        // Its name goes on counting where it was.
        let id = registry.reserve("web", Origin::Launch, now).unwrap();
        assert_eq!(
            registry.create(id, GuestDescriptor::default(), now).unwrap().generation,
            5
        );
    }

    #[test]
    fn who_comes_late_gets_another_name_if_somebody_has_its_own() {
        let (mut registry, ..) = missed();
        let other = Uuid::from_bytes([8; 16]);
        assert_eq!(&*registry.late_name("web", UUID), "web");
        assert_eq!(&*registry.late_name("web", other), "web-2");
        registry.reserve("web-2", Origin::Launch, Moment::now()).unwrap();
        assert_eq!(&*registry.late_name("web", other), "web-3");
        assert_eq!(&*registry.late_name("free", other), "free");
        let long = "x".repeat(64);
        registry.reserve(&long, Origin::Launch, Moment::now()).unwrap();
        assert_eq!(*registry.late_name(&long, other), format!("{}-2", "x".repeat(56)));
    }
}
