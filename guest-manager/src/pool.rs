//! Components that wait for their guests: started, jailed and sealed ahead of time, so that a launch finds one ready.
//!
//! ```text
//!   a seat:   empty --(a rest)--> starting --> waiting --(taken by a launch)--> empty
//!               ^                    | fails      | dies
//!               '----- the pool's ---'------------'
//!                      back-off
//! ```
//!
//! There are as many seats as components may wait, each looked after by a task of its own. What waits was started with the default jail, all of its layers and no
//! limits: a configuration that asks for anything else of its process (limits, waived layers) gets one that is started for it, as everything does when
//! nobody waits. So whoever takes one has exactly what a start would have given; nothing of a guest has touched it before.
//!
//! What makes one component fail makes all of them fail: the back-off is the pool's, all seats wait for it, and it is told of once.
//!
//! A seat rests before it is filled again, since the launch that emptied it needs the processor now. Those who wait end with the keeper, like all components,
//! and with whatever ends the pool.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    os::fd::OwnedFd,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use futures::{
    FutureExt,
    channel::oneshot,
    future::{Either, LocalBoxFuture, select},
};
use rustix::event::{PollFd, PollFlags, Timespec};
use sepal_schema::{
    config::Limits as ResourceLimits,
    error::{Error, Kind},
    transport::Handle,
};

use crate::{
    changed::Changed,
    component::{ComponentStarter, Exit, StartRequest, Started, last_words},
};

/// The most components that may wait; each costs the host about a megabyte.
pub const MOST: usize = 64;

/// How long an empty seat rests before somebody is started for it: about as long as a launch takes.
const REST: Duration = Duration::from_millis(10);
/// How long the pool waits after a component that failed, at first; twice as long after each that follows.
const FIRST_BACK_OFF: Duration = Duration::from_millis(100);
/// The longest that it waits.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);
/// A component that waited this long before it died does not count as failed in a row.
const PROVEN: Duration = Duration::from_secs(60);

/// What those who wait are called in the log.
const NAME: &str = "(waiting)";

/// A starter that keeps components waiting. Dropping the last clone ends those who wait.
#[derive(Clone)]
pub struct Pool(Rc<Shared>);

struct Shared {
    starter: Rc<dyn ComponentStarter>,
    /// In the order in which they were started.
    waiting: Changed<VecDeque<Waiting>>,
    back_off: RefCell<BackOff>,
}

/// A component that waits. Dropping it kills it.
struct Waiting {
    seat: usize,
    started: Option<Started>,
    /// Tells its seat that it was taken; dropped with it otherwise.
    taken: Option<oneshot::Sender<()>>,
}

impl Pool {
    /// Keeps `size` components waiting, [`MOST`] at most, which `starter` starts; it also starts all others.
    #[must_use]
    pub fn new(handle: &Handle, starter: Rc<dyn ComponentStarter>, size: usize) -> Self {
        let shared = Rc::new(Shared {
            starter,
            waiting: Changed::default(),
            back_off: RefCell::default(),
        });
        for seat in 0..size.min(MOST) {
            handle.spawn(look_after(Rc::downgrade(&shared), handle.clone(), seat));
        }
        Self(shared)
    }

    /// How many components wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting.look(VecDeque::len)
    }

    /// Waits until so many components wait.
    pub async fn until_waiting(&self, wanted: usize) {
        let there = |waiting: &mut VecDeque<_>| (waiting.len() == wanted).then_some(());
        self.0.waiting.until(there).await;
    }
}

impl ComponentStarter for Pool {
    fn start(&self, request: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>> {
        let taken = is_plain(&request).then(|| self.0.take()).flatten();
        match taken {
            Some(mut waiting) => {
                // Its seat is free, also if the launch is given up before this is polled: then dropping what waits kills it.
                waiting.taken.take().map(|taken| taken.send(()));
                Box::pin(async move {
                    waiting
                        .started
                        .take()
                        .ok_or_else(|| Error::new(Kind::StartFailure, "a component was taken twice"))
                })
            }
            None => self.0.starter.start(request),
        }
    }

    fn check(&self, request: &StartRequest) -> Result<(), Error> {
        self.0.starter.check(request)
    }

    fn set_limits(&self, pid: u32, limits: ResourceLimits) -> LocalBoxFuture<'static, Result<(), Error>> {
        self.0.starter.set_limits(pid, limits)
    }

