//! Frames from the host to the driver.

use super::*;

#[test]
fn a_frame_arrives_whole_with_its_header() {
    let (mut rig, handle, mut peer) = active();
    give(&mut rig, 4, 2048);
    peer.send(&frame(1, 60));
    rig.settle().unwrap();
    let used = rig.used(RX).unwrap();
    assert_eq!(used.written as usize, HEADER + 60);
    assert_eq!(used.bytes[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(used.bytes[HEADER..HEADER + 60], frame(1, 60));
    assert_eq!(rig.bench.interrupts(RX), 1);
    assert_eq!((handle.stats().received.frames, handle.stats().received.bytes), (1, 60));
}

#[test]
fn one_interrupt_tells_of_many_frames() {
    let (mut rig, _handle, mut peer) = active();
    give(&mut rig, 32, 2048);
    for n in 0..32 {
        peer.send(&frame(n, 100 + usize::from(n)));
    }
    rig.settle().unwrap();
    let frames = merged(given_back(&mut rig, RX));
    assert_eq!(frames.len(), 32);
    for (n, got) in (0u8..).zip(&frames) {
        assert_eq!(got, &frame(n, 100 + usize::from(n)));
    }
    assert_eq!(rig.bench.interrupts(RX), 1);
}

#[test]
fn a_frame_is_spread_over_chains() {
    let (mut rig, _handle, mut peer) = active();
    give(&mut rig, 20, 128);
    peer.send(&frame(1, 1500));
    peer.send(&frame(2, 100));
    rig.settle().unwrap();
    let used = given_back(&mut rig, RX);
    assert_eq!(used.len(), 12 + 1, "1512 bytes need 12 of the buffers, 112 need one");
    assert_eq!(merged(used), [frame(1, 1500), frame(2, 100)]);
}

#[test]
fn the_header_may_lie_in_several_segments() {
    let (mut rig, _handle, mut peer) = active();
    rig.add(
        RX,
        &[
            Buffer::In(5),
            Buffer::In(0),
            Buffer::In(7),
            Buffer::In(3),
            Buffer::In(1600),
        ],
    );
    rig.kick(RX);
    peer.send(&frame(1, 60));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, 60)]);
}

#[test]
fn without_merging_a_frame_gets_one_chain() {
    let (net, handle, mut peer) = net();
    let mut rig = Rig::new(net);
    rig.activate(!features::MRG_RXBUF).unwrap();
    give(&mut rig, 2, 200);
    peer.send(&frame(1, 189));
    peer.send(&frame(2, 188));
    rig.settle().unwrap();
    assert_eq!(
        merged(given_back(&mut rig, RX)),
        [frame(2, 188)],
        "one byte too long for the buffer"
    );
    let received = handle.stats().received;
    assert_eq!((received.frames, received.dropped), (1, 1));
}

#[test]
fn frames_wait_until_the_driver_has_room() {
    let (mut rig, handle, mut peer) = active();
    peer.send(&frame(1, 60));
    rig.settle().unwrap();
    assert_eq!(rig.used(RX), None);
    give(&mut rig, 1, 2048);
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, 60)]);
    assert_eq!(handle.stats().received.dropped, 0);
}

#[test]
fn a_frame_that_came_in_part_waits_for_more_buffers() {
    let (mut rig, handle, mut peer) = active();
    give(&mut rig, 2, 128);
    peer.send(&frame(1, 400));
    peer.send(&frame(2, 60));
    rig.settle().unwrap();
    assert_eq!(rig.used(RX), None, "400 bytes do not fit into two of the buffers");
    give(&mut rig, 1, 128);
    assert_eq!(rig.used(RX), None, "nor into three");
    give(&mut rig, 2, 128);
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, 400), frame(2, 60)]);
    assert_eq!(handle.stats().received.frames, 2);
}

#[test]
fn a_frame_longer_than_the_whole_ring_is_dropped() {
    let (mut rig, handle, mut peer) = active();
    // 256 buffers of 12 bytes: 3072 in all. The MTU is not accepted, so that longer frames may come.
    rig.reset();
    rig.activate(!features::MTU).unwrap();
    give(&mut rig, 256, 12);
    peer.send(&frame(1, 3061));
    peer.send(&frame(2, 3060));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(2, 3060)]);
    assert_eq!(handle.stats().received.dropped, 1);
}

