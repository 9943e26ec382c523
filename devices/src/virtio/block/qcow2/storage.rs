//! Files as imago reads and writes them: open descriptors, never a path.

use std::cell::Cell;
use std::fmt;
use std::io;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use crate::virtio::block::backend::Backend;
use crate::virtio::block::buffers::Buffers;
use crate::virtio::block::raw::HostFile;

/// Most bytes of stack between a call of imago and what it calls here. Ordinary images need some KiB; one whose refcount tables have holes in the
/// wrong places has the allocation of a cluster call itself without end.
const MOST_STACK: usize = 128 << 10;

thread_local! {
    /// Reads of this thread fail rather than wait for storage.
    static CACHED_ONLY: Cell<bool> = const { Cell::new(false) };
    /// Where the stack was when this thread called imago.
    static STACK: Cell<usize> = const { Cell::new(0) };
}

fn stack() -> usize {
    let here = 0u8;
    (&raw const here).addr()
}

/// Notes where the stack is: calls from here on may use [`MOST_STACK`] bytes more.
pub(super) fn note_stack() {
    STACK.set(stack());
}

/// Ends, by a panic, a call that nests too deep; the only way where imago expects no error.
fn check_stack() {
    assert!(
        STACK.get().saturating_sub(stack()) < MOST_STACK,
        "its tables lead into each other without end"
    );
}

/// Calls `call`, whose reads fail with [`io::ErrorKind::WouldBlock`] where they would have to wait for storage.
pub(super) fn cached_only<R>(call: impl FnOnce() -> R) -> R {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            CACHED_ONLY.set(false);
        }
    }
    CACHED_ONLY.set(true);
    let _restore = Restore;
    call()
}

/// An open file.
#[derive(Debug)]
pub(in crate::virtio::block) struct HandleStorage {
    file: HostFile,
    helper: CommonStorageHelper,
}

impl HandleStorage {
    pub(in crate::virtio::block) fn new(file: HostFile) -> Self {
        Self {
            file,
            helper: CommonStorageHelper::default(),
        }
    }

    /// Whether it goes around the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.file.alignment().is_some()
    }
}

impl fmt::Display for HandleStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an open file")
    }
}

fn copied(vectors: &[libc::iovec]) -> Buffers {
    let mut buffers = Buffers::default();
    for vector in vectors {
        buffers.push_vector(vector);
    }
    buffers
}

impl Storage for HandleStorage {
    fn mem_align(&self) -> usize {
        // Asked for before each table is read or made.
        check_stack();
        self.file.alignment().map_or(1, |alignment| alignment.memory as usize)
    }

    fn req_align(&self) -> usize {
        self.file.alignment().map_or(1, |alignment| alignment.offset as usize)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: only written to, by the kernel or with zeroes, while `bufv` is there.
        let to = copied(unsafe { bufv.as_iovec() });
        if CACHED_ONLY.get() {
            return match self.file.read_cached(offset, &to) {
                Ok(true) => Ok(()),
                _ => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let n = self.file.read_up_to(offset, &to, 0)?;
        if n < to.bytes() {
            // Beyond the end of a file there are zeroes.
            to.part(n, to.bytes()).zero();
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: only read, by the kernel, while `bufv` is there.
        let from = copied(unsafe { bufv.as_iovec() });
        self.file.write(offset, &from, false)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.write_zeroes(offset, length, true)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.write_zeroes(offset, length, false)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Backend::flush(&self.file)
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        match mode {
            PreallocateMode::None | PreallocateMode::Zero => self.file.resize(new_size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
