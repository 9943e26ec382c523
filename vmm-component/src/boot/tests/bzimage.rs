//! bzImages: every compression, what is refused and why, and that nothing breaks the loader.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::images::{
    BEHIND_PAYLOAD, DATA, DATA_OFFSET, DATA_SIZE, KERNEL, TEXT_SIZE, bzimage, gzip, kernel, lz4, pattern, with_size,
    xz, zstd,
};
use super::*;

/// Payloads with the names of their formats.
static PAYLOADS: LazyLock<[(&str, Vec<u8>); 5]> = LazyLock::new(|| {
    let kernel = kernel();
    [
        ("uncompressed", kernel.clone()),
        ("gzip", gzip(&kernel)),
        ("xz", xz(&kernel)),
        ("zstd", zstd(&kernel)),
        ("lz4", lz4(&kernel)),
    ]
});

fn check_kernel(guest: &Guest, entry: &BootEntry) {
    assert_eq!((entry.protocol, entry.rip), (Protocol::Linux64, KERNEL));
    guest.check_loaded(entry);
    assert!(
        guest.bytes(KERNEL, 0x2000) == pattern(TEXT_SIZE, 1)[..0x2000],
        "text differs"
    );
    assert!(guest.bytes(DATA, DATA_SIZE) == pattern(DATA_SIZE, 2), "data differs");
}

#[test]
fn every_compression_gives_the_same_kernel() {
    for (name, payload) in &*PAYLOADS {
        let guest = Guest::new(64);
        let entry = guest
            .load(&bzimage(payload))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        check_kernel(&guest, &entry);
    }
}

/// What the kernel's own build runs (scripts/Makefile.lib, scripts/xz_wrap.sh), where the tools are installed.
#[test]
fn compressed_as_the_kernels_build_does() {
    let commands: [&[&str]; 5] = [
        &["gzip", "-n", "-f", "-9"],
        &["xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"],
        &["xz", "--check=crc32", "--x86", "--lzma2=dict=128MiB"],
        &["zstd", "-22", "--ultra"],
        &["lz4", "-l", "-9", "-", "-"],
    ];
    let kernel = kernel();
    for command in commands {
        let child = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            println!("skipped: {} is not installed", command[0]);
            continue;
        };
        let mut input = child.stdin.take().unwrap();
        let output = std::thread::scope(|scope| {
            scope.spawn(|| {
                input.write_all(&kernel).unwrap();
                drop(input);
            });
            child.wait_with_output().unwrap()
        });
        assert!(output.status.success(), "{command:?}");
        let payload = if command[0] == "gzip" {
            output.stdout
        } else {
            with_size(output.stdout, kernel.len())
        };
        let guest = Guest::new(64);
        let entry = guest
            .load(&bzimage(&payload))
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        check_kernel(&guest, &entry);
    }
}

#[test]
fn pvh_on_request() {
    let entry = Guest::new(64)
        .load_with(&bzimage(&gzip(&kernel())), None, "", Some(Protocol::Pvh))
        .unwrap();
    assert_eq!((entry.protocol, entry.rip), (Protocol::Pvh, KERNEL + 0x40));
}

