//! Watchdog: the two-stage timer of an Intel 6300ESB (datasheet 300641, "Watchdog Timer (D29:F4)"), which Linux drives with `i6300esb`.
//!
//! ```text
//!              enabled                first timer out         second timer out
//!    [off] ---------------> [first] ----------------> [second] ----------------> [expired]: DeviceEvent::WatchdogExpired, WatchdogSink
//!      ^     disabled          ^ '------ reload: fed ------'                          |
//!      '--- (not if locked) ---'--------------------- reload, or enabled anew --------'
//! ```
//!
//! | where | register |
//! |---|---|
//! | configuration 0x60, 16 bits | bits 0-1 what the first timer raises (kept, raises nothing: there is no interrupt), 2 prescaler, 5 output off |
//! | configuration 0x68, 8 bits | bit 0 lock, 1 enable, 2 free running |
//! | BAR 0 + 0, + 4 | the timers' values in ticks, 20 bits |
//! | BAR 0 + 8 | bit 0: the first timer is out |
//! | BAR 0 + 0xc | bit 8 reload, bit 9 the watchdog has expired; 0x80 and 0x86 unlock the next write to this register or to a timer's |
//!
//! A tick is 2^15 periods of the PCI clock (983 us), or 2^5 (0.96 us). Time stands still while the machine is paused
//! ([`Watchdog::pause`]). Feeding costs no wake-up: the loop's timer stays as it is, and is set anew when it finds that it woke too early.
//!
//! System calls of the loop beside those of [`dispatch`](crate::dispatch): `read` and `timerfd_settime` on its timer.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::interrupt::lock;
use crate::pci::config_space::{BarWidth, ConfigSpace, Identity};
use crate::pci::{Bar, PciFunction};

pub use timer::WatchdogLoop;

use registers::Registers;

mod registers;
mod timer;

/// The function on the bus: the 6300ESB's watchdog, a base system peripheral.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25ab,
    revision: 0,
    class: 0x08_8000,
    subsystem_vendor: 0,
    subsystem: 0,
    interrupt_pin: 0,
};

/// Its only BAR, 32 bits wide.
pub const BAR: u8 = 0;
/// Bytes of the BAR: the registers take 16, and the rest of the page reads as zeroes.
pub const BAR_BYTES: u64 = 4096;

/// What is to happen when a guest does not feed its watchdog, besides the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WatchdogAction {
    /// The machine is reset.
    Reset,
    /// The machine is stopped.
    Stop,
    /// Nothing else.
    Nothing,
}

/// Carries out what a watchdog is to do.
pub trait WatchdogSink: Send + Sync {
    /// The guest did not feed its watchdog. Called on the watchdog's thread, after the event was reported: must not wait for that thread.
    fn expired(&self, action: WatchdogAction);
}

/// Where the time comes from.
pub trait MonotonicClock: Send + Sync {
    /// Time since any moment that stays the same. For [`WatchdogLoop`] it has to be the host's `CLOCK_MONOTONIC`.
    fn now(&self) -> Duration;
}

/// The host's `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostMonotonic;

impl MonotonicClock for HostMonotonic {
    fn now(&self) -> Duration {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // Not rustix's, which at its first call looks for the vDSO in ways that a jailed process has not.
        // SAFETY: `now` is a timespec that the call fills.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        // Never negative, and nanoseconds are below 10^9.
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }
}

/// What vCPUs, the control loop and the watchdog's own loop share.
struct State {
    space: ConfigSpace,
    registers: Registers,
    /// When the machine was paused, by the host's clock.
    paused_at: Option<Duration>,
    /// How long it has been paused altogether: what its own clock is behind the host's.
    behind: Duration,
    /// When the loop is going to look again, by the host's clock.
    armed: Option<Duration>,
}

impl State {
    /// The machine's own time.
    fn machine_time(&self, host: Duration) -> Duration {
        self.paused_at.unwrap_or(host).saturating_sub(self.behind)
    }

    /// When the loop has to look, by the host's clock.
    fn wanted(&self) -> Option<Duration> {
        if self.paused_at.is_some() {
            return None;
        }
        self.registers.deadline()?.checked_add(self.behind)
    }
}

/// The watchdog (see the module's head): put it on the PCI bus, and run its [`WatchdogLoop`] on a thread of its own.
pub struct Watchdog {
    state: Mutex<State>,
    clock: Arc<dyn MonotonicClock>,
    action: WatchdogAction,
    sink: Arc<dyn WatchdogSink>,
    doorbell: EventFd,
}

