//! Tests of the memory device by a fake driver.

use super::super::malformed::every_shape_rests_and_recovers;
use super::super::testing::{Buffer, Rig};
use super::*;

/// Within the rig's memory, above its rings and buffers.
const REGION: Range<u64> = 0x80_0000..0x100_0000;
const BLOCK: u64 = 0x4_0000;

fn device(requested: u64) -> (MemoryDevice, MemoryHandle) {
    MemoryDevice::new(MemoryDeviceConfig {
        block_size: BLOCK,
        region: REGION,
        requested,
    })
    .unwrap()
}

fn active(requested: u64) -> (Rig<MemoryDevice>, MemoryHandle) {
    let (device, handle) = device(requested);
    (Rig::active(device), handle)
}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

fn request(kind: u16, address: u64, blocks: u16) -> Buffer {
    let mut bytes = vec![0xee; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    Buffer::Out(bytes)
}

/// Sends a request about blocks from `block` of the region on: the response's type and state.
fn send(rig: &mut Rig<MemoryDevice>, kind: u16, block: u64, blocks: u16) -> (u8, u8) {
    let used = rig.request(
        QUEUE,
        &[request(kind, REGION.start + block * BLOCK, blocks), Buffer::In(10)],
    );
    assert_eq!(used.written, 10);
    (used.bytes[0], used.bytes[8])
}

fn field(rig: &Rig<MemoryDevice>, at: usize) -> u64 {
    u64::from_le_bytes(rig.bench.config()[at..at + 8].try_into().unwrap())
}

fn violation(rig: &mut Rig<MemoryDevice>, buffers: &[Buffer]) -> String {
    rig.add(QUEUE, buffers);
    match rig.try_kick(QUEUE) {
        Err(Fault::Violation(violation)) => violation.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_configuration_describes_the_region() {
    let (rig, handle) = active(2 * BLOCK);
    let fields: Vec<u64> = (0..7).map(|n| field(&rig, 8 * n)).collect();
    let size = REGION.end - REGION.start;
    assert_eq!(fields, [BLOCK, 0, REGION.start, size, size, 0, 2 * BLOCK]);
    assert_eq!(
        handle.sizes(),
        MemorySizes {
            block: BLOCK,
            region: size,
            usable: size,
            plugged: 0,
            requested: 2 * BLOCK
        }
    );
    assert_eq!(rig.device.features(), F_UNPLUGGED_INACCESSIBLE);
}

#[test]
fn memory_is_plugged_and_unplugged_as_requested() {
    let (mut rig, handle) = active(0);
    assert_eq!(send(&mut rig, PLUG, 0, 1), (1, 0), "nothing is requested");
    handle.request(8 * BLOCK).unwrap();
    rig.settle().unwrap();
    assert_eq!(
        (field(&rig, REQUESTED_SIZE), rig.bench.config_changes()),
        (8 * BLOCK, 1)
    );
    assert_eq!(send(&mut rig, PLUG, 0, 8), (0, 0));
    assert_eq!(field(&rig, PLUGGED_SIZE), 8 * BLOCK);
    assert_eq!(handle.sizes().plugged, 8 * BLOCK);
    assert_eq!(send(&mut rig, PLUG, 8, 1), (1, 0));
    assert_eq!(rig.bench.discarded(), []);

    handle.request(4 * BLOCK).unwrap();
    rig.settle().unwrap();
    assert_eq!(send(&mut rig, UNPLUG, 2, 3), (0, 0));
    assert_eq!(rig.bench.discarded(), [(REGION.start + 2 * BLOCK, 3 * BLOCK)]);
    assert_eq!(send(&mut rig, STATE, 0, 2), (0, 0));
    assert_eq!(send(&mut rig, STATE, 2, 3), (0, 1));
    assert_eq!(send(&mut rig, STATE, 0, 8), (0, 2));
    assert_eq!(send(&mut rig, UNPLUG_ALL, 99, 0), (0, 0));
    assert_eq!(rig.bench.discarded(), [(REGION.start, REGION.end - REGION.start)]);
    assert_eq!((handle.sizes().plugged, handle.sizes().requested), (0, 4 * BLOCK));
    assert_eq!(send(&mut rig, UNPLUG_ALL, 0, 0), (0, 0));
    assert_eq!(rig.bench.discarded(), []);
}

#[test]
fn what_cannot_be_is_answered_with_an_error() {
    let (mut rig, handle) = active(8 * BLOCK);
    assert_eq!(send(&mut rig, PLUG, 3, 1), (0, 0));
    for (kind, block, blocks) in [
        (PLUG, 0, 0),
        (PLUG, 3, 1),
        (PLUG, 2, 2),
        (PLUG, 31, 2),
        (PLUG, 32, 1),
        (UNPLUG, 3, 2),
        (UNPLUG, 4, 1),
        (STATE, 32, 1),
        (STATE, 0, 0),
        (4, 0, 1),
        (u16::MAX, 0, 1),
    ] {
        assert_eq!(send(&mut rig, kind, block, blocks), (3, 0), "{kind} {block} {blocks}");
    }
    for address in [
        0,
        REGION.start + 1,
        REGION.start - BLOCK,
        u64::MAX,
        u64::MAX - BLOCK + 1,
    ] {
        let used = rig.request(QUEUE, &[request(PLUG, address, 1), Buffer::In(10)]);
        assert_eq!(used.bytes[0], 3, "{address:#x}");
    }
    assert_eq!(handle.sizes().plugged, BLOCK);
    assert!(rig.is_active());
}

#[test]
fn requests_and_responses_may_lie_in_pieces() {
    let (mut rig, _) = active(8 * BLOCK);
    let Buffer::Out(bytes) = request(PLUG, REGION.start, 1) else {
        unreachable!()
    };
    let used = rig.request(
        QUEUE,
        &[
            Buffer::Out(bytes[..9].to_vec()),
            Buffer::Out(bytes[9..].to_vec()),
            Buffer::In(1),
            Buffer::In(100),
        ],
    );
    assert_eq!((used.written, used.bytes[0]), (10, 0));
}

#[test]
fn a_reset_changes_no_block() {
    let (mut rig, handle) = active(8 * BLOCK);
    assert_eq!(send(&mut rig, PLUG, 3, 5), (0, 0));
    rig.reset();
    assert_eq!(
        (handle.sizes().plugged, field(&rig, PLUGGED_SIZE)),
        (5 * BLOCK, 5 * BLOCK)
    );
    handle.request(6 * BLOCK).unwrap();
    rig.settle().unwrap();
    rig.activate(u64::MAX).unwrap();
    assert_eq!(rig.bench.discarded(), []);
    assert_eq!(field(&rig, REQUESTED_SIZE), 6 * BLOCK);
    assert_eq!(send(&mut rig, STATE, 3, 5), (0, 0));
    assert_eq!(send(&mut rig, UNPLUG_ALL, 0, 0), (0, 0));
}

#[test]
fn a_reset_gives_up_requests_that_were_not_answered() {
    let (mut rig, handle) = active(8 * BLOCK);
    for block in 0..8 {
        rig.add(QUEUE, &[request(PLUG, REGION.start + block * BLOCK, 1), Buffer::In(10)]);
    }
    rig.reset();
    rig.activate(u64::MAX).unwrap();
    assert_eq!(handle.sizes().plugged, 0);
    rig.add(QUEUE, &[request(PLUG, REGION.start, 1), Buffer::In(10)]);
    rig.reset_queue(QUEUE).unwrap();
    assert_eq!(handle.sizes().plugged, 0);
    assert_eq!(send(&mut rig, PLUG, 0, 1), (0, 0));
}

#[test]
fn only_whole_blocks_of_the_region_can_be_requested() {
    let (_, handle) = active(0);
    let size = REGION.end - REGION.start;
    for bytes in [1, BLOCK - 1, size + BLOCK, u64::MAX] {
        assert_eq!(
            handle.request(bytes),
            Err(BadRequest {
                bytes,
                block_size: BLOCK,
                region_size: size
            })
        );
    }
    handle.request(size).unwrap();
    assert_eq!(
        handle.request(5).unwrap_err().to_string(),
        "5 bytes cannot be plugged: it has to be a multiple of 262144 and at most 8388608"
    );
    assert_eq!(handle.sizes().requested, size);
}

#[test]
fn sizes_that_do_not_fit_together_are_refused() {
    let error = |block_size, region, requested| {
        let config = MemoryDeviceConfig {
            block_size,
            region,
            requested,
        };
        MemoryDevice::new(config).err().unwrap().to_string()
    };
    for (block, region, requested) in [
        (0, REGION, 0),
        (2048, REGION, 0),
        (3 << 20, REGION, 0),
        (BLOCK, 0x1000..BLOCK, 0),
        (BLOCK, 0..0, 0),
        (4096, 0..1 << 40, 0),
        (BLOCK, REGION, 1),
        (BLOCK, REGION, 1 << 40),
    ] {
        error(block, region, requested);
    }
    assert_eq!(
        error(2048, REGION, 0),
        "a block of 2048 bytes; it has to be a power of two, at least 4096"
    );
    assert_eq!(
        error(BLOCK, BLOCK..BLOCK + 1, 0),
        "a region from 0x40000 to 0x40001; it has to be 1 to 16777216 blocks of 0x40000 bytes"
    );
}

#[test]
fn requests_and_responses_that_are_too_short_break_the_rules() {
    let (mut rig, _) = active(8 * BLOCK);
    for (buffers, what) in [
        (
            vec![Buffer::Out(vec![2; 23]), Buffer::In(10)],
            "queue 0: a memory request: 23 bytes, expected at least 24",
        ),
        (
            vec![Buffer::In(10)],
            "queue 0: a memory request: 0 bytes, expected at least 24",
        ),
        (
            vec![request(UNPLUG_ALL, 0, 0), Buffer::In(9)],
            "queue 0: room for a memory response: 9 bytes, expected at least 10",
        ),
        (
            vec![request(PLUG, REGION.start, 1)],
            "queue 0: room for a memory response: 0 bytes, expected at least 10",
        ),
    ] {
        assert_eq!(violation(&mut rig, &buffers), what);
        assert!(!rig.is_active());
        rig.activate(u64::MAX).unwrap();
    }
    assert_eq!(send(&mut rig, STATE, 0, 8), (0, 1), "nothing was plugged");
}

#[test]
fn every_malformed_ring_rests_the_device_until_a_reset() {
    let (mut rig, _) = active(8 * BLOCK);
    every_shape_rests_and_recovers(&mut rig, &[QUEUE], |rig| {
        assert_eq!(send(rig, STATE, 0, 1), (0, 1));
    });
}

#[test]
fn full_and_empty_rings_and_indices_that_wrap_around() {
    let (mut rig, _) = active(8 * BLOCK);
    rig.kick(QUEUE);
    for _ in 0..2100 {
        for _ in 0..32 {
            rig.add(QUEUE, &[request(STATE, REGION.start, 1), Buffer::In(10)]);
        }
        rig.kick(QUEUE);
        assert_eq!(std::iter::from_fn(|| rig.used(QUEUE)).count(), 32);
    }
}

#[test]
fn many_changes_are_one_event_and_the_last_is_told() {
    let (mut rig, _) = active(8 * BLOCK);
    let changed = |plugged| DeviceEvent::MemoryChanged {
        device: "device".into(),
        plugged,
        requested: 8 * BLOCK,
    };
    for block in 0..8 {
        send(&mut rig, PLUG, block, 1);
    }
    assert_eq!(rig.reports(), [changed(BLOCK)]);
    let mut reports = Vec::new();
    while reports.is_empty() {
        rig.wait().unwrap();
        reports = rig.reports();
    }
    assert_eq!(reports, [changed(8 * BLOCK)]);
}

/// A host that takes nothing back.
struct Refuses;

impl super::super::device::Reclaim for Refuses {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn what_the_host_does_not_take_back_stays_plugged() {
    let (mut rig, handle) = active(8 * BLOCK);
    send(&mut rig, PLUG, 0, 2);
    rig.reports();
    for kind in [UNPLUG, UNPLUG_ALL] {
        rig.add(QUEUE, &[request(kind, REGION.start, 2), Buffer::In(10)]);
        rig.call(|device, context| {
            let mut context = Context {
                memory: context.memory,
                reclaim: &Refuses,
                queues: &mut *context.queues,
                features: context.features,
                transport: context.transport,
                watches: &mut *context.watches,
            };
            device.notify(QUEUE, &mut context)
        })
        .unwrap();
        assert_eq!(rig.used(QUEUE).unwrap().bytes[0], 2, "busy");
        let reports = rig.reports();
        assert!(
            matches!(
                &reports[..],
                [DeviceEvent::IoError {
                    operation: "discard",
                    ..
                }]
            ),
            "{reports:?}"
        );
    }
    assert_eq!(handle.sizes().plugged, 2 * BLOCK);
    assert_eq!(send(&mut rig, UNPLUG, 0, 2), (0, 0));
}