#[test]
fn headers_that_rule_an_image_out() {
    let cases: [(usize, &[u8], &str); 9] = [
        (0x1fe, &[0], "boot_flag is 0xaa00, it should be 0xaa55"),
        (0x206, &[0x0b, 0x02], "boot protocol 2.11 is too old, 2.12 is the least"),
        (0x236, &[0], "xloadflags 0x0 lacks XLF_KERNEL_64"),
        (0x211, &[0], "loadflags 0x0 lacks LOADED_HIGH: it is a zImage"),
        (0x201, &[0x40], "the setup header has 0x51 bytes, 0x73 are needed"),
        (0x24c, &[0, 0, 0, 0], "the payload at 0x700..0x700 is not in the file"),
        (0x24f, &[0xff], "is not in the file, which has"),
        (0x248, &[0xff, 0xff, 0xff, 0xff], "the payload at 0x1000003ff"),
        (0x1f1, &[0xff], "is not in the file"),
    ];
    for (offset, bytes, reason) in cases {
        let mut image = bzimage(&gzip(&kernel()));
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        let error = Guest::new(64).load(&image).unwrap_err();
        assert!(
            error.to_string().starts_with("kernel: bzImage: ") && error.to_string().contains(reason),
            "{error}"
        );
        assert_eq!(error.class(), BootErrorClass::KernelLoad);
    }
    let image = bzimage(&gzip(&kernel()));
    let error = Guest::new(64).load(&image[..0x210]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "kernel: bzImage: the file has 528 bytes and ends within the setup header"
    );
}

