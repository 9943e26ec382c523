//! What came of a run, and what follows it: decisions without effects.
//!
//! ```text
//!   outcome + what was wanted --> how it ended (Ending)
//!                             '-> what follows (Next): the end
//!                                                      the next run: at once, or paced, or paused before its first instruction
//! ```

use sepal_schema::{
    config::OnReset,
    error::{Error, Kind},
    report::{Reason, Rung, StopReport},
};

use crate::{
    component::Exit,
    guest::{Again, StopCause},
    model::{Ending, bounded_error, bounded_report},
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
    /// It was asked to shut down.
    pub(crate) asked: bool,
    /// What was done to make it end: `None`, `Forced` or `Killed`.
    pub(crate) made: Rung,
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

    /// What follows the run. A stop wins over everything; what could not be made does not get better by trying again; a guest that has turned
    /// itself off stays off.
    pub(crate) fn next(&self, run: Run<'_>, on_reset: OnReset) -> Next {
        let by_itself = |hold| Next::Again { hold, paced: true };
        match (self, run.again) {
            _ if run.stop.is_some() => Next::End,
            (Self::NotCreated(_) | Self::NotRun, _) => Next::End,
            (Self::Ran(Ok(report)), again) if !matches!(again, Some(Again::Panicked)) => {
                match (report.reason, again, on_reset) {
                    (Reason::Reset, Some(_), _) => Next::Again {
                        hold: false,
                        paced: false,
                    },
                    (Reason::Reset, None, OnReset::Restart) => by_itself(false),
                    (Reason::Reset, None, OnReset::Pause) => by_itself(true),
                    _ => Next::End,
                }
            }
            (_, Some(Again::Asked)) => Next::Again {
                hold: false,
                paced: false,
            },
            (_, Some(Again::Panicked)) => by_itself(false),
            (_, None) => Next::End,
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

    #[test]
    fn only_a_reset_or_somebody_who_wants_it_begins_a_guest_again() {
        let policies = [OnReset::Stop, OnReset::Restart, OnReset::Pause];
        let causes = [None, Some(Again::Asked), Some(Again::Panicked)];
        let stop = StopCause::Killed("by hand".into());
        for (outcome, on_reset) in outcomes().into_iter().flat_map(|o| policies.map(|p| (o.clone(), p))) {
            for again in &causes {
                let run = Run {
                    again: again.as_ref(),
                    ..run(None, true)
                };
                let next = outcome.next(run, on_reset);
                let resets = outcome == report(Reason::Reset);
                let gone = outcome == report(Reason::Shutdown);
                let never = matches!(outcome, Outcome::NotCreated(_) | Outcome::NotRun);
                let expected = match again {
                    _ if never => Next::End,
                    Some(Again::Asked) if gone => Next::End,
                    Some(again) => Next::Again {
                        hold: false,
                        paced: *again == Again::Panicked,
                    },
                    None if resets && on_reset != OnReset::Stop => Next::Again {
                        hold: on_reset == OnReset::Pause,
                        paced: true,
                    },
                    None => Next::End,
                };
                assert_eq!(next, expected, "{outcome:?} {again:?} {on_reset:?}");
                let stopped = Run {
                    stop: Some(&stop),
                    ..run
                };
                assert_eq!(outcome.next(stopped, on_reset), Next::End);
            }
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
