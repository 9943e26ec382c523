//! Page-table walks: well-formed tables, and any others.

use proptest::prelude::*;

use super::*;
use crate::paging::{EFER_NO_EXECUTE, LARGE};

const MEMORY: u64 = 64 * PAGE;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn long_mode(root: u64) -> kvm_sregs {
    kvm_sregs {
        cr0: CR0_PAGING | CR0_WRITE_PROTECT | 1,
        cr3: root,
        cr4: 1 << 5,
        efer: EFER_LONG_MODE_ACTIVE | EFER_NO_EXECUTE,
        ..Default::default()
    }
}

fn put(memory: &GuestMemoryMmap, table: u64, index: u64, entry: u64) {
    memory.write_obj(entry, GuestAddress(table + index * 8)).unwrap();
}

/// Tables in pages 1-4 that map linear page `n` of the top gigabyte to `pages[n]`.
fn map(memory: &GuestMemoryMmap, pages: &[u64]) -> u64 {
    put(memory, 0x1000, 511, 0x2000 | PRESENT | WRITABLE);
    put(memory, 0x2000, 511, 0x3000 | PRESENT | WRITABLE);
    put(memory, 0x3000, 0, 0x4000 | PRESENT | WRITABLE);
    for (n, page) in pages.iter().enumerate() {
        put(memory, 0x4000, n as u64, *page);
    }
    0xffff_ffff_c000_0000
}

#[test]
fn pages_are_found_and_crossed() {
    let memory = memory();
    let base = map(&memory, &[0x8000 | PRESENT | WRITABLE, 0x6000 | PRESENT | WRITABLE]);
    let space = AddressSpace::new(&memory, &long_mode(0x1000)).unwrap();
    assert_eq!(space.translate(base + 0xabc, Access::Read), Ok(0x8abc));
    let bytes: Vec<u8> = (1..=16).collect();
    space.write(base + 0xffa, &bytes).unwrap();
    let mut back = [0; 16];
    space.read(base + 0xffa, &mut back).unwrap();
    assert_eq!(back, *bytes);
    let mut low = [0; 6];
    memory.read_slice(&mut low, GuestAddress(0x8ffa)).unwrap();
    assert_eq!(low, [1, 2, 3, 4, 5, 6]);
    let mut high = [0; 10];
    memory.read_slice(&mut high, GuestAddress(0x6000)).unwrap();
    assert_eq!(high, bytes[6..]);
}

#[test]
fn large_pages_keep_the_lower_address_bits() {
    let memory = memory();
    put(&memory, 0x1000, 0, 0x2000 | PRESENT | WRITABLE);
    put(&memory, 0x2000, 0, 0x3000 | PRESENT | WRITABLE);
    put(&memory, 0x2000, 1, LARGE | PRESENT);
    put(&memory, 0x3000, 3, 0x20_0000 | LARGE | PRESENT | NO_EXECUTE);
    let space = AddressSpace::new(&memory, &long_mode(0x1000)).unwrap();
    assert_eq!(space.translate(0x4000_1234, Access::Read), Ok(0x1234));
    assert_eq!(space.translate(0x71_2345, Access::Read), Ok(0x31_2345));
    assert_eq!(
        space.translate(0x71_2345, Access::Execute),
        Err(Fault::Page {
            address: 0x71_2345,
            code: 0x11
        })
    );
}

#[test]
fn a_large_bit_at_the_top_is_no_page() {
    let memory = memory();
    put(&memory, 0x1000, 0, 0x2000 | LARGE | PRESENT);
    let space = AddressSpace::new(&memory, &long_mode(0x1000)).unwrap();
    assert_eq!(
        space.translate(0, Access::Read),
        Err(Fault::Page { address: 0, code: 0 }),
        "the walk goes on to the next table, which is empty"
    );
}

