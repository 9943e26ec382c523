//! What every capability of a client holds, and the gate that each of its calls goes through.
//!
//! ```text
//!   call --> not ended? --> rights? --> rate? --> work ----------------> answer        (what changes something is noted in the audit)
//!               | no          | no       | no      |  ended meanwhile
//!               v             v          v         v
//!            REVOKED  PERMISSION_DENIED NO_RESOURCES  REVOKED, the work dropped where it stood
//! ```

use std::{
    fmt::Display,
    future::Future,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::future::{Either, select};
use sepal_schema::{
    error::{Error, Kind},
    facet::{Bounds, Description, Right, Rights, kind_name, right_name},
    transport::Handle,
};

use super::{
    grant::{Denial, Ended, Grant, Seconds, TooFast},
    thing::Thing,
};
use crate::{
    audit::{self, Call},
    client::Client,
    guest::Guest,
};

/// What can be done through a capability.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deed {
    /// Interface and method.
    name: &'static str,
    /// All of these rights are needed.
    needs: &'static [Right],
    /// Nothing is different afterwards, whatever the rights are.
    looks: bool,
}

impl Deed {
    /// A method that needs these rights.
    pub(crate) const fn new(name: &'static str, needs: &'static [Right]) -> Self {
        Self {
            name,
            needs,
            looks: false,
        }
    }

    /// A method that changes nothing, though its rights permit others that do.
    pub(crate) const fn only_looks(self) -> Self {
        Self { looks: true, ..self }
    }

    /// Whether it does more than look.
    fn changes(self) -> bool {
        let changing = |right: &Right| !matches!(right, Right::Observe | Right::Output);
        !self.looks && self.needs.iter().any(changing)
    }
}

/// A capability of a client: who has it, what for, and what it permits.
#[derive(Clone)]
pub(crate) struct Holder {
    /// Whose connection it is on.
    pub(crate) client: Client,
    /// Whose guest.
    pub(crate) guest: Rc<Guest>,
    /// What it permits.
    pub(crate) grant: Grant,
    /// What it is for.
    pub(crate) thing: Thing,
}

/// Ends a grant when its time is over, not only when it is used next.
pub(crate) fn expire_in_time(handle: &Handle, grant: &Grant) {
    if let Some(deadline) = grant.deadline() {
        let (due, sleep) = (grant.weak(), handle.deadline(deadline));
        let timer = handle.spawn_owned(async move {
            sleep.await;
            due.expire(Instant::now());
        });
        grant.keep_timer(timer);
    }
}

impl Holder {
    /// All of a guest, for a client that found or made it: what its role permits.
    pub(crate) fn of_role(client: Client, guest: Rc<Guest>) -> Self {
        let grant = guest.access.root(client.role.rights());
        Self {
            client,
            guest,
            grant,
            thing: Thing::Guest,
        }
    }

    /// The same power over a part of the same guest.
    pub(crate) fn part(&self, thing: Thing) -> Self {
        Self { thing, ..self.clone() }
    }

    /// The event loop.
    pub(crate) fn handle(&self) -> &Handle {
        &self.guest.manager.handle
    }

    /// A capability of at most the power of this one, on the same connection.
    ///
    /// # Errors
    /// As [`Grant::narrow`].
    pub(crate) fn narrow(&self, bounds: &Bounds) -> Result<Self, Error> {
        let bounds = match self.thing {
            Thing::Output => &Bounds {
                only: Some(bounds.only.unwrap_or(Rights::ALL).and(self.thing.rights())),
                ..bounds.clone()
            },
            _ => bounds,
        };
        let grant = self.grant.narrow(bounds, Instant::now())?;
        expire_in_time(self.handle(), &grant);
        let thing = match self.thing {
            // What is left of it is no more than output, whatever can be called.
            Thing::Output => Thing::Serial,
            thing => thing,
        };
        Ok(Self {
            grant,
            thing,
            ..self.clone()
        })
    }

    /// What it is, and what it permits.
    pub(crate) fn describe(&self) -> Description {
        let now = Instant::now();
        let rights = self.permitted();
        Description {
            kind: self.thing.kind(),
            guest: self.guest.name.to_string(),
            rights,
            expires_in: self.grant.expires_in(now),
            bounds: Bounds {
                only: Some(rights),
                ..self.grant.bounds(now)
            },
        }
    }

