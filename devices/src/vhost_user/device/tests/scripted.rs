//! Back ends that the test writes message by message: those that keep what is under way, and those that break the protocol.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::*;

/// Feature bits of a back end without anything of its own.
pub(super) const FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

/// Requests that came, with their payloads.
pub(super) type Requests = Vec<(u32, Vec<u8>)>;

/// What a scripted back end does with a request.
pub(super) enum Act {
    /// As a well-behaved one.
    Well,
    /// Sends these bytes instead.
    Bytes(Vec<u8>),
    /// Never answers.
    Silence,
    /// Hangs up.
    HangUp,
}

pub(super) fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let words = [request, 5, payload.len() as u32];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend_from_slice(payload);
    bytes
}

/// A back end with these protocol features, on a thread: `act` decides on each request. Returns the requests that came, with their payloads, when
/// the front end has hung up.
pub(super) fn back_end(
    protocol: u64,
    mut act: impl FnMut(u32) -> Act + Send + 'static,
) -> (UnixStream, JoinHandle<Requests>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut requests = Vec::new();
        let mut header = [0; 12];
        while theirs.read_exact(&mut header).is_ok() {
            let word = |n: usize| u32::from_le_bytes(header[4 * n..][..4].try_into().unwrap());
            let (request, flags) = (word(0), word(1));
            let mut payload = vec![0; word(2) as usize];
            if theirs.read_exact(&mut payload).is_err() {
                break;
            }
            let act = act(request);
            let first: [u8; 8] = payload.first_chunk().copied().unwrap_or_default();
            requests.push((request, payload));
            let bytes = match act {
                Act::HangUp => break,
                Act::Silence => continue,
                Act::Bytes(bytes) => bytes,
                Act::Well => match request {
                    1 => reply(1, &FEATURES.to_le_bytes()),
                    15 => reply(15, &protocol.to_le_bytes()),
                    17 => reply(17, &8u64.to_le_bytes()),
                    11 => reply(11, &first),
                    31 => {
                        // The memory itself is of no interest here.
                        let place = rustix::fs::memfd_create(c"inflight", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
                        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                        let mut control = SendAncillaryBuffer::new(&mut space);
                        let fds = [place.as_fd()];
                        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
                        let bytes = reply(31, &[7; 24]);
                        let _ =
                            rustix::net::sendmsg(&theirs, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
                        continue;
                    }
                    _ if flags & 8 != 0 => reply(request, &[0; 8]),
                    _ => continue,
                },
            };
            if theirs.write_all(&bytes).is_err() {
                break;
            }
        }
        requests
    });
    (ours, thread)
}

pub(super) fn plain() -> Settings {
    Settings {
        kind: DeviceKind::FileSystem,
        queue_sizes: vec![64, 64],
        config: ConfigSource::Given(ConfigLayout::default()),
    }
}

fn refused(protocol: u64, act: impl FnMut(u32) -> Act + Send + 'static) -> String {
    let (socket, thread) = back_end(protocol, act);
    let refused = VhostUser::connect(socket.into(), plain()).err().unwrap();
    thread.join().unwrap();
    refused.to_string()
}

#[test]
fn a_back_end_that_breaks_the_protocol_makes_no_device() {
    let misbehave = |at: u32, bytes: Vec<u8>| {
        refused(protocol::WANTED, move |request| {
            if request == at {
                Act::Bytes(bytes.clone())
            } else {
                Act::Well
            }
        })
    };
    assert_eq!(
        misbehave(1, reply(15, &[0; 8])),
        "the back end answered GET_FEATURES with a reply to request 15 where one to 1 was expected"
    );
    assert_eq!(
        misbehave(1, reply(1, &[0; 4096])),
        "the back end answered GET_FEATURES with 4096 bytes of payload"
    );
    assert_eq!(
        misbehave(1, reply(1, &[0; 8])),
        "the back end cannot serve this device: it lacks the virtio feature VIRTIO_F_VERSION_1, without which no driver here works"
    );
    assert_eq!(
        misbehave(17, reply(17, &1u64.to_le_bytes())),
        "the back end cannot serve this device: it serves 1 queues, and the device has 2"
    );
}

#[test]
fn a_back_end_that_hangs_up_in_the_greeting_makes_no_device() {
    let message = refused(
        protocol::WANTED,
        |request| if request == 15 { Act::HangUp } else { Act::Well },
    );
    assert_eq!(message, "the back end closed the connection");
}

#[test]
fn a_back_end_that_does_not_let_go_is_cut_off() {
    let (socket, thread) = back_end(
        protocol::MQ,
        |request| {
            if request == 11 { Act::Silence } else { Act::Well }
        },
    );
    let (device, handle) = VhostUser::connect(socket.into(), plain()).unwrap();
    let mut bench = Bench::new(device, false);
    bench.activate();
    bench.reset();
    assert_eq!(
        bench.reports(),
        [lost("the back end did not answer GET_VRING_BASE in 750 ms")]
    );
    assert!(!handle.is_connected());
    thread.join().unwrap();
}

#[test]
fn a_back_end_that_does_not_answer_is_cut_off_when_its_time_is_up() {
    let mut silent = false;
    let (socket, thread) = back_end(protocol::REPLY_ACK, move |request| {
        silent |= request == 2;
        if silent { Act::Silence } else { Act::Well }
    });
    let mut bench = Bench::new(VhostUser::connect(socket.into(), plain()).unwrap().0, false);
    bench.activate();
    until(&mut bench, |bench| bench.device.timer.is_set().then_some(()));
    // Its ten seconds pass at once.
    bench.device.timer.set(Some(Instant::now())).unwrap();
    assert_eq!(
        reports(&mut bench, 1),
        [lost("the back end did not answer SET_FEATURES in 10000 ms")]
    );
    thread.join().unwrap();
}

