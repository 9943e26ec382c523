//! What came of a run, and what follows it: decisions without effects.
//!
//! ```text
//!   outcome + what was wanted --> how it ended (Ending)
//!                             '-> what follows (Next): the end
//!                                                      the next run: at once, or paced, or paused before its first instruction
//!                                                      what the restart policy says (`restart`)
//! ```

use sepal_schema::{
    config::{OnReset, RestartPolicy},
    error::{Error, Kind},
    report::{Reason, Rung, StopReport},
};

use crate::{
    component::Exit,
    guest::{Again, StopCause},
    model::{Ending, bounded_error, bounded_report},
    restart::How,
};

/// What came of the conversation with the component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It never came to a component, or the component could not make the machine.
    NotCreated(Error),
    /// It was stopped before it ran.
    NotRun,
    /// `run` returned.
    Ran(Result<StopReport, Error>),
    /// The component's process ended.
    Exited {
        exit: Exit,
        last_line: Option<String>,
        /// Why we had killed it without anybody asking, if we had.
        broken: Option<String>,
    },
}

/// What is known about a run besides its outcome.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run<'a> {
    /// Why it was to be stopped, if it was.
    pub(crate) stop: Option<&'a StopCause>,
    /// Why it was to begin again, if it was.
    pub(crate) again: Option<&'a Again>,
    /// Its vCPUs ran.
    pub(crate) started: bool,
    /// It never ran yet, in no generation: whoever began it is told what is wrong, and can do something about it.
    pub(crate) fresh: bool,
    /// It was asked to shut down.
    pub(crate) asked: bool,
    /// What was done to make it end: `None`, `Forced` or `Killed`.
    pub(crate) made: Rung,
}

/// What the configuration says about the end of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// When the guest has reset itself.
    pub(crate) on_reset: OnReset,
    /// When it has ended otherwise.
    pub(crate) restart: RestartPolicy,
}

/// What follows a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing.
    End,
    /// The guest begins again.
    Again {
        /// Paused before its first instruction.
        hold: bool,
        /// It does so by itself, which must not happen too often.
        paced: bool,
    },
    /// What the restart policy says.
    Policy(How),
}

impl Outcome {
    /// How the run ended, and its uptime as far as the component told (else 0).
    pub(crate) fn ending(self, run: Run<'_>) -> (Ending, u64) {
        let halted = |error: &Error| matches!(error.kind, Kind::ControllerForcedHalt | Kind::Cancelled);
        let wanted = run.stop.map(StopCause::ending).or_else(|| run.again.map(Again::ending));
        let forced = match run.made {
            Rung::Killed => Rung::Killed,
            _ => Rung::Forced,
        };
        let ending = match (self, wanted) {
            // That it resets itself after a panic is how Linux can be told to react to one, and hides nothing.
            (Self::Ran(Ok(report)), Some(wanted)) if wanted.reason == Reason::Crash => {
                return (wanted.by(run.made), report.uptime_ns);
            }
            (Self::Ran(Ok(report)), _) => {
                let report = bounded_report(report);
                let rung = match report.reason {
                    Reason::Shutdown if run.asked => Rung::Asked,
                    _ => Rung::None,
                };
                let ending = Ending {
                    error: report.error,
                    about: report.about,
                    rung,
                    ..Ending::new(report.reason, report.detail)
                };
                return (ending, report.uptime_ns);
            }
            (Self::NotCreated(error) | Self::Ran(Err(error)), Some(wanted)) if halted(&error) => wanted.by(forced),
            (Self::NotRun | Self::Exited { broken: None, .. }, Some(wanted)) => wanted.by(forced),
            (Self::NotRun, None) => Ending::new(Reason::Killed, "it was stopped before it ran").by(Rung::Forced),
            (Self::NotCreated(error), _) => Ending::failed(Reason::StartFailed, bounded_error(error)),
            (Self::Ran(Err(error)), _) => {
                let error = bounded_error(error);
                let (reason, rung) = match error.kind {
                    Kind::VcpuRuntimeFailure => (Reason::Crash, Rung::None),
                    // Its watchdog, for one.
                    Kind::ControllerForcedHalt => (Reason::Killed, Rung::Forced),
                    _ if run.started => (Reason::Crash, Rung::None),
                    _ => (Reason::StartFailed, Rung::None),
                };
                Ending {
                    about: part(&error.about),
                    rung,
                    ..Ending::failed(reason, error)
                }
            }
            (
                Self::Exited {
                    exit,
                    last_line,
                    broken,
                },
                _,
            ) => {
                // Of one that had to be killed that says nothing.
                let component = exit.component_end().filter(|_| broken.is_none());
                let mut words = match broken {
                    Some(broken) => format!("the component broke off its connection ({broken}) and was killed"),
                    None => format!("the component's process ended: {exit}"),
                };
                if let Some(line) = last_line {
                    words = format!("{words}; its last words: {line}");
                }
                let error = bounded_error(Error::new(Kind::VmmTerminated, words));
                Ending {
                    component,
                    ..Ending::failed(Reason::VmmTerminated, error)
                }
            }
        };
        (ending, 0)
    }

