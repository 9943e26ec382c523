//! The life of a virtual machine as its handle's users see it, without effects.
//!
//! ```text
//!              start                started
//!   stopped ----------> starting ----------> running
//!    ^ ^ ^                 |  |                |  |
//!    | | +---ended---------+  +-stop-+  +-stop-+  |
//!    | |                             v  v         |
//!    | +---ended------------------ stopping       |
//!    +-----ended----------------------------------+
//!
//!   lost: whatever the state, stopped for good
//! ```
//!
//! Runs are counted from 1: run n has started when `started_run` has reached n, and is over when `ended_runs` has. So whoever waits for a run does not
//! mistake the next one for it, however late it looks.

use crate::reason::StopReason;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Stopped,
    Starting,
    Running,
    Stopping,
}

/// What a stop has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Nothing: it does not run.
    NotRunning,
    /// Ask for the end of this run, and wait for it.
    Ask(u64),
    /// Wait for the end of this run: another has asked.
    Wait(u64),
}

/// Why it cannot be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoStart {
    #[error("it is running")]
    Running,
    #[error("its service has ended")]
    Lost,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Life {
    phase: Phase,
    runs: u64,
    started_run: u64,
    ended_runs: u64,
    last: Option<StopReason>,
    lost: bool,
}

impl Life {
    /// It has not been started yet.
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Stopped,
            runs: 0,
            started_run: 0,
            ended_runs: 0,
            last: None,
            lost: false,
        }
    }

    /// Begins a start; returns the run's number.
    pub(crate) fn start(&mut self) -> Result<u64, NoStart> {
        if self.lost {
            return Err(NoStart::Lost);
        }
        if self.phase != Phase::Stopped {
            return Err(NoStart::Running);
        }
        self.phase = Phase::Starting;
        self.runs += 1;
        Ok(self.runs)
    }

    /// Its processors run.
    pub(crate) fn started(&mut self) {
        self.started_run = self.runs;
        if self.phase == Phase::Starting {
            self.phase = Phase::Running;
        }
    }

    /// Begins a stop.
    pub(crate) fn stop(&mut self) -> Stop {
        match self.phase {
            Phase::Stopped => Stop::NotRunning,
            Phase::Stopping => Stop::Wait(self.runs),
            Phase::Starting | Phase::Running => {
                self.phase = Phase::Stopping;
                Stop::Ask(self.runs)
            }
        }
    }

    /// The run is over.
    pub(crate) fn ended(&mut self, reason: StopReason) {
        if self.phase != Phase::Stopped {
            self.phase = Phase::Stopped;
            self.ended_runs = self.runs;
            self.last = Some(reason);
        }
    }

    /// The service has ended. A run that had not started by then never was: whether it was asked for just before that or just after makes no difference.
    pub(crate) fn lost(&mut self) {
        self.lost = true;
        let reason = match (self.phase, self.last) {
            (Phase::Starting, Some(before)) => before,
            _ => StopReason::ServiceDied,
        };
        self.ended(reason);
        self.last.get_or_insert(StopReason::ServiceDied);
    }

    /// Whether a run has started, if that is certain already.
    pub(crate) fn has_started(&self, run: u64) -> Option<bool> {
        match (self.started_run >= run, self.ended_runs >= run) {
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        }
    }

    /// Whether a run that was to be stopped has been, if it is over: not if it ended because its service did.
    pub(crate) fn was_stopped(&self, run: u64) -> Option<bool> {
        let of_itself = self.ended_runs > run || self.last != Some(StopReason::ServiceDied);
        (self.ended_runs >= run).then_some(of_itself)
    }

    /// How many runs are over.
    pub(crate) fn ended_runs(&self) -> u64 {
        self.ended_runs
    }

    /// Why it stopped, for who has waited since `ended_runs` was this; none if it has not.
    pub(crate) fn stopped(&self, since: u64) -> Option<StopReason> {
        self.last
            .filter(|_| self.phase == Phase::Stopped || self.ended_runs > since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_stops_and_starts_again() {
        let mut life = Life::new();
        assert_eq!((life.stop(), life.stopped(0)), (Stop::NotRunning, None));
        assert_eq!(life.start(), Ok(1));
        assert_eq!((life.start(), life.has_started(1)), (Err(NoStart::Running), None));
        life.started();
        assert_eq!((life.has_started(1), life.stopped(0)), (Some(true), None));
        assert_eq!((life.stop(), life.stop()), (Stop::Ask(1), Stop::Wait(1)));
        assert_eq!((life.was_stopped(1), life.start()), (None, Err(NoStart::Running)));
        life.ended(StopReason::Killed);
        assert_eq!(
            (life.was_stopped(1), life.stopped(0)),
            (Some(true), Some(StopReason::Killed))
        );
        assert_eq!((life.start(), life.stopped(1)), (Ok(2), None));
        // Who began to wait before the first end is told of it all the same.
        assert_eq!(life.stopped(0), Some(StopReason::Killed));
    }

    #[test]
    fn a_run_that_ends_before_anybody_looks_has_started() {
        let mut life = Life::new();
        assert_eq!(life.start(), Ok(1));
        life.started();
        life.ended(StopReason::Shutdown);
        assert_eq!((life.has_started(1), life.stop()), (Some(true), Stop::NotRunning));
    }

    #[test]
    fn one_that_did_not_start_says_so() {
        let mut life = Life::new();
        assert_eq!(life.start(), Ok(1));
        life.ended(StopReason::StartFailed);
        assert_eq!(
            (life.has_started(1), life.stopped(1)),
            (Some(false), Some(StopReason::StartFailed))
        );
        assert_eq!(life.start(), Ok(2));
    }

    #[test]
    fn one_that_is_stopped_while_it_starts_stays_stopping() {
        let mut life = Life::new();
        assert_eq!((life.start(), life.stop()), (Ok(1), Stop::Ask(1)));
        life.started();
        assert_eq!(life.stop(), Stop::Wait(1));
    }

    #[test]
    fn who_stops_it_is_not_told_of_a_service_that_ends_afterwards() {
        for (first, stopped) in [(Some(StopReason::Killed), true), (None, false)] {
            let mut life = Life::new();
            assert_eq!((life.start(), life.stop()), (Ok(1), Stop::Ask(1)));
            if let Some(reason) = first {
                life.ended(reason);
            }
            life.lost();
            assert_eq!(life.was_stopped(1), Some(stopped));
        }
    }

    #[test]
    fn without_its_service_it_is_stopped_for_good() {
        let mut never = Life::new();
        never.lost();
        assert_eq!(never.stopped(0), Some(StopReason::ServiceDied));
        assert_eq!((never.start(), never.stop()), (Err(NoStart::Lost), Stop::NotRunning));

        let mut running = Life::new();
        assert_eq!(running.start(), Ok(1));
        running.lost();
        assert_eq!(
            (running.has_started(1), running.stopped(0)),
            (Some(false), Some(StopReason::ServiceDied))
        );

        let mut ended = Life::new();
        assert_eq!(ended.start(), Ok(1));
        ended.ended(StopReason::Shutdown);
        ended.lost();
        assert_eq!(ended.stopped(1), Some(StopReason::Shutdown));

        let mut again = Life::new();
        assert_eq!(again.start(), Ok(1));
        again.started();
        again.ended(StopReason::Shutdown);
        assert_eq!(again.start(), Ok(2));
        again.lost();
        assert_eq!(
            (again.has_started(2), again.stopped(1)),
            (Some(false), Some(StopReason::Shutdown))
        );
    }
}
