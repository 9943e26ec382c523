//! The connection between manager and keeper: one JSON message a packet, with descriptors beside it.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cgroup::Limits;
use crate::layer::Layer;
use crate::outer::{ExitStatus, JailSpec};
use crate::startup::{HandleEntry, MAX_HANDLES};

/// The longest message in bytes. A spawn with a full table has about 5 KiB and its arguments.
pub(super) const MAX_MESSAGE: usize = 64 * 1024;

/// The most descriptors of a message: program, standard error, and the handles.
pub(super) const MAX_FDS: usize = MAX_HANDLES + 2;

/// The most descriptors that can be kept under one label.
pub const MAX_KEPT: usize = MAX_HANDLES;

/// The longest label in bytes.
pub const MAX_LABEL: usize = 64;

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
    /// Descriptors to hold, `count` of them.
    Keep { id: u64, label: String, count: usize },
    /// Not any more.
    DropKept { id: u64, label: String },
    /// None of this id any more, and it is not durable.
    Release { id: u64 },
    /// Whether it outlives the manager.
    Durable { id: u64, durable: bool },
    /// Descriptor: a listening socket. How long the keeper waits there when no component lives.
    Succession { key: Vec<u8>, linger_ms: u32 },
    /// Changes the limits of a component; answered by `LimitsSet`.
    Limits { id: u64, limits: Limits },
    /// Ends everything, durable or not.
    End,
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
    /// Stays without the manager, until the keeper ends.
    #[serde(default)]
    pub(super) with_keeper: bool,
    /// Only while nobody holds the lock (flock(2)) in this file, which is taken meanwhile.
    #[serde(default)]
    pub(super) lock: Option<PathBuf>,
    /// The process of the manager whose file it is.
    #[serde(default)]
    pub(super) owner: u32,
}

/// How a component came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Exited(ExitStatus),
    Failed(String),
}

/// What there is under an id that a successor takes over.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    None,
    Starting,
    /// Descriptor: the pidfd.
    Running {
        pid: u32,
        host_uid: Option<u32>,
    },
    Exited {
        status: ExitStatus,
    },
    Failed {
        message: String,
    },
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
    /// Descriptors could not be kept.
    NotKept {
        id: u64,
        label: String,
        message: String,
    },
    /// Answers `Limits`.
    LimitsSet {
        id: u64,
        error: Option<String>,
    },
    /// A request that the keeper does not know or cannot carry out.
    Refused {
        request: String,
        reason: String,
    },
    /// A successor has proved itself.
    Hello {
        version: u32,
        pid: u32,
    },
    /// What there is under an id.
    Inherited {
        id: u64,
        durable: bool,
        state: State,
    },
    /// Descriptors that were kept.
    InheritedFds {
        id: u64,
        label: String,
        count: usize,
    },
    /// That was all.
    InheritedAll,
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
    unsent: VecDeque<(Vec<u8>, Vec<Arc<OwnedFd>>)>,
    buffer: Box<[u8]>,
}

/// A message that has come.
#[derive(Debug)]
pub(super) struct Received<T> {
    /// What it says; if that is not known here, why.
    pub(super) message: Result<T, String>,
    /// What it is called, if it is not known.
    pub(super) name: String,
    /// As many of its descriptors as there was room for.
    pub(super) fds: Vec<OwnedFd>,
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

    /// True while the peer has not read all that was sent.
    pub(super) fn has_unread(&self) -> bool {
        let mut bytes: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (unix(7)), which has this number, writes an int, and that is what it is given.
        let asked = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        asked == 0 && bytes > 0
    }

    /// Sends a message, now or when [`Channel::flush`] can.
    pub(super) fn send(&mut self, message: &impl Serialize, fds: Vec<Arc<OwnedFd>>) -> Result<(), WireError> {
        if self.unsent.len() >= MAX_UNSENT {
            return Err(WireError::Malformed(format!("{MAX_UNSENT} messages wait unread")));
        }
        self.queue(message, fds)?;
        self.flush()
    }

