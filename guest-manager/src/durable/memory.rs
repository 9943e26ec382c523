//! Memory that is still there when this process has been killed: a memfd of which the keeper has a descriptor, too.
//!
//! Written with pwrite(2) and never mapped, so that nobody who has the other descriptor can change what a reference points to. A process that is killed in
//! the middle of a write leaves any part of it, except that a word of eight bytes at a multiple of eight is old or new as a whole: it lies within a page,
//! and the kernel looks for signals between pages.

use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
};

use rustix::fs::MemfdFlags;

/// What slots and rings are kept in.
pub(crate) trait Memory {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The host has no memory left.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Fills `into`; where nothing was ever written there are zeroes.
    ///
    /// # Errors
    /// The memory cannot be read.
    fn read(&self, into: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes a word, as a whole or not at all. `at` is a multiple of eight.
    ///
    /// # Errors
    /// As [`Memory::write`].
    fn write_word(&self, word: u64, at: u64) -> io::Result<()> {
        self.write(&word.to_le_bytes(), at)
    }

    /// Reads a word.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn read_word(&self, at: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// A memfd.
#[derive(Debug)]
pub(crate) struct Shared(File);

impl Shared {
    /// Empty memory.
    ///
    /// # Errors
    /// The host refuses it.
    pub(crate) fn new() -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("sepal-durable", MemfdFlags::CLOEXEC)?;
        Ok(Self(fd.into()))
    }

    /// Whether both are the same memory.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let number = |Self(file): &Self| file.metadata().map(|status| (status.dev(), status.ino()));
        matches!((number(self), number(other)), (Ok(one), Ok(other)) if one == other)
    }

    /// Another descriptor for it, to be kept elsewhere.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }
}

impl From<OwnedFd> for Shared {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl Memory for Shared {
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }

    fn read(&self, mut into: &mut [u8], mut at: u64) -> io::Result<()> {
        while !into.is_empty() {
            match self.0.read_at(into, at) {
                Ok(0) => {
                    into.fill(0);
                    break;
                }
                Ok(count) => {
                    at += count as u64;
                    into = into.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod fake {
    //! Memory whose writer is killed after so many bytes.

    use std::{
        cell::{Cell, RefCell},
        io,
        rc::Rc,
    };

    use super::Memory;

    /// Clones are the same memory.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Fake {
        bytes: Rc<RefCell<Vec<u8>>>,
        left: Rc<Cell<Option<usize>>>,
    }

    impl Fake {
        /// The writer is killed after `bytes` more; none: it lives.
        pub(crate) fn kill_after(&self, bytes: Option<usize>) {
            self.left.set(bytes);
        }
    }

    impl Memory for Fake {
        fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
            let left = self.left.get().unwrap_or(usize::MAX);
            let is_word = bytes.len() == 8 && at.is_multiple_of(8);
            let whole = bytes.len();
            let written = match is_word && left < whole {
                true => 0,
                false => whole.min(left),
            };
            let at = usize::try_from(at).unwrap();
            let mut all = self.bytes.borrow_mut();
            let length = all.len().max(at + written);
            all.resize(length, 0);
            all[at..at + written].copy_from_slice(&bytes[..written]);
            if written < whole {
                self.left.set(Some(0));
                return Err(io::Error::other("killed"));
            }
            self.left.set(self.left.get().map(|left| left - whole));
            Ok(())
        }

        fn read(&self, into: &mut [u8], at: u64) -> io::Result<()> {
            let all = self.bytes.borrow();
            for (to, at) in into.iter_mut().zip(usize::try_from(at).unwrap()..) {
                *to = all.get(at).copied().unwrap_or(0);
            }
            Ok(())
        }
    }
}