impl Watchdog {
    /// A watchdog that has `sink` do `action`, with the loop that lets it expire. `caused_reset`: its predecessor reset this machine, which
    /// the guest's driver can ask for.
    ///
    /// # Errors
    ///
    /// The host gave no eventfd or timerfd.
    pub fn new(
        action: WatchdogAction,
        sink: Arc<dyn WatchdogSink>,
        clock: Arc<dyn MonotonicClock>,
        caused_reset: bool,
    ) -> io::Result<(Arc<Self>, WatchdogLoop)> {
        let mut space = ConfigSpace::new(&IDENTITY);
        space
            .add_bar(BAR, BarWidth::Bits32, BAR_BYTES)
            .map_err(io::Error::other)?;
        let watchdog = Arc::new(Self {
            state: Mutex::new(State {
                space,
                registers: Registers::new(caused_reset),
                paused_at: None,
                behind: Duration::ZERO,
                armed: None,
            }),
            clock,
            action,
            sink,
            doorbell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let timer = WatchdogLoop::new(Arc::clone(&watchdog))?;
        Ok((watchdog, timer))
    }

    /// Puts its memory at `address`, a multiple of [`BAR_BYTES`] below 4 GiB, and lets it be reached, as firmware would.
    pub fn place(&self, address: u32) {
        let mut state = lock(&self.state);
        state.space.place_bar(BAR, address.into());
        state.space.enable_memory();
    }

    /// The machine is paused: the guest cannot feed its watchdog, and need not. To be called when no vCPU runs any more.
    pub fn pause(&self) {
        let now = self.clock.now();
        lock(&self.state).paused_at.get_or_insert(now);
    }

    /// The machine goes on: so does the countdown, from where it was. To be called before a vCPU runs.
    pub fn resume(&self) {
        self.with_state(|state, _| {
            if let Some(since) = state.paused_at.take() {
                state.behind += self.clock.now().saturating_sub(since);
            }
        });
    }

    /// Changes the state, and tells the loop if it has to look earlier than it is going to.
    fn with_state<R>(&self, change: impl FnOnce(&mut State, Duration) -> R) -> R {
        let mut state = lock(&self.state);
        let now = state.machine_time(self.clock.now());
        let result = change(&mut state, now);
        let wanted = state.wanted();
        let ring = wanted.is_some_and(|wanted| state.armed.is_none_or(|armed| wanted < armed));
        if ring {
            state.armed = wanted;
        }
        drop(state);
        if ring {
            // Fails only with a full counter, and then the loop has been told.
            let _ = self.doorbell.write(1);
        }
        result
    }

    /// Whether the guest is out of time, and when to look again, by the host's clock.
    fn poll(&self) -> (bool, Option<Duration>) {
        let mut state = lock(&self.state);
        let now = state.machine_time(self.clock.now());
        let expired = state.paused_at.is_none() && state.registers.expire(now);
        state.armed = state.wanted();
        (expired, state.armed)
    }

    fn act(&self) {
        self.sink.expired(self.action);
    }
}

impl PciFunction for Watchdog {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = lock(&self.state);
        state.space.read(offset, data);
        let config = state.registers.config().to_le_bytes();
        for (at, value) in [
            (registers::CONFIG, config[0]),
            (registers::CONFIG + 1, config[1]),
            (registers::LOCK, state.registers.lock()),
        ] {
            if let Some(byte) = at.checked_sub(offset).and_then(|n| data.get_mut(usize::from(n))) {
                *byte = value;
            }
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let byte = |at: u16| at.checked_sub(offset).and_then(|n| data.get(usize::from(n))).copied();
        self.with_state(|state, now| {
            state.space.write(offset, data);
            let [low, high] = state.registers.config().to_le_bytes();
            let (new_low, new_high) = (byte(registers::CONFIG), byte(registers::CONFIG + 1));
            if new_low.is_some() || new_high.is_some() {
                let config = u16::from_le_bytes([new_low.unwrap_or(low), new_high.unwrap_or(high)]);
                state.registers.set_config(config);
            }
            if let Some(value) = byte(registers::LOCK) {
                state.registers.set_lock(value, now);
            }
        });
    }

    fn bars(&self) -> Vec<Bar> {
        let state = lock(&self.state);
        let bars = state.space.bars();
        bars.filter_map(|(index, size, address)| address.map(|address| Bar { index, address, size }))
            .collect()
    }

    fn bar_moved(&self, _: u8, _: Option<u64>) {}

    fn read_bar(&self, _: u8, offset: u64, data: &mut [u8]) {
        self.with_state(|state, now| {
            for (at, byte) in (offset..).zip(data) {
                let register = state.registers.read(at & !3, now).to_le_bytes();
                // Below 4.
                *byte = register[(at & 3) as usize];
            }
        });
    }

    fn write_bar(&self, _: u8, offset: u64, data: &[u8]) {
        // Registers are written from their first byte on, as a whole or the low half; a wider write goes to both.
        if !offset.is_multiple_of(4) {
            return;
        }
        self.with_state(|state, now| {
            for (at, bytes) in (offset..).step_by(4).zip(data.chunks(4)) {
                let mut value = [0; 4];
                value[..bytes.len()].copy_from_slice(bytes);
                state.registers.write(at, u32::from_le_bytes(value), now);
            }
        });
    }
}

#[cfg(test)]
mod tests;
