//! Which guest memory lists of pages mean; calculates only.

use std::ops::Range;

use super::super::chain::Segment;

/// Bytes of a page of the balloon, whatever the guest's own pages are (virtio 5.5.6).
pub(super) const PAGE: u64 = 4096;

/// The ranges of guest addresses that the pages of these numbers make up, sorted, each as long as can be, none twice.
pub(super) fn page_ranges(numbers: &mut Vec<u32>) -> Vec<Range<u64>> {
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    runs.filter_map(|run| Some(u64::from(*run.first()?) * PAGE..(u64::from(*run.last()?) + 1) * PAGE))
        .collect()
}

/// The whole pages within buffers, neighbours joined. Parts of pages at a buffer's ends are left out.
pub(super) fn whole_pages(buffers: &[Segment]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for buffer in buffers {
        // In guest memory, so its end is an address.
        let start = buffer.address.next_multiple_of(PAGE);
        let end = (buffer.address + u64::from(buffer.len)) / PAGE * PAGE;
        match ranges.last_mut() {
            _ if start >= end => {}
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_are_one_range() {
        assert_eq!(
            page_ranges(&mut vec![7, 3, 5, 4, 3, 9]),
            [0x3000..0x6000, 0x7000..0x8000, 0x9000..0xa000]
        );
        assert_eq!(
            page_ranges(&mut vec![u32::MAX, 0, u32::MAX - 1]),
            [0..PAGE, u64::from(u32::MAX - 1) * PAGE..(1 << 44)]
        );
        assert_eq!(page_ranges(&mut vec![]), []);
    }

    #[test]
    fn parts_of_pages_are_left_out() {
        let segment = |address, len| Segment { address, len };
        let buffers = [
            segment(0x1000, 0x2000),
            segment(0x3000, 0x1001),
            segment(0x8fff, 0x1001),
            segment(0xb001, 0x1ffe),
            segment(0xf000, 0),
        ];
        assert_eq!(whole_pages(&buffers), [0x1000..0x4000, 0x9000..0xa000]);
    }

    proptest! {
        /// The ranges are exactly the pages, sorted, disjoint and not adjacent.
        #[test]
        fn ranges_are_the_pages(
            numbers in prop::collection::vec(prop_oneof![0u32..40, u32::MAX - 20..=u32::MAX], 0..60),
        ) {
            let expected: BTreeSet<u64> = numbers.iter().map(|n| u64::from(*n)).collect();
            let ranges = page_ranges(&mut numbers.clone());
            let pages: Vec<u64> = ranges.iter().flat_map(|r| r.start / PAGE..r.end / PAGE).collect();
            prop_assert_eq!(pages, expected.into_iter().collect::<Vec<_>>());
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        /// Never more than the buffers, always whole pages, and all whole pages.
        #[test]
        fn whole_pages_are_within_the_buffers(
            buffers in prop::collection::vec((0u64..0x10_0000, 0u32..0x5000), 0..10),
        ) {
            let segments: Vec<_> = buffers.iter().map(|&(address, len)| Segment { address, len }).collect();
            let ranges = whole_pages(&segments);
            prop_assert!(ranges.iter().all(|r| r.start % PAGE == 0 && r.end % PAGE == 0 && r.start < r.end));
            let found: BTreeSet<u64> = ranges.iter().flat_map(|r| r.start / PAGE..r.end / PAGE).collect();
            let expected: BTreeSet<u64> = buffers
                .iter()
                .flat_map(|&(address, len)| address.div_ceil(PAGE)..(address + u64::from(len)) / PAGE)
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
