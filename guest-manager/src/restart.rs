//! Whether a guest that ended by itself begins again, and how soon: the policy of its configuration. Pure.
//!
//! ```text
//!   a run ends --failed--> one more failure in the row --more than `attempts`--> given up
//!       |                                   '--else--> again, if the policy is onFailure or always
//!       '--otherwise-----------------------------------> again, if the policy is always
//!
//!   waits: delay, 2 * delay, 4 * delay ... maxDelay; a run that lasted for `healthy` ends the row, and so the waits are short again
//! ```
//!
//! What `onReset` and `onPanic` begin again is decided before (`outcome`), and paced by `pace`.

use std::time::Duration;

use sepal_schema::config::{Restart, RestartPolicy};

/// How a run ended that nobody asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// It crashed, its component died, or it could not be created.
    Failed,
    /// The guest turned itself off.
    Done,
}

/// What follows a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    End,
    /// Nothing any more: it has failed so many times in a row.
    GiveUp(u32),
    /// The next run, after this time.
    Again(Duration),
}

/// What is counted of the runs of a guest since somebody started it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Runs that failed since one was a good one.
    pub(crate) failures: u32,
    /// Runs that the policy followed by another since one was a good one.
    pub(crate) waits: u32,
    /// How often it was begun again by itself.
    pub(crate) restarts: u32,
}

/// The runs of a guest since somebody started it.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    rules: Restart,
    counted: Counted,
}

impl Row {
    /// Before the first run; or in the middle, where an earlier manager has counted.
    pub(crate) fn new(rules: Restart, counted: Counted) -> Self {
        Self { rules, counted }
    }

    /// What a run that ended so, after this time, is followed by.
    pub(crate) fn after(&mut self, how: How, uptime: Duration) -> Verdict {
        self.lasted(uptime);
        if how == How::Failed {
            self.counted.failures = self.counted.failures.saturating_add(1);
        }
        let Counted { failures, waits, .. } = self.counted;
        match (self.rules.policy, how) {
            (RestartPolicy::Never, _) | (RestartPolicy::OnFailure, How::Done) => return Verdict::End,
            (RestartPolicy::OnFailure | RestartPolicy::Always, How::Failed) if failures > self.rules.attempts() => {
                return Verdict::GiveUp(failures);
            }
            (RestartPolicy::OnFailure | RestartPolicy::Always, _) => {}
        }
        // 2^31 times the shortest delay is longer than the longest there is.
        let doubled = self.rules.delay().saturating_mul(1 << waits.min(31));
        self.counted.waits = waits.saturating_add(1);
        Verdict::Again(doubled.min(self.rules.max_delay()))
    }

    /// A run lasted for this time, however it ended: a good one ends the row.
    pub(crate) fn lasted(&mut self, uptime: Duration) {
        if uptime >= self.rules.healthy() {
            self.start_over();
        }
    }

    /// Somebody began it again: a new row.
    pub(crate) fn start_over(&mut self) {
        (self.counted.failures, self.counted.waits) = (0, 0);
    }

    /// It has begun again by itself.
    pub(crate) fn begun_again(&mut self) {
        self.counted.restarts = self.counted.restarts.saturating_add(1);
    }

