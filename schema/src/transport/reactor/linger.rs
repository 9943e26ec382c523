//! Whether a loop that has nothing left to do looks for events a little longer before it sleeps. A decision, without effects.
//!
//! A processor that sleeps takes tens of microseconds to wake up, twice in a call and its answer; a thread that still looks takes one. So a loop
//! lingers for a bounded time, but only as long as that pays:
//!
//! ```text
//!   an event came meanwhile --> linger the next time, too
//!   none came               --> sleep 1, 2, 4 ... MOST_SKIPPED times without lingering
//! ```
//!
//! A loop that is idle sleeps after one try, and one that is woken now and then, or whose processor is wanted by the one that it waits for, hardly ever
//! tries.

use std::time::Duration;

/// Sleeps without lingering between two tries, at most. At that rate, trying in vain costs a loop that is busy less than a thousandth of its time.
const MOST_SKIPPED: u32 = 1024;

/// The decision of one loop.
#[derive(Debug)]
pub(super) struct Linger {
    most: Duration,
    /// Sleeps without lingering after the next try, if that is in vain.
    price: u32,
    /// Sleeps without lingering before the next try.
    skip: u32,
}

impl Linger {
    /// Lingers for at most `most` at a time; zero is never.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most,
            price: 1,
            skip: 0,
        }
    }

    /// The loop is about to sleep: for how long it lingers first.
    pub(super) fn before_sleep(&mut self) -> Option<Duration> {
        if self.most.is_zero() {
            return None;
        }
        match self.skip.checked_sub(1) {
            Some(left) => {
                self.skip = left;
                None
            }
            None => Some(self.most),
        }
    }

    /// What came of lingering.
    pub(super) fn lingered(&mut self, found: bool) {
        if found {
            self.price = 1;
        } else {
            self.skip = self.price;
            self.price = (self.price * 2).min(MOST_SKIPPED);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    #[test]
    fn it_goes_on_while_it_pays() {
        let mut linger = Linger::new(MOST);
        for _ in 0..100 {
            assert_eq!(linger.before_sleep(), Some(MOST));
            linger.lingered(true);
        }
    }

    #[test]
    fn zero_is_never() {
        assert_eq!(Linger::new(Duration::ZERO).before_sleep(), None);
    }

    #[test]
    fn in_vain_it_becomes_rare_and_one_event_brings_it_back() {
        let mut linger = Linger::new(MOST);
        let mut tries = 0;
        for _ in 0..100_000 {
            if linger.before_sleep().is_some() {
                tries += 1;
                linger.lingered(false);
            }
        }
        assert!((100..120).contains(&tries), "{tries}");
        while linger.before_sleep().is_none() {}
        linger.lingered(true);
        assert_eq!(linger.before_sleep(), Some(MOST));
    }

    proptest! {
        #[test]
        fn whatever_comes_it_tries_again_soon_enough(found in prop::collection::vec(any::<bool>(), 0..200)) {
            let mut linger = Linger::new(MOST);
            for found in found {
                let skipped = std::iter::from_fn(|| linger.before_sleep().is_none().then_some(())).take(2000).count();
                prop_assert!(skipped <= MOST_SKIPPED as usize);
                linger.lingered(found);
            }
        }
    }
}