    /// What follows the run. A stop wins over everything. What `onReset` and `onPanic` begin again does so, and where there is a restart policy a panic
    /// counts as a failure. A guest that was asked to turn itself off, and did, stays off.
    pub(crate) fn next(&self, run: Run<'_>, rules: Rules) -> Next {
        let by_itself = |hold| Next::Again { hold, paced: true };
        let done = match run.asked {
            true => Next::End,
            false => Next::Policy(How::Done),
        };
        match (self, run.again) {
            _ if run.stop.is_some() => Next::End,
            (Self::NotRun, _) => Next::End,
            // It does not get better by trying again, or somebody waits to hear of it.
            (Self::NotCreated(_) | Self::Ran(Err(_)) | Self::Exited { .. }, None) if run.fresh => Next::End,
            (Self::NotCreated(_), _) => Next::Policy(How::Failed),
            (Self::Ran(Ok(report)), again) if !matches!(again, Some(Again::Panicked)) => {
                match (report.reason, again, rules.on_reset) {
                    (Reason::Reset, Some(_), _) => Next::Again {
                        hold: false,
                        paced: false,
                    },
                    (Reason::Reset, None, OnReset::Restart) => by_itself(false),
                    (Reason::Reset, None, OnReset::Pause) => by_itself(true),
                    (Reason::Shutdown | Reason::Reset, ..) => done,
                    (Reason::Crash, ..) => Next::Policy(How::Failed),
                    _ => Next::End,
                }
            }
            (_, Some(Again::Asked)) => Next::Again {
                hold: false,
                paced: false,
            },
            (_, Some(Again::Panicked)) => match rules.restart {
                RestartPolicy::Never => by_itself(false),
                RestartPolicy::OnFailure | RestartPolicy::Always => Next::Policy(How::Failed),
            },
            // Its watchdog stopped it.
            (Self::Ran(Err(error)), None) if error.kind == Kind::ControllerForcedHalt => Next::End,
            (Self::Ran(_) | Self::Exited { .. }, None) => Next::Policy(How::Failed),
        }
    }
}

