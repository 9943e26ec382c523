//! Which threads of a component run vCPUs, as far as that was found out. Pure.
//!
//! ```text
//!   unknown --look--> (on another thread) --found--> all of them: kept as long as the component lives
//!      ^                                     '-----> not all: what there is; looked for again after 1 s, 2 s, 4 s ... 1 min
//!      '---- one is gone, or the component is another
//! ```
//!
//! To look costs a system call or three for each thread of the component, which may have given them other names: hence not at each question.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// How soon they are looked for again.
const SOONEST: Duration = Duration::from_secs(1);
/// How late at the latest.
const LATEST: Duration = Duration::from_secs(60);

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The component's process.
    pid: u32,
    /// The ids of the threads by the index of their vCPU.
    threads: BTreeMap<u8, u32>,
    /// All that there are were found, and none has gone since.
    all: bool,
    looking: bool,
    /// How often not all were found, or one had gone after that.
    misses: u32,
    /// Before then they are not looked for.
    next: Option<Instant>,
}

impl Known {
    /// The threads of this process; none if it is another.
    pub(super) fn threads(&self, pid: u32) -> &BTreeMap<u8, u32> {
        static NONE: BTreeMap<u8, u32> = BTreeMap::new();
        match self.pid == pid {
            true => &self.threads,
            false => &NONE,
        }
    }

    /// Whether those of this process are to be looked for now; what was found has to be told then.
    pub(super) fn look(&mut self, pid: u32, now: Instant) -> bool {
        self.begin(pid);
        let due = self.next.is_none_or(|next| now >= next);
        let look = !self.all && !self.looking && due;
        self.looking |= look;
        look
    }

    /// What was found of this process, which has `count` vCPUs.
    pub(super) fn found(&mut self, pid: u32, threads: BTreeMap<u8, u32>, count: u8, now: Instant) {
        self.begin(pid);
        self.looking = false;
        self.all = threads.len() == usize::from(count);
        self.threads = threads;
        // 2^10 times the shortest is more than the longest.
        let wait = SOONEST.saturating_mul(1 << self.misses.min(10)).min(LATEST);
        self.next = Some(now + wait);
        self.misses = self.misses.saturating_add(u32::from(!self.all));
    }

    /// A thread that was found is no more.
    pub(super) fn gone(&mut self, vcpu: u8) {
        self.threads.remove(&vcpu);
        let had_all = std::mem::replace(&mut self.all, false);
        self.misses = self.misses.saturating_add(had_all.into());
    }

    fn begin(&mut self, pid: u32) {
        if self.pid != pid {
            *self = Self { pid, ..Self::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn threads(count: u8) -> BTreeMap<u8, u32> {
        (0..count).map(|vcpu| (vcpu, 100 + u32::from(vcpu))).collect()
    }

    #[test]
    fn what_was_found_is_kept_for_the_component() {
        let (mut known, now) = (Known::default(), Instant::now());
        assert!(known.look(7, now) && !known.look(7, now), "one looks at a time");
        assert!(known.threads(7).is_empty());
        known.found(7, threads(2), 2, now);
        assert_eq!(known.threads(7), &threads(2));
        assert!(known.threads(8).is_empty());
        assert!(!known.look(7, now + LATEST));
        // It was begun again, by another component.
        assert!(known.look(8, now));
        // What comes late is of nobody any more, and harms nobody.
        known.found(7, threads(2), 2, now);
        assert!(known.look(8, now) && known.threads(8).is_empty());
    }

    #[test]
    fn one_that_is_gone_is_looked_for() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.found(7, threads(3), 3, now);
        known.gone(1);
        assert_eq!(known.threads(7).keys().copied().collect::<Vec<_>>(), [0, 2]);
        assert!(!known.look(7, now) && known.look(7, now + SOONEST));
    }

    proptest! {
        #[test]
        fn hostile_components_are_looked_at_less_and_less(
            questions in prop::collection::vec((0..500_u64, any::<bool>()), 1..2000),
        ) {
            let (mut known, begin) = (Known::default(), Instant::now());
            let (mut now, mut looks) = (begin, 0);
            for (pause, renamed) in questions {
                now += Duration::from_millis(pause);
                if known.look(7, now) {
                    looks += 1;
                    // Either it hides a thread, or it ends one as soon as that was found.
                    known.found(7, threads(2 - u8::from(renamed)), 2, now);
                    known.gone(0);
                }
            }
            // Doubled six times, and once a minute from then on.
            prop_assert!(looks <= 8 + (now - begin).as_secs() / LATEST.as_secs());
        }
    }
}
