//! The watchdog's registers and its countdown. Pure: time comes from the caller, as the time since any moment that stays the same.

use std::time::Duration;

/// Configuration register, two bytes of configuration space.
pub(super) const CONFIG: u16 = 0x60;
/// Lock register, one byte of configuration space.
pub(super) const LOCK: u16 = 0x68;

/// Bits of the configuration register that a guest can write: interrupt type, prescaler, output.
const CONFIG_MASK: u16 = 0b10_0111;
/// Prescaler: 0 divides the PCI clock by 2^15, 1 by 2^5.
const CONFIG_FAST: u16 = 1 << 2;
/// The output is off: a timeout does nothing.
const CONFIG_OUTPUT_OFF: u16 = 1 << 5;

/// The lock register cannot be written any more.
const LOCK_LOCKED: u8 = 1 << 0;
/// The countdown runs.
const LOCK_ENABLE: u8 = 1 << 1;
/// The first timer runs over and over, and the second never.
const LOCK_FREE_RUNNING: u8 = 1 << 2;
const LOCK_MASK: u8 = LOCK_LOCKED | LOCK_ENABLE | LOCK_FREE_RUNNING;

/// Offsets in the memory of BAR 0.
const PRELOAD_1: u64 = 0x0;
const PRELOAD_2: u64 = 0x4;
const INTERRUPT_STATUS: u64 = 0x8;
const RELOAD: u64 = 0xc;

/// Bits of a preload register.
const PRELOAD_MASK: u32 = (1 << 20) - 1;
/// Interrupt status: the first timer has run out. Writing 1 clears it.
const STATUS_FIRST: u32 = 1;
/// Reload register: starts both timers anew.
const RELOAD_RELOAD: u32 = 1 << 8;
/// Reload register: the second timer ran out, now or before the machine was reset. Writing 1 clears it.
const RELOAD_TIMEOUT: u32 = 1 << 9;
/// What is written to the reload register before each write to a preload register or to the reload register.
const UNLOCK: [u32; 2] = [0x80, 0x86];

/// One period of the PCI clock of 33 1/3 MHz.
const PCI_CLOCK: Duration = Duration::from_nanos(30);

/// Timers that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Countdown {
    /// When the first timer runs out.
    first: Duration,
    /// When the second does; `None`: never.
    second: Option<Duration>,
}

/// The registers.
#[derive(Debug)]
pub(super) struct Registers {
    config: u16,
    lock: u8,
    preload: [u32; 2],
    /// How many words of [`UNLOCK`] have been written.
    unlocked: usize,
    /// The first timer ran out.
    first_out: bool,
    timeout: bool,
    countdown: Option<Countdown>,
}

impl Registers {
    /// Registers after a reset; `timeout`: the watchdog caused it.
    pub(super) fn new(timeout: bool) -> Self {
        Self {
            config: 0,
            lock: 0,
            preload: [PRELOAD_MASK; 2],
            unlocked: 0,
            first_out: false,
            timeout,
            countdown: None,
        }
    }

    /// The configuration register.
    pub(super) fn config(&self) -> u16 {
        self.config
    }

    /// The lock register.
    pub(super) fn lock(&self) -> u8 {
        self.lock
    }

    /// Takes a write to the configuration register; it counts from the next reload on.
    pub(super) fn set_config(&mut self, value: u16) {
        self.config = value & CONFIG_MASK;
    }

    /// Takes a write to the lock register.
    pub(super) fn set_lock(&mut self, value: u8, now: Duration) {
        if self.lock & LOCK_LOCKED != 0 {
            return;
        }
        let before = std::mem::replace(&mut self.lock, value & LOCK_MASK);
        if self.lock & LOCK_ENABLE == 0 {
            self.countdown = None;
        } else if before & (LOCK_ENABLE | LOCK_FREE_RUNNING) != self.lock & (LOCK_ENABLE | LOCK_FREE_RUNNING) {
            self.reload(now);
        }
    }

    /// What a read of four bytes at `offset` of BAR 0, a multiple of 4, gives.
    pub(super) fn read(&mut self, offset: u64, now: Duration) -> u32 {
        match offset {
            PRELOAD_1 => self.preload[0],
            PRELOAD_2 => self.preload[1],
            INTERRUPT_STATUS => {
                self.look_at_first(now);
                if self.first_out { STATUS_FIRST } else { 0 }
            }
            RELOAD if self.timeout => RELOAD_TIMEOUT,
            _ => 0,
        }
    }

    /// Takes a write of `value` at `offset` of BAR 0.
    pub(super) fn write(&mut self, offset: u64, value: u32, now: Duration) {
        match offset {
            INTERRUPT_STATUS => {
                self.look_at_first(now);
                if value & STATUS_FIRST != 0 {
                    self.first_out = false;
                }
                return;
            }
            RELOAD if value == UNLOCK[0] => {
                self.unlocked = 1;
                return;
            }
            RELOAD if value == UNLOCK[1] && self.unlocked == 1 => {
                self.unlocked = 2;
                return;
            }
            PRELOAD_1 | PRELOAD_2 | RELOAD => {}
            _ => return,
        }
        // Any other write locks them again, and does something only if they were unlocked.
        if std::mem::take(&mut self.unlocked) < UNLOCK.len() {
            return;
        }
        match offset {
            PRELOAD_1 => self.preload[0] = value & PRELOAD_MASK,
            PRELOAD_2 => self.preload[1] = value & PRELOAD_MASK,
            _ => {
                if value & RELOAD_TIMEOUT != 0 {
                    self.timeout = false;
                }
                if value & RELOAD_RELOAD != 0 && self.lock & LOCK_ENABLE != 0 {
                    self.reload(now);
                }
            }
        }
    }

    /// When the guest will be out of time unless it feeds its watchdog.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.countdown?.second
    }

    /// Lets the second timer run out if it is time. True: the watchdog has to act. It rests then, until it is fed or enabled anew.
    pub(super) fn expire(&mut self, now: Duration) -> bool {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return false;
        }
        self.countdown = None;
        self.first_out = true;
        self.timeout = true;
        self.config & CONFIG_OUTPUT_OFF == 0
    }

    fn look_at_first(&mut self, now: Duration) {
        let Some(Countdown { first, second }) = self.countdown else {
            return;
        };
        if now < first {
            return;
        }
        self.first_out = true;
        if second.is_none() {
            // Runs on from here: a period is as long as anybody looks.
            self.countdown = Some(Countdown {
                first: now + self.ticks(self.preload[0]),
                second,
            });
        }
    }

    fn reload(&mut self, now: Duration) {
        let first = now + self.ticks(self.preload[0]);
        let free_running = self.lock & LOCK_FREE_RUNNING != 0;
        self.countdown = Some(Countdown {
            first,
            second: (!free_running).then(|| first + self.ticks(self.preload[1])),
        });
    }

    /// How long a timer with this preload takes: at most 2^20 times 2^15 clocks, 17 minutes.
    fn ticks(&self, preload: u32) -> Duration {
        let clocks = if self.config & CONFIG_FAST != 0 {
            1 << 5
        } else {
            1 << 15
        };
        PCI_CLOCK * clocks * preload
    }
}
