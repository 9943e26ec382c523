//! The clock chip's registers: pure state, told the host's time with each access.

use std::time::Duration;

use super::calendar::{Alarm, Civil, Mode};
use super::{CENTURY, MemorySizes};

/// Register indices (datasheet, "Address map").
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;

/// Register A: update in progress; divider; rate of the periodic interrupt.
const A_UIP: u8 = 1 << 7;
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;
/// Time base of 32.768 kHz, period 976.6 us: how firmware leaves it.
const A_DEFAULT: u8 = 0x26;

/// Register B.
const B_SET: u8 = 1 << 7;
const B_PERIODIC: u8 = 1 << 6;
const B_ALARM: u8 = 1 << 5;
const B_UPDATE_ENDED: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const B_INTERRUPTS: u8 = B_PERIODIC | B_ALARM | B_UPDATE_ENDED;
/// Daylight saving (bit 0) stays off; the square wave (bit 3) leads nowhere but can be set.
const B_MASK: u8 = !1;

/// Register C: the flags are where their enable bits are in B.
const C_IRQ: u8 = 1 << 7;

/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;

/// The last part of each second, in which an update is in progress (see the clock's head).
const UPDATE_NS: i128 = 2_228_000;
const SECOND_NS: i128 = 1_000_000_000;

/// CMOS bytes in which firmware leaves memory sizes: low byte first.
const BASE_MEMORY: usize = 0x15;
const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
const MEMORY_ABOVE_16M: usize = 0x34;
const MEMORY_ABOVE_4G: usize = 0x5b;

/// Whether time goes on.
#[derive(Clone, Copy, Debug)]
enum Time {
    /// Guest time is the host's plus this many ns.
    Running { offset: i128 },
    /// The time registers are bytes in `cmos`. The ns that guest time was ahead of the host's when it stopped: its fraction of a second
    /// is what time goes on with.
    Stopped { offset: i128 },
}

/// The chip.
#[derive(Debug)]
pub(super) struct Chip {
    /// All bytes. The time registers count only while time is stopped; A to D are kept apart from what reads compute.
    cmos: [u8; 128],
    time: Time,
    flags: u8,
    /// Host time up to which `flags` are worked out, ns.
    seen: i128,
    /// Interrupts can be enabled.
    interrupts: bool,
}

impl Chip {
    pub(super) fn new(now: Duration, memory: MemorySizes, interrupts: bool) -> Self {
        let mut cmos = [0; 128];
        cmos[usize::from(A)] = A_DEFAULT;
        cmos[usize::from(B)] = B_24_HOURS;
        let mut put = |at: usize, len: usize, value: u64| {
            let most = (1 << (8 * len)) - 1;
            cmos[at..at + len].copy_from_slice(&value.min(most).to_le_bytes()[..len]);
        };
        let (kib, mib) = (1 << 10, 1 << 20);
        put(BASE_MEMORY, 2, 640);
        for at in EXTENDED_MEMORY {
            put(at, 2, memory.below_4g.saturating_sub(mib) / kib);
        }
        put(
            MEMORY_ABOVE_16M,
            2,
            memory.below_4g.saturating_sub(16 * mib) / (64 * kib),
        );
        put(MEMORY_ABOVE_4G, 3, memory.above_4g / (64 * kib));
        Self {
            cmos,
            time: Time::Running { offset: 0 },
            flags: 0,
            seen: ns(now),
            interrupts,
        }
    }

    /// The guest reads register `index` (0-127).
    pub(super) fn read(&mut self, index: u8, now: Duration) -> u8 {
        let stored = self.cmos[usize::from(index & 0x7f)];
        match (index, self.time) {
            (SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY, Time::Running { offset }) => {
                self.encode(index, civil(ns(now) + offset))
            }
            (A, Time::Running { offset }) if (ns(now) + offset).rem_euclid(SECOND_NS) >= SECOND_NS - UPDATE_NS => {
                stored | A_UIP
            }
            (C, _) => {
                self.advance(now);
                let irq = if self.interrupt() { C_IRQ } else { 0 };
                std::mem::take(&mut self.flags) | irq
            }
            (D, _) => D_VALID,
            _ => stored,
        }
    }

