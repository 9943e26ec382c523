//! What a driver sees of a disk that works, whatever is behind it.

use super::*;

#[test]
fn reads_and_writes_reach_the_file() {
    for engine in ENGINES {
        let file = image(64 << 10);
        let mut rig = rig(&file, |config| config.io_uring = engine);
        assert_eq!(write(&mut rig, 3, &pattern(1024, 7)), OK);
        assert_eq!(contents(&file)[3 * 512..5 * 512], pattern(1024, 7));
        assert_eq!(
            read(&mut rig, 2, 2048),
            (OK, contents(&file)[2 * 512..6 * 512].to_vec())
        );
        assert!(rig.bench.interrupts(0) > 0);
        assert!(rig.reports().is_empty());
    }
}

#[test]
fn writes_are_left_to_the_engine_while_storage_is_busy() {
    for engine in ENGINES {
        let file = image(64 << 10);
        let mut rig = rig(&file, |config| config.io_uring = engine);
        rig.device.storage_is_busy();
        for n in 0..80 {
            assert_eq!(write(&mut rig, n, &pattern(512, n as u8)), OK);
            assert_eq!(write(&mut rig, n, &[]), OK);
            assert_eq!(read(&mut rig, n, 512), (OK, pattern(512, n as u8)));
        }
        assert!(rig.reports().is_empty());
    }
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let file = image(1 << 20);
    let (block, _) = Block::new(BlockConfig {
        block_size: 4096,
        queues: 3,
        ..BlockConfig::new("", fd(&file))
    })
    .unwrap();
    let config = block.config().bytes;
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], (2048u64).to_le_bytes());
    assert_eq!((word(12), word(20)), (254, 4096));
    assert_eq!(config[24..34], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(config[34..36], [3, 0]);
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 1, 8));
    assert_eq!((word(48), word(52), config[56]), (1 << 17, 1, 1));
    assert_eq!(block.queue_sizes(), [256, 256, 256]);
    assert_eq!(
        block.features(),
        1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 14
    );
    assert!(block.config().writable.is_empty());
}

#[test]
fn a_read_only_disk_says_so_and_refuses_changes() {
    let mut file = image(64 << 10);
    file.write_all(&pattern(64 << 10, 1)).unwrap();
    let read_only = File::open(file.path()).unwrap();
    let mut rig = rig_of(BlockConfig {
        mode: DiskMode::ReadOnly,
        ..BlockConfig::new("ro", read_only.into())
    });
    assert_ne!(rig.device.features() & 1 << 5, 0);
    assert_eq!(rig.device.features() & (1 << 13 | 1 << 14), 0);
    assert_eq!(write(&mut rig, 0, &[0; 512]), IOERR);
    assert_eq!(ranged(&mut rig, T_DISCARD, 0, 8, 0), UNSUPP);
    assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 0, 8, 0), UNSUPP);
    assert_eq!(flush(&mut rig), OK);
    assert_eq!(read(&mut rig, 0, 512), (OK, pattern(512, 1)));
    assert_eq!(contents(&file), pattern(64 << 10, 1));
}

#[test]
fn the_id_is_told() {
    let file = image(4096);
    let mut rig = rig(&file, |config| config.id = "exactly-twenty-bytes".into());
    let used = rig.request(0, &[Buffer::Out(header(T_GET_ID, 0)), Buffer::In(20), Buffer::In(1)]);
    assert_eq!(used.bytes, b"exactly-twenty-bytes\0");
    assert_eq!(used.written, 21);
}

