//! The balloon's owner's side, and what it shares with the device.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::stats::{MOST_WAITERS, MemoryStats, StatsError, Waiter};
use crate::interrupt::lock;

/// How large the balloon is, in pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonSize {
    /// What the guest says that it has lent; 0 while no driver is there.
    pub current: u32,
    /// What it is asked for.
    pub requested: u32,
}

/// What the balloon has done since it was made, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Given back to the host by inflating.
    pub inflated: u64,
    /// Given back to the host by free page reporting.
    pub reported: u64,
    /// What the host refused to take back.
    pub refused: u64,
}

/// What the owner has asked for and the device has not seen yet.
pub(super) struct Asked {
    pub(super) target: u32,
    pub(super) waiters: Vec<Waiter>,
    pub(super) latest: Option<MemoryStats>,
    /// The device is gone: nobody will answer.
    gone: bool,
}

/// What device and owner share.
pub(super) struct Shared {
    pub(super) bell: EventFd,
    pub(super) asked: Mutex<Asked>,
    pub(super) current: AtomicU32,
    pub(super) inflated: AtomicU64,
    pub(super) reported: AtomicU64,
    pub(super) refused: AtomicU64,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            asked: Mutex::new(Asked {
                target: 0,
                waiters: Vec::new(),
                latest: None,
                gone: false,
            }),
            current: AtomicU32::new(0),
            inflated: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// The device goes: whoever asks is told so, from those on whom it has not seen yet.
    pub(super) fn close(&self) {
        let waiters = {
            let mut asked = lock(&self.asked);
            asked.gone = true;
            std::mem::take(&mut asked.waiters)
        };
        for waiter in waiters {
            (waiter.callback)(Err(StatsError::Gone));
        }
    }
}

/// The balloon's owner's side. Nothing here waits.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Asks the guest for a balloon of so many pages of 4096 bytes. It may take its time, or never get there.
    pub fn set_target(&self, pages: u32) {
        lock(&self.0.asked).target = pages;
        self.ring();
    }

    /// How large it is and is to be.
    pub fn size(&self) -> BalloonSize {
        BalloonSize {
            current: self.0.current.load(Ordering::Relaxed),
            requested: lock(&self.0.asked).target,
        }
    }

    /// What was given back to the host.
    pub fn stats(&self) -> BalloonStats {
        BalloonStats {
            inflated: self.0.inflated.load(Ordering::Relaxed),
            reported: self.0.reported.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }

    /// Asks the guest how it fares. `callback` is called once: with the guest's answer, or why there is none, at the latest `timeout` from now.
    /// It is called on the device's thread, or at once if the device is gone or too many wait, and must not block. Several may ask at a time.
    pub fn request_stats(
        &self,
        timeout: Duration,
        callback: impl FnOnce(Result<MemoryStats, StatsError>) + Send + 'static,
    ) {
        let now = Instant::now();
        let waiter = Waiter {
            // A time beyond what the clock can tell: a day will do.
            deadline: now.checked_add(timeout).unwrap_or(now + Duration::from_secs(24 * 3600)),
            callback: Box::new(callback),
        };
        let mut asked = lock(&self.0.asked);
        let refusal = match asked.gone {
            true => Some(StatsError::Gone),
            // A device that hangs does not come to take them.
            false => (asked.waiters.len() >= MOST_WAITERS).then_some(StatsError::Busy),
        };
        if let Some(error) = refusal {
            drop(asked);
            (waiter.callback)(Err(error));
            return;
        }
        asked.waiters.push(waiter);
        drop(asked);
        self.ring();
    }

    /// What the guest said last: when somebody asked, or of itself when its driver began.
    pub fn latest_stats(&self) -> Option<MemoryStats> {
        lock(&self.0.asked).latest.clone()
    }

    fn ring(&self) {
        // Fails only with a full counter, and then the device has been told.
        let _ = self.0.bell.write(1);
    }
}
