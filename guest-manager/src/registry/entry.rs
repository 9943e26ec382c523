//! What is known behind a name.

use std::rc::Rc;

use sepal_schema::{
    error::{Error, Kind},
    info::{GuestDescriptor, GuestInfo, GuestStatus, LayerInfo, Upkeep},
    report::StopReport,
};

use super::{Kept, Origin, crashes::Crashes};
use crate::model::{Ending, GuestId, Moment};

/// Where a guest is in its life; the registry's head draws it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is a definition of the name, and nothing else.
    Defined,
    NotStarted,
    Creating,
    Created,
    Launching,
    Running,
    Restarting,
    Stopping,
    /// It goes on with a keeper that does not answer.
    Unreached,
    Stopped,
    Died,
    /// It failed too often.
    GivenUp,
}

impl Phase {
    pub(super) fn live(self) -> bool {
        !matches!(
            self,
            Self::Defined | Self::NotStarted | Self::Stopped | Self::Died | Self::GivenUp
        )
    }

    pub(super) fn ended(self) -> bool {
        matches!(self, Self::Stopped | Self::Died | Self::GivenUp)
    }

    fn status(self) -> GuestStatus {
        match self {
            Self::Defined | Self::NotStarted => GuestStatus::NotStarted,
            Self::Creating | Self::Created | Self::Launching | Self::Restarting | Self::Unreached => {
                GuestStatus::Starting
            }
            Self::Running => GuestStatus::Running,
            Self::Stopping => GuestStatus::Stopping,
            Self::Stopped => GuestStatus::Stopped,
            Self::Died => GuestStatus::VmmUnexpectedTermination,
            Self::GivenUp => GuestStatus::CrashLoop,
        }
    }
}

/// What changes all the time about a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vitals {
    /// Which creation under its name.
    pub generation: u64,
    /// Nanoseconds since its vCPUs started, or from there to their end.
    pub uptime_ns: u64,
    /// Process id of its component; 0 if there is none.
    pub component_pid: u32,
}

/// A name, and what is known of the guest behind it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: GuestId,
    pub(super) name: Rc<str>,
    pub(super) origin: Origin,
    pub(super) phase: Phase,
    pub(super) generation: u64,
    pub(super) started_at: Option<u64>,
    pub(super) shutdown_told: bool,
    pub(super) paused: bool,
    pub(super) detached: bool,
    pub(super) upkeep: Upkeep,
    /// What its definition says now, if there is one.
    pub(super) kept: Option<Kept>,
    /// The definition is another than the one that it was started from.
    pub(super) redefined: bool,
    pub(super) crashes: Crashes,
    pub(super) descriptor: Option<GuestDescriptor>,
    pub(super) stop: Option<StopReport>,
    pub(super) ended_as: u64,
    pub(super) component_pid: u32,
    pub(super) layers: Vec<LayerInfo>,
    pub(super) failures: Vec<(String, String)>,
}

impl Entry {
    /// A name that was just taken.
    pub(super) fn new(id: GuestId, name: Rc<str>, origin: Origin) -> Self {
        Self {
            id,
            name,
            origin,
            phase: Phase::NotStarted,
            generation: 0,
            started_at: None,
            shutdown_told: false,
            paused: false,
            detached: false,
            upkeep: Upkeep::default(),
            kept: None,
            redefined: false,
            crashes: Crashes::default(),
            descriptor: None,
            stop: None,
            ended_as: 0,
            component_pid: 0,
            layers: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Whether it has ended, and is only remembered, or is only defined.
    pub(super) fn remembered(&self) -> bool {
        self.phase == Phase::Defined || (self.origin != Origin::Lifecycle && self.phase.ended())
    }

    /// Its next generation.
    pub(super) fn begin(&mut self) -> u64 {
        self.phase = Phase::Creating;
        // What it goes on from may have been read from the disk.
        self.generation = self.generation.saturating_add(1);
        self.started_at = None;
        self.shutdown_told = false;
        self.paused = false;
        self.failures.clear();
        self.generation
    }

    /// How a generation ended, which is remembered if it failed. An uptime of 0 is measured.
    pub(super) fn end(&mut self, mut ending: Ending, uptime_ns: u64, now: Moment) -> StopReport {
        let trace = ending.trace.take();
        let measured = self
            .started_at
            .map_or(0, |start| now.monotonic_ns.saturating_sub(start));
        let report = ending.report(if uptime_ns == 0 { measured } else { uptime_ns }, now);
        if let Some(trace) = trace {
            self.crashes.add(&report, self.generation, *trace);
        }
        report
    }

    /// Nanoseconds since its vCPUs started, if they did and have not ended.
    fn uptime_ns(&self, now: Moment) -> Option<u64> {
        let runs = matches!(self.phase, Phase::Running | Phase::Stopping);
        self.started_at
            .filter(|_| runs)
            .map(|start| now.monotonic_ns.saturating_sub(start))
    }

    pub(super) fn vitals(&self, now: Moment) -> Vitals {
        let last = self.stop.as_ref().filter(|_| self.phase.ended());
        Vitals {
            generation: self.generation,
            uptime_ns: self
                .uptime_ns(now)
                .unwrap_or_else(|| last.map_or(0, |stop| stop.uptime_ns)),
            component_pid: self.component_pid,
        }
    }

    /// What it is made of, and how it is kept: as it runs, or as it would be started from its definition.
    fn made_of(&self) -> (Option<GuestDescriptor>, Upkeep) {
        let mut upkeep = self.upkeep.clone();
        let next = self.kept.as_ref().filter(|_| upkeep.defined && self.remembered());
        let Some(next) = next else {
            return (self.descriptor.clone(), upkeep);
        };
        (upkeep.durable, upkeep.restart) = (next.durable, next.restart);
        let descriptor = match (&self.descriptor, self.redefined) {
            (Some(last), false) => Some(last.clone()),
            _ => next.descriptor.clone(),
        };
        (descriptor, upkeep)
    }

    pub(super) fn info(&self, now: Moment) -> GuestInfo {
        let (descriptor, upkeep) = self.made_of();
        GuestInfo {
            name: self.name.to_string(),
            status: self.phase.status(),
            generation: self.generation,
            uptime_ns: self.uptime_ns(now).unwrap_or(0),
            descriptor,
            stop: self.stop.clone(),
            problems: Vec::new(),
            layers: self.layers.clone(),
            component_pid: self.component_pid,
            paused: self.paused,
            detached: self.detached,
            upkeep,
        }
    }
}

/// The refusal of a name that somebody has.
pub(super) fn taken(entry: &Entry) -> Error {
    let what = match entry.phase {
        Phase::Defined => "is defined",
        Phase::NotStarted | Phase::Stopped | Phase::Died | Phase::GivenUp => "is held by the client that drives it",
        Phase::Creating | Phase::Created | Phase::Launching => "is starting",
        Phase::Running => "is running",
        Phase::Restarting => "is restarting",
        Phase::Stopping => "is stopping",
        Phase::Unreached => "goes on with a keeper that does not answer",
    };
    Error::new(Kind::AlreadyRunning, format!("guest \"{}\" {what}", entry.name)).about("name")
}
