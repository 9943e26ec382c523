//! What an earlier manager knew, taken over by this one.

use std::{
    collections::{HashMap, HashSet},
    mem::{Discriminant, discriminant},
    rc::Rc,
};

use sepal_schema::{
    config::Restart,
    error::Error,
    info::{GuestDescriptor, LayerInfo, Upkeep},
    report::StopReport,
};
use uuid::Uuid;

use super::{
    Origin, Registry,
    bygone::Names,
    entry::{Entry, Phase, taken},
};
use crate::{
    durable::chronicle::Past,
    model::{EventKind, GuestId},
};

/// Where a guest was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoredPhase {
    /// It is created.
    Creating,
    /// It was created; its vCPUs start, or have started at `started_ns`.
    Launching,
    /// A run is over, and another is to follow.
    Restarting,
    /// It has ended, and is only remembered.
    Ended,
}

/// What is known of a guest that goes on without the manager that launched it.
#[derive(Debug, Clone)]
pub struct Restored {
    /// Its name.
    pub name: Rc<str>,
    /// Tells it from all others.
    pub uuid: Option<Uuid>,
    /// Which creation under its name.
    pub generation: u64,
    /// Where it was.
    pub phase: RestoredPhase,
    /// When its vCPUs started, by the monotonic clock; none: they have not.
    pub started_ns: Option<u64>,
    /// Its vCPUs are held.
    pub paused: bool,
    /// It lives on without the client that launched it.
    pub detached: bool,
    /// It was asked to shut down.
    pub asked: bool,
    /// How often it was begun again by itself.
    pub restarts: u32,
    /// How many runs in a row have failed.
    pub failures: u32,
    /// What follows when it ends by itself.
    pub restart: Restart,
    /// What it is made of.
    pub descriptor: Option<GuestDescriptor>,
    /// The jail of its component.
    pub layers: Vec<LayerInfo>,
    /// How the run before ended.
    pub stop: Option<StopReport>,
}

/// What an earlier manager had told when it ended, which its record of a guest may not know yet: events come first.
#[derive(Debug, Default)]
pub(super) struct Told {
    once: HashSet<(GuestId, u64, Discriminant<EventKind>)>,
    paused: HashMap<GuestId, (u64, bool)>,
}

impl Told {
    fn note(&mut self, id: GuestId, generation: u64, kind: &EventKind) {
        match kind {
            EventKind::Paused | EventKind::Resumed => {
                self.paused.insert(id, (generation, *kind == EventKind::Paused));
            }
            EventKind::Device(_) | EventKind::Defined | EventKind::Removed => {}
            // Of those there is one in a generation.
            EventKind::Starting
            | EventKind::Started
            | EventKind::ShuttingDown
            | EventKind::Stopped(_)
            | EventKind::Restarting(_)
            | EventKind::Crashed(_) => {
                self.once.insert((id, generation, discriminant(kind)));
            }
        }
    }

    /// Whether the vCPUs of a generation were held, as far as that was told.
    fn paused(&self, id: GuestId, generation: u64) -> Option<bool> {
        let (_, paused) = self.paused.get(&id).filter(|(of, _)| *of == generation)?;
        Some(*paused)
    }

    /// Whether this was told before; it is forgotten by that.
    pub(super) fn take(&mut self, id: GuestId, generation: u64, kind: &EventKind) -> bool {
        !self.once.is_empty() && self.once.remove(&(id, generation, discriminant(kind)))
    }
}

impl Registry {
    /// Goes on with the events of an earlier manager, before anything else is done.
    pub(crate) fn restore_events(&mut self, past: Vec<Past>) {
        let mut names = Names::default();
        let (mut told, mut last_id) = (Told::default(), self.last_id);
        self.log.restore(past, |past| {
            let id = names.note(past, || {
                last_id += 1;
                GuestId(last_id)
            });
            told.note(id, past.generation, &past.kind);
            id
        });
        self.told = told;
        self.last_id = last_id;
        self.past = names;
    }

    /// Takes over a guest. No event tells it: nothing has happened to it.
    ///
    /// # Errors
    /// `ALREADY_RUNNING`: its name is taken.
    pub fn restore(&mut self, from: Restored) -> Result<GuestId, Error> {
        let (mut upkeep, mut kept, mut missed) = (Upkeep::default(), None, None);
        if let Some(entry) = self.names.get(&from.name).and_then(|id| self.entries.get(id)) {
            if entry.stands_for(from.uuid) {
                missed = Some(entry.id);
            } else if !entry.remembered() {
                return Err(taken(entry));
            }
            upkeep = entry.kept_for(Origin::Definition)?;
            kept = entry.kept.clone();
        }
        // Whose events are known already.
        let id = self
            .past
            .take(&from.name)
            .map(|bygone| bygone.id)
            .or(missed)
            .unwrap_or_else(|| {
                self.last_id += 1;
                GuestId(self.last_id)
            });
        if let Some(old) = self.names.insert(from.name.clone(), id) {
            self.entries.remove(&old);
            self.forgotten.push(old);
        }
        let mut entry = Entry {
            generation: from.generation,
            phase: match (from.phase, from.started_ns) {
                (RestoredPhase::Creating, _) => Phase::Creating,
                (RestoredPhase::Launching, None) => Phase::Launching,
                (RestoredPhase::Launching, Some(_)) => Phase::Running,
                (RestoredPhase::Restarting, _) => Phase::Restarting,
                (RestoredPhase::Ended, _) => Phase::Stopped,
            },
            started_at: from.started_ns,
            shutdown_told: from.asked,
            // Noted after it was told.
            paused: self.told.paused(id, from.generation).unwrap_or(from.paused),
            detached: from.detached,
            descriptor: from.descriptor,
            layers: from.layers,
            stop: from.stop,
            ..Entry::new(id, from.name, Origin::Launch)
        };
        entry.upkeep = upkeep;
        // It may have been replaced since, when the earlier manager was there.
        entry.redefined = kept.is_some();
        entry.kept = kept;
        entry.upkeep.uuid = from.uuid.or(entry.upkeep.uuid);
        entry.upkeep.durable = true;
        entry.upkeep.restarts = from.restarts;
        entry.upkeep.failures = from.failures;
        entry.upkeep.restart = from.restart;
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// A guest goes on without this manager.
    pub(crate) fn set_durable(&mut self, id: GuestId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.upkeep.durable = true;
        }
    }
}

#[cfg(test)]
mod tests;
