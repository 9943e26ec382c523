//! Frames from the driver to the host.

use super::*;

#[test]
fn frames_go_out_in_order() {
    let (mut rig, handle, mut peer) = active();
    for n in 0..100 {
        rig.add(TX, &packet(&frame(n, 60 + 13 * usize::from(n))));
    }
    rig.kick(TX);
    for n in 0..100 {
        assert_eq!(peer.receive().unwrap(), frame(n, 60 + 13 * usize::from(n)));
    }
    let used = given_back(&mut rig, TX);
    assert_eq!(used.len(), 100);
    assert!(used.iter().all(|used| used.written == 0));
    assert_eq!(rig.bench.interrupts(TX), 1, "the driver wanted to be told of the first");
    assert_eq!((handle.stats().sent.frames, handle.stats().sent.errors), (100, 0));
}

#[test]
fn a_frame_may_lie_in_pieces() {
    let (mut rig, _handle, mut peer) = active();
    let whole = [&[0; HEADER][..], &frame(1, 300)].concat();
    let pieces = [&whole[..3], &[], &whole[3..13], &whole[13..14], &whole[14..]];
    rig.add(TX, &pieces.map(|piece| Buffer::Out(piece.to_vec())));
    rig.kick(TX);
    assert_eq!(peer.receive().unwrap(), frame(1, 300));
}

#[test]
fn what_is_no_frame_is_dropped_and_counted() {
    let (mut rig, handle, mut peer) = active();
    let with_header = |header: [u8; HEADER], len| vec![Buffer::Out([&header[..], &frame(1, len)].concat())];
    // Too short; no Ethernet header; too long; with a checksum, or segmentation, that was not accepted.
    rig.add(TX, &packet(&[]));
    rig.add(TX, &packet(&frame(1, 13)));
    rig.add(TX, &packet(&frame(1, 65555)));
    rig.add(TX, &with_header([1, 0, 0, 0, 0, 0, 14, 0, 6, 0, 0, 0], 60));
    rig.add(TX, &with_header([1, 1, 54, 0, 0x78, 5, 34, 0, 16, 0, 0, 0], 3000));
    rig.add(TX, &packet(&frame(2, 60)));
    rig.kick(TX);
    assert_eq!(peer.receive().unwrap(), frame(2, 60));
    assert_eq!(peer.receive(), None);
    assert_eq!(given_back(&mut rig, TX).len(), 6);
    assert_eq!((handle.stats().sent.frames, handle.stats().sent.errors), (1, 5));
}

#[test]
fn packets_for_the_hosts_loopback_do_not_leave() {
    let (mut rig, handle, mut peer) = active();
    let mut loopback = frame(1, 60);
    loopback[12..14].copy_from_slice(&[8, 0]);
    loopback[30..34].copy_from_slice(&[127, 0, 0, 1]);
    rig.add(TX, &packet(&frame(2, 60)));
    rig.add(TX, &packet(&loopback));
    rig.add(TX, &packet(&frame(3, 60)));
    rig.kick(TX);
    assert_eq!(
        [peer.receive(), peer.receive(), peer.receive()],
        [Some(frame(2, 60)), Some(frame(3, 60)), None]
    );
    assert_eq!((handle.stats().sent.frames, handle.stats().sent.errors), (2, 1));
}

/// Sends until the peer's socket takes no more; returns how many frames were made available.
fn fill(rig: &mut Rig<Net>) -> u32 {
    let mut count = 0;
    loop {
        rig.add(TX, &packet(&frame(count as u8, 1500)));
        count += 1;
        rig.kick(TX);
        if given_back(rig, TX).is_empty() {
            return count;
        }
    }
}

#[test]
fn frames_wait_for_a_host_that_is_slow() {
    let (mut rig, handle, mut peer) = active();
    let sent = fill(&mut rig);
    let mut got = 0;
    while got < sent {
        match peer.receive() {
            Some(bytes) => {
                assert_eq!(bytes, frame(got as u8, 1500));
                got += 1;
            }
            None => rig.wait().unwrap(),
        }
    }
    rig.settle().unwrap();
    assert_eq!(handle.stats().sent.dropped, 0);
    rig.add(TX, &packet(&frame(9, 60)));
    rig.kick(TX);
    assert_eq!(peer.receive().unwrap(), frame(9, 60));
}

