//! How long the device's thread looks for the driver's next request before it sleeps.
//!
//! To be woken costs a doorbell on the guest's side and a switch of threads on the host's, several times what a read from the page cache does. So while
//! requests come close after one another the thread looks out for them, and when they do not it sleeps at once: an idle disk costs nothing.
//!
//! ```text
//!   how long it was idle, looking and sleeping:   <= the most: looking (longer) would have found it: twice as long next time
//!                                                 >  the most: in vain: not at all next time
//! ```

use std::time::Duration;

/// The longest look-out by default: what a host needs to wake a thread, some times over.
pub const DEFAULT_POLL: Duration = Duration::from_micros(32);
/// The shortest, in nanoseconds.
const SHORTEST: u64 = 4_000;

/// Adapts to the driver's pace; times are nanoseconds.
#[derive(Clone, Debug)]
pub(super) struct Poll {
    most: u64,
    now: u64,
}

impl Poll {
    /// Looks out for at most `most`.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most: u64::try_from(most.as_nanos()).unwrap_or(u64::MAX),
            now: 0,
        }
    }

    /// How long to look now, in nanoseconds.
    pub(super) fn budget(&self) -> u64 {
        self.now
    }

    /// Something came after `idle` nanoseconds without anything to do.
    pub(super) fn came_after(&mut self, idle: u64) {
        self.now = if idle > self.most {
            0
        } else if idle > self.now {
            self.now.saturating_mul(2).max(SHORTEST).min(self.most)
        } else {
            self.now
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_looks_out_while_requests_come_close() {
        let mut poll = Poll::new(Duration::from_micros(32));
        assert_eq!(poll.budget(), 0);
        poll.came_after(10_000);
        assert_eq!(poll.budget(), 4_000);
        poll.came_after(10_000);
        poll.came_after(10_000);
        assert_eq!(poll.budget(), 16_000);
        poll.came_after(10_000);
        assert_eq!(poll.budget(), 16_000);
        poll.came_after(20_000);
        assert_eq!(poll.budget(), 32_000);
        poll.came_after(1_000_000);
        assert_eq!(poll.budget(), 0);
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
                prop_assert!(idle <= most || poll.budget() == 0);
            }
        }
    }
}
