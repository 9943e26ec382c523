//! Credit, and many bytes.

use event_manager::EventSet;

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::vsock::credit::WINDOW;
use crate::virtio::vsock::device::token;

#[test]
fn a_guest_without_room_gets_no_bytes_until_it_has_some() {
    let mut guest = Guest::new();
    guest.buf_alloc = 1000;
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    socket.write_all(&pattern(0, 2500)).unwrap();
    assert_eq!(guest.data(ports, 1000), pattern(0, 1000));
    guest.expect(ports, Op::CreditRequest);
    guest.expect_nothing();
    guest.send(ports, Op::CreditUpdate);
    guest.expect_nothing();
    guest.fwd_cnt = 400;
    guest.send(ports, Op::CreditUpdate);
    assert_eq!(guest.data(ports, 400), pattern(1000, 400));
    guest.expect(ports, Op::CreditRequest);
    // Credit comes in any packet.
    guest.fwd_cnt = 1400;
    guest.buf_alloc = 10_000;
    guest.send_data(ports, b"x");
    assert_eq!(guest.data(ports, 1100), pattern(1400, 1100));
}

#[test]
fn a_guest_that_lies_about_its_room_only_stalls_its_connection() {
    let mut guest = Guest::new();
    guest.fwd_cnt = 77;
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    socket.write_all(b"never").unwrap();
    guest.expect(ports, Op::CreditRequest);
    guest.expect_nothing();
    guest.fwd_cnt = 0;
    let mut other = guest.connected_by_guest((1, 3));
    other.write_all(b"fine").unwrap();
    assert_eq!(guest.data((1, 3), 4), b"fine");
}