#[test]
fn what_has_the_right_shape_and_cannot_be_is_answered() {
    let file = image(64 << 10);
    let mut rig = rig(&file, |_| ());
    // Unknown requests, of any shape that has room for a status.
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 16, 27, u32::MAX] {
        assert_eq!(status(&mut rig, kind, 0, &[]), UNSUPP);
        assert_eq!(status(&mut rig, kind, u64::MAX, &[1, 2, 3]), UNSUPP);
    }
    // Beyond the end, at the end, and around the end of numbers.
    for sector in [127, 128, 129, 1 << 54, (1 << 55) - 1, 1 << 55, u64::MAX - 1, u64::MAX] {
        assert_eq!(read(&mut rig, sector, 1024).0, IOERR, "{sector}");
        assert_eq!(write(&mut rig, sector, &[0; 1024]), IOERR, "{sector}");
        assert_eq!(ranged(&mut rig, T_DISCARD, sector, 2, 0), IOERR, "{sector}");
        assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, sector, 2, 0), IOERR, "{sector}");
    }
    assert_eq!(read(&mut rig, 126, 1024).0, OK);
    assert_eq!(read(&mut rig, 128, 0).0, OK);
    // Flags and limits (virtio 5.2.6.2).
    assert_eq!(ranged(&mut rig, T_DISCARD, 0, 8, 1), UNSUPP);
    assert_eq!(ranged(&mut rig, T_DISCARD, 0, 8, 2), UNSUPP);
    assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 0, 8, 2), UNSUPP);
    assert_eq!(ranged(&mut rig, T_DISCARD, 0, u32::MAX, 0), IOERR);
    assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 0, (1 << 17) + 1, 0), IOERR);
    // One range only.
    assert_eq!(status(&mut rig, T_DISCARD, 0, &[0; 32]), IOERR);
    assert_eq!(file.as_file().metadata().unwrap().len(), 64 << 10);
    assert!(rig.is_active());
}

#[test]
fn without_its_feature_a_request_is_not_known() {
    let file = image(64 << 10);
    let (block, _) = Block::new(BlockConfig::new("", fd(&file))).unwrap();
    let mut rig = Rig::new(block);
    rig.activate(0).unwrap();
    assert_eq!(ranged(&mut rig, T_DISCARD, 0, 8, 0), UNSUPP);
    assert_eq!(ranged(&mut rig, T_WRITE_ZEROES, 0, 8, 0), UNSUPP);
    // Each write survives by itself then.
    assert_eq!(write(&mut rig, 0, &pattern(512, 3)), OK);
    assert_eq!(read(&mut rig, 0, 512), (OK, pattern(512, 3)));
}

#[test]
fn buffers_may_begin_and_end_anywhere() {
    let file = image(64 << 10);
    let mut rig = rig(&file, |_| ());
    let data = pattern(1536, 5);
    let head = header(T_OUT, 1);
    let mut buffers: Vec<Buffer> = head.iter().map(|&byte| Buffer::Out(vec![byte])).collect();
    buffers.extend([Buffer::Out(data[..1].to_vec()), Buffer::Out(data[1..1000].to_vec())]);
    buffers.extend([
        Buffer::Out(vec![]),
        Buffer::Out(data[1000..].to_vec()),
        Buffer::In(1),
        Buffer::In(0),
    ]);
    assert_eq!(rig.request(0, &buffers).bytes, [OK]);
    assert_eq!(contents(&file)[512..2048], data);
    // All in one readable and one writable buffer.
    let used = rig.request(0, &[Buffer::Out(header(T_IN, 1)), Buffer::In(1537)]);
    assert_eq!(used.bytes, [data, vec![OK]].concat());
    assert_eq!(used.written, 1537);
}

