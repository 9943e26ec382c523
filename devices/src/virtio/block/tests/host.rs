//! The host's side: files that cannot be used, that fail, or change behind the device's back.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::*;

#[test]
fn what_cannot_be_a_disk_is_refused_with_the_reason() {
    let file = image(64 << 10);
    let refused = |change: &dyn Fn(&mut BlockConfig)| {
        let mut config = BlockConfig::new("disk", fd(&file));
        change(&mut config);
        Block::new(config).unwrap_err().to_string()
    };
    let read_only = || -> OwnedFd { File::open(file.path()).unwrap().into() };
    let long = "one-more-than-20-long";
    assert!(refused(&|c| c.id = long.into()).contains("longer than 20 bytes"));
    assert!(refused(&|c| c.block_size = 1024).contains("1024"));
    assert!(refused(&|c| c.queues = 0).contains("0 queues"));
    assert!(refused(&|c| c.queues = 17).contains("17 queues"));
    assert!(refused(&|c| c.image = read_only()).contains("the image is not open for writing"));
    assert!(refused(&|c| c.direct = true).contains("O_DIRECT"));
    assert!(refused(&|c| c.backing = vec![read_only()]).contains("1 backing files were given, 0 are needed"));
    assert!(refused(&|c| c.format = DiskFormat::Qcow2).contains("does not begin as one"));
    let write_only = || File::options().write(true).open(file.path()).unwrap();
    assert!(refused(&|c| c.image = write_only().into()).contains("not open for reading"));
    for path in ["/", "/dev/null"] {
        let text = refused(&|c| {
            c.image = File::open(path).unwrap().into();
            c.mode = DiskMode::ReadOnly;
        });
        assert!(text.contains("neither a regular file nor a block device"), "{text}");
    }
    let odd = image(64 * 1024 + 512);
    assert!(refused(&|c| c.image = fd(&image(0))).contains("size of 0"));
    assert!(refused(&|c| c.image = fd(&image(1000))).contains("1000 bytes"));
    let text = refused(&|c| {
        c.image = fd(&odd);
        c.block_size = 4096;
    });
    assert!(
        text.contains("66048 bytes, which is not a multiple of the block size 4096"),
        "{text}"
    );
    let text = refused(&|c| {
        c.mode = DiskMode::Volatile;
        c.scratch = Some(read_only());
    });
    assert!(text.contains("the scratch file is not open for writing"), "{text}");
}

#[test]
fn a_file_that_shrinks_behind_our_back_gives_io_errors() {
    for engine in ENGINES {
        let file = image(2 << 20);
        let mut rig = rig(&file, |config| config.io_uring = engine);
        file.as_file().set_len(4096).unwrap();
        assert_eq!(read(&mut rig, 0, 4096).0, OK);
        // Half of it is there; none of it is there; too much for the loop's thread.
        assert_eq!(read(&mut rig, 4, 4096).0, IOERR);
        assert_eq!(read(&mut rig, 100, 512).0, IOERR);
        assert_eq!(read(&mut rig, 0, 1 << 20).0, IOERR);
        let reports = rig.reports();
        assert_eq!(reports.len(), 3);
        assert!(reports.iter().all(|report| matches!(
            report,
            DeviceEvent::IoError { operation: "read", reason, .. } if reason.contains("ends before the disk does")
        )));
        // It grows again by writing.
        assert_eq!(write(&mut rig, 100, &pattern(512, 1)), OK);
        assert_eq!(read(&mut rig, 100, 512), (OK, pattern(512, 1)));
    }
}

/// A file in memory that can be read and not written, though it is open for that: as a full or failing device would be.
fn failing(bytes: u64) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file: File = rustix::fs::memfd_create(c"failing", flags).unwrap().into();
    file.set_len(bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).unwrap();
    file.into()
}

