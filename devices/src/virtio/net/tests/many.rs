//! Frames by the thousand, through rings that always have some: all of them arrive, whole and in order, and are counted.

use std::time::{Duration, Instant};

use super::host;
use super::tap::{PORTS, tap};
use super::*;

/// Frames of one case.
const FRAMES: usize = 20_000;
/// Chains of a ring.
const RING: usize = 256;
/// Frames under way in the host, which has room for as many; what has no room for long is dropped.
const WINDOW: usize = 32;
/// Bytes in front of what a UDP packet carries: of Ethernet, IP and UDP.
const UDP_HEADERS: usize = 14 + 20 + 8;
/// A case that takes longer has come to a stand.
const PATIENCE: Duration = Duration::from_secs(120);

/// Piece `number` of a stream that is cut into pieces of `len` bytes, no two of which are soon the same.
fn piece(number: usize, len: usize) -> Vec<u8> {
    let first = number * len;
    (first..first + len).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect()
}

/// What a counter says that has counted nothing but the pieces, as frames of `len` bytes.
fn all(len: usize) -> NetCounters {
    NetCounters {
        frames: FRAMES as u64,
        bytes: (FRAMES * len) as u64,
        ..NetCounters::default()
    }
}

/// Takes `step`s until one says that it was the last.
fn until(what: &str, mut step: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !step() {
        assert!(Instant::now() < deadline, "{what}: not all frames came");
        std::thread::yield_now();
    }
}

#[test]
fn all_that_the_driver_sends_comes_out_of_a_socket() {
    for len in [60, 1514] {
        let (mut rig, handle, mut peer) = active();
        let (mut given, mut got) = (0, 0);
        until(&format!("{len} bytes to a socket"), || {
            while given < FRAMES.min(got + WINDOW) {
                rig.add(TX, &packet(&piece(given, len)));
                given += 1;
            }
            rig.kick(TX);
            given_back(&mut rig, TX);
            while let Some(frame) = peer.receive() {
                assert!(frame == piece(got, len), "frame {got}");
                got += 1;
            }
            got >= FRAMES
        });
        assert_eq!(handle.stats().sent, all(len));
    }
}

#[test]
fn all_that_goes_into_a_socket_comes_to_the_driver() {
    for len in [60, 1514] {
        let (mut rig, handle, mut peer) = active();
        peer.0.set_nonblocking(false).unwrap();
        give(&mut rig, RING, 2048);
        let writer = std::thread::spawn(move || {
            (0..FRAMES).for_each(|number| peer.send(&piece(number, len)));
            peer
        });
        let mut got = 0;
        until(&format!("{len} bytes from a socket"), || {
            rig.kick(RX);
            for used in given_back(&mut rig, RX) {
                assert!(merged([used]) == [piece(got, len)], "frame {got}");
                got += 1;
                rig.add(RX, &[Buffer::In(2048)]);
            }
            got >= FRAMES
        });
        drop(writer.join().unwrap());
        assert_eq!(handle.stats().received, all(len));
    }
}

#[test]
fn all_that_the_driver_sends_comes_out_of_a_tap() {
    host::alone(|| {
        for len in [18, 1472] {
            let Some((mut rig, handle, socket)) = tap(1) else {
                return;
            };
            rig.activate(u64::MAX).unwrap();
            let mut bytes = vec![0; len + 1];
            let (mut given, mut got) = (0, 0);
            until(&format!("{len} bytes to a tap"), || {
                while given < FRAMES.min(got + WINDOW) {
                    rig.add(TX, &packet(&host::udp_frame(PORTS, &piece(given, len), 0)));
                    given += 1;
                }
                rig.kick(TX);
                given_back(&mut rig, TX);
                while let Ok(received) = socket.recv(&mut bytes) {
                    assert!(bytes[..received] == piece(got, len), "packet {got}");
                    got += 1;
                }
                got >= FRAMES
            });
            assert_eq!(handle.stats().sent, all(UDP_HEADERS + len));
        }
    });
}

#[test]
fn all_that_goes_into_a_tap_comes_to_the_driver() {
    host::alone(|| {
        // Each of the last may be 46 segments.
        for (what, packets, len, segment, window, features) in [
            ("60 bytes", FRAMES, 18, 0, WINDOW, u64::MAX),
            ("60 bytes, a simple driver", FRAMES, 18, 0, WINDOW, 0),
            ("1514 bytes", FRAMES, 1472, 0, WINDOW, u64::MAX),
            ("1514 bytes, a simple driver", FRAMES, 1472, 0, WINDOW, 0),
            ("segments of 1400 bytes, merged", 500, 64400, 1400, 8, u64::MAX),
        ] {
            let Some((mut rig, handle, socket)) = tap(1) else {
                return;
            };
            host::set_segments(&socket, segment);
            rig.activate(features).unwrap();
            give(&mut rig, RING, 2048);
            let (mut given, mut got, mut part) = (0, 0, Vec::new());
            until(&format!("{what} from a tap"), || {
                while given < packets.min(got + window) {
                    socket.send(&piece(given, len)).unwrap();
                    given += 1;
                }
                rig.kick(RX);
                let used = given_back(&mut rig, RX);
                for _ in &used {
                    rig.add(RX, &[Buffer::In(2048)]);
                }
                for frame in merged(used).into_iter().filter(|frame| host::is_udp(frame)) {
                    part.extend_from_slice(&frame[UDP_HEADERS..]);
                    if part.len() >= len {
                        assert!(part == piece(got, len), "packet {got}");
                        part.clear();
                        got += 1;
                    }
                }
                got >= packets
            });
            let received = handle.stats().received;
            assert_eq!((received.dropped, received.errors), (0, 0), "{what}");
        }
    });
}
