//! The memory map that a guest is told (e820), and the arithmetic of address ranges. Pure.

use std::ops::Range;

use super::{CustomRangeError, PAGE};
use crate::layout;

/// What a range of the map is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// RAM that the guest may use.
    Usable,
    /// Not to be used: the ACPI tables and the ECAM window.
    Reserved,
}

/// One range of the map, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// Guest physical addresses.
    pub range: Range<u64>,
    /// What they are for.
    pub kind: RangeKind,
}

/// What a guest is told about its memory: ascending, disjoint ranges, as for e820 and PVH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    ranges: Vec<MapRange>,
}

impl MemoryMap {
    /// The map for RAM at the given ranges (ascending, disjoint): low memory up to [`layout::LOW_MEMORY_END`], the
    /// ACPI tables reserved, everything from [`layout::HIGH_MEMORY`] on, and the ECAM window reserved.
    pub fn new(ram: &[Range<u64>]) -> MemoryMap {
        let legacy = layout::LOW_MEMORY_END..layout::HIGH_MEMORY;
        let usable = ram
            .iter()
            .flat_map(|range| subtract(range, std::slice::from_ref(&legacy)));
        let reserved = [
            layout::ACPI..layout::ACPI + layout::ACPI_SIZE,
            layout::ECAM..layout::ECAM + layout::ECAM_SIZE,
        ];
        let mut ranges: Vec<MapRange> = usable
            .map(|range| MapRange {
                range,
                kind: RangeKind::Usable,
            })
            .chain(reserved.map(|range| MapRange {
                range,
                kind: RangeKind::Reserved,
            }))
            .collect();
        ranges.sort_by_key(|entry| entry.range.start);
        MemoryMap { ranges }
    }

    /// Every range, ascending and disjoint.
    pub fn ranges(&self) -> &[MapRange] {
        &self.ranges
    }

    /// The usable ranges, ascending.
    pub fn usable(&self) -> impl Iterator<Item = &Range<u64>> {
        self.ranges
            .iter()
            .filter(|entry| entry.kind == RangeKind::Usable)
            .map(|entry| &entry.range)
    }

    /// True if all of `range` is usable RAM.
    pub fn is_usable(&self, range: &Range<u64>) -> bool {
        self.usable()
            .any(|usable| usable.start <= range.start && range.end <= usable.end)
    }
}

/// What of `range` lies outside all of `holes` (in any order, disjoint), ascending.
pub(super) fn subtract(range: &Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut holes: Vec<&Range<u64>> = holes
        .iter()
        .filter(|hole| hole.start < range.end && range.start < hole.end)
        .collect();
    holes.sort_by_key(|hole| hole.start);
    let mut left = Vec::with_capacity(holes.len() + 1);
    let mut at = range.start;
    for hole in holes {
        if at < hole.start {
            left.push(at..hole.start);
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

/// The first of the `length` addresses from `address` on that lies in none of `ranges` (ascending, disjoint), if there is one.
pub(super) fn first_gap(ranges: &[Range<u64>], address: u64, length: u64) -> Option<u64> {
    // Addresses end with the 64-bit space, whose last one is no memory.
    let last = address.saturating_add(length.checked_sub(1)?);
    let mut at = address;
    for range in ranges {
        if range.contains(&at) {
            at = range.end;
        }
        if at > last {
            return None;
        }
    }
    Some(at)
}

/// Checks the addresses of a client's range.
pub(super) fn check_custom(range: Range<u64>) -> Result<(), CustomRangeError> {
    let Range { start, end } = range;
    if start >= end {
        return Err(CustomRangeError::Empty { start, end });
    }
    if !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
        return Err(CustomRangeError::Alignment {
            start,
            end,
            alignment: PAGE,
        });
    }
    if start < layout::HOLE_END && end > layout::HOLE_START {
        return Err(CustomRangeError::Hole { start, end });
    }
    if end > layout::MAX_GUEST_ADDRESS {
        return Err(CustomRangeError::Beyond {
            end,
            most: layout::MAX_GUEST_ADDRESS,
        });
    }
    Ok(())
}
