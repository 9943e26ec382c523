//! How messages and file descriptors travel between clients, the guest manager and components: Cap'n Proto RPC over Unix
//! stream sockets, on one event loop a thread.
//!
//! ```text
//!   connection   connect, serve: a bootstrap capability, and a future that says why the connection ended
//!      |  guard  panics of a method stay in the method; a caller that gives up ends the method
//!   network      the VatNetwork of capnp-rpc: queue, limits, cancellation
//!      |  ledger, limits   what the peer makes us hold, and how much of it
//!      |  frame            bytes -> messages
//!   fd_stream    bytes with SCM_RIGHTS beside them; FdTable: descriptors by number
//!   reactor      descriptors, timers, tasks, worker threads on one event manager
//!   file         what a file must be before it is used
//! ```
//!
//! The peer is hostile on every connection, whichever side of it we are. Past a limit the connection ends with a reason
//! ([`EndReason`]); nothing else notices.

pub mod connection;
pub mod fd_stream;
pub mod file;
mod frame;
pub mod guard;
mod ledger;
pub mod limits;
mod network;
pub mod reactor;

use std::any::Any;

pub use self::{
    connection::{Connection, PeerCredentials, connect, serve, serve_with},
    fd_stream::{FdError, FdTable},
    limits::{EndReason, Limit, Limits},
    reactor::{AsyncFd, Handle, Reactor, Remote},
};

/// The words of a panic.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    if let Some(message) = panic.downcast_ref::<&str>() {
        message
    } else if let Some(message) = panic.downcast_ref::<String>() {
        message
    } else {
        "(no message)"
    }
}
