//! Names that are defined, and UUIDs: whose they are, and what becomes of them.
//!
//! ```text
//!   claim --(written to the disk)--> keep     the name is defined
//!     '------(that failed)---------> unclaim  all is as it was
//!   let_go: it is not any more; what runs goes on, and is forgotten after its end like any other
//! ```

use std::rc::Rc;

use sepal_schema::{
    config::{Restart, Uuid},
    error::{Error, Kind},
    info::{GuestDescriptor, Upkeep},
};

use super::{
    Origin, Registry,
    entry::{Entry, Phase, taken},
};
use crate::model::{EventKind, GuestId, Moment};

/// Most definitions.
pub const MAX_DEFINITIONS: usize = 1024;

/// What is known of a guest by its definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Tells it from all others.
    pub uuid: Uuid,
    /// It is started when the manager starts.
    pub autostart: bool,
    /// It goes on without its manager.
    pub durable: bool,
    /// What follows when it ends by itself.
    pub restart: Restart,
    /// What it is made of; none if this version cannot tell.
    pub descriptor: Option<GuestDescriptor>,
}

/// A name that is to be defined.
#[derive(Debug)]
pub struct Claim {
    /// The name.
    pub name: Rc<str>,
    /// The UUID that the definition is to have.
    pub uuid: Uuid,
    /// What was there before; none if there was no such name.
    before: Option<Upkeep>,
}

impl Entry {
    fn defined(id: GuestId, name: Rc<str>) -> Self {
        Self {
            phase: Phase::Defined,
            ..Self::new(id, name, Origin::Definition)
        }
    }

    /// What stays of its upkeep for the next one under its name, whom `origin` takes the name for.
    ///
    /// # Errors
    /// `ALREADY_BOUND`: it is defined, and not to be started from its definition.
    pub(super) fn kept_for(&self, origin: Origin) -> Result<Upkeep, Error> {
        match (self.upkeep.defined, origin) {
            (false, _) => Ok(Upkeep::default()),
            (true, Origin::Definition) => Ok(Upkeep {
                uuid: self.upkeep.uuid,
                defined: true,
                autostart: self.upkeep.autostart,
                ..Upkeep::default()
            }),
            (true, Origin::Launch | Origin::Lifecycle) => {
                let message = format!(
                    "guest \"{0}\" is defined: start it from its definition, or undefine it",
                    self.name
                );
                Err(Error::new(Kind::AlreadyBound, message).about("name"))
            }
        }
    }

    /// Whether nothing is left of it but what is remembered.
    fn is_gone(&self) -> bool {
        self.remembered() && !self.upkeep.defined
    }
}

impl Registry {
    fn named(&self, name: &str) -> Option<&Entry> {
        self.names.get(name).and_then(|id| self.entries.get(id))
    }

    /// Whether a name is defined.
    pub fn is_defined(&self, name: &str) -> bool {
        self.named(name).is_some_and(|entry| entry.upkeep.defined)
    }

    fn check_uuid(&self, uuid: Uuid, own: Option<GuestId>) -> Result<(), Error> {
        let has_it = |entry: &&Entry| entry.upkeep.uuid == Some(uuid) && Some(entry.id) != own && !entry.is_gone();
        match self.entries.values().find(has_it) {
            None => Ok(()),
            Some(other) => {
                let message = format!("guest \"{}\" has the UUID {uuid}", other.name);
                Err(Error::new(Kind::AlreadyBound, message).about("uuid"))
            }
        }
    }

    /// Whether a guest that is to be created can have the UUID that is `wanted`.
    ///
    /// # Errors
    /// `ALREADY_BOUND` about `uuid`, naming the guest that has it.
    pub fn check_identity(&self, id: GuestId, wanted: Option<Uuid>) -> Result<(), Error> {
        wanted.map_or(Ok(()), |wanted| self.check_uuid(wanted, Some(id)))
    }

