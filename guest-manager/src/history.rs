//! What a serial port printed: a ring of the last bytes, read by absolute position.
//!
//! ```text
//!            start                          end
//!   0 ........|==============================|
//!    forgotten            kept                 still to come
//! ```
//!
//! Of a guest that goes on without its manager the bytes are in memory that the next manager gets, and are not kept here a second time.
//!
//! Pure: no waiting, no I/O. Readers keep their own position, so they disturb neither each other nor the guest.

use std::{collections::VecDeque, fmt, rc::Rc};

/// How much is kept for a guest, in bytes, unless something else is configured.
pub const DEFAULT_CAPACITY: usize = 256 * 1024;
/// Most bytes that one read returns.
pub const MAX_READ: usize = 64 * 1024;

/// A piece of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Position of the first byte.
    pub position: u64,
    /// The bytes; empty where there are none yet, or nothing more will come.
    pub bytes: Vec<u8>,
    /// Bytes that were asked for but are no longer kept.
    pub dropped: u64,
    /// Nothing will come after these bytes.
    pub ended: bool,
}

/// What keeps the last bytes elsewhere.
pub(crate) trait Tail: fmt::Debug {
    /// Position of the first byte.
    fn start(&self) -> u64;

    /// Position after the last byte.
    fn end(&self) -> u64;

    /// At most so many bytes from a position on; none if they cannot be read.
    fn read(&self, position: u64, most: usize) -> Vec<u8>;
}

#[derive(Debug)]
enum Kept {
    Here(VecDeque<u8>),
    Elsewhere(Rc<dyn Tail>),
}

/// The ring.
#[derive(Debug)]
pub struct History {
    kept: Kept,
    capacity: usize,
    end: u64,
    ended: bool,
}

impl History {
    /// An empty ring that keeps at most `capacity` bytes, and takes memory only as it fills.
    pub fn new(capacity: usize) -> Self {
        Self {
            kept: Kept::Here(VecDeque::new()),
            capacity,
            end: 0,
            ended: false,
        }
    }

    /// What an earlier manager has kept.
    pub(crate) fn restored(capacity: usize, tail: Rc<dyn Tail>) -> Self {
        Self {
            capacity,
            end: tail.end(),
            kept: Kept::Elsewhere(tail),
            ended: false,
        }
    }

    /// From now on the bytes are kept elsewhere; before there are any.
    pub(crate) fn keep_elsewhere(&mut self, tail: Rc<dyn Tail>) {
        if (self.end, tail.end()) == (0, 0) {
            self.kept = Kept::Elsewhere(tail);
        }
    }

    /// The next bytes could not be kept elsewhere: from now on they are here, and what came before them.
    pub(crate) fn keep_here(&mut self) {
        if let Kept::Elsewhere(tail) = &self.kept {
            self.kept = Kept::Here(tail.read(tail.start(), self.capacity).into());
        }
    }

