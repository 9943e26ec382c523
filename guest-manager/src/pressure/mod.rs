//! What the manager does when the host runs short of memory: it has guests with a balloon lend some of theirs, and gives it back later.
//!
//! ```text
//!   psi: the kernel's notices --> pressed --policy (pure)--> Ballast of each guest --> its component's BalloonController
//!   a deadline that moves on with each notice --> due -------------^
//! ```
//!
//! A guest takes part whose balloon nobody has set by hand. Nothing is watched before the first guest with a balloon runs, or while the policy is switched off.

pub mod policy;
pub(crate) mod psi;
mod server;

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use sepal_schema::transport::reactor::Task;

pub(crate) use self::server::{answer, change};
use self::{
    policy::{Calm, Policy},
    psi::{Notices, Trigger},
};
use crate::{definitions::Definitions, facets, guest::Guest, manager::Manager};

/// Bytes of a balloon's page (virtio 1.2, section 5.5.6).
const PAGE: u64 = 4096;

/// What was taken of one guest's memory by its balloon, as far as the policy is concerned.
#[derive(Debug, Default)]
pub struct Ballast {
    /// Memory of a guest that has a balloon, in bytes.
    memory: Cell<Option<u64>>,
    /// What the policy has taken, in bytes.
    taken: Cell<u64>,
    /// Somebody has set the balloon by hand.
    by_hand: Cell<bool>,
    /// A component is being told.
    busy: Cell<bool>,
}

impl Ballast {
    /// The guest has so much memory, in bytes, and a balloon; or no balloon.
    pub(crate) fn fit(&self, memory: Option<u64>) {
        self.memory.set(memory);
    }

    /// Somebody sets the balloon to so many pages, which the policy keeps its hands off; with none, the guest takes part again.
    pub(crate) fn set_by_hand(&self, pages: u32) {
        self.by_hand.set(pages > 0);
        self.taken.set(0);
    }

    /// As the manager before left it.
    pub(crate) fn go_on(&self, taken: u64, by_hand: bool) {
        self.taken.set(taken);
        self.by_hand.set(by_hand);
    }

    /// What the policy has taken, in bytes.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// Whether the policy keeps its hands off.
    pub(crate) fn is_by_hand(&self) -> bool {
        self.by_hand.get()
    }

    /// A new component has a balloon that is empty.
    pub(crate) fn begin_again(&self) {
        self.by_hand.set(false);
        self.taken.set(0);
    }
}

/// The manager's dealing with pressure.
pub struct Pressure {
    policy: Cell<Policy>,
    calm: Cell<Calm>,
    /// What its clock counts from.
    since: Instant,
    inflations: Cell<u64>,
    deflations: Cell<u64>,
    /// There has been a guest with a balloon.
    wanted: Cell<bool>,
    /// Waits for notices, as long as that is wanted.
    watching: RefCell<Option<Task>>,
    /// Gives back what was taken.
    giving: RefCell<Option<Task>>,
}

impl Default for Pressure {
    fn default() -> Self {
        Self {
            policy: Cell::default(),
            calm: Cell::default(),
            since: Instant::now(),
            inflations: Cell::new(0),
            deflations: Cell::new(0),
            wanted: Cell::new(false),
            watching: RefCell::default(),
            giving: RefCell::default(),
        }
    }
}

impl Pressure {
    /// With the policy that an earlier manager kept.
    pub(crate) fn restored(definitions: &Definitions) -> Self {
        let pressure = Self::default();
        pressure.policy.set(server::kept(definitions));
        pressure
    }

    fn now(&self) -> Duration {
        self.since.elapsed()
    }

    fn change<R>(&self, change: impl FnOnce(&mut Calm) -> R) -> R {
        let mut calm = self.calm.get();
        let result = change(&mut calm);
        self.calm.set(calm);
        result
    }

    /// The policy.
    pub fn policy(&self) -> Policy {
        self.policy.get()
    }
}

/// The guests that take part, each with its memory in bytes.
fn taking_part(manager: &Manager) -> Vec<(Rc<Guest>, u64)> {
    let guests = manager.guests().into_iter();
    let takes_part = |guest: Rc<Guest>| {
        let memory = guest.ballast.memory.get()?;
        let ready = guest.live() && guest.has_started() && !guest.is_restarting();
        (ready && !guest.ballast.by_hand.get()).then_some((guest, memory))
    };
    guests.filter_map(takes_part).collect()
}

/// What is taken at the moment, in bytes.
fn taken(manager: &Manager) -> u64 {
    taking_part(manager)
        .iter()
        .map(|(guest, _)| guest.ballast.taken.get())
        .sum()
}

/// A guest runs. With the first one that has a balloon, pressure is watched for.
pub(crate) fn started(guest: &Guest) {
    let manager = &guest.manager;
    if guest.ballast.memory.get().is_some() && !manager.pressure.wanted.replace(true) {
        watch(manager);
    }
}

/// A guest goes on that an earlier manager had: what that one took is given back when it is time.
pub(crate) fn resumed(guest: &Guest) {
    if !guest.has_started() {
        return;
    }
    started(guest);
    let manager = &guest.manager;
    let pressure = &manager.pressure;
    if guest.ballast.taken.get() > 0 && !guest.ballast.by_hand.get() {
        let (now, policy) = (pressure.now(), pressure.policy());
        pressure.change(|calm| calm.resumed(now, &policy));
        give(manager);
    }
}

