//! Where the data of a request lies: vectors for system calls, straight into guest memory.

use std::io;

use vm_memory::VolatileSlice;

/// Most vectors that one system call takes (UIO_MAXIOV).
pub(super) const MAX_VECTORS: usize = 1024;

/// A row of stretches of memory, which whoever made it keeps mapped for as long as it is used. Others may change what they hold at any time.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    vectors: Vec<libc::iovec>,
    bytes: u64,
}

// SAFETY: the pointers are only handed to the kernel, or accessed as volatile memory; the mapping behind them does not belong to a thread.
unsafe impl Send for Buffers {}
// SAFETY: as above; nothing is changed through a shared reference but the memory pointed to, which anyone may change.
unsafe impl Sync for Buffers {}

impl Buffers {
    /// No stretches, in the room of an earlier row.
    pub(super) fn cleared(mut self) -> Self {
        self.vectors.clear();
        self.bytes = 0;
        self
    }

    /// Appends a stretch of guest memory, which has to stay mapped for as long as this row and its copies are used.
    pub(super) fn push(&mut self, slice: &VolatileSlice<'_>) {
        self.push_raw(slice.ptr_guard_mut().as_ptr(), slice.len());
    }

    /// Appends a stretch that is in a row already, under the same condition.
    pub(super) fn push_vector(&mut self, vector: &libc::iovec) {
        self.push_raw(vector.iov_base.cast(), vector.iov_len);
    }

    fn push_raw(&mut self, start: *mut u8, len: usize) {
        if len > 0 {
            self.vectors.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
            self.bytes += len as u64;
        }
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// At most as many vectors as a system call takes, from the first on.
    pub(super) fn vectors(&self) -> &[libc::iovec] {
        &self.vectors[..self.vectors.len().min(MAX_VECTORS)]
    }

    /// All vectors.
    pub(super) fn all_vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Drops the first `bytes` bytes, at most all.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut left = bytes.min(self.bytes);
        self.bytes -= left;
        let mut passed = 0;
        for vector in &mut self.vectors {
            let len = vector.iov_len as u64;
            if len > left {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left as usize);
                vector.iov_len -= left as usize;
                break;
            }
            left -= len;
            passed += 1;
        }
        self.vectors.drain(..passed);
    }

    /// The `len` bytes from `start` on, as far as they are there, as a row of their own.
    pub(super) fn part(&self, start: u64, len: u64) -> Self {
        let mut part = Self::default();
        let (mut skip, mut left) = (start, len);
        for vector in &self.vectors {
            let here = vector.iov_len as u64;
            if skip >= here {
                skip -= here;
                continue;
            }
            let take = (here - skip).min(left);
            part.push_raw(vector.iov_base.wrapping_byte_add(skip as usize).cast(), take as usize);
            (skip, left) = (0, left - take);
            if left == 0 {
                break;
            }
        }
        part
    }

    /// Whether each stretch begins and ends at a multiple of `align`, a power of two.
    pub(super) fn is_aligned(&self, align: usize) -> bool {
        let mask = align.wrapping_sub(1);
        self.vectors
            .iter()
            .all(|vector| (vector.iov_base as usize | vector.iov_len) & mask == 0)
    }

    /// Fills all of it with zeroes.
    pub(super) fn zero(&self) {
        for vector in &self.vectors {
            // SAFETY: whoever made the row keeps the stretch mapped and writable (see the type). Racing accesses are the guest's own, to memory
            // that nothing in this process holds references to.
            unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
        }
    }

    /// Copies what it holds to `bytes`, which is as long as this row.
    pub(super) fn gather(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.check(bytes.len())?;
        let mut at = 0;
        for vector in &self.vectors {
            // SAFETY: the stretch is mapped (see the type), and `bytes` has room for all stretches together, as was checked. They do not overlap:
            // no Rust object lies in guest memory.
            unsafe {
                std::ptr::copy_nonoverlapping(vector.iov_base.cast(), bytes.as_mut_ptr().add(at), vector.iov_len)
            };
            at += vector.iov_len;
        }
        Ok(())
    }

    /// Copies `bytes`, which is as long as this row, to where it lies.
    pub(super) fn scatter(&self, bytes: &[u8]) -> io::Result<()> {
        self.check(bytes.len())?;
        let mut at = 0;
        for vector in &self.vectors {
            // SAFETY: as in `gather`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(at), vector.iov_base.cast(), vector.iov_len) };
            at += vector.iov_len;
        }
        Ok(())
    }

    fn check(&self, len: usize) -> io::Result<()> {
        if len as u64 == self.bytes {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

/// Memory of our own, aligned for files that were opened with O_DIRECT.
pub(super) struct Bounce {
    start: std::ptr::NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: it owns its memory.
unsafe impl Send for Bounce {}

impl Bounce {
    /// `len` bytes, zeroed, aligned to `align`.
    ///
    /// # Errors
    ///
    /// `len` is 0, `align` is no power of two, or there is no memory.
    pub(super) fn new(len: usize, align: usize) -> io::Result<Self> {
        let layout = std::alloc::Layout::from_size_align(len, align).map_err(io::Error::other)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the layout is not empty.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let start = std::ptr::NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, layout })
    }

    /// Its bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated and zeroed with this length, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }

    /// The first `len` bytes as a row, which must not be used after this is dropped.
    pub(super) fn buffers(&mut self, len: usize) -> Buffers {
        let mut buffers = Buffers::default();
        buffers.push_raw(self.start.as_ptr(), len.min(self.layout.size()));
        buffers
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and not used any more.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Rows over pieces of one allocation.
    fn row(memory: &mut Bounce, lens: &[usize]) -> Buffers {
        let mut buffers = Buffers::default();
        let mut at = memory.bytes().as_mut_ptr();
        for &len in lens {
            buffers.push_raw(at, len);
            at = at.wrapping_add(len);
        }
        buffers
    }

    proptest! {
        #[test]
        fn parts_and_the_rest_are_where_they_were(
            lens in prop::collection::vec(0usize..20, 0..20), start in 0u64..300, len in 0u64..300,
        ) {
            let total: usize = lens.iter().sum();
            let mut memory = Bounce::new(512, 8).unwrap();
            for (n, byte) in memory.bytes().iter_mut().enumerate() {
                *byte = (n % 251) as u8;
            }
            let all = memory.bytes()[..total].to_vec();
            let mut buffers = row(&mut memory, &lens);
            let part = buffers.part(start, len);
            let from = (start as usize).min(total);
            let to = (start + len).min(total as u64) as usize;
            let mut bytes = vec![0; part.bytes() as usize];
            part.gather(&mut bytes).unwrap();
            prop_assert_eq!(&bytes[..], &all[from..to.max(from)]);
            buffers.advance(start);
            let mut bytes = vec![0; buffers.bytes() as usize];
            buffers.gather(&mut bytes).unwrap();
            prop_assert_eq!(&bytes[..], &all[from..]);
            buffers.zero();
            prop_assert!(memory.bytes()[from..total].iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn alignment_is_of_starts_and_lengths() {
        let mut memory = Bounce::new(4096, 4096).unwrap();
        assert!(row(&mut memory, &[512, 1024]).is_aligned(512));
        assert!(!row(&mut memory, &[512, 1023]).is_aligned(512));
        assert!(!row(&mut memory, &[256, 512]).is_aligned(512));
    }
}
