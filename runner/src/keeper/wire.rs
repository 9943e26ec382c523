//! The connection between manager and keeper: one JSON message a packet, with descriptors beside it.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::layer::Layer;
use crate::outer::{ExitStatus, JailSpec};
use crate::startup::{HandleEntry, MAX_HANDLES};

/// The longest message in bytes. A spawn with a full table has about 5 KiB and its arguments.
pub(super) const MAX_MESSAGE: usize = 64 * 1024;

/// The most descriptors of a message: program, standard error, and the handles.
pub(super) const MAX_FDS: usize = MAX_HANDLES + 2;

/// How many messages wait for a peer that does not read.
const MAX_UNSENT: usize = 4096;

/// What the manager asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    /// Descriptors: the program, standard error if there is one, the handles.
    Spawn(Spawn),
    /// Kills a component.
    Kill { id: u64 },
    /// Has a file removed at the end, if it is this file still.
    Remove(CleanFile),
    /// The manager has removed it itself.
    Forget { path: PathBuf },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Spawn {
    pub(super) id: u64,
    pub(super) program: PathBuf,
    /// Bytes, because arguments need not be UTF-8.
    pub(super) args: Vec<Vec<u8>>,
    pub(super) handles: Vec<HandleEntry>,
    pub(super) stderr: bool,
    pub(super) jail: JailSpec,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct CleanFile {
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// What the keeper reports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Event {
    /// Descriptor: the pidfd.
    Started {
        id: u64,
        pid: u32,
        host_uid: Option<u32>,
    },
    Failed {
        id: u64,
        layer: Option<Layer>,
        message: String,
    },
    Exited {
        id: u64,
        status: ExitStatus,
    },
}

/// Why the connection does not work.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("closed")]
    Closed,
    #[error("{0}")]
    Malformed(String),
    #[error(transparent)]
    System(#[from] io::Error),
}

fn failure(errno: Errno) -> WireError {
    match errno {
        Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => WireError::Closed,
        other => WireError::System(other.into()),
    }
}

/// One end of the connection; never blocks.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    unsent: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    buffer: Box<[u8]>,
}

impl Channel {
    /// Takes a connected `SOCK_SEQPACKET` socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            unsent: VecDeque::new(),
            buffer: vec![0; MAX_MESSAGE].into_boxed_slice(),
        })
    }

    /// True while messages wait until the socket is writable.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a message, now or when [`Channel::flush`] can.
    pub(super) fn send(&mut self, message: &impl Serialize, fds: Vec<OwnedFd>) -> Result<(), WireError> {
        let bytes = serde_json::to_vec(message).map_err(|error| WireError::Malformed(error.to_string()))?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            let reason = format!(
                "a message of {} bytes and {} descriptors is too large",
                bytes.len(),
                fds.len()
            );
            return Err(WireError::Malformed(reason));
        }
        if self.unsent.len() == MAX_UNSENT {
            return Err(WireError::Malformed(format!("{MAX_UNSENT} messages wait unread")));
        }
        self.unsent.push_back((bytes, fds));
        self.flush()
    }

    /// Sends what waits, as far as the peer has room.
    pub(super) fn flush(&mut self) -> Result<(), WireError> {
        while let Some((bytes, fds)) = self.unsent.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => {
                    self.unsent.pop_front();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(failure(errno)),
            }
        }
        Ok(())
    }

    /// The next message, or `None` if none has come.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut into = [IoSliceMut::new(&mut self.buffer)];
            match rustix::net::recvmsg(&self.socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(failure(errno)),
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(WireError::Malformed(
                "a message or its descriptors do not fit".to_owned(),
            ));
        }
        // Messages are never empty: nothing is the end.
        let bytes = self
            .buffer
            .get(..received.bytes)
            .filter(|bytes| !bytes.is_empty())
            .ok_or(WireError::Closed)?;
        let message = serde_json::from_slice(bytes).map_err(|error| WireError::Malformed(error.to_string()))?;
        Ok(Some((message, fds)))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Whoever watches the connection may hold a duplicate of the descriptor, so that closing this one would end nothing.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    #[test]
    fn messages_keep_their_descriptors_and_order() {
        let (mut a, mut b) = pair();
        assert!(b.receive::<Request>().unwrap().is_none());
        let null = std::fs::File::open("/dev/null").unwrap();
        for id in 0..1000 {
            a.send(&Request::Kill { id }, vec![null.try_clone().unwrap().into()])
                .unwrap();
        }
        assert!(a.has_unsent(), "the socket holds fewer");
        for expected in 0..1000 {
            a.flush().unwrap();
            let (message, fds) = b.receive().unwrap().unwrap();
            assert!(matches!(message, Request::Kill { id } if id == expected));
            assert_eq!(fds.len(), 1);
        }
        assert!(!a.has_unsent());
        drop(a);
        assert!(matches!(b.receive::<Request>(), Err(WireError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (mut a, b) = pair();
        for bytes in [&b"{"[..], b"[1]", b"{\"kill\":{}}", &[0xff; 100]] {
            rustix::net::send(&b, bytes, SendFlags::empty()).unwrap();
            assert!(matches!(a.receive::<Request>(), Err(WireError::Malformed(_))));
        }
        let large = Request::Forget {
            path: "x".repeat(MAX_MESSAGE).into(),
        };
        assert!(matches!(a.send(&large, Vec::new()), Err(WireError::Malformed(_))));
    }
}
