//! The link: plugged in and out, and a host side that goes away.

use super::*;

#[test]
fn the_driver_is_told_of_the_link() {
    let (mut rig, handle, _peer) = active();
    handle.set_link(false);
    rig.settle().unwrap();
    assert_eq!(rig.bench.config()[6..8], [0, 0]);
    assert_eq!(rig.bench.config_changes(), 1);
    assert!(!handle.info().link_up);
    handle.set_link(false);
    rig.settle().unwrap();
    assert_eq!(rig.bench.config_changes(), 0, "nothing changed");
    handle.set_link(true);
    rig.settle().unwrap();
    assert_eq!(rig.bench.config()[6..8], [1, 0]);
    assert_eq!(rig.bench.config_changes(), 1);
}

#[test]
fn a_link_that_is_down_drops_frames_of_both_directions() {
    let (net, handle, mut peer) = with(|config| config.link_up = false);
    assert_eq!(net.config().bytes[6..8], [0, 0]);
    let mut rig = Rig::active(net);
    give(&mut rig, 4, 2048);
    for n in 0..100 {
        peer.send(&frame(n, 60));
        rig.add(TX, &packet(&frame(n, 60)));
    }
    rig.kick(TX);
    assert_eq!(given_back(&mut rig, TX).len(), 100);
    assert_eq!(rig.used(RX), None);
    assert_eq!(peer.receive(), None);
    assert_eq!(
        (handle.stats().received.dropped, handle.stats().sent.dropped),
        (100, 100)
    );
    handle.set_link(true);
    rig.settle().unwrap();
    peer.send(&frame(1, 60));
    rig.add(TX, &packet(&frame(2, 60)));
    rig.kick(TX);
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, 60)]);
    assert_eq!(peer.receive().unwrap(), frame(2, 60));
}

#[test]
fn a_frame_that_waits_goes_with_the_link() {
    let (mut rig, handle, mut peer) = active();
    give(&mut rig, 1, 128);
    peer.send(&frame(1, 400));
    rig.settle().unwrap();
    handle.set_link(false);
    rig.settle().unwrap();
    handle.set_link(true);
    rig.settle().unwrap();
    give(&mut rig, 1, 128);
    peer.send(&frame(2, 60));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(2, 60)]);
    assert_eq!(handle.stats().received.dropped, 1);
}

#[test]
fn a_host_side_that_goes_away_is_reported() {
    let (mut rig, handle, mut peer) = active();
    give(&mut rig, 4, 2048);
    peer.send(&frame(1, 60));
    drop(peer);
    rig.settle().unwrap();
    assert_eq!(
        merged(given_back(&mut rig, RX)),
        [frame(1, 60)],
        "what came before arrives"
    );
    let lost = DeviceEvent::BackendLost {
        device: "device".into(),
        reason: "its socket was closed".into(),
    };
    assert_eq!(rig.reports(), [lost]);
    assert_eq!(rig.bench.config()[6..8], [0, 0]);
    handle.set_link(true);
    rig.settle().unwrap();
    assert!(!handle.info().link_up, "there is nothing to plug it into");
    for n in 0..200 {
        rig.add(TX, &packet(&frame(n, 60)));
    }
    rig.kick(TX);
    assert_eq!(given_back(&mut rig, TX).len(), 200, "the guest does not stall");
    assert_eq!(rig.reports(), []);
    rig.reset();
    rig.activate(u64::MAX).unwrap();
    give(&mut rig, 1, 2048);
}

#[test]
fn a_host_side_that_goes_away_is_found_by_sending() {
    let (mut rig, handle, peer) = active();
    drop(peer);
    for n in 0..200 {
        rig.add(TX, &packet(&frame(n, 60)));
    }
    rig.kick(TX);
    assert_eq!(given_back(&mut rig, TX).len(), 200);
    assert_eq!(rig.reports().len(), 1);
    assert!(!handle.info().link_up);
}

#[test]
fn a_host_side_that_goes_away_is_found_without_room_for_what_it_sent() {
    let (mut rig, handle, mut peer) = active();
    peer.send(&frame(1, 60));
    rig.settle().unwrap();
    drop(peer);
    rig.settle().unwrap();
    assert_eq!(rig.reports().len(), 1);
    assert!(!handle.info().link_up);
}

#[test]
fn a_host_side_that_goes_away_is_found_though_a_ring_is_broken() {
    let (net, handle, peer) = net();
    let mut rig = Rig::new(net);
    rig.activate(!crate::virtio::feature::EVENT_IDX).unwrap();
    rig.add(RX, &[Buffer::Out(vec![0; 20])]);
    drop(peer);
    assert!(matches!(rig.settle(), Err(Fault::Violation(_))));
    rig.activate(u64::MAX).unwrap();
    rig.settle().unwrap();
    assert_eq!(rig.reports().len(), 1);
    assert!(!handle.info().link_up);
}

#[test]
fn a_host_side_that_goes_away_is_found_while_the_device_rests() {
    let (net, handle, peer) = net();
    let mut rig = Rig::new(net);
    drop(peer);
    rig.settle().unwrap();
    assert_eq!(rig.reports().len(), 1);
    rig.activate(u64::MAX).unwrap();
    assert!(!handle.info().link_up);
}

#[test]
fn a_stream_out_of_step_counts_as_gone() {
    let (mut rig, _handle, mut peer) = active();
    give(&mut rig, 4, 2048);
    peer.0.write_all(&[0xff; 100]).unwrap();
    rig.settle().unwrap();
    let reports = rig.reports();
    let [DeviceEvent::BackendLost { reason, .. }] = &reports[..] else {
        panic!("{reports:?}");
    };
    assert!(reason.contains("4294967295 bytes was announced"), "{reason}");
}
