//! What a peer makes us hold, counted from the messages that pass. Pure: no I/O, no clock.
//!
//! Life of an answer (a call or bootstrap of the peer):
//!
//! ```text
//!             call                return queued               return written
//!   (none) ---------> in flight ------------------> answered ----------------> no longer "in flight"
//!                        |                             |
//!                        | finish                      | finish (or the return said that none is needed)
//!                        v                             v
//!                     given up ------------------->  (none)
//!                               return queued
//! ```
//!
//! Exports are counted by reference like the RPC system does: a descriptor in a message of ours adds one, `Release` and a
//! `Finish` with `releaseResultCaps` take some away.

use std::collections::{HashMap, VecDeque, hash_map::Entry};

use super::limits::{Limit, Limits};

#[derive(Default)]
struct Answer {
    returned: bool,
    /// The peer has sent `Finish`; holds its `releaseResultCaps`.
    finished: Option<bool>,
    exports: Vec<u32>,
    bytes: usize,
}

/// Counts for one connection.
pub(crate) struct Ledger {
    limits: Limits,
    answers: HashMap<u32, Answer>,
    in_flight: usize,
    /// Stream offsets where returns end that are not written yet.
    unwritten: VecDeque<u64>,
    exports: HashMap<u32, u32>,
    /// Bytes of returns that the peer can still refer to.
    retained_bytes: usize,
}

/// What became of a `Finish`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The call has been answered, or is not known.
    Plain,
    /// The call has not been answered yet: the peer gives it up.
    GivesUp,
}

