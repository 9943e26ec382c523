//! Timers of devices that tell their owners something: one that goes off once, and the pace at which changes are told.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timerfd that becomes readable once, at a time that may be changed. System calls: `timerfd_create` when it is made; `timerfd_settime` and
/// `read`.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: OwnedFd,
    at: Option<Instant>,
}

impl Alarm {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            at: None,
        })
    }

    /// Goes off at `at`, or as soon as it can if that is past; `None`: never.
    pub(crate) fn set(&mut self, at: Option<Instant>) -> io::Result<()> {
        if at == self.at {
            return Ok(());
        }
        // All zeros disarm the timer.
        let wait = at.map_or(Duration::ZERO, |at| {
            at.saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1))
        });
        let times = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &times)?;
        self.at = at;
        Ok(())
    }

    /// Whether it is going to go off.
    pub(crate) fn is_set(&self) -> bool {
        self.at.is_some()
    }

    /// Makes the descriptor unreadable again; to be called when it was readable. False: it has been set anew meanwhile.
    pub(crate) fn rang(&mut self) -> bool {
        let rang = rustix::io::read(&self.timer, &mut [0; 8]).is_ok();
        if rang {
            self.at = None;
        }
        rang
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// Tells changes at a pace: the first at once, later ones an interval after the last that was told, many as one. What is told is always the
/// latest state.
#[derive(Debug)]
pub(crate) struct Pace {
    interval: Duration,
    /// When the last one was told.
    last: Option<Instant>,
    due: bool,
}

impl Pace {
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            interval,
            last: None,
            due: false,
        }
    }

    /// Something has changed.
    pub(crate) fn changed(&mut self) {
        self.due = true;
    }

    /// Whether it is to be told now; it counts as told then.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let go = self.next().is_some_and(|at| at <= now);
        if go || (self.due && self.last.is_none()) {
            (self.due, self.last) = (false, Some(now));
            return true;
        }
        false
    }

    /// When to ask again; `None`: not before the next change.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.last.filter(|_| self.due).map(|last| last + self.interval)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_alarm_goes_off_once() {
        let mut alarm = Alarm::new().unwrap();
        let readable = |alarm: &Alarm, wait: bool| {
            // SAFETY: the alarm owns the descriptor and outlives the borrow.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(alarm.as_raw_fd()) };
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, (!wait).then_some(&now)).unwrap() == 1
        };
        alarm.set(Some(Instant::now() + Duration::from_secs(3600))).unwrap();
        assert!(!readable(&alarm, false));
        alarm.set(Some(Instant::now())).unwrap();
        assert!(readable(&alarm, true));
        alarm.rang();
        assert!(!readable(&alarm, false));
        alarm.set(Some(Instant::now())).unwrap();
        alarm.set(None).unwrap();
        assert!(!readable(&alarm, false));
    }

    proptest! {
        /// Never two within an interval, the first at once, and the last change is told in the end.
        #[test]
        fn changes_are_told_at_a_pace(steps in prop::collection::vec((0u64..500, any::<bool>()), 1..100)) {
            let start = Instant::now();
            let mut pace = Pace::new(Duration::from_secs(1));
            let (mut now, mut told, mut untold) = (start, None::<Instant>, false);
            for (wait, change) in steps {
                now += Duration::from_millis(wait);
                if change {
                    pace.changed();
                    untold = true;
                }
                let take = pace.take(now);
                let may = told.is_none_or(|told| now >= told + Duration::from_secs(1));
                prop_assert_eq!(take, untold && may);
                if take {
                    (told, untold) = (Some(now), false);
                }
                prop_assert_eq!(pace.next().is_some(), untold);
            }
            if let Some(at) = pace.next() {
                prop_assert!(pace.take(at));
            }
        }
    }
}
