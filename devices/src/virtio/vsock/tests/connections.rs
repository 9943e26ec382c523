//! How connections come about and end.

use std::net::Shutdown;

use event_manager::EventSet;

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::vsock::packet::{NO_MORE_RECEIVING, NO_MORE_SENDING};

const BOTH: u32 = NO_MORE_RECEIVING | NO_MORE_SENDING;

#[test]
fn the_guest_is_told_its_context_id_and_reserved_ones_are_refused() {
    let (device, handle) = Vsock::new(VsockConfig::new(0x1_0203)).unwrap();
    let rig = Rig::active(device);
    assert_eq!(rig.bench.config(), [3, 2, 1, 0, 0, 0, 0, 0]);
    assert_eq!(handle.cid(), 0x1_0203);
    for cid in [0, 1, 2, 0xffff_ffff, 0x1_0000_0000, u64::MAX] {
        let error = Vsock::new(VsockConfig::new(cid)).err().unwrap().to_string();
        assert!(error.contains(&cid.to_string()), "{error}");
    }
    let none = VsockConfig {
        max_connections: 0,
        ..VsockConfig::new(3)
    };
    assert!(matches!(Vsock::new(none), Err(VsockError::Connections(0))));
}

#[test]
fn the_guest_connects_and_bytes_go_both_ways_in_any_layout() {
    for layout in [
        Layout::Two,
        Layout::One,
        Layout::Every(1),
        Layout::Every(7),
        Layout::Every(45),
        Layout::Pieces(1),
        Layout::Pieces(32768),
    ] {
        let mut guest = Guest::new();
        guest.layout = layout;
        let ports = (1234, 50_000);
        let mut socket = guest.connected_by_guest(ports);
        guest.send_data(ports, b"from the guest");
        assert_eq!(read_now(&mut socket, 100).unwrap(), b"from the guest");
        socket.write_all(b"from the host").unwrap();
        assert_eq!(guest.data(ports, 13), b"from the host");
        assert!(guest.rig.bench.interrupts(RECEIVE) > 0);
        assert!(guest.rig.bench.interrupts(TRANSMIT) > 0);
    }
}

#[test]
fn the_host_connects_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    let (ports, mut socket) = guest.connected_by_host(22);
    assert!(ports.0 >= 1 << 30);
    guest.send_data(ports, b"SSH-2.0");
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"SSH-2.0");
    socket.write_all(b"hello").unwrap();
    assert_eq!(guest.data(ports, 5), b"hello");
    // Another one to the same port is another connection.
    let (others, _socket) = guest.connected_by_host(22);
    assert_ne!(ports, others);
}

