//! ELF kernels: what is loaded where, what is refused and why, and that nothing breaks the loader.

use proptest::prelude::*;

use super::images::{
    DATA, DATA_OFFSET, DATA_SIZE, KERNEL, PVH_ENTRY, Segment, TEXT_SIZE, elf, kernel, pattern, pvh_note,
};
use super::*;

fn refused(image: &[u8]) -> String {
    let error = Guest::new(64).load(image).unwrap_err();
    assert_eq!(error.class(), BootErrorClass::KernelLoad);
    error.to_string()
}

/// A kernel of one segment at an address.
fn single(address: u64, memory: u64) -> Vec<u8> {
    elf(address, &[Segment::load(0x1000, address, &pattern(100, 0), memory)])
}

#[test]
fn segments_are_where_they_are_linked() {
    let guest = Guest::new(64);
    let entry = guest.load(&kernel()).unwrap();
    assert_eq!(entry.protocol, Protocol::Pvh);
    assert_eq!((entry.rip, entry.boot_info), (PVH_ENTRY, layout::PVH_START_INFO));
    let mut text = pattern(TEXT_SIZE, 1);
    text[0x2000..0x2000 + pvh_note(0).len()].copy_from_slice(&pvh_note(PVH_ENTRY));
    assert!(guest.bytes(KERNEL, TEXT_SIZE) == text, "text differs");
    assert!(guest.bytes(DATA, DATA_SIZE) == pattern(DATA_SIZE, 2), "data differs");
    assert!(
        guest
            .bytes(DATA + DATA_SIZE as u64, 0x10_0000 - DATA_SIZE)
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn the_64_bit_entry_on_request_and_without_a_note() {
    let guest = Guest::new(64);
    let entry = guest.load_with(&kernel(), None, "", Some(Protocol::Linux64)).unwrap();
    assert_eq!(
        (entry.protocol, entry.rip, entry.boot_info),
        (Protocol::Linux64, KERNEL, layout::ZERO_PAGE)
    );
    let entry = Guest::new(64).load(&single(KERNEL, 100)).unwrap();
    assert_eq!((entry.protocol, entry.rip), (Protocol::Linux64, KERNEL));
    let error = Guest::new(64)
        .load_with(&single(KERNEL, 100), None, "", Some(Protocol::Pvh))
        .unwrap_err();
    assert!(error.to_string().contains("XEN_ELFNOTE_PHYS32_ENTRY"), "{error}");
    assert_eq!(error.class(), BootErrorClass::BadConfig);
}

#[test]
fn a_virtual_entry_point_is_translated() {
    let segment = Segment::load(0x1000, KERNEL, &pattern(100, 0), 4096);
    let entry = Guest::new(64)
        .load(&elf(segment.virtual_address + 0x20, &[segment]))
        .unwrap();
    assert_eq!(entry.rip, KERNEL + 0x20);
}

#[test]
fn notes_outside_of_any_segment() {
    for offset in [0x800, 0x8000] {
        let segments = [
            Segment::note(offset, &pvh_note(KERNEL + 8)),
            Segment::load(0x1000, KERNEL, &pattern(0x2000, 0), 0x2000),
        ];
        let entry = Guest::new(64).load(&elf(KERNEL, &segments)).unwrap();
        assert_eq!((entry.protocol, entry.rip), (Protocol::Pvh, KERNEL + 8));
    }
}

#[test]
fn a_segment_of_zeros_may_be_anywhere_in_the_file() {
    for offset in [0x1040, 0x1_0000, 0x7fff_ffff_ffff_0000] {
        let mut image = elf(
            KERNEL,
            &[
                Segment::load(0x1000, KERNEL, &pattern(100, 0), 100),
                Segment::load(0x1000, DATA, &[], 8192),
            ],
        );
        image[64 + 56 + 8..64 + 56 + 16].copy_from_slice(&u64::to_le_bytes(offset));
        for image in [image.clone(), super::images::bzimage(&super::images::gzip(&image))] {
            let guest = Guest::new(64);
            guest.memory().write_obj(0xaa_u8, GuestAddress(DATA + 5000)).unwrap();
            guest.load(&image).unwrap();
            assert_eq!(guest.bytes(KERNEL, 100), pattern(100, 0));
            assert!(guest.bytes(DATA, 8192).iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn zeroed_memory_is_zero_after_use_and_untouched_before() {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let stored = |guest: &Guest| {
        let region = guest.memory().find_region(GuestAddress(0)).unwrap();
        rustix::fs::fstat(region.file_offset().unwrap().file())
            .unwrap()
            .st_blocks
            * 512
    };
    let image = elf(KERNEL, &[Segment::load(0x1000, KERNEL, &pattern(5000, 0), 16 << 20)]);
    let guest = Guest::new(64);
    guest.load(&image).unwrap();
    assert!(stored(&guest) < 1 << 20, "{} bytes are stored", stored(&guest));

    for at in [
        KERNEL + 5000,
        KERNEL + 8192,
        KERNEL + 0x12_3456,
        KERNEL + (16 << 20) - 1,
        KERNEL + (16 << 20),
    ] {
        guest.memory().write_obj(0xaa_u8, GuestAddress(at)).unwrap();
    }
    guest.load(&image).unwrap();
    assert!(
        guest
            .bytes(KERNEL + 5000, (16 << 20) - 5000)
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(guest.bytes(KERNEL + (16 << 20), 1), [0xaa], "what is beyond stays");
}

#[test]
fn headers_that_no_kernel_for_this_machine_has() {
    let cases: [(usize, &[u8], &str); 6] = [
        (4, &[1], "EI_CLASS is 0x1, only 2 (64-bit) can be loaded"),
        (5, &[2], "EI_DATA is 0x2, only 1 (little-endian) can be loaded"),
        (16, &[1], "e_type is 0x1"),
        (18, &[183], "e_machine is 0xb7, only 62 (x86-64) can run"),
        (54, &[32], "e_phentsize is 0x20"),
        (
            34,
            &[1],
            "e_phoff is 0x10040, the program headers should end within the first 64 KiB",
        ),
    ];
    for (offset, bytes, reason) in cases {
        let mut image = kernel();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        let message = refused(&image);
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn segments_that_do_not_fit() {
    let end = 64 << 20;
    let text = |offset, address, memory| Segment::load(offset, address, &pattern(100, 0), memory);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (elf(0, &[]), "no loadable segment"),
        (
            single(0x7000, 100),
            "segment 0: 0x7000..0x7064 is not free guest memory",
        ),
        (single(0x9_fc00 - 50, 100), "is not free guest memory"),
        (single(layout::ACPI, 100), "is not free guest memory"),
        (
            single(end - 100, 101),
            "is not free guest memory, which is from 0x21000 to 0x4000000",
        ),
        (single(layout::HOLE_START, 4096), "is not free guest memory"),
        (single(u64::MAX - 50, 100), "segment 0: its end in memory overflows"),
        (
            single(KERNEL, 99),
            "segment 0: larger in the file than in memory (offset 0x1000, 100 bytes in the file, 99",
        ),
        (
            elf(KERNEL, &[text(0x1000, KERNEL, 200), text(0x2000, KERNEL + 199, 200)]),
            "segments 0 and 1 overlap in memory",
        ),
        (
            elf(KERNEL, &[text(0x1010, KERNEL + 0x1000, 200), text(0x1000, KERNEL, 200)]),
            "segments 1 and 0 overlap in the file",
        ),
        (
            elf(KERNEL + 100, &[text(0x1000, KERNEL, 100)]),
            "entry point 0x1000064 is in no loaded segment",
        ),
        (
            elf(
                KERNEL,
                &[
                    text(0x1000, KERNEL, 100),
                    Segment::note(0x2000, &pvh_note(KERNEL + 100)),
                ],
            ),
            "PVH entry point 0x1000064 is in no loaded segment",
        ),
    ];
    for (image, reason) in cases {
        let message = refused(&image);
        assert!(message.contains(reason), "{message} should say: {reason}");
    }
}

#[test]
fn a_file_that_ends_too_early() {
    let image = kernel();
    let message = refused(&image[..DATA_OFFSET + 1000]);
    assert_eq!(message, "kernel: ends at offset 0x203e8, 29000 bytes too early");
    assert_eq!(refused(&image[..40]), "kernel: ends at offset 0x28, 24 bytes too early");
    assert_eq!(
        refused(&image[..100]),
        "kernel: ends at offset 0x64, 132 bytes too early"
    );
}

#[test]
fn what_is_no_kernel_is_named() {
    let guest = Guest::new(64);
    let mut sector = vec![0; 4096];
    sector[510..512].copy_from_slice(b"\x55\xaa");
    let cases: [(&[u8], &str); 9] = [
        (b"", "but an empty file"),
        (
            b"vmlinux, to be built\n",
            "but text that starts with \"vmlinux, to be built\"",
        ),
        (b"\x1f\x8b\x08\0", "but gzip-compressed data"),
        (b"\xfd7zXZ\0\0", "but xz-compressed data"),
        (b"MZ\x90\0", "but a PE/EFI program"),
        (b"070701000", "but a cpio archive (an initramfs?)"),
        (b"#!/bin/sh\n", "but a script"),
        (&sector, "but a boot sector without Linux's setup header"),
        (
            b"\xeb\xfe\x90\x90",
            "but a flat image or unknown format that starts with eb fe 90 90",
        ),
    ];
    for (bytes, reason) in cases {
        let message = guest.load(bytes).unwrap_err().to_string();
        assert!(
            message.contains("neither an x86-64 ELF file nor a bzImage") && message.contains(reason),
            "{message}"
        );
    }
}

#[test]
fn files_without_a_size() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    let (guest, kernel) = (Guest::new(64), file(&kernel()));
    let cancel = AtomicBool::new(false);
    let request = BootRequest {
        kernel: &pipe,
        initrd: None,
        cmdline: "",
        rsdp: layout::ACPI,
        protocol: None,
        cancel: &cancel,
    };
    let error = load(guest.memory(), &guest.map, &request).unwrap_err();
    assert_eq!(error.to_string(), "kernel: not a regular file");
    let error = load(
        guest.memory(),
        &guest.map,
        &BootRequest {
            kernel: &kernel,
            initrd: Some(&pipe),
            ..request
        },
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "initramfs: not a regular file");
}

#[test]
fn cancelled() {
    let (guest, kernel, cancel) = (Guest::new(64), file(&kernel()), AtomicBool::new(true));
    let request = BootRequest {
        kernel: &kernel,
        initrd: None,
        cmdline: "",
        rsdp: layout::ACPI,
        protocol: None,
        cancel: &cancel,
    };
    assert!(matches!(
        load(guest.memory(), &guest.map, &request),
        Err(BootError::Cancelled)
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn cut_off_anywhere(keep in 0_usize..0x2_8000) {
        let (guest, image) = (Guest::new(32), kernel());
        if let Ok(entry) = guest.load(&image[..keep.min(image.len())]) {
            guest.check_loaded(&entry);
            prop_assert!(keep >= DATA_OFFSET + DATA_SIZE);
        }
    }

    #[test]
    fn with_changed_headers(
        changes in prop::collection::vec((0_usize..240, prop_oneof![any::<u8>(), Just(0), Just(0xff)]), 1..6),
    ) {
        let (guest, mut image) = (Guest::new(32), kernel());
        for (at, byte) in changes {
            image[at] = byte;
        }
        if let Ok(entry) = guest.load(&image) {
            guest.check_loaded(&entry);
        }
    }

    #[test]
    fn with_any_segments(
        entry in any_address(),
        parts in prop::collection::vec((0_u64..0x1_0000, any_address(), 0_usize..0x4000, any_address()), 0..6),
    ) {
        let guest = Guest::new(32);
        let segments: Vec<Segment> = parts
            .into_iter()
            .map(|(offset, address, len, memory)| Segment::load(offset + 0x200, address, &pattern(len, 0), memory))
            .collect();
        if let Ok(entry) = guest.load(&elf(entry, &segments)) {
            guest.check_loaded(&entry);
        }
    }

    #[test]
    fn with_any_notes(
        mut note in prop::collection::vec(any::<u8>(), 0..64),
        at in 0_usize..64,
        address in any_address(),
    ) {
        note.splice(at.min(note.len())..at.min(note.len()), pvh_note(address));
        let segments = [Segment::load(0x1000, KERNEL, &pattern(100, 0), 4096), Segment::note(0x2000, &note)];
        if let Ok(entry) = Guest::new(32).load(&elf(KERNEL, &segments)) {
            prop_assert!((KERNEL..KERNEL + 4096).contains(&entry.rip));
        }
    }
}

/// Addresses and sizes, mostly at the borders of something.
fn any_address() -> impl Strategy<Value = u64> {
    let borders = prop::sample::select(vec![
        0,
        layout::BOOT_AREA_END,
        layout::LOW_MEMORY_END,
        layout::HIGH_MEMORY,
        KERNEL,
        32 << 20,
        layout::HOLE_START,
        layout::HOLE_END,
        1 << 63,
    ]);
    prop_oneof![
        (borders, -0x2000_i64..0x2000).prop_map(|(border, offset): (u64, i64)| border.wrapping_add_signed(offset)),
        0x10_0000_u64..0x200_0000,
        any::<u64>(),
    ]
}
