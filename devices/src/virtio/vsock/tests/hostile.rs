//! Packets and rings that break the rules, floods, and resets in the middle.

use super::*;
use crate::virtio::device::Fault;
use crate::virtio::malformed::every_shape_rests_and_recovers;
use crate::virtio::violation::Violation;

fn violation(result: Result<(), Fault>) -> String {
    match result {
        Err(Fault::Violation(violation)) => violation.to_string(),
        other => panic!("{other:?}"),
    }
}

/// That the device serves connections; uses up all buffers that it makes.
fn works(rig: &mut Rig<Vsock>) {
    rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
    rig.kick(RECEIVE);
    let header = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 1,
        kind: STREAM,
        op: Op::Request as u16,
        ..Header::default()
    };
    rig.request(TRANSMIT, &[Buffer::Out(header.bytes().to_vec())]);
    let used = rig.used(RECEIVE).unwrap();
    assert_eq!(
        Header::parse(used.bytes[..Header::BYTES].try_into().unwrap()).op,
        Op::Reset as u16
    );
}

#[test]
fn rings_that_break_the_rules_stop_the_device_until_it_is_reset() {
    let (device, _handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
    every_shape_rests_and_recovers(&mut Rig::active(device), &[RECEIVE, TRANSMIT], works);
}

#[test]
fn buffers_of_the_wrong_length_or_direction_stop_the_device() {
    let header = Header {
        len: 10,
        ..Header::default()
    };
    let shapes: [(u16, Vec<Buffer>, &str); 7] = [
        (
            TRANSMIT,
            vec![Buffer::Out(vec![0; 43])],
            "43 bytes, expected at least its header of 44",
        ),
        (TRANSMIT, vec![Buffer::In(100)], "buffers for the device to write"),
        (
            TRANSMIT,
            vec![Buffer::Out(vec![0; 44]), Buffer::In(1)],
            "buffers for the device to write",
        ),
        (
            TRANSMIT,
            vec![Buffer::Out([&header.bytes()[..], &[0; 9]].concat())],
            "payload: 9 bytes",
        ),
        (RECEIVE, vec![Buffer::Out(vec![0; 100])], "parts for the device to read"),
        (RECEIVE, vec![Buffer::In(44)], "44 bytes, expected more than a header"),
        (
            RECEIVE,
            vec![Buffer::Out(vec![0; 44]), Buffer::In(100)],
            "parts for the device to read",
        ),
    ];
    for (queue, buffers, reason) in shapes {
        let (device, handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
        let mut guest = Guest::resting(Rig::active(device), handle);
        guest.rig.add(queue, &buffers);
        let found = violation(guest.rig.try_kick(queue));
        assert!(
            found.contains(reason) && found.contains(&format!("queue {queue}")),
            "{found}"
        );
        guest.rig.activate(u64::MAX).unwrap();
        works(&mut guest.rig);
    }
    let mut guest = Guest::new();
    guest.handle.transport_reset();
    guest.settle();
    guest.rig.add(EVENTS, &[Buffer::In(3)]);
    let found = violation(guest.rig.try_kick(EVENTS));
    assert!(found.contains("events: 3 bytes"), "{found}");
}

#[test]
fn packets_for_nobody_are_refused_or_dropped() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(ports, op);
        guest.expect(ports, Op::Reset);
    }
    // A reset is never answered.
    guest.send(ports, Op::Reset);
    guest.expect_nothing();
    for op in [0, 8, 0xffff] {
        let header = Header {
            op,
            ..guest.header(ports, Op::Data)
        };
        guest.send_raw(&header, &[]);
        guest.expect(ports, Op::Reset);
    }
    // Not from this guest.
    for src_cid in [0, 2, 4, CID | 1 << 32] {
        let header = Header {
            src_cid,
            ..guest.header(ports, Op::Request)
        };
        guest.send_raw(&header, &[]);
        guest.expect_nothing();
    }
}

#[test]
fn other_hosts_and_other_kinds_of_sockets_are_refused_under_their_own_names() {
    let mut guest = Guest::new();
    let (_listener, sockets) = guest.listen(1);
    // Sequenced packets, and what there is not.
    for kind in [0, 2, 3, 0xffff] {
        let header = Header {
            kind,
            ..guest.header((1, 2), Op::Request)
        };
        guest.send_raw(&header, &[]);
        let (reset, _) = guest.packet();
        assert_eq!((reset.kind, reset.src_port, reset.dst_port), (kind, 1, 2));
        assert_eq!(Op::new(reset.op), Some(Op::Reset));
    }
    assert!(sockets.try_recv().is_err());
    // Another guest cannot be reached, and the kernel that asked can tell.
    let header = Header {
        dst_cid: 77,
        ..guest.header((1, 2), Op::Request)
    };
    guest.send_raw(&header, &[]);
    let used = guest.rig.used(RECEIVE).unwrap();
    let reset = Header::parse(used.bytes[..Header::BYTES].try_into().unwrap());
    assert_eq!(
        (reset.src_cid, reset.dst_cid, Op::new(reset.op)),
        (77, CID, Some(Op::Reset))
    );
}