#[test]
fn what_is_no_frame_for_the_driver_is_dropped() {
    let (mut rig, handle, mut peer) = active();
    give(&mut rig, 4, 4096);
    peer.send(&[]);
    peer.send(&frame(1, 13));
    peer.send(&frame(2, 1519));
    peer.send(&frame(3, 1518));
    rig.settle().unwrap();
    assert_eq!(
        merged(given_back(&mut rig, RX)),
        [frame(3, 1518)],
        "1500, an Ethernet header and a tag"
    );
    assert_eq!(handle.stats().received.errors, 3);
}

#[test]
fn the_largest_frame_arrives() {
    let (net, _handle, mut peer) = with(|config| config.mtu = MAX_MTU);
    let mut rig = Rig::active(net);
    give(&mut rig, 45, 1536);
    let len = usize::from(MAX_MTU) + 14;
    peer.send(&frame(1, len));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, len)]);
}

#[test]
fn what_came_before_the_driver_is_dropped() {
    let (net, handle, mut peer) = net();
    let mut rig = Rig::new(net);
    for n in 0..3 {
        peer.send(&frame(n, 60));
    }
    rig.settle().unwrap();
    rig.activate(u64::MAX).unwrap();
    give(&mut rig, 4, 2048);
    assert_eq!(rig.used(RX), None);
    assert_eq!(handle.stats().received.dropped, 3);
}

#[test]
fn a_reset_forgets_buffers_and_frames_that_wait() {
    let (mut rig, _handle, mut peer) = active();
    give(&mut rig, 1, 128);
    peer.send(&frame(1, 400));
    rig.settle().unwrap();
    rig.reset();
    rig.settle().unwrap();
    let before: Vec<u8> = (0..4096).map(|n| (n % 7) as u8).collect();
    vm_memory::Bytes::write_slice(&rig.memory, &before, vm_memory::GuestAddress(1 << 20)).unwrap();
    peer.send(&frame(2, 60));
    rig.settle().unwrap();
    let mut after = vec![0; 4096];
    vm_memory::Bytes::read_slice(&rig.memory, &mut after, vm_memory::GuestAddress(1 << 20)).unwrap();
    assert_eq!(after, before, "nothing is written while the device rests");
    rig.activate(u64::MAX).unwrap();
    give(&mut rig, 1, 2048);
    peer.send(&frame(3, 60));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(3, 60)]);
}

#[test]
fn a_queue_that_is_reset_gives_its_buffers_up() {
    let (mut rig, _handle, mut peer) = active();
    give(&mut rig, 1, 128);
    peer.send(&frame(1, 400));
    rig.settle().unwrap();
    rig.reset_queue(RX).unwrap();
    give(&mut rig, 1, 2048);
    peer.send(&frame(2, 60));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(2, 60)]);
}

#[test]
fn indices_wrap_around() {
    let (mut rig, _handle, mut peer) = active();
    for n in 0..70_000u32 {
        rig.add(RX, &[Buffer::In(64)]);
        peer.send(&frame(n as u8, 40));
        rig.kick(RX);
        let used = rig.used(RX).unwrap();
        assert_eq!(used.bytes[HEADER..HEADER + 40], frame(n as u8, 40));
    }
}

#[test]
fn the_rate_limit_holds_frames_back() {
    let (net, handle, mut peer) = with(|config| {
        config.receive_limit = RateLimit {
            operations_per_second: 100,
            burst_operations: 2,
            ..RateLimit::default()
        };
    });
    let mut rig = Rig::active(net);
    give(&mut rig, 8, 2048);
    for n in 0..4 {
        peer.send(&frame(n, 60));
    }
    let mut frames = Vec::new();
    while frames.len() < 4 {
        frames.extend(merged(given_back(&mut rig, RX)));
        if frames.len() < 4 {
            rig.wait().unwrap();
        }
    }
    assert_eq!(frames, [0, 1, 2, 3].map(|n| frame(n, 60)));
    assert_eq!(handle.stats().received.dropped, 0);
}