#[test]
fn buffers_in_many_descriptors_are_filled_across_them() {
    let (device, handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
    let mut guest = Guest::resting(Rig::active(device), handle);
    let pieces: Vec<Buffer> = [1, 42, 1, 3, 60].map(Buffer::In).into();
    guest.rig.add(RECEIVE, &pieces);
    guest.rig.add(RECEIVE, &pieces);
    guest.rig.kick(RECEIVE);
    let ports = (9, 10);
    let mut socket = guest.connected_by_guest(ports);
    socket.write_all(&pattern(0, 63)).unwrap();
    assert_eq!(guest.data(ports, 63), pattern(0, 63));
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let mut guest = Guest::new();
    guest.send((1, 2), Op::Request);
    guest.expect((1, 2), Op::Reset);
    let (listener, _sockets) = guest.listen(1);
    drop(listener);
    guest.send((1, 2), Op::Request);
    guest.expect((1, 2), Op::Reset);
}

#[test]
fn a_port_is_given_to_one_and_again_when_it_is_free() {
    let mut guest = Guest::new();
    let handle = guest.handle.clone();
    let (listener, _first) = guest.listen(7);
    assert_eq!(listener.port(), 7);
    let error = handle.listen(7, 1, drop).unwrap_err();
    assert!(matches!(error, ListenError::AlreadyBound(7)), "{error}");
    assert!(error.to_string().contains("port 7"), "{error}");
    drop(listener);
    let (_listener, sockets) = guest.listen(7);
    guest.send((7, 1), Op::Request);
    guest.expect((7, 1), Op::Response);
    assert!(sockets.try_recv().is_ok());
    let more: Vec<_> = (0..handle::MAX_LISTENERS as u32 - 1)
        .map(|n| handle.listen(100 + n, 1, drop).unwrap())
        .collect();
    assert!(matches!(handle.listen(99, 1, drop), Err(ListenError::NoResources)));
    drop(more);
    handle.listen(99, 1, drop).unwrap();
}

#[test]
fn a_listener_for_any_port_takes_what_no_other_takes() {
    let mut guest = Guest::new();
    let (_any, any) = guest.listen(handle::ANY_PORT);
    let (_one, one) = guest.listen(5);
    guest.send((5, 1), Op::Request);
    guest.send((6, 1), Op::Request);
    assert_eq!(one.try_recv().unwrap().0, (CID, 1, 5));
    assert_eq!(any.try_recv().unwrap().0, (CID, 1, 6));
}

#[test]
fn a_listener_may_answer_later_refuse_or_have_enough() {
    let mut guest = Guest::new();
    let (sender, requests) = channel();
    let sink = move |incoming| drop(sender.send(incoming));
    let _listener = guest.handle.listen(80, 2, sink).unwrap();
    for port in [1, 2, 3] {
        guest.send((80, port), Op::Request);
    }
    // The third is one more than may wait.
    guest.expect((80, 3), Op::Reset);
    guest.expect_nothing();
    let [first, second] = [requests.recv().unwrap(), requests.recv().unwrap()];
    assert!(first.is_wanted());
    drop(first);
    guest.expect((80, 1), Op::Reset);
    let mut socket: UnixStream = second.accept().unwrap().into();
    guest.expect((80, 2), Op::Response);
    socket.write_all(b"later").unwrap();
    assert_eq!(guest.data((80, 2), 5), b"later");
    // Both were answered, so there is room again.
    guest.send((80, 3), Op::Request);
    let third = requests.recv().unwrap();
    guest.send((80, 3), Op::Reset);
    assert!(!third.is_wanted());
    assert!(matches!(third.accept(), Err(AcceptError::Gone)));
    guest.expect_nothing();
}

#[test]
fn a_listener_that_never_answers_refuses_in_the_end() {
    let mut guest = Guest::with(VsockConfig {
        accept_timeout: Duration::from_millis(1),
        ..VsockConfig::new(CID)
    });
    let (sender, requests) = channel();
    let sink = move |incoming| drop(sender.send(incoming));
    let _listener = guest.handle.listen(80, 1, sink).unwrap();
    guest.send((80, 1), Op::Request);
    guest.expect((80, 1), Op::Reset);
    assert!(matches!(requests.recv().unwrap().accept(), Err(AcceptError::Gone)));
}

#[test]
fn connects_are_refused_time_out_and_need_a_driver() {
    let mut guest = Guest::with(VsockConfig {
        connect_timeout: Duration::from_millis(1),
        ..VsockConfig::new(CID)
    });
    let answer = guest.connect(4);
    let (request, _) = guest.packet();
    guest.send((request.src_port, 4), Op::Reset);
    // It is the device that counts: whichever of the two came first.
    let error = answer.recv().unwrap().unwrap_err();
    assert!(
        matches!(error, ConnectError::Refused(4) | ConnectError::TimedOut(4)),
        "{error}"
    );

    let answer = guest.connect(5);
    let (request, _) = guest.packet();
    // A guest that answers too late has to forget it, too.
    guest.expect((request.src_port, 5), Op::Reset);
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::TimedOut(5))));
    guest.send((request.src_port, 5), Op::Response);
    guest.expect((request.src_port, 5), Op::Reset);

    guest.rig.reset();
    let answer = guest.connect(6);
    guest.rig.settle().unwrap();
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::NotReady(6))));

    guest.activate();
    let answer = guest.connect(7);
    let handle = guest.handle.clone();
    drop(guest);
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::Gone(7))));
    let (sender, answer) = channel();
    handle.connect(8, move |result| drop(sender.send(result)));
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::Gone(8))));
    assert!(matches!(handle.listen(8, 1, drop), Err(ListenError::Gone)));
}

