//! What the guest says about its memory, and who waits for it (virtio 5.5.6.3).
//!
//! ```text
//!               the driver's first buffer            somebody asks
//!   [no buffer] --------------------------> [ours] -----------------> [asked: the driver has it]
//!        ^                                    ^                                  |
//!        '--------------- reset --------------'---------- buffer: statistics ----'
//! ```

use std::time::{Duration, Instant};

/// Most statistics taken from one buffer; there are 10 kinds in virtio 1.2 and 16 in Linux.
pub(super) const MOST: usize = 64;

/// Bytes of one: le16 tag, le64 value (virtio 5.5.6.3).
pub(super) const ENTRY: usize = 10;

/// Most callers that may wait at a time.
pub(super) const MOST_WAITERS: usize = 64;

/// One statistic of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStat {
    /// What it is (virtio 5.5.6.4): 0 swapped in, 1 swapped out, 2 major faults, 3 minor faults, 4 free, 5 total, 6 available, 7 disk caches, 8
    /// and 9 huge pages that could and could not be had; later versions have more.
    pub tag: u16,
    /// Bytes for 0, 1, and 4 to 7; else a count.
    pub value: u64,
}

/// What the guest said about its memory at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryStats {
    /// Each tag at most once, in the guest's order.
    pub stats: Vec<MemoryStat>,
    /// When the guest said so.
    pub at: Instant,
}

impl MemoryStats {
    /// How old they are.
    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }

    /// The value of a tag.
    pub fn get(&self, tag: u16) -> Option<u64> {
        self.stats.iter().find(|stat| stat.tag == tag).map(|stat| stat.value)
    }
}

/// Why there are no statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatsError {
    /// No driver is there, or it does not tell.
    #[error("the guest's balloon driver gives no statistics")]
    NotSupported,
    /// The driver did not answer in time.
    #[error("the guest's balloon driver did not give its statistics in time")]
    TimedOut,
    /// The driver was reset before it answered.
    #[error("the guest reset its balloon before it gave its statistics")]
    Reset,
    /// Too many callers are waiting already.
    #[error("{MOST_WAITERS} callers are waiting for the balloon's statistics already")]
    Busy,
    /// The device has failed, or its machine ended.
    #[error("the balloon is gone")]
    Gone,
}

/// Whom to tell.
pub(super) type Callback = Box<dyn FnOnce(Result<MemoryStats, StatsError>) + Send>;

/// One who waits.
pub(super) struct Waiter {
    pub(super) deadline: Instant,
    pub(super) callback: Callback,
}

/// Those who wait. Each is told once, whatever becomes of the device.
#[derive(Default)]
pub(super) struct Waiters(Vec<Waiter>);

impl Waiters {
    pub(super) fn add(&mut self, waiter: Waiter) {
        if self.0.len() < MOST_WAITERS {
            self.0.push(waiter);
        } else {
            (waiter.callback)(Err(StatsError::Busy));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells all.
    pub(super) fn answer(&mut self, answer: &Result<MemoryStats, StatsError>) {
        for waiter in self.0.drain(..) {
            (waiter.callback)(answer.clone());
        }
    }

    /// Tells those whose time is up.
    pub(super) fn expire(&mut self, now: Instant) {
        for waiter in self.0.extract_if(.., |waiter| waiter.deadline <= now) {
            (waiter.callback)(Err(StatsError::TimedOut));
        }
    }

    /// When the next one's time is up.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.iter().map(|waiter| waiter.deadline).min()
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        self.answer(&Err(StatsError::Gone));
    }
}

/// Reads the driver's buffer. Of a tag that comes twice the last value counts; a part of an entry at the end is none, and so is all beyond
/// [`MOST`] entries.
pub(super) fn parse(bytes: &[u8]) -> Vec<MemoryStat> {
    let mut stats: Vec<MemoryStat> = Vec::new();
    for entry in bytes.as_chunks::<ENTRY>().0.iter().take(MOST) {
        let [t0, t1, value @ ..] = *entry;
        let stat = MemoryStat {
            tag: u16::from_le_bytes([t0, t1]),
            value: u64::from_le_bytes(value),
        };
        match stats.iter_mut().find(|known| known.tag == stat.tag) {
            Some(known) => *known = stat,
            None => stats.push(stat),
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn entries_are_read_in_any_order_and_once_each() {
        let bytes = [
            entry(5, 1 << 30),
            entry(4, 7),
            entry(700, 1),
            entry(4, 8),
            vec![6, 0, 1],
        ]
        .concat();
        let stat = |tag, value| MemoryStat { tag, value };
        assert_eq!(parse(&bytes), [stat(5, 1 << 30), stat(4, 8), stat(700, 1)]);
        assert_eq!(parse(&[]), []);
    }

    fn waiter(waiters: &mut Waiters, deadline: Instant) -> mpsc::Receiver<Result<MemoryStats, StatsError>> {
        let (sender, receiver) = mpsc::channel();
        waiters.add(Waiter {
            deadline,
            callback: Box::new(move |answer| sender.send(answer).unwrap()),
        });
        receiver
    }

    #[test]
    fn everybody_is_told_once() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut waiters = Waiters::default();
        let early = waiter(&mut waiters, now + second);
        let late = waiter(&mut waiters, now + 2 * second);
        assert_eq!(waiters.next(), Some(now + second));
        waiters.expire(now + second);
        assert_eq!(early.try_recv().unwrap(), Err(StatsError::TimedOut));
        assert!(late.try_recv().is_err());
        waiters.answer(&Ok(MemoryStats {
            stats: vec![MemoryStat { tag: 4, value: 9 }],
            at: now,
        }));
        assert_eq!(late.try_recv().unwrap().unwrap().get(4), Some(9));
        assert_eq!(waiters.next(), None);
        let last: Vec<_> = (0..MOST_WAITERS + 1).map(|_| waiter(&mut waiters, now)).collect();
        assert_eq!(last[MOST_WAITERS].try_recv().unwrap(), Err(StatsError::Busy));
        drop(waiters);
        assert_eq!(last[0].try_recv().unwrap(), Err(StatsError::Gone));
        assert!(last[0].try_recv().is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
            let stats = parse(&bytes);
            prop_assert!(stats.len() <= MOST.min(bytes.len() / ENTRY));
        }
    }
}