#[test]
fn every_malformed_shape_stops_the_device_until_it_is_reset() {
    let out = |kind, extra: usize| Buffer::Out([header(kind, 0), vec![0; extra]].concat());
    let shapes: Vec<(&str, Vec<Buffer>)> = vec![
        ("request header", vec![Buffer::Out(vec![0; 15]), Buffer::In(1)]),
        ("request header", vec![Buffer::In(513)]),
        ("room for the status", vec![out(T_IN, 0)]),
        ("room for the status", vec![out(T_OUT, 512)]),
        ("room for the status", vec![out(99, 0)]),
        ("data of a read", vec![out(T_IN, 0), Buffer::In(512)]),
        ("data of a read", vec![out(T_IN, 0), Buffer::In(511), Buffer::In(1)]),
        ("a read has readable data", vec![out(T_IN, 512), Buffer::In(513)]),
        ("data of a write", vec![out(T_OUT, 511), Buffer::In(1)]),
        ("a write has writable data", vec![out(T_OUT, 512), Buffer::In(513)]),
        ("a flush has readable data", vec![out(T_FLUSH, 512), Buffer::In(1)]),
        ("a flush has writable data", vec![out(T_FLUSH, 0), Buffer::In(513)]),
        ("room for the id", vec![out(T_GET_ID, 0), Buffer::In(20)]),
        ("id has readable data", vec![out(T_GET_ID, 1), Buffer::In(21)]),
        ("ranges: 0 bytes", vec![out(T_DISCARD, 0), Buffer::In(1)]),
        ("ranges: 15 bytes", vec![out(T_DISCARD, 15), Buffer::In(1)]),
        ("ranges: 17 bytes", vec![out(T_WRITE_ZEROES, 17), Buffer::In(1)]),
        (
            "zeroing has writable data",
            vec![out(T_WRITE_ZEROES, 16), Buffer::In(2)],
        ),
    ];
    let file = image(64 << 10);
    let mut rig = rig(&file, |_| ());
    for (expected, buffers) in shapes {
        rig.add(0, &buffers);
        let fault = rig.try_kick(0).unwrap_err();
        assert!(matches!(fault, Fault::Violation(_)), "{fault}");
        assert!(fault.to_string().contains(expected), "{fault} is not about {expected}");
        assert!(!rig.is_active());
        rig.activate(u64::MAX).unwrap();
        assert_eq!(write(&mut rig, 0, &pattern(512, 9)), OK);
    }
}

#[test]
fn a_full_ring_is_served_and_goes_round_and_round() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut rig = rig(&file, |config| config.io_uring = engine);
        // Three descriptors a request: 85 fill a ring of 256. Four times round it.
        for round in 0..16u64 {
            for n in 0..85u64 {
                let data = pattern(512, (round * 85 + n) as u8);
                rig.add(0, &[Buffer::Out(header(T_OUT, n)), Buffer::Out(data), Buffer::In(1)]);
            }
            let done = finish_all(&mut rig, 0, 85);
            assert!(done.iter().all(|used| used.bytes == [OK]));
        }
        for n in 0..85 {
            assert_eq!(read(&mut rig, n, 512), (OK, pattern(512, (15 * 85 + n) as u8)));
        }
        // Nothing there: nothing happens.
        rig.kick(0);
        assert!(rig.used(0).is_none());
    }
}

#[test]
fn indices_wrap_around() {
    let file = image(4096);
    let mut rig = rig(&file, |_| ());
    for n in 0..70_000u32 {
        let used = rig.request(0, &[Buffer::Out(header(T_GET_ID, n.into())), Buffer::In(21)]);
        assert_eq!(used.bytes.last(), Some(&OK));
    }
}

#[test]
fn all_queues_are_served() {
    let file = image(64 << 10);
    let mut rig = rig(&file, |config| config.queues = 4);
    for queue in 0..4u16 {
        let data = pattern(512, queue as u8);
        rig.add(
            queue,
            &[
                Buffer::Out(header(T_OUT, queue.into())),
                Buffer::Out(data),
                Buffer::In(1),
            ],
        );
    }
    for queue in 0..4 {
        rig.kick(queue);
        while rig.used(queue).is_none() {
            rig.wait().unwrap();
        }
        assert!(rig.bench.interrupts(queue) > 0);
    }
    for queue in 0..4usize {
        assert_eq!(contents(&file)[queue * 512..][..512], pattern(512, queue as u8));
    }
}

