//! Tests of guest memory: what a guest, a client with a memfd and a hypervisor see of it.

use std::os::fd::{AsFd, AsRawFd};

use proptest::prelude::*;
use sepal_devices::virtio::device::Reclaim as _;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;

const GIB: u64 = 1 << 30;

fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create(c"test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn custom(start: u64, end: u64) -> CustomRange {
    CustomRange {
        memfd: memfd(end.saturating_sub(start), SealFlags::SHRINK),
        start,
        end,
    }
}

fn make(size_bytes: u64, custom: Vec<CustomRange>) -> Result<GuestRam, MemoryError> {
    let config = MemoryConfig {
        size_bytes,
        custom,
        huge_pages: false,
        device_bytes: 0,
    };
    GuestRam::new(config, &AtomicBool::new(false))
}

/// Whether the kernel can read a byte at an address of this process.
fn readable(address: u64) -> bool {
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the kernel checks the address and fails with EFAULT where nothing can be read.
    unsafe { libc::write(writer.as_raw_fd(), address as *const libc::c_void, 1) == 1 }
}

#[test]
fn sizes_out_of_range_are_refused_with_the_numbers() {
    let message = |size| make(size, vec![]).unwrap_err().to_string();
    assert_eq!(
        message(3 * MIB + 4096),
        "memory: 3149824 bytes is not a multiple of 1 MiB"
    );
    assert_eq!(
        message(MIB),
        "memory: 1 MiB is too little, a guest needs at least 2 MiB"
    );
    assert!(
        message(1 << 43).contains("8388608 MiB is too much"),
        "{}",
        message(1 << 43)
    );
    let error = check_host(5 * GIB, 4 * GIB, GIB).unwrap_err();
    assert_eq!(
        error.to_string(),
        "memory: 5120 MiB is more than the host has: 4096 MiB in all, 1024 MiB of them unused now"
    );
    assert!(!error.is_bad_config() && make(MIB, vec![]).unwrap_err().is_bad_config());
    // 3 TiB are fine for the guest, but no machine that runs tests has them.
    assert!(matches!(make(3 << 40, vec![]), Err(MemoryError::MoreThanHost { .. })));
}

#[test]
fn memory_lies_around_the_hole() {
    assert_eq!(
        ram_ranges(64 * MIB),
        [Range {
            start: 0,
            end: 64 * MIB
        }]
    );
    assert_eq!(ram_ranges(3 * GIB), [Range { start: 0, end: 3 * GIB }]);
    assert_eq!(ram_ranges(5 * GIB), [0..3 * GIB, 4 * GIB..6 * GIB]);
}

#[test]
fn one_mapping_with_guards() {
    let ram = make(16 * MIB, vec![]).unwrap();
    let slots: Vec<MemorySlot> = ram.slots().collect();
    let &[slot] = slots.as_slice() else { panic!("{slots:?}") };
    assert_eq!((slot.guest_phys, slot.size), (0, 16 * MIB));
    assert_eq!(slot.host_addr % (2 * MIB), 0, "aligned for huge pages");
    assert!(readable(slot.host_addr) && readable(slot.host_addr + slot.size - 1));
    assert!(!readable(slot.host_addr - 1) && !readable(slot.host_addr + slot.size));

    assert!(ram.memory().write_obj(u32::MAX, GuestAddress(16 * MIB - 3)).is_err());
    ram.memory().write_obj(0x1234_u32, GuestAddress(16 * MIB - 4)).unwrap();
    let address = slot.host_addr + 16 * MIB - 4;
    // SAFETY: the last four bytes of the slot, written just now.
    assert_eq!(unsafe { *(address as *const u32) }, 0x1234);
}

#[test]
fn the_memfd_can_neither_shrink_nor_grow() {
    let ram = make(4 * MIB, vec![]).unwrap();
    let region = ram.memory().find_region(GuestAddress(0)).unwrap();
    let file = region.file_offset().unwrap().file();
    assert!(file.set_len(0).is_err() && file.set_len(8 * MIB).is_err());
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
}

#[test]
fn huge_pages_are_asked_for_and_not_required() {
    let config = MemoryConfig {
        size_bytes: 4 * MIB,
        custom: vec![],
        huge_pages: true,
        device_bytes: 0,
    };
    let ram = GuestRam::new(config, &AtomicBool::new(false)).unwrap();
    ram.memory().write_obj(1_u8, GuestAddress(0)).unwrap();
}

