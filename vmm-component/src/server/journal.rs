//! Events that nobody is known to have heard: kept for the manager after the one that was told, the latest of them.
//!
//! ```text
//!   push --> kept --heard--> gone
//!             '---- too many are kept: the oldest goes unheard, and counts as missed until it is heard after all
//! ```

use std::collections::VecDeque;

/// The most events that are kept (lifecycle.capnp, `Component.attach`).
pub(super) const MOST: usize = 256;

/// What was told and may not have been heard.
#[derive(Debug)]
pub(super) struct Journal<E> {
    kept: VecDeque<(u64, E)>,
    next: u64,
    missed: u64,
}

impl<E> Default for Journal<E> {
    fn default() -> Self {
        Self {
            kept: VecDeque::new(),
            next: 0,
            missed: 0,
        }
    }
}

impl<E> Journal<E> {
    /// Keeps an event; returns its number.
    pub(super) fn push(&mut self, event: E) -> u64 {
        if self.kept.len() == MOST {
            self.kept.pop_front();
            self.missed += 1;
        }
        let number = self.next;
        self.next += 1;
        self.kept.push_back((number, event));
        number
    }

    /// The number of the event that is pushed next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// An event was heard; to be said once for each.
    pub(super) fn heard(&mut self, number: u64) {
        match self.kept.binary_search_by_key(&number, |(number, _)| *number) {
            Ok(found) => drop(self.kept.remove(found)),
            Err(_) => self.missed = self.missed.saturating_sub(1),
        }
    }

    /// All that is kept, the oldest first.
    pub(super) fn kept(&self) -> impl Iterator<Item = (u64, &E)> {
        self.kept.iter().map(|(number, event)| (*number, event))
    }

    /// How many were not kept since this was asked last.
    pub(super) fn take_missed(&mut self) -> u64 {
        std::mem::take(&mut self.missed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every event is heard, kept, or counted as missed.
        #[test]
        fn no_event_is_lost_unnoticed(steps in proptest::collection::vec(proptest::option::weighted(0.6, 0..1000_usize), 0..900)) {
            let mut journal = Journal::default();
            let mut unheard = Vec::new();
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    // In whatever order they are heard.
                    Some(which) if which < 200 && !unheard.is_empty() => {
                        let number = unheard.remove(which % unheard.len());
                        journal.heard(number);
                    }
                    _ => unheard.push(journal.push(n)),
                }
                let kept: Vec<u64> = journal.kept().map(|(number, _)| number).collect();
                prop_assert!(kept.len() <= MOST);
                prop_assert!(kept.iter().all(|number| unheard.contains(number)));
                prop_assert!(kept.is_sorted());
                prop_assert_eq!(kept.len() as u64 + journal.missed, unheard.len() as u64);
            }
            let missed = journal.missed;
            prop_assert_eq!(journal.take_missed(), missed);
            prop_assert_eq!(journal.take_missed(), 0);
        }
    }
}