#[test]
fn statistics_count_what_was_done() {
    let file = image(64 << 10);
    let (block, handle) = Block::new(BlockConfig::new("stats", fd(&file))).unwrap();
    let mut rig = Rig::active(block);
    write(&mut rig, 0, &[1; 1024]);
    read(&mut rig, 0, 512);
    read(&mut rig, 0, 512);
    flush(&mut rig);
    ranged(&mut rig, T_DISCARD, 0, 8, 0);
    read(&mut rig, 1 << 40, 512);
    rig.request(0, &[Buffer::Out(header(T_GET_ID, 0)), Buffer::In(21)]);
    let expected = BlockStats {
        reads: 2,
        writes: 1,
        flushes: 1,
        discards: 1,
        ids: 1,
        read_bytes: 1024,
        written_bytes: 1024,
        errors: 1,
        in_flight: 0,
    };
    assert_eq!(handle.stats(), expected);
    let info = handle.info();
    assert_eq!(
        (info.id.as_str(), info.bytes, info.block_size),
        ("stats", 64 << 10, 512)
    );
    assert!(info.engine.is_some());
}

#[test]
fn a_limited_disk_takes_its_time() {
    let file = image(1 << 20);
    let mut rig = rig(&file, |config| {
        config.rate_limit = RateLimit {
            bytes_per_second: 1 << 20,
            burst_bytes: 4096,
            operations_per_second: 500,
            burst_operations: 2,
        };
    });
    let begun = std::time::Instant::now();
    for n in 0..20 {
        rig.add(0, &[Buffer::Out(header(T_IN, n)), Buffer::In(4097)]);
    }
    let done = finish_all(&mut rig, 0, 20);
    assert!(done.iter().all(|used| used.bytes.last() == Some(&OK)));
    // 19 pages after the first at 1 MiB a second. Only that it is no shorter is certain.
    assert!(
        begun.elapsed() > std::time::Duration::from_millis(74),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn a_reset_forgets_what_the_limit_holds_back() {
    let file = image(1 << 20);
    let mut rig = rig(&file, |config| {
        config.rate_limit = RateLimit {
            operations_per_second: 1,
            burst_operations: 1,
            ..RateLimit::default()
        };
    });
    for n in 0..3 {
        rig.add(0, &[Buffer::Out(header(T_IN, n)), Buffer::In(513)]);
    }
    rig.kick(0);
    assert!(rig.used(0).is_some());
    assert!(rig.used(0).is_none());
    rig.reset();
    rig.activate(u64::MAX).unwrap();
    rig.kick(0);
    assert!(rig.used(0).is_none());
}

#[test]
fn reads_that_wait_together_are_answered_each_for_itself() {
    for engine in ENGINES {
        let file = image(64 << 10);
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &pattern(64 << 10, 9), 0).unwrap();
        let mut rig = rig(&file, |config| config.io_uring = engine);
        // Whole, in several buffers, empty, past the end; more than are done at a time.
        let wanted: Vec<(u64, Vec<u32>)> = vec![
            (0, vec![512]),
            (1, vec![512, 1024]),
            (7, vec![]),
            (127, vec![512]),
            (127, vec![1024]),
        ];
        let wanted: Vec<_> = (0..4).flat_map(|_| wanted.clone()).collect();
        let mut heads = std::collections::BTreeMap::new();
        for (sector, lens) in &wanted {
            let mut buffers = vec![Buffer::Out(header(T_IN, *sector))];
            buffers.extend(lens.iter().map(|&len| Buffer::In(len)));
            buffers.push(Buffer::In(1));
            heads.insert(
                rig.add(0, &buffers),
                (*sector as usize * 512, lens.iter().sum::<u32>() as usize),
            );
        }
        let whole = contents(&file);
        for mut used in finish_all(&mut rig, 0, wanted.len()) {
            let (start, len) = heads[&used.head];
            let status = used.bytes.pop().unwrap();
            match whole.get(start..start + len) {
                Some(expected) => assert_eq!((status, &used.bytes[..]), (OK, expected)),
                None => assert_eq!(status, IOERR),
            }
        }
        assert!(rig.reports().is_empty());
    }
}