#[test]
fn protection_is_the_guests() {
    let memory = memory();
    let base = map(&memory, &[0x8000 | PRESENT, 0x9000 | PRESENT | WRITABLE | NO_EXECUTE]);
    let mut sregs = long_mode(0x1000);
    let space = AddressSpace::new(&memory, &sregs).unwrap();
    let write_fault = Fault::Page { address: base, code: 3 };
    assert_eq!(space.translate(base, Access::Write), Err(write_fault));
    assert_eq!(space.translate(base, Access::Execute), Ok(0x8000));
    // A write over the border into a page that can't be written changes neither page.
    assert!(space.write(base + 0x1ffc, &[1; 8]).is_err());
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x9ffc)).unwrap(), 0);
    sregs.cr0 &= !CR0_WRITE_PROTECT;
    sregs.efer &= !EFER_NO_EXECUTE;
    let space = AddressSpace::new(&memory, &sregs).unwrap();
    assert_eq!(space.translate(base, Access::Write), Ok(0x8000));
    assert_eq!(space.translate(base + 0x1000, Access::Execute), Ok(0x9000));
}

#[test]
fn an_instruction_may_end_where_the_next_page_is_missing() {
    let memory = memory();
    let base = map(&memory, &[0x8000 | PRESENT]);
    memory.write_slice(&[0xcc; 4096], GuestAddress(0x8000)).unwrap();
    let space = AddressSpace::new(&memory, &long_mode(0x1000)).unwrap();
    let mut buffer = [0; 15];
    assert_eq!(space.fetch(base, &mut buffer), Ok(15));
    assert_eq!(space.fetch(base + 0xffd, &mut buffer), Ok(3));
    assert!(space.fetch(base + 0x1000, &mut buffer).is_err());
}

#[test]
fn only_long_mode_with_four_levels_is_walked() {
    let memory = memory();
    let mut five = long_mode(0x1000);
    five.cr4 |= CR4_FIVE_LEVELS;
    assert!(AddressSpace::new(&memory, &five).is_none());
    let mut unpaged = long_mode(0x1000);
    unpaged.cr0 &= !CR0_PAGING;
    assert!(AddressSpace::new(&memory, &unpaged).is_none());
    let mut legacy = long_mode(0x1000);
    legacy.efer = 0;
    assert!(AddressSpace::new(&memory, &legacy).is_none());
}

#[test]
fn a_table_that_maps_itself_ends_after_four_levels() {
    let memory = memory();
    for index in 0..512 {
        put(&memory, 0x1000, index, 0x1000 | PRESENT | WRITABLE);
    }
    let space = AddressSpace::new(&memory, &long_mode(0x1000)).unwrap();
    assert_eq!(space.translate(0x1234_5678_9abc, Access::Write), Ok(0x1abc));
}

proptest! {
    #[test]
    fn no_tables_lead_out_of_memory(
        root in any::<u64>(),
        seeds in proptest::collection::vec(any::<u64>(), 64),
        address in any::<u64>(),
        canonical in any::<bool>(),
        data in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        // Every entry of every page is something: an address near the memory or far off, and any flags.
        let memory = memory();
        for slot in 0..MEMORY / 8 {
            let seed = seeds[(slot % 64) as usize].rotate_left((slot / 64 % 64) as u32);
            let entry = if seed & 0x30 == 0 { seed } else { (seed % (MEMORY * 2)) | PRESENT };
            memory.write_obj(entry, GuestAddress(slot * 8)).unwrap();
        }
        let address = if canonical { ((address << 16) as i64 >> 16) as u64 } else { address };
        let space = AddressSpace::new(&memory, &long_mode(root % (MEMORY * 2))).unwrap();
        let mut buffer = vec![0; data.len()];
        for access in [Access::Read, Access::Write, Access::Execute] {
            match space.translate(address, access) {
                Ok(physical) => prop_assert_eq!(physical % PAGE, address % PAGE),
                Err(Fault::NotCanonical) => prop_assert!(!is_canonical(address)),
                Err(_) => prop_assert!(is_canonical(address)),
            }
        }
        let fetched = space.fetch(address, &mut buffer);
        prop_assert!(fetched.is_err() || fetched.is_ok_and(|n| n >= 1 && n <= data.len()));
        let _ = space.read(address, &mut buffer);
        let _ = space.write(address, &data);
    }

    #[test]
    fn canonical_means_that_the_sign_is_extended(address in any::<u64>()) {
        let extended = ((address << 16) as i64 >> 16) as u64;
        prop_assert_eq!(is_canonical(address), extended == address);
        prop_assert!(is_canonical(extended));
    }
}
