//! Time of day as the clock chip's registers hold it: civil dates, BCD or binary, 12 or 24 hours. Pure.

/// Seconds of a day.
pub(super) const DAY: i64 = 86_400;

/// How registers are encoded, from register B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mode {
    pub(super) binary: bool,
    pub(super) hours_24: bool,
}

/// Hour registers in 12-hour mode: afternoon.
const PM: u8 = 0x80;

impl Mode {
    pub(super) fn encode(self, value: u8) -> u8 {
        if self.binary {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    /// The value of a register; more than 99 or a broken BCD digit gives some number, which the caller clamps.
    pub(super) fn decode(self, byte: u8) -> u8 {
        if self.binary {
            byte
        } else {
            (byte >> 4) * 10 + (byte & 0x0f)
        }
    }

    /// `hour` is 0-23.
    pub(super) fn encode_hour(self, hour: u8) -> u8 {
        if self.hours_24 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    /// The hour, 0-23, whatever the byte.
    pub(super) fn decode_hour(self, byte: u8) -> u8 {
        if self.hours_24 {
            return self.decode(byte).min(23);
        }
        let hour = self.decode(byte & !PM).clamp(1, 12) % 12;
        hour + if byte & PM != 0 { 12 } else { 0 }
    }
}

/// A moment's civil date and time (proleptic Gregorian calendar, UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Civil {
    /// 0-9999: what two digits of century and two of year can hold.
    pub(super) year: i64,
    /// 1-12.
    pub(super) month: u8,
    /// 1-31.
    pub(super) day: u8,
    /// Seconds since midnight.
    pub(super) second: i64,
}

impl Civil {
    /// The date and time `seconds` after 1970-01-01 00:00; outside of the years 0-9999, the nearest of those years.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        // The calendar repeats every 400 years = 146,097 days; count from 1 March, so that a leap day ends a year.
        let days = days + 719_468;
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8;
        let month = (if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        }) as u8;
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            year: year.clamp(0, 9999),
            month,
            day,
            second,
        }
    }

    /// Seconds since 1970-01-01 00:00. A month or day that does not exist is taken as the nearest that does.
    pub(super) fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let day = i64::from(self.day).clamp(1, days_in_month(self.year, month));
        let year = self.year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        (era * 146_097 + day_of_era - 719_468) * DAY + self.second
    }

    /// 1 (Sunday) to 7.
    pub(super) fn day_of_week(self) -> u8 {
        // 1970-01-01 was a Thursday.
        (self.to_unix().div_euclid(DAY) + 4).rem_euclid(7) as u8 + 1
    }

    /// Hour (0-23), minute, second.
    pub(super) fn clock(self) -> (u8, u8, u8) {
        (
            (self.second / 3600) as u8,
            (self.second / 60 % 60) as u8,
            (self.second % 60) as u8,
        )
    }
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// The alarm registers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Alarm {
    pub(super) second: u8,
    pub(super) minute: u8,
    pub(super) hour: u8,
}

impl Alarm {
    /// The first second of a day after second `after` that matches, if any; `after` -1 for the whole day.
    fn next_in_day(self, mode: Mode, after: i64) -> Option<i64> {
        // The chip compares bytes, and takes two set top bits as "any" (datasheet, "Time, calendar and alarm locations").
        let matches = |alarm: u8, byte: u8| alarm & 0xc0 == 0xc0 || alarm == byte;
        let second = |s: &u8| matches(self.second, mode.encode(*s));
        // Keeps the loops below short when no second ever matches.
        (0..60).find(second)?;
        let from = (after + 1).max(0);
        for hour in (from / 3600) as u8..24 {
            if !matches(self.hour, mode.encode_hour(hour)) {
                continue;
            }
            for minute in (0..60).filter(|m| matches(self.minute, mode.encode(*m))) {
                let start = i64::from(hour) * 3600 + i64::from(minute) * 60;
                if let Some(at) = (0..60)
                    .filter(second)
                    .map(|s| start + i64::from(s))
                    .find(|at| *at >= from)
                {
                    return Some(at);
                }
            }
        }
        None
    }