/// The name of what an error is about as reports have it: "vcpu1".
fn part(about: &str) -> String {
    about.to_lowercase().replace(' ', "")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sepal_schema::report::ComponentEnd;

    use super::*;

    fn run(stop: Option<&StopCause>, started: bool) -> Run<'_> {
        Run {
            stop,
            again: None,
            started,
            fresh: false,
            asked: false,
            made: Rung::None,
        }
    }

    fn error(kind: Kind) -> Error {
        Error::new(kind, "it went wrong")
    }

    fn reason(outcome: Outcome, cause: Option<&StopCause>, started: bool) -> Reason {
        outcome.ending(run(cause, started)).0.reason
    }

    #[test]
    fn a_guest_that_ends_by_itself_ends_so_whatever_was_wanted() {
        let report = StopReport {
            reason: Reason::Shutdown,
            detail: "ACPI".into(),
            error: None,
            uptime_ns: 5,
            time_ns: 0,
            about: String::new(),
            rung: Rung::None,
            component: None,
        };
        let cause = StopCause::Killed("by hand".into());
        for cause in [None, Some(&cause)] {
            let (ending, uptime) = Outcome::Ran(Ok(report.clone())).ending(run(cause, true));
            assert_eq!((ending.reason, ending.error, uptime), (Reason::Shutdown, None, 5));
        }
    }

    #[test]
    fn what_was_stopped_by_force_says_why() {
        let killed = StopCause::Killed("its lease was dropped".into());
        let hangup = StopCause::Hangup(Duration::from_millis(50));
        let exited = || Outcome::Exited {
            exit: Exit::Signal(9),
            last_line: None,
            broken: None,
        };
        let outcomes = [
            Outcome::NotRun,
            Outcome::NotCreated(error(Kind::Cancelled)),
            Outcome::Ran(Err(error(Kind::ControllerForcedHalt))),
            exited(),
        ];
        for outcome in outcomes {
            let (ending, _) = outcome.clone().ending(run(Some(&killed), true));
            assert_eq!(
                (ending.reason, &ending.detail[..]),
                (Reason::Killed, "its lease was dropped")
            );
            assert_eq!(ending.error.unwrap().kind, Kind::ControllerForcedHalt);
            assert_eq!(reason(outcome, Some(&hangup), true), Reason::Hangup);
        }
    }

    #[test]
    fn a_component_that_dies_says_how() {
        let last_line = Some("out of luck".to_owned());
        let exited = Outcome::Exited {
            exit: Exit::Signal(11),
            last_line,
            broken: None,
        };
        let (ending, _) = exited.ending(run(None, true));
        assert_eq!(ending.reason, Reason::VmmTerminated);
        assert!(
            ending.detail.contains("SIGSEGV") && ending.detail.contains("out of luck"),
            "{}",
            ending.detail
        );
        assert_eq!(ending.component, Some(ComponentEnd::Killed(11)));
        assert_eq!(ending.error.unwrap().kind, Kind::VmmTerminated);
        let broken = Outcome::Exited {
            exit: Exit::Signal(9),
            last_line: None,
            broken: Some("protocol".into()),
        };
        let (ending, _) = broken.ending(run(None, true));
        assert!(ending.detail.contains("protocol"), "{}", ending.detail);
        // That it was killed was nobody's wish, nor its own doing.
        assert_eq!(ending.component, None);
    }

    #[test]
    fn failures_before_and_after_the_start_are_told_apart() {
        assert_eq!(
            reason(Outcome::NotCreated(error(Kind::KernelLoadFailure)), None, false),
            Reason::StartFailed
        );
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::VcpuStartFailure))), None, false),
            Reason::StartFailed
        );
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::VcpuRuntimeFailure))), None, false),
            Reason::Crash
        );
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::InternalError))), None, true),
            Reason::Crash
        );
        // A stop that comes together with another failure does not hide it.
        let cause = StopCause::Killed("by hand".into());
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::VcpuRuntimeFailure))), Some(&cause), true),
            Reason::Crash
        );
    }

    fn report(reason: Reason) -> Outcome {
        Outcome::Ran(Ok(StopReport {
            reason,
            detail: "by itself".into(),
            error: None,
            uptime_ns: 5,
            time_ns: 0,
            about: String::new(),
            rung: Rung::None,
            component: None,
        }))
    }

    fn outcomes() -> Vec<Outcome> {
        vec![
            Outcome::NotCreated(error(Kind::NoResources)),
            Outcome::NotRun,
            report(Reason::Shutdown),
            report(Reason::Reset),
            Outcome::Ran(Err(error(Kind::ControllerForcedHalt))),
            Outcome::Ran(Err(error(Kind::VcpuRuntimeFailure))),
            Outcome::Exited {
                exit: Exit::Signal(9),
                last_line: None,
                broken: None,
            },
        ]
    }

    const POLICIES: [RestartPolicy; 3] = [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always];

    #[test]
    fn what_on_reset_on_panic_and_people_say_comes_before_the_restart_policy() {
        let stop = StopCause::Killed("by hand".into());
        let (failed, done) = (Next::Policy(How::Failed), Next::Policy(How::Done));
        let again = |hold, paced| Next::Again { hold, paced };
        for (outcome, restart) in outcomes().into_iter().flat_map(|o| POLICIES.map(|p| (o.clone(), p))) {
            for on_reset in [OnReset::Stop, OnReset::Restart, OnReset::Pause] {
                let rules = Rules { on_reset, restart };
                for cause in [None, Some(Again::Asked), Some(Again::Panicked)] {
                    let run = Run {
                        again: cause.as_ref(),
                        ..run(None, true)
                    };
                    let resets = outcome == report(Reason::Reset);
                    let shut_down = outcome == report(Reason::Shutdown);
                    let watchdog = outcome == Outcome::Ran(Err(error(Kind::ControllerForcedHalt)));
                    let expected = match (&outcome, cause) {
                        (Outcome::NotRun, _) => Next::End,
                        (Outcome::NotCreated(_), _) => failed,
                        (_, Some(Again::Panicked)) if restart == RestartPolicy::Never => again(false, true),
                        (_, Some(Again::Panicked)) => failed,
                        (_, Some(Again::Asked)) if !shut_down => again(false, false),
                        _ if resets && on_reset != OnReset::Stop => again(on_reset == OnReset::Pause, true),
                        _ if resets || shut_down => done,
                        _ if watchdog => Next::End,
                        _ => failed,
                    };
                    assert_eq!(outcome.next(run, rules), expected, "{outcome:?} {cause:?} {rules:?}");
                    let stopped = Run {
                        stop: Some(&stop),
                        ..run
                    };
                    assert_eq!(outcome.next(stopped, rules), Next::End);
                }
            }
        }
    }

    #[test]
    fn who_begins_a_guest_that_never_runs_is_told_and_nothing_is_tried_again() {
        for (outcome, restart) in outcomes().into_iter().flat_map(|o| POLICIES.map(|p| (o.clone(), p))) {
            let rules = Rules {
                on_reset: OnReset::Stop,
                restart,
            };
            let fresh = Run {
                fresh: true,
                ..run(None, false)
            };
            let ended_by_itself = matches!(outcome, Outcome::Ran(Ok(_)));
            assert_eq!(outcome.next(fresh, rules) == Next::End, !ended_by_itself, "{outcome:?}");
        }
    }

    #[test]
    fn a_guest_that_was_asked_to_turn_itself_off_stays_off() {
        let asked = Run {
            asked: true,
            ..run(None, true)
        };
        for restart in POLICIES {
            let rules = Rules {
                on_reset: OnReset::Stop,
                restart,
            };
            assert_eq!(report(Reason::Shutdown).next(asked, rules), Next::End);
            let crashed = Outcome::Ran(Err(error(Kind::VcpuRuntimeFailure)));
            assert_eq!(crashed.next(asked, rules), Next::Policy(How::Failed));
        }
    }

    #[test]
    fn the_rung_is_what_was_done_and_worked() {
        let stop = StopCause::Killed("by hand".into());
        let rung = |outcome: Outcome, run: Run<'_>| outcome.ending(run).0.rung;
        let halted = || Outcome::Ran(Err(error(Kind::ControllerForcedHalt)));
        let asked = Run {
            asked: true,
            ..run(None, true)
        };
        assert_eq!(rung(report(Reason::Shutdown), asked), Rung::Asked);
        assert_eq!(rung(report(Reason::Reset), asked), Rung::None);
        assert_eq!(rung(report(Reason::Shutdown), run(None, true)), Rung::None);
        for made in [Rung::None, Rung::Forced, Rung::Killed] {
            let forced = Run {
                made,
                ..run(Some(&stop), true)
            };
            let expected = if made == Rung::Killed {
                Rung::Killed
            } else {
                Rung::Forced
            };
            assert_eq!(rung(halted(), forced), expected);
        }
        let watchdog = Outcome::Ran(Err(error(Kind::ControllerForcedHalt).about("watchdog")));
        let (ending, _) = watchdog.ending(run(None, true));
        assert_eq!((&ending.about[..], ending.rung), ("watchdog", Rung::Forced));
    }

    #[test]
    fn a_panic_is_the_reason_also_of_a_guest_that_resets_itself_then() {
        let stop = StopCause::Panicked;
        let (ending, uptime_ns) = report(Reason::Reset).ending(run(Some(&stop), true));
        assert_eq!((ending.reason, ending.rung, uptime_ns), (Reason::Crash, Rung::None, 5));
    }
}
