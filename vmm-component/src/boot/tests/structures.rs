//! What the kernel is handed: zero page, start info, command line, initramfs.

use super::images::{DATA, KERNEL, Segment, bzimage, elf, kernel, pattern};
use super::*;

/// The e820 table of the zero page as (start, size, type).
fn e820(guest: &Guest) -> Vec<(u64, u64, u32)> {
    let count = guest.bytes(layout::ZERO_PAGE + 0x1e8, 1)[0];
    (0..u64::from(count))
        .map(|index| layout::ZERO_PAGE + 0x2d0 + index * 20)
        .map(|at| (guest.word64(at), guest.word64(at + 8), guest.word32(at + 16)))
        .collect()
}

fn expected_map(mib: u64) -> Vec<(u64, u64, u32)> {
    vec![
        (0, 0x9_fc00, 1),
        (0xe_0000, 0x2_0000, 2),
        (0x10_0000, mib * MIB - 0x10_0000, 1),
        (0xe000_0000, 0x1000_0000, 2),
    ]
}

#[test]
fn the_zero_page_of_an_elf_kernel() {
    let guest = Guest::new(64);
    let initrd = pattern(12_345, 9);
    guest
        .load_with(
            &kernel(),
            Some(&initrd),
            "console=ttyS0 panic=-1",
            Some(Protocol::Linux64),
        )
        .unwrap();
    let page = layout::ZERO_PAGE;
    assert_eq!(guest.bytes(page + 0x1fe, 2), [0x55, 0xaa]);
    assert_eq!(guest.bytes(page + 0x202, 4), b"HdrS");
    assert_eq!(guest.bytes(page + 0x210, 2), [0xff, 1], "loader and flags");
    assert_eq!(guest.word32(page + 0x228), layout::CMDLINE as u32);
    assert_eq!(guest.bytes(layout::CMDLINE, 23), b"console=ttyS0 panic=-1\0");
    assert_eq!(guest.word64(page + 0x70), layout::ACPI, "RSDP");
    assert_eq!(e820(&guest), expected_map(64));

    // At the very end of memory, from a page's start.
    let (address, size) = (guest.word32(page + 0x218), guest.word32(page + 0x21c));
    assert_eq!((u64::from(address), size), ((64 * MIB - 12_345) / 4096 * 4096, 12_345));
    assert!(guest.bytes(address.into(), 12_345) == initrd, "initramfs differs");
}

#[test]
fn the_zero_page_of_a_bzimage_keeps_its_setup_header() {
    let guest = Guest::new(64);
    let mut image = bzimage(&kernel());
    // Below the end of memory, and a hostile list of setup data.
    image[0x22c..0x230].copy_from_slice(&0x2ff_ffff_u32.to_le_bytes());
    guest
        .load_with(&image, Some(b"initramfs"), "console=ttyS0", None)
        .unwrap();
    let page = layout::ZERO_PAGE;
    assert_eq!(guest.bytes(page + 0x1f1, 0xd), image[0x1f1..0x1fe]);
    assert_eq!(
        (guest.word32(page + 0x230), guest.word64(page + 0x258)),
        (0x20_0000, KERNEL)
    );
    assert_eq!(guest.word64(page + 0x250), 0, "no setup data");
    assert_eq!(guest.bytes(page + 0x1ef, 1), [0], "sentinel");
    let address = guest.word32(page + 0x218);
    assert_eq!(address, 0x2ff_f000, "below initrd_addr_max");
    assert_eq!(guest.bytes(address.into(), 9), b"initramfs");
}

#[test]
fn the_start_info_of_a_pvh_kernel() {
    let guest = Guest::new(64);
    let entry = guest
        .load_with(&kernel(), Some(b"initramfs"), "console=ttyS0", None)
        .unwrap();
    let info = entry.boot_info;
    assert_eq!(
        (guest.word32(info), guest.word32(info + 4), guest.word32(info + 12)),
        (0x336e_c578, 1, 1)
    );
    let command_line = guest.word64(info + 24);
    assert_eq!(guest.bytes(command_line, 14), b"console=ttyS0\0");
    assert_eq!(guest.word64(info + 32), layout::ACPI);
    let module = guest.word64(info + 16);
    assert_eq!((guest.word64(module), guest.word64(module + 8)), (64 * MIB - 4096, 9));
    assert_eq!(guest.bytes(64 * MIB - 4096, 9), b"initramfs");
    let (map, count) = (guest.word64(info + 40), guest.word32(info + 48));
    let entries: Vec<_> = (0..u64::from(count))
        .map(|index| map + index * 24)
        .map(|at| (guest.word64(at), guest.word64(at + 8), guest.word32(at + 16)))
        .collect();
    assert_eq!(entries, expected_map(64));

    let guest = Guest::new(64);
    let entry = guest.load(&kernel()).unwrap();
    assert_eq!(
        (guest.word32(entry.boot_info + 12), guest.word64(entry.boot_info + 16)),
        (0, 0),
        "no module"
    );
}