#[test]
fn a_clients_memfd_is_the_memory_of_its_range() {
    let inside = custom(4 * MIB, 6 * MIB);
    let above = custom(4 * GIB, 4 * GIB + MIB);
    let [ours, theirs] = [&inside, &above].map(|range| File::from(range.memfd.as_fd().try_clone_to_owned().unwrap()));
    let ram = make(16 * MIB, vec![above, inside]).unwrap();

    // One slot for RAM although it has several backing files, and one for what lies above.
    let slots: Vec<(u64, u64)> = ram.slots().map(|slot| (slot.guest_phys, slot.size)).collect();
    assert_eq!(slots, [(0, 16 * MIB), (4 * GIB, MIB)]);
    assert_eq!(ram.ranges(), [0..16 * MIB, 4 * GIB..4 * GIB + MIB]);

    // A write across the border shows up on either side of it.
    ram.memory().write_obj(u64::MAX, GuestAddress(4 * MIB - 4)).unwrap();
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&ours, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [255, 255, 255, 255, 0, 0, 0, 0]);
    std::os::unix::fs::FileExt::write_all_at(&theirs, b"hello", 0).unwrap();
    ram.memory().read_slice(&mut bytes[..5], GuestAddress(4 * GIB)).unwrap();
    assert_eq!(&bytes[..5], b"hello");

    // Each region names its file, and where in it the region starts.
    let regions: Vec<(u64, u64)> = ram
        .memory()
        .iter()
        .map(|region| (region.start_addr().0, region.file_offset().unwrap().start()))
        .collect();
    assert_eq!(regions, [(0, 0), (4 * MIB, 0), (6 * MIB, 6 * MIB), (4 * GIB, 0)]);
}

#[test]
fn a_range_that_straddles_the_end_of_memory() {
    let ram = make(4 * MIB, vec![custom(3 * MIB, 5 * MIB)]).unwrap();
    assert_eq!(ram.ranges(), [Range { start: 0, end: 5 * MIB }]);
}

#[test]
fn custom_ranges_that_cannot_be_used() {
    let page = 4096;
    let cases: Vec<(CustomRange, &str)> = vec![
        (custom(MIB, MIB), "it is empty"),
        (custom(2 * MIB, MIB), "it is empty"),
        (custom(MIB + 1, 2 * MIB), "is not aligned to 0x1000"),
        (custom(MIB, 2 * MIB - 1), "is not aligned to 0x1000"),
        (custom(3 * GIB - page, 3 * GIB + page), "meets the device hole"),
        (custom(4 * GIB - page, 4 * GIB), "meets the device hole"),
        (custom(2 * GIB, 5 * GIB), "meets the device hole"),
        (
            custom(1 << 42, (1 << 42) + page),
            "beyond the last address 0x40000000000",
        ),
        (
            CustomRange {
                memfd: memfd(page, SealFlags::empty()),
                start: 0,
                end: MIB,
            },
            "the memfd has 0x1000 bytes, the range has 0x100000",
        ),
        (
            CustomRange {
                memfd: memfd(MIB, SealFlags::SHRINK | SealFlags::WRITE),
                start: 0,
                end: MIB,
            },
            "could not map the memory",
        ),
        (
            CustomRange {
                memfd: rustix::pipe::pipe().unwrap().0,
                start: 0,
                end: MIB,
            },
            "the file is no memfd",
        ),
        (custom(8 * MIB, 9 * MIB), "it overlaps custom memory range 0"),
    ];
    for (range, reason) in cases {
        let error = make(16 * MIB, vec![custom(8 * MIB, 10 * MIB), range]).unwrap_err();
        let message = error.to_string();
        assert!(
            message.starts_with("custom memory range 1: ") && message.contains(reason),
            "{message}"
        );
        assert!(error.is_bad_config());
    }
    let many = (0..17).map(|index| custom(index * MIB, (index + 1) * MIB)).collect();
    assert_eq!(
        make(64 * MIB, many).unwrap_err().to_string(),
        "custom memory: 17 ranges, at most 16 are possible"
    );
}

