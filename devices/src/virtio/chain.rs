//! A request of the driver: the buffers of one descriptor chain, checked, and cursors that read and write them.
//!
//! All buffers lay in guest memory when the chain was taken from its ring, and guest memory never shrinks while a device runs. What they hold
//! changes at any time: a device reads each field once and decides on its copy.

use std::ops::Range;

use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap, VolatileSlice};

use super::access;

/// One buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First guest physical address.
    pub address: u64,
    /// Bytes; may be 0.
    pub len: u32,
}

/// A descriptor chain. It has to be given back with [`Virtqueue::push`](super::queue::Virtqueue::push), in any order.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    /// The readable ones first.
    segments: Vec<Segment>,
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
}

impl Chain {
    /// A chain from segments that were checked; the first `readable` of them are the device's to read.
    pub(super) fn new(head: u16, segments: Vec<Segment>, readable: usize) -> Self {
        // `Virtqueue` allows at most 2^32 - 1 bytes in all.
        let bytes = |segments: &[Segment]| segments.iter().fold(0u32, |sum, s| sum.saturating_add(s.len));
        Self {
            head,
            readable_bytes: bytes(&segments[..readable]),
            writable_bytes: bytes(&segments[readable..]),
            segments,
            readable,
        }
    }

    /// Index of its first descriptor: what the used ring names it by.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Bytes that the device may write.
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// The buffers that the device may read, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// The buffers that the device may write, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// A cursor at the first readable byte.
    pub fn reader<'c, 'm>(&'c self, memory: &'m GuestMemoryMmap) -> Reader<'c, 'm> {
        Reader(Cursor::new(memory, self.readable(), self.readable_bytes))
    }

    /// A cursor at the first writable byte.
    pub fn writer<'c, 'm>(&'c self, memory: &'m GuestMemoryMmap) -> Writer<'c, 'm> {
        Writer(Cursor::new(memory, self.writable(), self.writable_bytes))
    }

    /// The room for segments, to be used again.
    pub(super) fn into_segments(self) -> Vec<Segment> {
        self.segments
    }
}

/// A buffer ended before what was to be read or written did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} bytes wanted, {left} left in the chain")]
pub struct TooShort {
    /// Bytes asked for.
    pub wanted: usize,
    /// Bytes that were left.
    pub left: usize,
}

/// A position in a row of segments. What it finds in memory may outlive the chain.
#[derive(Clone)]
struct Cursor<'c, 'm> {
    memory: &'m GuestMemoryMmap,
    /// Those not yet passed; the first may be passed in part.
    segments: &'c [Segment],
    /// Bytes passed of the first.
    offset: u32,
    left: u32,
    total: u32,
}

impl<'c, 'm> Cursor<'c, 'm> {
    fn new(memory: &'m GuestMemoryMmap, segments: &'c [Segment], total: u32) -> Self {
        Self {
            memory,
            segments,
            offset: 0,
            left: total,
            total,
        }
    }

    fn check(&self, wanted: usize) -> Result<(), TooShort> {
        let left = self.left as usize;
        if wanted > left {
            Err(TooShort { wanted, left })
        } else {
            Ok(())
        }
    }

    /// Passes `len` bytes, telling `piece` of each stretch that is contiguous in guest addresses and of its place among the `len`.
    fn pass(&mut self, len: usize, mut piece: impl FnMut(GuestAddress, Range<usize>)) {
        let mut done = 0;
        while done < len {
            let Some((segment, rest)) = self.segments.split_first() else {
                return;
            };
            let take = (len - done).min((segment.len - self.offset) as usize);
            if take > 0 {
                piece(
                    GuestAddress(segment.address + u64::from(self.offset)),
                    done..done + take,
                );
            }
            done += take;
            // `take` is at most what the segment has left, which is a u32.
            self.offset += take as u32;
            self.left -= take as u32;
            if self.offset == segment.len {
                (self.segments, self.offset) = (rest, 0);
            }
        }
    }