#[test]
fn the_gdt_and_the_page_tables() {
    let guest = Guest::new(64);
    guest.load_with(&kernel(), None, "", Some(Protocol::Linux64)).unwrap();
    assert_eq!(guest.word64(layout::GDT + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(guest.word64(layout::PAGE_TABLES) & !0xfff, layout::PAGE_TABLES + 0x1000);
    let guest = Guest::new(64);
    guest.load(&kernel()).unwrap();
    assert_eq!(guest.word64(layout::GDT + 0x10), 0x00cf_9b00_0000_ffff);
}

#[test]
fn command_lines_that_cannot_be_used() {
    let guest = Guest::new(64);
    guest.load_with(&kernel(), None, &"x".repeat(2047), None).unwrap();
    guest
        .load_with(&kernel(), None, "tabs\tand\nlines and ümlauts", None)
        .unwrap();
    for (command_line, reason) in [
        (
            "x".repeat(2048),
            "command line: 2048 bytes are too long, the limit is 2047",
        ),
        ("quiet\0root".into(), "command line: control character 0x00 at offset 5"),
        (
            "quiet \x1b[1m".into(),
            "command line: control character 0x1b at offset 6",
        ),
    ] {
        let error = guest.load_with(&kernel(), None, &command_line, None).unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.class()),
            (reason, BootErrorClass::BadConfig)
        );
    }
}

#[test]
fn an_initramfs_that_does_not_fit() {
    let guest = Guest::new(32);
    // Free are the 15 MiB from 1 MiB on, and what is above the kernel.
    guest.load_with(&kernel(), Some(&vec![1; 15 << 20]), "", None).unwrap();
    let error = guest
        .load_with(&kernel(), Some(&vec![1; (15 << 20) + 1]), "", None)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "initramfs: 15728641 bytes do not fit: below 0xc0000000 and beside the kernel, the largest free stretch of \
         guest memory has 15728640 bytes"
    );
    assert_eq!(error.class(), BootErrorClass::BadConfig);
    let error = guest.load_with(&kernel(), Some(b""), "", None).unwrap_err();
    assert_eq!(error.to_string(), "initramfs: the file is empty");
}

#[test]
fn an_initramfs_keeps_clear_of_the_kernel() {
    // The kernel ends a page before the end of memory, so the initramfs goes below it.
    let guest = Guest::new(32);
    let image = elf(DATA, &[Segment::load(0x1000, DATA, &pattern(100, 0), (8 << 20) - 4096)]);
    guest
        .load_with(&image, Some(&[7; 5000]), "", Some(Protocol::Linux64))
        .unwrap();
    assert_eq!(u64::from(guest.word32(layout::ZERO_PAGE + 0x218)), DATA - 8192);

    // The setup header asks for 16 MiB from the kernel's start: all that is above it.
    let guest = Guest::new(32);
    guest
        .load_with(&bzimage(&kernel()), Some(&[7; 5000]), "", None)
        .unwrap();
    assert_eq!(u64::from(guest.word32(layout::ZERO_PAGE + 0x218)), KERNEL - 8192);
}

#[test]
fn memory_without_the_boot_area() {
    let guest = Guest::new(32);
    let map = MemoryMap::new(std::slice::from_ref(&(MIB..32 * MIB)));
    let (kernel, cancel) = (file(&kernel()), AtomicBool::new(false));
    let request = BootRequest {
        kernel: &kernel,
        initrd: None,
        cmdline: "",
        rsdp: 0,
        protocol: None,
        cancel: &cancel,
    };
    assert!(matches!(
        load(guest.memory(), &map, &request),
        Err(BootError::NoLowMemory)
    ));
}