    /// The rights that it has and that mean something for it.
    pub(crate) fn permitted(&self) -> Rights {
        self.grant.rights().and(self.thing.rights())
    }

    /// Whether it has a right.
    pub(crate) fn may(&self, right: Right) -> bool {
        self.permitted().has(right)
    }

    /// Whether it has not ended.
    ///
    /// # Errors
    /// `REVOKED`.
    pub(crate) fn check_live(&self) -> Result<(), Error> {
        let ended = self.grant.ended(Instant::now());
        ended.map_or(Ok(()), |ended| Err(self.revoked(ended)))
    }

    /// Does what a method is for, if the capability permits it, until it ends; notes it in the audit if it changes something.
    ///
    /// # Errors
    /// `REVOKED`, at once when the capability ends meanwhile, `PERMISSION_DENIED`, `NO_RESOURCES`, or what `work` fails with.
    pub(crate) async fn perform<T>(
        &self,
        deed: Deed,
        detail: impl Display,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let call = deed.changes().then(|| {
            let mut call = Call::new(&self.guest.manager.audit, self.client.who, deed.name);
            call.guest(&self.guest.name);
            call.detail(detail.to_string());
            call
        });
        let outcome = match self.admit(deed) {
            Ok(()) => self.while_live(work).await,
            Err(error) => Err(error),
        };
        if let Some(call) = call {
            call.done(outcome.as_ref().map(drop));
        }
        outcome
    }

    /// As [`Holder::perform`], for what is done at once and may be done so often that the audit would hold little else.
    ///
    /// # Errors
    /// As [`Holder::perform`].
    pub(crate) fn admit(&self, deed: Deed) -> Result<(), Error> {
        let now = Instant::now();
        for &right in deed.needs {
            self.grant.permits(right, now).map_err(|denial| self.denied(denial))?;
        }
        // Those without a right have not looked yet.
        self.check_live()?;
        if deed.changes() {
            self.grant.spend(now).map_err(|fast| self.too_fast(fast))?;
        }
        Ok(())
    }

    /// Goes on with `work` until the capability ends.
    ///
    /// # Errors
    /// `REVOKED`, or what `work` fails with.
    pub(crate) async fn while_live<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        if !self.grant.can_end() {
            return work.await;
        }
        match select(pin!(self.grant.until_ended()), pin!(work)).await {
            Either::Left((ended, _)) => Err(self.revoked(ended)),
            Either::Right((outcome, _)) => outcome,
        }
    }

    /// Resolves when the capability has ended.
    pub(crate) fn until_ended(&self) -> impl Future<Output = ()> + use<> {
        let grant = self.grant.clone();
        async move {
            grant.until_ended().await;
        }
    }

    /// Notes in the audit what was done otherwise than by [`Holder::perform`].
    pub(crate) fn note(&self, deed: Deed, detail: &str, outcome: Result<(), &Error>) {
        self.guest.manager.audit.record(&audit::Entry {
            who: &self.client.who,
            deed: deed.name,
            guest: &self.guest.name,
            detail,
            outcome,
        });
    }

    fn revoked(&self, ended: Ended) -> Error {
        let message = format!("this {} capability {ended}", kind_name(self.thing.kind()));
        Error::new(Kind::Revoked, message)
    }

    fn denied(&self, denial: Denial) -> Error {
        match denial {
            Denial::Ended(ended) => self.revoked(ended),
            Denial::Lacks(right) => {
                let (kind, right, permitted) = (kind_name(self.thing.kind()), right_name(right), self.permitted());
                let message = format!(
                    "this {kind} capability lacks the right \"{right}\" that this needs; it permits {permitted}"
                );
                Error::new(Kind::PermissionDenied, message).about(right)
            }
        }
    }

    fn too_fast(&self, TooFast { rate, wait }: TooFast) -> Error {
        // Rounded up, so that whoever waits so long is taken.
        let wait = Duration::from_millis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(1));
        let message = format!(
            "this {} capability takes {} changing calls a second, {} at once; try again in {}",
            kind_name(self.thing.kind()),
            rate.per_second,
            rate.burst,
            Seconds(wait)
        );
        Error::new(Kind::NoResources, message)
    }
}