    /// The guest writes register `index` (0-127).
    pub(super) fn write(&mut self, index: u8, value: u8, now: Duration) {
        // What happened until now happened under the old settings.
        self.advance(now);
        match index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY => {
                // Running time takes a single new field as the chip does, between two updates.
                let running = self.stop_time(now);
                self.cmos[usize::from(index)] = value;
                if running {
                    self.start_time(now, false);
                }
            }
            A | B => {
                let held = self.divider_held();
                // The bytes of the time are meant in the mode in which they were written, so time stops before the mode changes and
                // starts after.
                let will_stop =
                    (index == B && value & B_SET != 0) || (index == A && value & A_DIVIDER_RESET == A_DIVIDER_RESET);
                if will_stop {
                    self.stop_time(now);
                }
                self.cmos[usize::from(index)] = match index {
                    A => value & !A_UIP,
                    // SET also clears "update ended interrupt enable" (datasheet, register B).
                    _ if value & B_SET != 0 => value & B_MASK & !B_UPDATE_ENDED & self.settable(),
                    _ => value & B_MASK & self.settable(),
                };
                if !self.divider_held() && self.b() & B_SET == 0 {
                    self.start_time(now, held);
                }
            }
            C | D => {}
            _ => self.cmos[usize::from(index & 0x7f)] = value,
        }
    }

    /// Works out what has happened up to `now`: sets the flags of register C.
    pub(super) fn advance(&mut self, now: Duration) {
        let (from, to) = (self.seen, ns(now));
        self.seen = to;
        // A host clock that was set back makes nothing happen.
        if to <= from {
            return;
        }
        if let Some(period) = self.period()
            && to.div_euclid(period) > from.div_euclid(period)
        {
            self.flags |= B_PERIODIC;
        }
        if let Time::Running { offset } = self.time {
            let (from, to) = (seconds(from + offset), seconds(to + offset));
            if to > from {
                self.flags |= B_UPDATE_ENDED;
                if self.alarm().next_after(self.mode(), from).is_some_and(|at| at <= to) {
                    self.flags |= B_ALARM;
                }
            }
        }
    }

    /// The level of the interrupt line: a flag whose interrupt is enabled.
    pub(super) fn interrupt(&self) -> bool {
        self.flags & self.b() & B_INTERRUPTS != 0
    }

    /// How long until the line will be raised, as things are; `None` if nothing will, or it is raised already.
    pub(super) fn next_event(&self, now: Duration) -> Option<Duration> {
        let enabled = self.b() & B_INTERRUPTS;
        if enabled == 0 || self.interrupt() {
            return None;
        }
        let now = ns(now);
        let periodic = self
            .period()
            .filter(|_| enabled & B_PERIODIC != 0)
            .map(|period| period - now.rem_euclid(period));
        let timed = match self.time {
            Time::Running { offset } => {
                let second = seconds(now + offset);
                let update = (enabled & B_UPDATE_ENDED != 0).then(|| second + 1);
                let alarm = || self.alarm().next_after(self.mode(), second);
                let alarm = if enabled & B_ALARM != 0 { alarm() } else { None };
                let at = update.into_iter().chain(alarm).min();
                at.map(|at| i128::from(at) * SECOND_NS - (now + offset))
            }
            Time::Stopped { .. } => None,
        };
        let wait = periodic.into_iter().chain(timed).min()?;
        Some(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    /// From now on no interrupt can be enabled.
    pub(super) fn disable_interrupts(&mut self) {
        self.interrupts = false;
        self.cmos[usize::from(B)] &= !B_INTERRUPTS;
    }

    /// Turns running time into bytes; whether it was running.
    fn stop_time(&mut self, now: Duration) -> bool {
        let Time::Running { offset } = self.time else {
            return false;
        };
        let civil = civil(ns(now) + offset);
        for index in [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY] {
            self.cmos[usize::from(index)] = self.encode(index, civil);
        }
        self.time = Time::Stopped { offset };
        true
    }

    /// Lets time go on from the bytes. After a reset of the divider the first second takes half a second (datasheet, "Divider control").
    fn start_time(&mut self, now: Duration, after_reset: bool) {
        let Time::Stopped { offset } = self.time else { return };
        let fraction = if after_reset {
            SECOND_NS / 2
        } else {
            (ns(now) + offset).rem_euclid(SECOND_NS)
        };
        let mode = self.mode();
        let byte = |index: u8| self.cmos[usize::from(index)];
        let number = |index: u8, most: u8| i64::from(mode.decode(byte(index)).min(most));
        let civil = Civil {
            year: number(CENTURY, 99) * 100 + number(YEAR, 99),
            month: mode.decode(byte(MONTH)),
            day: mode.decode(byte(DAY)),
            second: i64::from(mode.decode_hour(byte(HOURS))) * 3600 + number(MINUTES, 59) * 60 + number(SECONDS, 59),
        };
        let time = i128::from(civil.to_unix()) * SECOND_NS + fraction;
        self.time = Time::Running { offset: time - ns(now) };
    }

    fn encode(&self, index: u8, civil: Civil) -> u8 {
        let mode = self.mode();
        let (hour, minute, second) = civil.clock();
        match index {
            SECONDS => mode.encode(second),
            MINUTES => mode.encode(minute),
            HOURS => mode.encode_hour(hour),
            DAY_OF_WEEK => civil.day_of_week(),
            DAY => mode.encode(civil.day),
            MONTH => mode.encode(civil.month),
            YEAR => mode.encode((civil.year % 100) as u8),
            _ => mode.encode((civil.year / 100) as u8),
        }
    }

    fn b(&self) -> u8 {
        self.cmos[usize::from(B)]
    }

    /// Bits of register B that this clock lets be set.
    fn settable(&self) -> u8 {
        if self.interrupts { 0xff } else { !B_INTERRUPTS }
    }

    fn mode(&self) -> Mode {
        Mode {
            binary: self.b() & B_BINARY != 0,
            hours_24: self.b() & B_24_HOURS != 0,
        }
    }

    fn alarm(&self) -> Alarm {
        let byte = |index: u8| self.cmos[usize::from(index)];
        Alarm {
            second: byte(SECONDS_ALARM),
            minute: byte(MINUTES_ALARM),
            hour: byte(HOURS_ALARM),
        }
    }

    fn divider_held(&self) -> bool {
        self.cmos[usize::from(A)] & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    /// ns between periodic interrupts, with the usual time base (datasheet, "Periodic interrupt rate"): 32,768 Hz divided by a power of two.
    fn period(&self) -> Option<i128> {
        let shift = match self.cmos[usize::from(A)] & A_RATE {
            0 => return None,
            rate @ 1..=2 => rate + 6,
            rate => rate - 1,
        };
        (!self.divider_held()).then(|| SECOND_NS * (1 << shift) / 32_768)
    }
}

fn ns(time: Duration) -> i128 {
    time.as_nanos() as i128
}

/// Whole seconds of a time in ns; far outside of what the calendar knows anyway if it does not fit.
fn seconds(ns: i128) -> i64 {
    i64::try_from(ns.div_euclid(SECOND_NS)).unwrap_or(i64::MAX / 2)
}

fn civil(ns: i128) -> Civil {
    Civil::from_unix(seconds(ns))
}