    fn outlived(&self) -> Result<(), Error> {
        self.0.starter.outlived()
    }

    fn keep_for_successor(&self, kept: BTreeMap<String, OwnedFd>) -> Result<(), Error> {
        self.0.starter.keep_for_successor(kept)
    }
}

/// Whether a component that knows nothing of the request can serve it.
fn is_plain(request: &StartRequest) -> bool {
    // All fields are named, so that a new one has to be thought of here.
    let StartRequest {
        name: _,
        limits,
        waived_layers,
    } = request;
    *limits == ResourceLimits::default() && waived_layers.is_empty()
}

impl Shared {
    /// Who has waited longest, and lives.
    fn take(&self) -> Option<Waiting> {
        loop {
            let first = self.remove(|_| true)?;
            if first.lives() {
                let pid = first.started.as_ref().map_or(0, |started| started.pid);
                let waiting = self.waiting.look(VecDeque::len);
                tracing::debug!(pid, waiting, "a waiting component is taken");
                return Some(first);
            }
        }
    }

    fn add(&self, waiting: Waiting) {
        let pid = waiting.started.as_ref().map_or(0, |started| started.pid);
        let count = self.waiting.change(|all| {
            all.push_back(waiting);
            all.len()
        });
        tracing::debug!(pid, waiting = count, "a component waits");
    }

    fn remove(&self, wanted: impl Fn(&Waiting) -> bool) -> Option<Waiting> {
        self.waiting.change(|all| {
            let index = all.iter().position(wanted)?;
            all.remove(index)
        })
    }

    /// A component failed; see [`BackOff::failed`].
    fn failed(&self, since: Instant, why: &str) {
        let pause = self.back_off.borrow_mut().failed(since, Instant::now());
        if let Some(pause) = pause {
            let pause = pause.as_millis();
            tracing::warn!("no component waits in advance, for {pause} ms: {why}");
        }
    }
}

impl Waiting {
    /// Whether its process is there. Before it is asked for anything a component says nothing, so all that can be there to be read is the end.
    fn lives(&self) -> bool {
        let Some(started) = &self.started else { return false };
        let mut poll = [PollFd::new(&started.socket, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut poll, Some(&at_once)), Ok(0))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(started) = &self.started {
            (started.kill)();
        }
    }
}

/// Keeps one seat filled for as long as the pool is there.
async fn look_after(pool: Weak<Shared>, handle: Handle, seat: usize) {
    loop {
        handle.sleep(REST).await;
        // Another seat may have made the pause longer meanwhile.
        let shared = loop {
            let Some(shared) = pool.upgrade() else { return };
            let pause = shared.back_off.borrow().pause(Instant::now());
            if pause.is_zero() {
                break shared;
            }
            drop(shared);
            handle.sleep(pause).await;
        };
        let request = StartRequest {
            name: NAME.into(),
            limits: ResourceLimits::default(),
            waived_layers: Vec::new(),
        };
        let begun = Instant::now();
        let starting = shared.starter.start(request);
        drop(shared);
        let started = starting.await;
        let Some(shared) = pool.upgrade() else {
            if let Ok(started) = started {
                (started.kill)();
            }
            return;
        };
        let mut started = match started {
            Ok(started) => started,
            Err(error) => {
                shared.failed(begun, &error.message);
                continue;
            }
        };
        // Told twice: here, and to whoever takes it.
        let exit = started.exit.shared();
        started.exit = Box::pin(exit.clone());
        let words = started.stderr.as_ref().and_then(|stderr| stderr.try_clone().ok());
        let (taken, is_taken) = oneshot::channel();
        let since = Instant::now();
        shared.add(Waiting {
            seat,
            started: Some(started),
            taken: Some(taken),
        });
        drop(shared);
        let died = match select(is_taken, exit).await {
            Either::Left((Ok(()), _)) => None,
            // Dropped: it was found dead, or its taker has gone; or the pool is.
            Either::Left((Err(_), exit)) => Some(exit.await),
            Either::Right((exit, _)) => Some(exit),
        };
        let Some(shared) = pool.upgrade() else { return };
        if died.is_none() || since.elapsed() >= PROVEN {
            shared.back_off.borrow_mut().served(begun);
        }
        let Some(exit) = died else { continue };
        drop(shared.remove(|waiting| waiting.seat == seat));
        shared.failed(Instant::now(), &ended(&exit, words.and_then(last_words)));
    }
}

