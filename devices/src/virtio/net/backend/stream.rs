//! A stream socket that carries Ethernet frames, each behind its length as 4 bytes, big-endian: what passt and QEMU's "-netdev stream" speak.
//!
//! Frames are staged on both ways, so that one system call moves many. A frame that went out in part is finished first, whatever becomes of the
//! driver that sent it: the stream must stay whole.
//!
//! Packets to a loopback address never leave the device. No host may send them (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.3), and passt as
//! of 2023 would connect them to what listens on its host's own loopback interface.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, send, sockopt};
use vm_memory::VolatileSlice;

use super::super::header::{Header, MAX_FRAME, VLAN_BYTES};
use super::{Backend, Received, Room, Sent};

/// Bytes of the length in front of a frame.
const LENGTH: usize = 4;
/// The longest frame that a peer may announce: what QEMU takes (its NET_BUFSIZE). A longer one means that the stream is out of step.
const MAX_ANNOUNCED: usize = 4096 + 65536;
/// Bytes staged on the way in: at least the longest frame.
const STAGED_IN: usize = 128 << 10;
/// Bytes staged on the way out, at most: more than one of the longest frames.
const STAGED_OUT: usize = 128 << 10;

/// Why a descriptor cannot serve as a network device's host side.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is no socket.
    #[error("the descriptor is no socket: {0}")]
    NoSocket(io::Error),
    /// It is a socket of another kind.
    #[error("the socket is no Unix stream socket")]
    Kind,
}

/// See the module's head.
pub(in super::super) struct Stream {
    /// One.
    socket: [OwnedFd; 1],
    incoming: Incoming,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that are out.
    out: usize,
}

impl Stream {
    pub(in super::super) fn new(socket: OwnedFd) -> Result<Self, StreamError> {
        let no_socket = |error: Errno| StreamError::NoSocket(error.into());
        let kind = sockopt::socket_type(&socket).map_err(no_socket)?;
        let family = sockopt::socket_domain(&socket).map_err(no_socket)?;
        if kind != SocketType::STREAM || family != AddressFamily::UNIX {
            return Err(StreamError::Kind);
        }
        Ok(Self {
            socket: [socket],
            incoming: Incoming::default(),
            outgoing: Vec::new(),
            out: 0,
        })
    }

    /// The next whole frame among the staged bytes, after reading more if need be.
    fn next(&mut self) -> Result<Range<usize>, Received> {
        loop {
            match self.incoming.next() {
                Ok(Some(frame)) => return Ok(frame),
                Ok(None) => {}
                Err(TooLong(len)) => {
                    let reason = format!("a frame of {len} bytes was announced on the socket: it is out of step");
                    return Err(Received::Lost(reason));
                }
            }
            match recv(self.socket[0].as_fd(), self.incoming.room(), RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(Received::Lost("its socket was closed".into())),
                Ok((_, len)) => self.incoming.arrived(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Received::Nothing),
                Err(error) => return Err(Received::Lost(format!("its socket cannot be read: {error}"))),
            }
        }
    }
}

impl Backend for Stream {
    fn ports(&self) -> &[OwnedFd] {
        &self.socket
    }

    fn features(&self) -> u64 {
        0
    }

    fn set_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, _: usize, room: &mut Room<'_, '_>) -> Received {
        let frame = match self.next() {
            Ok(range) => &self.incoming.bytes[range],
            Err(nothing) => return nothing,
        };
        room.put(frame);
        Received::Frame {
            header: Header::default(),
            len: frame.len(),
        }
    }

    fn discard(&mut self, _: usize) -> Received {
        match self.next() {
            Ok(range) => Received::Frame {
                header: Header::default(),
                len: range.len(),
            },
            Err(nothing) => nothing,
        }
    }

    fn send(&mut self, port: usize, _: &Header, slices: &[VolatileSlice<'_>]) -> Sent {
        let len: usize = slices.iter().map(VolatileSlice::len).sum();
        if len > MAX_FRAME + VLAN_BYTES {
            return Sent::Refused(Errno::MSGSIZE.into());
        }
        if self.outgoing.len() + LENGTH + len > STAGED_OUT {
            match self.flush(port) {
                Sent::Done => {}
                other => return other,
            }
        }
        // Far below 2^32.
        self.outgoing.extend_from_slice(&(len as u32).to_be_bytes());
        let frame = self.outgoing.len();
        for slice in slices {
            let start = self.outgoing.len();
            self.outgoing.resize(start + slice.len(), 0);
            slice.copy_to(&mut self.outgoing[start..]);
        }
        // The copy is looked at: the driver can change its own at any time.
        if is_for_loopback(&self.outgoing[frame..]) {
            self.outgoing.truncate(frame - LENGTH);
            return Sent::Refused(Errno::HOSTUNREACH.into());
        }
        Sent::Done
    }

    fn flush(&mut self, _: usize) -> Sent {
        while self.out < self.outgoing.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(self.socket[0].as_fd(), &self.outgoing[self.out..], flags) {
                Ok(len) => self.out += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Sent::Full,
                Err(error) => return Sent::Lost(format!("its socket cannot be written: {error}")),
            }
        }
        self.outgoing.clear();
        self.out = 0;
        Sent::Done
    }
}

