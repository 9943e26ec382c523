//! The names and what is known behind each: a state machine without I/O, the manager's only truth about statuses.
//!
//! ```text
//!            reserve               create                created            run
//!   (free) ----------> NotStarted --------> Creating -----------> Created -------> Launching
//!     ^                              ^         |                    |  |               | started
//!     |                              |         |        create: the |  |               v
//!     | release, remove,      create |         |       old one ends |  |            Running
//!     | replaced, forgotten          |         |   <----------------+  |               | (started is believed from the three before, too)
//!     |                              |         |                       |               | stopping (from any of the four)
//!     |                              |         |                       |               v
//!     |                              |         v   ended               v            Stopping
//!     +--------------------- Stopped, Died, GivenUp <---------------------------------'
//! ```
//!
//! To the outside, Creating, Created and Launching are `starting`, Died is `vmmUnexpectedTermination`, and GivenUp, which failed again and
//! again, is `crashLoop`. Whatever concerns a generation carries its number; what comes late for an older one, or for one that has ended, changes nothing. A name that `launch` took is
//! remembered after the end, until it is removed, launched again, or 64 others have ended since. A name that a client drives itself
//! (`newGuest`) is held until that client lets go of it.
//!
//! A name that is defined (`kept`) is Defined where it is not held or remembered otherwise; it is not forgotten, and `start` alone takes it. If it is known
//! from the disk how its last run ended, it begins with that.
//!
//! A guest that begins again goes from any of the live phases but Stopping to Restarting, and from there, when its time has come, to Creating
//! with the next generation, without its name or anything else having been let go of.

mod bygone;
mod crashes;
mod entry;
mod kept;
mod restore;
mod unreached;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    rc::Rc,
};

use sepal_schema::{
    config::check_name,
    error::{Error, Kind},
    info::{GuestDescriptor, GuestInfo, LayerInfo, Upkeep},
    news::DeviceNews,
    report::{Reason, StopReport},
};
use uuid::Uuid;

pub use self::restore::{Restored, RestoredPhase};
use self::{
    crashes::Crashes,
    entry::{Entry, Phase, taken},
    restore::Told,
};
pub use self::{
    crashes::Runs,
    entry::Vitals,
    kept::{Claim, Kept, MAX_DEFINITIONS},
};
use crate::{
    capacity::Used,
    events::{EventLog, KEPT},
    model::{Ending, EventKind, GuestId, Moment, cut},
};

/// Most guests at a time that have not ended.
pub const MAX_GUESTS: usize = 256;
/// Most guests that have ended and are remembered.
pub const MAX_REMEMBERED: usize = 64;
/// Most devices that broke that are remembered for a guest.
const MAX_FAILURES: usize = 8;

/// Who took a name, which decides what becomes of it after the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// `newGuest`: held as long as the client holds the lifecycle.
    Lifecycle,
    /// `launch`: remembered after the end.
    Launch,
    /// `start`: remembered after the end, too, and the name stays its own as long as it is defined.
    Definition,
}

/// How many there may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Guests that have not ended.
    pub guests: usize,
    /// Guests that have ended.
    pub remembered: usize,
    /// Events.
    pub events: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            guests: MAX_GUESTS,
            remembered: MAX_REMEMBERED,
            events: KEPT,
        }
    }
}

/// A creation that has begun.
#[derive(Debug, PartialEq, Eq)]
pub struct Creation {
    /// Its number.
    pub generation: u64,
    /// How the one before ended, if it was created, did not run, and gave way to this one.
    pub replaced: Option<StopReport>,
}

/// All names.
#[derive(Debug)]
pub struct Registry {
    limits: Limits,
    entries: HashMap<GuestId, Entry>,
    names: BTreeMap<Rc<str>, GuestId>,
    log: EventLog,
    last_id: u64,
    last_chosen: u64,
    endings: u64,
    forgotten: Vec<GuestId>,
    /// Who was behind which name when an earlier manager ended.
    past: bygone::Names,
    /// What that manager had told.
    told: Told,
}

