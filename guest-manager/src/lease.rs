//! Leases: the guest that a client launched or started is stopped when the client lets go of it, unless it was detached.

use std::{
    cell::Cell,
    future::{Future, ready},
    rc::Rc,
};

use sepal_schema::{error::write_completion, manager_capnp::guest_manager};

use crate::{
    audit::Call,
    client::Who,
    guest::{Guest, StopCause},
};

/// A launched guest's life line.
pub(crate) struct Lease {
    who: Who,
    guest: Rc<Guest>,
    released: Cell<bool>,
}

impl Lease {
    /// The life line of `guest`, for the client `who`. It lives on without it if it is `detached`.
    pub(crate) fn new(who: Who, guest: &Rc<Guest>, detached: bool) -> Rc<Self> {
        Rc::new(Self {
            who,
            guest: guest.clone(),
            released: Cell::new(detached),
        })
    }

    fn call(&self, deed: &'static str) -> Call {
        let mut call = Call::new(&self.guest.manager.audit, self.who, deed);
        call.guest(&self.guest.name);
        call
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.released.get() {
            if self.guest.live() {
                self.call("Lease.drop").done(Ok(()));
            }
            self.guest.want_stop(StopCause::Killed(
                "the lease of the client that launched it was dropped".to_owned(),
            ));
        }
    }
}

impl guest_manager::lease::Server for Lease {
    fn detach(
        self: Rc<Self>,
        _: guest_manager::lease::DetachParams,
        mut results: guest_manager::lease::DetachResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let call = self.call("Lease.detach");
        let outcome = self.guest.check_live();
        call.done(outcome.as_ref().copied());
        if outcome.is_ok() {
            self.released.set(true);
            self.guest
                .manager
                .registry(|registry, _| registry.detach(self.guest.id));
        }
        write_completion(&outcome, results.get());
        ready(Ok(()))
    }
}