#[test]
fn a_guest_that_refuses_is_no_timeout() {
    let mut guest = Guest::new();
    let answer = guest.connect(4);
    let (request, _) = guest.packet();
    guest.send((request.src_port, 4), Op::Reset);
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::Refused(4))));
    guest.expect_nothing();
}

#[test]
fn the_guest_ends_its_sending_and_goes_on_receiving() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    guest.send_data(ports, b"request");
    guest.send_flags(ports, Op::Shutdown, NO_MORE_SENDING);
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"request");
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"");
    socket.write_all(b"answer").unwrap();
    assert_eq!(guest.data(ports, 6), b"answer");
    // With both directions ended the connection is over, and the guest confirms.
    drop(socket);
    let header = guest.expect(ports, Op::Shutdown);
    assert_eq!(header.flags, BOTH);
    guest.send(ports, Op::Reset);
    guest.expect_nothing();
    assert_eq!(guest.rig.device.table.len(), 0);
}

#[test]
fn the_host_ends_its_sending_and_goes_on_receiving() {
    let mut guest = Guest::new();
    let (ports, mut socket) = guest.connected_by_host(2);
    socket.write_all(b"request").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.data(ports, 7), b"request");
    assert_eq!(guest.expect(ports, Op::Shutdown).flags, NO_MORE_SENDING);
    guest.send_data(ports, b"answer");
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"answer");
    guest.send_flags(ports, Op::Shutdown, BOTH);
    guest.expect(ports, Op::Reset);
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"");
    assert_eq!(guest.rig.device.table.len(), 0);
}

#[test]
fn the_guest_ends_its_receiving_and_the_host_cannot_send() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    guest.send_flags(ports, Op::Shutdown, NO_MORE_RECEIVING);
    let error = socket.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    guest.send_data(ports, b"still here");
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"still here");
    drop(socket);
    assert_eq!(guest.expect(ports, Op::Shutdown).flags, BOTH);
}

#[test]
fn the_host_ends_its_receiving_and_the_guest_learns_it() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    socket.shutdown(Shutdown::Read).unwrap();
    guest.send_data(ports, b"lost");
    assert_eq!(guest.expect(ports, Op::Shutdown).flags, NO_MORE_RECEIVING);
    socket.write_all(b"still here").unwrap();
    assert_eq!(guest.data(ports, 10), b"still here");
}

#[test]
fn a_host_that_closes_is_heard_out_first() {
    let mut guest = Guest::new();
    let (ports, mut socket) = guest.connected_by_host(2);
    socket.write_all(b"last words").unwrap();
    drop(socket);
    assert_eq!(guest.data(ports, 10), b"last words");
    assert_eq!(guest.expect(ports, Op::Shutdown).flags, BOTH);
    guest.send(ports, Op::Reset);
    guest.expect_nothing();
    assert_eq!(guest.rig.device.table.len(), 0);
}

#[test]
fn a_host_that_closes_without_reading_resets() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let socket = guest.connected_by_guest(ports);
    guest.send_data(ports, b"unread");
    drop(socket);
    guest.expect(ports, Op::Reset);
    assert_eq!(guest.rig.device.table.len(), 0);
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let mut guest = Guest::with(VsockConfig {
        close_timeout: Duration::from_millis(1),
        ..VsockConfig::new(CID)
    });
    let (ports, socket) = guest.connected_by_host(2);
    drop(socket);
    guest.expect(ports, Op::Shutdown);
    guest.expect(ports, Op::Reset);
    assert_eq!(guest.rig.device.table.len(), 0);
}

#[test]
fn a_guest_that_closes_is_answered_at_once_and_its_bytes_still_arrive() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    // More than the socket takes, so that some waits here.
    let mut sent = 0;
    while guest
        .rig
        .device
        .table
        .get(0)
        .unwrap()
        .stream
        .as_ref()
        .unwrap()
        .drained()
    {
        guest.send_data(ports, &pattern(sent, 10_000));
        sent += 10_000;
    }
    guest.settle();
    guest.packets.clear();
    guest.send_flags(ports, Op::Shutdown, BOTH);
    guest.expect(ports, Op::Reset);
    // The ports can be used again before the host has read.
    let _other = guest.connected_by_guest(ports);
    let mut read = Vec::new();
    loop {
        match read_now(&mut socket, 65536) {
            Ok(bytes) if bytes.is_empty() => break,
            Ok(bytes) => read.extend(bytes),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        guest.settle();
    }
    assert_eq!(read, pattern(0, sent));
    assert_eq!(guest.rig.device.table.len(), 1);
}