/// How a component ended that nobody had asked for anything, and what it said.
fn ended(exit: &Exit, words: Option<String>) -> String {
    match words {
        Some(words) => format!("it {exit}: {words}"),
        None => format!("it {exit}"),
    }
}

/// How the components of a pool have failed of late.
#[derive(Debug, Default)]
struct BackOff {
    /// Failures in a row that counted.
    failures: u32,
    /// When the last of them was.
    last: Option<Instant>,
}

impl BackOff {
    /// How long nobody is started.
    fn pause(&self, now: Instant) -> Duration {
        let until = self.last.map(|last| last + back_off(self.failures));
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// A component failed at `now` whose start was begun at `since`, or that died after that, with `since` as `now`. Returns the pause that follows; none
    /// where it failed together with another, which counted for both.
    fn failed(&mut self, since: Instant, now: Instant) -> Option<Duration> {
        if !self.pause(now).is_zero() || self.last.is_some_and(|last| since < last) {
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        self.last = Some(now);
        Some(back_off(self.failures))
    }

    /// A component served that was begun at `begun`. That ends the row, unless others have failed since.
    fn served(&mut self, begun: Instant) {
        if self.last.is_none_or(|last| last < begun) {
            *self = Self::default();
        }
    }
}

/// How long nobody is started after so many failures in a row, of which there is one at least.
fn back_off(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST_BACK_OFF * (1 << doublings)).min(LONGEST_BACK_OFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_in_a_row_waits_longer_and_none_for_ever() {
        assert_eq!(back_off(1), FIRST_BACK_OFF);
        assert_eq!(back_off(2), FIRST_BACK_OFF * 2);
        for failures in 1..100 {
            assert!(back_off(failures) <= back_off(failures + 1));
        }
        assert_eq!(back_off(u32::MAX), LONGEST_BACK_OFF);
    }

    #[test]
    fn those_who_fail_together_count_once() {
        let (mut back_off, start) = (BackOff::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(back_off.failed(at(0), at(10)), Some(FIRST_BACK_OFF));
        assert_eq!(back_off.failed(at(0), at(11)), None, "during the pause");
        assert_eq!(
            back_off.failed(at(9), at(500)),
            None,
            "begun before the failure that counted"
        );
        assert_eq!(back_off.pause(at(50)), Duration::from_millis(60));
        assert_eq!(back_off.pause(at(110)), Duration::ZERO);
        assert_eq!(back_off.failed(at(110), at(120)), Some(FIRST_BACK_OFF * 2));
    }

    #[test]
    fn only_one_that_came_after_the_failure_ends_the_row() {
        let (mut back_off, start) = (BackOff::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        back_off.failed(at(0), at(10));
        back_off.served(at(5));
        assert_eq!(back_off.pause(at(10)), FIRST_BACK_OFF);
        back_off.served(at(120));
        assert_eq!(back_off.failed(at(130), at(140)), Some(FIRST_BACK_OFF));
    }

    #[test]
    fn only_what_asks_for_nothing_of_its_process_takes_one_that_waits() {
        let plain = StartRequest {
            name: "g".into(),
            limits: ResourceLimits::default(),
            waived_layers: Vec::new(),
        };
        assert!(is_plain(&plain));
        let limited = ResourceLimits {
            tasks: 9,
            ..ResourceLimits::default()
        };
        assert!(!is_plain(&StartRequest {
            limits: limited,
            ..plain.clone()
        }));
        assert!(!is_plain(&StartRequest {
            waived_layers: vec!["landlock".into()],
            ..plain
        }));
    }
}
