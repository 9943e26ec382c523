//! What is remembered of runs that failed.

use std::{collections::VecDeque, rc::Rc};

use sepal_schema::{
    crash::{CrashReport, MAX_CRASHES},
    report::{Reason, StopReport},
};

use super::{
    Registry,
    entry::{Entry, Phase},
};
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

/// What is known of the runs under a name that are over, also where none was of this manager.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runs {
    /// The last ones that failed, newest first.
    pub crashes: Vec<Rc<CrashReport>>,
    /// The number of the last one; 0: none is known.
    pub generation: u64,
    /// How it ended, if that is known.
    pub stop: Option<StopReport>,
}

impl Entry {
    /// How it ended, of one that an earlier manager had: whoever had it then, it is nobody's now.
    pub(super) fn has_ended(&mut self, stop: StopReport) {
        self.phase = match stop.reason {
            Reason::VmmTerminated => Phase::Died,
            _ => Phase::Stopped,
        };
        self.stop = Some(stop);
        self.detached = true;
    }

    /// A defined one runs no more, and nobody knows how its last run ended.
    pub(super) fn ended_somehow(&mut self) {
        (self.phase, self.stop) = (Phase::Defined, None);
    }
}

impl Registry {
    /// What is known of the runs under a guest's name that are over.
    pub(crate) fn runs(&self, id: GuestId) -> Runs {
        let Some(entry) = self.entries.get(&id) else {
            return Runs::default();
        };
        Runs {
            crashes: self.crashes(id),
            generation: entry.generation,
            stop: entry.stop.clone(),
        }
    }

    /// As [`Registry::runs`], of a guest that is only remembered, or only defined; none if nothing is known of one, or it has not ended.
    pub(crate) fn past_runs(&self, id: GuestId) -> Option<Runs> {
        self.entries.get(&id).filter(|entry| entry.remembered())?;
        let runs = self.runs(id);
        (runs.stop.is_some() || !runs.crashes.is_empty()).then_some(runs)
    }

    /// What is known from the disk of the runs of a guest that is only defined.
    pub(crate) fn restore_runs(&mut self, id: GuestId, runs: Runs) {
        self.restore_crashes(id, runs.crashes);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.generation = entry.generation.max(runs.generation);
            if let Some(stop) = runs.stop {
                entry.has_ended(stop);
            }
        }
    }

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
