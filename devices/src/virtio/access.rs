//! Short accesses to guest memory, of which each request takes a dozen.
//!
//! `vm_memory`'s own are ready for a range that lies in several pieces of memory, and that costs more than the access. Hardly any does, so the piece that
//! holds all of it is tried first. What is accessed again and again, as rings are, is looked up once: see [`Window`].

use std::sync::atomic::Ordering;

use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

/// Bytes of a cache line on the processors we run on.
const LINE: u64 = 64;

/// Guest memory for many accesses, nearly all of which are to one piece of it: that is found once, and the others are found each time.
pub(super) struct Window {
    /// Where the piece begins.
    start: u64,
    /// Its bytes.
    len: u64,
    /// Where it is mapped.
    base: *mut u8,
    /// Keeps it mapped.
    memory: GuestMemoryMmap,
}

// SAFETY: the mapping behind `base` belongs to no thread, and is only accessed as volatile memory.
unsafe impl Send for Window {}

impl Window {
    /// The memory, by the piece that `address` lies in. `None`: it is not in memory.
    pub(super) fn around(memory: &GuestMemoryMmap, address: u64) -> Option<Self> {
        let piece = memory.find_region(GuestAddress(address))?;
        Some(Self {
            start: piece.start_addr().0,
            len: piece.len(),
            base: piece.as_ptr(),
            memory: memory.clone(),
        })
    }

    /// Whether all of a range is in the piece.
    fn contains(&self, address: u64, len: u64) -> bool {
        // What lies before the start is far past the end.
        let offset = address.wrapping_sub(self.start);
        offset <= self.len && len <= self.len - offset
    }

    /// A range of the piece as memory of this process. `None`: not all of it is inside.
    fn slice(&self, address: u64, len: usize) -> Option<VolatileSlice<'_>> {
        if !self.contains(address, len as u64) {
            return None;
        }
        let offset = (address - self.start) as usize;
        // SAFETY: `base` is where the piece's `len` bytes begin, all in one mapping, which `memory` keeps for as long as `self`; the range lies in
        // them, as was checked. Nobody has references to guest memory.
        Some(unsafe { VolatileSlice::new(self.base.add(offset), len) })
    }

    /// A field that both sides change. `None`: it is not in memory.
    fn field(&self, address: u64) -> Option<VolatileSlice<'_>> {
        // Aligned, so it lies in one piece.
        self.slice(address, 2)
            .or_else(|| self.memory.get_slice(GuestAddress(address), 2).ok())
    }

    /// Reads a field that the driver changes meanwhile; what it wrote before that is seen afterwards. `None`: it is not in memory, or not aligned.
    pub(super) fn load(&self, address: u64) -> Option<u16> {
        self.field(address)?.load(0, Ordering::Acquire).ok()
    }

    /// Writes a field that the driver reads meanwhile; a driver that sees it sees what was written before.
    pub(super) fn store(&self, address: u64, value: u16) -> Option<()> {
        self.field(address)?.store(value, 0, Ordering::Release).ok()
    }

    /// Reads a structure. `None`: not all of it is in memory.
    pub(super) fn read_obj<T: ByteValued + Default>(&self, address: u64) -> Option<T> {
        let mut value = T::default();
        match self.slice(address, size_of::<T>()) {
            Some(slice) => {
                slice.copy_to(value.as_mut_slice());
            }
            None => read(&self.memory, GuestAddress(address), value.as_mut_slice())?,
        }
        Some(value)
    }

    /// Writes `bytes`. `None`: not all of it is in memory.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        match self.slice(address, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                Some(())
            }
            None => write(&self.memory, GuestAddress(address), bytes),
        }
    }

    /// Whether all of a range is in memory.
    pub(super) fn is_inside(&self, address: u64, len: u32) -> bool {
        self.contains(address, len.into()) || is_inside(&self.memory, address, len)
    }

    /// Has the processor fetch the piece's line at `address`, which another one wrote last: by the time it is needed it is here. With `WRITE` it is going to
    /// be written.
    pub(super) fn prefetch<const WRITE: bool>(&self, address: u64) {
        let offset = address.wrapping_sub(self.start);
        if offset < self.len {
            prefetch::<WRITE>(self.base.wrapping_add(offset as usize));
        }
    }

    /// Whether two addresses are on one line.
    pub(super) fn on_one_line(one: u64, other: u64) -> bool {
        one / LINE == other / LINE
    }
}

