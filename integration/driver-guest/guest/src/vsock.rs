//! Sockets to the host.

mod bench;

use alloc::format;
use alloc::string::String;
use alloc::vec;

use virtio_drivers::Error;
use virtio_drivers::device::socket::{
    DisconnectReason, SocketError, VMADDR_CID_HOST, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEvent,
    VsockEventType,
};
use virtio_drivers::transport::DeviceType;

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;

pub(crate) use bench::ping;

/// Bytes of each receive buffer, packet header included.
const BUFFER: usize = 8192;
/// Bytes that the host may send before we have read them.
const WINDOW: u32 = 256 << 10;
/// Bytes of one packet that we send.
const PIECE: usize = 16384;
/// How long anything from outside may take, in milliseconds.
const PATIENCE: u64 = 60_000;
const LOCAL_PORT: u32 = 49152;

/// The driver with one connection, or waiting for it.
struct Socket {
    driver: VsockConnectionManager<Identity, Port, BUFFER>,
    peer: VsockAddr,
    port: u32,
    /// Bytes that we have read and the host does not know of.
    taken: usize,
    /// When waiting ends.
    deadline: u64,
}

/// What ended a connection.
type Ended = Option<DisconnectReason>;

impl Socket {
    fn open(guest: &mut Guest, number: usize) -> Result<Self, Failure> {
        let driver = VirtIOSocket::<Identity, Port, BUFFER>::new(Port::open(guest, DeviceType::Socket, number)?)?;
        Ok(Self {
            driver: VsockConnectionManager::new_with_capacity(driver, WINDOW),
            peer: VsockAddr {
                cid: VMADDR_CID_HOST,
                port: 0,
            },
            port: LOCAL_PORT,
            taken: 0,
            deadline: guest.now() + PATIENCE * 1_000_000,
        })
    }

    fn event(&mut self, guest: &mut Guest, what: &str) -> Result<VsockEvent, Failure> {
        loop {
            if let Some(event) = self.driver.poll()? {
                return Ok(event);
            }
            ensure!(guest.now() < self.deadline, "{what} did not happen");
            core::hint::spin_loop();
        }
    }

    fn connect(&mut self, guest: &mut Guest, port: u32) -> Result<(), Failure> {
        self.peer.port = port;
        self.driver.connect(self.peer, self.port)?;
        loop {
            match self.event(guest, "the connection")?.event_type {
                VsockEventType::Connected => return Ok(()),
                VsockEventType::Disconnected { reason } => return Err(Failure(format!("refused: {reason:?}"))),
                _ => {}
            }
        }
    }

    /// Sends as much of `data` as the host has room for.
    fn send(&mut self, data: &[u8]) -> Result<usize, Failure> {
        let mut sent = 0;
        for piece in data.chunks(PIECE) {
            match self.driver.send(self.peer, self.port, piece) {
                Ok(()) => sent += piece.len(),
                Err(Error::SocketDeviceError(SocketError::InsufficientBufferSpaceInPeer)) => break,
                Err(other) => return Err(other.into()),
            }
        }
        Ok(sent)
    }