impl Registry {
    /// No names yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: HashMap::new(),
            names: BTreeMap::new(),
            log: EventLog::new(limits.events),
            last_id: 0,
            last_chosen: 0,
            endings: 0,
            forgotten: Vec::new(),
            past: bygone::Names::default(),
            told: Told::default(),
        }
    }

    /// The events, for those who read along.
    pub fn log(&self) -> &EventLog {
        &self.log
    }

    /// Takes a name; an empty one is chosen.
    ///
    /// # Errors
    /// `BAD_CONFIG` for a name that is not valid, `ALREADY_RUNNING` for one that is taken, `ALREADY_BOUND` for one that is defined, where that is not to be
    /// started, `NO_RESOURCES` when there are too many guests.
    pub fn reserve(&mut self, name: &str, origin: Origin, now: Moment) -> Result<GuestId, Error> {
        if !name.is_empty() {
            check_name(name)?;
        }
        let mut upkeep = Upkeep::default();
        let (mut generation, mut crashes, mut kept) = (0, Crashes::default(), None);
        if let Some(entry) = self.names.get(name).and_then(|id| self.entries.get(id)) {
            if !entry.remembered() {
                return Err(taken(entry));
            }
            upkeep = entry.kept_for(origin)?;
            (generation, crashes, kept) = (entry.generation, entry.crashes.clone(), entry.kept.clone());
        }
        let Used { used, most } = self.occupancy();
        if most.is_some_and(|most| used >= most) {
            let message = format!("there are {used} guests, and no more are allowed at a time (--max-guests)");
            return Err(Error::new(Kind::NoResources, message));
        }
        let name: Rc<str> = if name.is_empty() {
            self.choose_name().into()
        } else {
            name.into()
        };
        generation = generation.max(self.past.take(&name).map_or(0, |bygone| bygone.generation()));
        self.last_id += 1;
        let id = GuestId(self.last_id);
        if let Some(old) = self.names.insert(name.clone(), id) {
            self.entries.remove(&old);
            self.log.forget(old);
            self.forgotten.push(old);
        }
        let entry = Entry {
            generation,
            crashes,
            upkeep,
            kept,
            ..Entry::new(id, name.clone(), origin)
        };
        let defined = entry.upkeep.defined;
        self.entries.insert(id, entry);
        if !defined {
            self.tell(id, now, EventKind::Defined);
        }
        Ok(id)
    }

    /// Begins a creation.
    ///
    /// # Errors
    /// `ALREADY_RUNNING` while a guest is created, runs or stops; `NOT_FOUND` when the name was let go of, or is only remembered.
    pub fn create(&mut self, id: GuestId, descriptor: GuestDescriptor, now: Moment) -> Result<Creation, Error> {
        let entry = self.entries.get(&id).ok_or_else(gone)?;
        let mut replaced = None;
        match entry.phase {
            Phase::Defined => return Err(gone()),
            // What launch started is only remembered now, and does not count among the guests any more.
            Phase::Stopped | Phase::Died | Phase::GivenUp if entry.remembered() => return Err(gone()),
            Phase::NotStarted | Phase::Stopped | Phase::Died | Phase::GivenUp => {}
            Phase::Created => {
                let detail = "it was created and never run, and a new creation took its place";
                replaced = self.ended(id, entry.generation, Ending::new(Reason::Killed, detail), 0, now);
            }
            Phase::Creating
            | Phase::Launching
            | Phase::Running
            | Phase::Restarting
            | Phase::Stopping
            | Phase::Unreached => {
                return Err(taken(entry));
            }
        }
        let entry = self.entries.get_mut(&id).ok_or_else(gone)?;
        let generation = entry.begin();
        entry.descriptor = Some(descriptor);
        entry.stop = None;
        (entry.upkeep.failures, entry.upkeep.restarts) = (0, 0);
        self.tell(id, now, EventKind::Starting);
        Ok(Creation { generation, replaced })
    }

    /// The generation ended, and another is to follow it. The uptime is as for [`Registry::ended`]. None if nothing is to follow: the guest is
    /// being stopped, or its name was let go of.
    pub fn restarting(
        &mut self,
        id: GuestId,
        generation: u64,
        ending: Ending,
        uptime_ns: u64,
        now: Moment,
    ) -> Option<StopReport> {
        let going_on = |entry: &&mut Entry| !matches!(entry.phase, Phase::Stopping | Phase::Restarting);
        let entry = self.live(id, generation).filter(going_on)?;
        let (crashed, report) = (ending.crashed(), entry.end(ending, uptime_ns, now));
        entry.phase = Phase::Restarting;
        entry.started_at = None;
        entry.paused = false;
        entry.stop = Some(report.clone());
        if crashed {
            self.tell(id, now, EventKind::Crashed(report.clone()));
        }
        self.tell(id, now, EventKind::Restarting(report.clone()));
        Some(report)
    }

    /// Begins the creation that follows a generation; returns its number. None as for [`Registry::restarting`].
    pub fn again(&mut self, id: GuestId, generation: u64, now: Moment) -> Option<u64> {
        let waits = |entry: &&mut Entry| entry.phase == Phase::Restarting;
        let entry = self.live(id, generation).filter(waits)?;
        let generation = entry.begin();
        self.tell(id, now, EventKind::Starting);
        Some(generation)
    }

    /// What was created is to wait, paused, before its first instruction; [`Registry::paused`] lets it go on.
    pub fn hold(&mut self, id: GuestId, generation: u64, now: Moment) {
        let Some(entry) = self.live(id, generation) else { return };
        if entry.phase == Phase::Created {
            entry.phase = Phase::Launching;
            entry.paused = true;
            self.tell(id, now, EventKind::Paused);
        }
    }

    /// The machine is there. False if nobody waits for it any more.
    pub fn created(&mut self, id: GuestId, generation: u64) -> bool {
        match self.live(id, generation) {
            Some(entry) if entry.phase == Phase::Creating => {
                entry.phase = Phase::Created;
                true
            }
            _ => false,
        }
    }

    /// Asks to run what was created. What is still being created must be waited for first.
    ///
    /// # Errors
    /// `NOT_CREATED`, `ALREADY_RUNNING`.
    pub fn run(&mut self, id: GuestId, generation: u64) -> Result<(), Error> {
        let entry = self.entries.get_mut(&id).ok_or_else(gone)?;
        match entry.phase {
            Phase::Created if entry.generation == generation => {
                entry.phase = Phase::Launching;
                Ok(())
            }
            Phase::Launching | Phase::Running | Phase::Restarting | Phase::Stopping | Phase::Unreached => {
                Err(taken(entry))
            }
            Phase::Defined
            | Phase::NotStarted
            | Phase::Stopped
            | Phase::Died
            | Phase::GivenUp
            | Phase::Creating
            | Phase::Created => {
                let message = format!(
                    "guest \"{}\" has not been created: run needs a create that worked",
                    entry.name
                );
                Err(Error::new(Kind::NotCreated, message))
            }
        }
    }

    /// The vCPUs run. Where run was asked for together with create, this may be known before the answer to create.
    pub fn started(&mut self, id: GuestId, generation: u64, now: Moment) {
        let Some(entry) = self.live(id, generation) else {
            return;
        };
        if entry.started_at.is_some() || entry.phase == Phase::Restarting {
            return;
        }
        entry.started_at = Some(now.monotonic_ns);
        if entry.phase != Phase::Stopping {
            entry.phase = Phase::Running;
            self.tell(id, now, EventKind::Started);
        }
    }

    /// The guest was asked to shut down; what it makes of it is its own affair. Told once a generation.
    pub fn shutting_down(&mut self, id: GuestId, generation: u64, now: Moment) {
        let Some(entry) = self.live(id, generation) else { return };
        if !std::mem::replace(&mut entry.shutdown_told, true) {
            self.tell(id, now, EventKind::ShuttingDown);
        }
    }

    /// The guest is being stopped by force.
    pub fn stopping(&mut self, id: GuestId, generation: u64, now: Moment) {
        let Some(entry) = self.live(id, generation) else { return };
        entry.phase = Phase::Stopping;
        self.shutting_down(id, generation, now);
    }

    /// The guest's vCPUs are held, or go on.
    pub fn paused(&mut self, id: GuestId, generation: u64, paused: bool, now: Moment) {
        let Some(entry) = self.live(id, generation) else { return };
        let may_change = match entry.phase {
            Phase::Running => true,
            // It is held before its first instruction.
            Phase::Launching => entry.paused,
            _ => false,
        };
        if may_change && entry.paused != paused {
            entry.paused = paused;
            self.tell(id, now, if paused { EventKind::Paused } else { EventKind::Resumed });
        }
    }

    /// Something happened to a device of the guest.
    pub fn device_news(&mut self, id: GuestId, generation: u64, news: DeviceNews, now: Moment) {
        let Some(entry) = self.live(id, generation) else {
            return;
        };
        if let DeviceNews::Failed { device, reason } = &news
            && entry.failures.len() < MAX_FAILURES
        {
            entry.failures.push((device.clone(), reason.clone()));
        }
        self.tell(id, now, EventKind::Device(news));
    }

    /// The devices that broke in the guest's last generation, each with its reason; the first of them.
    pub fn failures(&self, id: GuestId) -> &[(String, String)] {
        self.entries.get(&id).map_or(&[], |entry| &entry.failures)
    }

    /// The generation ended. The uptime is the one given, or (for 0) measured here. Returns the report, or none if it had ended before.
    pub fn ended(
        &mut self,
        id: GuestId,
        generation: u64,
        ending: Ending,
        uptime_ns: u64,
        now: Moment,
    ) -> Option<StopReport> {
        self.endings += 1;
        let endings = self.endings;
        let entry = self.live(id, generation)?;
        entry.phase = match (ending.gave_up, ending.reason) {
            (true, _) => Phase::GivenUp,
            (false, Reason::VmmTerminated) => Phase::Died,
            (false, _) => Phase::Stopped,
        };
        let (crashed, report) = (ending.crashed(), entry.end(ending, uptime_ns, now));
        entry.paused = false;
        entry.ended_as = endings;
        entry.stop = Some(report.clone());
        if crashed {
            self.tell(id, now, EventKind::Crashed(report.clone()));
        }
        self.tell(id, now, EventKind::Stopped(report.clone()));
        self.forget_oldest(now);
        Some(report)
    }

    /// A client lets go of the name that it held: what still runs under it counts as ended, and the name is free.
    pub fn release(&mut self, id: GuestId, ending: Ending, now: Moment) -> Option<StopReport> {
        let generation = self.entries.get(&id)?.generation;
        let report = self.ended(id, generation, ending, 0, now);
        self.forget(id, now);
        report
    }

    /// Forgets a guest that has ended.
    ///
    /// # Errors
    /// `NOT_FOUND`, `ALREADY_RUNNING`, `ALREADY_BOUND` for one that is defined.
    pub fn remove(&mut self, name: &str, now: Moment) -> Result<(), Error> {
        let id = self.lookup(name)?;
        let entry = self.entries.get(&id).ok_or_else(gone)?;
        if !entry.remembered() {
            return Err(taken(entry));
        }
        entry.kept_for(Origin::Launch)?;
        self.forget(id, now);
        Ok(())
    }

    /// The guest lives on without the client that launched it.
    pub fn detach(&mut self, id: GuestId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.detached = true;
        }
    }

    /// Whether the guest lives on without the client that launched it.
    pub fn detached(&self, id: GuestId) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.detached)
    }

    /// The guest has a component, or (0) has none any more, and with it goes what was known about its jail.
    pub fn component(&mut self, id: GuestId, pid: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            let before = std::mem::replace(&mut entry.component_pid, pid);
            // What is known of one that was taken over holds until it has told it again.
            if before != 0 && before != pid {
                entry.layers.clear();
            }
        }
    }

    /// The jail of the guest's component.
    pub fn layers(&mut self, id: GuestId, layers: Vec<LayerInfo>) {
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.component_pid != 0
        {
            entry.layers = layers;
        }
    }

    /// Learns more about what a generation is made of.
    pub fn describe(&mut self, id: GuestId, generation: u64, learn: impl FnOnce(&mut GuestDescriptor)) {
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.generation == generation
            && let Some(descriptor) = &mut entry.descriptor
        {
            learn(descriptor);
        }
    }

    /// The guest of a name.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn lookup(&self, name: &str) -> Result<GuestId, Error> {
        self.names.get(name).copied().ok_or_else(|| {
            let message = format!("there is no guest \"{}\"", cut(name, 64).escape_debug());
            Error::new(Kind::NotFound, message).about("name")
        })
    }

    /// What is known about a guest, without problems; none if its name was let go of.
    pub fn info(&self, id: GuestId, now: Moment) -> Option<GuestInfo> {
        self.entries.get(&id).map(|entry| entry.info(now))
    }

    /// The name of a guest; none if it was let go of.
    pub fn name(&self, id: GuestId) -> Option<Rc<str>> {
        self.entries.get(&id).map(|entry| entry.name.clone())
    }

    /// All guests, sorted by name.
    pub fn ids(&self) -> Vec<GuestId> {
        self.names.values().copied().collect()
    }

    /// The guests whose vCPUs run or are paused, with their UUIDs, sorted by name, of a range of names.
    pub fn running(&self, names: (Bound<&str>, Bound<&str>)) -> Vec<(GuestId, Option<Uuid>)> {
        let entries = self
            .names
            .range::<str, _>(names)
            .filter_map(|(_, id)| self.entries.get(id));
        let running = entries.filter(|entry| matches!(entry.phase, Phase::Running | Phase::Stopping));
        running.map(|entry| (entry.id, entry.upkeep.uuid)).collect()
    }

    /// What changes all the time about a guest.
    pub fn vitals(&self, id: GuestId, now: Moment) -> Option<Vitals> {
        self.entries.get(&id).map(|entry| entry.vitals(now))
    }

    /// How many guests there are that have not ended, and how many there may be.
    pub fn occupancy(&self) -> Used {
        let unended = self.entries.values().filter(|entry| !entry.remembered()).count();
        Used {
            used: unended as u64,
            most: Some(self.limits.guests as u64),
        }
    }

    /// The guests that were forgotten since the last call; what is kept for them elsewhere can go.
    pub fn take_forgotten(&mut self) -> Vec<GuestId> {
        std::mem::take(&mut self.forgotten)
    }

    fn live(&mut self, id: GuestId, generation: u64) -> Option<&mut Entry> {
        let current = |entry: &&mut Entry| entry.generation == generation && entry.phase.live();
        self.entries.get_mut(&id).filter(current)
    }

    fn tell(&mut self, id: GuestId, now: Moment, kind: EventKind) {
        if let Some(entry) = self.entries.get(&id)
            && !self.told.take(id, entry.generation, &kind)
        {
            self.log.append(now.unix_ns, id, &entry.name, entry.generation, kind);
        }
    }

    fn choose_name(&mut self) -> String {
        loop {
            self.last_chosen += 1;
            let name = format!("guest-{}", self.last_chosen);
            // Ends: there are at most as many names as limits allow.
            if !self.names.contains_key(&*name) {
                return name;
            }
        }
    }

    fn forget_oldest(&mut self, now: Moment) {
        let remembered = || {
            self.entries
                .values()
                .filter(|entry| entry.remembered() && entry.ended_as != 0)
        };
        if remembered().count() > self.limits.remembered
            && let Some(oldest) = remembered().min_by_key(|entry| entry.ended_as)
        {
            self.forget(oldest.id, now);
        }
    }

    fn forget(&mut self, id: GuestId, now: Moment) {
        if self.fall_back(id) {
            return;
        }
        self.tell(id, now, EventKind::Removed);
        if let Some(entry) = self.entries.remove(&id) {
            self.names.remove(&entry.name);
            self.forgotten.push(id);
        }
    }
}

fn gone() -> Error {
    Error::new(Kind::NotFound, "the guest's name was let go of")
}

#[cfg(test)]
mod tests;
