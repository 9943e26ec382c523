//! Guests that go on without their manager: what the next one needs is kept with the keeper, in memory and by descriptors that outlive this process.
//!
//! ```text
//!   keeper    under the id of the guest's component            under its own id
//!               record      (slots: a record, `record`)          journal  (ring: the events of all guests, `journal`)
//!               config.N    (descriptors of the configuration)
//!               rings       (what each port printed: `ring`)
//!               cid         (what holds its context id)
//!               ports       (the manager's ends of their sockets)
//!               log         (the component's standard error)
//!               successors  (by which it gets the connection to the next manager)
//!
//!   this manager ends --> nobody --> the next one takes over (`succeed`, before it listens)
//!     the component goes on; its output waits in the sockets
//! ```
//!
//! Whenever the process is killed, what is kept is as it was before or after the last change, as a whole. docs/decisions/0015 says why it is done so.

pub(crate) mod chronicle;
pub(crate) mod journal;
mod keeping;
mod late;
pub(crate) mod memory;
pub(crate) mod record;
pub(crate) mod ring;
pub(crate) mod slots;
mod succeed;

pub use self::succeed::take_over;
pub(crate) use self::{
    keeping::{Durable, Owner, Successor, check, copies},
    succeed::{Bygone, Left},
};
