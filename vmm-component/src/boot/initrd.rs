//! The initramfs: as high as it can be, out of the kernel's way.

use std::ops::Range;

use vm_memory::GuestMemoryMmap;

use super::image::InputFile;
use super::{BootError, InitrdError, LoadedInitrd, LoadedKernel};
use crate::layout;
use crate::memory::MemoryMap;

const PAGE: u64 = 4096;

/// Places the initramfs and reads it straight into guest memory.
pub(super) fn load(
    ram: &GuestMemoryMmap,
    map: &MemoryMap,
    kernel: &LoadedKernel,
    file: &InputFile<'_>,
) -> Result<LoadedInitrd, BootError> {
    let size = file.len();
    if size == 0 {
        return Err(InitrdError::Empty.into());
    }
    let mut limit = layout::HOLE_START;
    let mut taken = kernel.spans.clone();
    taken.push(0..layout::BOOT_AREA_END);
    if let Some(setup) = &kernel.setup {
        limit = limit.min(setup.initrd_limit());
        taken.extend(kernel.spans.first().map(|span| setup.init_area(span.start)));
    }
    let address = place(map.usable(), taken, size, limit)?;
    file.read_to_guest(ram, 0..size, address)?;
    Ok(LoadedInitrd { address, size })
}

/// The highest page-aligned address at which `size` bytes lie in one of the `usable` ranges, below `limit`, and
/// beside all that is `taken`.
fn place<'a>(
    usable: impl Iterator<Item = &'a Range<u64>>,
    mut taken: Vec<Range<u64>>,
    size: u64,
    limit: u64,
) -> Result<u64, InitrdError> {
    taken.sort_by_key(|range| range.start);
    let mut best = None;
    let mut free = 0;
    let mut consider = |start: u64, end: u64| {
        let start = start.next_multiple_of(PAGE);
        let end = end.min(limit);
        free = free.max(end.saturating_sub(start));
        if let Some(address) = end.checked_sub(size).map(|address| address / PAGE * PAGE)
            && address >= start
        {
            best = best.max(Some(address));
        }
    };
    for range in usable {
        let mut start = range.start;
        for taken in &taken {
            if taken.start >= range.end {
                break;
            }
            if taken.end > start {
                consider(start, taken.start.max(start));
                start = taken.end;
            }
        }
        if start < range.end {
            consider(start, range.end);
        }
    }
    best.ok_or(InitrdError::NoRoom { size, limit, free })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ascending, disjoint ranges from a list of gaps and lengths.
    fn ranges(most: usize) -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((1_u64..1 << 20, 1_u64..1 << 22), 1..most).prop_map(|parts| {
            let mut at = 0;
            parts
                .into_iter()
                .map(|(gap, len)| {
                    let start = at + gap;
                    at = start + len;
                    start..at
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn placed_in_free_memory_or_not_at_all(
            usable in ranges(6),
            taken in ranges(6),
            size in 1_u64..1 << 22,
            limit in 0_u64..1 << 25,
        ) {
            let fits = |address: u64| {
                let end = address + size;
                end <= limit
                    && usable.iter().any(|range| range.start <= address && end <= range.end)
                    && taken.iter().all(|range| end <= range.start || range.end <= address)
            };
            match place(usable.iter(), taken.clone(), size, limit) {
                Ok(address) => {
                    prop_assert!(address.is_multiple_of(PAGE));
                    prop_assert!(fits(address));
                    // No higher page would do.
                    prop_assert!((address / PAGE + 1..(1 << 25) / PAGE).all(|page| !fits(page * PAGE)));
                }
                Err(InitrdError::NoRoom { free, .. }) => {
                    prop_assert!((0..(1 << 25) / PAGE).all(|page| !fits(page * PAGE)));
                    prop_assert!(free < size + PAGE);
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }
}
