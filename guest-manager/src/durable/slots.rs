//! A record that is always there as a whole: the last one that was written, or the one before.
//!
//! ```text
//!   slot 0 | checksum and length | sequence | content ... |        a new one goes where the older one is; the one that has
//!   slot 1 | checksum and length | sequence | content ... |        the highest sequence and the right checksum counts
//! ```
//!
//! Pure: the memory is passed in.

use std::io;

use super::memory::Memory;

/// The longest content, in bytes; a configuration's names, paths and command line are far below.
pub(crate) const MAX_CONTENT: usize = 4 << 20;
/// Where the second slot begins, and how long each is at most. Memory is taken only where something was written.
const SLOT: u64 = 8 << 20;
/// Where a slot's content begins.
const CONTENT: u64 = 16;

/// The two slots.
#[derive(Debug)]
pub(crate) struct Slots<M> {
    memory: M,
    sequence: u64,
}

/// What is in a slot.
struct Found {
    sequence: u64,
    content: Vec<u8>,
}

impl<M: Memory> Slots<M> {
    /// Takes memory over, and with it the record that is in it, if there is one.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub(crate) fn open(memory: M) -> io::Result<(Self, Option<Vec<u8>>)> {
        let found = [look(&memory, 0)?, look(&memory, 1)?];
        let newest = found.into_iter().flatten().max_by_key(|found| found.sequence);
        let sequence = newest.as_ref().map_or(0, |found| found.sequence);
        Ok((Self { memory, sequence }, newest.map(|found| found.content)))
    }

    /// Writes the record that is to count from now on.
    ///
    /// # Errors
    /// It is longer than [`MAX_CONTENT`], or the host has no memory left; the one before counts on.
    pub(crate) fn write(&mut self, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).ok();
        let length = length.filter(|_| content.len() <= MAX_CONTENT);
        let length = length.ok_or_else(|| io::Error::other("the record is too long"))?;
        let sequence = self.sequence + 1;
        let at = SLOT * (sequence % 2);
        self.memory.write(content, at + CONTENT)?;
        self.memory.write_word(sequence, at + 8)?;
        let word = u64::from(checksum(sequence, content)) << 32 | u64::from(length);
        self.memory.write_word(word, at)?;
        self.sequence = sequence;
        Ok(())
    }

    /// What it is kept in.
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }
}

fn look(memory: &impl Memory, slot: u64) -> io::Result<Option<Found>> {
    let at = SLOT * slot;
    let (word, sequence) = (memory.read_word(at)?, memory.read_word(at + 8)?);
    let length = usize::try_from(word & u64::from(u32::MAX)).unwrap_or(usize::MAX);
    if length > MAX_CONTENT || sequence == 0 {
        return Ok(None);
    }
    let mut content = vec![0; length];
    memory.read(&mut content, at + CONTENT)?;
    let whole = u64::from(checksum(sequence, &content)) == word >> 32;
    Ok(whole.then_some(Found { sequence, content }))
}

fn checksum(sequence: u64, content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_le_bytes());
    hasher.update(content);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::memory::Shared, super::memory::fake::Fake, *};

    #[test]
    fn a_record_is_read_by_whoever_has_another_descriptor() {
        let memory = Shared::new().unwrap();
        let other = Shared::from(memory.descriptor().unwrap());
        let (mut slots, nothing) = Slots::open(memory).unwrap();
        assert_eq!(nothing, None);
        for content in [&b"one"[..], b"", b"three"] {
            slots.write(content).unwrap();
        }
        drop(slots);
        assert_eq!(Slots::open(other).unwrap().1.unwrap(), b"three");
    }

    #[test]
    fn what_is_too_long_leaves_what_was_there() {
        let (mut slots, _) = Slots::open(Fake::default()).unwrap();
        slots.write(b"short").unwrap();
        assert!(slots.write(&vec![0; MAX_CONTENT + 1]).is_err());
        assert_eq!(Slots::open(slots.memory().clone()).unwrap().1.unwrap(), b"short");
    }

    proptest! {
        /// Whenever the writer is killed: the record is the one before or the new one, whole, and the next manager can go on.
        #[test]
        fn a_kill_leaves_one_of_two_records(
            contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
            killed_after in 0usize..80,
            last in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let memory = Fake::default();
            let (mut slots, _) = Slots::open(memory.clone()).unwrap();
            for content in &contents {
                slots.write(content).unwrap();
            }
            memory.kill_after(Some(killed_after));
            let written = slots.write(&last).is_ok();
            memory.kill_after(None);
            let (mut slots, found) = Slots::open(memory.clone()).unwrap();
            let before = contents.last().unwrap();
            let found = found.unwrap();
            prop_assert_eq!(&found, if written { &last } else { before });
            slots.write(b"after").unwrap();
            prop_assert_eq!(Slots::open(memory).unwrap().1.unwrap(), b"after");
        }
    }
}
