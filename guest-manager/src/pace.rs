//! How soon a guest begins again that ended by itself. Pure.
//!
//! A guest that resets itself right after its start, again and again, must not keep the host busy. Three short runs in a row are let pass,
//! as an installer or an update may need them; after each further one it waits twice as long.

use std::time::Duration;

/// A run that lasted that long is none of a series.
const SHORT: Duration = Duration::from_secs(10);
/// Short runs in a row after which it begins again at once.
const AT_ONCE: u32 = 3;
/// How many times the first wait the longest is.
const LONGEST: u32 = 50;

/// How many short runs a guest has had in a row.
#[derive(Debug)]
pub(crate) struct Pace {
    first: Duration,
    short_runs: u32,
}

impl Pace {
    /// After so many, as an earlier manager has counted, or none; `first` is the first wait.
    pub(crate) fn new(first: Duration, short_runs: u32) -> Self {
        Self { first, short_runs }
    }

    /// How many short runs there have been in a row.
    pub(crate) fn short_runs(&self) -> u32 {
        self.short_runs
    }

    /// How long to wait before the next run, after one that lasted for `uptime`.
    pub(crate) fn after(&mut self, uptime: Duration) -> Duration {
        if uptime >= SHORT {
            self.short_runs = 0;
            return Duration::ZERO;
        }
        self.short_runs = self.short_runs.saturating_add(1);
        match self.short_runs.checked_sub(AT_ONCE + 1) {
            None => Duration::ZERO,
            Some(doublings) => self.first.saturating_mul(LONGEST.min(1 << doublings.min(16))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: Duration = Duration::from_millis(100);

    #[test]
    fn a_series_of_short_runs_waits_longer_and_longer() {
        let mut pace = Pace::new(FIRST, 0);
        let waits: Vec<_> = (0..12)
            .map(|_| {
                // Another manager goes on counting.
                pace = Pace::new(FIRST, pace.short_runs());
                pace.after(Duration::from_millis(900)).as_millis()
            })
            .collect();
        assert_eq!(waits, [0, 0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(pace.after(SHORT), Duration::ZERO);
        assert_eq!(pace.after(Duration::ZERO), Duration::ZERO);
    }

    proptest! {
        /// Whatever the runs are: in any 10 s there are few restarts, and nobody waits longer than 5 s.
        #[test]
        fn restarts_are_bounded(uptimes in prop::collection::vec(0u64..12_000, 1..300)) {
            let mut pace = Pace::new(FIRST, 0);
            let (mut now, mut restarts) = (0, Vec::new());
            for uptime in uptimes {
                let wait = pace.after(Duration::from_millis(uptime));
                prop_assert!(wait <= FIRST * LONGEST);
                now += uptime + u64::try_from(wait.as_millis()).unwrap();
                restarts.push(now);
            }
            for (i, start) in restarts.iter().enumerate() {
                let within = restarts[i..].iter().filter(|at| **at - start < 10_000).count();
                prop_assert!(within <= 12, "{within} restarts within 10 s");
            }
        }
    }
}