#[test]
fn a_packet_out_of_place_costs_its_connection_alone() {
    let mut guest = Guest::new();
    let mut other = guest.connected_by_guest((1, 99));
    for op in [Op::Request, Op::Response] {
        let ports = (1, 2);
        let mut socket = guest.connected_by_guest(ports);
        guest.send(ports, op);
        guest.expect(ports, Op::Reset);
        assert_eq!(read_now(&mut socket, 1).unwrap(), b"");
    }
    guest.send_data((1, 99), b"fine");
    assert_eq!(read_now(&mut other, 10).unwrap(), b"fine");
}

#[test]
fn there_are_only_so_many_connections() {
    let mut guest = Guest::with(VsockConfig {
        max_connections: 8,
        ..VsockConfig::new(CID)
    });
    let (_listener, sockets) = guest.listen(1);
    for port in 0..8 {
        guest.send((1, port), Op::Request);
        guest.expect((1, port), Op::Response);
    }
    guest.send((1, 8), Op::Request);
    guest.expect((1, 8), Op::Reset);
    let answer = guest.connect(5);
    guest.settle();
    let error = answer.try_recv().unwrap().unwrap_err();
    assert!(matches!(error, ConnectError::NoResources { port: 5, .. }), "{error}");
    assert!(error.to_string().contains("8 connections"), "{error}");
    // One less, and there is room for one more.
    drop(sockets.recv().unwrap());
    guest.expect((1, 0), Op::Shutdown);
    guest.send((1, 0), Op::Reset);
    guest.connected_by_host(5);
}

#[test]
fn a_flood_of_packets_without_buffers_for_the_answers_waits_in_its_ring() {
    let (device, handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
    let mut guest = Guest::resting(Rig::active(device), handle);
    let mut sent = 0u32;
    let mut pending = 0;
    // Until the device leaves a packet where it is.
    while pending == 0 {
        let header = guest.header((sent, 1), Op::Data);
        guest.rig.add(TRANSMIT, &[Buffer::Out(header.bytes().to_vec())]);
        guest.rig.kick(TRANSMIT);
        sent += 1;
        pending = usize::from(guest.rig.used(TRANSMIT).is_none());
        assert!(sent < 10_000);
    }
    // Each is answered, in order, as soon as there are buffers.
    for _ in 0..64 {
        guest.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
    }
    guest.rig.kick(RECEIVE);
    for port in 0..sent {
        guest.expect((port, 1), Op::Reset);
    }
    assert!(guest.rig.used(TRANSMIT).is_some());
    guest.expect_nothing();
}

#[test]
fn a_flood_of_connects_of_the_host_is_bounded() {
    let mut guest = Guest::with(VsockConfig {
        max_connections: 4,
        ..VsockConfig::new(CID)
    });
    let answers: Vec<_> = (0..20).map(|_| guest.connect(1)).collect();
    guest.settle();
    let refused = answers.iter().filter(|answer| answer.try_recv().is_ok()).count();
    assert_eq!((refused, guest.packets.len()), (16, 4));
}

#[test]
fn a_queue_that_is_reset_loses_its_buffers_and_works_again() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    guest.rig.reset_queue(RECEIVE).unwrap();
    socket.write_all(b"waits").unwrap();
    guest.rig.settle().unwrap();
    assert!(guest.rig.used(RECEIVE).is_none());
    guest.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
    guest.rig.kick(RECEIVE);
    assert_eq!(guest.data(ports, 5), b"waits");
    guest.rig.reset_queue(TRANSMIT).unwrap();
    guest.send_data(ports, b"again");
    assert_eq!(read_now(&mut socket, 10).unwrap(), b"again");
}

#[test]
fn a_violation_in_the_middle_ends_connections_and_the_device_comes_back() {
    let mut guest = Guest::new();
    let ports = (1, 2);
    let mut socket = guest.connected_by_guest(ports);
    fill(&mut socket, 0, usize::MAX);
    guest.rig.add(TRANSMIT, &[Buffer::Out(vec![0; 3])]);
    match guest.rig.try_kick(TRANSMIT) {
        Err(Fault::Violation(Violation::Length { got: 3, .. })) => {}
        other => panic!("{other:?}"),
    }
    // What the host had sent and nobody read makes it a reset.
    let ended = read_now(&mut socket, 1);
    assert!(
        matches!(&ended, Ok(bytes) if bytes.is_empty())
            || matches!(&ended, Err(e) if e.kind() == io::ErrorKind::ConnectionReset)
    );
    guest.activate();
    let mut socket = guest.connected_by_guest(ports);
    guest.send_data(ports, b"again");
    assert_eq!(read_now(&mut socket, 10).unwrap(), b"again");
    assert!(would_block(&mut socket));
}
