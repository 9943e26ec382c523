//! The device on a bench: a fake driver on one side, sockets on the other.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::device::{EVENTS, RECEIVE, TRANSMIT};
use super::packet::{HOST_CID, Header, Op, STREAM};
use super::*;
use crate::virtio::testing::{Buffer, Rig};

mod connections;
mod flow;
mod hostile;

/// The guest's context id.
const CID: u64 = 3;
/// Bytes of a buffer of the fake driver: header and payload.
const BUFFER: u32 = 4096;
/// Payload that such a buffer takes.
const ROOM: usize = BUFFER as usize - Header::BYTES;

/// How the fake driver lays out a packet.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// Header and payload in a descriptor each, as Linux does with up to 32 KiB.
    Two,
    /// Both in one, as Linux 6.2 did.
    One,
    /// The header in one of its own, and the payload in pieces of so many bytes: of 32768 as Linux does from 6.17 on, where a packet is not one
    /// allocation any more.
    Pieces(usize),
    /// A new descriptor every so many bytes.
    Every(usize),
}

/// A guest on a bench.
struct Guest {
    rig: Rig<Vsock>,
    handle: VsockHandle,
    layout: Layout,
    /// What the guest says of its own room.
    buf_alloc: u32,
    fwd_cnt: u32,
    packets: VecDeque<(Header, Vec<u8>)>,
}

/// Ports of a connection, the host's first.
type Ports = (u32, u32);

impl Guest {
    fn new() -> Self {
        Self::with(VsockConfig::new(CID))
    }

    fn with(config: VsockConfig) -> Self {
        let (device, handle) = Vsock::new(config).unwrap();
        let mut guest = Self::resting(Rig::new(device), handle);
        guest.activate();
        guest
    }

    fn resting(rig: Rig<Vsock>, handle: VsockHandle) -> Self {
        Self {
            rig,
            handle,
            layout: Layout::Two,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
            packets: VecDeque::new(),
        }
    }

    /// Starts the device with buffers for 64 packets.
    fn activate(&mut self) {
        self.rig.activate(u64::MAX).unwrap();
        self.packets.clear();
        for _ in 0..64 {
            self.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
        }
        self.rig.kick(RECEIVE);
    }

    fn header(&self, (host, guest): Ports, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    /// Sends a packet as it is, and waits until the device has taken it.
    fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        let whole = [&header.bytes()[..], payload].concat();
        let buffers: Vec<Buffer> = match self.layout {
            Layout::One => vec![Buffer::Out(whole)],
            Layout::Every(step) => whole.chunks(step).map(|piece| Buffer::Out(piece.to_vec())).collect(),
            Layout::Two | Layout::Pieces(_) if payload.is_empty() => vec![Buffer::Out(whole)],
            Layout::Two => vec![Buffer::Out(header.bytes().to_vec()), Buffer::Out(payload.to_vec())],
            Layout::Pieces(bytes) => std::iter::once(&header.bytes()[..])
                .chain(payload.chunks(bytes))
                .map(|piece| Buffer::Out(piece.to_vec()))
                .collect(),
        };
        let head = self.rig.add(TRANSMIT, &buffers);
        self.rig.kick(TRANSMIT);
        let used = self.rig.used(TRANSMIT).unwrap();
        assert_eq!((used.head, used.written), (head, 0));
    }

    fn send(&mut self, ports: Ports, op: Op) {
        self.send_raw(&self.header(ports, op), &[]);
    }

    fn send_flags(&mut self, ports: Ports, op: Op, flags: u32) {
        let header = Header {
            flags,
            ..self.header(ports, op)
        };
        self.send_raw(&header, &[]);
    }

