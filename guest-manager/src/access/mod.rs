//! Who may do what to a guest: every capability of a client carries a grant, and goes through it with each call.
//!
//! ```text
//!   facet    narrow, share, describe: what all capabilities have in common
//!   holder   what each of them holds, and the gate that its calls go through; thing says what it is for
//!   grant    the tree of what is permitted: rights, bounds, rates, expiry; revoking (pure)
//!   shares   what was shared of a guest (pure)
//!   redeem   from a token to a capability; secret is what makes one
//! ```
//!
//! A capability belongs to the connection that it was made on, whose descriptors travel beside its messages. Between connections there are only
//! tokens.

pub(crate) mod facet;
pub mod grant;
pub(crate) mod holder;
pub(crate) mod redeem;
pub(crate) mod secret;
pub(crate) mod shares;
pub(crate) mod thing;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use sepal_schema::{
    error::{Error, Kind},
    facet::Rights,
};

use self::{grant::Grant, shares::Shares};

/// Streams of a guest that the manager passes on, so that it can end them: each costs it two descriptors.
const MAX_RELAYS: usize = 256;

/// What a guest knows of the capabilities to it.
#[derive(Default)]
pub struct Access {
    /// Narrowed capabilities that are alive.
    alive: Rc<Cell<usize>>,
    pub(crate) shares: RefCell<Shares>,
    /// Streams that are passed on.
    relays: Rc<Cell<usize>>,
}

/// A stream that is passed on, until it is dropped.
#[derive(Debug)]
pub(crate) struct Relayed(Rc<Cell<usize>>);

impl Drop for Relayed {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Access {
    /// A grant that is derived from no other.
    pub(crate) fn root(&self, rights: Rights) -> Grant {
        Grant::root(rights, self.alive.clone())
    }

    /// Counts a stream that is passed on.
    ///
    /// # Errors
    /// `NO_RESOURCES`.
    pub(crate) fn relay(&self) -> Result<Relayed, Error> {
        let relays = self.relays.get();
        if relays >= MAX_RELAYS {
            let message = format!("{MAX_RELAYS} connections of this guest pass through the guest manager; no more can");
            return Err(Error::new(Kind::NoResources, message));
        }
        self.relays.set(relays + 1);
        Ok(Relayed(self.relays.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_streams_are_passed_on() {
        let access = Access::default();
        let mut all: Vec<_> = (0..MAX_RELAYS).map(|_| access.relay().unwrap()).collect();
        assert_eq!(access.relay().unwrap_err().kind, Kind::NoResources);
        all.pop();
        access.relay().unwrap();
        drop(all);
        assert_eq!(access.relays.get(), 0);
    }
}
