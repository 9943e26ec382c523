//! Why a guest does not go on as it is.

use std::time::Duration;

use sepal_schema::{
    error::{Error, Kind},
    report::Reason,
};

use crate::model::Ending;

/// Why a guest is stopped by force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// Somebody wanted it at once; the sentence says who or what.
    Killed(String),
    /// It was asked to shut down, and did not within this time.
    Hangup(Duration),
    /// Its kernel panicked, and its configuration says that this stops it.
    Panicked,
}

impl StopCause {
    /// How a guest that is stopped for this ends.
    pub fn ending(&self) -> Ending {
        let (reason, detail) = match self {
            Self::Killed(why) => (Reason::Killed, why.clone()),
            Self::Hangup(after) => {
                let after = after.as_millis();
                (
                    Reason::Hangup,
                    format!("it did not shut down within {after} ms, and was stopped by force"),
                )
            }
            Self::Panicked => (
                Reason::Crash,
                "its kernel panicked, and its configuration says that this stops it".to_owned(),
            ),
        };
        Ending::failed(reason, Error::new(Kind::ControllerForcedHalt, detail))
    }
}

/// Why a guest is made to begin again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// A client reset it.
    Asked,
    /// Its kernel panicked, and its configuration says that it begins again then.
    Panicked,
}

impl Again {
    /// How the run ends that gives way to the next one.
    pub fn ending(&self) -> Ending {
        match self {
            Self::Asked => Ending::new(Reason::Reset, "it was reset from outside"),
            Self::Panicked => Ending::new(
                Reason::Crash,
                "its kernel panicked, and its configuration says that it begins again then",
            ),
        }
    }
}
