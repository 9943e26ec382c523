//! The socket device: any packets, rings and buffers of a driver, mixed with whatever the host does on its side.
#![no_main]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::virtio::device::Fault;
use sepal_devices::virtio::testing::{Buffer, Rig};
use sepal_devices::virtio::vsock::device::{EVENTS, RECEIVE, TRANSMIT};
use sepal_devices::virtio::vsock::packet::{HOST_CID, Header};
use sepal_devices::virtio::vsock::{Incoming, Listener, Vsock, VsockConfig, VsockHandle};

const CID: u64 = 3;
/// Descriptors that the driver uses of each queue at most.
const DESCRIPTORS: [usize; 3] = [200, 200, 8];
/// Connections that the device may have.
const CONNECTIONS: u32 = 6;
/// Ports of the guest begin here when it answers requests of the host.
const OWN_PORTS: u32 = 1 << 30;

#[derive(Arbitrary, Debug)]
enum Step {
    Packet {
        host_port: u8,
        guest_port: u8,
        op: u8,
        flags: u8,
        buf_alloc: u32,
        fwd_cnt: u16,
        len: u16,
        split: u8,
    },
    Odd {
        header: [u8; Header::BYTES],
        payload: u8,
    },
    Buffers {
        count: u8,
        sizes: [u16; 2],
    },
    EventBuffer(u8),
    Descriptor {
        queue: u8,
        index: u8,
        address: u32,
        len: u32,
        flags: u8,
        next: u8,
    },
    Available {
        queue: u8,
        head: u16,
    },
    Index {
        queue: u8,
        index: u16,
    },
    Kick(u8),
    Listen(u8),
    Unlisten,
    Connect(u8),
    Accept,
    Refuse,
    HostWrites {
        socket: u8,
        len: u16,
    },
    HostReads {
        socket: u8,
        len: u16,
    },
    HostShuts {
        socket: u8,
        how: u8,
    },
    HostCloses(u8),
    Reset,
    ResetQueue(u8),
    TransportReset,
}

struct World {
    rig: Rig<Vsock>,
    handle: VsockHandle,
    /// Descriptors in use, by queue and first descriptor.
    used: [HashMap<u16, usize>; 3],
    listeners: Vec<Listener>,
    requests: (Sender<Incoming>, Receiver<Incoming>),
    answers: (Sender<OwnedFd>, Receiver<OwnedFd>),
    sockets: Vec<UnixStream>,
}

impl World {
    fn new() -> Self {
        let config = VsockConfig {
            max_connections: CONNECTIONS,
            // So that some run out.
            connect_timeout: Duration::from_micros(200),
            accept_timeout: Duration::from_micros(200),
            close_timeout: Duration::from_micros(200),
            ..VsockConfig::new(CID)
        };
        let (device, handle) = Vsock::new(config).expect("eventfds and a timer");
        Self {
            rig: Rig::active(device),
            handle,
            used: Default::default(),
            listeners: Vec::new(),
            requests: channel(),
            answers: channel(),
            sockets: Vec::new(),
        }
    }

    /// Starts the device again if the driver broke a rule; anything else that stops it is a bug.
    fn check(&mut self, result: Result<(), Fault>) {
        match result {
            Ok(()) => {}
            Err(Fault::Violation(violation)) => {
                assert!(!violation.to_string().is_empty());
                self.activate();
            }
            Err(Fault::Host(error)) => panic!("{error}"),
        }
    }

    fn activate(&mut self) {
        self.used = Default::default();
        self.rig.activate(u64::MAX).expect("empty rings are all right");
    }

    fn add(&mut self, queue: u16, buffers: &[Buffer]) {
        let used = &mut self.used[usize::from(queue)];
        if used.values().sum::<usize>() + buffers.len() <= DESCRIPTORS[usize::from(queue)] {
            let head = self.rig.add(queue, buffers);
            used.insert(head, buffers.len());
        }
    }

    fn kick(&mut self, queue: u16) {
        let result = self.rig.try_kick(queue);
        self.check(result);
        self.collect();
    }

    /// Takes what the device gave back.
    fn collect(&mut self) {
        for queue in [RECEIVE, TRANSMIT, EVENTS] {
            while let Some(used) = self.rig.used(queue) {
                let known = self.used[usize::from(queue)].remove(&used.head).is_some();
                if known && queue == RECEIVE && used.bytes.len() >= Header::BYTES {
                    let header: &[u8; Header::BYTES] = used.bytes[..Header::BYTES].try_into().expect("44 bytes");
                    let header = Header::parse(header);
                    assert_eq!(header.dst_cid, CID);
                    assert_eq!(used.written as usize, Header::BYTES + header.len as usize);
                    assert!(used.written as usize <= used.bytes.len());
                }
            }
        }
        self.sockets.extend(self.answers.1.try_iter().map(UnixStream::from));
        self.sockets.truncate(32);
    }

