//! What the tests across crates share: programs as a user starts them, guest managers of their own, a terminal, a client of the protocol, and a
//! search for what may be left behind.
//!
//! ```text
//!   programs   the binaries under test, and whether this host can run guests
//!   patience   deadlines; they only ever make a test fail
//!   capture    output as it arrives
//!   process    what /proc tells
//!   spawn      programs with captured output; pty: programs on a terminal
//!   world      a folder, a guest manager, and everything that descends from them
//!   rpc        the protocol, call by call
//!   python     programs in another language
//! ```
//!
//! Nothing here sleeps to be right: output and ends of processes are waited for as events, and what the kernel tells nobody (a process of somebody
//! else's is gone) is looked at again until the deadline.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "support code of tests: a failure is a panic with a message"
)]

pub mod capture;
pub mod patience;
pub mod process;
pub mod programs;
pub mod pty;
pub mod python;
pub mod rpc;
pub mod spawn;
pub mod world;

pub use patience::{PATIENCE, until};
pub use programs::{kvm_missing, program};
pub use pty::Pty;
pub use rpc::Rpc;
pub use spawn::{Finished, Running};
pub use world::World;
