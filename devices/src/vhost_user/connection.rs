//! A connection to a back end: messages go out and replies come in, in order, without ever blocking.
//!
//! ```text
//!   send -> outgoing --progress--> socket --> back end
//!              '-> awaited ......................|
//!                     |                          v
//!          replies <- match <--- incoming <--- socket
//! ```
//!
//! A back end answers in the order of the requests. Anything else that it sends ends the connection, and so does a reply that is not what its
//! request calls for; nothing of it is kept but the bytes of one reply and a few descriptors.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::message::{BadReply, Expected, HEADER_BYTES, Header, PAYLOAD_MAX, REGIONS_MAX, Reply, Request};

/// Most descriptors kept of a back end's: only one reply has any.
const DESCRIPTORS_MAX: usize = 4;
/// Replies taken at once; more wait for the next event.
const REPLIES_PER_TURN: usize = 64;

/// Why a back end is not there any more.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// It closed the connection.
    #[error("the back end closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection to the back end failed: {0}")]
    Io(#[from] io::Error),
    /// It broke the protocol, or refused to do as it was told.
    #[error("the back end answered {request} with {reason}")]
    Reply {
        /// What it was to answer.
        request: &'static str,
        /// What is wrong with that.
        reason: BadReply,
    },
    /// It sent something that it was not asked for.
    #[error("the back end sent {0} bytes that it was not asked for")]
    Unasked(usize),
    /// It did not answer in time.
    #[error("the back end did not answer {request} in {} ms", within.as_millis())]
    TimedOut {
        /// What it was to answer.
        request: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// It cannot serve this device.
    #[error("the back end cannot serve this device: {0}")]
    Refused(#[from] super::greeting::Refusal),
    /// It has to make way for another.
    #[error("another back end takes its place")]
    Replaced,
}

impl From<Errno> for Lost {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

/// A message on its way out.
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// They go with the first byte.
    descriptors: Vec<OwnedFd>,
}

/// A reply that has not come yet.
struct Awaited {
    number: u32,
    name: &'static str,
    expected: Expected,
}

/// What came back, and for which request.
pub(super) struct Answer {
    pub(super) reply: Reply,
    /// Of a reply that has one.
    pub(super) descriptor: Option<OwnedFd>,
}

/// See the module's head.
pub(super) struct Connection {
    socket: OwnedFd,
    outgoing: VecDeque<Outgoing>,
    awaited: VecDeque<Awaited>,
    incoming: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// The back end confirms what it is told.
    confirms: bool,
}

impl Connection {
    /// A connection over `socket`, a connected Unix stream.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            outgoing: VecDeque::new(),
            awaited: VecDeque::new(),
            incoming: Vec::new(),
            descriptors: VecDeque::new(),
            confirms: false,
        }
    }

    /// From now on the back end is asked to confirm what has no other reply.
    pub(super) fn ask_to_confirm(&mut self) {
        self.confirms = true;
    }

    /// Queues a message.
    pub(super) fn send(&mut self, request: &Request, descriptors: Vec<OwnedFd>) {
        let own = request.expected();
        let expected = own.or(self.confirms.then_some(Expected::Ack));
        if let Some(expected) = expected {
            self.awaited.push_back(Awaited {
                number: request.number(),
                name: request.name(),
                expected,
            });
        }
        self.outgoing.push_back(Outgoing {
            bytes: request.encode(own.is_none() && self.confirms),
            sent: 0,
            descriptors,
        });
    }

    /// Whether there is more to send than the socket takes now.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether the back end has nothing to answer.
    pub(super) fn is_idle(&self) -> bool {
        self.outgoing.is_empty() && self.awaited.is_empty()
    }

    /// Sends and receives what can be at once.
    ///
    /// # Errors
    ///
    /// [`Lost`]: the connection is of no use any more.
    pub(super) fn progress(&mut self) -> Result<Vec<Answer>, Lost> {
        self.flush()?;
        let mut answers = Vec::new();
        while answers.len() < REPLIES_PER_TURN {
            if let Some(answer) = self.take_answer()? {
                answers.push(answer);
                continue;
            }
            if !self.receive()? {
                break;
            }
        }
        Ok(answers)
    }

    /// Waits until there is something to receive, or room to send what has to be; at the latest until `deadline`.
    ///
    /// # Errors
    ///
    /// [`Lost::TimedOut`], after `within`.
    pub(super) fn wait(&self, deadline: Instant, within: Duration) -> Result<(), Lost> {
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, self.wants_to_send());
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.socket, flags)], Some(&timeout)) {
                Ok(0) => return Err(self.late(within)),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// What the back end did not do `within` the time that it had.
    pub(super) fn late(&self, within: Duration) -> Lost {
        let request = self.awaited.front().map_or("a message", |awaited| awaited.name);
        Lost::TimedOut { request, within }
    }

    fn flush(&mut self) -> Result<(), Lost> {
        while let Some(message) = self.outgoing.front_mut() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors: Vec<BorrowedFd<'_>> = message.descriptors.iter().map(AsFd::as_fd).collect();
            if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                return Err(io::Error::other("too many descriptors for one message").into());
            }
            let bytes = IoSlice::new(&message.bytes[message.sent..]);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.socket, &[bytes], &mut control, flags) {
                Ok(sent) => {
                    message.sent += sent;
                    message.descriptors.clear();
                    if message.sent >= message.bytes.len() {
                        self.outgoing.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Receives into what is kept: at most the longest reply. False: there is nothing for now.
    fn receive(&mut self) -> Result<bool, Lost> {
        let mut buffer = [0; HEADER_BYTES + PAYLOAD_MAX];
        let room = buffer.len() - self.incoming.len().min(buffer.len());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut vectors = [IoSliceMut::new(&mut buffer[..room])];
        let received = loop {
            match rustix::net::recvmsg(&self.socket, &mut vectors, &mut control, flags) {
                Ok(received) => break received.bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                // What is too many is closed at once.
                for descriptor in descriptors {
                    if self.descriptors.len() < DESCRIPTORS_MAX {
                        self.descriptors.push_back(descriptor);
                    }
                }
            }
        }
        if received == 0 {
            return Err(Lost::Closed);
        }
        self.incoming.extend_from_slice(&buffer[..received]);
        Ok(true)
    }

    /// Takes the next whole reply of what was received.
    fn take_answer(&mut self) -> Result<Option<Answer>, Lost> {
        let Some(awaited) = self.awaited.front() else {
            return match self.incoming.len() {
                0 => Ok(None),
                bytes => Err(Lost::Unasked(bytes)),
            };
        };
        let &Awaited { number, name, expected } = awaited;
        let bad = |reason| Lost::Reply { request: name, reason };
        let Some(header) = self.incoming.first_chunk() else {
            return Ok(None);
        };
        let len = Header::decode(*header).check(number, expected).map_err(bad)?;
        let Some(payload) = self.incoming.get(HEADER_BYTES..HEADER_BYTES + len) else {
            return Ok(None);
        };
        let reply = Reply::decode(expected, payload).map_err(bad)?;
        self.incoming.drain(..HEADER_BYTES + len);
        self.awaited.pop_front();
        let descriptor = match expected {
            Expected::Inflight => self.descriptors.pop_front(),
            _ => None,
        };
        Ok(Some(Answer { reply, descriptor }))
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