    fn send_data(&mut self, ports: Ports, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..self.header(ports, Op::Data)
        };
        self.send_raw(&header, payload);
    }

    /// Takes what the device has put into the receive queue, and gives it new buffers.
    fn collect(&mut self) {
        let mut taken = 0;
        while let Some(used) = self.rig.used(RECEIVE) {
            let (header, payload) = used.bytes.split_at(Header::BYTES);
            let header = Header::parse(header.try_into().unwrap());
            assert_eq!(used.written as usize, Header::BYTES + header.len as usize);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            self.packets
                .push_back((header, payload[..header.len as usize].to_vec()));
            self.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
            taken += 1;
        }
        if taken > 0 {
            self.rig.kick(RECEIVE);
        }
    }

    /// Lets everything happen that happens by itself.
    fn settle(&mut self) {
        self.rig.settle().unwrap();
        loop {
            let before = self.packets.len();
            self.collect();
            self.rig.settle().unwrap();
            if self.packets.len() == before {
                return;
            }
        }
    }

    /// The next packet of the device, which comes by itself.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        self.settle();
        loop {
            if let Some(packet) = self.packets.pop_front() {
                return packet;
            }
            self.rig.wait().unwrap();
            self.settle();
        }
    }

    fn expect(&mut self, ports: Ports, op: Op) -> Header {
        let (header, _) = self.packet();
        let found = (header.src_port, header.dst_port, Op::new(header.op), header.kind);
        assert_eq!(found, (ports.0, ports.1, Some(op), STREAM), "{header:?}");
        header
    }

    /// That the device has nothing to say.
    fn expect_nothing(&mut self) {
        self.settle();
        assert_eq!(self.packets, VecDeque::new());
    }

    /// Bytes of the connection until there are `count`, which come by themselves.
    fn data(&mut self, ports: Ports, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let (header, payload) = self.packet();
            assert_eq!((header.src_port, header.dst_port), ports);
            assert_eq!(Op::new(header.op), Some(Op::Data), "{header:?}");
            bytes.extend(payload);
        }
        assert_eq!(bytes.len(), count);
        bytes
    }

    /// A listener that grants everything, and the sockets that it got.
    fn listen(&self, port: u32) -> (Listener, Receiver<(Incoming2, UnixStream)>) {
        let (sender, receiver) = channel();
        let sink = move |incoming: Incoming| {
            let who = (incoming.peer_cid, incoming.peer_port, incoming.port);
            let socket = incoming.accept().unwrap();
            // A test that ended does not look any more.
            let _ = sender.send((who, socket.into()));
        };
        (self.handle.listen(port, 16, sink).unwrap(), receiver)
    }

    /// A connection that the guest asked for.
    fn connected_by_guest(&mut self, ports: Ports) -> UnixStream {
        let (listener, sockets) = self.listen(ports.0);
        self.send(ports, Op::Request);
        self.expect(ports, Op::Response);
        let (who, socket) = sockets.try_recv().unwrap();
        assert_eq!(who, (CID, ports.1, ports.0));
        drop(listener);
        socket
    }

    /// Asks for a connection to the guest's port; the answer comes later.
    fn connect(&mut self, port: u32) -> Receiver<Result<OwnedFd, ConnectError>> {
        let (sender, receiver) = channel();
        // A test that ended does not look any more.
        self.handle.connect(port, move |result| drop(sender.send(result)));
        receiver
    }

    /// A connection that the host asked for.
    fn connected_by_host(&mut self, port: u32) -> (Ports, UnixStream) {
        let answer = self.connect(port);
        let (request, _) = self.packet();
        let ports = (request.src_port, port);
        assert_eq!((request.dst_port, Op::new(request.op)), (port, Some(Op::Request)));
        assert!(answer.try_recv().is_err());
        self.send(ports, Op::Response);
        (ports, answer.try_recv().unwrap().unwrap().into())
    }
}

/// Context id and port of the guest, and the host's port.
type Incoming2 = (u64, u32, u32);

/// `count` bytes that differ from their neighbours, from position `start` of the stream on.
fn pattern(start: usize, count: usize) -> Vec<u8> {
    (start..start + count).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// Reads what is there, at most `most` bytes; empty at the end of the stream.
fn read_now(socket: &mut UnixStream, most: usize) -> io::Result<Vec<u8>> {
    socket.set_nonblocking(true).unwrap();
    let mut bytes = vec![0; most];
    let count = socket.read(&mut bytes)?;
    bytes.truncate(count);
    Ok(bytes)
}

fn would_block(socket: &mut UnixStream) -> bool {
    matches!(read_now(socket, 1), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Writes until the socket takes no more; how much it took.
fn fill(socket: &mut UnixStream, start: usize, most: usize) -> usize {
    socket.set_nonblocking(true).unwrap();
    let mut done = 0;
    while done < most {
        match socket.write(&pattern(start + done, (most - done).min(65536))) {
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    done
}
