//! The clock's own thread: sleeps until the next event that interrupts.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::{HostClock, Interrupt, Rtc, WallClock};
use crate::dispatch::{DeviceError, DispatchDevice, EventSet, Watches};

/// Tokens of the watched descriptors.
const DOORBELL: u32 = 0;
const TIMER: u32 = 1;

/// Raises the interrupts of an [`Rtc`]; made by [`Rtc::with_interrupt`].
pub struct RtcLoop {
    rtc: Arc<Rtc>,
    timer: OwnedFd,
    armed: bool,
}

impl RtcLoop {
    pub(super) fn new(rtc: Arc<Rtc>) -> io::Result<Self> {
        // The wall clock's timer, since it also wakes when the host's time is set.
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self {
            rtc,
            timer,
            armed: false,
        })
    }

    /// Lets what is due happen, and sets the timer for what comes next.
    fn poll(&mut self) -> Result<(), DeviceError> {
        let next = self.rtc.poll();
        if next.is_none() && !self.armed {
            return Ok(());
        }
        // All zeros disarm the timer.
        let at = next.map_or(Duration::ZERO, |wait| HostClock.now().saturating_add(wait));
        let at = Timespec {
            tv_sec: at.as_secs() as i64,
            tv_nsec: at.subsec_nanos().into(),
        };
        let times = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: at,
        };
        timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET,
            &times,
        )?;
        self.armed = next.is_some();
        Ok(())
    }
}

impl DispatchDevice for RtcLoop {
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        if let Some(Interrupt { doorbell, .. }) = &self.rtc.interrupt {
            watches.add(doorbell, DOORBELL, EventSet::IN)?;
        }
        watches.add(&self.timer, TIMER, EventSet::IN)?;
        self.poll()
    }

    fn ready(&mut self, token: u32, _: EventSet, _: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        // Both are nonblocking and only say "look": an expired timer, one whose clock was set (ECANCELED), a ring.
        if token == TIMER {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        } else if let Some(Interrupt { doorbell, .. }) = &self.rtc.interrupt {
            let _ = doorbell.read();
        }
        self.poll()
    }

    fn stop(&mut self, _: Instant) {
        self.rtc.disable_interrupts();
    }

    fn quarantine(&mut self) {
        self.rtc.disable_interrupts();
    }
}
