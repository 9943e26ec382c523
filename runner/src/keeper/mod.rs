//! The keeper: a small single-threaded process that is the parent of one manager's components.
//!
//! It exists because a manager can be killed at any time. It starts components on request, reaps them, reports how they
//! ended, and removes their groups. It decides nothing: what is to go on without the manager, the manager has said before.
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
//! Beside a component (or beside none, under any id) the keeper holds descriptors for its manager. When the manager's connection
//! closes, for whatever reason, it kills the components that are not durable and removes the files that the manager asked to have
//! removed. If nothing durable is left it exits; otherwise it waits for a successor:
//!
//! ```text
//!            connection closes,               a successor proves that it knows the key
//!   served ─────────────────────> orphaned ────────────────────────────────────────────> served
//!     │     something is durable    │                                                      │ nothing is left
//!     │ nothing is durable,         │ nothing is left, or none                             │ under any id but 0
//!     └ `close`                     └ has lived for a while                                └ `close`
//!       ──> end                       ──> end                                                ──> end
//! ```
//!
//! - [`KeeperClient::keep_descriptors`], [`KeeperClient::drop_descriptors`], [`KeeperClient::release`]: what is held, by id and
//!   label; id [`OWN`] is for the manager itself. What is sent is safe once [`KeeperClient::has_unsent`] is false: the keeper reads all
//!   that a manager has sent before it takes notice of its end.
//! - [`KeeperClient::set_durable`]: what stays. A durable id stays known after its component has ended, until `release`.
//! - [`KeeperClient::offer_succession`]: the listening socket at which a successor comes, and the key that it has to know.
//! - [`KeeperClient::ask`]: the successor's side: all that the keeper has, and the connection, as soon as it can hand over. A manager that lives is
//!   never displaced; whoever connects meanwhile waits.
//! - [`KeeperClient::leave`]: ends the connection and leaves what is durable. [`KeeperClient::close`] ends everything.
//! - [`KeeperClient::set_limits`]: changes the limits of a component that runs.
//!
//! A successor starts its own keeper for what it starts, and holds on to the inherited one, which ends when nothing is left in it.
//!
//! Manager and keeper may be of different versions: fields that one does not know are ignored, and a request that the keeper does not
//! know is answered by [`KeeperEvent::Refused`].
//!
//! If the keeper itself is killed, its components die with it (parent-death signal and lifeline); empty cgroups that it
//! leaves are removed by the next keeper.

mod book;
mod client;
mod door;
mod inherit;
mod process;
mod server;
mod wire;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;

pub use client::{KeeperClient, KeeperEvent};
pub use inherit::{Asked, Inherited, InheritedState};
pub use server::run;
use wire::WireError;
pub use wire::{MAX_KEPT, MAX_LABEL};

/// Bytes of the key that a successor has to know.
pub const KEY_BYTES: usize = 32;

/// What a successor has to know.
pub type Key = [u8; KEY_BYTES];

/// The id of what is kept for the manager itself. It has no component, stays until a successor takes it or the keeper ends, and does
/// not keep the keeper from ending.
pub const OWN: u64 = 0;

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
    /// Nobody listens at this socket: the keeper has ended.
    #[error("no keeper listens at {path}: {source}")]
    Ended {
        /// The socket.
        path: PathBuf,
        /// What connecting to it says.
        source: io::Error,
    },
    /// The socket at which a keeper was expected belongs to somebody else; the key was not sent.
    #[error("the socket {path} was made by uid {uid}, who is not to be trusted with the guests of this manager")]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// The keeper hung up instead of handing over: the key is wrong, the keeper has just ended, or too many others came after this one.
    #[error("the keeper at {path} does not hand over: the key is not the one that it was given, or it has ended")]
    Refused {
        /// The socket.
        path: PathBuf,
    },
    /// The keeper did not hand over in time: it is stopped, or has another manager.
    #[error("the keeper at {path} does not hand over: it has a manager, or does not run")]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// As many others as there is room for wait at the keeper's socket: it is stopped, or has another manager.
    #[error("too many wait at {path} for the keeper, which has a manager, or does not run")]
    Crowded {
        /// The socket.
        path: PathBuf,
    },
    /// It did not do in time what was asked of it: it is stopped, a debugger holds it, or its memory has to be fetched from slow storage.
    #[error("the keeper (process {pid}) does not answer")]
    Unresponsive {
        /// Its process id.
        pid: u32,
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

/// Says something on standard error, which is the manager's and may have ended with it: `eprintln` would panic then, and end every component.
fn say(words: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "sepal-keeper: {words}");
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