    /// The first moment after `unix` (seconds since 1970) that matches, if any ever does.
    pub(super) fn next_after(self, mode: Mode, unix: i64) -> Option<i64> {
        let (midnight, second) = (unix.div_euclid(DAY) * DAY, unix.rem_euclid(DAY));
        self.next_in_day(mode, second)
            .map(|at| midnight + at)
            .or_else(|| self.next_in_day(mode, -1).map(|at| midnight + DAY + at))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BCD_24: Mode = Mode {
        binary: false,
        hours_24: true,
    };

    fn modes() -> impl Strategy<Value = Mode> {
        (any::<bool>(), any::<bool>()).prop_map(|(binary, hours_24)| Mode { binary, hours_24 })
    }

    #[test]
    fn known_dates() {
        let date = |unix| {
            let c = Civil::from_unix(unix);
            (c.year, c.month, c.day, c.clock(), c.day_of_week())
        };
        assert_eq!(date(0), (1970, 1, 1, (0, 0, 0), 5));
        assert_eq!(date(951_782_400), (2000, 2, 29, (0, 0, 0), 3));
        assert_eq!(date(1_700_000_000), (2023, 11, 14, (22, 13, 20), 3));
        assert_eq!(date(-1), (1969, 12, 31, (23, 59, 59), 4));
    }

    #[test]
    fn twelve_hour_clocks_have_no_zero() {
        let mode = Mode {
            binary: false,
            hours_24: false,
        };
        assert_eq!(mode.encode_hour(0), 0x12);
        assert_eq!(mode.encode_hour(12), 0x92);
        assert_eq!(mode.encode_hour(13), 0x81);
        assert_eq!(mode.encode_hour(23), 0x91);
    }

    #[test]
    fn days_that_do_not_exist_become_the_last_of_the_month() {
        let date = |month, day| {
            let c = Civil::from_unix(
                Civil {
                    year: 2023,
                    month,
                    day,
                    second: 0,
                }
                .to_unix(),
            );
            (c.month, c.day)
        };
        assert_eq!(date(2, 31), (2, 28));
        assert_eq!(date(0, 0), (1, 1));
        assert_eq!(date(99, 99), (12, 31));
    }

    proptest! {
        #[test]
        fn dates_round_trip(unix in -60_000_000_000i64..250_000_000_000) {
            prop_assert_eq!(Civil::from_unix(unix).to_unix(), unix);
        }

        #[test]
        fn hours_and_numbers_round_trip(mode in modes(), hour in 0u8..24, number in 0u8..100) {
            prop_assert_eq!(mode.decode_hour(mode.encode_hour(hour)), hour);
            prop_assert_eq!(mode.decode(mode.encode(number)), number);
        }

        #[test]
        fn any_byte_is_an_hour(mode in modes(), byte in any::<u8>()) {
            prop_assert!(mode.decode_hour(byte) < 24);
        }

        /// Against a naive walk over every second.
        #[test]
        fn the_next_alarm_is_the_next_match(
            mode in modes(),
            unix in 0i64..2 * DAY,
            time in (0u8..24, 0u8..60, 0u8..60),
            any in prop::array::uniform3(any::<bool>()),
        ) {
            let byte = |any: bool, byte: u8| if any { 0xff } else { byte };
            let alarm = Alarm {
                hour: byte(any[0], mode.encode_hour(time.0)),
                minute: byte(any[1], mode.encode(time.1)),
                second: byte(any[2], mode.encode(time.2)),
            };
            let naive = (unix + 1..=unix + DAY).find(|at| {
                let (h, m, s) = Civil::from_unix(*at).clock();
                (any[0] || h == time.0) && (any[1] || m == time.1) && (any[2] || s == time.2)
            });
            prop_assert_eq!(alarm.next_after(mode, unix), naive);
        }
    }

    #[test]
    fn an_alarm_of_nonsense_never_comes() {
        let never = Alarm {
            second: 0x7f,
            minute: 0,
            hour: 0,
        };
        assert_eq!(never.next_after(BCD_24, 0), None);
        let never = Alarm {
            second: 0,
            minute: 0,
            hour: 0x3f,
        };
        assert_eq!(never.next_after(BCD_24, 0), None);
    }
}
