//! The device over a real tap: frames through the host's kernel, with and without offloads.

use std::net::UdpSocket;

use super::host::{self, GUEST, HOST, checksum_is_right, partial_checksum, udp_frame};
use super::*;

/// A UDP port of the kernel's side, and the guest's.
pub(super) const PORTS: [u16; 2] = [4000, 5000];

/// A device over a tap with `queues` queues, on a bench, and a socket of the kernel's; `None` where there is no privilege for it.
pub(super) fn tap(queues: usize) -> Option<(Rig<Net>, NetHandle, UdpSocket)> {
    let taps = host::tap(queues)?;
    let (net, handle) = Net::new(config(NetBackend::Tap(taps))).unwrap();
    let socket = UdpSocket::bind((HOST, PORTS[1])).unwrap();
    socket.connect((GUEST, PORTS[0])).unwrap();
    socket.set_nonblocking(true).unwrap();
    Some((Rig::new(net), handle, socket))
}

/// A transmit chain with this header.
fn with_header(header: [u8; HEADER], frame: &[u8]) -> Vec<Buffer> {
    vec![Buffer::Out(header.to_vec()), Buffer::Out(frame.to_vec())]
}

/// Waits for `count` frames with UDP in them on the receive queue `queue`, each with its header.
fn udp_frames(rig: &mut Rig<Net>, queue: u16, count: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut frames = Vec::new();
    while frames.len() < count {
        let used: Vec<Used> = given_back(rig, queue);
        if used.is_empty() {
            rig.wait().unwrap();
        }
        let mut used = used.into_iter();
        while let Some(first) = used.next() {
            let header = first.bytes[..HEADER].to_vec();
            let more = usize::from(header[10]) - 1;
            let chains = std::iter::once(first).chain(used.by_ref().take(more));
            let frame = merged(chains).remove(0);
            if host::is_udp(&frame) {
                frames.push((header, frame));
            }
        }
    }
    assert_eq!(frames.len(), count);
    frames
}

fn room(rig: &mut Rig<Net>, queue: u16) {
    for _ in 0..100 {
        rig.add(queue, &[Buffer::In(1536)]);
    }
    rig.kick(queue);
}

#[test]
fn frames_pass_through_the_kernel() {
    host::alone(|| {
        let Some((mut rig, handle, socket)) = tap(1) else {
            return;
        };
        assert!(rig.device.features() & features::TAP_OFFLOADS == features::TAP_OFFLOADS);
        rig.activate(u64::MAX).unwrap();
        room(&mut rig, RX);
        rig.add(TX, &packet(&udp_frame(PORTS, b"from the guest", 0)));
        rig.kick(TX);
        let mut got = [0; 100];
        let len = socket.recv(&mut got).unwrap();
        assert_eq!(&got[..len], b"from the guest");
        socket.send(b"from the kernel").unwrap();
        let frames = udp_frames(&mut rig, RX, 1);
        assert!(frames[0].1.ends_with(b"from the kernel"));
        assert_eq!(frames[0].1[..6], MAC);
        assert!(handle.stats().received.frames >= 1);
        assert_eq!(handle.stats().sent.frames, 1);
    });
}

