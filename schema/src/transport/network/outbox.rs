//! The bytes that wait to be written, with the descriptors that go along.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    task::{Context, Poll, ready},
};

use capnp::serialize;

use super::Message;
use crate::transport::fd_stream::{Link, MAX_FDS_PER_SEND, borrow};

/// Memory that an empty outbox keeps.
const KEEP: usize = 128 * 1024;

/// Bytes, and messages, that are written even while more messages wait to be handled: the peer works on these meanwhile.
const WRITE_AT_BYTES: usize = 64 * 1024;
const WRITE_AT_MESSAGES: usize = 16;

#[derive(Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    /// Bytes of `bytes` that are written.
    head: usize,
    /// Stream offset of `bytes[head]`.
    offset: u64,
    /// Messages that have come since something was written.
    messages: usize,
    /// Descriptors with the stream offset of the byte that takes them along, in order.
    fds: VecDeque<(u64, Vec<OwnedFd>)>,
}

impl Outbox {
    pub(super) fn unsent(&self) -> usize {
        self.bytes.len() - self.head
    }

    /// Whether there is so much that it is written although more may be added soon.
    pub(super) fn is_worth_writing(&self) -> bool {
        self.unsent() >= WRITE_AT_BYTES || self.messages >= WRITE_AT_MESSAGES
    }

    /// Stream offset up to which all is written.
    pub(super) fn written(&self) -> u64 {
        self.offset
    }

    pub(super) fn clear(&mut self) {
        *self = Self {
            offset: self.offset + self.unsent() as u64,
            ..Self::default()
        };
    }

    /// Adds a message, and returns the stream offset of its end.
    pub(super) fn push(&mut self, message: &Message, fds: Vec<OwnedFd>) -> u64 {
        if self.head == self.bytes.len() {
            self.bytes.clear();
            self.head = 0;
        } else if self.head >= KEEP && self.head >= self.unsent() {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
        let start = self.offset + self.unsent() as u64;
        if !fds.is_empty() {
            self.fds.push_back((start, fds));
        }
        // Writing to memory does not fail.
        let _ = serialize::write_message(&mut self.bytes, message);
        self.messages += 1;
        self.offset + self.unsent() as u64
    }

    /// Writes some bytes.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, link: &mut dyn Link) -> Poll<io::Result<()>> {
        let mut until = self.bytes.len();
        let mut carried: &[OwnedFd] = &[];
        let mut next = self.fds.iter();
        if let Some((at, fds)) = self.fds.front()
            && *at <= self.offset
        {
            next.next();
            carried = &fds[..fds.len().min(MAX_FDS_PER_SEND)];
            if carried.len() < fds.len() {
                // The rest goes with the next byte, still of the same message.
                until = self.head + 1;
            }
        }
        if let Some((at, _)) = next.next() {
            // What comes with descriptors begins a write of its own.
            let before = usize::try_from(at - self.offset).unwrap_or(usize::MAX);
            until = until.min(self.head.saturating_add(before));
        }
        let written = ready!(link.poll_send(cx, &self.bytes[self.head..until], &borrow(carried)))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.messages = 0;
        let sent = carried.len();
        self.head += written;
        self.offset += written as u64;
        if sent > 0
            && let Some((at, fds)) = self.fds.front_mut()
        {
            fds.drain(..sent);
            *at = self.offset;
            if fds.is_empty() {
                self.fds.pop_front();
            }
        }
        if self.unsent() == 0 && self.bytes.capacity() > KEEP {
            (self.bytes, self.head) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}