#[test]
fn frames_for_a_host_that_takes_none_are_dropped_in_the_end() {
    let (mut rig, handle, mut peer) = active();
    let sent = fill(&mut rig);
    // The next event is the timer's: the host does not read.
    while handle.stats().sent.dropped == 0 {
        rig.wait().unwrap();
    }
    assert_eq!(given_back(&mut rig, TX).len(), 1);
    for n in 0..200 {
        rig.add(TX, &packet(&frame(n, 60)));
    }
    rig.kick(TX);
    assert_eq!(given_back(&mut rig, TX).len(), 200, "the guest does not stall");
    assert_eq!(handle.stats().sent.dropped, 201);
    // Once the host reads, it gets what was sent before, whole, and what is sent from now on.
    let mut got = 0;
    loop {
        rig.settle().unwrap();
        match peer.receive() {
            Some(bytes) => {
                assert_eq!(bytes, frame(got as u8, 1500));
                got += 1;
            }
            None => break,
        }
    }
    assert_eq!(got, sent - 1);
    rig.add(TX, &packet(&frame(7, 60)));
    rig.kick(TX);
    assert_eq!(peer.receive().unwrap(), frame(7, 60));
}

#[test]
fn a_reset_leaves_the_stream_whole() {
    let (mut rig, _handle, mut peer) = active();
    let sent = fill(&mut rig);
    rig.reset();
    rig.activate(u64::MAX).unwrap();
    let mut got = 0;
    loop {
        rig.settle().unwrap();
        match peer.receive() {
            Some(bytes) => {
                assert_eq!(bytes, frame(got as u8, 1500));
                got += 1;
            }
            None => break,
        }
    }
    assert_eq!(got, sent - 1, "the frame that was not taken went with the driver");
    rig.add(TX, &packet(&frame(7, 60)));
    rig.kick(TX);
    assert_eq!(peer.receive().unwrap(), frame(7, 60));
}

#[test]
fn indices_wrap_around() {
    let (mut rig, _handle, mut peer) = active();
    for n in 0..70_000u32 {
        rig.add(TX, &packet(&frame(n as u8, 40)));
        rig.kick(TX);
        assert_eq!(peer.receive().unwrap(), frame(n as u8, 40));
        assert!(rig.used(TX).is_some());
    }
}

#[test]
fn a_driver_that_keeps_sending_leaves_others_their_turn() {
    let (net, _handle, mut peer) = net();
    let mut rig = Rig::new(net);
    rig.activate(u64::MAX).unwrap();
    for n in 0..200 {
        rig.add(TX, &packet(&frame(n, 60)));
    }
    rig.call(|device, context| device.notify(TX, context)).unwrap();
    assert_eq!(given_back(&mut rig, TX).len(), 64, "a turn's frames");
    rig.settle().unwrap();
    assert_eq!(
        given_back(&mut rig, TX).len(),
        136,
        "the queue rang itself for the rest"
    );
    assert!((0..200).all(|n| peer.receive().unwrap() == frame(n, 60)));
}

#[test]
fn the_rate_limit_holds_frames_back() {
    let (net, handle, mut peer) = with(|config| {
        config.send_limit = RateLimit {
            bytes_per_second: 10_000,
            burst_bytes: 200,
            ..RateLimit::default()
        };
    });
    let mut rig = Rig::active(net);
    for n in 0..5 {
        rig.add(TX, &packet(&frame(n, 100)));
    }
    rig.kick(TX);
    let mut frames = Vec::new();
    while frames.len() < 5 {
        match peer.receive() {
            Some(frame) => frames.push(frame),
            None => rig.wait().unwrap(),
        }
    }
    assert_eq!(frames, [0, 1, 2, 3, 4].map(|n| frame(n, 100)));
    assert_eq!((handle.stats().sent.frames, handle.stats().sent.dropped), (5, 0));
}
