//! Byte streams that carry file descriptors beside the bytes, and the table that names them.
//!
//! Each direction of a connection counts the descriptors sent in it, from 0; a message names one by its number.
//!
//! ```text
//!   sender                                            receiver
//!   FdTable::send(fd) -> n                            recvmsg -> incoming[n], noted with the messages whose
//!      | waits for the next message                      |        bytes came in the same call
//!   message handed to the connection                   FdTable::take(n) -> fd, once
//!      | SCM_RIGHTS with the first byte of it            |
//!   sendmsg, then closed here                          last of those messages dropped: what nobody took is closed
//! ```
//!
//! A descriptor therefore travels with the first byte of the message that names it: never later, and never so much
//! earlier that the receiver could not tell when it has become useless. A request that is built and then dropped leaves
//! its descriptors to the next message, whose receiver closes them unseen.

use std::{
    cell::RefCell,
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll},
};

use futures::{AsyncRead, AsyncWrite};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::reactor::{AsyncFd, Direction};

/// The most descriptors that one `sendmsg` carries (`SCM_MAX_FD` of the kernel).
pub(crate) const MAX_FDS_PER_SEND: usize = 253;

/// The most descriptors that may wait for the message that names them. All of them still fit before the end of the
/// shortest message, at one byte for each [`MAX_FDS_PER_SEND`].
const MAX_QUEUED: usize = 1024;

/// Why a descriptor could not be sent or taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    /// The connection is a plain byte stream, such as one through ssh.
    #[error("this connection carries no file descriptors; send the file's bytes instead")]
    NotCarried,
    /// The connection has ended.
    #[error("the connection has ended")]
    Disconnected,
    /// More than 1024 descriptors wait for the message that names them.
    #[error("more than 1024 file descriptors wait to be sent")]
    TooMany,
    /// No descriptor of this number is there.
    #[error("file descriptor {0} was not sent, was taken already, or was closed with its message")]
    Missing(u32),
}

struct Inner {
    carries: bool,
    open: bool,
    queued: Vec<OwnedFd>,
    sent: u32,
    incoming: HashMap<u32, OwnedFd>,
    received: u32,
}

/// The descriptors of one connection, both ways. Clones lead to the same table.
#[derive(Clone)]
pub struct FdTable(Rc<RefCell<Inner>>);

impl std::fmt::Debug for FdTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FdTable")
            .field("can_carry", &self.can_carry())
            .finish_non_exhaustive()
    }
}

impl FdTable {
    pub(crate) fn new(carries: bool) -> Self {
        Self(Rc::new(RefCell::new(Inner {
            carries,
            open: true,
            queued: Vec::new(),
            sent: 0,
            incoming: HashMap::new(),
            received: 0,
        })))
    }

    /// The table of no connection: it carries none.
    pub fn none() -> Self {
        Self::new(false)
    }

    /// Whether the connection carries descriptors at all.
    pub fn can_carry(&self) -> bool {
        self.0.borrow().carries
    }

    /// Hands over a descriptor for the message that is being built, and returns the number by which that message names
    /// it. Send the message before anything else is awaited: the next message that is sent takes the descriptor along.
    ///
    /// # Errors
    /// [`FdError::NotCarried`], [`FdError::Disconnected`], [`FdError::TooMany`]; the descriptor is then closed.
    pub fn send(&self, fd: OwnedFd) -> Result<u32, FdError> {
        let mut inner = self.0.borrow_mut();
        if !inner.carries {
            return Err(FdError::NotCarried);
        }
        if !inner.open {
            return Err(FdError::Disconnected);
        }
        if inner.queued.len() >= MAX_QUEUED {
            return Err(FdError::TooMany);
        }
        inner.queued.push(fd);
        let number = inner.sent;
        inner.sent = inner.sent.wrapping_add(1);
        Ok(number)
    }

    /// Takes the descriptor that a received message names, while that message (the parameters or the response) is
    /// still held.
    ///
    /// # Errors
    /// [`FdError::NotCarried`], [`FdError::Disconnected`], or [`FdError::Missing`] when there is none of that number.
    pub fn take(&self, number: u32) -> Result<OwnedFd, FdError> {
        let mut inner = self.0.borrow_mut();
        if !inner.carries {
            return Err(FdError::NotCarried);
        }
        match inner.incoming.remove(&number) {
            Some(fd) => Ok(fd),
            None if !inner.open => Err(FdError::Disconnected),
            None => Err(FdError::Missing(number)),
        }
    }