#[cfg(target_arch = "x86_64")]
fn prefetch<const WRITE: bool>(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint; it does nothing that can be told apart, wherever it points to.
    unsafe {
        if WRITE {
            _mm_prefetch::<_MM_HINT_ET0>(at.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch<const WRITE: bool>(_: *const u8) {}

/// Fills `buffer`. `None`: not all of it is in memory.
pub(super) fn read(memory: &GuestMemoryMmap, address: GuestAddress, buffer: &mut [u8]) -> Option<()> {
    match memory.get_slice(address, buffer.len()) {
        Ok(slice) => {
            slice.copy_to(buffer);
            Some(())
        }
        Err(_) => memory.read_slice(buffer, address).ok(),
    }
}

/// Writes `bytes`. `None`: not all of it is in memory.
pub(super) fn write(memory: &GuestMemoryMmap, address: GuestAddress, bytes: &[u8]) -> Option<()> {
    match memory.get_slice(address, bytes.len()) {
        Ok(slice) => {
            slice.copy_from(bytes);
            Some(())
        }
        Err(_) => memory.write_slice(bytes, address).ok(),
    }
}

/// Whether all of a range is in memory.
fn is_inside(memory: &GuestMemoryMmap, address: u64, len: u32) -> bool {
    let (address, len) = (GuestAddress(address), len as usize);
    memory.get_slice(address, len).is_ok() || memory.check_range(address, len)
}

/// Calls `each` with the pieces of a range that was found to be in memory. What is refused now is left out, and whoever uses them sees less than it
/// asked for.
pub(super) fn each_slice<'m>(
    memory: &'m GuestMemoryMmap,
    address: GuestAddress,
    len: usize,
    mut each: impl FnMut(VolatileSlice<'m>),
) {
    match memory.get_slice(address, len) {
        Ok(slice) => each(slice),
        Err(_) => memory.get_slices(address, len).filter_map(Result::ok).for_each(each),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pieces that follow each other, and a third after a hole.
    fn memory() -> GuestMemoryMmap {
        let pieces = [0, 0x1000, 0x4000].map(|start| (GuestAddress(start), 0x1000));
        GuestMemoryMmap::from_ranges(&pieces).unwrap()
    }

    #[test]
    fn ranges_may_lie_in_several_pieces_and_not_in_a_hole() {
        let memory = memory();
        for (address, inside) in [
            (0, true),
            (0xffc, true),
            (0x1ff8, true),
            (0x1ffc, false),
            (0x3ffc, false),
            (0x4ff8, true),
            (0x4ffc, false),
            (u64::MAX - 3, false),
        ] {
            assert_eq!(is_inside(&memory, address, 8), inside, "{address:#x}");
            let written = write(&memory, GuestAddress(address), b"8 bytes!");
            let mut read_back = [0; 8];
            let got = read(&memory, GuestAddress(address), &mut read_back);
            assert_eq!((written.is_some(), got.is_some()), (inside, inside), "{address:#x}");
            if inside {
                assert_eq!(&read_back, b"8 bytes!");
                let mut slices = Vec::new();
                each_slice(&memory, GuestAddress(address), 8, |slice| slices.push(slice));
                assert_eq!(slices.iter().map(VolatileSlice::len).sum::<usize>(), 8);
            }
        }
    }

    #[test]
    fn a_window_is_around_one_piece() {
        let memory = memory();
        assert!(Window::around(&memory, 0x2000).is_none());
        let window = Window::around(&memory, 0x1234).unwrap();
        for (address, len, inside) in [
            (0x1000, 0x1000, true),
            (0xfff, 1, false),
            (0x1fff, 1, true),
            (0x1fff, 2, false),
            (0x2000, 0, true),
            (0x2001, 0, false),
            (u64::MAX, 2, false),
            (0x1000, u64::MAX, false),
        ] {
            assert_eq!(window.contains(address, len), inside, "{address:#x} {len:#x}");
            window.prefetch::<true>(address);
        }
    }

    #[test]
    fn what_is_not_in_the_windows_piece_is_found_too() {
        let memory = memory();
        for around in [0, 0x1000, 0x4000] {
            let window = Window::around(&memory, around).unwrap();
            for (address, inside) in [
                (0x1000, true),
                (0xffc, true),
                (0x1ff8, true),
                (0x1ff9, false),
                (0x4ff8, true),
                (u64::MAX - 3, false),
            ] {
                assert_eq!(window.is_inside(address, 8), inside, "{address:#x}");
                assert_eq!(window.write(address, b"8 bytes!").is_some(), inside, "{address:#x}");
                let back = window.read_obj::<[u8; 8]>(address);
                assert_eq!(back, inside.then_some(*b"8 bytes!"), "{address:#x}");
            }
            for (address, there) in [
                (0xffe, true),
                (0x1000, true),
                (0xfff, false),
                (0x1ffe, true),
                (0x2000, false),
                (0x4000, true),
                (1, false),
            ] {
                assert_eq!(window.store(address, 0x1234).is_some(), there, "{address:#x}");
                assert_eq!(window.load(address), there.then_some(0x1234), "{address:#x}");
            }
        }
    }
}