#[test]
fn a_clone_outlives_the_memory() {
    let ram = make(4 * MIB, vec![]).unwrap();
    let clone = ram.memory().clone();
    clone.write_obj(7_u8, GuestAddress(MIB)).unwrap();
    drop(ram);
    assert_eq!(clone.read_obj::<u8>(GuestAddress(MIB)).unwrap(), 7);
}

#[test]
fn dropped_memory_is_unmapped() {
    let ram = make(4 * MIB, vec![]).unwrap();
    let file = ram
        .memory()
        .find_region(GuestAddress(0))
        .unwrap()
        .file_offset()
        .unwrap()
        .arc()
        .clone();
    drop(ram);
    // The mapping and the regions held the file too.
    assert_eq!(Arc::strong_count(&file), 1);
}

/// Memory of 4 MiB with a client's range above it and a region for a memory device.
fn with_device_region(device_bytes: u64, custom: Vec<CustomRange>) -> Result<GuestRam, MemoryError> {
    let config = MemoryConfig {
        size_bytes: 4 * MIB,
        custom,
        huge_pages: false,
        device_bytes,
    };
    GuestRam::new(config, &AtomicBool::new(false))
}

#[test]
fn a_device_region_is_memory_that_the_guest_is_not_told_of() {
    let ram = with_device_region(64 * MIB, vec![custom(5 * GIB, 5 * GIB + MIB)]).unwrap();
    let region = 6 * GIB..6 * GIB + 64 * MIB;
    assert_eq!(ram.ranges(), [0..4 * MIB, 5 * GIB..5 * GIB + MIB]);
    let slots: Vec<(u64, u64)> = ram.slots().map(|slot| (slot.guest_phys, slot.size)).collect();
    assert_eq!(slots, [(0, 4 * MIB), (5 * GIB, MIB), (6 * GIB, 64 * MIB)]);
    assert_eq!(ram.end(), region.end);
    ram.memory().write_obj(7_u64, GuestAddress(region.end - 8)).unwrap();
    let map = MemoryMap::new(ram.ranges());
    assert!(map.usable().all(|usable| usable.end <= region.start));
}

#[test]
fn a_device_region_that_cannot_be_is_refused() {
    assert!(matches!(
        with_device_region(MIB + 1, vec![]),
        Err(MemoryError::NotMebibytes { .. })
    ));
    assert!(matches!(
        with_device_region(1 << 42, vec![]),
        Err(MemoryError::TooLarge { .. })
    ));
}

/// Bytes that the file behind an address holds.
fn allocated(ram: &GuestRam, address: u64) -> u64 {
    let region = ram.memory().find_region(GuestAddress(address)).unwrap();
    let stat = rustix::fs::fstat(region.file_offset().unwrap().file()).unwrap();
    stat.st_blocks as u64 * 512
}

#[test]
fn discarded_pages_go_back_to_the_host_and_read_as_zeroes() {
    let ram = with_device_region(4 * MIB, vec![]).unwrap();
    let discard = ram.discard();
    for start in [MIB, 4 * GIB] {
        let before = allocated(&ram, start);
        ram.memory()
            .write_slice(&vec![1; MIB as usize], GuestAddress(start))
            .unwrap();
        assert_eq!(allocated(&ram, start), before + MIB);
        discard.discard(start + PAGE, MIB - 2 * PAGE).unwrap();
        assert_eq!(allocated(&ram, start), before + 2 * PAGE);
        let read = |at| ram.memory().read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!((read(start + PAGE - 1), read(start + PAGE)), (1, 0));
        assert_eq!((read(start + MIB - PAGE - 1), read(start + MIB - PAGE)), (0, 1));
    }
}

#[test]
fn what_is_a_clients_is_not_discarded() {
    let ram = make(4 * MIB, vec![custom(MIB, 2 * MIB)]).unwrap();
    ram.memory()
        .write_slice(&vec![1; 3 * MIB as usize], GuestAddress(0))
        .unwrap();
    ram.discard().discard(0, 3 * MIB).unwrap();
    let read = |at| ram.memory().read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!(
        [read(MIB - 1), read(MIB), read(2 * MIB - 1), read(2 * MIB)],
        [0, 1, 1, 0]
    );
}

