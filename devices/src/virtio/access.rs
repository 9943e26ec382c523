//! Short accesses to guest memory, of which each request takes a dozen.
//!
//! `vm_memory`'s own are ready for a range that lies in several pieces of memory, and that costs more than the access. Hardly any does, so the piece that
//! holds all of it is tried first.

use std::sync::atomic::Ordering;

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Reads a field that the driver changes meanwhile; what it wrote before that is seen afterwards. `None`: it is not in memory, or not aligned.
pub(super) fn load(memory: &GuestMemoryMmap, address: u64) -> Option<u16> {
    // Aligned, so it lies in one piece.
    let field = memory.get_slice(GuestAddress(address), 2).ok()?;
    field.load(0, Ordering::Acquire).ok()
}

/// Writes a field that the driver reads meanwhile; a driver that sees it sees what was written before.
pub(super) fn store(memory: &GuestMemoryMmap, address: u64, value: u16) -> Option<()> {
    let field = memory.get_slice(GuestAddress(address), 2).ok()?;
    field.store(value, 0, Ordering::Release).ok()
}

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

/// Reads a structure.
pub(super) fn read_obj<T: ByteValued + Default>(memory: &GuestMemoryMmap, address: u64) -> Option<T> {
    let mut value = T::default();
    read(memory, GuestAddress(address), value.as_mut_slice())?;
    Some(value)
}

/// Whether all of a range is in memory.
pub(super) fn is_inside(memory: &GuestMemoryMmap, address: u64, len: u32) -> bool {
    let (address, len) = (GuestAddress(address), len as usize);
    memory.get_slice(address, len).is_ok() || memory.check_range(address, len)
}

/// Adds a range that was found to be in memory to `slices`. What is refused now is left out, and whoever uses it sees less than it asked for.
pub(super) fn add_slices<'m>(
    slices: &mut Vec<VolatileSlice<'m>>,
    memory: &'m GuestMemoryMmap,
    address: GuestAddress,
    len: usize,
) {
    match memory.get_slice(address, len) {
        Ok(slice) => slices.push(slice),
        Err(_) => slices.extend(memory.get_slices(address, len).filter_map(Result::ok)),
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
                assert_eq!(read_obj::<[u8; 8]>(&memory, address), Some(*b"8 bytes!"));
                let mut slices = Vec::new();
                add_slices(&mut slices, &memory, GuestAddress(address), 8);
                assert_eq!(slices.iter().map(VolatileSlice::len).sum::<usize>(), 8);
            }
        }
    }

    #[test]
    fn fields_are_aligned_and_in_memory() {
        let memory = memory();
        for (address, there) in [
            (0xffe, true),
            (0x1000, true),
            (0xfff, false),
            (0x2000, false),
            (1, false),
        ] {
            assert_eq!(store(&memory, address, 0x1234).is_some(), there, "{address:#x}");
            assert_eq!(load(&memory, address), there.then_some(0x1234), "{address:#x}");
        }
    }
}
