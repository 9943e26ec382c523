//! The socket device (virtio 5.10): connections between the host and the guest, stream sockets only, without the host's kernel (no vhost).
//!
//! ```text
//!   handle      VsockHandle: listen, connect          any thread
//!      |  mailbox, eventfd
//!      v
//!   device      Vsock: sockets, deadlines             the device's thread
//!     transmit, receive  its rings
//!     table       connections by slot, ports, turn, deadline
//!       connection  one connection: its states (pure)
//!         credit      who may send how much (pure)
//!       stream      its socket, and what the host did not take yet
//!     packet      headers (pure)
//! ```
//!
//! A connection of the host is one end of a Unix socket pair: what the guest sends can be read there, what is written there goes to the
//! guest, `shutdown(2)` and `close(2)` are told. What a guest can make the host hold is bounded: the number of connections, and the room that
//! each was promised as its credit; beyond that the guest has to wait. A packet that breaks a rule of its connection costs that
//! connection; one that breaks a rule of the rings stops the device until the driver resets it.
//!
//! System calls on the device's thread, besides those of its loop: `recvmsg`, `sendmsg` and `shutdown` on Unix stream sockets,
//! `timerfd_settime`, `read` on the timer and the mailbox's eventfd, `write` on that eventfd, `close`; `socketpair` only if a sink grants a
//! connection right where it is called.

pub mod connection;
pub mod credit;
pub mod device;
pub mod handle;
pub mod packet;
mod receive;
mod stream;
mod table;
mod transmit;

pub use device::{Vsock, VsockConfig, VsockError};
pub use handle::{AcceptError, ConnectError, Incoming, ListenError, Listener, VsockHandle};

#[cfg(test)]
mod tests;