/// Whether a frame holds a packet for a loopback address, or for one that hosts take for it: 127.0.0.0/8, 0.0.0.0/8; and of IPv6's reserved ::/80,
/// the unspecified and the loopback address and IPv4's addresses in both disguises.
fn is_for_loopback(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => matches!(frame.get(30), Some(0 | 127)),
        Some([0x86, 0xdd]) => frame.get(38..48) == Some(&[0; 10]),
        _ => false,
    }
}

/// Bytes that came, and where the frames among them are.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    /// Those not yet passed on.
    staged: Range<usize>,
}

/// A length that no frame has.
#[derive(Debug, PartialEq, Eq)]
struct TooLong(usize);

impl Incoming {
    /// Takes the next whole frame out: where it is in `bytes`, until [`room`](Self::room) is called.
    fn next(&mut self) -> Result<Option<Range<usize>>, TooLong> {
        let staged = &self.bytes[self.staged.clone()];
        let Some((length, rest)) = staged.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*length) as usize;
        if len > MAX_ANNOUNCED {
            return Err(TooLong(len));
        }
        if rest.len() < len {
            return Ok(None);
        }
        let start = self.staged.start + LENGTH;
        self.staged.start = start + len;
        Ok(Some(start..start + len))
    }

    /// Where the next bytes go; never empty after [`next`](Self::next) found no whole frame.
    fn room(&mut self) -> &mut [u8] {
        if self.bytes.is_empty() {
            self.bytes = vec![0; STAGED_IN];
        }
        if self.staged.is_empty() {
            self.staged = 0..0;
        } else if self.bytes.len() - self.staged.start < LENGTH + MAX_ANNOUNCED {
            self.bytes.copy_within(self.staged.clone(), 0);
            self.staged = 0..self.staged.len();
        }
        &mut self.bytes[self.staged.end..]
    }

    /// So many bytes were put into the room.
    fn arrived(&mut self, len: usize) {
        self.staged.end += len;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_length_that_no_frame_has_is_told() {
        let mut incoming = Incoming::default();
        let len = MAX_ANNOUNCED as u32 + 1;
        incoming.room()[..4].copy_from_slice(&len.to_be_bytes());
        incoming.arrived(3);
        assert_eq!(incoming.next(), Ok(None));
        incoming.arrived(1);
        assert_eq!(incoming.next(), Err(TooLong(MAX_ANNOUNCED + 1)));
    }

    #[test]
    fn packets_for_loopback_addresses_are_known() {
        let to = |kind: [u8; 2], address: &[u8]| {
            let mut frame = vec![0xee; 80];
            frame[12..14].copy_from_slice(&kind);
            let at = if kind == [8, 0] { 30 } else { 38 };
            frame[at..at + address.len()].copy_from_slice(address);
            is_for_loopback(&frame)
        };
        let v4 = |address: &str| to([0x08, 0x00], &address.parse::<std::net::Ipv4Addr>().unwrap().octets());
        let v6 = |address: &str| to([0x86, 0xdd], &address.parse::<std::net::Ipv6Addr>().unwrap().octets());
        assert!(v4("127.0.0.1") && v4("127.255.0.53") && v4("0.0.0.0"));
        assert!(!v4("10.0.2.2") && !v4("128.0.0.1") && !v4("255.255.255.255"));
        assert!(v6("::1") && v6("::") && v6("::ffff:127.0.0.1") && v6("::127.0.0.1"));
        assert!(!v6("fe80::1") && !v6("64:ff9b::127.0.0.1") && !v6("ff02::1"));
        assert!(!to([0x08, 0x06], &[127, 0, 0, 1]) && !is_for_loopback(&[0; 14]));
    }

    #[test]
    fn only_unix_stream_sockets_serve() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Stream::new(file.into()), Err(StreamError::NoSocket(_))));
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(Stream::new(udp.into()), Err(StreamError::Kind)));
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(
            lens in proptest::collection::vec(prop_oneof![0usize..100, 1400usize..1600, 60000..=MAX_ANNOUNCED], 1..12),
            cuts in proptest::collection::vec(1usize..100_000, 1..20),
        ) {
            let frames: Vec<Vec<u8>> = (0u8..).zip(&lens).map(|(n, &len)| vec![n; len]).collect();
            let bytes: Vec<u8> =
                frames.iter().flat_map(|frame| [&(frame.len() as u32).to_be_bytes()[..], frame].concat()).collect();
            let mut incoming = Incoming::default();
            let mut got = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                while let Some(range) = incoming.next().unwrap() {
                    got.push(incoming.bytes[range].to_vec());
                }
                let room = incoming.room();
                prop_assert!(!room.is_empty());
                let (now, later) = rest.split_at((*cut).min(rest.len()).min(room.len()));
                room[..now.len()].copy_from_slice(now);
                incoming.arrived(now.len());
                rest = later;
                if now.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, frames);
        }
    }
}
