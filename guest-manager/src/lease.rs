//! Leases: what keeps a guest that somebody launched or started, until that is dropped.
//!
//! ```text
//!   held --dropped--> (no token was given out) ----------------------------------> the guest is stopped
//!     ^ |     '-----> (there are tokens) --------> waited for, 30 s ---over------> the guest is stopped
//!     | |                                           |         ^
//!     | '-------------------------------------------'         '--- the manager ended, and the guest did not
//!     '---- redeemed, by whoever has a token; what held it before keeps nothing any more
//! ```
//!
//! The moment at which the waiting ends is on the record, so that managers which follow each other do not begin it anew: the 30 s are counted from when a
//! manager first found that nobody has the lease. By the monotonic clock, which the timers have, too: the time of day can be set, and while a host that is suspended sleeps (which the
//! boot-time clock counts) nobody could redeem anything.

use std::{
    cell::{Cell, RefCell},
    future::{Future, ready},
    rc::Rc,
    time::{Duration, Instant},
};

use sepal_schema::{
    error::{Error, Kind, write_completion},
    manager_capnp::guest_manager::lease::{self, token_result},
    transport::reactor::Task,
};

use crate::{
    access::secret::{self, Digest},
    audit::Call,
    client::{Client, Who},
    guest::{Guest, StopCause},
    manager::Manager,
    roles::Role,
};

/// How long a lease is waited for, unless the settings say something else.
pub(crate) const GRACE: Duration = Duration::from_secs(30);
/// How a lease's token begins.
const PREFIX: &str = "lease.";
/// Tokens of a guest's lease at a time; a further one takes the place of the oldest.
const MAX_TOKENS: usize = 16;

/// What is known of a guest's lease.
#[derive(Default)]
pub(crate) struct Leased {
    /// Counts who had it.
    turn: Cell<u64>,
    tokens: RefCell<Vec<Digest>>,
    waiting: RefCell<Option<Waiting>>,
}

/// The lease is waited for.
struct Waiting {
    until: Instant,
    _timer: Task,
}

impl Leased {
    /// How much longer the lease is waited for; zero: it is not.
    pub(crate) fn ends_in(&self, now: Instant) -> Duration {
        let waiting = self.waiting.borrow();
        waiting.as_ref().map_or(Duration::ZERO, |waiting| {
            // Whoever looks at the last moment is not told that nothing is waited for.
            let left = waiting.until.saturating_duration_since(now);
            left.max(Duration::from_millis(1))
        })
    }

    /// When its guest is stopped if nobody redeems it; none: it is not waited for.
    pub(crate) fn ends(&self) -> Option<Instant> {
        self.waiting.borrow().as_ref().map(|waiting| waiting.until)
    }

    /// The digests of its tokens, oldest first.
    pub(crate) fn tokens(&self) -> Vec<Digest> {
        self.tokens.borrow().clone()
    }

    /// The tokens that an earlier manager gave out.
    pub(crate) fn restore(&self, tokens: Vec<Digest>) {
        self.tokens.replace(tokens);
    }

    fn add(&self, token: Digest) {
        let mut tokens = self.tokens.borrow_mut();
        if tokens.len() >= MAX_TOKENS {
            tokens.remove(0);
        }
        tokens.push(token);
    }

    /// Somebody has it now, and nobody else; and whether it was waited for.
    fn take(&self) -> (u64, bool) {
        let waited = self.waiting.take().is_some();
        self.turn.set(self.turn.get() + 1);
        (self.turn.get(), waited)
    }
}

/// Nobody has the guest's lease: it is waited for, and the guest is stopped if nobody redeems it. `ends` says when, if an earlier manager has begun to wait.
pub(crate) fn wait(guest: &Rc<Guest>, ends: Option<Instant>) {
    let manager = &guest.manager;
    let grace = manager.settings.lease_grace;
    let latest = Instant::now() + grace;
    let until = ends.map_or(latest, |ends| ends.min(latest));
    let (weak, sleep) = (Rc::downgrade(guest), manager.handle.deadline(until));
    let timer = manager.handle.spawn_owned(async move {
        sleep.await;
        if let Some(guest) = weak.upgrade() {
            let why = format!("its lease was not redeemed within {} s", grace.as_secs_f64());
            guest.want_stop(StopCause::Killed(why));
        }
    });
    guest.lease.waiting.replace(Some(Waiting { until, _timer: timer }));
    guest.save();
}