    /// Has a message wait for [`Channel::flush`], however many wait already.
    pub(super) fn queue(&mut self, message: &impl Serialize, fds: Vec<Arc<OwnedFd>>) -> Result<(), WireError> {
        let bytes = serde_json::to_vec(message).map_err(|error| WireError::Malformed(error.to_string()))?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            let reason = format!(
                "a message of {} bytes and {} descriptors is too large",
                bytes.len(),
                fds.len()
            );
            return Err(WireError::Malformed(reason));
        }
        self.unsent.push_back((bytes, fds));
        Ok(())
    }

    /// Sends what waits, as far as the peer has room.
    pub(super) fn flush(&mut self) -> Result<(), WireError> {
        while let Some((bytes, fds)) = self.unsent.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
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
                // As many descriptors as the system allows are under way: until the peer takes some.
                Err(Errno::TOOMANYREFS) => {
                    std::thread::sleep(Duration::from_millis(1));
                    break;
                }
                Err(errno) => {
                    self.unsent.clear();
                    return Err(failure(errno));
                }
            }
        }
        Ok(())
    }

    /// The next message, or `None` if none has come.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<Received<T>>, WireError> {
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
        // Descriptors that did not fit (`CTRUNC`) are missed by whoever counts them.
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(WireError::Malformed("a message does not fit".to_owned()));
        }
        // Messages are never empty: nothing is the end.
        let bytes = self
            .buffer
            .get(..received.bytes)
            .filter(|bytes| !bytes.is_empty())
            .ok_or(WireError::Closed)?;
        let (message, name) = match serde_json::from_slice(bytes) {
            Ok(message) => (Ok(message), String::new()),
            Err(reason) => (Err(reason.to_string()), name_of(bytes)?),
        };
        Ok(Some(Received { message, name, fds }))
    }
}

/// What a message calls itself that is not known here: its only key, or all that it says.
fn name_of(message: &[u8]) -> Result<String, WireError> {
    let malformed = || WireError::Malformed("what came is no message".to_owned());
    match serde_json::from_slice(message).map_err(|error| WireError::Malformed(error.to_string()))? {
        serde_json::Value::String(name) => Ok(name),
        serde_json::Value::Object(fields) if fields.len() == 1 => {
            fields.into_iter().next().map(|(name, _)| name).ok_or_else(malformed)
        }
        _ => Err(malformed()),
    }
}

impl Channel {
    /// Ends the connection: what has come can still be received, and then its end.
    pub(super) fn hang_up(&self) {
        // Whoever watches the connection may hold a duplicate of the descriptor, so that closing this one would end nothing.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.hang_up();
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
        assert!(!a.has_unread());
        let null = std::fs::File::open("/dev/null").unwrap();
        for id in 0..1000 {
            a.send(&Request::Kill { id }, vec![Arc::new(null.try_clone().unwrap().into())])
                .unwrap();
        }
        assert!(a.has_unsent(), "the socket holds fewer");
        assert!(a.has_unread());
        for expected in 0..1000 {
            a.flush().unwrap();
            let Received { message, fds, .. } = b.receive().unwrap().unwrap();
            assert!(matches!(message, Ok(Request::Kill { id }) if id == expected));
            assert_eq!(fds.len(), 1);
        }
        assert!(!a.has_unsent() && !a.has_unread());
        drop(a);
        assert!(matches!(b.receive::<Request>(), Err(WireError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (mut a, b) = pair();
        for bytes in [&b"{"[..], b"[1]", b"{}", br#"{"kill":{"id":1},"end":{}}"#, &[0xff; 100]] {
            rustix::net::send(&b, bytes, SendFlags::empty()).unwrap();
            assert!(matches!(a.receive::<Request>(), Err(WireError::Malformed(_))));
        }
        // Of another version, perhaps.
        for (bytes, name) in [
            (&br#"{"kill":{}}"#[..], "kill"),
            (br#"{"dance":[1]}"#, "dance"),
            (br#""sing""#, "sing"),
        ] {
            rustix::net::send(&b, bytes, SendFlags::empty()).unwrap();
            let received = a.receive::<Request>().unwrap().unwrap();
            assert!(received.message.is_err());
            assert_eq!(received.name, name);
        }
        rustix::net::send(&b, br#"{"kill":{"id":1,"gently":true}}"#, SendFlags::empty()).unwrap();
        assert!(matches!(
            a.receive().unwrap().unwrap().message,
            Ok(Request::Kill { id: 1 })
        ));
        let large = Request::Forget {
            path: "x".repeat(MAX_MESSAGE).into(),
        };
        assert!(matches!(a.send(&large, Vec::new()), Err(WireError::Malformed(_))));
    }
}
