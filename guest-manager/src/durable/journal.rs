//! The last events in memory that outlives this process, so that the next manager goes on counting where this one stopped.
//!
//! Each event is a message of its own, behind it its length and checksum: read from the end back to the first that is not whole any more.

use std::io;

use super::{
    memory::Memory,
    ring::{ROOM, Ring},
};

/// How much is kept, in bytes: at least the 1024 last events, as long as they are as usual.
pub(crate) const CAPACITY: usize = 1 << 20;
/// Bytes behind each entry.
const TRAILER: usize = 8;

/// The journal.
#[derive(Debug)]
pub(crate) struct Journal<M>(Ring<M>);

impl<M: Memory> Journal<M> {
    /// An empty journal.
    ///
    /// # Errors
    /// The host has no memory left.
    pub(crate) fn create(memory: M) -> io::Result<Self> {
        Ring::create(memory, CAPACITY).map(Self)
    }

    /// The journal that somebody else has written to until now.
    ///
    /// # Errors
    /// There is none in this memory, or it cannot be read.
    pub(crate) fn open(memory: M) -> io::Result<Self> {
        Ring::open(memory).map(Self)
    }

    /// What it is kept in.
    pub(crate) fn memory(&self) -> &M {
        self.0.memory()
    }

    /// How much was ever written to it.
    pub(crate) fn end(&self) -> u64 {
        self.0.end()
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// It is longer than 64 KiB less 8 bytes, or the host has no memory left.
    pub(crate) fn append(&mut self, entry: &[u8]) -> io::Result<()> {
        let length = u32::try_from(entry.len()).ok();
        let length = length.filter(|_| entry.len() + TRAILER <= ROOM);
        let length = length.ok_or_else(|| io::Error::other("the entry is too long"))?;
        let mut bytes = entry.to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(crc32fast::hash(entry).to_le_bytes());
        // In one piece: of an entry there is all or nothing.
        self.0.publish(&bytes)
    }

    /// The entries that are kept, oldest first.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub(crate) fn entries(&self) -> io::Result<Vec<Vec<u8>>> {
        let (_, bytes) = self.0.kept()?;
        let mut entries = Vec::new();
        let mut rest = &bytes[..];
        while let Some((before, entry)) = last(rest) {
            entries.push(entry.to_vec());
            rest = before;
        }
        entries.reverse();
        Ok(entries)
    }
}

/// The last entry, and what is before it.
fn last(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (rest, trailer) = bytes.split_last_chunk::<TRAILER>()?;
    let trailer = u64::from_le_bytes(*trailer);
    let length = usize::try_from(trailer & u64::from(u32::MAX)).ok()?;
    let (before, entry) = rest.split_at_checked(rest.len().checked_sub(length)?)?;
    (u64::from(crc32fast::hash(entry)) == trailer >> 32).then_some((before, entry))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::memory::fake::Fake, *};

    #[test]
    fn the_oldest_are_forgotten_and_the_rest_is_whole() {
        let mut journal = Journal::create(Fake::default()).unwrap();
        let entry = |number: u32| vec![u8::try_from(number % 251).unwrap(); 1000 + number as usize % 100];
        for number in 0..2000 {
            journal.append(&entry(number)).unwrap();
        }
        let entries = Journal::open(journal.memory().clone()).unwrap().entries().unwrap();
        assert!(entries.len() > 900 && entries.len() < 1100, "{}", entries.len());
        for (found, number) in entries.iter().rev().zip((0..2000).rev()) {
            assert_eq!(*found, entry(number));
        }
        assert!(journal.append(&vec![0; ROOM]).is_err());
    }

    proptest! {
        /// Whenever the writer is killed, all entries before the last one are there, and the last one is or is not.
        #[test]
        fn a_kill_loses_the_last_entry_at_most(
            entries in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20),
            last in prop::collection::vec(any::<u8>(), 0..50),
            killed_after in 0usize..80,
        ) {
            let memory = Fake::default();
            let mut journal = Journal::create(memory.clone()).unwrap();
            for entry in &entries {
                journal.append(entry).unwrap();
            }
            memory.kill_after(Some(killed_after));
            let written = journal.append(&last).is_ok();
            memory.kill_after(None);
            let mut expected = entries;
            if written {
                expected.push(last);
            }
            let mut journal = Journal::open(memory).unwrap();
            prop_assert_eq!(&journal.entries().unwrap(), &expected);
            journal.append(b"next").unwrap();
            expected.push(b"next".into());
            prop_assert_eq!(journal.entries().unwrap(), expected);
        }
    }
}
