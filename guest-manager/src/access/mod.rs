//! Who may do what to a guest: every capability of a client carries a grant, and goes through it with each call.
//!
//! ```text
//!   facet    narrow, share, describe: what all capabilities have in common
//!   holder   what each of them holds, and the gate that its calls go through; thing says what it is for
//!   grant    the tree of what is permitted: rights, bounds, rates, expiry; revoking (pure)
//!   shares   what was shared of a guest (pure)
//!   redeem   from a token to a capability
//! ```
//!
//! A capability belongs to the connection that it was made on, whose descriptors travel beside its messages. Between connections there are only
//! tokens.

pub(crate) mod facet;
pub mod grant;
pub(crate) mod holder;
pub(crate) mod redeem;
mod shares;
pub(crate) mod thing;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use sepal_schema::facet::Rights;

use self::{grant::Grant, shares::Shares};

/// What a guest knows of the capabilities to it.
#[derive(Default)]
pub struct Access {
    /// Narrowed capabilities that are alive.
    alive: Rc<Cell<usize>>,
    pub(crate) shares: RefCell<Shares>,
}

impl Access {
    /// A grant that is derived from no other.
    pub(crate) fn root(&self, rights: Rights) -> Grant {
        Grant::root(rights, self.alive.clone())
    }
}