/// Sends as long as there is credit, while nobody reads: how much it was.
fn exhaust(guest: &mut Guest, ports: Ports) -> usize {
    let mut room = *WINDOW.end() as usize;
    let mut sent = 0;
    while room > 0 {
        let count = room.min(5000);
        guest.send_data(ports, &pattern(sent, count));
        sent += count;
        guest.send(ports, Op::CreditRequest);
        guest.settle();
        for (header, _) in guest.packets.drain(..) {
            assert_eq!(Op::new(header.op), Some(Op::CreditUpdate));
            room = header.buf_alloc as usize - (sent - header.fwd_cnt as usize);
        }
    }
    sent
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_no_other_connection() {
    let mut guest = Guest::new();
    let slow = (1, 2);
    let mut socket = guest.connected_by_guest(slow);
    let sent = exhaust(&mut guest, slow);
    // The socket's own room, and the window.
    assert!(sent > *WINDOW.end() as usize, "{sent}");
    let mut other = guest.connected_by_guest((1, 3));
    guest.send_data((1, 3), b"fine");
    assert_eq!(read_now(&mut other, 10).unwrap(), b"fine");
    let mut read = Vec::new();
    while read.len() < sent {
        match read_now(&mut socket, 65536) {
            Ok(bytes) => read.extend(bytes),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        guest.settle();
    }
    assert!(read == pattern(0, sent));
    // The guest was told without having to ask.
    let updates = std::mem::take(&mut guest.packets);
    assert!(!updates.is_empty());
    assert!(
        updates
            .iter()
            .all(|(header, _)| Op::new(header.op) == Some(Op::CreditUpdate))
    );
    let (last, _) = updates.back().unwrap();
    assert!(sent - last.fwd_cnt as usize <= *WINDOW.end() as usize / 2);
}

#[test]
fn more_than_the_credit_costs_the_connection() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    // The host reads nothing, and the guest does not care.
    let mut sent = 0;
    let reset = loop {
        guest.send_data(ports, &pattern(sent, 60_000));
        sent += 60_000;
        guest.settle();
        let reset = guest
            .packets
            .iter()
            .any(|(header, _)| Op::new(header.op) == Some(Op::Reset));
        if reset || sent > 4 << 20 {
            break reset;
        }
    };
    assert!(reset);
    // What came before that still arrives, in order.
    let mut read = Vec::new();
    loop {
        match read_now(&mut socket, 65536) {
            Ok(bytes) if bytes.is_empty() => break,
            Ok(bytes) => read.extend(bytes),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        guest.settle();
    }
    assert!(read == pattern(0, sent - 60_000));
}

#[test]
fn megabytes_to_the_guest_arrive_in_order() {
    const TOTAL: usize = 5 << 20;
    let mut guest = Guest::new();
    guest.buf_alloc = 256 * 1024;
    let (ports, mut socket) = guest.connected_by_host(2);
    let mut written = 0;
    let mut read = Vec::new();
    while read.len() < TOTAL {
        written += fill(&mut socket, written, TOTAL - written);
        guest.settle();
        for (header, payload) in std::mem::take(&mut guest.packets) {
            if Op::new(header.op) == Some(Op::Data) {
                assert!(payload.len() <= ROOM);
                read.extend(payload);
            }
        }
        assert!(read.len() - guest.fwd_cnt as usize <= guest.buf_alloc as usize);
        guest.fwd_cnt = read.len() as u32;
        guest.send(ports, Op::CreditUpdate);
    }
    assert!(read == pattern(0, TOTAL));
}

#[test]
fn megabytes_to_the_host_arrive_in_order() {
    for layout in [Layout::One, Layout::Two, Layout::Pieces(32768), Layout::Pieces(4096)] {
        send_megabytes(layout);
    }
}

/// In packets of up to 64 KiB, which is more than a piece.
fn send_megabytes(layout: Layout) {
    const TOTAL: usize = 5 << 20;
    let mut guest = Guest::new();
    guest.layout = layout;
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    let mut read = Vec::new();
    let (mut sent, mut room) = (0, *WINDOW.end() as usize);
    while read.len() < TOTAL {
        let count = room.min(TOTAL - sent).min(65536);
        if count > 0 {
            guest.send_data(ports, &pattern(sent, count));
            sent += count;
        }
        match read_now(&mut socket, 1 << 20) {
            Ok(bytes) => read.extend(bytes),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        guest.send(ports, Op::CreditRequest);
        guest.settle();
        for (header, _) in guest.packets.drain(..) {
            room = header.buf_alloc as usize - (sent - header.fwd_cnt as usize);
        }
    }
    assert!(read == pattern(0, TOTAL));
}

#[test]
fn the_counters_wrap_around_in_both_directions() {
    let mut guest = Guest::new();
    guest.buf_alloc = 100_000;
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    let start = u32::MAX - 25_000;
    let entry = guest.rig.device.table.get(0).unwrap();
    entry.connection = entry.connection.clone().after(start);
    guest.fwd_cnt = start;
    guest.send(ports, Op::CreditRequest);
    assert_eq!(guest.expect(ports, Op::CreditUpdate).fwd_cnt, start);
    for n in 0..10usize {
        let bytes = pattern(n * 6000, 6000);
        guest.send_data(ports, &bytes);
        assert_eq!(read_now(&mut socket, 10_000).unwrap(), bytes);
        socket.set_nonblocking(false).unwrap();
        socket.write_all(&bytes).unwrap();
        let count = 6000 * (n as u32 + 1);
        let got = guest.data(ports, 6000);
        assert_eq!(got, bytes);
        guest.fwd_cnt = start.wrapping_add(count);
        guest.send(ports, Op::CreditRequest);
        assert_eq!(guest.expect(ports, Op::CreditUpdate).fwd_cnt, start.wrapping_add(count));
    }
    assert!(guest.fwd_cnt < start);
}

#[test]
fn without_buffers_everything_waits_and_nothing_is_lost() {
    let (device, handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
    let mut guest = Guest::resting(Rig::active(device), handle);
    let (_listener, sockets) = guest.listen(1);
    guest.send((1, 2), Op::Request);
    guest.send((9, 9), Op::Data);
    let (_, mut socket) = sockets.recv().unwrap();
    socket.write_all(&pattern(0, 10_000)).unwrap();
    guest.rig.settle().unwrap();
    for _ in 0..5 {
        guest.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
    }
    guest.rig.kick(RECEIVE);
    let mut packets: Vec<_> = (0..2).map(|_| guest.packet().0).collect();
    packets.sort_by_key(|header| header.src_port);
    assert_eq!((packets[0].src_port, Op::new(packets[0].op)), (1, Some(Op::Response)));
    assert_eq!((packets[1].src_port, Op::new(packets[1].op)), (9, Some(Op::Reset)));
    assert_eq!(guest.data((1, 2), 10_000), pattern(0, 10_000));
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    guest.buf_alloc = 1 << 30;
    let mut sockets: Vec<_> = (0..4).map(|n| guest.connected_by_guest((1, 10 + n))).collect();
    for socket in &mut sockets {
        fill(socket, 0, usize::MAX);
    }
    // Nobody takes anything out of the receive queue: what fits into it is shared.
    guest.rig.settle().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    while let Some(used) = guest.rig.used(RECEIVE) {
        let header = Header::parse(used.bytes[..Header::BYTES].try_into().unwrap());
        seen.insert(header.dst_port);
    }
    assert!(seen.len() > 1, "{seen:?}");
}

#[test]
fn a_read_that_finds_nothing_does_not_swallow_what_the_guest_has_to_be_told() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    let sent = exhaust(&mut guest, ports);
    assert!(!read_now(&mut socket, 1 << 20).unwrap().is_empty());
    let watched = token(guest.rig.device.table.get(0).unwrap().id());
    // The socket has room again, and is said to have bytes.
    let events = EventSet::IN | EventSet::OUT;
    guest
        .rig
        .call(|device, context| device.ready(watched, events, context))
        .unwrap();
    let told = guest.expect(ports, Op::CreditUpdate);
    assert!(sent - (told.fwd_cnt as usize) < *WINDOW.end() as usize);
}
