//! The device on a bench: over a socket pair whose other end the test holds, and over real taps.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::virtio::testing::{Buffer, Rig, Used};

mod commands;
mod host;
mod link;
mod malformed;
mod many;
mod packets;
mod properties;
mod receiving;
mod sending;
mod tap;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Queues of a device with one pair.
const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL: u16 = 2;
const HEADER: usize = header::HEADER_BYTES;

/// A device over `backend`, as most tests need it.
fn config(backend: NetBackend) -> NetConfig {
    NetConfig {
        mac: MAC,
        mtu: 1500,
        backend,
        offloads: true,
        link_up: true,
        receive_limit: RateLimit::default(),
        send_limit: RateLimit::default(),
    }
}

/// The host's end of a stream of frames.
struct Peer(UnixStream);

impl Peer {
    /// Puts a frame on the wire. The socket holds at least a few of the largest.
    fn send(&mut self, frame: &[u8]) {
        let bytes = [&(frame.len() as u32).to_be_bytes()[..], frame].concat();
        self.0.write_all(&bytes).unwrap();
    }

    /// The next frame, or `None` if none is there.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        match self.0.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::UnexpectedEof) => return None,
            Err(error) => panic!("{error}"),
        }
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame).unwrap();
        Some(frame)
    }
}

/// A device and its peer.
fn net() -> (Net, NetHandle, Peer) {
    with(|_| {})
}

/// The same, configured by `change`.
fn with(change: impl FnOnce(&mut NetConfig)) -> (Net, NetHandle, Peer) {
    let (near, far) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let mut config = config(NetBackend::Stream(near.into()));
    change(&mut config);
    let (net, handle) = Net::new(config).unwrap();
    (net, handle, Peer(far))
}

/// On the bench and active.
fn active() -> (Rig<Net>, NetHandle, Peer) {
    let (net, handle, peer) = net();
    (Rig::active(net), handle, peer)
}

/// A frame of `len` bytes that differs from those of other numbers.
fn frame(number: u8, len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8 ^ number).collect()
}

/// A frame as a driver puts it into a transmit queue: in one buffer.
fn packet(frame: &[u8]) -> Vec<Buffer> {
    vec![Buffer::Out([&[0; HEADER][..], frame].concat())]
}

/// Frames out of chains that were given back, merged as their headers say.
fn merged(used: impl IntoIterator<Item = Used>) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut used = used.into_iter();
    while let Some(first) = used.next() {
        let count = u16::from_le_bytes([first.bytes[10], first.bytes[11]]);
        let mut bytes = first.bytes[..first.written as usize].to_vec();
        for _ in 1..count {
            let more = used.next().expect("as many chains as the header says");
            bytes.extend_from_slice(&more.bytes[..more.written as usize]);
        }
        frames.push(bytes.split_off(HEADER));
    }
    frames
}

/// All that the device gave back of `queue`.
fn given_back(rig: &mut Rig<Net>, queue: u16) -> Vec<Used> {
    std::iter::from_fn(|| rig.used(queue)).collect()
}

/// Gives the device `count` receive buffers of `len` bytes.
fn give(rig: &mut Rig<Net>, count: usize, len: u32) {
    for _ in 0..count {
        rig.add(RX, &[Buffer::In(len)]);
    }
    rig.kick(RX);
}

#[test]
fn the_configuration_says_what_the_device_is() {
    let (net, handle, _peer) = with(|config| config.mtu = 9000);
    assert_eq!(net.config().bytes, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x28, 0x23]);
    assert_eq!(net.queue_sizes(), [256; 3]);
    assert_eq!(net.features() & features::MQ, 0);
    assert_eq!(net.features() & features::TAP_OFFLOADS, 0, "a stream has no offloads");
    let info = handle.info();
    assert_eq!(
        (info.mac, info.mtu, info.queue_pairs, info.link_up),
        (MAC, 9000, 1, true)
    );
    assert_eq!(info.backend, NetBackendKind::Stream);
}

#[test]
fn a_configuration_that_cannot_be_is_refused() {
    let refused = |change: fn(&mut NetConfig)| {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut config = config(NetBackend::Stream(near.into()));
        change(&mut config);
        Net::new(config).err().unwrap().to_string()
    };
    assert_eq!(
        refused(|config| config.mac[0] = 1),
        "the MAC address is a group's or all zero"
    );
    assert_eq!(
        refused(|config| config.mac = [0; 6]),
        "the MAC address is a group's or all zero"
    );
    assert_eq!(
        refused(|config| config.mtu = 67),
        "an MTU of 67 bytes: it has to be 68 to 65520"
    );
    assert_eq!(
        refused(|config| config.mtu = 65521),
        "an MTU of 65521 bytes: it has to be 68 to 65520"
    );
    assert_eq!(
        refused(|config| config.backend = NetBackend::Tap(Vec::new())),
        "0 descriptors for the tap: there have to be 1 to 8"
    );
}