    /// Appends output, forgetting the oldest where there is no room; where it is kept elsewhere, it is there already. After [`History::finish`] nothing is
    /// added.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.ended {
            return;
        }
        self.end = self.end.saturating_add(bytes.len() as u64);
        if let Kept::Here(kept) = &mut self.kept {
            let bytes = &bytes[bytes.len().saturating_sub(self.capacity)..];
            let surplus = (kept.len() + bytes.len()).saturating_sub(self.capacity);
            kept.drain(..surplus);
            kept.extend(bytes);
        }
    }

    /// Nothing more will come.
    pub fn finish(&mut self) {
        self.ended = true;
        if let Kept::Here(kept) = &mut self.kept {
            kept.shrink_to_fit();
        }
    }

    /// Whether nothing more will come.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// How much is kept at most.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Position of the oldest byte that is kept.
    pub fn start(&self) -> u64 {
        match &self.kept {
            Kept::Here(kept) => self.end - kept.len() as u64,
            Kept::Elsewhere(tail) => tail.start(),
        }
    }

    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Reads from `position` on, at most `most` bytes (0: the largest piece possible, [`MAX_READ`]). A position past the end reads nothing.
    pub fn read(&self, position: u64, most: usize) -> Piece {
        let most = if most == 0 { MAX_READ } else { most.min(MAX_READ) };
        if position >= self.end {
            return Piece {
                position,
                bytes: Vec::new(),
                dropped: 0,
                ended: self.ended,
            };
        }
        let start = self.start();
        let mut from = position.max(start);
        let bytes: Vec<u8> = match &self.kept {
            Kept::Here(kept) => {
                // Both differences are at most the length of what is kept, which fits into memory.
                let skip = usize::try_from(from - start).unwrap_or(usize::MAX).min(kept.len());
                let take = most.min(kept.len() - skip);
                kept.range(skip..skip + take).copied().collect()
            }
            Kept::Elsewhere(tail) => tail.read(from, most),
        };
        if bytes.is_empty() {
            // Lost: whoever reads goes on behind it.
            from = self.end;
        }
        let ended = self.ended && from + bytes.len() as u64 == self.end;
        Piece {
            position: from,
            bytes,
            dropped: from - position,
            ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::cell::RefCell;

    use super::*;
    use crate::durable::{memory::Shared, ring::Ring};

    #[test]
    fn a_reader_gets_what_was_printed_and_then_nothing() {
        let mut history = History::new(16);
        history.push(b"hello");
        assert_eq!(
            history.read(0, 0),
            Piece {
                position: 0,
                bytes: b"hello".into(),
                dropped: 0,
                ended: false
            }
        );
        assert_eq!(history.read(3, 1).bytes, b"l");
        assert_eq!(
            history.read(5, 0),
            Piece {
                position: 5,
                bytes: Vec::new(),
                dropped: 0,
                ended: false
            }
        );
    }

    #[test]
    fn the_oldest_is_forgotten_and_counted() {
        let mut history = History::new(4);
        history.push(b"abcdef");
        history.push(b"g");
        assert_eq!(
            history.read(1, 0),
            Piece {
                position: 3,
                bytes: b"defg".into(),
                dropped: 2,
                ended: false
            }
        );
    }

    #[test]
    fn the_end_is_told_with_the_last_bytes() {
        let mut history = History::new(4);
        history.push(b"abcd");
        history.finish();
        history.push(b"late");
        assert!(!history.read(0, 2).ended);
        assert!(history.read(2, 2).ended);
        assert!(history.read(4, 0).ended);
    }

    proptest! {
        /// Against the plain model: all bytes ever printed, of which the last `capacity` are kept, here or elsewhere, or here since that failed.
        #[test]
        fn reads_match_the_whole_output(
            capacity in 1usize..64,
            pushes in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..100), prop::bool::weighted(0.9)), 0..20),
            elsewhere: bool,
            position in 0u64..2200,
            most in 0usize..70,
            finish: bool,
        ) {
            let mut history = History::new(capacity);
            let mut all = Vec::new();
            let ring = Rc::new(RefCell::new(Ring::create(Shared::new().unwrap(), capacity).unwrap()));
            if elsewhere {
                history.keep_elsewhere(ring.clone());
            }
            for (bytes, is_kept) in &pushes {
                match is_kept {
                    true => ring.borrow_mut().publish(bytes).unwrap(),
                    false => history.keep_here(),
                }
                history.push(bytes);
                if !is_kept {
                    ring.borrow_mut().skip(bytes.len()).unwrap();
                }
                all.extend_from_slice(bytes);
                prop_assert_eq!(history.end - history.start(), all.len().min(capacity) as u64);
            }
            if finish {
                history.finish();
            }
            prop_assert_eq!(history.end(), all.len() as u64);
            let piece = history.read(position, most);
            let first = usize::try_from(piece.position).unwrap();
            if first <= all.len() {
                prop_assert_eq!(&piece.bytes[..], &all[first..first + piece.bytes.len()]);
            } else {
                prop_assert!(piece.bytes.is_empty());
            }
            prop_assert_eq!(piece.position - piece.dropped, position);
            let next = piece.position + piece.bytes.len() as u64;
            prop_assert_eq!(piece.ended, finish && next >= all.len() as u64);
            // Progress: something comes whenever something is there.
            prop_assert_eq!(piece.bytes.is_empty(), position >= all.len() as u64);
        }
    }
}