    /// Received descriptors that nobody has taken.
    pub fn unclaimed(&self) -> usize {
        self.0.borrow().incoming.len()
    }

    /// The descriptors that go with the message that is being sent.
    pub(crate) fn take_queued(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0.borrow_mut().queued)
    }

    /// Numbers what was received. Closed when the returned group is dropped, unless taken before.
    pub(crate) fn receive(&self, fds: &mut Vec<OwnedFd>) -> FdGroup {
        let mut inner = self.0.borrow_mut();
        let first = inner.received;
        let mut count = 0;
        for fd in fds.drain(..) {
            let number = inner.received;
            inner.received = number.wrapping_add(1);
            inner.incoming.insert(number, fd);
            count += 1;
        }
        FdGroup {
            table: Rc::downgrade(&self.0),
            first,
            count,
        }
    }

    /// The connection has ended: closes everything.
    pub(crate) fn close(&self) {
        let mut inner = self.0.borrow_mut();
        inner.open = false;
        inner.queued.clear();
        inner.incoming.clear();
    }
}

/// Descriptors that came together; closes those that nobody took.
pub(crate) struct FdGroup {
    table: Weak<RefCell<Inner>>,
    first: u32,
    count: u32,
}

impl Drop for FdGroup {
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            let mut inner = table.borrow_mut();
            for n in 0..self.count {
                inner.incoming.remove(&self.first.wrapping_add(n));
            }
        }
    }
}

/// What a connection is made of: bytes both ways, descriptors where the kind carries them.
pub(crate) trait Link {
    /// Reads into `buffer`; 0 is the end. What came beside the bytes is added to `fds`.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Poll<io::Result<usize>>;

    /// Writes some of `bytes`. All of `fds`, at most [`MAX_FDS_PER_SEND`], have gone with the first byte when it is ready.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Poll<io::Result<usize>>;

    /// Sees to it that all that was written leaves.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Says that nothing more will be written.
    fn end(&mut self);
}

/// A Unix stream socket.
pub(crate) struct SocketLink {
    pub(crate) socket: AsyncFd<UnixStream>,
    /// Whether descriptors are taken from the peer.
    pub(crate) takes: bool,
}

fn receive(socket: &UnixStream, takes: bool, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_SEND))];
    // Without room for them the kernel lets go of descriptors before they are ours (unix(7)): closing one, which is up to the peer's file
    // system (FUSE's may never answer to a flush), is not.
    let mut control = match takes {
        true => RecvAncillaryBuffer::new(&mut space),
        false => RecvAncillaryBuffer::default(),
    };
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let before = fds.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) && !takes {
        return Err(io::Error::other("this peer may not send file descriptors"));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // Some are lost (this process is out of descriptors, or a security module refused one): the count is off.
        fds.clear();
        return Err(io::Error::other(
            "file descriptors of the peer were lost, perhaps for lack of free ones here",
        ));
    }
    Ok((received.bytes, fds.len() > before))
}

impl Link for SocketLink {
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Poll<io::Result<usize>> {
        let (wanted, takes) = (buffer.len(), self.takes);
        self.socket
            .poll_io(cx, Direction::Read, |socket| receive(socket, takes, buffer, fds))
            .map_ok(|(count, with_fds)| {
                // A stream socket gives all it has, except that it stops behind bytes that descriptors came with.
                if count < wanted && !with_fds {
                    self.socket.exhausted(Direction::Read);
                }
                count
            })
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Poll<io::Result<usize>> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        self.socket.poll_io(cx, Direction::Write, |socket| {
            if fds.is_empty() {
                return Ok(rustix::net::send(socket, bytes, flags)?);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_SEND))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::other("too many file descriptors for one write"));
            }
            Ok(rustix::net::sendmsg(
                socket,
                &[IoSlice::new(bytes)],
                &mut control,
                flags,
            )?)
        })
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn end(&mut self) {
        // Fails only when the peer is gone already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// Any two byte streams, such as the pipes of an ssh process.
pub(crate) struct PlainLink<R, W> {
    pub(crate) reader: R,
    pub(crate) writer: W,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Link for PlainLink<R, W> {
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        _: &mut Vec<OwnedFd>,
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.reader).poll_read(cx, buffer)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8], _: &[BorrowedFd<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn end(&mut self) {
        // Best effort: the stream is dropped next.
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let _ = Pin::new(&mut self.writer).poll_close(&mut cx);
    }
}

/// Borrows the descriptors that go with one write.
pub(crate) fn borrow(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}