#[test]
fn a_back_end_that_refuses_the_rings_is_cut_off() {
    let (socket, thread) = back_end(protocol::REPLY_ACK, |request| match request {
        9 => Act::Bytes(reply(9, &1u64.to_le_bytes())),
        _ => Act::Well,
    });
    let mut bench = Bench::new(VhostUser::connect(socket.into(), plain()).unwrap().0, false);
    bench.activate();
    assert_eq!(
        reports(&mut bench, 1),
        [lost("the back end answered SET_VRING_ADDR with error 1")]
    );
    // The driver does not notice.
    bench.reset();
    bench.activate();
    assert_eq!(bench.reports(), []);
    thread.join().unwrap();
}

#[test]
fn a_back_end_that_offers_less_than_the_first_is_not_taken() {
    let (socket, first) = back_end(protocol::REPLY_ACK | protocol::MQ, |request| {
        if request == 18 { Act::HangUp } else { Act::Well }
    });
    let (device, handle) = VhostUser::connect(socket.into(), plain()).unwrap();
    let mut bench = Bench::new(device, false);
    bench.activate();
    assert_eq!(reports(&mut bench, 1), [lost("the back end closed the connection")]);
    first.join().unwrap();
    let (socket, second) = back_end(protocol::MQ, |_| Act::Well);
    handle.reconnect(socket.into());
    assert_eq!(
        reports(&mut bench, 1),
        [lost(
            "the back end cannot serve this device: it lacks the protocol features 0x8, which the one before had"
        )]
    );
    second.join().unwrap();
    let (socket, third) = back_end(protocol::WANTED, |_| Act::Well);
    handle.reconnect(socket.into());
    assert_eq!(reports(&mut bench, 1), [restored()]);
    drop(bench);
    third.join().unwrap();
}

#[test]
fn the_next_back_end_gets_what_was_under_way_and_where_to_go_on() {
    let (socket, first) = back_end(protocol::WANTED, |_| Act::Well);
    let (device, handle) = VhostUser::connect(socket.into(), plain()).unwrap();
    let mut bench = Bench::new(device, false);
    bench.activate();
    until(&mut bench, |bench| bench.device.started().contains(&1).then_some(()));
    until(&mut bench, |bench| {
        matches!(bench.device.phase, Phase::Serving).then_some(())
    });
    // The first one used three.
    bench.memory.write_obj(3u16, GuestAddress(0x1802)).unwrap();
    let (socket, second) = back_end(protocol::WANTED, |_| Act::Well);
    handle.reconnect(socket.into());
    assert_eq!(reports(&mut bench, 2)[1], restored());
    drop(bench);

    let (first, second) = (first.join().unwrap(), second.join().unwrap());
    let numbers = |requests: &[(u32, Vec<u8>)]| requests.iter().map(|(number, _)| *number).collect::<Vec<_>>();
    let ring = [8, 10, 9, 13, 12, 18];
    let served = [vec![3, 1, 15, 16, 17, 2, 5, 31, 32], ring.repeat(2)].concat();
    assert_eq!(numbers(&first)[..served.len()], served);
    let served = [vec![3, 1, 15, 16, 17, 2, 5, 32], ring.repeat(2)].concat();
    assert_eq!(numbers(&second), served);
    let payload = |requests: &[(u32, Vec<u8>)], number| {
        let found = requests.iter().find(|(n, _)| *n == number);
        found.unwrap().1.clone()
    };
    assert_eq!(payload(&first, 32), payload(&second, 32));
    assert_eq!(payload(&first, 10), [0; 8]);
    assert_eq!(payload(&second, 10), [0, 0, 0, 0, 3, 0, 0, 0]);
}

#[test]
fn a_back_end_is_held_to_what_it_does_with_rings() {
    let simple = 1u64 << 30 | 1 << 32;
    let with = |features: u64| {
        move |request| match request {
            1 => Act::Bytes(reply(1, &features.to_le_bytes())),
            18 => Act::HangUp,
            _ => Act::Well,
        }
    };
    let (socket, first) = back_end(protocol::MQ, with(simple));
    let (device, handle) = VhostUser::connect(socket.into(), plain()).unwrap();
    let mut bench = Bench::new(device, false);
    bench.activate();
    assert_eq!(reports(&mut bench, 1), [lost("the back end closed the connection")]);
    // One that could do more does as much.
    let (socket, second) = back_end(protocol::MQ, |_| Act::Well);
    handle.reconnect(socket.into());
    assert_eq!(reports(&mut bench, 1), [restored()]);
    drop(bench);
    for thread in [first, second] {
        let requests = thread.join().unwrap();
        let set = requests.iter().find(|(number, _)| *number == 2);
        assert_eq!(set.unwrap().1, simple.to_le_bytes());
    }

    // The driver counts on what the first one did.
    let (socket, first) = back_end(protocol::MQ, with(FEATURES));
    let (device, handle) = VhostUser::connect(socket.into(), plain()).unwrap();
    let mut bench = Bench::new(device, false);
    bench.activate();
    assert_eq!(reports(&mut bench, 1), [lost("the back end closed the connection")]);
    let (socket, second) = back_end(protocol::MQ, with(simple));
    handle.reconnect(socket.into());
    let refused =
        "the back end cannot serve this device: it lacks the virtio features 0x30000000, which the one before had";
    assert_eq!(reports(&mut bench, 1), [lost(refused)]);
    first.join().unwrap();
    second.join().unwrap();
}