#[test]
fn what_the_host_refuses_the_guest_and_the_owner_are_told() {
    for io_uring in ENGINES {
        let (block, handle) = Block::new(BlockConfig {
            io_uring,
            ..BlockConfig::new("failing", failing(2 << 20))
        })
        .unwrap();
        let mut rig = Rig::active(block);
        assert_eq!(write(&mut rig, 0, &[1; 4096]), IOERR);
        assert_eq!(write(&mut rig, 0, &vec![1; 1 << 20]), IOERR);
        assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 0, 8, 0), IOERR);
        assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 0, 8, 1), IOERR);
        assert_eq!(ranged(&mut rig, T_DISCARD, 0, 8, 0), IOERR);
        let operations: Vec<_> = rig
            .reports()
            .into_iter()
            .map(|report| match report {
                DeviceEvent::IoError { operation, .. } => operation,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            operations,
            ["write", "write", "write zeroes", "write zeroes", "discard"]
        );
        assert_eq!(handle.stats().errors, 5);
        assert_eq!(read(&mut rig, 0, 4096), (OK, vec![0; 4096]));
        assert_eq!(flush(&mut rig), OK);
    }
}

#[test]
fn a_guest_cannot_flood_its_owner_with_reports() {
    let mut rig = rig_of(BlockConfig::new("", failing(4096)));
    for _ in 0..1000 {
        assert_eq!(write(&mut rig, 0, &[1; 512]), IOERR);
    }
    let reports = rig.reports().len();
    assert!((16..100).contains(&reports), "{reports}");
}

#[test]
fn discards_punch_holes_and_zeroes_are_zeroes() {
    for engine in ENGINES {
        let mut file = image(0);
        file.write_all(&pattern(1 << 20, 3)).unwrap();
        file.as_file().sync_all().unwrap();
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let mut rig = rig(&file, |config| config.io_uring = engine);
        let before = blocks();
        assert!(before >= 2048);
        assert_eq!(ranged(&mut rig, T_DISCARD, 0, 1024, 0), OK);
        assert!(blocks() <= before - 1000, "{} of {before} blocks are left", blocks());
        assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 1024, 512, 1), OK);
        assert!(blocks() <= before - 1500, "{} of {before} blocks are left", blocks());
        assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 1537, 3, 0), OK);
        assert!(read(&mut rig, 1024, 256 << 10) == (OK, vec![0; 256 << 10]));
        let mut expected = pattern(1 << 20, 3)[1536 * 512..1544 * 512].to_vec();
        expected[512..2048].fill(0);
        assert_eq!(read(&mut rig, 1536, 4096), (OK, expected));
        assert_eq!(contents(&file).len(), 1 << 20);
    }
}

#[test]
fn a_file_that_cannot_zero_gets_zeroes_written() {
    for io_uring in ENGINES {
        let bytes = pattern(1 << 20, 6);
        // Files in memory can punch holes, and cannot zero.
        let mut file: File = rustix::fs::memfd_create(c"zero", rustix::fs::MemfdFlags::empty())
            .unwrap()
            .into();
        file.write_all(&bytes).unwrap();
        let mut rig = rig_of(BlockConfig {
            io_uring,
            ..BlockConfig::new("", file.into())
        });
        assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 1, 2046, 0), OK);
        let mut expected = bytes;
        expected[512..2047 * 512].fill(0);
        assert!(read(&mut rig, 0, 1 << 20) == (OK, expected));
    }
}

#[test]
fn a_reset_waits_for_what_the_host_does_in_guest_memory() {
    for engine in ENGINES {
        let mut file = image(0);
        file.write_all(&pattern(8 << 20, 2)).unwrap();
        let (block, handle) = Block::new(BlockConfig {
            io_uring: engine,
            ..BlockConfig::new("", fd(&file))
        })
        .unwrap();
        let mut rig = Rig::active(block);
        for round in 0..20u64 {
            // Too large for the loop's own thread: the engine has them when the reset comes.
            for n in 0..12u64 {
                rig.add(
                    0,
                    &[Buffer::Out(header(T_IN, (n + round) * 64)), Buffer::In((1 << 20) + 1)],
                );
            }
            rig.call(|device, context| device.notify(0, context)).unwrap();
            rig.reset();
            assert_eq!(handle.stats().in_flight, 0);
            let marker = vec![0xee; 15 << 20];
            vm_memory::Bytes::write_slice(&rig.memory, &marker, vm_memory::GuestAddress(1 << 20)).unwrap();
            rig.activate(u64::MAX).unwrap();
            // The engine has done all that it had when it does this.
            assert_eq!(flush(&mut rig), OK);
            let mut found = vec![0; 14 << 20];
            vm_memory::Bytes::read_slice(&rig.memory, &mut found, vm_memory::GuestAddress(2 << 20)).unwrap();
            assert!(found.iter().all(|&byte| byte == 0xee));
        }
    }
}

