//! Walks in each mode: well-formed tables, and any others.

use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 64 * PAGE;
const ALL: u64 = PRESENT | WRITABLE | USER;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn put(memory: &GuestMemoryMmap, table: u64, index: u64, entry: u64) {
    memory.write_obj(entry, GuestAddress(table + index * 8)).unwrap();
}

fn put_legacy(memory: &GuestMemoryMmap, table: u64, index: u64, entry: u32) {
    memory.write_obj(entry, GuestAddress(table + index * 4)).unwrap();
}

fn long(levels: u32) -> kvm_sregs {
    kvm_sregs {
        cr0: CR0_PAGING | 1,
        cr3: 0x1000,
        cr4: CR4_PHYSICAL_EXTENSION | if levels == 5 { CR4_FIVE_LEVELS } else { 0 },
        efer: EFER_LONG_MODE_ACTIVE | EFER_NO_EXECUTE,
        ..kvm_sregs::default()
    }
}

fn legacy(cr4: u64) -> kvm_sregs {
    kvm_sregs {
        cr0: CR0_PAGING | 1,
        cr3: 0x1000,
        cr4,
        ..kvm_sregs::default()
    }
}

fn leads(memory: &GuestMemoryMmap, sregs: &kvm_sregs, address: u64) -> Result<(u64, u64), Hole> {
    let found = PageTables::new(memory, sregs).translate(address)?;
    Ok((found.physical, found.page_size))
}

#[test]
fn without_paging_addresses_are_physical() {
    let memory = memory();
    let real = kvm_sregs::default();
    assert_eq!(leads(&memory, &real, 0xffff_fff0), Ok((0xffff_fff0, 0)));
    assert_eq!(leads(&memory, &real, 1 << 32), Err(Hole::NotCanonical));
}

#[test]
fn pages_of_all_sizes_are_found_by_four_and_five_levels() {
    let memory = memory();
    // The fifth level leads to the four others, from its first and from its last entry.
    for top in [0, 511] {
        put(&memory, 0x1000, top, 0x2000 | ALL);
    }
    for top in [0, 511] {
        put(&memory, 0x2000, top, 0x3000 | ALL);
    }
    put(&memory, 0x3000, 0, 0x4000 | ALL);
    put(&memory, 0x3000, 1, (3 << 30) | LARGE | ALL);
    put(&memory, 0x4000, 0, 0x5000 | ALL);
    put(&memory, 0x4000, 1, (6 << 20) | LARGE | ALL);
    put(&memory, 0x5000, 2, 0x8000 | ALL);
    for (levels, high) in [(4, 0xffff_ff80_0000_0000_u64), (5, 0xffff_ff80_0000_0000)] {
        let mut sregs = long(levels);
        sregs.cr3 = if levels == 5 { 0x1000 } else { 0x2000 };
        for base in [0, high] {
            assert_eq!(leads(&memory, &sregs, base + 0x2abc), Ok((0x8abc, 4096)));
            assert_eq!(
                leads(&memory, &sregs, base + 0x21_2345),
                Ok(((6 << 20) + 0x1_2345, 2 << 20))
            );
            let far = base + (1 << 30) + 0x0123_4567;
            assert_eq!(leads(&memory, &sregs, far), Ok(((3 << 30) + 0x0123_4567, 1 << 30)));
            assert_eq!(leads(&memory, &sregs, base + 0x3000), Err(Hole::NotPresent));
        }
    }
    // What is an address with five levels is none with four.
    let between = 1 << 50;
    assert_eq!(leads(&memory, &long(5), between), Err(Hole::NotPresent));
    assert_eq!(leads(&memory, &long(4), between), Err(Hole::NotCanonical));
    assert_eq!(leads(&memory, &long(5), 1 << 60), Err(Hole::NotCanonical));
}

#[test]
fn a_page_permits_what_all_entries_to_it_permit() {
    let memory = memory();
    put(&memory, 0x1000, 0, 0x2000 | ALL);
    put(&memory, 0x2000, 0, 0x3000 | ALL);
    put(&memory, 0x3000, 0, 0x4000 | ALL);
    put(&memory, 0x3000, 1, 0x4000 | PRESENT | NO_EXECUTE);
    put(&memory, 0x4000, 0, 0x5000 | ALL);
    put(&memory, 0x4000, 1, 0x6000 | PRESENT | USER);
    let permits = |sregs: &kvm_sregs, address| {
        let found = PageTables::new(&memory, sregs).translate(address).unwrap();
        (found.writable, found.user, found.executable)
    };
    assert_eq!(permits(&long(4), 0), (true, true, true));
    assert_eq!(permits(&long(4), 0x1000), (false, true, true));
    assert_eq!(permits(&long(4), 0x20_0000), (false, false, false));
    let mut without = long(4);
    without.efer = EFER_LONG_MODE_ACTIVE;
    assert_eq!(permits(&without, 0x20_0000), (false, false, true));
}

