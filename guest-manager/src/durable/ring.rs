//! The last bytes of a stream in memory that outlives this process: what a port printed, or the journal.
//!
//! ```text
//!   0    capacity | base | end | begin                         words, each written as a whole
//!   4096 |=============== kept ===============|-- room --|     bytes by position modulo the size: the room takes what is being written
//!                                            end               while nothing of what is kept is touched
//! ```
//!
//! What is read from a socket is *published* here before it is *consumed* there, so that nothing is lost if the process is killed in between, and the
//! next one can tell what it would otherwise have twice:
//!
//! ```text
//!   base = end --> peek, which the socket counts (SO_PEEK_OFF) --> publish: end += n --> consume: the socket counts back
//!
//!   end == base: nothing that is still in the socket has been published
//!   end > base:  as much of what is in the socket has been published as the socket has counted
//! ```
//!
//! Where there is no memory for a piece it is *skipped*: positions go on, and what is kept begins behind it.
//!
//! Pure: memory is passed in.

use std::io;

use super::memory::Memory;

const CAPACITY: u64 = 0;
const BASE: u64 = 8;
const END: u64 = 16;
const BEGIN: u64 = 24;
const DATA: u64 = 4096;
/// The most that is written at a time, in bytes.
pub(crate) const ROOM: usize = 64 * 1024;
/// The largest ring, in bytes.
const MAX_CAPACITY: u64 = 1 << 30;

/// The ring.
#[derive(Debug)]
pub(crate) struct Ring<M> {
    memory: M,
    capacity: u64,
    base: u64,
    end: u64,
    /// Nothing before this position is kept.
    begin: u64,
}

impl<M: Memory> Ring<M> {
    /// An empty ring that keeps the last `capacity` bytes.
    ///
    /// # Errors
    /// The host has no memory left.
    pub(crate) fn create(memory: M, capacity: usize) -> io::Result<Self> {
        let capacity = (capacity as u64).clamp(1, MAX_CAPACITY);
        memory.write_word(capacity, CAPACITY)?;
        Ok(Self {
            memory,
            capacity,
            base: 0,
            end: 0,
            begin: 0,
        })
    }

    /// The ring that somebody else has written to until now.
    ///
    /// # Errors
    /// There is none in this memory, or it cannot be read.
    pub(crate) fn open(memory: M) -> io::Result<Self> {
        let (capacity, base, end, begin) = (
            memory.read_word(CAPACITY)?,
            memory.read_word(BASE)?,
            memory.read_word(END)?,
            memory.read_word(BEGIN)?,
        );
        if capacity == 0 || capacity > MAX_CAPACITY || base > end {
            return Err(io::Error::other("there is no ring in this memory"));
        }
        Ok(Self {
            memory,
            capacity,
            base,
            end,
            begin,
        })
    }

    /// What it is kept in.
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    /// Position after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// From now on what is published comes from a socket of which all that was published has been consumed.
    ///
    /// # Errors
    /// The memory cannot be written to.
    pub(crate) fn all_consumed(&mut self) -> io::Result<()> {
        if self.base != self.end {
            self.memory.write_word(self.end, BASE)?;
            self.base = self.end;
        }
        Ok(())
    }

    /// How much of what is in the socket has been published already, where the socket has counted so many bytes as peeked at.
    pub(crate) fn published(&self, counted: u64) -> u64 {
        match self.end == self.base {
            true => 0,
            false => counted.min(self.end - self.base),
        }
    }

    /// Publishes bytes, at most [`ROOM`] of them at a time.
    ///
    /// # Errors
    /// The host has no memory left; nothing of the rest has been published.
    pub(crate) fn publish(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(ROOM) {
            self.write(piece)?;
            let end = self.end + piece.len() as u64;
            self.memory.write_word(end, END)?;
            self.end = end;
        }
        Ok(())
    }

    /// Goes on behind so many bytes that could not be published: they have been, as far as what is consumed of a socket is concerned, but neither they nor
    /// what was before them are kept.
    ///
    /// # Errors
    /// The memory cannot be written to, not even where it was before.
    pub(crate) fn skip(&mut self, count: usize) -> io::Result<()> {
        let end = self.end + count as u64;
        // First: whoever is killed in between has published nothing, and keeps nothing.
        self.memory.write_word(end, BEGIN)?;
        self.begin = end;
        self.memory.write_word(end, END)?;
        self.end = end;
        Ok(())
    }

    fn size(&self) -> u64 {
        self.capacity + ROOM as u64
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let at = self.end % self.size();
        let first = usize::try_from(self.size() - at).unwrap_or(usize::MAX).min(bytes.len());
        let (first, rest) = bytes.split_at(first);
        self.memory.write(first, DATA + at)?;
        if !rest.is_empty() {
            self.memory.write(rest, DATA)?;
        }
        Ok(())
    }

    /// Position of the first byte that is kept.
    pub(crate) fn start(&self) -> u64 {
        self.end.saturating_sub(self.capacity).max(self.begin).min(self.end)
    }