#[test]
fn the_reset_of_a_queue_leaves_the_others_alone() {
    for engine in ENGINES {
        let mut file = image(0);
        file.write_all(&pattern(4 << 20, 2)).unwrap();
        let mut rig = rig(&file, |config| {
            config.io_uring = engine;
            config.queues = 2;
        });
        for queue in 0..2 {
            rig.add(queue, &[Buffer::Out(header(T_IN, 0)), Buffer::In((1 << 20) + 1)]);
            rig.call(|device, context| device.notify(queue, context)).unwrap();
        }
        rig.reset_queue(0).unwrap();
        while rig.used(1).is_none() {
            rig.wait().unwrap();
        }
        assert!(rig.used(0).is_none());
        assert_eq!(write(&mut rig, 0, &[7; 512]), OK);
    }
}

#[test]
fn a_stop_brings_out_what_was_begun() {
    for engine in ENGINES {
        let file = image(4 << 20);
        let mut rig = rig(&file, |config| config.io_uring = engine);
        for n in 0..3u64 {
            let data = pattern(1 << 20, n as u8);
            rig.add(
                0,
                &[Buffer::Out(header(T_OUT, n * 2048)), Buffer::Out(data), Buffer::In(1)],
            );
        }
        rig.call(|device, context| device.notify(0, context)).unwrap();
        rig.device.stop(Instant::now() + Duration::from_secs(60));
        for n in 0..3usize {
            assert!(contents(&file)[n << 20..][..1 << 20] == pattern(1 << 20, n as u8));
        }
    }
}

#[test]
fn a_disk_gets_another_size_while_it_runs() {
    let file = image(64 << 10);
    let (block, handle) = Block::new(BlockConfig {
        block_size: 4096,
        ..BlockConfig::new("grows", fd(&file))
    })
    .unwrap();
    let mut rig = Rig::active(block);
    assert_eq!(resized(&mut rig, &handle, 128 << 10).unwrap(), 128 << 10);
    assert_eq!(rig.bench.config_changes(), 1);
    assert_eq!(rig.bench.config()[..8], 256u64.to_le_bytes());
    assert_eq!(file.as_file().metadata().unwrap().len(), 128 << 10);
    assert_eq!(write(&mut rig, 248, &pattern(4096, 1)), OK);
    // Somebody else made it longer.
    file.as_file().set_len(1 << 20).unwrap();
    assert_eq!(read(&mut rig, 256, 512).0, IOERR);
    assert_eq!(resized(&mut rig, &handle, 0).unwrap(), 1 << 20);
    assert_eq!(read(&mut rig, 256, 512).0, OK);
    // Cut, but only when that is said.
    assert!(matches!(
        resized_or_cut(&mut rig, &handle, 4096, false),
        Err(ResizeError::Cuts { bytes: 4096, there, .. }) if there == 1 << 20
    ));
    assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
    assert_eq!(resized(&mut rig, &handle, 4096).unwrap(), 4096);
    assert_eq!(read(&mut rig, 8, 512).0, IOERR);
    assert_eq!((handle.info().bytes, contents(&file).len()), (4096, 4096));
    assert_eq!(rig.bench.config_changes(), 2);
    // Nothing is different: nobody is told.
    assert_eq!(resized(&mut rig, &handle, 4096).unwrap(), 4096);
    assert_eq!(rig.bench.config_changes(), 0);
    assert!(matches!(
        resized(&mut rig, &handle, 5000),
        Err(ResizeError::Size { bytes: 5000, .. })
    ));
    file.as_file().set_len(0).unwrap();
    assert!(matches!(
        resized(&mut rig, &handle, 0),
        Err(ResizeError::Size { bytes: 0, .. })
    ));
    // Also while it rests.
    rig.reset();
    assert_eq!(resized(&mut rig, &handle, 8192).unwrap(), 8192);
    drop(rig);
    let (sender, answer) = std::sync::mpsc::channel();
    handle.resize(4096, true, move |result| sender.send(result).unwrap());
    assert!(matches!(answer.recv().unwrap(), Err(ResizeError::Gone)));
}

