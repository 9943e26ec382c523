//! What a capability permits: a tree of grants for each guest, whose decisions are pure. Time is passed in.
//!
//! ```text
//!   root (the client's role) --narrow--> grant --narrow--> grant        permits = own rights and those of all on the way to the root
//!                                         |                             bounds  = the tightest on the way
//!                                         '--narrow--> grant            ended   = this one or one on the way was revoked or has expired
//!
//!   alive --end--> ended (revoked or expired)         once and for good, with the whole subtree
//! ```
//!
//! A grant knows what it permits from the start, because nothing of it changes but that it ends: a check costs the same at any depth, only
//! the rates on the way are looked at one by one.

use std::{
    cell::{Cell, RefCell},
    fmt,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use event_listener::Event;
use sepal_schema::{
    error::{Error, Kind},
    facet::{Bounds, CallRate, Range, Right, Rights},
    transport::reactor::Task,
};

/// How often a capability can be narrowed one after the other.
pub const MAX_DEPTH: u32 = 32;
/// Narrowed capabilities of a guest that may be alive at a time.
pub const MAX_ALIVE: usize = 1024;
/// How many of them are kept for those who may share: who may only look shall not use them up.
const FOR_SHARING: usize = 256;

/// Why a grant is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// How long it was to last, if that is what ended it; else it was revoked.
    pub lifetime: Option<Duration>,
    /// It happened to one that this was derived from.
    pub inherited: bool,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.inherited {
            "was derived from one that "
        } else {
            ""
        })?;
        match self.lifetime {
            Some(lifetime) => write!(f, "expired after {}", Seconds(lifetime)),
            None => f.write_str("was revoked"),
        }
    }
}

/// A time as people write it: `10 s`, `250 ms`.
pub(crate) struct Seconds(pub(crate) Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            ms if ms % 1000 == 0 => write!(f, "{} s", ms / 1000),
            ms => write!(f, "{ms} ms"),
        }
    }
}

/// Why a grant does not permit something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// It is no more.
    Ended(Ended),
    /// It never had this right.
    Lacks(Right),
}

/// Too many calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFast {
    /// How often something may be called.
    pub rate: CallRate,
    /// How long until the next call is taken.
    pub wait: Duration,
}

/// When it ends by itself.
#[derive(Debug, Clone, Copy)]
struct Expiry {
    at: Instant,
    lifetime: Duration,
}

/// How often something may be called: a token bucket, kept as the time at which it would be full again (ITU-T I.371, GCRA).
#[derive(Debug)]
struct Bucket {
    rate: CallRate,
    full_at: Cell<Option<Instant>>,
}

impl Bucket {
    /// The time that a token takes to come back: at least a nanosecond.
    fn interval(&self) -> Duration {
        Duration::from_secs(1) / self.rate.per_second.max(1)
    }

    /// When it is full again if a token is taken at `now`.
    fn after_one(&self, now: Instant) -> Instant {
        let full_at = self.full_at.get().map_or(now, |at| at.max(now));
        full_at + self.interval().max(Duration::from_nanos(1))
    }

    /// How long until there is a token; zero if there is one.
    fn wait(&self, now: Instant) -> Duration {
        let depth = self
            .interval()
            .max(Duration::from_nanos(1))
            .saturating_mul(self.rate.burst.max(1));
        self.after_one(now).saturating_duration_since(now).saturating_sub(depth)
    }
}

/// What a grant permits, those on the way to the root included.
#[derive(Debug, Clone, Default)]
struct Limits {
    rights: Rights,
    expiry: Option<Expiry>,
    rate: Option<CallRate>,
    balloon_pages: Option<Range>,
    memory_bytes: Option<Range>,
    /// Empty: all.
    vsock_ports: Vec<u32>,
}

struct Node {
    parent: Option<Grant>,
    depth: u32,
    limits: Limits,
    /// Its own.
    expiry: Option<Expiry>,
    /// Its own.
    bucket: Option<Bucket>,
    ended: Cell<Option<Ended>>,
    told: Event,
    children: RefCell<Vec<Weak<Node>>>,
    /// Ends it when it expires.
    timer: RefCell<Option<Task>>,
    /// The narrowed ones of the guest that are alive, this included.
    alive: Rc<Cell<usize>>,
}

impl Node {
    fn counts(&self) -> bool {
        self.parent.is_some() && self.ended.get().is_none()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.counts() {
            self.alive.set(self.alive.get() - 1);
        }
    }
}

/// What a capability permits. Clones are the same grant.
#[derive(Clone)]
pub struct Grant(Rc<Node>);

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("depth", &self.0.depth)
            .field("rights", &self.0.limits.rights)
            .field("ended", &self.0.ended.get())
            .finish_non_exhaustive()
    }
}

impl Grant {
    /// A grant that comes from nowhere else; `alive` counts what is derived from all of a guest.
    pub fn root(rights: Rights, alive: Rc<Cell<usize>>) -> Self {
        Self(Rc::new(Node {
            parent: None,
            depth: 0,
            limits: Limits {
                rights,
                ..Limits::default()
            },
            expiry: None,
            bucket: None,
            ended: Cell::default(),
            told: Event::new(),
            children: RefCell::default(),
            timer: RefCell::default(),
            alive,
        }))
    }

