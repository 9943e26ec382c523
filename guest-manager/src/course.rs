//! From one run of a guest to the next, or to its end: carries out what was decided about it (`outcome`, `restart`, `pace`).
//!
//! ```text
//!   prepare --> (run) --> decide --> follow --> go_on: wait, begin again --> (run) ...
//!      |                                '-----> end
//!      '-- of a guest that somebody insists on: again, by its restart policy
//! ```
//!
//! What was decided is on record before the component's process is gone, and stays there until the next run begins: a manager that follows in the middle goes on
//! from there (`Over`), and waits no longer than was left to wait.

use std::{
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::future::{Either, select};
use sepal_schema::{
    config::GuestConfig,
    report::{Rung, reason_name},
};

use crate::{
    client::Client,
    definitions,
    guest::{Again, Guest, StopCause},
    model::{Ending, Trace},
    outcome::{Next, Outcome, Rules, Run},
    pace::Pace,
    resources::{self, Resources},
    restart::{Row, Verdict},
};

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct End {
    pub(crate) ending: Ending,
    /// As the component told, or as it was measured; 0 if it never ran.
    pub(crate) uptime_ns: u64,
}

/// What follows a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Follow {
    /// Paused before its first instruction.
    pub(crate) hold: bool,
    /// Not before.
    pub(crate) begins: Instant,
    pub(crate) by_itself: bool,
}

/// A run that is over.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Over {
    pub(crate) end: End,
    pub(crate) follows: Option<Follow>,
}

/// The runs of a guest, one after the other.
pub(crate) struct Course {
    guest: Rc<Guest>,
    rules: Rules,
    pace: Pace,
    row: Row,
    /// It has run, in some generation.
    ran: bool,
}

impl Course {
    /// Before the first run that this manager sees.
    pub(crate) fn new(guest: Rc<Guest>, config: &GuestConfig) -> Self {
        let (counted, short_runs) = guest.counted();
        Self {
            rules: Rules {
                on_reset: config.on_reset,
                restart: config.restart.policy,
            },
            pace: Pace::new(guest.manager.settings.restart_wait, short_runs),
            row: Row::new(config.restart, counted),
            ran: guest.has_started(),
            guest,
        }
    }

    /// Of a guest that an earlier manager has left. Nobody waits any more to hear what keeps it from running.
    pub(crate) fn resumed(guest: Rc<Guest>, config: &GuestConfig) -> Self {
        Self {
            ran: true,
            ..Self::new(guest, config)
        }
    }

    /// Gets what the guest needs from the host, if need be again and again.
    ///
    /// # Errors
    /// How it ended without.
    pub(crate) async fn prepare(&mut self, config: GuestConfig, client: &Client) -> Result<Resources, End> {
        let guest = self.guest.clone();
        let mut config = Some(config);
        loop {
            let Some(this) = config.take() else {
                return Err(self.stopped());
            };
            if guest.insists() {
                // Without a descriptor left there is only this one try.
                config = this.try_clone().ok();
            }
            let prepared = resources::prepare(&guest, this, client);
            let outcome = match select(pin!(prepared), pin!(guest.stop_wanted())).await {
                Either::Left((Ok(resources), _)) => return Ok(resources),
                Either::Left((Err(error), _)) => Outcome::NotCreated(error),
                Either::Right(_) => Outcome::NotRun,
            };
            let mut over = self.decide(outcome, Rung::None);
            if over.end.ending.failed_run() {
                over.end.ending.trace = Some(Box::new(Trace::new(&[], Vec::new(), &[])));
            }
            if config.is_none() || !self.follow(&over) {
                return Err(over.end);
            }
            self.go_on(over).await?;
        }
    }

