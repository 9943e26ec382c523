//! The agent in a guest, which for its host puts and gets files and runs programs, and the host's side of its protocol.
//!
//! ```text
//!   host                                         guest
//!   client::Client  <-- protocol: one stream --> server::serve (one thread an operation) --> files, programs
//!   (no I/O of its own)   for each operation     the program `sepal-agent`: listens, says that it is ready
//! ```
//!
//! - [`protocol`] is what goes over the stream; both sides check whatever comes from the other, and bound it.
//! - [`client`] is a state machine without I/O: whoever uses it moves its bytes to and fro.
//! - [`server`] is what the program does with a connection.
//!
//! `docs/guest-agent.md` describes the protocol for others to implement.

pub mod client;
pub mod protocol;
pub mod server;