    /// What follows when this run of a guest ends by itself.
    pub fn set_restart(&mut self, id: GuestId, restart: Restart) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.upkeep.restart = restart;
        }
    }

    /// Gives a guest that is created its UUID: the one that is `wanted`; the one that it has; or a `fresh` one.
    pub fn identify(&mut self, id: GuestId, wanted: Option<Uuid>, fresh: Uuid) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.upkeep.uuid = wanted.or(entry.upkeep.uuid).or(Some(fresh));
        }
    }

    /// Takes a name and a UUID for a definition: the one that is `wanted`; the one that the guest of that name has; or a `fresh` one. The name was
    /// checked before.
    ///
    /// # Errors
    /// `ALREADY_BOUND`: the name is defined, and that is not to be replaced; or another guest has the UUID, or the one that runs has another.
    /// `ALREADY_RUNNING`: the name is held by a client that drives it. `NO_RESOURCES`: there are too many definitions.
    pub fn claim(&mut self, name: &str, wanted: Option<Uuid>, fresh: Uuid, replace: bool) -> Result<Claim, Error> {
        let there = self.named(name);
        let own = there.map(|entry| entry.id);
        if let Some(entry) = there {
            if entry.upkeep.defined && !replace {
                let message = format!(
                    "guest \"{name}\" is defined already, and its definition is only replaced where that is asked for (replace)"
                );
                return Err(Error::new(Kind::AlreadyBound, message).about("name"));
            }
            if entry.origin == Origin::Lifecycle {
                return Err(taken(entry));
            }
            let runs = entry.phase.live() || entry.phase == Phase::NotStarted;
            if let (true, Some(wanted), Some(has)) = (runs, wanted, entry.upkeep.uuid)
                && wanted != has
            {
                let message = format!("guest \"{name}\" runs, and has the UUID {has}, which it keeps");
                return Err(Error::new(Kind::AlreadyBound, message).about("uuid"));
            }
        }
        let has = there
            .filter(|entry| !entry.is_gone())
            .and_then(|entry| entry.upkeep.uuid);
        let uuid = wanted.or(has).unwrap_or(fresh);
        self.check_uuid(uuid, own)?;
        let before = there.map(|entry| entry.upkeep.clone());
        let defined = self.entries.values().filter(|entry| entry.upkeep.defined).count();
        if defined >= MAX_DEFINITIONS && !before.as_ref().is_some_and(|upkeep| upkeep.defined) {
            let message = format!("there are {defined} definitions, and no more are allowed");
            return Err(Error::new(Kind::NoResources, message));
        }
        let id = own.unwrap_or_else(|| self.enter_defined(name));
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.upkeep.defined = true;
            entry.upkeep.uuid = Some(uuid);
        }
        let name = name.into();
        Ok(Claim { name, uuid, before })
    }

    fn enter_defined(&mut self, name: &str) -> GuestId {
        self.last_id += 1;
        let (id, name) = (GuestId(self.last_id), Rc::from(name));
        self.names.insert(Rc::clone(&name), id);
        self.entries.insert(id, Entry::defined(id, name));
        id
    }

    /// The definition of a name is on the disk: the one that was claimed, or a change of one that was there. Whose it is.
    pub fn keep(&mut self, name: &str, kept: Kept, claim: Option<Claim>, now: Moment) -> GuestId {
        let id = match self.names.get(name) {
            Some(id) => *id,
            // One that was found at the start.
            None => self.enter_defined(name),
        };
        let Some(entry) = self.entries.get_mut(&id) else {
            return id;
        };
        entry.upkeep.defined = true;
        entry.upkeep.autostart = kept.autostart;
        if !entry.phase.live() {
            entry.upkeep.uuid = Some(kept.uuid);
        }
        entry.kept = Some(kept);
        entry.redefined |= claim.is_some();
        if claim.is_some_and(|claim| claim.before.is_none_or(|before| !before.defined)) {
            self.tell(id, now, EventKind::Defined);
        }
        id
    }

    /// What was claimed is not kept after all. A guest that would have been forgotten meanwhile is.
    pub fn unclaim(&mut self, claim: Claim, now: Moment) {
        let Some(id) = self.names.get(&claim.name).copied() else {
            return;
        };
        match (self.entries.get_mut(&id), claim.before) {
            (Some(entry), Some(before)) => {
                entry.upkeep.defined = before.defined;
                if !entry.phase.live() {
                    entry.upkeep.uuid = before.uuid;
                }
                if entry.is_gone() && entry.ended_as == 0 {
                    self.forget(id, now);
                }
            }
            // Nobody was told of it.
            (Some(entry), None) if entry.phase == Phase::Defined => {
                self.entries.remove(&id);
                self.names.remove(&claim.name);
            }
            (Some(entry), None) => entry.upkeep.defined = false,
            (None, _) => {}
        }
    }

    /// The definition of a name is gone. What runs goes on as what a client has launched; what does not is forgotten.
    pub fn let_go(&mut self, name: &str, now: Moment) {
        let Some(id) = self.names.get(name).copied() else {
            return;
        };
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.upkeep.defined = false;
        entry.upkeep.autostart = false;
        entry.kept = None;
        if entry.remembered() {
            self.forget(id, now);
        }
    }

    /// A name that would be forgotten goes back to being only defined, if it is; false if it is not. How it ended stays known.
    pub(super) fn fall_back(&mut self, id: GuestId) -> bool {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.upkeep.defined) else {
            return false;
        };
        if !entry.phase.ended() {
            entry.phase = Phase::Defined;
        }
        entry.ended_as = 0;
        // What is kept for it elsewhere can go.
        self.forgotten.push(id);
        true
    }
}

#[cfg(test)]
mod tests;