    /// A grant of at most the power of this one, that ends with it.
    ///
    /// # Errors
    /// `NO_RESOURCES`: too deep, or too many. `BAD_CONFIG`: bounds that leave nothing of what this one permits.
    pub fn narrow(&self, bounds: &Bounds, now: Instant) -> Result<Self, Error> {
        let node = &self.0;
        if node.depth >= MAX_DEPTH {
            let message = format!("this capability has been narrowed {MAX_DEPTH} times already; no more are allowed");
            return Err(Error::new(Kind::NoResources, message));
        }
        let most = match node.limits.rights.has(Right::Share) {
            true => MAX_ALIVE,
            false => MAX_ALIVE - FOR_SHARING,
        };
        if node.alive.get() >= most {
            let message = format!("{most} narrowed capabilities of this guest are in use; revoke or drop some");
            return Err(Error::new(Kind::NoResources, message));
        }
        let expiry = bounds.lifetime.and_then(|lifetime| {
            // One that lies past the end of the clock never comes.
            let at = now.checked_add(lifetime)?;
            Some(Expiry { at, lifetime })
        });
        let limits = node.limits.tighter(bounds, expiry)?;
        let inherited = |ended: Ended| Ended {
            inherited: true,
            ..ended
        };
        let child = Rc::new(Node {
            parent: Some(self.clone()),
            depth: node.depth + 1,
            limits,
            expiry,
            bucket: bounds.rate.map(|rate| Bucket {
                rate,
                full_at: Cell::default(),
            }),
            ended: Cell::new(self.ended(now).map(inherited)),
            told: Event::new(),
            children: RefCell::default(),
            timer: RefCell::default(),
            alive: node.alive.clone(),
        });
        if child.counts() {
            node.alive.set(node.alive.get() + 1);
        }
        let mut children = node.children.borrow_mut();
        if children.len() == children.capacity() {
            children.retain(|child| child.strong_count() > 0);
        }
        children.push(Rc::downgrade(&child));
        Ok(Self(child))
    }

    /// What it permits, whether it has ended or not.
    pub fn rights(&self) -> Rights {
        self.0.limits.rights
    }

    /// Whether it can ever end.
    pub fn can_end(&self) -> bool {
        self.0.parent.is_some()
    }

    /// Whether it was derived from `other`, at any depth; a grant that comes from nowhere else stands for the whole guest.
    pub fn is_under(&self, other: &Self) -> bool {
        !other.can_end()
            || std::iter::successors(self.0.parent.as_ref(), |grant| grant.0.parent.as_ref())
                .any(|grant| Rc::ptr_eq(&grant.0, &other.0))
    }

    /// Whether anybody else has it.
    pub fn is_shared(&self) -> bool {
        Rc::strong_count(&self.0) > 1
    }

    /// Whether it has ended, and how; what has expired by now ends here.
    pub fn ended(&self, now: Instant) -> Option<Ended> {
        if self.0.limits.expiry.is_some_and(|expiry| expiry.at <= now) {
            let mut next = Some(self);
            while let Some(grant) = next {
                match grant.0.expiry {
                    Some(expiry) if expiry.at <= now => grant.end(Some(expiry.lifetime)),
                    _ => {}
                }
                next = grant.0.parent.as_ref();
            }
        }
        self.0.ended.get()
    }

    /// Whether it permits `right`.
    ///
    /// # Errors
    /// Why not.
    pub fn permits(&self, right: Right, now: Instant) -> Result<(), Denial> {
        if let Some(ended) = self.ended(now) {
            return Err(Denial::Ended(ended));
        }
        match self.rights().has(right) {
            true => Ok(()),
            false => Err(Denial::Lacks(right)),
        }
    }

    /// Counts a call that changes something.
    ///
    /// # Errors
    /// There were too many, for this grant or one on the way to the root. Then it is not counted by any.
    pub fn spend(&self, now: Instant) -> Result<(), TooFast> {
        let buckets = || {
            std::iter::successors(Some(self), |grant| grant.0.parent.as_ref())
                .filter_map(|grant| grant.0.bucket.as_ref())
        };
        let slowest = buckets().max_by_key(|bucket| bucket.wait(now));
        if let Some(bucket) = slowest
            && !bucket.wait(now).is_zero()
        {
            return Err(TooFast {
                rate: bucket.rate,
                wait: bucket.wait(now),
            });
        }
        for bucket in buckets() {
            bucket.full_at.set(Some(bucket.after_one(now)));
        }
        Ok(())
    }

    /// Takes it back with all that was derived from it, at once and for good.
    pub fn revoke(&self) {
        self.end(None);
    }

    fn end(&self, lifetime: Option<Duration>) {
        let mut inherited = false;
        let mut rest = vec![self.0.clone()];
        while let Some(node) = rest.pop() {
            if node.ended.get().is_some() {
                // And with it all that was derived from it.
                continue;
            }
            if node.counts() {
                node.alive.set(node.alive.get() - 1);
            }
            node.ended.set(Some(Ended { lifetime, inherited }));
            node.told.notify(usize::MAX);
            inherited = true;
            rest.extend(node.children.take().iter().filter_map(Weak::upgrade));
        }
    }