/// Watches for what the policy names, if anything is to be watched for.
fn watch(manager: &Rc<Manager>) {
    let pressure = &manager.pressure;
    let policy = pressure.policy();
    pressure.watching.take();
    if !policy.enabled || !pressure.wanted.get() {
        return;
    }
    let notices = Trigger::new(&policy)
        .and_then(|trigger| Notices::new(&manager.handle, trigger).map_err(|error| error.to_string()));
    let notices = match notices {
        Ok(notices) => notices,
        Err(why) => {
            tracing::info!(
                "no balloon is filled when the host runs short of memory: nobody can tell when it does: {why}"
            );
            return;
        }
    };
    let told = Rc::downgrade(manager);
    let watching = manager.handle.spawn_owned(async move {
        loop {
            notices.next().await;
            let Some(manager) = told.upgrade() else { return };
            pressed(&manager);
        }
    });
    *pressure.watching.borrow_mut() = Some(watching);
}

/// The host runs short of memory.
pub fn pressed(manager: &Rc<Manager>) {
    let pressure = &manager.pressure;
    let policy = pressure.policy();
    if !policy.enabled {
        return;
    }
    let now = pressure.now();
    let before = pressure.calm.get().is_pressed(now, &policy);
    pressure.change(|calm| calm.pressed(now, &policy));
    let (mut changed, guests) = (0, taking_part(manager));
    for (guest, memory) in &guests {
        let taken = guest.ballast.taken.get();
        changed += u64::from(set(guest, policy.take(*memory, taken)));
    }
    pressure.inflations.set(pressure.inflations.get() + changed);
    if !before {
        let (mib, count) = (taken(manager) >> 20, guests.len());
        tracing::warn!("the host runs short of memory: {mib} MiB are taken from {count} guests with balloons");
    }
    give(manager);
}

/// Sees to it that what was taken is given back when it is time.
fn give(manager: &Rc<Manager>) {
    let mut giving = manager.pressure.giving.borrow_mut();
    giving.get_or_insert_with(|| manager.handle.spawn_owned(give_back(Rc::downgrade(manager))));
}

/// Gives back step by step what was taken, until nothing is.
async fn give_back(manager: Weak<Manager>) {
    loop {
        let Some((handle, wait)) = manager.upgrade().map(|manager| {
            let pressure = &manager.pressure;
            let deadline = pressure.calm.get().deadline().unwrap_or_default();
            (manager.handle.clone(), deadline.saturating_sub(pressure.now()))
        }) else {
            return;
        };
        handle.sleep(wait).await;
        let Some(manager) = manager.upgrade() else { return };
        let pressure = &manager.pressure;
        let (now, policy) = (pressure.now(), pressure.policy());
        if !pressure.change(|calm| calm.due(now, &policy)) {
            continue;
        }
        let mut changed = 0;
        for (guest, memory) in taking_part(&manager) {
            let taken = guest.ballast.taken.get();
            changed += u64::from(set(&guest, policy.give(memory, taken)));
        }
        pressure.deflations.set(pressure.deflations.get() + changed);
        if taken(&manager) == 0 {
            tracing::info!("the host has memory again: all that was taken from guests is given back");
            pressure.change(Calm::over);
            // This task itself: dropped when it has ended.
            let ended = pressure.giving.take();
            drop(ended);
            return;
        }
    }
}

/// Has another policy; what it does not allow to be taken is given back at once.
pub fn set_policy(manager: &Rc<Manager>, policy: Policy) {
    let pressure = &manager.pressure;
    let watches_the_same = {
        let old = pressure.policy.replace(policy);
        let what = |policy: &Policy| (policy.enabled, policy.stall_percent, policy.window);
        what(&old) == what(&policy)
    };
    let now = pressure.now();
    pressure.change(|calm| calm.changed(now, &policy));
    let mut changed = 0;
    for (guest, memory) in taking_part(manager) {
        let taken = guest.ballast.taken.get();
        changed += u64::from(set(&guest, policy.keep(memory, taken)));
    }
    pressure.deflations.set(pressure.deflations.get() + changed);
    if !watches_the_same {
        watch(manager);
    }
    // Its deadline may be another now.
    if pressure.giving.take().is_some() {
        give(manager);
    }
}

/// Has so many bytes taken from a guest; whether that is another number than before.
fn set(guest: &Rc<Guest>, bytes: u64) -> bool {
    let ballast = &guest.ballast;
    if ballast.taken.replace(bytes) == bytes {
        return false;
    }
    guest.save();
    if !ballast.busy.replace(true) {
        let guest = guest.clone();
        let handle = guest.manager.handle.clone();
        handle.spawn(async move { tell(&guest).await });
    }
    true
}

/// Tells a guest's component how much is to be taken, until that is what it was told last.
async fn tell(guest: &Guest) {
    let ballast = &guest.ballast;
    loop {
        let (bytes, generation) = (ballast.taken.get(), guest.generation());
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let told = facets::set_balloon(guest, pages).await;
        if guest.generation() != generation {
            // Its component is another now, whose balloon is empty.
            if ballast.taken.get() == 0 {
                break;
            }
            continue;
        }
        if let Err(error) = told {
            if guest.live() && !guest.is_restarting() {
                tracing::warn!(guest = &*guest.name, "its balloon cannot be set: {error}");
            }
            // It was not taken, and would not be the next time.
            ballast.by_hand.set(true);
            ballast.taken.set(0);
            break;
        }
        if ballast.taken.get() == bytes || ballast.by_hand.get() {
            break;
        }
    }
    ballast.busy.set(false);
}