    /// Calls `each` with the next `len` bytes as memory of this process, without copying.
    fn each_slice(&mut self, len: usize, mut each: impl FnMut(VolatileSlice<'m>)) -> Result<(), TooShort> {
        self.check(len)?;
        let memory = self.memory;
        self.pass(len, |address, range| {
            // Checked when the chain was taken.
            access::each_slice(memory, address, range.len(), &mut each);
        });
        Ok(())
    }

    /// As [`each_slice`](Self::each_slice), all at once.
    fn slices(&mut self, len: usize) -> Result<Vec<VolatileSlice<'m>>, TooShort> {
        let mut slices = Vec::with_capacity(self.segments.len());
        self.each_slice(len, |slice| slices.push(slice))?;
        Ok(slices)
    }

    fn split_at(&mut self, len: usize) -> Result<Self, TooShort> {
        self.check(len)?;
        let mut head = self.clone();
        head.left = len as u32;
        head.total = len as u32;
        self.pass(len, |_, _| {});
        Ok(head)
    }
}

/// Reads a chain's readable bytes, from the first on.
#[derive(Clone)]
pub struct Reader<'c, 'm>(Cursor<'c, 'm>);

impl<'m> Reader<'_, 'm> {
    /// Bytes not yet read.
    pub fn left(&self) -> usize {
        self.0.left as usize
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was read.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(), TooShort> {
        self.0.check(buffer.len())?;
        let memory = self.0.memory;
        self.0.pass(buffer.len(), |address, range| {
            // Checked when the chain was taken; zeroes stand for what cannot be read.
            let _ = access::read(memory, address, &mut buffer[range]);
        });
        Ok(())
    }

    /// Reads a structure.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was read.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, TooShort> {
        let mut value = T::default();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }

    /// Reads all that is left, at most `most` bytes.
    pub fn read_to_end(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.left().min(most)];
        // As many as there are.
        let _ = self.read(&mut bytes);
        bytes
    }

    /// Passes `len` bytes over.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn skip(&mut self, len: usize) -> Result<(), TooShort> {
        self.0.check(len)?;
        self.0.pass(len, |_, _| {});
        Ok(())
    }

    /// A reader of the next `len` bytes only; this one goes on after them.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn split_at(&mut self, len: usize) -> Result<Self, TooShort> {
        self.0.split_at(len).map(Self)
    }

    /// The next `len` bytes where they lie, for system calls that take vectors.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn slices(&mut self, len: usize) -> Result<Vec<VolatileSlice<'m>>, TooShort> {
        self.0.slices(len)
    }

    /// As [`slices`](Self::slices), one after the other.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn each_slice(&mut self, len: usize, each: impl FnMut(VolatileSlice<'m>)) -> Result<(), TooShort> {
        self.0.each_slice(len, each)
    }
}

/// Writes a chain's writable bytes, from the first on.
#[derive(Clone)]
pub struct Writer<'c, 'm>(Cursor<'c, 'm>);

impl<'m> Writer<'_, 'm> {
    /// Bytes not yet written.
    pub fn left(&self) -> usize {
        self.0.left as usize
    }

    /// Bytes written or passed so far: what the used ring is told if it is all.
    pub fn written(&self) -> u32 {
        self.0.total - self.0.left
    }

    /// Writes `bytes`.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), TooShort> {
        self.0.check(bytes.len())?;
        let memory = self.0.memory;
        self.0.pass(bytes.len(), |address, range| {
            // Checked when the chain was taken; what cannot be written is lost, as on a bus without memory.
            let _ = access::write(memory, address, &bytes[range]);
        });
        Ok(())
    }

    /// Writes a structure.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was written.
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> Result<(), TooShort> {
        self.write(value.as_slice())
    }

    /// Passes `len` bytes over without writing them.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn skip(&mut self, len: usize) -> Result<(), TooShort> {
        self.0.check(len)?;
        self.0.pass(len, |_, _| {});
        Ok(())
    }

    /// A writer of the next `len` bytes only; this one goes on after them.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn split_at(&mut self, len: usize) -> Result<Self, TooShort> {
        self.0.split_at(len).map(Self)
    }

    /// The next `len` bytes where they lie, for system calls that take vectors.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn slices(&mut self, len: usize) -> Result<Vec<VolatileSlice<'m>>, TooShort> {
        self.0.slices(len)
    }

    /// As [`slices`](Self::slices), one after the other.
    ///
    /// # Errors
    ///
    /// [`TooShort`]: nothing was passed.
    pub fn each_slice(&mut self, len: usize, each: impl FnMut(VolatileSlice<'m>)) -> Result<(), TooShort> {
        self.0.each_slice(len, each)
    }
}
