//! Tests of the entropy device by a fake driver.

use super::super::malformed::every_shape_rests_and_recovers;
use super::super::testing::{Buffer, QUEUE_SIZE as RIG_SIZE, Rig};
use super::*;

fn rig(rate: RateLimit) -> (Rig<Rng>, RngHandle) {
    let (device, handle) = Rng::new(RngConfig { rate }).unwrap();
    (Rig::active(device), handle)
}

fn bytes_a_second(bytes_per_second: u64, burst_bytes: u64) -> RateLimit {
    RateLimit {
        bytes_per_second,
        burst_bytes,
        ..RateLimit::default()
    }
}

fn violation(rig: &mut Rig<Rng>, buffers: &[Buffer]) -> Violation {
    rig.add(QUEUE, buffers);
    match rig.try_kick(QUEUE) {
        Err(Fault::Violation(violation)) => violation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_buffer_is_filled_with_bytes_that_nobody_can_guess() {
    let (mut rig, handle) = rig(RateLimit::default());
    let first = rig.request(QUEUE, &[Buffer::In(64)]);
    let second = rig.request(QUEUE, &[Buffer::In(64)]);
    assert_eq!((first.written, second.written), (64, 64));
    // Equal by chance once in 2^512.
    assert_ne!(first.bytes, second.bytes);
    assert_eq!(rig.bench.interrupts(QUEUE), 2);
    assert_eq!(
        handle.stats(),
        RngStats {
            requests: 2,
            bytes: 128
        }
    );
}

#[test]
fn a_request_of_several_buffers_is_filled_in_order() {
    let (mut rig, _) = rig(RateLimit::default());
    let used = rig.request(QUEUE, &[Buffer::In(1), Buffer::In(5000), Buffer::In(31)]);
    assert_eq!(used.written, 5032);
    let (first, last) = (&used.bytes[1..33], &used.bytes[5000..]);
    assert!(first.iter().any(|b| *b != 0) && last.iter().any(|b| *b != 0));
}

#[test]
fn of_a_large_buffer_only_the_beginning_is_written() {
    let (mut rig, handle) = rig(RateLimit::default());
    let used = rig.request(QUEUE, &[Buffer::In(MOST_BYTES), Buffer::In(100)]);
    assert_eq!(used.written, MOST_BYTES);
    assert!(used.bytes[MOST_BYTES as usize..].iter().all(|b| *b == 0));
    assert_eq!(handle.stats().bytes, u64::from(MOST_BYTES));
}

#[test]
fn a_full_ring_is_emptied_and_an_empty_one_does_no_harm() {
    let (mut rig, handle) = rig(RateLimit::default());
    rig.kick(QUEUE);
    assert!(rig.used(QUEUE).is_none());
    let size = QUEUE_SIZE.min(RIG_SIZE);
    for _ in 0..size {
        rig.add(QUEUE, &[Buffer::In(8)]);
    }
    rig.kick(QUEUE);
    for _ in 0..size {
        assert_eq!(rig.used(QUEUE).unwrap().written, 8);
    }
    assert!(rig.used(QUEUE).is_none());
    assert_eq!(handle.stats().requests, u64::from(size));
}

#[test]
fn indices_wrap_around() {
    let (mut rig, _) = rig(RateLimit::default());
    for n in 0..66_000 {
        assert_eq!(rig.request(QUEUE, &[Buffer::In(1)]).written, 1, "request {n}");
    }
}

#[test]
fn a_buffer_for_the_device_to_read_breaks_the_rules() {
    let (mut rig, _) = rig(RateLimit::default());
    let broken = violation(&mut rig, &[Buffer::Out(vec![0; 8]), Buffer::In(8)]);
    assert!(matches!(broken, Violation::Direction { queue: QUEUE, .. }));
    assert!(!rig.is_active());
}

#[test]
fn a_request_without_room_breaks_the_rules() {
    let (mut rig, _) = rig(RateLimit::default());
    let broken = violation(&mut rig, &[Buffer::In(0)]);
    assert_eq!(
        broken.to_string(),
        "queue 0: a request for random bytes: 0 bytes, expected at least one"
    );
    rig.activate(u64::MAX).unwrap();
    assert_eq!(rig.request(QUEUE, &[Buffer::In(16)]).written, 16);
}

#[test]
fn every_malformed_ring_rests_the_device_until_a_reset() {
    let (mut rig, _) = rig(RateLimit::default());
    every_shape_rests_and_recovers(&mut rig, &[QUEUE], |rig| {
        assert_eq!(rig.request(QUEUE, &[Buffer::In(16)]).written, 16);
    });
}

#[test]
fn beyond_the_limit_requests_wait_and_are_answered_in_order() {
    // The burst serves the first; each of the others waits about 4 ms.
    let (mut rig, _) = rig(bytes_a_second(1 << 20, 4096));
    let heads: Vec<u16> = (0..3).map(|_| rig.add(QUEUE, &[Buffer::In(4096)])).collect();
    rig.kick(QUEUE);
    let mut answered = Vec::new();
    while answered.len() < heads.len() {
        match rig.used(QUEUE) {
            Some(used) => answered.push(used.head),
            None => rig.wait().unwrap(),
        }
    }
    assert_eq!(answered, heads);
}

#[test]
fn a_reset_gives_up_requests_that_wait_for_the_limit_but_not_the_limit() {
    // What is beyond the burst takes an hour.
    let (mut rig, handle) = rig(bytes_a_second(1, 3600));
    assert_eq!(rig.request(QUEUE, &[Buffer::In(3600)]).written, 3600);
    rig.add(QUEUE, &[Buffer::In(3600)]);
    rig.kick(QUEUE);
    assert!(rig.used(QUEUE).is_none());
    rig.reset();
    rig.settle().unwrap();
    rig.activate(u64::MAX).unwrap();
    assert!(rig.used(QUEUE).is_none());
    rig.add(QUEUE, &[Buffer::In(3600)]);
    rig.kick(QUEUE);
    assert!(rig.used(QUEUE).is_none());
    assert_eq!(handle.stats().requests, 1);
    rig.reset_queue(QUEUE).unwrap();
    assert!(rig.used(QUEUE).is_none());
}