    /// Waits until it has ended.
    pub async fn until_ended(&self) -> Ended {
        loop {
            let listener = self.0.told.listen();
            if let Some(ended) = self.0.ended.get() {
                return ended;
            }
            listener.await;
        }
    }

    /// When it ends by itself, by its own lifetime.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.expiry.map(|expiry| expiry.at)
    }

    /// Keeps what ends it in time.
    pub fn keep_timer(&self, timer: Task) {
        self.0.timer.replace(Some(timer));
    }

    /// The grant without keeping it.
    pub fn weak(&self) -> WeakGrant {
        WeakGrant(Rc::downgrade(&self.0))
    }

    /// How long it still lasts; none: it stays.
    pub fn expires_in(&self, now: Instant) -> Option<Duration> {
        let expiry = self.0.limits.expiry?;
        Some(expiry.at.saturating_duration_since(now))
    }

    /// The tightest bounds on the way to the root.
    pub fn bounds(&self, now: Instant) -> Bounds {
        let limits = &self.0.limits;
        Bounds {
            only: Some(limits.rights),
            lifetime: self.expires_in(now),
            rate: limits.rate,
            balloon_pages: limits.balloon_pages,
            memory_bytes: limits.memory_bytes,
            vsock_ports: limits.vsock_ports.clone(),
        }
    }

    /// Whether the balloon may have this size, in pages.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` naming the range.
    pub fn check_balloon(&self, pages: u64) -> Result<(), Error> {
        within(self.0.limits.balloon_pages, pages, "the balloon", "pages")
    }

    /// Whether so much memory may be plugged.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` naming the range.
    pub fn check_memory(&self, bytes: u64) -> Result<(), Error> {
        within(self.0.limits.memory_bytes, bytes, "the plugged memory", "bytes")
    }

    /// Whether this port may be connected to or listened on.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` naming those that may.
    pub fn check_port(&self, port: u32) -> Result<(), Error> {
        let ports = &self.0.limits.vsock_ports;
        if ports.is_empty() || ports.contains(&port) {
            return Ok(());
        }
        let names: Vec<_> = ports.iter().map(u32::to_string).collect();
        let message = format!("this capability does not permit port {port}, only {}", names.join(", "));
        Err(Error::new(Kind::PermissionDenied, message).about("port"))
    }
}

/// A [`Grant`] that it does not keep.
pub struct WeakGrant(Weak<Node>);

impl WeakGrant {
    /// Ends what has expired by now.
    pub fn expire(&self, now: Instant) {
        if let Some(node) = self.0.upgrade() {
            Grant(node).ended(now);
        }
    }
}

impl Limits {
    fn tighter(&self, bounds: &Bounds, expiry: Option<Expiry>) -> Result<Self, Error> {
        let rate = match (self.rate, bounds.rate) {
            (Some(one), Some(other)) => Some(CallRate {
                per_second: one.per_second.min(other.per_second),
                burst: one.burst.min(other.burst),
            }),
            (one, other) => one.or(other),
        };
        let ports = match (&self.vsock_ports[..], &bounds.vsock_ports[..]) {
            ([], asked) => asked.to_vec(),
            (all, []) => all.to_vec(),
            (all, asked) => {
                let both: Vec<_> = all.iter().copied().filter(|port| asked.contains(port)).collect();
                if both.is_empty() {
                    return Err(nothing_left("bounds.vsockPorts"));
                }
                both
            }
        };
        Ok(Self {
            rights: bounds.only.map_or(self.rights, |only| self.rights.and(only)),
            expiry: [self.expiry, expiry]
                .into_iter()
                .flatten()
                .min_by_key(|expiry| expiry.at),
            rate,
            balloon_pages: both("bounds.balloonPages", self.balloon_pages, bounds.balloon_pages)?,
            memory_bytes: both("bounds.memoryBytes", self.memory_bytes, bounds.memory_bytes)?,
            vsock_ports: ports,
        })
    }
}

fn nothing_left(field: &str) -> Error {
    let message = format!("{field} has nothing in common with what the capability permits: nothing would be left");
    Error::bad_config(field, message)
}

fn both(field: &str, one: Option<Range>, other: Option<Range>) -> Result<Option<Range>, Error> {
    let (Some(one), Some(other)) = (one, other) else {
        return Ok(one.or(other));
    };
    let (min, max) = (one.min.max(other.min), one.max.min(other.max));
    match min <= max {
        true => Ok(Some(Range { min, max })),
        false => Err(nothing_left(field)),
    }
}

fn within(range: Option<Range>, value: u64, what: &str, unit: &str) -> Result<(), Error> {
    match range {
        Some(range) if !range.contains(value) => {
            let message = format!(
                "this capability permits {what} to have {} to {} {unit}, not {value}",
                range.min, range.max
            );
            Err(Error::new(Kind::PermissionDenied, message).about(unit))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
