//! What is remembered of runs that failed.

use std::{collections::VecDeque, rc::Rc};

use sepal_schema::{
    crash::{CrashReport, MAX_CRASHES},
    report::StopReport,
};

use super::Registry;
use crate::model::{GuestId, Trace};

/// The last runs under a name that failed, newest first. What is known of each does not change any more.
#[derive(Debug, Clone, Default)]
pub(super) struct Crashes(VecDeque<Rc<CrashReport>>);

impl Crashes {
    /// Another one.
    pub(super) fn add(&mut self, report: &StopReport, generation: u64, trace: Trace) {
        self.0.truncate(MAX_CRASHES - 1);
        self.0.push_front(Rc::new(CrashReport {
            report: report.clone(),
            generation,
            last_lines: trace.last_lines,
            registers: trace.registers,
            output: trace.output,
        }));
    }
}

impl Registry {
    /// The last runs under a guest's name that failed, newest first.
    pub fn crashes(&self, id: GuestId) -> Vec<Rc<CrashReport>> {
        let entry = self.entries.get(&id);
        entry.map_or_else(Vec::new, |entry| entry.crashes.0.iter().cloned().collect())
    }

    /// What an earlier manager knew of runs under this name that failed, newest first.
    pub fn restore_crashes(&mut self, id: GuestId, crashes: impl IntoIterator<Item = impl Into<Rc<CrashReport>>>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.crashes.0 = crashes.into_iter().take(MAX_CRASHES).map(Into::into).collect();
        }
    }

    /// The devices that broke in a guest's run, each with its reason, as an earlier manager knew them.
    pub(crate) fn restore_failures(&mut self, id: GuestId, failures: Vec<(String, String)>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.failures = failures;
        }
    }

    /// How many runs of a guest have failed in a row, and how often it has begun again by itself since somebody started it.
    pub fn count(&mut self, id: GuestId, failures: u32, restarts: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.upkeep.failures = failures;
            entry.upkeep.restarts = restarts;
        }
    }
}