    /// What is kept from a position on: the position of its first byte, and at most so many bytes.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub(crate) fn read(&self, position: u64, most: usize) -> io::Result<(u64, Vec<u8>)> {
        let start = position.clamp(self.start(), self.end);
        let length = usize::try_from(self.end - start).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; length];
        let at = start % self.size();
        let first = usize::try_from(self.size() - at).unwrap_or(usize::MAX).min(length);
        let (one, other) = bytes.split_at_mut(first);
        self.memory.read(one, DATA + at)?;
        self.memory.read(other, DATA)?;
        Ok((start, bytes))
    }

    /// All that is kept: the position of its first byte, and the bytes.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub(crate) fn kept(&self) -> io::Result<(u64, Vec<u8>)> {
        self.read(0, usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::memory::fake::Fake, *};

    /// A stream socket, of which what was peeked at is counted.
    #[derive(Default)]
    struct Socket {
        unread: Vec<u8>,
        counted: usize,
    }

    impl Socket {
        fn peek(&mut self, most: usize) -> Vec<u8> {
            let from = self.counted.min(self.unread.len());
            let bytes: Vec<u8> = self.unread[from..].iter().take(most).copied().collect();
            self.counted = from + bytes.len();
            bytes
        }

        fn consume(&mut self, count: usize) {
            self.unread.drain(..count);
            self.counted = self.counted.saturating_sub(count);
        }
    }

    /// Reads once, as the manager does; false if it is killed meanwhile.
    fn take(ring: &mut Ring<Fake>, socket: &mut Socket, most: usize, dies_before_consuming: bool) -> bool {
        if ring.all_consumed().is_err() {
            return false;
        }
        let bytes = socket.peek(most);
        if ring.publish(&bytes).is_err() || dies_before_consuming {
            return false;
        }
        socket.consume(bytes.len());
        true
    }

    fn tail(all: &[u8], capacity: usize) -> &[u8] {
        &all[all.len().saturating_sub(capacity)..]
    }

    #[test]
    fn what_was_published_last_is_kept() {
        let memory = Fake::default();
        let mut ring = Ring::create(memory.clone(), 10).unwrap();
        let all: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        ring.publish(&all).unwrap();
        ring.publish(b"end").unwrap();
        let opened = Ring::open(memory).unwrap();
        assert_eq!(opened.end(), 200_003);
        let (start, kept) = opened.kept().unwrap();
        assert_eq!((start, kept.len()), (199_993, 10));
        assert!(kept.ends_with(b"end") && kept.starts_with(tail(&all, 7)));
    }

    #[test]
    fn what_is_skipped_is_not_kept_and_counts() {
        let memory = Fake::default();
        let mut ring = Ring::create(memory.clone(), 10).unwrap();
        ring.publish(b"before").unwrap();
        ring.all_consumed().unwrap();
        memory.kill_after(Some(3));
        assert!(ring.publish(b"lost").is_err());
        memory.kill_after(None);
        ring.skip(4).unwrap();
        assert_eq!((ring.published(4), ring.kept().unwrap()), (4, (10, Vec::new())));
        ring.publish(b"after").unwrap();
        assert_eq!(
            Ring::open(memory.clone()).unwrap().kept().unwrap(),
            (10, b"after".into())
        );
        // Killed between the two words: nothing was published.
        memory.kill_after(Some(8));
        assert!(ring.skip(3).is_err());
        memory.kill_after(None);
        let mut ring = Ring::open(memory).unwrap();
        assert_eq!((ring.end(), ring.kept().unwrap()), (15, (15, Vec::new())));
        ring.publish(b"again").unwrap();
        assert_eq!(ring.kept().unwrap(), (18, b"in".into()));
    }

    #[test]
    fn memory_without_a_ring_is_refused() {
        assert!(Ring::open(Fake::default()).is_err());
        let memory = Fake::default();
        memory.write_word(u64::MAX, CAPACITY).unwrap();
        assert!(Ring::open(memory).is_err());
    }

    proptest! {
        /// Whatever is sent, however it is read, and wherever readers are killed one after the other: nothing is lost, and nothing is twice.
        #[test]
        fn a_kill_loses_nothing_and_repeats_nothing(
            steps in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..30), 1usize..20, prop::option::weighted(0.4, 0usize..60), any::<bool>()),
                1..60,
            ),
        ) {
            let (memory, capacity) = (Fake::default(), 64);
            let mut ring = Ring::create(memory.clone(), capacity).unwrap();
            let (mut socket, mut sent) = (Socket::default(), Vec::new());
            for (bytes, most, killed_after, late) in steps {
                sent.extend(&bytes);
                socket.unread.extend(&bytes);
                memory.kill_after(killed_after);
                let survived = take(&mut ring, &mut socket, most, killed_after.is_some() && late);
                memory.kill_after(None);
                if !survived {
                    ring = Ring::open(memory.clone()).unwrap();
                    let twice = ring.published(socket.counted as u64);
                    socket.consume(usize::try_from(twice).unwrap());
                    socket.counted = 0;
                }
                let (start, kept) = ring.kept().unwrap();
                let consumed = sent.len() - socket.unread.len();
                prop_assert_eq!(ring.end(), consumed as u64);
                prop_assert_eq!(start as usize, consumed.saturating_sub(capacity));
                prop_assert_eq!(&kept[..], tail(&sent[..consumed], capacity));
            }
        }
    }
}
