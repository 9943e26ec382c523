//! The host's end of a connection: our end of a Unix stream socket, and the guest's bytes that it did not take yet.
//!
//! ```text
//!   guest's packet --sendmsg, from guest memory--> socket          (all of it, as a rule)
//!        '-- what it does not take --> backlog --sendmsg, when there is room--> socket
//!   guest's buffers <--recvmsg, into guest memory-- socket
//! ```
//!
//! The backlog is never longer than the room that the guest was promised. The socket is watched edge-triggered, so what is known of its
//! readiness is kept here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use event_manager::EventSet;
use rustix::net::Shutdown;
use vm_memory::VolatileSlice;

use crate::virtio::chain::Reader;

/// Pieces of memory that one system call takes at most (IOV_MAX).
pub(super) const MAX_PIECES: usize = 1024;
/// What a stream is watched for.
pub(super) const WATCHED: EventSet = EventSet::IN
    .union(EventSet::OUT)
    .union(EventSet::READ_HANG_UP)
    .union(EventSet::EDGE_TRIGGERED);

/// Pieces of guest memory, for one system call.
#[derive(Default)]
pub(super) struct Pieces(Vec<libc::iovec>);

impl Pieces {
    /// Adds a piece; false if there are as many as there may be. The memory has to outlive the system call, which guest memory does.
    pub(super) fn push(&mut self, slice: &VolatileSlice<'_>) -> bool {
        let room = self.0.len() < MAX_PIECES;
        if room && !slice.is_empty() {
            self.0.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        room
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: a structure of integers and pointers, for which zeroes are values: no name, no control data, no pieces.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.0.as_mut_ptr();
        message.msg_iovlen = self.0.len();
        message
    }
}

/// What reading brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing for now.
    Nothing,
    /// The host will not send any more.
    End,
    /// The host closed its end before it had taken all that the guest sent.
    Reset,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Stream {
    socket: OwnedFd,
    readable: bool,
    writable: bool,
    /// The other end will not send any more; what it sent may still be unread.
    ending: bool,
    /// Both directions have ended, or the other end is closed.
    hung_up: bool,
    /// The other end takes nothing any more.
    broken: bool,
    /// The guest will not send any more: the host is to learn this after the backlog.
    end_due: bool,
    backlog: VecDeque<u8>,
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Stream {
    /// A connection's end; the other end of `socket` is the host's.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            // What is there already is an event once it is watched.
            readable: false,
            writable: true,
            ending: false,
            hung_up: false,
            broken: false,
            end_due: false,
            backlog: VecDeque::new(),
        }
    }

    /// Notes an event on the socket.
    pub(super) fn event(&mut self, events: EventSet) {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.hung_up |= gone;
        self.ending |= gone || events.contains(EventSet::READ_HANG_UP);
        self.readable |= self.ending || events.contains(EventSet::IN);
        self.writable |= gone || events.contains(EventSet::OUT);
    }

    /// Whether there may be something to read: bytes, or the end.
    pub(super) fn readable(&self) -> bool {
        self.readable
    }

    /// Whether both directions have ended.
    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether the other end takes nothing any more; what it had not taken is gone.
    pub(super) fn broken(&self) -> bool {
        self.broken
    }

    /// Whether all that the guest sent is with the host, or lost.
    pub(super) fn drained(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Reads into `pieces`, which have room for `room` bytes in all, at least one.
    pub(super) fn read(&mut self, pieces: &mut Pieces, room: usize) -> Read {
        let mut message = pieces.message();
        // SAFETY: the pieces are guest memory, which is mapped for as long as this process runs a device; the kernel writes nowhere else,
        // and nothing here holds a reference into it.
        let count = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        match usize::try_from(count) {
            Ok(0) => {
                self.readable = false;
                Read::End
            }
            Ok(count) => {
                // Less than there is room for: no more for now, and the next byte is an event. An end is not another event once it is known.
                self.readable = count >= room || self.ending;
                Read::Bytes(count)
            }
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => Read::Nothing,
                io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Read::Nothing
                }
                _ => {
                    self.readable = false;
                    Read::Reset
                }
            },
        }
    }

    /// Passes on what `payload` holds: how many of the bytes held for the host are gone now. The others are in the backlog.
    pub(super) fn write(&mut self, mut payload: Reader<'_, '_>) -> usize {
        let len = payload.left();
        if self.broken {
            return len;
        }
        let mut sent = 0;
        if self.backlog.is_empty() && self.writable {
            let mut pieces = Pieces::default();
            let mut offered = 0;
            for slice in payload.clone().slices(len).unwrap_or_default() {
                if !pieces.push(&slice) {
                    break;
                }
                offered += slice.len();
            }
            sent = self.send(&mut pieces, offered);
            if self.broken {
                return len;
            }
        }
        // Not more than there are.
        let _ = payload.skip(sent);
        self.backlog.extend(payload.read_to_end(len));
        sent
    }

    /// Goes on with the backlog: how many bytes are gone from it, because the host took them or because it takes none any more.
    pub(super) fn flush(&mut self) -> usize {
        let before = self.backlog.len();
        while !self.backlog.is_empty() && self.writable && !self.broken {
            let (front, back) = self.backlog.as_slices();
            let mut pieces = Pieces(
                [front, back]
                    .iter()
                    .map(|part| libc::iovec {
                        iov_base: part.as_ptr().cast_mut().cast(),
                        iov_len: part.len(),
                    })
                    .collect(),
            );
            let sent = self.send(&mut pieces, before);
            self.backlog.drain(..sent.min(self.backlog.len()));
        }
        if self.broken {
            self.backlog.clear();
        }
        if self.backlog.is_empty() {
            // Most connections never have one again.
            self.backlog = VecDeque::new();
            if std::mem::take(&mut self.end_due) {
                self.shutdown(Shutdown::Write);
            }
        }
        before - self.backlog.len()
    }

    /// The guest will not send any more.
    pub(super) fn end(&mut self) {
        self.end_due = true;
        self.flush();
    }

    /// The guest takes nothing any more: the host's writes fail from now on.
    pub(super) fn refuse_input(&mut self) {
        self.readable = false;
        self.shutdown(Shutdown::Read);
    }

    fn shutdown(&self, how: Shutdown) {
        // Fails only if the other end is closed, which is told otherwise.
        let _ = rustix::net::shutdown(&self.socket, how);
    }

    /// Sends; how much of it went.
    fn send(&mut self, pieces: &mut Pieces, offered: usize) -> usize {
        let message = pieces.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pieces are guest memory, which is mapped for as long as this process runs a device, or the backlog, which is not touched
        // in between; the kernel only reads them.
        let count = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &message, flags) };
        if let Ok(count) = usize::try_from(count) {
            self.writable = count >= offered;
            return count;
        }
        match io::Error::last_os_error().kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => self.writable = false,
            _ => self.broken = true,
        }
        0
    }
}