    /// What has been counted so far.
    pub(crate) fn counted(&self) -> Counted {
        self.counted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICIES: [RestartPolicy; 3] = [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always];

    fn row(policy: RestartPolicy) -> Row {
        let rules = Restart {
            policy,
            attempts: 3,
            delay_ms: 100,
            max_delay_ms: 300,
            healthy_ms: 1000,
        };
        Row::new(rules, Counted::default())
    }

    fn again(milliseconds: u64) -> Verdict {
        Verdict::Again(Duration::from_millis(milliseconds))
    }

    const SHORT: Duration = Duration::from_millis(999);
    const GOOD: Duration = Duration::from_millis(1000);

    #[test]
    fn a_guest_that_fails_again_and_again_is_given_up() {
        for policy in [RestartPolicy::OnFailure, RestartPolicy::Always] {
            let mut row = row(policy);
            let verdicts: Vec<_> = (0..4).map(|_| row.after(How::Failed, SHORT)).collect();
            assert_eq!(verdicts, [again(100), again(200), again(300), Verdict::GiveUp(4)]);
            assert_eq!(row.counted().failures, 4);
        }
    }

    #[test]
    fn a_good_run_ends_the_row_though_it_failed_in_the_end() {
        let mut row = row(RestartPolicy::OnFailure);
        for _ in 0..3 {
            row.after(How::Failed, SHORT);
        }
        assert_eq!(row.after(How::Failed, GOOD), again(100));
        assert_eq!(row.counted().failures, 1);
        row.start_over();
        assert_eq!(row.counted().failures, 0);
    }

    #[test]
    fn a_guest_that_turns_itself_off_begins_again_if_that_is_wanted_and_never_ends_in_a_loop() {
        assert_eq!(row(RestartPolicy::OnFailure).after(How::Done, GOOD), Verdict::End);
        let mut row = row(RestartPolicy::Always);
        let verdicts: Vec<_> = (0..6).map(|_| row.after(How::Done, SHORT)).collect();
        assert_eq!(verdicts[..3], [again(100), again(200), again(300)]);
        assert!(verdicts[3..].iter().all(|verdict| *verdict == again(300)));
        assert_eq!(row.counted().failures, 0);
    }

    #[test]
    fn what_another_manager_counted_goes_on() {
        for how in [How::Failed, How::Done] {
            let mut before = row(RestartPolicy::Always);
            before.after(how, SHORT);
            before.begun_again();
            let mut after = Row::new(before.rules, before.counted());
            assert_eq!((after.counted().waits, after.counted().restarts), (1, 1));
            assert_eq!(after.after(how, SHORT), before.after(how, SHORT));
            assert_eq!(after.counted(), before.counted());
        }
    }

    fn rules() -> impl Strategy<Value = Restart> {
        let policy = prop::sample::select(POLICIES.to_vec());
        (policy, 0u32..20, 0u32..5000, any::<u32>(), 0u32..20_000).prop_map(
            |(policy, attempts, delay_ms, max_delay_ms, healthy_ms)| Restart {
                policy,
                attempts,
                delay_ms,
                max_delay_ms,
                healthy_ms,
            },
        )
    }

    fn runs() -> impl Strategy<Value = Vec<(How, Duration)>> {
        let run = (any::<bool>(), 0u64..30_000).prop_map(|(failed, uptime)| {
            let how = if failed { How::Failed } else { How::Done };
            (how, Duration::from_millis(uptime))
        });
        prop::collection::vec(run, 0..200)
    }

    proptest! {
        /// Against the sentences of `config.capnp`, whatever the runs are.
        #[test]
        fn the_policy_is_kept(rules in rules(), runs in runs()) {
            let mut row = Row::new(rules, Counted::default());
            let (mut failed, mut last_wait) = (0, Duration::ZERO);
            for (how, uptime) in runs {
                if uptime >= rules.healthy() {
                    (failed, last_wait) = (0, Duration::ZERO);
                }
                failed += u32::from(how == How::Failed);
                let verdict = row.after(how, uptime);
                prop_assert_eq!(row.counted().failures, failed);
                let wanted = match rules.policy {
                    RestartPolicy::Never => false,
                    RestartPolicy::OnFailure => how == How::Failed,
                    RestartPolicy::Always => true,
                };
                match verdict {
                    Verdict::End => prop_assert!(!wanted),
                    Verdict::GiveUp(failures) => {
                        prop_assert!(wanted && how == How::Failed && failed > rules.attempts());
                        prop_assert_eq!(failures, failed);
                        break;
                    }
                    Verdict::Again(wait) => {
                        prop_assert!(wanted && (how == How::Done || failed <= rules.attempts()));
                        prop_assert!(wait >= rules.delay() && wait <= rules.max_delay());
                        let expected = if last_wait.is_zero() { rules.delay() } else { last_wait * 2 };
                        prop_assert_eq!(wait, expected.min(rules.max_delay()));
                        last_wait = wait;
                    }
                }
            }
        }

        /// No policy has a guest that does nothing but fail begin again for ever, or keep the host busy meanwhile.
        #[test]
        fn failing_comes_to_an_end(rules in rules(), uptimes in prop::collection::vec(0u64..20_000, 1..50)) {
            let mut row = Row::new(rules, Counted::default());
            let short = uptimes.into_iter().map(Duration::from_millis).filter(|uptime| *uptime < rules.healthy());
            let mut begun = 0;
            for uptime in short.cycle().take(100) {
                match row.after(How::Failed, uptime) {
                    Verdict::Again(wait) => {
                        prop_assert!(!wait.is_zero());
                        begun += 1;
                    }
                    Verdict::End | Verdict::GiveUp(_) => break,
                }
            }
            prop_assert!(begun <= rules.attempts());
        }
    }
}