    fn packet(&mut self, header: &[u8], payload: &[u8], split: u8) {
        let whole = [header, payload].concat();
        let size = if split == 0 { whole.len() } else { usize::from(split) };
        let mut buffers: Vec<Buffer> = whole
            .chunks(size.max(1))
            .take(20)
            .map(|piece| Buffer::Out(piece.to_vec()))
            .collect();
        if split == u8::MAX {
            buffers.push(Buffer::In(8));
        }
        self.add(TRANSMIT, &buffers);
        self.kick(TRANSMIT);
    }

    fn socket(&mut self, socket: u8) -> Option<&mut UnixStream> {
        let count = self.sockets.len().max(1);
        let socket = self.sockets.get_mut(usize::from(socket) % count)?;
        socket.set_nonblocking(true).expect("a socket");
        Some(socket)
    }

    fn host_ports(&self, port: u8) -> u32 {
        match port {
            0..128 => (port % 4).into(),
            _ => OWN_PORTS + u32::from(port % 16),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Packet {
                host_port,
                guest_port,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
                len,
                split,
            } => {
                let header = Header {
                    src_cid: CID,
                    dst_cid: HOST_CID,
                    src_port: (guest_port % 4).into(),
                    dst_port: self.host_ports(host_port),
                    len: len.into(),
                    kind: 1,
                    op: (op % 9).into(),
                    flags: flags.into(),
                    buf_alloc,
                    fwd_cnt: fwd_cnt.into(),
                };
                self.packet(&header.bytes(), &vec![op; usize::from(len)], split);
            }
            Step::Odd { header, payload } => self.packet(&header, &vec![0; payload.into()], 0),
            Step::Buffers { count, sizes } => {
                for _ in 0..count % 16 {
                    self.add(RECEIVE, &sizes.map(|size| Buffer::In((size % 8192).into())));
                }
                self.kick(RECEIVE);
            }
            Step::EventBuffer(size) => {
                self.add(EVENTS, &[Buffer::In(size.into())]);
                self.kick(EVENTS);
            }
            Step::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                let queue = u16::from(queue % 3);
                self.rig
                    .write_descriptor(queue, index.into(), address.into(), len, flags.into(), next.into());
            }
            Step::Available { queue, head } => self.rig.make_available((queue % 3).into(), head),
            Step::Index { queue, index } => self.rig.set_available_index((queue % 3).into(), index),
            Step::Kick(queue) => self.kick((queue % 3).into()),
            Step::Listen(port) => {
                let sender = self.requests.0.clone();
                // Past its end nobody wants to know.
                let sink = move |incoming| drop(sender.send(incoming));
                self.listeners.extend(self.handle.listen((port % 4).into(), 3, sink));
            }
            Step::Unlisten => drop(self.listeners.pop()),
            Step::Connect(port) => {
                let sender = self.answers.0.clone();
                self.handle.connect((port % 4).into(), move |answer| {
                    if let Ok(socket) = answer {
                        let _ = sender.send(socket);
                    }
                });
            }
            Step::Accept => {
                if let Ok(incoming) = self.requests.1.try_recv() {
                    self.sockets.extend(incoming.accept().map(UnixStream::from));
                }
            }
            Step::Refuse => drop(self.requests.1.try_recv()),
            Step::HostWrites { socket, len } => {
                if let Some(socket) = self.socket(socket) {
                    let _ = socket.write(&vec![7; len.into()]);
                }
            }
            Step::HostReads { socket, len } => {
                if let Some(socket) = self.socket(socket) {
                    let _ = socket.read(&mut vec![0; len.into()]);
                }
            }
            Step::HostShuts { socket, how } => {
                if let Some(socket) = self.socket(socket) {
                    let _ = socket.shutdown([Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(how % 3)]);
                }
            }
            Step::HostCloses(socket) => {
                if !self.sockets.is_empty() {
                    let socket = usize::from(socket) % self.sockets.len();
                    drop(self.sockets.swap_remove(socket));
                }
            }
            Step::Reset => {
                self.rig.reset();
                self.activate();
            }
            Step::ResetQueue(queue) => {
                let queue = u16::from(queue % 3);
                self.used[usize::from(queue)].clear();
                let result = self.rig.reset_queue(queue);
                self.check(result);
            }
            Step::TransportReset => self.handle.transport_reset(),
        }
        let result = self.rig.settle();
        self.check(result);
        self.collect();
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut world = World::new();
    for step in steps.into_iter().take(300) {
        world.step(step);
    }
});
