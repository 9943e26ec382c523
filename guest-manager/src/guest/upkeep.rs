//! What is known of a guest beyond its last run: how many failed in a row, and how they did; what it is made of.

use std::rc::Rc;

use sepal_schema::{
    config::GuestConfig,
    crash::CrashReport,
    error::{Error, Kind},
    guest_capnp::observer::configuration_result,
    report::Reason,
};

use super::{Creation, Ended, Guest};
use crate::{
    configuration::Configuration,
    manager::Manager,
    model::{Ending, GuestId, Moment},
    pace::Pace,
    registry::Runs,
    restart::{Counted, Row},
};

impl Guest {
    /// One whose runs are over, as far as they are still known: there is nothing left of it but that.
    pub(crate) fn bygone(manager: &Rc<Manager>, id: GuestId, name: &str, config: &GuestConfig, runs: Runs) -> Rc<Self> {
        let creation = Creation::of(config, runs.generation, false);
        let guest = Self::new(manager.clone(), id, name.into(), creation);
        let info = manager.info(id, None);
        let report = runs.stop.unwrap_or_else(|| {
            let ending = Ending::new(Reason::Unknown, "how its last run ended is not known");
            ending.report(0, Moment::default())
        });
        guest.close_ports();
        guest.state.change(|state| {
            let never = || Error::new(Kind::NotCreated, report.detail.clone());
            state.created = Some(Err(report.error.clone().unwrap_or_else(never)));
            state.ended = Some(Ended { report, info });
        });
        guest
    }

    /// Whoever begins it does not wait to hear how that went: it is tried again by its restart policy also if it never runs.
    pub fn insist(&self) {
        self.insists.set(true);
    }

    /// Whether it is tried again also if it never runs.
    pub(crate) fn insists(&self) -> bool {
        self.insists.get()
    }

    /// It is made from this; to be told before the descriptors in it go elsewhere.
    pub fn note(&self, config: &GuestConfig) {
        *self.configuration.borrow_mut() = Some(Configuration::of(config));
    }

    /// An earlier manager knew that it is made from this.
    pub(crate) fn note_origin(&self, origin: Configuration) {
        *self.configuration.borrow_mut() = Some(Ok(origin));
    }

    /// What would create it again, if that is known.
    pub(crate) fn origin(&self) -> Option<Configuration> {
        self.configuration.borrow().as_ref()?.as_ref().ok().cloned()
    }

    /// Tells what would create it again.
    ///
    /// # Errors
    /// The message is full.
    pub(crate) fn write_configuration(&self, mut to: configuration_result::Builder<'_>) -> Result<(), capnp::Error> {
        let unknown = || Error::new(Kind::NotCreated, "it is not known what the guest is made of");
        match &*self.configuration.borrow() {
            Some(Ok(configuration)) => {
                let uuid = self.info().upkeep.uuid;
                configuration.write(to, &self.name, uuid.as_ref().map(|uuid| &uuid.as_bytes()[..]))
            }
            Some(Err(error)) => {
                error.write(to.reborrow().init_error());
                Ok(())
            }
            None => {
                unknown().write(to.reborrow().init_error());
                Ok(())
            }
        }
    }

    /// The last runs under its name that failed, newest first.
    pub fn crashes(&self) -> Vec<Rc<CrashReport>> {
        self.manager.registry(|registry, _| registry.crashes(self.id))
    }

    /// Nanoseconds since its vCPUs started in this generation; 0 if they have not.
    pub(crate) fn uptime_ns(&self) -> u64 {
        let generation = self.generation();
        let info = self.manager.registry(|registry, now| registry.info(self.id, now));
        info.filter(|info| info.generation == generation)
            .map_or(0, |info| info.uptime_ns)
    }

    /// What is counted of its runs, and how many short ones there have been in a row: as an earlier manager counted, or none.
    pub(crate) fn counted(&self) -> (Counted, u32) {
        self.counted.get()
    }

    /// An earlier manager has counted so far.
    pub(crate) fn count_on(&self, counted: Counted, short_runs: u32) {
        self.counted.set((counted, short_runs));
    }

    /// A run has ended, or another begins.
    pub(crate) fn count(&self, row: &Row, pace: &Pace) {
        let counted = row.counted();
        self.counted.set((counted, pace.short_runs()));
        self.manager
            .registry(|registry, _| registry.count(self.id, counted.failures, counted.restarts));
    }
}
