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
    /// Whose the balloon is, and how large it is to be.
    held: Cell<Held>,
    /// A component is being told.
    busy: Cell<bool>,
    /// How often it became another's: somebody set it, or the guest began again.
    turns: Cell<u64>,
}

/// What is known of a balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    /// What the policy wants taken, in bytes.
    taken: u64,
    /// What its component took on last for the policy, in bytes.
    told: u64,
    /// Somebody has set the balloon by hand.
    by_hand: bool,
    /// Its component takes on no more.
    refuses: bool,
}

/// What was known of a balloon before somebody set it by hand.
pub(crate) struct Before {
    held: Held,
    turn: u64,
}

impl Ballast {
    /// The guest has so much memory, in bytes, and a balloon; or no balloon.
    pub(crate) fn fit(&self, memory: Option<u64>) {
        self.memory.set(memory);
    }

    /// Somebody sets the balloon to so many pages, which the policy keeps its hands off; with none, the guest takes part again.
    pub(crate) fn set_by_hand(&self, pages: u32) -> Before {
        let held = self.pass_on(Held {
            by_hand: pages > 0,
            ..Held::default()
        });
        Before {
            held,
            turn: self.turns.get(),
        }
    }

    /// The component has not done what somebody wanted by hand: the balloon is as it was, unless it has become another's since.
    pub(crate) fn put_back(&self, before: &Before) {
        if self.turns.get() == before.turn {
            self.held.set(before.held);
        }
    }

    /// As the manager before left it.
    pub(crate) fn go_on(&self, taken: u64, by_hand: bool) {
        self.held.set(Held {
            taken,
            told: taken,
            by_hand,
            refuses: false,
        });
    }

    /// What the next manager is to give back, in bytes: also what is being given back, until the component has been told.
    pub(crate) fn taken(&self) -> u64 {
        let held = self.held.get();
        held.taken.max(held.told)
    }

    /// Whether the policy keeps its hands off.
    pub(crate) fn is_by_hand(&self) -> bool {
        self.held.get().by_hand
    }

    /// A new component has a balloon that is empty.
    pub(crate) fn begin_again(&self) {
        self.pass_on(Held::default());
    }

    /// The balloon becomes another's. What it was before.
    fn pass_on(&self, to: Held) -> Held {
        self.turns.set(self.turns.get().wrapping_add(1));
        self.held.replace(to)
    }

    /// What the policy wants taken, in bytes.
    fn wanted(&self) -> u64 {
        self.held.get().taken
    }

    /// The policy wants so much taken; whether that is another number than before.
    fn want(&self, bytes: u64) -> bool {
        let held = self.held.get();
        self.held.set(Held { taken: bytes, ..held });
        held.taken != bytes
    }

    /// The component has taken on what it was told.
    fn agreed(&self, bytes: u64) {
        self.held.set(Held {
            told: bytes,
            ..self.held.get()
        });
    }

    /// The component has not taken on what it was told, and would not the next time. What it has taken on before is still to be given back; unless that is
    /// what it refuses.
    fn refused(&self, bytes: u64) {
        let held = self.held.get();
        let left = if bytes > held.told { held.told } else { 0 };
        self.held.set(Held {
            taken: left,
            told: left,
            refuses: true,
            ..held
        });
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
        (ready && !guest.ballast.is_by_hand()).then_some((guest, memory))
    };
    guests.filter_map(takes_part).collect()
}

/// What is taken at the moment, in bytes.
fn taken(manager: &Manager) -> u64 {
    taking_part(manager)
        .iter()
        .map(|(guest, _)| guest.ballast.wanted())
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
    if guest.ballast.wanted() > 0 && !guest.ballast.is_by_hand() {
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
    let (mut changed, mut guests) = (0, taking_part(manager));
    guests.retain(|(guest, _)| !guest.ballast.held.get().refuses);
    for (guest, memory) in &guests {
        let taken = guest.ballast.wanted();
        changed += u64::from(set(guest, policy.take(*memory, taken)));
    }
    pressure.inflations.set(pressure.inflations.get() + changed);
    if !before {
        let (mib, count) = (taken(manager) >> 20, guests.len());
        match count {
            0 => tracing::warn!(
                "the host runs short of memory, and there is no guest with a balloon to take some from now"
            ),
            _ => tracing::warn!("the host runs short of memory: {mib} MiB are taken from {count} guests with balloons"),
        }
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
            let taken = guest.ballast.wanted();
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
        let taken = guest.ballast.wanted();
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
    if !ballast.want(bytes) {
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
        let (bytes, turn) = (ballast.wanted(), ballast.turns.get());
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let told = facets::set_balloon(guest, pages).await;
        if ballast.turns.get() != turn {
            // Its component is another now, whose balloon is empty; or somebody has set it since, to nothing at the end if anything is to be taken.
            if ballast.wanted() == 0 {
                break;
            }
            continue;
        }
        let kept = ballast.taken();
        match told {
            Ok(()) => ballast.agreed(bytes),
            Err(error) => {
                if guest.live() && !guest.is_restarting() {
                    tracing::warn!(guest = &*guest.name, "its balloon cannot be set: {error}");
                }
                ballast.refused(bytes);
            }
        }
        if ballast.taken() != kept {
            guest.save();
        }
        let held = ballast.held.get();
        if held.taken == held.told {
            break;
        }
    }
    ballast.busy.set(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_forgotten_before_the_component_has_given_it_back() {
        let ballast = Ballast::default();
        assert!(ballast.want(10) && !ballast.want(10));
        assert_eq!(ballast.taken(), 10, "also before it is told");
        ballast.agreed(10);
        assert!(ballast.want(0));
        assert_eq!(
            (ballast.wanted(), ballast.taken()),
            (0, 10),
            "whoever comes next gives it back"
        );
        ballast.agreed(0);
        assert_eq!(ballast.taken(), 0);
        ballast.go_on(20, false);
        assert!(ballast.want(15));
        assert_eq!(ballast.taken(), 20);
    }

    #[test]
    fn what_a_component_refuses_was_not_taken_and_the_rest_still_is() {
        let ballast = Ballast::default();
        ballast.want(10);
        ballast.agreed(10);
        ballast.want(20);
        ballast.refused(20);
        assert_eq!(
            (ballast.wanted(), ballast.taken(), ballast.held.get().refuses),
            (10, 10, true)
        );
        // Nobody asks for ever for what is not given back.
        ballast.want(5);
        ballast.refused(5);
        assert_eq!((ballast.wanted(), ballast.taken()), (0, 0));
        ballast.begin_again();
        assert_eq!(ballast.held.get(), Held::default());
    }

    #[test]
    fn who_sets_it_by_hand_and_fails_has_changed_nothing() {
        let ballast = Ballast::default();
        ballast.want(10);
        ballast.agreed(10);
        let before = ballast.set_by_hand(7);
        assert_eq!((ballast.taken(), ballast.is_by_hand()), (0, true));
        ballast.put_back(&before);
        assert_eq!((ballast.taken(), ballast.is_by_hand()), (10, false));
        let before = ballast.set_by_hand(7);
        ballast.set_by_hand(8);
        ballast.put_back(&before);
        assert!(ballast.is_by_hand(), "somebody else has set it since");
    }
}
