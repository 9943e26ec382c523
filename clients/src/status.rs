//! Exit statuses, and how a command ends.

use std::process::ExitCode;

use sepal_schema::{
    error::{Error, Kind},
    report::{Reason, StopReport},
};

/// The command did what it was asked to, or the guest shut down.
pub(crate) const SUCCESS: u8 = 0;
/// The command failed.
pub(crate) const FAILED: u8 = 1;
/// The time given was over first; as timeout(1) has it.
pub(crate) const TIMED_OUT: u8 = 124;

/// How the guest ended, as an exit status; the help text lists them.
pub(crate) fn of(report: &StopReport) -> u8 {
    match report.reason {
        Reason::Shutdown => SUCCESS,
        Reason::Reset => 10,
        Reason::Crash => 11,
        Reason::Killed => 12,
        Reason::StartFailed => 13,
        Reason::Hangup => 14,
        Reason::VmmTerminated => 15,
        Reason::Unknown => 16,
    }
}

/// Whether a guest manager has answered with this error, rather than not at all.
pub(crate) fn is_answer(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some()
}

/// Tells an error on standard error, and what to do next where that is known.
pub(crate) fn fail(error: &anyhow::Error) -> ExitCode {
    let Some(typed) = error.downcast_ref::<Error>() else {
        let gone = |error: &capnp::Error| error.kind == capnp::ErrorKind::Disconnected;
        if error.downcast_ref().is_some_and(gone) {
            eprint!("guest: the connection to the guest manager ended");
            // The kind's own name tells people nothing.
            eprintln!(": {}", format!("{error:#}").replace("Disconnected: ", ""));
        } else {
            eprintln!("guest: {error:#}");
        }
        return FAILED.into();
    };
    eprintln!("guest: {}: {error:#}", typed.kind_name());
    if let Some(hint) = hint(typed) {
        eprintln!("hint: {hint}");
    }
    match typed.kind {
        Kind::TimedOut => TIMED_OUT.into(),
        _ => FAILED.into(),
    }
}

fn hint(error: &Error) -> Option<&'static str> {
    match error.kind {
        Kind::NotFound => Some("`guest list` shows the guests that there are"),
        Kind::AlreadyRunning => {
            Some("`guest stop NAME` ends a guest; `guest launch` without a name chooses a free one")
        }
        Kind::NotRunning => Some("`guest info NAME` tells how it ended, `guest logs NAME` what it printed"),
        Kind::TimedOut => Some("`guest stop --force NAME` stops it whether it reacts or not"),
        _ => None,
    }
}
