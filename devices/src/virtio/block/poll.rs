//! How long the device's thread looks for the driver's next request before it sleeps.
//!
//! To be woken costs a doorbell on the guest's side and a switch of threads on the host's, several times what a read from the page cache does. So while
//! requests come close after one another the thread looks out for them, and when they do not it sleeps at once: an idle disk costs nothing.
//!
//! ```text
//!   how long there was nothing to do, looking, sleeping and being woken:
//!     far longer than the most:     it would have looked in vain: next time not at all
//!     else, and it had not looked   looking longer would have found it: twice as long next time
//!     for the most:
//!     else:                         in vain; after a few times in a row it rests from looking for a while
//! ```

use std::time::Duration;

/// The longest look-out by default: what a host needs to wake a thread, some times over.
pub const DEFAULT_POLL: Duration = Duration::from_micros(32);
/// The shortest, in nanoseconds.
const SHORTEST: u64 = 4_000;
/// Up to so many times the most counts as close: to be woken takes a while itself, which cannot be told from the driver's pace.
const CLOSE: u64 = 4;
/// Look-outs in vain, in a row, before it rests.
const MISSES: u32 = 4;
/// Wake-ups for which it rests.
const REST: u32 = 64;

/// Adapts to the driver's pace; times are nanoseconds.
#[derive(Clone, Debug)]
pub(super) struct Poll {
    most: u64,
    now: u64,
    misses: u32,
    rest: u32,
}

impl Poll {
    /// Looks out for at most `most`.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most: u64::try_from(most.as_nanos()).unwrap_or(u64::MAX),
            now: 0,
            misses: 0,
            rest: 0,
        }
    }

    /// How long to look now, in nanoseconds.
    pub(super) fn budget(&self) -> u64 {
        self.now
    }

    /// Something came while it looked.
    pub(super) fn found(&mut self) {
        self.misses = 0;
    }

    /// Something woke it after `idle` nanoseconds without anything to do.
    pub(super) fn came_after(&mut self, idle: u64) {
        if idle > self.most.saturating_mul(CLOSE) {
            self.now = 0;
        } else if self.rest > 0 {
            self.rest -= 1;
        } else if self.now < self.most {
            self.now = self.now.saturating_mul(2).max(SHORTEST).min(self.most);
        } else {
            self.misses += 1;
            if self.misses == MISSES {
                (self.now, self.misses, self.rest) = (0, 0, REST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_looks_out_while_requests_come_close() {
        let mut poll = Poll::new(Duration::from_micros(32));
        let mut budgets = vec![poll.budget()];
        for idle in [10_000, 100_000, 10_000, 10_000, 10_000] {
            poll.came_after(idle);
            budgets.push(poll.budget());
        }
        assert_eq!(budgets, [0, 4_000, 8_000, 16_000, 32_000, 32_000]);
        poll.came_after(1_000_000);
        assert_eq!(poll.budget(), 0);
    }

    #[test]
    fn it_rests_when_it_looked_in_vain() {
        let mut poll = Poll::new(Duration::from_micros(4));
        poll.came_after(5_000);
        for _ in 0..3 {
            poll.came_after(5_000);
        }
        // One that was found makes up for it.
        poll.found();
        for _ in 0..3 {
            poll.came_after(5_000);
            assert_eq!(poll.budget(), 4_000);
        }
        for _ in 0..=REST {
            poll.came_after(5_000);
            assert_eq!(poll.budget(), 0);
        }
        poll.came_after(5_000);
        assert_eq!(poll.budget(), 4_000);
    }

    #[test]
    fn switched_off_it_never_looks() {
        let mut poll = Poll::new(Duration::ZERO);
        for idle in [0, 1, 10_000, u64::MAX] {
            poll.came_after(idle);
            assert_eq!(poll.budget(), 0);
        }
    }

    proptest! {
        #[test]
        fn it_never_looks_longer_than_allowed(most in 0..1_000_000u64, idle in prop::collection::vec(any::<u64>(), 0..50)) {
            let mut poll = Poll::new(Duration::from_nanos(most));
            for idle in idle {
                poll.came_after(idle);
                prop_assert!(poll.budget() <= most);
                prop_assert!(idle <= most * CLOSE || poll.budget() == 0);
            }
        }
    }
}
