//! Arithmetic of the two clocks: CMOS registers to a date, and KVM's paravirtual clock to nanoseconds. Pure.

use core::fmt;

/// A date and time, UTC by convention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DateTime {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl DateTime {
    /// From these CMOS registers (MC146818): seconds, minutes, hours, day, month, year, century, status B, status A (ignored).
    /// `None` if they are no date, as without a clock.
    pub(crate) fn from_cmos(values: [u8; 9]) -> Option<Self> {
        let [second, minute, hour, day, month, year, century, status, _] = values;
        let binary = status & 4 != 0;
        let decode = |value: u8| {
            if binary {
                value
            } else {
                (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
            }
        };
        let hour = match (status & 2 != 0, hour & 0x80 != 0) {
            (true, _) => decode(hour),
            (false, afternoon) => (decode(hour & 0x7f) % 12) + if afternoon { 12 } else { 0 },
        };
        // Without a century register (whatever is there then) it is this century.
        let century = match decode(century) {
            century @ 19..=29 => century,
            _ => 20,
        };
        let date = Self {
            year: u16::from(century) * 100 + u16::from(decode(year)),
            month: decode(month),
            day: decode(day),
            hour,
            minute: decode(minute),
            second: decode(second),
        };
        let valid = decode(year) < 100
            && (1..=12).contains(&date.month)
            && (1..=31).contains(&date.day)
            && date.hour < 24
            && date.minute < 60
            && date.second < 60;
        valid.then_some(date)
    }
}

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            year,
            month,
            day,
            hour,
            minute,
            second,
        } = self;
        write!(f, "{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// KVM's `pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst), the fields that count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PvClock {
    /// The counter when the host wrote this.
    pub(crate) tsc: u64,
    /// Nanoseconds then.
    pub(crate) nanoseconds: u64,
    /// Fraction of 2^32 by which shifted ticks become nanoseconds.
    pub(crate) multiplier: u32,
    /// Binary shift of the ticks first; negative is to the right.
    pub(crate) shift: i8,
}

impl PvClock {
    /// Nanoseconds when the counter reads `tsc`.
    pub(crate) fn at(&self, tsc: u64) -> u64 {
        let ticks = u128::from(tsc.saturating_sub(self.tsc));
        let distance = u32::from(self.shift.unsigned_abs()).min(63);
        let ticks = if self.shift < 0 {
            ticks >> distance
        } else {
            ticks << distance
        };
        self.nanoseconds
            .wrapping_add((ticks.wrapping_mul(u128::from(self.multiplier)) >> 32) as u64)
    }
}