impl Ledger {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            answers: HashMap::new(),
            in_flight: 0,
            unwritten: VecDeque::new(),
            exports: HashMap::new(),
            retained_bytes: 0,
        }
    }

    /// A call or bootstrap came. A number that is in use is left to the RPC system, which ends the connection.
    pub(crate) fn call(&mut self, question: u32) -> Result<(), Limit> {
        if self.in_flight >= self.limits.calls {
            return Err(Limit::Calls);
        }
        if self.answers.len() >= self.limits.answers {
            return Err(Limit::Answers);
        }
        if let Entry::Vacant(entry) = self.answers.entry(question) {
            entry.insert(Answer::default());
            self.in_flight += 1;
        }
        Ok(())
    }

    /// A finish came.
    pub(crate) fn finish(&mut self, question: u32, release: bool) -> Finish {
        let Entry::Occupied(mut entry) = self.answers.entry(question) else {
            return Finish::Plain;
        };
        if !entry.get().returned {
            entry.get_mut().finished = Some(release);
            return Finish::GivesUp;
        }
        let answer = entry.remove();
        self.retained_bytes -= answer.bytes;
        if release {
            self.release_all(&answer.exports);
        }
        Finish::Plain
    }

    /// A return was put into the queue; its last byte is before stream offset `end`.
    pub(crate) fn returned(&mut self, question: u32, exports: Vec<u32>, needs_finish: bool, end: u64, bytes: usize) {
        let Entry::Occupied(mut entry) = self.answers.entry(question) else {
            return;
        };
        let answer = entry.get_mut();
        if answer.returned {
            return;
        }
        self.unwritten.push_back(end);
        match answer.finished {
            Some(release) => {
                entry.remove();
                if release {
                    self.release_all(&exports);
                }
            }
            None if !needs_finish => drop(entry.remove()),
            None => {
                (answer.returned, answer.exports, answer.bytes) = (true, exports, bytes);
                self.retained_bytes += bytes;
            }
        }
    }

    /// Everything before stream offset `written` has been written.
    pub(crate) fn written(&mut self, written: u64) {
        while self.unwritten.front().is_some_and(|end| *end <= written) {
            self.unwritten.pop_front();
            self.in_flight -= 1;
        }
    }

    /// A message of ours hands out a capability.
    pub(crate) fn export(&mut self, id: u32) -> Result<(), Limit> {
        *self.exports.entry(id).or_default() += 1;
        if self.exports.len() > self.limits.exports {
            Err(Limit::Exports)
        } else {
            Ok(())
        }
    }

    /// The peer lets go of `count` references. More than there are is left to the RPC system.
    pub(crate) fn release(&mut self, id: u32, count: u32) {
        if let Entry::Occupied(mut entry) = self.exports.entry(id) {
            *entry.get_mut() = entry.get().saturating_sub(count);
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    /// Bytes of results that the peer can still refer to.
    pub(crate) fn retained_bytes(&self) -> usize {
        self.retained_bytes
    }

    fn release_all(&mut self, exports: &[u32]) {
        for &id in exports {
            self.release(id, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_call_counts_until_its_return_is_written() {
        let mut ledger = Ledger::new(Limits {
            calls: 2,
            ..Limits::default()
        });
        ledger.call(1).unwrap();
        ledger.call(2).unwrap();
        ledger.returned(1, vec![], false, 100, 50);
        assert_eq!(ledger.call(3), Err(Limit::Calls));
        ledger.written(99);
        assert_eq!(ledger.call(3), Err(Limit::Calls));
        ledger.written(100);
        ledger.call(3).unwrap();
    }

    #[test]
    fn answers_that_are_never_finished_are_bounded() {
        let mut ledger = Ledger::new(Limits {
            answers: 3,
            ..Limits::default()
        });
        for question in 0..3 {
            ledger.call(question).unwrap();
            ledger.returned(question, vec![question], true, 1, 8);
            ledger.written(1);
        }
        assert_eq!(ledger.call(3), Err(Limit::Answers));
        assert_eq!(ledger.retained_bytes(), 24);
        assert_eq!(ledger.finish(0, true), Finish::Plain);
        assert_eq!(ledger.retained_bytes(), 16);
        ledger.call(3).unwrap();
    }

    #[test]
    fn capabilities_that_are_never_released_are_bounded() {
        let mut ledger = Ledger::new(Limits {
            exports: 2,
            ..Limits::default()
        });
        ledger.export(1).unwrap();
        ledger.export(1).unwrap();
        ledger.export(2).unwrap();
        assert_eq!(ledger.export(3), Err(Limit::Exports));
        ledger.release(3, 1);
        ledger.release(1, 1);
        assert_eq!(ledger.export(3), Err(Limit::Exports));
        ledger.release(3, 1);
        ledger.release(1, 1);
        ledger.export(3).unwrap();
    }

    #[derive(Clone, Debug)]
    enum Step {
        Call(u32),
        Return { question: u32, with_cap: bool },
        Finish { question: u32, release: bool },
        Release(u32, u32),
        Write,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u32..8).prop_map(Step::Call),
            (0u32..8, any::<bool>()).prop_map(|(question, with_cap)| Step::Return { question, with_cap }),
            (0u32..8, any::<bool>()).prop_map(|(question, release)| Step::Finish { question, release }),
            (0u32..4, 0u32..5).prop_map(|(id, count)| Step::Release(id, count)),
            Just(Step::Write),
        ]
    }

    proptest! {
        /// Whatever comes, in whatever order, nothing underflows, and an orderly end leaves nothing counted.
        #[test]
        fn counts_stay_consistent(steps in prop::collection::vec(step(), 0..200)) {
            let mut ledger = Ledger::new(Limits { calls: 6, answers: 7, exports: 4, ..Limits::default() });
            let mut end = 0;
            for step in steps {
                match step {
                    Step::Call(question) => drop(ledger.call(question)),
                    Step::Return { question, with_cap } => {
                        end += 8;
                        // The RPC system answers only what was asked and not answered before.
                        if ledger.answers.get(&question).is_some_and(|answer| !answer.returned) {
                            let exports = if with_cap { vec![question % 4] } else { vec![] };
                            for id in &exports {
                                ledger.export(*id).unwrap();
                            }
                            ledger.returned(question, exports, with_cap, end, 8);
                        }
                    }
                    Step::Finish { question, release } => drop(ledger.finish(question, release)),
                    Step::Release(id, count) => ledger.release(id, count),
                    Step::Write => ledger.written(end),
                }
                prop_assert!(ledger.in_flight <= 6);
                prop_assert!(ledger.answers.len() <= 7);
            }
            for question in 0..8 {
                ledger.finish(question, true);
                ledger.returned(question, vec![], false, end, 8);
                ledger.finish(question, true);
            }
            for id in 0..4 {
                ledger.release(id, u32::MAX);
            }
            ledger.written(end);
            prop_assert_eq!(ledger.in_flight, 0);
            prop_assert!(ledger.answers.is_empty());
            prop_assert!(ledger.exports.is_empty());
            prop_assert_eq!(ledger.retained_bytes(), 0);
        }
    }
}