#[test]
fn a_range_that_is_not_memory_is_not_discarded() {
    let ram = make(4 * MIB, vec![]).unwrap();
    let discard = ram.discard();
    for (start, len) in [
        (1, PAGE),
        (0, 1),
        (4 * MIB - PAGE, 2 * PAGE),
        (u64::MAX - PAGE + 1, PAGE),
        (u64::MAX - PAGE + 1, 2 * PAGE),
        (0, u64::MAX - PAGE + 1),
    ] {
        let error = discard.discard(start, len).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{start:#x} {len:#x}");
    }
    discard.discard(0, 0).unwrap();
}

#[test]
fn cancelled() {
    let config = MemoryConfig {
        size_bytes: 4 * MIB,
        custom: vec![],
        huge_pages: false,
        device_bytes: 0,
    };
    assert!(matches!(
        GuestRam::new(config, &AtomicBool::new(true)),
        Err(MemoryError::Cancelled)
    ));
}

/// RAM of any size with any custom ranges, as ascending, disjoint ranges.
fn any_ram() -> impl Strategy<Value = Vec<Range<u64>>> {
    (
        2_u64..8192,
        prop::collection::vec((0_u64..1 << 21, 1_u64..1 << 18), 0..16),
    )
        .prop_map(|(mib, parts)| {
            let mut all = ram_ranges(mib * MIB);
            for (start, pages) in parts {
                let range = start * PAGE..(start + pages) * PAGE;
                if map::check_custom(range.clone()).is_ok() {
                    all = all
                        .iter()
                        .flat_map(|other| map::subtract(other, std::slice::from_ref(&range)))
                        .collect();
                    all.push(range);
                    all.sort_by_key(|range| range.start);
                }
            }
            merge(all.into_iter())
        })
}

proptest! {
    #[test]
    fn the_map_is_sorted_disjoint_and_inside_ram(ram in any_ram()) {
        let map = MemoryMap::new(&ram);
        prop_assert!(map.ranges().len() <= 128);
        for entry in map.ranges() {
            prop_assert!(entry.range.start < entry.range.end);
        }
        for pair in map.ranges().windows(2) {
            prop_assert!(pair[0].range.end <= pair[1].range.start);
        }
        for usable in map.usable() {
            prop_assert!(ram.iter().any(|range| range.start <= usable.start && usable.end <= range.end));
            prop_assert!(usable.end <= layout::LOW_MEMORY_END || usable.start >= layout::HIGH_MEMORY);
            prop_assert!(map.is_usable(usable) && !map.is_usable(&(usable.start..usable.end + 1)));
        }
        // All RAM is told of, but for the legacy hole of the first MiB.
        let told: u64 = map.usable().map(|range| range.end - range.start).sum();
        let all: u64 = ram.iter().map(|range| range.end - range.start).sum();
        prop_assert_eq!(told + (layout::HIGH_MEMORY - layout::LOW_MEMORY_END), all);
    }

    #[test]
    fn a_range_has_no_gap_exactly_if_all_of_it_is_memory(
        points in prop::collection::btree_set(0_u64..128, 0..8),
        address in 0_u64..160,
        length in 0_u64..160,
    ) {
        let points: Vec<u64> = points.into_iter().collect();
        let ranges: Vec<Range<u64>> = points.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let expected = (address..address + length).find(|at| !ranges.iter().any(|range| range.contains(at)));
        prop_assert_eq!(map::first_gap(&ranges, address, length), expected);
        // Also where addresses end.
        let high = u64::MAX - address;
        prop_assert_eq!(map::first_gap(&ranges, high, length), (length > 0).then_some(high));
    }

    #[test]
    fn subtracting_leaves_what_is_outside(
        range in (0_u64..64, 0_u64..64).prop_map(|(start, len)| start..start + len),
        points in prop::collection::btree_set(0_u64..128, 0..8),
    ) {
        let points: Vec<u64> = points.into_iter().collect();
        let holes: Vec<Range<u64>> = points.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let left = map::subtract(&range, &holes);
        for at in 0..128 {
            let expected = range.contains(&at) && !holes.iter().any(|hole| hole.contains(&at));
            prop_assert_eq!(left.iter().filter(|range| range.contains(&at)).count(), usize::from(expected));
        }
    }
}