#[test]
fn checksums_are_left_to_the_other_side_if_the_driver_agreed() {
    host::alone(|| {
        let Some((mut rig, _handle, socket)) = tap(1) else {
            return;
        };
        rig.activate(!(features::CSUM | features::GUEST_CSUM)).unwrap();
        room(&mut rig, RX);
        socket.send(b"payload").unwrap();
        let (header, frame) = udp_frames(&mut rig, RX, 1).remove(0);
        assert_eq!(header[0], 0);
        assert!(checksum_is_right(&frame), "the kernel completed it");

        rig.reset();
        rig.activate(u64::MAX).unwrap();
        room(&mut rig, RX);
        socket.send(b"payload").unwrap();
        let (header, frame) = udp_frames(&mut rig, RX, 1).remove(0);
        assert_eq!(header[..1], [1], "VIRTIO_NET_HDR_F_NEEDS_CSUM");
        assert_eq!(header[6..10], [34, 0, 6, 0]);
        assert!(!checksum_is_right(&frame));

        let frame = udp_frame(PORTS, b"partial", partial_checksum(GUEST, HOST, 7));
        rig.add(TX, &with_header([1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &frame));
        rig.kick(TX);
        let mut got = [0; 100];
        assert_eq!(socket.recv(&mut got).unwrap(), 7);
    });
}

#[test]
fn segmentation_is_left_to_the_host() {
    host::alone(|| {
        let Some((mut rig, handle, socket)) = tap(1) else {
            return;
        };
        if rig.device.features() & features::TAP_USO == 0 {
            eprintln!("skipped: this kernel has no segmentation of UDP for taps");
            return;
        }
        rig.activate(u64::MAX).unwrap();
        let payload = frame(1, 5000);
        let whole = udp_frame(PORTS, &payload, partial_checksum(GUEST, HOST, payload.len()));
        // NEEDS_CSUM, UDP_L4, headers of 42 bytes, segments of 1000.
        let header = [1, 5, 42, 0, 0xe8, 3, 34, 0, 6, 0, 0, 0];
        rig.add(TX, &with_header(header, &whole));
        rig.kick(TX);
        let mut got = [0; 2000];
        for part in payload.chunks(1000) {
            let len = socket.recv(&mut got).unwrap();
            assert_eq!(&got[..len], part);
        }
        assert_eq!(handle.stats().sent.frames, 1);
    });
}

/// Has the kernel send 5000 bytes in segments of 1000, or leave that to the tap.
fn send_segments(socket: &UdpSocket) {
    host::set_segments(socket, 1000);
    socket.send(&frame(3, 5000)).unwrap();
}

#[test]
fn long_frames_come_to_drivers_that_take_them() {
    host::alone(|| {
        let Some((mut rig, _handle, socket)) = tap(1) else {
            return;
        };
        if rig.device.features() & features::TAP_USO == 0 {
            eprintln!("skipped: this kernel has no segmentation of UDP for taps");
            return;
        }
        rig.activate(u64::MAX).unwrap();
        room(&mut rig, RX);
        send_segments(&socket);
        let (header, whole) = udp_frames(&mut rig, RX, 1).remove(0);
        assert_eq!(header[1], 5, "UDP_L4");
        assert_eq!(header[10], 4, "5054 bytes over four buffers");
        assert_eq!(whole[42..], frame(3, 5000));

        // The driver changes its mind while it runs: checksums only.
        let command = [&[5, 0][..], &features::GUEST_CSUM.to_le_bytes()].concat();
        let answer = rig.request(CONTROL, &[Buffer::Out(command), Buffer::In(1)]);
        assert_eq!(answer.bytes, [control::OK]);
        send_segments(&socket);
        let parts = udp_frames(&mut rig, RX, 5);
        let bytes: Vec<u8> = parts.iter().flat_map(|(_, frame)| frame[42..].to_vec()).collect();
        assert_eq!(bytes, frame(3, 5000));

        // Without merging, one long buffer holds it.
        rig.reset();
        rig.activate(!features::MRG_RXBUF).unwrap();
        rig.add(RX, &[Buffer::In(12), Buffer::In(65550)]);
        rig.kick(RX);
        send_segments(&socket);
        let (header, whole) = udp_frames(&mut rig, RX, 1).remove(0);
        assert_eq!((header[1], header[10]), (5, 1));
        assert_eq!(whole[42..], frame(3, 5000));
    });
}

#[test]
fn several_queue_pairs_share_the_work() {
    host::alone(|| {
        let Some((mut rig, handle, socket)) = tap(3) else {
            return;
        };
        assert_eq!(rig.bench.config()[8..10], [3, 0]);
        assert_eq!(handle.info().queue_pairs, 3);
        // Without VIRTIO_NET_F_MQ, all comes to the first pair, and the control queue follows it.
        rig.activate(!features::MQ).unwrap();
        room(&mut rig, RX);
        let sockets: Vec<UdpSocket> = (0..32)
            .map(|_| {
                let socket = UdpSocket::bind((HOST, 0)).unwrap();
                socket.connect((GUEST, PORTS[0])).unwrap();
                socket
            })
            .collect();
        sockets
            .iter()
            .for_each(|socket| assert_eq!(socket.send(b"x").unwrap(), 1));
        assert_eq!(udp_frames(&mut rig, RX, 32).len(), 32);
        let answer = rig.request(CONTROL, &[Buffer::Out(vec![0, 0, 1]), Buffer::In(1)]);
        assert_eq!(answer.bytes, [control::OK]);

        // With it, the driver says how many it uses.
        rig.reset();
        rig.activate(u64::MAX).unwrap();
        let control = 6;
        for pairs in [4u8, 0] {
            let answer = rig.request(control, &[Buffer::Out(vec![4, 0, pairs, 0]), Buffer::In(1)]);
            assert_eq!(answer.bytes, [control::ERROR]);
        }
        let answer = rig.request(control, &[Buffer::Out(vec![4, 0, 3, 0]), Buffer::In(1)]);
        assert_eq!(answer.bytes, [control::OK]);
        (0..3).for_each(|pair| room(&mut rig, 2 * pair));
        for pair in 0..3 {
            let message = [b'a' + pair as u8; 10];
            rig.add(2 * pair + 1, &packet(&udp_frame(PORTS, &message, 0)));
            rig.kick(2 * pair + 1);
            let mut got = [0; 100];
            let len = socket.recv(&mut got).unwrap();
            assert_eq!(got[..len], message);
        }
        // A flow comes back by the queue that it last went out by.
        socket.send(b"back").unwrap();
        let frames = udp_frames(&mut rig, 4, 1);
        assert!(frames[0].1.ends_with(b"back"));
    });
}

#[test]
fn a_tap_that_is_down_or_deleted_does_not_stall_the_guest() {
    host::alone(|| {
        let Some((mut rig, handle, _socket)) = tap(1) else {
            return;
        };
        rig.activate(u64::MAX).unwrap();
        room(&mut rig, RX);
        host::set_up(false);
        rig.add(TX, &packet(&udp_frame(PORTS, b"lost", 0)));
        rig.kick(TX);
        assert_eq!(given_back(&mut rig, TX).len(), 1);
        assert_eq!(handle.stats().sent.errors, 1);
        assert!(handle.info().link_up, "it may come up again");
        host::set_up(true);
        rig.add(TX, &packet(&udp_frame(PORTS, b"not lost", 0)));
        rig.kick(TX);
        assert_eq!(handle.stats().sent.frames, 1);

        host::delete();
        rig.settle().unwrap();
        rig.add(TX, &packet(&udp_frame(PORTS, b"lost", 0)));
        rig.kick(TX);
        assert_eq!(given_back(&mut rig, TX).len(), 2);
        assert!(matches!(&rig.reports()[..], [DeviceEvent::BackendLost { .. }]));
        assert!(!handle.info().link_up);
        rig.reset();
        rig.activate(u64::MAX).unwrap();
    });
}

#[test]
fn a_frame_that_the_kernel_refuses_is_counted() {
    host::alone(|| {
        let Some((mut rig, handle, _socket)) = tap(1) else {
            return;
        };
        rig.activate(u64::MAX).unwrap();
        // A frame that says that it is TCP over IPv4, and is not.
        rig.add(
            TX,
            &with_header([1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0, 0, 0], &frame(1, 3000)),
        );
        rig.kick(TX);
        assert_eq!(given_back(&mut rig, TX).len(), 1);
        let sent = handle.stats().sent;
        assert_eq!(sent.frames + sent.errors, 1);
    });
}

#[test]
fn descriptors_that_are_not_one_tap_are_refused() {
    host::alone(|| {
        let Some(mut taps) = host::tap(1) else {
            return;
        };
        let twice = vec![taps[0].try_clone().unwrap(), taps.remove(0)];
        let error = Net::new(config(NetBackend::Tap(twice))).err().unwrap();
        assert_eq!(
            error.to_string(),
            "descriptor 0 of the tap was opened without IFF_MULTI_QUEUE, which several queue pairs need"
        );
    });
}