#[test]
fn pages_are_found_with_physical_address_extension() {
    let memory = memory();
    let mut sregs = legacy(CR4_PHYSICAL_EXTENSION);
    // The four entries need no page of their own.
    sregs.cr3 = 0x1fe0;
    put(&memory, 0x1fe0, 0, 0x2000 | PRESENT);
    put(&memory, 0x1fe0, 3, 0x3000 | PRESENT);
    put(&memory, 0x2000, 1, 0x4000 | ALL);
    put(&memory, 0x4000, 1, 0x9000 | ALL);
    put(&memory, 0x3000, 511, (1 << 32) | LARGE | ALL);
    assert_eq!(leads(&memory, &sregs, 0x20_1234), Ok((0x9234, 4096)));
    assert_eq!(
        leads(&memory, &sregs, 0xffff_ffff),
        Ok(((1 << 32) + 0x1f_ffff, 2 << 20))
    );
    assert_eq!(leads(&memory, &sregs, 1 << 30), Err(Hole::NotPresent));
    assert_eq!(leads(&memory, &sregs, 1 << 32), Err(Hole::NotCanonical));
}

#[test]
fn pages_are_found_by_two_levels() {
    let memory = memory();
    put_legacy(&memory, 0x1000, 0, 0x2000 | ALL as u32);
    put_legacy(&memory, 0x1000, 1023, 0x00c0_2000 | (LARGE | ALL) as u32);
    put_legacy(&memory, 0x2000, 1023, 0x7000 | ALL as u32);
    let large = legacy(CR4_LARGE_PAGES);
    assert_eq!(leads(&memory, &large, 0x3f_f123), Ok((0x7123, 4096)));
    assert_eq!(leads(&memory, &large, 0xffc1_2345), Ok((0x1_00c1_2345, 4 << 20)));
    assert_eq!(leads(&memory, &large, 0x3f_e000), Err(Hole::NotPresent));
    assert_eq!(leads(&memory, &large, 0x40_0000), Err(Hole::NotPresent));
    // Without large pages the bit means nothing, and the entry leads to a table, which is not there.
    let small = legacy(0);
    assert_eq!(
        leads(&memory, &small, 0xffc1_2345),
        Err(Hole::Outside {
            physical: 0x00c0_2000 + 0x12 * 4
        })
    );
}

#[test]
fn tables_that_lie_outside_memory_are_told() {
    let memory = memory();
    put(&memory, 0x1000, 0, (1 << 40) | ALL);
    let outside = Hole::Outside { physical: 1 << 40 };
    assert_eq!(leads(&memory, &long(4), 0), Err(outside));
    assert!(outside.to_string().contains("0x10000000000"), "{outside}");
}

/// Control registers for each mode, with a root anywhere.
fn modes(root: u64) -> [kvm_sregs; 6] {
    let with = |sregs: kvm_sregs| kvm_sregs { cr3: root, ..sregs };
    [
        kvm_sregs::default(),
        with(legacy(0)),
        with(legacy(CR4_LARGE_PAGES)),
        with(legacy(CR4_PHYSICAL_EXTENSION)),
        with(long(4)),
        with(long(5)),
    ]
}

proptest! {
    #[test]
    fn whatever_the_tables_are_a_walk_ends(
        root in prop_oneof![any::<u64>(), 0..MEMORY * 2],
        seeds in proptest::collection::vec(any::<u64>(), 64),
        address in any::<u64>(),
        shape in 0..4,
    ) {
        let memory = memory();
        for slot in 0..MEMORY / 8 {
            let seed = seeds[(slot % 64) as usize].rotate_left((slot / 64 % 64) as u32);
            let entry = if seed & 0x30 == 0 { seed } else { (seed % (MEMORY * 2)) | PRESENT };
            memory.write_obj(entry, GuestAddress(slot * 8)).unwrap();
        }
        let address = match shape {
            0 => address,
            1 => ((address << 16) as i64 >> 16) as u64,
            2 => ((address << 7) as i64 >> 7) as u64,
            _ => address & u64::from(u32::MAX),
        };
        for sregs in modes(root) {
            if let Ok(found) = PageTables::new(&memory, &sregs).translate(address) {
                let offset = found.page_size.max(PAGE) - 1;
                prop_assert_eq!(found.physical & offset, address & offset);
                prop_assert!([0, PAGE, 2 << 20, 4 << 20, 1 << 30].contains(&found.page_size));
            }
        }
    }

    /// What is mapped is found again, wherever it is and however large the page.
    #[test]
    fn what_is_mapped_is_found(address in any::<u64>(), level in 0..3_u32, levels in 4..=5_u32, frame in any::<u64>()) {
        let memory = memory();
        let bits = 12 + 9 * levels;
        let address = ((address << (64 - bits)) as i64 >> (64 - bits)) as u64;
        let size = 1_u64 << (12 + 9 * level);
        let frame = frame & ADDRESS & !(size - 1);
        for step in (level..levels).rev() {
            // Tables one after the other, from the top.
            let table = 0x1000 * u64::from(levels - step);
            let entry = if step == level { frame | if step > 0 { LARGE } else { 0 } } else { table + 0x1000 };
            put(&memory, table, address >> (12 + 9 * step) & 511, entry | ALL);
        }
        let found = leads(&memory, &long(levels), address);
        prop_assert_eq!(found, Ok((frame | address & (size - 1), size)));
    }

    #[test]
    fn canonical_means_that_the_sign_is_extended(address in any::<u64>(), bits in prop_oneof![Just(48_u32), Just(57)]) {
        let extended = ((address << (64 - bits)) as i64 >> (64 - bits)) as u64;
        prop_assert_eq!(is_canonical(address, bits), extended == address);
        prop_assert!(is_canonical(extended, bits));
    }
}
