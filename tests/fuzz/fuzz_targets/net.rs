//! The network card: any rings, frames, headers and commands of a driver, mixed with whatever comes from the host, over a stream socket or over
//! sockets that stand for a tap's queues.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use sepal_devices::dispatch::DeviceEvent;
use sepal_devices::rate::RateLimit;
use sepal_devices::virtio::net::{Net, NetBackend, NetConfig};
use sepal_fuzz::driver::{Driver, RingStep};

/// Bytes of a header.
const HEADER: usize = 12;
/// The longest that is made up at once.
const MOST: usize = 70_000;

#[derive(Arbitrary, Debug)]
enum Step {
    Ring(RingStep),
    /// Receive buffers that are well-formed.
    Room {
        pair: u8,
        count: u8,
        len: u16,
    },
    /// The driver sends a frame.
    Send {
        pair: u8,
        header: [u8; HEADER],
        bytes: Vec<u8>,
        len: u32,
        split: u8,
    },
    Command(Vec<u8>),
    /// A frame comes from the host.
    Come {
        port: u8,
        header: [u8; HEADER],
        len: u32,
    },
    /// Something comes from the host.
    Bytes {
        port: u8,
        bytes: Vec<u8>,
    },
    HostReads,
    Link(bool),
    HostCloses,
}

/// The host's side.
enum Host {
    Stream(Option<UnixStream>),
    Packets(Vec<OwnedFd>),
}

impl Host {
    fn new(queues: u8) -> (NetBackend, Self) {
        if queues == 0 {
            let (near, far) = UnixStream::pair().expect("a socket pair");
            far.set_nonblocking(true).expect("a socket");
            return (NetBackend::Stream(near.into()), Self::Stream(Some(far)));
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket pair");
        let (near, far) = (0..queues).map(|_| pair()).unzip();
        (NetBackend::Packets(near), Self::Packets(far))
    }

    /// What has no room is lost: of a stream, that leaves it out of step, which the device has to bear as well.
    fn send(&mut self, port: u8, header: &[u8], bytes: &[u8], framed: bool) {
        match self {
            Self::Stream(Some(socket)) => {
                if framed {
                    let _ = socket.write(&(bytes.len() as u32).to_be_bytes());
                }
                let _ = socket.write(bytes);
            }
            Self::Packets(queues) if !queues.is_empty() => {
                let packet = [header, bytes].concat();
                let _ = send(&queues[usize::from(port) % queues.len()], &packet, SendFlags::empty());
            }
            _ => {}
        }
    }

    fn read(&mut self) {
        let mut bytes = vec![0; 1 << 16];
        match self {
            Self::Stream(Some(socket)) => while socket.read(&mut bytes).is_ok_and(|len| len > 0) {},
            Self::Stream(None) => {}
            Self::Packets(queues) => {
                for queue in queues {
                    while recv(&*queue, &mut bytes[..], RecvFlags::DONTWAIT).is_ok_and(|(_, len)| len > 0) {}
                }
            }
        }
    }
}

fuzz_target!(|input: (u8, bool, u16, Vec<Step>)| {
    let (queues, offloads, mtu, steps) = input;
    let (backend, mut host) = Host::new(queues % 4);
    let (device, handle) = Net::new(NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: mtu.clamp(68, 65520),
        backend,
        offloads,
        link_up: true,
        receive_limit: RateLimit::default(),
        send_limit: RateLimit::default(),
    })
    .expect("a network card");
    let mut driver = Driver::new(device);
    let pairs = (driver.rig.drivers.len() / 2) as u8;
    let mut closed = false;
    for step in steps {
        match step {
            Step::Ring(step) => driver.apply(step),
            Step::Room { pair, count, len } => {
                for _ in 0..count % 32 {
                    driver.apply(RingStep::Request {
                        queue: 2 * (pair % pairs),
                        out: Vec::new(),
                        split: 0,
                        rooms: vec![len % 4096],
                    });
                }
                driver.kick(u16::from(2 * (pair % pairs)));
            }
            Step::Send {
                pair,
                header,
                bytes,
                len,
                split,
            } => {
                let mut out = [&header[..], &bytes].concat();
                out.resize(out.len().max(len as usize % MOST), 0x5a);
                let queue = 2 * (pair % pairs) + 1;
                driver.apply(RingStep::Request {
                    queue,
                    out,
                    split,
                    rooms: Vec::new(),
                });
                driver.kick(queue.into());
            }
            Step::Command(out) => {
                driver.apply(RingStep::Request {
                    queue: 2 * pairs,
                    out,
                    split: 0,
                    rooms: vec![1],
                });
                driver.kick((2 * pairs).into());
            }
            Step::Come { port, header, len } => {
                host.send(port, &header, &vec![0xa5; len as usize % MOST], true);
                driver.settle();
            }
            Step::Bytes { port, bytes } => {
                host.send(port, &[], &bytes, false);
                driver.settle();
            }
            Step::HostReads => {
                host.read();
                driver.settle();
            }
            Step::Link(up) => {
                handle.set_link(up);
                driver.settle();
                let status = u16::from(handle.info().link_up).to_le_bytes();
                assert_eq!(driver.rig.bench.config()[6..8], status);
            }
            Step::HostCloses => {
                closed = true;
                host = Host::Stream(None);
                driver.settle();
                // The bench forgets events that came together with a broken ring: a device that rests looks by itself.
                driver.apply(RingStep::Activate(u64::MAX));
                driver.apply(RingStep::Reset);
                driver.settle();
                assert!(!handle.info().link_up);
            }
        }
    }
    let lost = driver.rig.reports();
    assert!(
        lost.len() <= 1
            && lost
                .iter()
                .all(|event| matches!(event, DeviceEvent::BackendLost { .. }))
    );
    assert!(!closed || lost.len() == 1, "a host that is gone is reported, once");
});
