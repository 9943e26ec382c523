//! The control queue.

use super::*;

/// Sends a command; the device's answer.
fn command(rig: &mut Rig<Net>, queue: u16, bytes: &[u8]) -> u8 {
    let used = rig.request(queue, &[Buffer::Out(bytes.to_vec()), Buffer::In(1)]);
    assert_eq!(used.written, 1);
    used.bytes[0]
}

#[test]
fn commands_are_answered() {
    let (mut rig, _handle, _peer) = active();
    assert_eq!(command(&mut rig, CONTROL, &[0, 0, 1]), control::OK);
    assert_eq!(command(&mut rig, CONTROL, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), control::OK);
    assert_eq!(
        command(&mut rig, CONTROL, &[4, 0, 1, 0]),
        control::ERROR,
        "there is one pair only"
    );
    assert_eq!(command(&mut rig, CONTROL, &[77, 0]), control::ERROR);
    let used = rig.request(
        CONTROL,
        &[
            Buffer::Out(vec![0]),
            Buffer::Out(vec![0]),
            Buffer::Out(vec![1]),
            Buffer::In(1),
        ],
    );
    assert_eq!(used.bytes, [control::OK], "in whatever pieces");
    assert!(rig.bench.interrupts(CONTROL) > 0);
}

#[test]
fn the_driver_sets_the_address_until_it_is_reset() {
    let (mut rig, handle, _peer) = active();
    assert_eq!(command(&mut rig, CONTROL, &[1, 1, 6, 5, 4, 3, 2, 1]), control::OK);
    assert_eq!(rig.bench.config()[..6], [6, 5, 4, 3, 2, 1]);
    assert_eq!(handle.info().mac, [6, 5, 4, 3, 2, 1]);
    assert_eq!(
        command(&mut rig, CONTROL, &[1, 1, 7, 5, 4, 3, 2, 1]),
        control::ERROR,
        "a group's"
    );
    rig.reset();
    assert_eq!(rig.bench.config()[..6], MAC);
    assert_eq!(handle.info().mac, MAC);
}

#[test]
fn commands_whose_feature_was_not_accepted_are_refused() {
    let (net, _handle, _peer) = net();
    let mut rig = Rig::new(net);
    rig.activate(!(features::CTRL_RX | features::CTRL_MAC_ADDR)).unwrap();
    assert_eq!(command(&mut rig, CONTROL, &[0, 0, 1]), control::ERROR);
    assert_eq!(command(&mut rig, CONTROL, &[1, 1, 6, 5, 4, 3, 2, 1]), control::ERROR);
}

#[test]
fn many_commands_at_once_are_answered() {
    let (mut rig, _handle, _peer) = active();
    for _ in 0..85 {
        rig.add(CONTROL, &[Buffer::Out(vec![0, 0, 1]), Buffer::In(1)]);
    }
    rig.kick(CONTROL);
    let answers = given_back(&mut rig, CONTROL);
    assert!(answers.len() == 85 && answers.iter().all(|used| used.bytes == [control::OK]));
}
