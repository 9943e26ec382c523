//! What is known of a guest's runs beyond the last one: how many failed in a row, and how they did.

use std::rc::Rc;

use sepal_schema::crash::CrashReport;

use super::Guest;
use crate::restart::Row;

impl Guest {
    /// Whoever begins it does not wait to hear how that went: it is tried again by its restart policy also if it never runs.
    pub fn insist(&self) {
        self.insists.set(true);
    }

    /// Whether it is tried again also if it never runs.
    pub(crate) fn insists(&self) -> bool {
        self.insists.get()
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

    /// How many runs in a row have failed, and how often it has begun again by itself: as an earlier manager counted, or none.
    pub(crate) fn counted(&self) -> (u32, u32) {
        let info = self.manager.registry(|registry, now| registry.info(self.id, now));
        info.map_or((0, 0), |info| (info.upkeep.failures, info.upkeep.restarts))
    }

    /// A run has ended, or another begins.
    pub(crate) fn count(&self, row: &Row) {
        self.manager
            .registry(|registry, _| registry.count(self.id, row.failures(), row.restarts()));
    }
}
