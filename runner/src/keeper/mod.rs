//! The keeper: a small single-threaded process that is the parent of one manager's components.
//!
//! It exists because a manager can be killed at any time, and nothing may be left then. It starts components on request,
//! reaps them, reports how they ended, and removes their groups. When the manager's connection closes, for whatever
//! reason, it kills what still runs, removes the files that the manager asked to have removed, and exits.
//!
//! ```text
//!              spawn                 exec succeeded            process ended
//!   (nothing) ───────> starting ───────────────────> running ───────────────> gone
//!                         │ exec failed                 │ kill                  Exited
//!                         └──────────> gone             └─> running
//!                            Failed        Started
//! ```
//!
//! Every spawn is answered by one `Started` or one `Failed`; every `Started` is followed by one `Exited`.
//!
//! If the keeper itself is killed, its components die with it (parent-death signal and lifeline); empty cgroups that it
//! leaves are removed by the next keeper.

mod client;
mod server;
mod wire;

use std::io;
use std::path::PathBuf;

pub use client::{KeeperClient, KeeperEvent};
pub use server::run;
use wire::WireError;

/// Why the keeper cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Its binary cannot be started.
    #[error("keeper binary {path}: {source}")]
    Binary {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be started.
        source: io::Error,
    },
    /// It is gone; no component of it lives any more.
    #[error("the keeper is gone ({0})")]
    Gone(String),
    /// It said something that is no message, or a request does not fit one.
    #[error("keeper connection: {0}")]
    Protocol(String),
    /// The system refused something.
    #[error("keeper: {action}: {source}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> KeeperError {
    move |source| KeeperError::System {
        action,
        source: source.into(),
    }
}

impl From<WireError> for KeeperError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Closed => Self::Gone("its connection is closed".to_owned()),
            WireError::Malformed(reason) => Self::Protocol(reason),
            WireError::System(source) => Self::System {
                action: "using the connection",
                source,
            },
        }
    }
}
