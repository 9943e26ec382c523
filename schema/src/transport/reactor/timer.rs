//! The timers of a loop: an ordered queue, and one timerfd that is armed for the earliest of them.
//!
//! The timerfd is set only when the loop goes to wait and the earliest deadline has changed since, so timers that are
//! made and dropped within a round cost no system call, and a loop without timers is never woken by one.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// Deadline and a number that tells timers with the same deadline apart.
type Key = (Instant, u64);

/// The timers that wait, in order.
#[derive(Debug, Default)]
struct Queue {
    waiting: BTreeMap<Key, Waker>,
    next: u64,
}

impl Queue {
    fn earliest(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Takes the wakers of all timers that are due at `now`.
    fn expire(&mut self, now: Instant, woken: &mut Vec<Waker>) {
        while let Some(entry) = self.waiting.first_entry() {
            if entry.key().0 > now {
                break;
            }
            woken.push(entry.remove());
        }
    }
}

/// The timers of one loop.
pub(super) struct Timers {
    queue: RefCell<Queue>,
    armed: RefCell<Option<Instant>>,
    fd: OwnedFd,
}

impl Timers {
    pub(super) fn new() -> io::Result<Self> {
        let fd = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        Ok(Self {
            queue: RefCell::default(),
            armed: RefCell::new(None),
            fd,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sets the timerfd for the earliest deadline, if that has changed.
    pub(super) fn arm(&self) -> io::Result<()> {
        let earliest = self.queue.borrow().earliest();
        if earliest == *self.armed.borrow() {
            return Ok(());
        }
        let value = match earliest {
            // All zero disarms.
            None => Timespec { tv_sec: 0, tv_nsec: 0 },
            Some(deadline) => {
                let left = deadline
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_nanos(1));
                Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                }
            }
        };
        let spec = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: value,
        };
        rustix::time::timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec)?;
        *self.armed.borrow_mut() = earliest;
        Ok(())
    }

    /// The timerfd is readable: takes the wakers of what is due.
    pub(super) fn fired(&self, woken: &mut Vec<Waker>) {
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        *self.armed.borrow_mut() = None;
        self.queue.borrow_mut().expire(Instant::now(), woken);
    }
}

/// Waits until a point in time. Dropping it forgets the timer.
#[must_use = "futures do nothing unless polled"]
pub struct Sleep {
    timers: Rc<Timers>,
    deadline: Instant,
    key: Option<Key>,
}

impl std::fmt::Debug for Sleep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sleep")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Sleep {
    pub(super) fn new(timers: Rc<Timers>, deadline: Instant) -> Self {
        Self {
            timers,
            deadline,
            key: None,
        }
    }

    fn forget(&mut self) {
        if let Some(key) = self.key.take() {
            self.timers.queue.borrow_mut().waiting.remove(&key);
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            self.forget();
            return Poll::Ready(());
        }
        let this = &mut *self;
        let mut queue = this.timers.queue.borrow_mut();
        let key = *this.key.get_or_insert_with(|| {
            queue.next += 1;
            (this.deadline, queue.next)
        });
        queue.waiting.insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::task::noop_waker;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn exactly_the_due_timers_expire(deadlines in prop::collection::vec(0u64..50, 0..40), now in 0u64..60) {
            let base = Instant::now();
            let at = |n| base + Duration::from_millis(n);
            let mut queue = Queue::default();
            for &deadline in &deadlines {
                queue.next += 1;
                let key = (at(deadline), queue.next);
                queue.waiting.insert(key, noop_waker());
            }
            prop_assert_eq!(queue.earliest(), deadlines.iter().min().map(|n| at(*n)));
            let mut woken = Vec::new();
            queue.expire(at(now), &mut woken);
            prop_assert_eq!(woken.len(), deadlines.iter().filter(|n| **n <= now).count());
            prop_assert!(queue.earliest().is_none_or(|next| next > at(now)));
        }
    }
}
