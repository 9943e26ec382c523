//! Where a guest is, as those who wait for it see it.

use sepal_schema::{error::Error, info::GuestInfo, report::StopReport};

use super::{Again, StopCause};

/// What became of a guest.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) report: StopReport,
    pub(super) info: Option<GuestInfo>,
}

/// A generation.
#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) generation: u64,
    pub(super) created: bool,
    /// Its vCPUs are to be started.
    pub(super) wanted: bool,
    /// Once created, it waits paused before its first instruction.
    pub(super) held: bool,
    pub(super) started: bool,
    /// It was asked to shut down.
    pub(super) asked: bool,
    /// It has ended, and another is to follow.
    pub(super) over: bool,
    pub(super) again_wanted: Option<Again>,
}

/// The whole guest.
#[derive(Debug, Default)]
pub(super) struct State {
    /// What became of the first creation.
    pub(super) created: Option<Result<(), Error>>,
    pub(super) run: Run,
    pub(super) stop_wanted: Option<StopCause>,
    pub(super) ended: Option<Ended>,
}
