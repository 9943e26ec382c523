//! Sockets between a guest and the host as paths of the host: the convention of Firecracker and Cloud Hypervisor.
//!
//! ```text
//!   convention  the Unix socket, who may wait how long, how many
//!      |  request   the line that a client begins with (pure)
//!      |  bridge    bytes both ways between two sockets
//!      v
//!   Endpoint    the guest's socket device, however it is reached
//!
//!   reservation   a context id that the host's kernel gives to nobody else (vhost-vsock)
//! ```

mod bridge;
pub mod convention;
mod request;
pub mod reservation;

use std::os::fd::OwnedFd;

use futures::future::LocalBoxFuture;
use sepal_schema::error::Error;

pub use convention::{Convention, ConventionError};

/// A guest's socket device, as somebody on the host reaches it.
pub trait Endpoint {
    /// Connects to a port of the guest: one end of a Unix stream socket whose other end is the connection.
    ///
    /// The error's kind is `CONNECTION_REFUSED`, `NO_RESOURCES`, `TIMED_OUT` or `NOT_RUNNING` as a rule.
    fn connect(&self, port: u32) -> LocalBoxFuture<'static, Result<OwnedFd, Error>>;
}

/// A connection that a guest asks for. Dropping it refuses.
pub trait Incoming {
    /// Grants it, as [`Endpoint::connect`].
    fn open(self: Box<Self>) -> LocalBoxFuture<'static, Result<OwnedFd, Error>>;
}