/// A launched guest's life line.
pub(crate) struct Lease {
    who: Who,
    guest: Rc<Guest>,
    turn: u64,
    /// The guest lives on without it.
    released: Cell<bool>,
}

impl Lease {
    /// The life line of `guest`, for the client `who`. It lives on without it if it is `detached`.
    pub(crate) fn new(who: Who, guest: &Rc<Guest>, detached: bool) -> Rc<Self> {
        let (turn, waited) = guest.lease.take();
        if waited {
            guest.save();
        }
        Rc::new(Self {
            who,
            guest: guest.clone(),
            turn,
            released: Cell::new(detached),
        })
    }

    /// The guest that it keeps.
    pub(crate) fn guest(&self) -> &Rc<Guest> {
        &self.guest
    }

    fn call(&self, deed: &'static str) -> Call {
        let mut call = Call::new(&self.guest.manager.audit, self.who, deed);
        call.guest(&self.guest.name);
        call
    }

    /// Whether the guest depends on it.
    fn counts(&self) -> bool {
        !self.released.get() && self.guest.lease.turn.get() == self.turn
    }

    /// # Errors
    /// `NOT_RUNNING`; `NOT_SUPPORTED` if the guest does not depend on it.
    fn check(&self) -> Result<(), Error> {
        self.guest.check_live()?;
        match self.counts() {
            true => Ok(()),
            false => {
                let message = "the guest does not depend on this lease: it was detached, or the lease was redeemed";
                Err(Error::new(Kind::NotSupported, message))
            }
        }
    }

    fn give_token(&self) -> Result<String, Error> {
        self.check()?;
        let secret = secret::fresh()?;
        self.guest.lease.add(secret::digest(&secret));
        self.guest.save();
        Ok(format!("{PREFIX}{}", secret::hex(&secret)))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What goes on without the manager is not stopped because the manager hangs up.
        let stays = self.guest.manager.is_leaving() && self.guest.is_durable();
        if !self.counts() || !self.guest.live() || stays {
            return;
        }
        self.call("Lease.drop").done(Ok(()));
        if self.guest.lease.tokens.borrow().is_empty() {
            self.guest.want_stop(StopCause::Killed(
                "the lease of the client that launched it was dropped".to_owned(),
            ));
        } else {
            wait(&self.guest, None);
        }
    }
}

impl lease::Server for Lease {
    fn detach(
        self: Rc<Self>,
        _: lease::DetachParams,
        mut results: lease::DetachResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let call = self.call("Lease.detach");
        // Somebody else's it is not to let go of; once more is as good as once.
        let outcome = match self.released.get() {
            true => self.guest.check_live(),
            false => self.check(),
        };
        call.done(outcome.as_ref().copied());
        if outcome.is_ok() {
            self.released.set(true);
            self.guest
                .manager
                .registry(|registry, _| registry.detach(self.guest.id));
            self.guest.save();
        }
        write_completion(&outcome, results.get());
        ready(Ok(()))
    }

    fn token(
        self: Rc<Self>,
        _: lease::TokenParams,
        mut results: lease::TokenResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let call = self.call("Lease.token");
        let token = self.give_token();
        call.done(token.as_ref().map(drop));
        let mut to: token_result::Builder<'_> = results.get();
        match token {
            Ok(token) => to.set_token(&*token),
            Err(error) => error.write(to.init_error()),
        }
        ready(Ok(()))
    }
}

/// The lease that a token stands for; whoever had it before has it no more.
///
/// # Errors
/// `PERMISSION_DENIED` for a role that may not launch, `NOT_FOUND`.
pub(crate) fn redeem(manager: &Rc<Manager>, client: &Client, token: &str) -> Result<Rc<Lease>, Error> {
    client.check(Role::Operate, "redeemLease")?;
    let unknown = || {
        let message = "there is no such lease: its guest has ended or was detached, or it never was";
        Error::new(Kind::NotFound, message).about("token")
    };
    let secret = token.trim().strip_prefix(PREFIX).and_then(secret::of_hex);
    let digest = secret::digest(&secret.ok_or_else(unknown)?);
    let found = |guest: &Rc<Guest>| {
        let detached = manager.registry(|registry, _| registry.detached(guest.id));
        let lost = detached || !guest.live() || guest.stop_cause().is_some();
        !lost && guest.lease.tokens.borrow().contains(&digest)
    };
    let guest = manager.guests().into_iter().find(found).ok_or_else(unknown)?;
    Ok(Lease::new(client.who, &guest, false))
}
