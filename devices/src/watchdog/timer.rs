//! The watchdog's own thread: sleeps until the guest is out of time.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::Watchdog;
use crate::dispatch::{DeviceError, DeviceEvent, DispatchDevice, EventSet, Watches};

/// Tokens of the watched descriptors.
const DOORBELL: u32 = 0;
const TIMER: u32 = 1;

/// Lets a [`Watchdog`] expire; made by [`Watchdog::new`].
pub struct WatchdogLoop {
    watchdog: Arc<Watchdog>,
    timer: OwnedFd,
}

impl WatchdogLoop {
    pub(super) fn new(watchdog: Arc<Watchdog>) -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        Ok(Self { watchdog, timer })
    }

    /// Lets the watchdog expire if it is time, and sets the timer for when it will be.
    fn poll(&self, watches: &Watches<'_, '_>) -> Result<(), DeviceError> {
        let (expired, next) = self.watchdog.poll();
        if expired {
            watches.report(DeviceEvent::WatchdogExpired {
                device: watches.device().into(),
            });
            self.watchdog.act();
        }
        // All zeros disarm the timer; a moment that has passed makes it ready at once.
        let at = next.map_or(Duration::ZERO, |at| at.max(Duration::from_nanos(1)));
        let times = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: at.as_secs().cast_signed(),
                tv_nsec: at.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &times)?;
        Ok(())
    }
}

impl DispatchDevice for WatchdogLoop {
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        watches.add(&self.watchdog.doorbell, DOORBELL, EventSet::IN)?;
        watches.add(&self.timer, TIMER, EventSet::IN)?;
        self.poll(watches)
    }

    fn ready(&mut self, token: u32, _: EventSet, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        // Both are nonblocking and only say "look".
        if token == TIMER {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        } else {
            let _ = self.watchdog.doorbell.read();
        }
        self.poll(watches)
    }
}
