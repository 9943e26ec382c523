//! The last events of all guests, and cursors of those who read along.
//!
//! ```text
//!   append --> | 41 | 42 | 43 | 44 | 45 |        at most 1024, numbered without gaps
//!                      ^         ^
//!                   cursor A   cursor B          each at its own pace; one that falls out of the ring
//!                                                goes on at its oldest event and learns how many it lost
//! ```
//!
//! Pure: whoever feeds subscribers waits elsewhere.

use std::{
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use crate::{
    durable::chronicle::Past,
    model::{Event, EventKind, GuestId},
};

/// How many events are kept.
pub const KEPT: usize = 1024;

/// The ring.
#[derive(Debug)]
pub struct EventLog {
    kept: VecDeque<Rc<Event>>,
    capacity: usize,
    last_sequence: u64,
    ordinals: HashMap<GuestId, u64>,
}

/// Where a reader is. It sees all events, or those of one guest.
#[derive(Debug, Clone)]
pub struct Cursor {
    next_sequence: u64,
    only: Option<Only>,
}

#[derive(Debug, Clone)]
struct Only {
    id: GuestId,
    next_ordinal: u64,
}

impl EventLog {
    /// An empty ring of `capacity` events.
    pub fn new(capacity: usize) -> Self {
        Self {
            kept: VecDeque::new(),
            capacity,
            last_sequence: 0,
            ordinals: HashMap::new(),
        }
    }

    /// Appends an event; the oldest is forgotten where there is no room.
    pub fn append(&mut self, time_ns: u64, id: GuestId, guest: &Rc<str>, generation: u64, kind: EventKind) {
        self.last_sequence += 1;
        let removed = kind == EventKind::Removed;
        let ordinal = self.ordinals.entry(id).or_default();
        *ordinal += 1;
        let event = Event {
            sequence: self.last_sequence,
            ordinal: *ordinal,
            time_ns,
            id,
            guest: guest.clone(),
            generation,
            kind,
        };
        if removed {
            // An id is never used again, so nothing is counted for it any more.
            self.forget(id);
        }
        if self.kept.len() == self.capacity {
            self.kept.pop_front();
        }
        self.kept.push_back(Rc::new(event));
    }

    /// Nothing will happen to this guest any more, without an event that says so.
    pub fn forget(&mut self, id: GuestId) {
        self.ordinals.remove(&id);
    }

    /// Number of the last event; 0 before the first.
    pub fn last(&self) -> u64 {
        self.last_sequence
    }

    /// Of how many guests the events are counted.
    #[cfg(test)]
    pub(crate) fn counted(&self) -> usize {
        self.ordinals.len()
    }

    /// The events that are kept and came after the one of this number.
    pub fn after(&self, sequence: u64) -> impl Iterator<Item = &Event> {
        let newer = self.last_sequence.saturating_sub(sequence);
        let skip = self
            .kept
            .len()
            .saturating_sub(usize::try_from(newer).unwrap_or(usize::MAX));
        self.kept.iter().skip(skip).map(|event| &**event)
    }

    /// Goes on where the log of an earlier manager ended, whose last events these are, numbered without gaps; before anybody reads along, and in place of
    /// what was appended. Each of them is told to be of the guest that `id` says.
    pub(crate) fn restore(&mut self, past: Vec<Past>, mut id: impl FnMut(&Past) -> GuestId) {
        if !past.is_empty() {
            self.kept.clear();
            self.ordinals.clear();
        }
        for past in past {
            let id = id(&past);
            self.last_sequence = past.sequence - 1;
            self.append(
                past.time_ns,
                id,
                &past.guest.as_str().into(),
                past.generation,
                past.kind,
            );
        }
    }

    /// A cursor over all events from now on, after the last `replay` that are kept.
    pub fn cursor(&self, replay: usize) -> Cursor {
        let replayed = replay.min(self.kept.len()) as u64;
        Cursor {
            next_sequence: self.last_sequence + 1 - replayed,
            only: None,
        }
    }

    /// A cursor over one guest's events from now on, after the last `replay` of them that are kept.
    pub fn cursor_of(&self, id: GuestId, replay: usize) -> Cursor {
        let replayed = self
            .kept
            .iter()
            .rev()
            .filter(|event| event.id == id)
            .take(replay)
            .last();
        let (next_sequence, next_ordinal) = match replayed {
            Some(event) => (event.sequence, event.ordinal),
            None => (self.last_sequence + 1, self.ordinals.get(&id).copied().unwrap_or(0) + 1),
        };
        Cursor {
            next_sequence,
            only: Some(Only { id, next_ordinal }),
        }
    }

    /// The next event for a cursor, with the number of those that it lost before.
    pub fn next(&self, cursor: &mut Cursor) -> Option<(Rc<Event>, u64)> {
        let oldest = self.last_sequence + 1 - self.kept.len() as u64;
        let first = cursor.next_sequence.max(oldest);
        let skip = usize::try_from(first - oldest)
            .unwrap_or(usize::MAX)
            .min(self.kept.len());
        let mut ahead = self.kept.range(skip..);
        let Some(only) = &mut cursor.only else {
            let event = ahead.next()?.clone();
            let dropped = event.sequence - cursor.next_sequence;
            cursor.next_sequence = event.sequence + 1;
            return Some((event, dropped));
        };
        let found = ahead.find(|event| event.id == only.id);
        cursor.next_sequence = found.map_or(self.last_sequence, |event| event.sequence) + 1;
        let event = found?.clone();
        let dropped = event.ordinal - only.next_ordinal;
        only.next_ordinal = event.ordinal + 1;
        Some((event, dropped))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn append(log: &mut EventLog, id: u64) {
        log.append(0, GuestId(id), &format!("guest{id}").into(), 1, EventKind::Starting);
    }

    fn drain(log: &EventLog, cursor: &mut Cursor) -> Vec<(u64, u64)> {
        std::iter::from_fn(|| log.next(cursor))
            .map(|(event, dropped)| (event.sequence, dropped))
            .collect()
    }

    #[test]
    fn a_new_cursor_sees_only_what_follows() {
        let mut log = EventLog::new(8);
        append(&mut log, 1);
        let mut cursor = log.cursor(0);
        assert!(log.next(&mut cursor).is_none());
        append(&mut log, 1);
        assert_eq!(drain(&log, &mut cursor), [(2, 0)]);
    }

    #[test]
    fn a_replay_gives_the_last_ones_first() {
        let mut log = EventLog::new(3);
        for _ in 0..5 {
            append(&mut log, 1);
        }
        assert_eq!(drain(&log, &mut log.cursor(2)), [(4, 0), (5, 0)]);
        assert_eq!(drain(&log, &mut log.cursor(99)), [(3, 0), (4, 0), (5, 0)]);
    }

    #[test]
    fn a_slow_reader_learns_how_many_it_lost() {
        let mut log = EventLog::new(3);
        let mut cursor = log.cursor(0);
        for _ in 0..10 {
            append(&mut log, 1);
        }
        assert_eq!(drain(&log, &mut cursor), [(8, 7), (9, 0), (10, 0)]);
    }

    #[test]
    fn losses_of_other_guests_are_not_counted() {
        let mut log = EventLog::new(2);
        let mut cursor = log.cursor_of(GuestId(7), 0);
        append(&mut log, 7);
        for _ in 0..5 {
            append(&mut log, 8);
        }
        append(&mut log, 7);
        assert_eq!(drain(&log, &mut cursor), [(7, 1)]);
    }

    #[test]
    fn a_replay_of_one_guest_skips_the_others() {
        let mut log = EventLog::new(5);
        for id in [7, 7, 8, 7, 8, 8, 7] {
            append(&mut log, id);
        }
        let replay = |count| drain(&log, &mut log.cursor_of(GuestId(7), count));
        assert_eq!(replay(1), [(7, 0)]);
        assert_eq!(
            replay(99),
            [(4, 0), (7, 0)],
            "the first two are not kept any more, and nothing was promised of them"
        );
        assert_eq!(replay(0), []);
        assert_eq!(drain(&log, &mut log.cursor_of(GuestId(9), 3)), []);
    }

    proptest! {
        /// Whatever the pace: what is seen and what is told as lost add up to all that concerned the reader, in order.
        #[test]
        fn nothing_is_lost_silently(steps in prop::collection::vec((0u64..3, any::<bool>()), 0..200), capacity in 1usize..9) {
            let mut log = EventLog::new(capacity);
            let (mut all, mut one) = (log.cursor(0), log.cursor_of(GuestId(1), 0));
            let (mut seen_all, mut seen_one) = (0u64, 0u64);
            let (mut sent_all, mut sent_one) = (0u64, 0u64);
            let mut last = 0;
            for (id, read) in steps {
                append(&mut log, id);
                sent_all += 1;
                sent_one += u64::from(id == 1);
                if read && let Some((event, dropped)) = log.next(&mut all) {
                    seen_all += 1 + dropped;
                    prop_assert!(event.sequence > last);
                    last = event.sequence;
                    prop_assert_eq!(seen_all, event.sequence);
                }
                if read && let Some((event, dropped)) = log.next(&mut one) {
                    prop_assert_eq!(event.id, GuestId(1));
                    seen_one += 1 + dropped;
                    prop_assert_eq!(seen_one, event.ordinal);
                }
            }
            while let Some((_, dropped)) = log.next(&mut all) {
                seen_all += 1 + dropped;
            }
            while let Some((_, dropped)) = log.next(&mut one) {
                seen_one += 1 + dropped;
            }
            prop_assert_eq!(seen_all, sent_all);
            prop_assert!(seen_one <= sent_one);
        }
    }
}
