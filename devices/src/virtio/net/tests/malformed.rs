//! Drivers that break the rules.

use super::*;
use crate::virtio::malformed::every_shape_rests_and_recovers;
use crate::virtio::violation::Violation;

#[test]
fn every_malformed_ring_rests_the_device_and_a_reset_revives_it() {
    let (mut rig, _handle, mut peer) = active();
    every_shape_rests_and_recovers(&mut rig, &[RX, TX, CONTROL], |rig| {
        give(rig, 1, 2048);
        peer.send(&frame(1, 60));
        rig.settle().unwrap();
        assert_eq!(merged(given_back(rig, RX)), [frame(1, 60)]);
        rig.add(TX, &packet(&frame(2, 60)));
        rig.kick(TX);
        assert_eq!(peer.receive().unwrap(), frame(2, 60));
        let answer = rig.request(CONTROL, &[Buffer::Out(vec![0, 0, 1]), Buffer::In(1)]);
        assert_eq!(answer.bytes, [control::OK]);
    });
}

/// What the device says of a chain of `buffers` on `queue`.
fn violation(queue: u16, buffers: &[Buffer]) -> Violation {
    let (mut rig, _handle, _peer) = active();
    rig.add(queue, buffers);
    match rig.try_kick(queue) {
        Err(Fault::Violation(violation)) => violation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn buffers_that_go_the_wrong_way_break_the_rules() {
    let readable = violation(RX, &[Buffer::Out(vec![0; 20]), Buffer::In(2000)]);
    assert!(matches!(readable, Violation::Direction { queue: RX, .. }));
    let writable = violation(TX, &[Buffer::Out(vec![0; 72]), Buffer::In(1)]);
    assert!(matches!(writable, Violation::Direction { queue: TX, .. }));
}

#[test]
fn buffers_without_room_for_a_header_break_the_rules() {
    for (queue, buffer) in [
        (RX, Buffer::In(11)),
        (RX, Buffer::In(0)),
        (TX, Buffer::Out(vec![0; 11])),
    ] {
        let short = violation(queue, &[buffer]);
        assert!(matches!(short, Violation::Length { .. }), "{short}");
    }
    let answer = violation(CONTROL, &[Buffer::Out(vec![0, 0, 1])]);
    assert!(
        matches!(
            answer,
            Violation::Length {
                queue: CONTROL,
                got: 0,
                ..
            }
        ),
        "{answer}"
    );
    let class = violation(CONTROL, &[Buffer::Out(vec![0]), Buffer::In(1)]);
    assert!(
        matches!(
            class,
            Violation::Length {
                queue: CONTROL,
                got: 1,
                ..
            }
        ),
        "{class}"
    );
}

#[test]
fn a_chain_of_very_many_pieces_still_works() {
    let (mut rig, _handle, mut peer) = active();
    let pieces: Vec<Buffer> = (0..256).map(|_| Buffer::In(8)).collect();
    rig.add(RX, &pieces);
    rig.kick(RX);
    peer.send(&frame(1, 1500));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, 1500)]);
    let mut pieces = vec![Buffer::Out(vec![0; HEADER])];
    pieces.extend(frame(2, 255 * 4).chunks(4).map(|piece| Buffer::Out(piece.to_vec())));
    rig.add(TX, &pieces);
    rig.kick(TX);
    assert_eq!(peer.receive().unwrap(), frame(2, 255 * 4));
}