#[test]
fn only_a_raw_disk_that_can_be_written_is_resized() {
    let file = image(64 << 10);
    let (block, handle) = Block::new(BlockConfig {
        mode: DiskMode::ReadOnly,
        ..BlockConfig::new("ro", File::open(file.path()).unwrap().into())
    })
    .unwrap();
    let mut rig = Rig::active(block);
    let error = resized(&mut rig, &handle, 4096).unwrap_err();
    assert!(
        error.to_string().starts_with("\"ro\": its image cannot be changed"),
        "{error}"
    );
    assert_eq!(resized(&mut rig, &handle, 0).unwrap(), 64 << 10);
}

#[test]
fn where_io_uring_is_forbidden_threads_serve() {
    use seccompiler::{SeccompAction, SeccompFilter, apply_filter};
    for errno in [libc::EPERM, libc::ENOSYS, libc::EINVAL] {
        // A filter stays with its thread.
        std::thread::spawn(move || {
            let rules = [(libc::SYS_io_uring_setup, vec![])].into();
            let refuse = SeccompAction::Errno(errno as u32);
            let arch = std::env::consts::ARCH.try_into().unwrap();
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
            let program: seccompiler::BpfProgram = filter.try_into().unwrap();
            apply_filter(&program).unwrap();
            let file = image(2 << 20);
            let (block, handle) = Block::new(BlockConfig::new("", fd(&file))).unwrap();
            let mut rig = Rig::active(block);
            assert_eq!(handle.info().engine, Some(EngineKind::Threads));
            assert_eq!(write(&mut rig, 0, &pattern(1 << 20, 1)), OK);
            assert_eq!(flush(&mut rig), OK);
            assert!(read(&mut rig, 0, 1 << 20) == (OK, pattern(1 << 20, 1)));
        })
        .join()
        .unwrap();
    }
}

#[test]
fn direct_disks_take_aligned_buffers_as_they_are_and_others_too() {
    for io_uring in ENGINES {
        let file = image(1 << 20);
        let Some(image) = open_direct(&file) else { return };
        let (block, handle) = Block::new(BlockConfig {
            direct: true,
            io_uring,
            ..BlockConfig::new("direct", image)
        })
        .unwrap();
        let mut rig = Rig::active(block);
        assert!(handle.info().direct);
        // The rig's buffers are aligned to 16 bytes only.
        assert_eq!(write(&mut rig, 1, &pattern(5120, 1)), OK);
        assert_eq!(read(&mut rig, 1, 5120), (OK, pattern(5120, 1)));
        assert_eq!(contents(&file)[512..5632], pattern(5120, 1));
        // Aligned to pages.
        let at = rig.allocate(4 << 12).next_multiple_of(4096);
        vm_memory::Bytes::write_slice(&rig.memory, &header(T_IN, 8), vm_memory::GuestAddress(at)).unwrap();
        rig.write_descriptor(0, 200, at, 16, 1, 201);
        rig.write_descriptor(0, 201, at + 4096, 4096, 3, 202);
        rig.write_descriptor(0, 202, at + 8192, 1, 2, 0);
        rig.make_available(0, 200);
        finish_all(&mut rig, 0, 1);
        let mut found = vec![0; 4097];
        vm_memory::Bytes::read_slice(&rig.memory, &mut found, vm_memory::GuestAddress(at + 4096)).unwrap();
        let mut expected = pattern(5120, 1)[4096 - 512..].to_vec();
        expected.resize(4096, 0);
        assert_eq!((&found[..4096], found[4096]), (&expected[..], OK));
    }
}

#[test]
fn an_idle_disk_wakes_nobody() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut rig = rig(&file, |config| config.io_uring = engine);
        write(&mut rig, 0, &[1; 512]);
        flush(&mut rig);
        rig.settle().unwrap();
        // Nothing is readable: an idle loop sleeps until something comes.
        for _ in 0..100 {
            assert_eq!(rig.step().unwrap(), 0);
        }
    }
}

#[test]
fn the_image_is_kept_open_and_no_other() {
    let file = image(4096);
    let image = fd(&file);
    let number = image.as_raw_fd();
    let rig = rig_of(BlockConfig::new("", image));
    let link = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
    assert_eq!(link, file.path());
    drop(rig);
}
