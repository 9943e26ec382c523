//! How many failed calls of a user are noted one by one. Pure: time is passed in.
//!
//! A refusal costs its caller nothing, and anybody who may connect can have as many as they like: noted without a bound they would fill the
//! disk, or the queue, at the cost of what others have really done.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// How long failures are counted together.
const WINDOW: Duration = Duration::from_secs(10);
/// How many of one user's are noted in that time.
const NOTED: u64 = 100;
/// Users that are counted at a time; what is more is counted as one.
const MAX_USERS: usize = 1024;

/// What becomes of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is noted; before it so many were not.
    Note {
        /// How many.
        left_out: u64,
    },
    /// It is only counted.
    LeaveOut,
}

/// The counts, by user.
#[derive(Debug, Default)]
pub(super) struct Refusals(HashMap<u32, (Instant, u64)>);

impl Refusals {
    /// A call of `uid` has failed.
    pub(super) fn count(&mut self, uid: u32, now: Instant) -> Verdict {
        let over = |since: Instant| now.saturating_duration_since(since) >= WINDOW;
        if !self.0.contains_key(&uid) && self.0.len() >= MAX_USERS {
            self.0.retain(|_, &mut (since, count)| !over(since) || count > NOTED);
        }
        let uid = match self.0.contains_key(&uid) || self.0.len() < MAX_USERS {
            true => uid,
            false => u32::MAX,
        };
        let (since, count) = self.0.entry(uid).or_insert((now, 0));
        let mut left_out = 0;
        if over(*since) {
            left_out = count.saturating_sub(NOTED);
            (*since, *count) = (now, 0);
        }
        *count += 1;
        match *count <= NOTED {
            true => Verdict::Note { left_out },
            false => Verdict::LeaveOut,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_noted_and_the_rest_is_told_by_number() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let noted = (0..250)
            .filter(|_| refusals.count(7, start) != Verdict::LeaveOut)
            .count();
        assert_eq!(noted, 100);
        assert_eq!(refusals.count(8, start), Verdict::Note { left_out: 0 }, "another user");
        assert_eq!(refusals.count(7, start + WINDOW), Verdict::Note { left_out: 150 });
        assert_eq!(refusals.count(7, start + WINDOW), Verdict::Note { left_out: 0 });
    }

    #[test]
    fn users_without_end_take_no_memory_without_end() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        for uid in 0..10_000 {
            refusals.count(uid, start);
        }
        assert!(refusals.0.len() <= MAX_USERS + 1);
        assert_eq!(refusals.count(20_000, start), Verdict::LeaveOut, "counted with others");
        assert_eq!(refusals.count(20_000, start + WINDOW), Verdict::Note { left_out: 0 });
    }
}
