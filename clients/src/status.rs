//! Exit statuses, and how a command ends.

use std::process::ExitCode;

use sepal_schema::{
    error::{Error, Kind, kind_name},
    report::{Reason, StopReport},
};

/// The command did what it was asked to, or the guest shut down.
pub(crate) const SUCCESS: u8 = 0;
/// The command failed.
pub(crate) const FAILED: u8 = 1;
/// The command line is wrong.
pub(crate) const USAGE: u8 = 2;
/// The time given was over first; as timeout(1) has it.
pub(crate) const TIMED_OUT: u8 = 124;

/// How the exceptions of the other side begin.
const REMOTE: &str = "remote exception: ";
/// More kinds of errors than there are.
const KINDS: u16 = 256;

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
    typed(error).is_some()
}

/// What a guest manager answered; an exception whose words begin with a kind of error is one, where the answer has no room for it.
fn typed(error: &anyhow::Error) -> Option<Error> {
    if let Some(error) = error.downcast_ref::<Error>() {
        return Some(error.clone());
    }
    let exception = error.downcast_ref::<capnp::Error>()?;
    let words = exception.extra.strip_prefix(REMOTE).unwrap_or(&exception.extra);
    let (name, message) = words.split_once(": ")?;
    let mut kinds = (0..KINDS).filter_map(|number| Kind::try_from(number).ok());
    let kind = kinds.find(|&kind| kind_name(kind) == name)?;
    Some(Error::new(kind, message))
}

/// Tells an error on standard error, and what to do next where that is known.
pub(crate) fn fail(error: &anyhow::Error) -> ExitCode {
    let Some(typed) = typed(error) else {
        let unknown = |error: &capnp::Error| error.kind == capnp::ErrorKind::Unimplemented;
        if error.downcast_ref().is_some_and(unknown) {
            say!("guest: the guest manager is of a version that cannot do this; `guest version` tells both");
            return FAILED.into();
        }
        let gone = |error: &capnp::Error| error.kind == capnp::ErrorKind::Disconnected;
        if error.downcast_ref().is_some_and(gone) {
            // The kind's own name tells people nothing.
            let why = format!("{error:#}").replace("Disconnected: ", "");
            say!("guest: the connection to the guest manager ended: {why}");
        } else {
            say!("guest: {error:#}");
        }
        return FAILED.into();
    };
    match error.is::<Error>() {
        true => say!("guest: {}: {error:#}", typed.kind_name()),
        false => say!("guest: {}: {}", typed.kind_name(), typed.message),
    }
    if let Some(hint) = hint(&typed) {
        say!("hint: {hint}");
    }
    match typed.kind {
        Kind::TimedOut => TIMED_OUT.into(),
        _ => FAILED.into(),
    }
}

fn hint(error: &Error) -> Option<&'static str> {
    match error.kind {
        // A file or program in the guest.
        Kind::NotFound if error.about == "agent" => None,
        Kind::NotFound if error.about == "token" => {
            Some("whoever shared it sees with `guest shares NAME` what is left of it")
        }
        Kind::NotFound if error.about == "name" => Some("`guest list` shows the guests that there are"),
        Kind::PermissionDenied => {
            Some("`guest whoami` tells what you may do; who may do more can give it to you by `guest share`")
        }
        Kind::Revoked => {
            Some("whoever gave it has taken it back, or its time is over: only they can give another, by `guest share`")
        }
        Kind::AlreadyRunning if error.about == "name" => {
            Some("`guest info NAME` tells of it, `guest stop NAME` ends it; a launch without a name chooses a free one")
        }
        Kind::AlreadyBound if error.about == "name" => {
            Some("`guest define --replace` puts a definition in the place of the one that there is")
        }
        Kind::NotRunning => Some("`guest info NAME` tells how it ended, `guest logs NAME` what it printed"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_that_name_a_kind_are_errors_of_it() {
        let exception = |words: &str| typed(&capnp::Error::failed(words.to_owned()).into());
        let error = exception("remote exception: REVOKED: it was taken back: by root").unwrap();
        assert_eq!(
            (error.kind, &error.message[..]),
            (Kind::Revoked, "it was taken back: by root")
        );
        assert_eq!(exception("PERMISSION_DENIED: no").unwrap().kind, Kind::PermissionDenied);
        assert_eq!(exception("remote exception: something: else"), None);
        let wrapped = anyhow::Error::from(Error::new(Kind::NotFound, "x")).context("y");
        assert_eq!(typed(&wrapped).unwrap().kind, Kind::NotFound);
    }
}
