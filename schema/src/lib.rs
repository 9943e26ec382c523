//! The protocol between clients, guest manager and components: what they say and how it travels.
//!
//! ```text
//!   *.capnp --(capnp compile, checked in)--> generated     the messages
//!   config  GuestConfig as a Rust value, decoded with limits and errors that name the field
//!   error   typed errors: what a method answers when an expected thing goes wrong
//!   facet   what a capability permits: rights and bounds
//!   report  how a guest ended;  crash  what is known about a run that failed;  info  what there is to know about a guest;  news  what happens to its devices
//!   transport  messages and file descriptors over Unix sockets, on one event loop a thread
//! ```

pub mod config;
pub mod crash;
pub mod error;
pub mod facet;
#[expect(missing_docs, unreachable_pub, reason = "generated from the .capnp files, which carry the documentation")]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, clippy::unwrap_used, clippy::expect_used)]
#[rustfmt::skip]
mod generated;
pub mod info;
pub mod news;
pub mod report;
pub mod socket;
pub mod state;
pub mod transport;

pub use generated::{
    agent_capnp, bytes_capnp, config_capnp, cpu_capnp, debug_capnp, device_capnp, error_capnp, facet_capnp, file_capnp,
    guest_capnp, lifecycle_capnp, manager_capnp, node_capnp, store_capnp, vsock_capnp,
};
