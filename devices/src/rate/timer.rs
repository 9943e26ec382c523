//! The timer of a limited device: a limiter on the monotonic clock, and a timerfd for its loop to sleep on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Instant;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::{RateLimit, RateLimiter};

/// A [`RateLimiter`] with a clock and a timerfd, which its owner watches.
///
/// ```text
///   admit(bytes) -- true: go on
///                '- false: the timer is set; its descriptor becomes readable --> expired(), admit(bytes) again
/// ```
///
/// System calls: `timerfd_create` when it is made; `timerfd_settime`, `read`, and `clock_gettime` where the vDSO has no clock.
#[derive(Debug)]
pub struct RateTimer {
    limiter: RateLimiter,
    started: Instant,
    timer: OwnedFd,
}

impl RateTimer {
    /// A timer for `limit`; `None` if nothing is limited.
    ///
    /// # Errors
    ///
    /// The host gives no timerfd.
    pub fn new(limit: &RateLimit) -> io::Result<Option<Self>> {
        if !limit.is_limited() {
            return Ok(None);
        }
        Ok(Some(Self {
            limiter: RateLimiter::new(limit, 0),
            started: Instant::now(),
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
        }))
    }

    /// Whether one operation of `bytes` bytes may pass now. If not, the timer is set for when it may, in place of what it was set to.
    ///
    /// # Errors
    ///
    /// The timer cannot be set.
    pub fn admit(&mut self, bytes: u64) -> io::Result<bool> {
        // 2^64 ns are 584 years.
        let now = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let Err(wait) = self.limiter.take(now, bytes) else {
            return Ok(true);
        };
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                // Both fit: the seconds are below 2^35.
                tv_sec: (wait / 1_000_000_000) as i64,
                tv_nsec: (wait % 1_000_000_000) as i64,
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(false)
    }

    /// Makes the descriptor unreadable again. To be called when it was readable.
    pub fn expired(&self) {
        // EAGAIN: the timer has been set anew meanwhile.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }
}

impl AsRawFd for RateTimer {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

impl AsFd for RateTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
