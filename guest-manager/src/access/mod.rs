//! Who may do what to a guest: every capability of a client carries a grant, and goes through it with each call.
//!
//! ```text
//!   grant    the tree of what is permitted: rights, bounds, expiry, rates; revoking (pure)
//! ```

pub mod grant;

use std::{cell::Cell, rc::Rc};

use sepal_schema::facet::Rights;

use self::grant::Grant;

/// What a guest knows of the capabilities to it.
#[derive(Default)]
pub struct Access {
    /// Narrowed capabilities that are alive.
    alive: Rc<Cell<usize>>,
}

impl Access {
    /// A grant that is derived from no other.
    pub fn root(&self, rights: Rights) -> Grant {
        Grant::root(rights, self.alive.clone())
    }
}