#[test]
fn a_reset_by_the_guest_ends_the_sockets() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    guest.send_data(ports, b"before");
    guest.send(ports, Op::Reset);
    guest.expect_nothing();
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"before");
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"");
    assert!(socket.write_all(b"x").is_err());
    guest.send_data(ports, b"nobody is there");
    guest.expect(ports, Op::Reset);
}

#[test]
fn a_reset_of_the_device_ends_connections_and_keeps_listeners() {
    let mut guest = Guest::new();
    let (_listener, sockets) = guest.listen(1);
    guest.send((1, 2), Op::Request);
    guest.expect((1, 2), Op::Response);
    let (_, mut socket) = sockets.recv().unwrap();
    let answer = guest.connect(9);
    guest.packet();
    guest.rig.reset();
    assert_eq!(read_now(&mut socket, 1).unwrap(), b"");
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::NotReady(9))));
    assert_eq!(guest.rig.device.table.len(), 0);
    guest.activate();
    guest.send((1, 2), Op::Request);
    guest.expect((1, 2), Op::Response);
    let (_, mut socket) = sockets.recv().unwrap();
    guest.send_data((1, 2), b"again");
    assert_eq!(read_now(&mut socket, 100).unwrap(), b"again");
}

#[test]
fn a_transport_reset_is_an_event_and_waits_for_a_buffer() {
    let mut guest = Guest::new();
    let mut socket = guest.connected_by_guest((1, 2));
    guest.handle.transport_reset();
    guest.settle();
    assert_eq!(read_now(&mut socket, 1).unwrap(), b"");
    // Nothing is said of the connections themselves.
    guest.expect_nothing();
    assert!(guest.rig.used(EVENTS).is_none());
    let used = guest.rig.request(EVENTS, &[Buffer::In(8)]);
    assert_eq!((used.written, &used.bytes[..4]), (4, &[0; 4][..]));
    assert!(guest.rig.bench.interrupts(EVENTS) > 0);
    // Once.
    guest.rig.add(EVENTS, &[Buffer::In(8)]);
    guest.rig.kick(EVENTS);
    assert!(guest.rig.used(EVENTS).is_none());
    guest.handle.transport_reset();
    guest.settle();
    assert!(guest.rig.used(EVENTS).is_some());
}

#[test]
fn requests_that_the_guest_gives_up_count_until_somebody_has_looked_at_them() {
    let mut guest = Guest::new();
    let (sender, requests) = channel();
    let sink = move |incoming| drop(sender.send(incoming));
    let _listener = guest.handle.listen(80, 3, sink).unwrap();
    for port in 0..10 {
        guest.send((80, port), Op::Request);
        guest.send((80, port), Op::Reset);
    }
    let held: Vec<Incoming> = requests.try_iter().collect();
    assert_eq!(held.len(), 3);
    for port in 3..10 {
        guest.expect((80, port), Op::Reset);
    }
    drop(held);
    guest.expect_nothing();
    guest.send((80, 1), Op::Request);
    requests.recv().unwrap().accept().unwrap();
    guest.expect((80, 1), Op::Response);
}

#[test]
fn an_event_of_a_socket_that_is_gone_is_none_of_its_successor() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let _first = guest.connected_by_guest(ports);
    let old = super::super::device::token(guest.rig.device.table.get(0).unwrap().id());
    guest.send(ports, Op::Reset);
    let second = guest.connected_by_guest(ports);
    let late = EventSet::HANG_UP | EventSet::IN;
    guest
        .rig
        .call(|device, context| device.ready(old, late, context))
        .unwrap();
    second.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(ports, Op::Shutdown).flags, NO_MORE_SENDING);
}
