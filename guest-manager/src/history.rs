//! What a serial port printed: a ring of the last bytes, read by absolute position.
//!
//! ```text
//!            start                          end
//!   0 ........|==============================|
//!    forgotten            kept                 still to come
//! ```
//!
//! Pure: no waiting, no I/O. Readers keep their own position, so they disturb neither each other nor the guest.

use std::collections::VecDeque;

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

/// The ring.
#[derive(Debug)]
pub struct History {
    kept: VecDeque<u8>,
    capacity: usize,
    end: u64,
    ended: bool,
}

impl History {
    /// An empty ring that keeps at most `capacity` bytes, and takes memory only as it fills.
    pub fn new(capacity: usize) -> Self {
        Self {
            kept: VecDeque::new(),
            capacity,
            end: 0,
            ended: false,
        }
    }

    /// What an earlier manager has kept: these bytes, the last of them before position `end`.
    pub fn restored(capacity: usize, end: u64, bytes: &[u8]) -> Self {
        let bytes = &bytes[bytes.len().saturating_sub(capacity)..];
        Self {
            kept: bytes.iter().copied().collect(),
            capacity,
            end: end.max(bytes.len() as u64),
            ended: false,
        }
    }

    /// Appends output, forgetting the oldest where there is no room. After [`History::finish`] nothing is added.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.ended {
            return;
        }
        self.end = self.end.saturating_add(bytes.len() as u64);
        let bytes = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let surplus = (self.kept.len() + bytes.len()).saturating_sub(self.capacity);
        self.kept.drain(..surplus);
        self.kept.extend(bytes);
    }

    /// Nothing more will come.
    pub fn finish(&mut self) {
        self.ended = true;
        self.kept.shrink_to_fit();
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
        self.end - self.kept.len() as u64
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
        let from = position.max(self.start());
        // Both differences are at most the length of what is kept, which fits into memory.
        let skip = usize::try_from(from - self.start())
            .unwrap_or(usize::MAX)
            .min(self.kept.len());
        let take = most.min(self.kept.len() - skip);
        let bytes: Vec<u8> = self.kept.range(skip..skip + take).copied().collect();
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

    use super::*;

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
        /// Against the plain model: all bytes ever printed, of which the last `capacity` are kept.
        #[test]
        fn reads_match_the_whole_output(
            capacity in 1usize..64,
            pushes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..20),
            position in 0u64..2200,
            most in 0usize..70,
            finish: bool,
        ) {
            let mut history = History::new(capacity);
            let mut all = Vec::new();
            for bytes in &pushes {
                history.push(bytes);
                all.extend_from_slice(bytes);
                prop_assert!(history.kept.len() <= capacity);
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
