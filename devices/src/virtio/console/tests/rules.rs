//! Drivers that break the rules.

use super::super::super::malformed::every_shape_rests_and_recovers;
use super::*;

#[test]
fn buffers_that_go_the_wrong_way_break_the_rules() {
    for (queue, buffer, what) in [
        (
            0,
            Buffer::Out(vec![0; 8]),
            "queue 0: a buffer for input is for the device to read",
        ),
        (1, Buffer::In(8), "queue 1: output has a buffer for the device to write"),
        (
            2,
            Buffer::Out(vec![0; 8]),
            "queue 2: a buffer for control messages is for the device to read",
        ),
        (
            3,
            Buffer::In(8),
            "queue 3: a control message has a buffer for the device to write",
        ),
    ] {
        let mut bench = Bench::new(1, u64::MAX);
        bench.say(0, event::PORT_READY, 1);
        bench.say(0, event::PORT_OPEN, 1);
        bench.hosts[0].write_all(b"input").unwrap();
        assert_eq!(bench.fault(queue, &[buffer]), what);
        assert!(!bench.rig.is_active());
    }
}

#[test]
fn buffers_that_are_too_short_break_the_rules() {
    for (queue, buffer, what) in [
        (
            0,
            Buffer::In(0),
            "queue 0: a buffer for input: 0 bytes, expected at least one",
        ),
        (
            2,
            Buffer::In(7),
            "queue 2: a buffer for a control message: 7 bytes, expected 8 and what follows, at most 72",
        ),
        (
            3,
            Buffer::Out(vec![0; 7]),
            "queue 3: a control message: 7 bytes, expected at least 8",
        ),
    ] {
        let mut bench = Bench::new(1, u64::MAX);
        bench.say(0, event::PORT_READY, 1);
        bench.say(0, event::PORT_OPEN, 1);
        bench.hosts[0].write_all(b"input").unwrap();
        assert_eq!(bench.fault(queue, &[buffer]), what);
    }
}

#[test]
fn control_messages_that_no_driver_sends_break_the_rules() {
    let mut bench = Bench::new(2, u64::MAX);
    let unknown = Buffer::Out(message(0, 9, 0, b""));
    assert_eq!(
        bench.fault(CONTROL_FROM_DRIVER, &[unknown]),
        "queue 3: a control message with event 9, which no driver sends"
    );
    bench.rig.activate(u64::MAX).unwrap();
    let nobody = Buffer::Out(message(2, event::PORT_OPEN, 1, b""));
    assert_eq!(
        bench.fault(CONTROL_FROM_DRIVER, &[nobody]),
        "queue 3: a control message about port 2, of 2"
    );
    bench.rig.activate(u64::MAX).unwrap();
    bench.set_up();
    bench.send(1, b"works again");
    assert_eq!(read_now(&mut bench.hosts[1]), b"works again");
}

#[test]
fn every_malformed_ring_rests_the_console_until_a_reset() {
    let mut bench = Bench::open(2);
    // The receive queues are looked at when there is input, so there always is.
    assert_eq!(write_now(&mut bench.hosts[0], &[b'x'; 1000]), 1000);
    assert_eq!(write_now(&mut bench.hosts[1], &[b'x'; 1000]), 1000);
    let Bench { rig, handle, hosts } = bench;
    let mut rig = rig;
    let open = |rig: &mut Rig<Console>| {
        for id in 0..2 {
            for event in [event::PORT_READY, event::PORT_OPEN] {
                rig.request(CONTROL_FROM_DRIVER, &[Buffer::Out(message(id, event, 1, b""))]);
            }
        }
    };
    rig.activate(u64::MAX).unwrap();
    open(&mut rig);
    every_shape_rests_and_recovers(&mut rig, &[0, 1, 2, 3, 4, 5], |rig| {
        open(rig);
        rig.request(5, &[Buffer::Out(b"!".to_vec())]);
    });
    assert_eq!(handle.stats(1).unwrap().from_guest, 60);
    drop(hosts);
}

#[test]
fn output_from_before_a_broken_rule_still_goes_out() {
    let mut bench = Bench::open(1);
    bench.rig.add(1, &[Buffer::Out(b"last words".to_vec())]);
    assert_eq!(
        bench.fault(1, &[Buffer::In(8)]),
        "queue 1: output has a buffer for the device to write"
    );
    assert_eq!(read_now(&mut bench.hosts[0]), b"last words");
}
