//! qcow2 images, made and checked by QEMU's own tools where the host has them.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 4 << 20;

/// Runs `qemu-img`; false, said out loud, where there is none.
fn qemu_img(arguments: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: no qemu-img");
            false
        }
        Err(error) => panic!("qemu-img: {error}"),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
            true
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn open(path: &Path, write: bool) -> OwnedFd {
    File::options().read(true).write(write).open(path).unwrap().into()
}

fn config(path: &Path, mode: DiskMode) -> BlockConfig {
    BlockConfig {
        format: DiskFormat::Qcow2,
        mode,
        ..BlockConfig::new("qcow2", open(path, mode == DiskMode::ReadWrite))
    }
}

fn stop(mut rig: Rig<Block>) {
    rig.device.stop(Instant::now() + Duration::from_secs(60));
}

/// Writes here and there to a disk of [`SIZE`] bytes of which `bytes` is a copy.
fn scribble(rig: &mut Rig<Block>, bytes: &mut [u8]) {
    for (sector, len) in [
        (0, 512),
        (127, 1024),
        (1000, 200 << 10),
        (5000, 65536),
        (8191, 512),
        (1001, 512),
    ] {
        let data = pattern(len, sector as u8 | 1);
        assert_eq!(write(rig, sector, &data), OK);
        bytes[sector as usize * 512..][..len].copy_from_slice(&data);
    }
    assert_eq!(ranged(rig, T_WRITE_ZEROES, 1100, 100, 1), OK);
    bytes[1100 * 512..1200 * 512].fill(0);
    assert_eq!(ranged(rig, T_WRITE_ZEROES, 5008, 16, 0), OK);
    bytes[5008 * 512..5024 * 512].fill(0);
    assert_eq!(flush(rig), OK);
    for at in (0..SIZE as usize).step_by(1 << 20) {
        assert!(read(rig, at as u64 / 512, 1 << 20) == (OK, bytes[at..at + (1 << 20)].to_vec()));
    }
}

#[test]
fn qemu_finds_what_the_guest_wrote() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "lazy_refcounts=on",
        "refcount_bits=1",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (image, raw) = (folder.path().join("disk.qcow2"), folder.path().join("disk.raw"));
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&image), "4M"]) {
            return;
        }
        let mut bytes = vec![0; SIZE as usize];
        let mut rig = rig_of(config(&image, DiskMode::ReadWrite));
        scribble(&mut rig, &mut bytes);
        stop(rig);
        std::fs::write(&raw, &bytes).unwrap();
        qemu_img(&["check", "-q", "-f", "qcow2", text(&image)]);
        qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&image), text(&raw)]);
        // And once more, from the start.
        let mut rig = rig_of(config(&image, DiskMode::ReadOnly));
        assert!(read(&mut rig, 0, 1 << 20) == (OK, bytes[..1 << 20].to_vec()));
        assert_eq!(write(&mut rig, 0, &[0; 512]), IOERR);
    }
}

#[test]
fn compressed_images_are_read_and_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, image) = (folder.path().join("disk.raw"), folder.path().join("disk.qcow2"));
    let mut bytes: Vec<u8> = (0..SIZE).map(|n| (n >> 9) as u8).collect();
    std::fs::write(&raw, &bytes).unwrap();
    if !qemu_img(&[
        "convert",
        "-q",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&image),
    ]) {
        return;
    }
    let mut rig = rig_of(config(&image, DiskMode::ReadWrite));
    assert!(read(&mut rig, 4096, 1 << 20) == (OK, bytes[2 << 20..3 << 20].to_vec()));
    scribble(&mut rig, &mut bytes);
    stop(rig);
    std::fs::write(&raw, &bytes).unwrap();
    qemu_img(&["check", "-q", "-f", "qcow2", text(&image)]);
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&image), text(&raw)]);
}

#[test]
fn a_chain_of_images_is_made_of_the_files_that_were_given() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (base, middle, top) = (path("base.raw"), path("middle.qcow2"), path("top.qcow2"));
    let mut bytes = pattern(SIZE as usize, 0x33);
    std::fs::write(&base, &bytes).unwrap();
    if !qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(&base),
        "-F",
        "raw",
        text(&middle),
    ]) {
        return;
    }
    let mut rig = rig_of(BlockConfig {
        backing: vec![open(&base, false)],
        ..config(&middle, DiskMode::ReadWrite)
    });
    assert_eq!(write(&mut rig, 64, &pattern(4096, 0x77)), OK);
    bytes[64 * 512..72 * 512].copy_from_slice(&pattern(4096, 0x77));
    stop(rig);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(&middle),
        "-F",
        "qcow2",
        text(&top),
    ]);
    let below = [std::fs::read(&middle).unwrap(), std::fs::read(&base).unwrap()];
    let given = || vec![open(&middle, false), open(&base, false)];
    let mut rig = rig_of(BlockConfig {
        backing: given(),
        ..config(&top, DiskMode::ReadWrite)
    });
    scribble(&mut rig, &mut bytes);
    stop(rig);
    qemu_img(&["check", "-q", "-f", "qcow2", text(&top)]);
    let raw = path("expected.raw");
    std::fs::write(&raw, &bytes).unwrap();
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&top), text(&raw)]);
    assert!(below == [std::fs::read(&middle).unwrap(), std::fs::read(&base).unwrap()]);

    let refused = |backing| {
        let config = BlockConfig {
            backing,
            ..config(&top, DiskMode::ReadWrite)
        };
        Block::new(config).unwrap_err().to_string()
    };
    let error = refused(vec![]);
    assert!(
        error.contains("the image needs the backing file") && error.contains("middle.qcow2"),
        "{error}"
    );
    let error = refused(vec![open(&middle, false)]);
    assert!(
        error.contains("backing file 0 needs the backing file") && error.contains("base.raw"),
        "{error}"
    );
    let mut many = given();
    many.push(open(&base, false));
    assert_eq!(refused(many), "3 backing files were given, 2 are needed");
    let error = refused(vec![open(&base, false), open(&base, false)]);
    assert!(error.contains("backing file 0: not a usable qcow2 image"), "{error}");
}

