//! Real-time clock with CMOS memory (Motorola MC146818A datasheet), at ports 0x70 (index) and 0x71 (data).
//!
//! Time is the host's, UTC, plus what the guest made of it by setting the clock; the guest's setting lasts as long as the machine.
//!
//! ```text
//!                SET bit, or divider held in reset
//!     Running ------------------------------------> Stopped: time registers are plain bytes
//!        ^     <------------------------------------
//!     time = host clock + offset       both clear: offset = the bytes' time - host clock
//! ```
//!
//! Nothing ticks while nobody looks: time is computed when it is read, and register C's flags from the time that has gone by since the
//! last look. Only with an interrupt enabled does [`RtcLoop`] sleep until the next event (alarm, end of update, period), and not while
//! the guest still has to read register C for the last one. A clock made without a line has no interrupt enable bits: they read 0.
//!
//! "Update in progress" is set for the last 2.2 ms of each second (the chip's tBUC + tUC: 244 us + 1984 us), and the registers change at its
//! end; so a driver that sees it clear has at least as long to read as the chip grants. Day-of-week and daylight saving are not the
//! guest's to set: the former follows from the date, the latter is off.
//!
//! System calls of the loop beside those of [`dispatch`](crate::dispatch): `read` and `timerfd_settime` on its timer.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::ByteDevice;
use crate::interrupt::{InterruptLine, LevelLatch, lock, publish};

pub use timer::RtcLoop;

use chip::Chip;

mod calendar;
mod chip;
mod timer;

/// Ports of the device.
pub const PORTS: u64 = 2;

/// Offset of the index port.
pub const INDEX: u64 = 0;
/// Offset of the data port.
pub const DATA: u64 = 1;

/// CMOS index of the century, as on most PCs.
const CENTURY: u8 = 0x32;

/// Where the time comes from.
pub trait WallClock: Send + Sync {
    /// Time since 1970-01-01 00:00 UTC.
    fn now(&self) -> Duration;
}

/// The host's wall clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl WallClock for HostClock {
    fn now(&self) -> Duration {
        // A host that believes in a time before 1970 gets 1970.
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
    }
}

/// The guest's memory, as firmware would leave its size in CMOS memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemorySizes {
    /// Bytes below 4 GiB.
    pub below_4g: u64,
    /// Bytes from 4 GiB on.
    pub above_4g: u64,
}

/// What both sides share.
struct State {
    index: u8,
    chip: Chip,
    latch: LevelLatch,
}

/// How the clock interrupts.
struct Interrupt {
    line: Arc<dyn InterruptLine>,
    /// Tells the loop that the next event may have moved.
    doorbell: EventFd,
}

/// The clock (see the module's head): put it on the port bus at 0x70, two ports long.
pub struct Rtc {
    state: Mutex<State>,
    clock: Arc<dyn WallClock>,
    interrupt: Option<Interrupt>,
}

impl Rtc {
    /// A clock without interrupts.
    pub fn new(clock: Arc<dyn WallClock>, memory: MemorySizes) -> Arc<Self> {
        Self::build(clock, memory, None)
    }

    /// A clock that raises `line` (a level, until register C is read; an edge-triggered pin serves as well), with the loop that does so.
    ///
    /// # Errors
    ///
    /// The host gave no eventfd or timerfd.
    pub fn with_interrupt(
        clock: Arc<dyn WallClock>,
        memory: MemorySizes,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<(Arc<Self>, RtcLoop)> {
        let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let rtc = Self::build(clock, memory, Some(Interrupt { line, doorbell }));
        let timer = RtcLoop::new(Arc::clone(&rtc))?;
        Ok((rtc, timer))
    }

    fn build(clock: Arc<dyn WallClock>, memory: MemorySizes, interrupt: Option<Interrupt>) -> Arc<Self> {
        let chip = Chip::new(clock.now(), memory, interrupt.is_some());
        Arc::new(Self {
            state: Mutex::new(State {
                index: 0,
                chip,
                latch: LevelLatch::default(),
            }),
            clock,
            interrupt,
        })
    }

    /// An access of the guest: changes the chip, then brings the line and the loop up to date.
    fn access<R>(&self, change: impl FnOnce(&mut State, Duration) -> R) -> R {
        let (moved, result) = self.with_chip(|state, now| {
            let before = state.chip.next_event(now);
            let result = change(state, now);
            (state.chip.next_event(now) != before, result)
        });
        if moved && let Some(Interrupt { doorbell, .. }) = &self.interrupt {
            // Fails only with a full counter, and then the loop has been told.
            let _ = doorbell.write(1);
        }
        result
    }

    /// Lets time's events happen: how long until the next one.
    fn poll(&self) -> Option<Duration> {
        self.with_chip(|state, now| {
            state.chip.advance(now);
            state.chip.next_event(now)
        })
    }

    /// Changes the chip under the lock, then moves the line to where it belongs.
    fn with_chip<R>(&self, change: impl FnOnce(&mut State, Duration) -> R) -> R {
        let mut state = lock(&self.state);
        let now = self.clock.now();
        let result = change(&mut state, now);
        let level = state.chip.interrupt();
        let publisher = state.latch.update(level);
        drop(state);
        if publisher && let Some(Interrupt { line, .. }) = &self.interrupt {
            publish(&self.state, |state| &mut state.latch, &**line);
        }
        result
    }

    /// The loop has ended: nothing can interrupt any more.
    fn disable_interrupts(&self) {
        self.with_chip(|state, _| state.chip.disable_interrupts());
    }
}

impl ByteDevice for Rtc {
    fn read_byte(&self, offset: u64) -> u8 {
        match offset {
            DATA => self.access(|state, now| state.chip.read(state.index, now)),
            // The index port is write-only.
            _ => 0xff,
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        match offset {
            // Bit 7 masks NMIs, of which there are none to mask.
            INDEX => lock(&self.state).index = value & 0x7f,
            DATA => self.access(|state, now| state.chip.write(state.index, value, now)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