    /// What a run that ended so is followed by. `made` is what was done to make it end.
    pub(crate) fn decide(&mut self, outcome: Outcome, made: Rung) -> Over {
        let (stop, again) = (self.guest.stop_cause(), self.guest.again_cause());
        let run = self.run(stop.as_ref(), again.as_ref(), made);
        let next = outcome.next(run, self.rules);
        let (ending, uptime_ns) = outcome.ending(run);
        self.ran |= run.started;
        let measured = if uptime_ns == 0 {
            self.guest.uptime_ns()
        } else {
            uptime_ns
        };
        let (uptime, now) = (Duration::from_nanos(measured), Instant::now());
        // What a client may ask for is far below what the clock can count.
        let begins = |wait| now.checked_add(wait).unwrap_or(now);
        let (ending, follows) = match next {
            Next::End => (ending, None),
            Next::Again { hold, paced } => {
                let wait = match paced {
                    true => self.pace.after(uptime),
                    false => Duration::ZERO,
                };
                match paced {
                    true => self.row.lasted(uptime),
                    false => self.row.start_over(),
                }
                let follow = Follow {
                    hold,
                    begins: begins(wait),
                    by_itself: paced,
                };
                (ending, Some(follow))
            }
            Next::Policy(how) => match self.row.after(how, uptime) {
                Verdict::End => (ending, None),
                Verdict::GiveUp(failures) => (ending.given_up(failures), None),
                Verdict::Again(wait) => {
                    let follow = Follow {
                        hold: false,
                        begins: begins(wait),
                        by_itself: true,
                    };
                    (ending, Some(follow))
                }
            },
        };
        self.guest.count(&self.row, &self.pace);
        let end = End {
            ending,
            uptime_ns: measured,
        };
        Over { end, follows }
    }

    /// The run gives way to the next one, if one follows; false if none does after all.
    pub(crate) fn follow(&mut self, over: &Over) -> bool {
        let Some(follow) = over.follows else { return false };
        let End { ending, uptime_ns } = &over.end;
        let Some(report) = self.guest.set_restarting(ending.clone(), *uptime_ns) else {
            return false;
        };
        definitions::keep_crashes(&self.guest);
        if follow.by_itself {
            self.row.begun_again();
            self.guest.count(&self.row, &self.pace);
            self.guest.save();
        }
        let (reason, detail) = (reason_name(report.reason), &report.detail);
        let guest = &*self.guest.name;
        match follow.begins.saturating_duration_since(Instant::now()).as_millis() {
            0 => tracing::info!(guest, reason, "begins again: {detail}"),
            wait => tracing::info!(guest, reason, "begins again in {wait} ms: {detail}"),
        }
        true
    }

    /// Waits as long as the run before asks for, and begins the next one.
    ///
    /// # Errors
    /// It was stopped meanwhile.
    pub(crate) async fn go_on(&mut self, over: Over) -> Result<(), End> {
        let guest = self.guest.clone();
        let Some(Follow { hold, begins, .. }) = over.follows else {
            return Err(over.end);
        };
        let wait = begins.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            // Unless somebody stops or resets it.
            let (stopped, wanted) = (pin!(guest.stop_wanted()), pin!(guest.run_wanted()));
            // Whichever comes first.
            let _ = guest.manager.handle.timeout(wait, select(stopped, wanted)).await;
        }
        if !guest.begin_again(hold) {
            return Err(self.stopped());
        }
        tracing::info!(guest = &*guest.name, generation = guest.generation(), "creating");
        Ok(())
    }

    /// The end of a guest that was stopped while it did not run.
    fn stopped(&self) -> End {
        let stop = self.guest.stop_cause();
        let (ending, uptime_ns) = Outcome::NotRun.ending(self.run(stop.as_ref(), None, Rung::None));
        End { ending, uptime_ns }
    }

    fn run<'a>(&self, stop: Option<&'a StopCause>, again: Option<&'a Again>, made: Rung) -> Run<'a> {
        let guest = &self.guest;
        let started = guest.has_started();
        Run {
            stop,
            again,
            started,
            fresh: !(started || self.ran || guest.insists()),
            asked: guest.was_asked(),
            made,
        }
    }

    /// Says that it is over, of a guest that was stopped while this manager had nothing of it yet.
    pub(crate) fn end_stopped(self) {
        let end = self.stopped();
        self.end(end);
    }

    /// Says that it is over.
    pub(crate) fn end(self, End { ending, uptime_ns }: End) {
        let guest = self.guest;
        guest.close_ports();
        let report = guest.set_ended(ending, uptime_ns);
        definitions::keep_crashes(&guest);
        let (reason, detail) = (reason_name(report.reason), &report.detail);
        let generation = guest.generation();
        tracing::info!(guest = &*guest.name, generation, reason, "ended: {detail}");
    }
}