    /// Takes what has come, and tells the host that there is room again once half of it was used, as Linux does not for every packet either.
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        let count = match self.driver.recv(self.peer, self.port, into) {
            Ok(count) => count,
            // The connection was closed with everything read.
            Err(Error::SocketDeviceError(SocketError::NotConnected)) => 0,
            Err(other) => return Err(other.into()),
        };
        self.taken += count;
        if self.taken >= WINDOW as usize / 2 {
            self.taken = 0;
            match self.driver.update_credit(self.peer, self.port) {
                Ok(()) | Err(Error::SocketDeviceError(SocketError::NotConnected)) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(count)
    }

    /// Looks for an event; tells if it was the connection's end.
    fn poll(&mut self, guest: &mut Guest) -> Result<Ended, Failure> {
        ensure!(guest.now() < self.deadline, "nothing came any more");
        match self.driver.poll()?.map(|event| event.event_type) {
            Some(VsockEventType::Disconnected { reason }) => Ok(Some(reason)),
            _ => Ok(None),
        }
    }
}

/// Byte `index` of what is sent both ways.
fn byte(index: usize) -> u8 {
    (index % 251) as u8
}

/// `vsock-echo:PORT[:BYTES]`: connects to the host's port, sends so many bytes and gets the same back, then shuts the connection down.
pub(crate) fn echo(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (port, total): (u32, usize) = (arguments.number(0, 1024)?, arguments.number(1, 100_000)?);
    let mut socket = Socket::open(guest, arguments.device)?;
    socket.connect(guest, port)?;
    let (mut sent, mut got) = (0, 0);
    let mut buffer = vec![0; PIECE];
    while got < total {
        if sent < total {
            let piece: alloc::vec::Vec<u8> = (sent..total.min(sent + PIECE)).map(byte).collect();
            sent += socket.send(&piece)?;
        }
        let end = socket.poll(guest)?;
        let count = socket.receive(&mut buffer)?;
        let right = buffer
            .iter()
            .take(count)
            .enumerate()
            .all(|(index, &value)| value == byte(got + index));
        ensure!(right, "the echo differs after {got} bytes");
        got += count;
        ensure!(
            end.is_none() || got == total,
            "the host closed after {got} bytes: {end:?}"
        );
    }
    socket.driver.shutdown(socket.peer, socket.port)?;
    let reason = loop {
        if let Some(reason) = socket.poll(guest)? {
            break reason;
        }
    };
    Ok(format!("cid={} bytes={got} end={reason:?}", socket.driver.guest_cid()))
}

/// `vsock-listen:PORT`: takes one connection from the host and echoes until the host shuts it down.
pub(crate) fn listen(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut socket = Socket::open(guest, arguments.device)?;
    socket.port = arguments.number(0, 1024)?;
    socket.driver.listen(socket.port);
    guest.say("waiting vsock-listen");
    socket.peer = loop {
        let event = socket.event(guest, "a connection")?;
        if event.event_type == VsockEventType::ConnectionRequest {
            break event.source;
        }
    };
    let (mut echoed, mut ended) = (0, None);
    let mut buffer = vec![0; PIECE];
    loop {
        ended = ended.or(socket.poll(guest)?);
        let count = socket.receive(&mut buffer)?;
        let mut sent = 0;
        while sent < count {
            sent += socket.send(&buffer[sent..count])?;
            if sent < count {
                ended = ended.or(socket.poll(guest)?);
            }
        }
        echoed += count;
        if count == 0
            && let Some(reason) = ended
        {
            return Ok(format!("bytes={echoed} end={reason:?}"));
        }
    }
}

/// `vsock-refused:PORT`: connecting to a port where nobody listens ends in a reset.
pub(crate) fn refused(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut socket = Socket::open(guest, arguments.device)?;
    socket.peer.port = arguments.number(0, 1)?;
    socket.driver.connect(socket.peer, socket.port)?;
    loop {
        match socket.event(guest, "an answer")?.event_type {
            VsockEventType::Disconnected {
                reason: DisconnectReason::Reset,
            } => return Ok(String::new()),
            VsockEventType::Connected => return Err(Failure("it is connected".into())),
            _ => {}
        }
    }
}

/// `vsock-bulk:PORT[:BYTES[:out|in]]`: sends so many bytes to the host, or receives them, and says how long that took.
pub(crate) fn bulk(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (port, total): (u32, usize) = (arguments.number(0, 1024)?, arguments.number(1, 64 << 20)?);
    let out = arguments.text(2) != Some("in");
    let mut socket = Socket::open(guest, arguments.device)?;
    socket.connect(guest, port)?;
    let mut buffer = vec![0; WINDOW as usize];
    let mut moved = 0;
    let start = guest.now();
    while moved < total {
        let end = socket.poll(guest)?;
        if out {
            let count = PIECE.min(total - moved);
            moved += socket.send(&buffer[..count])?;
        } else {
            moved += socket.receive(&mut buffer)?;
        }
        ensure!(end.is_none() || moved == total, "the host closed after {moved} bytes");
    }
    if out {
        // Until the host has everything: it closes when it has read to the end.
        socket.driver.shutdown(socket.peer, socket.port)?;
        while socket.poll(guest)?.is_none() {}
    }
    let micros = ((guest.now() - start) / 1000).max(1);
    Ok(format!("bytes={moved} us={micros} mb_s={}", moved as u64 / micros))
}