#[test]
fn a_volatile_disk_leaves_image_and_backing_file_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let (base, image) = (folder.path().join("base.raw"), folder.path().join("disk.qcow2"));
    let mut bytes = pattern(SIZE as usize, 0x44);
    std::fs::write(&base, &bytes).unwrap();
    if !qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(&base),
        "-F",
        "raw",
        text(&image),
    ]) {
        return;
    }
    let before = [std::fs::read(&base).unwrap(), std::fs::read(&image).unwrap()];
    let mut rig = rig_of(BlockConfig {
        backing: vec![open(&base, false)],
        ..config(&image, DiskMode::Volatile)
    });
    scribble(&mut rig, &mut bytes);
    stop(rig);
    assert!(before == [std::fs::read(&base).unwrap(), std::fs::read(&image).unwrap()]);
}

#[test]
fn it_cannot_be_resized() {
    let (file, _) = super::model::new_qcow2();
    let (block, handle) = Block::new(config(file.path(), DiskMode::ReadWrite)).unwrap();
    let mut rig = Rig::active(block);
    assert!(matches!(
        resized(&mut rig, &handle, 1 << 20),
        Err(ResizeError::NotSupported { .. })
    ));
    assert!(matches!(
        resized(&mut rig, &handle, 0),
        Err(ResizeError::NotSupported { .. })
    ));
}

/// What is said of an image whose header has these bytes at that place.
fn refused(at: usize, bytes: &[u8]) -> String {
    let (file, _) = super::model::new_qcow2();
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), bytes, at as u64).unwrap();
    Block::new(config(file.path(), DiskMode::ReadWrite))
        .unwrap_err()
        .to_string()
}

#[test]
fn images_that_are_not_served_are_refused_with_the_reason() {
    assert!(refused(0, b"QFJ").contains("does not begin as one"));
    assert!(refused(4, &[0, 0, 0, 9]).contains("version 9 is not known"));
    assert_eq!(refused(32, &[0, 0, 0, 2]), "the image is encrypted");
    assert_eq!(refused(79, &[4]), "the image keeps its data in a file of their own");
    assert!(refused(24, &[0xff; 8]).contains("beyond all limits"));
    assert!(refused(24, &[0; 8]).contains("size of 0"));
    // Corrupt, dirty, an unknown feature; clusters of 2^99 bytes; a table of 32 GiB, and one that is nowhere.
    assert!(refused(79, &[2]).contains("feature"));
    assert!(refused(72, &[0x80]).contains("feature"));
    assert!(refused(20, &[0, 0, 0, 99]).contains("clusters of 2^99 bytes"));
    assert!(refused(36, &[0xff; 4]).contains("not a usable qcow2 image"));
    assert!(refused(40, &[0xff; 8]).contains("not a usable qcow2 image"));
    // The refcount table.
    assert!(refused(56, &[0xff; 4]).contains("refcount table is too large"));
    assert!(refused(48, &[0, 0, 0, 0, 0, 0, 0, 1]).contains("refcount table is too large, or out of place"));
    assert!(refused(4096, &[1]).contains("refcount table leads out of the file"));
    assert!(refused(4096 + 14, &[0x20, 0]).contains("refcount table names a block twice"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever an image holds, it is refused, or its requests are answered.
    #[test]
    fn hostile_images_break_nothing(
        changes in prop::collection::vec((0usize..5 * 4096, any::<u8>()), 1..30),
        headers in prop::collection::vec((0usize..112, any::<u8>()), 0..3),
        length in prop_oneof![3 => Just(None), 1 => (0u64..5 * 4096).prop_map(Some)],
        volatile: bool,
    ) {
        let (file, _) = super::model::new_qcow2();
        let mut rig = rig_of(config(file.path(), DiskMode::ReadWrite));
        prop_assert_eq!(write(&mut rig, 3, &pattern(9000 / 512 * 512, 1)), OK);
        stop(rig);
        for (at, byte) in changes.into_iter().chain(headers) {
            std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[byte], at as u64).unwrap();
        }
        if let Some(length) = length {
            file.as_file().set_len(length).unwrap();
        }
        let mode = if volatile { DiskMode::Volatile } else { DiskMode::ReadWrite };
        if let Ok((block, _)) = Block::new(config(file.path(), mode)) {
            let mut rig = Rig::active(block);
            for sector in [0, 3, 8, 1000] {
                read(&mut rig, sector, 8192);
                write(&mut rig, sector, &[5; 4096]);
                ranged(&mut rig, T_WRITE_ZEROES, sector, 9, 1);
                ranged(&mut rig, T_DISCARD, sector, 16, 0);
                flush(&mut rig);
            }
            stop(rig);
        }
    }
}