#[test]
fn payloads_that_cannot_be_used() {
    let cases: [(&[u8], &str); 7] = [
        (
            b"\x5d\0\0\0\x02\0",
            "compressed with lzma, which is not supported (gzip, xz, zstd, lz4 and none are)",
        ),
        (b"\x89LZO\0\r\n", "compressed with lzo, which"),
        (b"BZh91AY", "compressed with bzip2, which"),
        (
            b"\0\0\0\0\0\0\0",
            "of an unknown format, it starts with [00, 00, 00, 00, 00, 00]",
        ),
        (
            &gzip(b"not a kernel"),
            "the bzImage's payload is no ELF file: it starts with [6e, 6f, 74, 20]",
        ),
        (&gzip(b""), "the bzImage's payload is no ELF file: it starts with []"),
        (
            &gzip(&kernel()[..DATA_OFFSET]),
            "kernel payload: ends at offset 0x20000, 30000 bytes too early",
        ),
    ];
    for (payload, reason) in cases {
        let message = Guest::new(64).load(&bzimage(payload)).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn the_kernels_own_limit_of_the_command_line() {
    let mut image = bzimage(&kernel());
    image[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
    let guest = Guest::new(64);
    guest.load_with(&image, None, &"x".repeat(255), None).unwrap();
    let error = guest.load_with(&image, None, &"x".repeat(256), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "command line: 256 bytes are too long, the limit is 255"
    );
    assert_eq!(error.class(), BootErrorClass::BadConfig);
}

/// A changed byte is found by the checksum if not before, unless it makes no difference to what comes out.
#[test]
fn damage_is_found_by_the_checksum() {
    // lz4's legacy format has none, and neither has no compression at all.
    for (name, payload) in PAYLOADS
        .iter()
        .filter(|(name, _)| matches!(*name, "gzip" | "xz" | "zstd"))
    {
        for part in 0..20 {
            let mut payload = payload.clone();
            let at = payload.len() * part / 20;
            payload[at] ^= 0x10;
            let guest = Guest::new(64);
            match guest.load(&bzimage(&payload)) {
                Ok(entry) => check_kernel(&guest, &entry),
                Err(error) => assert_eq!(error.class(), BootErrorClass::KernelLoad, "{name}: {error}"),
            }
        }
        // The checksum itself: gzip's is followed by a size, zstd's by the one that the kernel's build appends, xz's by
        // the index.
        let mut payload = payload.clone();
        let at = payload.len() - if *name == "xz" { 32 } else { 8 };
        payload[at] ^= 0x10;
        let error = Guest::new(64).load(&bzimage(&payload)).unwrap_err().to_string();
        assert!(error.contains("payload is damaged after"), "{name}: {error}");
    }
}

/// A stream that counts what is read of it, and may raise a flag on its way.
struct Endless<'a> {
    given: &'a AtomicU64,
    raise: Option<(u64, &'a AtomicBool)>,
}

impl std::io::Read for Endless<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        buffer.fill(0);
        let given = self.given.fetch_add(buffer.len() as u64, Ordering::Relaxed) + buffer.len() as u64;
        if let Some((at, flag)) = self.raise
            && given >= at
        {
            flag.store(true, Ordering::Relaxed);
        }
        Ok(buffer.len())
    }
}

#[test]
fn a_payload_that_does_not_end_is_given_up() {
    let (given, cancel) = (AtomicU64::new(0), AtomicBool::new(false));
    let stream = Endless {
        given: &given,
        raise: None,
    };
    let mut image = Image::from_decompressor(Box::new(stream), Compression::Gzip, &cancel);
    let error = image.finish().unwrap_err().to_string();
    assert_eq!(
        error,
        "kernel: the gzip payload is damaged after 1073741824 decompressed bytes: it is larger than any kernel"
    );
    assert!(given.load(Ordering::Relaxed) < (1 << 30) + MIB);
}

#[test]
fn cancelling_takes_effect_within_a_mib() {
    let guest = Guest::new(64);
    type Step<'a> = &'a dyn Fn(&mut Image<'_>, &Guest) -> Result<(), BootError>;
    let steps: [Step<'_>; 3] = [
        &|image, guest| image.load(guest.memory(), KERNEL, 32 * MIB),
        &|image, _| image.skip_to(32 * MIB),
        &|image, _| image.finish(),
    ];
    for step in steps {
        let (given, cancel) = (AtomicU64::new(0), AtomicBool::new(false));
        let stream = Endless {
            given: &given,
            raise: Some((5 * MIB, &cancel)),
        };
        let mut image = Image::from_decompressor(Box::new(stream), Compression::Xz, &cancel);
        assert!(matches!(step(&mut image, &guest), Err(BootError::Cancelled)));
        assert!(given.load(Ordering::Relaxed) <= 6 * MIB);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn cut_off_anywhere(format in 0_usize..5, part in 0_usize..1000) {
        let (name, payload) = &PAYLOADS[format];
        let image = bzimage(payload);
        let guest = Guest::new(32);
        let keep = image.len() * part / 1000;
        if let Ok(entry) = guest.load(&image[..keep]) {
            guest.check_loaded(&entry);
            prop_assert!(keep >= image.len() - BEHIND_PAYLOAD, "{}", name);
        }
    }

    #[test]
    fn changed_anywhere(
        format in 0_usize..5,
        changes in prop::collection::vec((0_usize..1000, 0_usize..1000, any::<u8>()), 1..4),
    ) {
        let mut image = bzimage(&PAYLOADS[format].1);
        for (part, offset, byte) in changes {
            let at = (0x1f0 + image.len() * part / 1000 + offset).min(image.len() - 1);
            image[at] = byte;
        }
        let guest = Guest::new(32);
        if let Ok(entry) = guest.load(&image) {
            guest.check_loaded(&entry);
        }
    }

    #[test]
    fn with_any_payload(magic in 0_usize..6, payload in prop::collection::vec(any::<u8>(), 0..2000)) {
        const MAGICS: [&[u8]; 6] =
            [b"", b"\x7fELF\x02\x01", b"\x1f\x8b\x08\0\0\0\0\0\0\0", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"];
        let payload = [MAGICS[magic], &payload].concat();
        prop_assert!(Guest::new(32).load(&bzimage(&payload)).is_err());
    }

    #[test]
    fn with_a_changed_setup_header(changes in prop::collection::vec((0x1f1_usize..0x290, any::<u8>()), 1..8)) {
        let mut image = bzimage(&kernel());
        for (at, byte) in changes {
            image[at] = byte;
        }
        let guest = Guest::new(32);
        if let Ok(entry) = guest.load_with(&image, Some(b"initramfs"), "console=ttyS0", None) {
            guest.check_loaded(&entry);
            let address = guest.word32(layout::ZERO_PAGE + 0x218);
            prop_assert_eq!(guest.bytes(address.into(), 9), b"initramfs");
        }
    }
}
