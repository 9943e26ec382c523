//! Disks whose writes are gone with the device.

use std::os::unix::fs::MetadataExt;

use super::*;

fn volatile(file: &NamedTempFile) -> BlockConfig {
    BlockConfig {
        mode: DiskMode::Volatile,
        ..BlockConfig::new("volatile", File::open(file.path()).unwrap().into())
    }
}

fn filled() -> (NamedTempFile, Vec<u8>) {
    let bytes = pattern(256 << 10, 4);
    let mut file = image(0);
    file.write_all(&bytes).unwrap();
    (file, bytes)
}

#[test]
fn the_guest_sees_its_writes_and_the_image_does_not() {
    let (file, mut bytes) = filled();
    let before = bytes.clone();
    let mut rig = rig_of(volatile(&file));
    for (sector, len) in [(0, 512), (7, 1024), (15, 8192), (100, 4096), (511, 512)] {
        let data = pattern(len, sector as u8 ^ 0xa5);
        assert_eq!(write(&mut rig, sector, &data), OK);
        bytes[sector as usize * 512..][..len].copy_from_slice(&data);
    }
    assert_eq!(flush(&mut rig), OK);
    assert!(read(&mut rig, 0, 256 << 10) == (OK, bytes.clone()));
    // Another driver, as after a reboot, still sees them.
    rig.reset();
    rig.activate(u64::MAX).unwrap();
    assert!(read(&mut rig, 0, 256 << 10) == (OK, bytes));
    rig.device
        .stop(std::time::Instant::now() + std::time::Duration::from_secs(10));
    drop(rig);
    assert!(contents(&file) == before);
    let mut again = rig_of(volatile(&file));
    assert!(read(&mut again, 0, 256 << 10) == (OK, before));
}

#[test]
fn zeroed_and_discarded_ranges_are_the_overlays_own() {
    let (file, mut bytes) = filled();
    let before = bytes.clone();
    let mut rig = rig_of(volatile(&file));
    assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 3, 20, 0), OK);
    assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 40, 8, 1), OK);
    bytes[3 * 512..23 * 512].fill(0);
    bytes[40 * 512..48 * 512].fill(0);
    assert!(read(&mut rig, 0, 64 * 512) == (OK, bytes[..64 * 512].to_vec()));
    assert_eq!(ranged(&mut rig, T_DISCARD, 64, 64, 0), OK);
    assert!(contents(&file) == before);
}

#[test]
fn a_discard_gives_the_scratch_files_room_back() {
    let (file, _) = filled();
    let scratch = tempfile::tempfile().unwrap();
    let mut rig = rig_of(BlockConfig {
        scratch: Some(scratch.try_clone().unwrap().into()),
        ..volatile(&file)
    });
    assert_eq!(write(&mut rig, 0, &pattern(128 << 10, 1)), OK);
    scratch.sync_all().unwrap();
    assert!(scratch.metadata().unwrap().blocks() >= 256);
    assert_eq!(ranged(&mut rig, T_DISCARD, 0, 256, 0), OK);
    scratch.sync_all().unwrap();
    assert!(scratch.metadata().unwrap().blocks() <= 16);
}

#[test]
fn a_scratch_file_that_is_full_is_an_io_error() {
    let (file, before) = filled();
    let scratch: File = rustix::fs::memfd_create(c"full", rustix::fs::MemfdFlags::ALLOW_SEALING)
        .unwrap()
        .into();
    rustix::fs::fcntl_add_seals(&scratch, rustix::fs::SealFlags::GROW).unwrap();
    let mut rig = rig_of(BlockConfig {
        scratch: Some(scratch.into()),
        ..volatile(&file)
    });
    assert_eq!(write(&mut rig, 0, &[1; 4096]), IOERR);
    assert!(matches!(
        &rig.reports()[..],
        [DeviceEvent::IoError { operation: "write", .. }]
    ));
    assert!(read(&mut rig, 0, 4096) == (OK, before[..4096].to_vec()));
}

#[test]
fn it_takes_over_a_size_and_changes_none() {
    let (file, _) = filled();
    let (block, handle) = Block::new(volatile(&file)).unwrap();
    let mut rig = Rig::active(block);
    assert!(matches!(
        resized(&mut rig, &handle, 1 << 20),
        Err(ResizeError::NotSupported { .. })
    ));
    file.as_file().set_len(512 << 10).unwrap();
    assert_eq!(resized(&mut rig, &handle, 0).unwrap(), 512 << 10);
    assert_eq!(write(&mut rig, 1023, &pattern(512, 8)), OK);
    assert_eq!(
        read(&mut rig, 1022, 1024),
        (OK, [vec![0; 512], pattern(512, 8)].concat())
    );
    assert_eq!(file.as_file().metadata().unwrap().len(), 512 << 10);
}
