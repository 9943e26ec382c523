//! What a tap can say and refuse, without one: headers of both directions, several queues, and a host that is slow.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::*;

/// The host's ends of the queues.
struct Host(Vec<OwnedFd>);

impl Host {
    fn send(&self, queue: usize, header: [u8; HEADER], frame: &[u8]) {
        let packet = [&header[..], frame].concat();
        send(&self.0[queue], &packet, SendFlags::empty()).unwrap();
    }

    /// The next packet, if there is one: its header and its frame.
    fn receive(&self, queue: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut packet = vec![0; 70_000];
        let (_, len) = recv(&self.0[queue], &mut packet[..], RecvFlags::DONTWAIT).ok()?;
        packet.truncate(len);
        let frame = packet.split_off(HEADER);
        Some((packet, frame))
    }
}

fn device(queues: usize) -> (Rig<Net>, NetHandle, Host) {
    let pair = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    let (near, far) = (0..queues).map(|_| pair()).unzip();
    let (net, handle) = Net::new(config(NetBackend::Packets(near))).unwrap();
    (Rig::new(net), handle, Host(far))
}

/// NEEDS_CSUM, TCP over IPv4, headers of 54 bytes, segments of 1448.
const TSO: [u8; HEADER] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

#[test]
fn the_drivers_header_reaches_the_host() {
    let (mut rig, handle, host) = device(1);
    rig.activate(u64::MAX).unwrap();
    rig.add(TX, &[Buffer::Out([&TSO[..], &frame(1, 60_000)].concat())]);
    rig.kick(TX);
    assert_eq!(host.receive(0).unwrap(), (TSO.to_vec(), frame(1, 60_000)));
    assert_eq!(handle.stats().sent.bytes, 60_000);
    rig.reset();
    rig.activate(!features::HOST_TSO4).unwrap();
    rig.add(TX, &[Buffer::Out([&TSO[..], &frame(1, 60_000)].concat())]);
    rig.kick(TX);
    assert_eq!(host.receive(0), None, "the driver did not say that it would");
    assert_eq!(handle.stats().sent.errors, 1);
}

#[test]
fn the_hosts_header_reaches_the_driver() {
    let (mut rig, _handle, host) = device(1);
    rig.activate(u64::MAX).unwrap();
    give(&mut rig, 40, 1536);
    host.send(0, TSO, &frame(1, 50_000));
    rig.settle().unwrap();
    let used = given_back(&mut rig, RX);
    let mut header = TSO;
    header[10] = 33;
    assert_eq!(used[0].bytes[..HEADER], header, "50012 bytes in buffers of 1536");
    assert_eq!(merged(used), [frame(1, 50_000)]);
}

#[test]
fn long_frames_come_whole_whether_others_came_before_or_not() {
    let (mut rig, handle, host) = device(1);
    rig.activate(u64::MAX).unwrap();
    for n in 0..200u8 {
        // Expected after another long one, and unexpected at first and after many short ones.
        let (header, len) = if matches!(n, 0 | 1 | 20 | 120 | 199) {
            (TSO, 20_000 + usize::from(n))
        } else {
            ([0; HEADER], 60 + usize::from(n))
        };
        give(&mut rig, if header == TSO { 14 } else { 1 }, 1536);
        host.send(0, header, &frame(n, len));
        rig.settle().unwrap();
        assert_eq!(merged(given_back(&mut rig, RX)), [frame(n, len)], "frame {n}");
    }
    let received = handle.stats().received;
    assert_eq!((received.frames, received.dropped, received.errors), (200, 0, 0));
}

#[test]
fn a_long_frame_waits_for_buffers_too() {
    let (mut rig, _handle, host) = device(1);
    rig.activate(u64::MAX).unwrap();
    give(&mut rig, 10, 1536);
    host.send(0, TSO, &frame(1, 50_000));
    rig.settle().unwrap();
    assert_eq!(rig.used(RX), None);
    give(&mut rig, 30, 1536);
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(1, 50_000)]);
}

#[test]
fn frames_that_are_longer_than_the_mtu_have_to_be_unsegmented() {
    let (mut rig, handle, host) = device(1);
    rig.activate(u64::MAX).unwrap();
    give(&mut rig, 40, 1536);
    host.send(0, [0; HEADER], &frame(1, 1519));
    host.send(0, [0; HEADER], &frame(2, 1518));
    rig.settle().unwrap();
    assert_eq!(merged(given_back(&mut rig, RX)), [frame(2, 1518)]);
    assert_eq!(handle.stats().received.errors, 1);
}

#[test]
fn queues_without_a_pair_of_their_own_are_served_by_the_active_ones() {
    let (mut rig, _handle, host) = device(3);
    rig.activate(u64::MAX).unwrap();
    (0..3).for_each(|pair| {
        rig.add(2 * pair, &[Buffer::In(2048)]);
        rig.add(2 * pair, &[Buffer::In(2048)]);
        rig.kick(2 * pair);
    });
    let to = |rig: &mut Rig<Net>, sent: usize, expected: u16| {
        host.send(sent, [0; HEADER], &frame(sent as u8, 60));
        rig.settle().unwrap();
        assert_eq!(merged(given_back(rig, expected)), [frame(sent as u8, 60)]);
    };
    to(&mut rig, 2, 0);
    let answer = rig.request(6, &[Buffer::Out(vec![4, 0, 2, 0]), Buffer::In(1)]);
    assert_eq!(answer.bytes, [control::OK]);
    to(&mut rig, 1, 2);
    to(&mut rig, 2, 0);
}

#[test]
fn frames_wait_for_a_host_that_is_slow() {
    let (mut rig, handle, host) = device(1);
    rig.activate(u64::MAX).unwrap();
    let mut sent = 0;
    loop {
        rig.add(TX, &packet(&frame(sent, 1500)));
        sent += 1;
        rig.kick(TX);
        if given_back(&mut rig, TX).is_empty() {
            break;
        }
    }
    for n in 0..sent {
        let got = host.receive(0).unwrap();
        assert_eq!(got.1, frame(n, 1500));
        rig.settle().unwrap();
    }
    assert_eq!(given_back(&mut rig, TX).len(), 1);
    assert_eq!(handle.stats().sent.dropped, 0);
}
