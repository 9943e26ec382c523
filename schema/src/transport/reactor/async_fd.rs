//! A file descriptor on the loop: readiness, and asynchronous reading, writing and accepting on top of it.
//!
//! Each descriptor is registered once, edge-triggered. Its readiness is kept here: it begins as "try it", is taken back by
//! an operation that would block, and comes back with the next edge. A hang-up stays, since no further edge would tell of
//! it.
//!
//! Room to write is asked for only once there was none: a Unix socket tells of more room whenever its peer has read
//! something, and a loop that heard of that would be woken twice for each call that it makes.
//!
//! ```text
//!   not asked for ---(a write would block: modify, which tells at once if there is room again)---> asked for
//!        ^                                                                                            |
//!        +------------------------------(told, and nobody waited for it)-----------------------------+
//! ```

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::poll_fn,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use event_manager::{EventOps, EventSet, Events, SubscriberId, SubscriberOps};
use futures::{AsyncRead, AsyncWrite};

use super::{Core, Handle, Subscriber};

/// Reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Data to read, a connection to accept, the end of the stream.
    Read,
    /// Room to write.
    Write,
}

/// Readiness of one direction and who waits for it.
#[derive(Default)]
struct Side {
    ready: Cell<bool>,
    hung_up: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

impl Side {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ready.get() {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Returns whether that was worth telling.
    fn event(&self, hung_up: bool, woken: &mut Vec<Waker>) -> bool {
        let news = !self.ready.replace(true) && !self.waiting.borrow().is_empty();
        // Each event tells the whole state, so a terminal that is opened again is not hung up any more.
        self.hung_up.set(hung_up);
        woken.append(&mut self.waiting.borrow_mut());
        news
    }

    fn blocked(&self) {
        self.ready.set(self.hung_up.get());
    }
}

/// What the event manager keeps of a registered descriptor.
pub(super) struct Source {
    fd: RawFd,
    read: Side,
    write: Side,
    /// Whether the kernel is asked for room to write.
    asks_for_room: Cell<bool>,
}

impl Source {
    fn new(fd: RawFd) -> Self {
        let source = Self {
            fd,
            read: Side::default(),
            write: Side::default(),
            asks_for_room: Cell::new(false),
        };
        source.read.ready.set(true);
        source.write.ready.set(true);
        source
    }

    pub(super) fn event(&self, events: EventSet, ops: &EventOps<'_>, woken: &mut Vec<Waker>) {
        let failed = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let ended = failed || events.contains(EventSet::READ_HANG_UP);
        if ended || events.contains(EventSet::IN) {
            self.read.event(ended, woken);
        }
        if (failed || events.contains(EventSet::OUT)) && !self.write.event(failed, woken) && self.asks_for_room.take() {
            // If this fails, there will be needless wake-ups and nothing worse.
            let _ = ops.modify(self.interest());
        }
    }

    fn interest(&self) -> Events {
        let mut interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.asks_for_room.get() {
            interest |= EventSet::OUT;
        }
        Events::new_raw(self.fd, interest)
    }

    fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Read => &self.read,
            Direction::Write => &self.write,
        }
    }
}

/// A registered descriptor. Dropping it takes it off the loop before it is closed.
///
/// It must be non-blocking, which [`Handle::register`] sees to. That flag belongs to the open file description, so for
/// a descriptor that came from an untrusted process use operations that never block whatever the flag says (such as
/// `MSG_DONTWAIT`) with [`AsyncFd::poll_io`].
pub struct AsyncFd<T: AsFd> {
    /// `None` only after `into_inner`.
    inner: Option<T>,
    source: Rc<Source>,
    id: SubscriberId,
    core: Rc<Core>,
}

impl<T: AsFd> fmt::Debug for AsyncFd<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncFd")
            .field("fd", &self.get_ref().as_fd().as_raw_fd())
            .finish_non_exhaustive()
    }
}

impl<T: AsFd> AsyncFd<T> {
    pub(super) fn new(handle: &Handle, inner: T) -> io::Result<Self> {
        let fd = inner.as_fd();
        let flags = rustix::fs::fcntl_getfl(fd)?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        let source = Rc::new(Source::new(fd.as_raw_fd()));
        let core = handle.0.clone();
        let mut manager = core.events.borrow_mut();
        let id = manager.add_subscriber(Subscriber::Io(source.clone()));
        let added = manager.event_ops(id).and_then(|mut ops| ops.add(source.interest()));
        if let Err(error) = added {
            let _ = manager.remove_subscriber(id);
            return Err(super::manager_error(error));
        }
        drop(manager);
        Ok(Self {
            inner: Some(inner),
            source,
            id,
            core,
        })
    }

    /// The descriptor.
    pub fn get_ref(&self) -> &T {
        match &self.inner {
            Some(inner) => inner,
            None => unreachable!("into_inner consumes the registration"),
        }
    }

    /// Takes the descriptor off the loop and returns it, still non-blocking.
    pub fn into_inner(mut self) -> T {
        self.deregister();
        match self.inner.take() {
            Some(inner) => inner,
            None => unreachable!("into_inner consumes the registration"),
        }
    }

    /// Ready when a read may succeed: there are bytes, a connection, the end, an error. May be wrong: try, with
    /// [`AsyncFd::try_io`].
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.source.read.poll(cx)
    }

    /// Ready when a write may succeed.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.source.write.poll(cx)
    }

    /// Waits until a read may succeed.
    pub async fn readable(&self) {
        poll_fn(|cx| self.poll_readable(cx)).await;
    }

    /// Waits until a write may succeed.
    pub async fn writable(&self) {
        poll_fn(|cx| self.poll_writable(cx)).await;
    }

    /// Does `operation` now. When it would block, the direction is not ready any more until the next edge.
    ///
    /// # Errors
    /// That of `operation`.
    pub fn try_io<R>(&self, direction: Direction, operation: impl FnOnce(&T) -> io::Result<R>) -> io::Result<R> {
        let result = operation(self.get_ref());
        if matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            self.exhausted(direction);
        }
        result
    }

    /// Says that nothing more is to be had in this direction until the next edge, as after a short read of a stream
    /// socket; saves the call that would find it out.
    pub fn exhausted(&self, direction: Direction) {
        self.source.side(direction).blocked();
        if direction == Direction::Write && !self.source.asks_for_room.replace(true) {
            // As in `deregister`, the manager is free. It cannot fail for a descriptor that is registered.
            let mut manager = self.core.events.borrow_mut();
            if let Err(error) = manager
                .event_ops(self.id)
                .and_then(|ops| ops.modify(self.source.interest()))
            {
                tracing::error!(%error, "cannot wait for room to write");
            }
        }
    }

    /// Does `operation` as soon as it does not block.
    ///
    /// # Errors
    /// That of `operation`, other than "would block" and "interrupted".
    pub fn poll_io<R>(
        &self,
        cx: &mut Context<'_>,
        direction: Direction,
        mut operation: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        loop {
            if self.source.side(direction).poll(cx).is_pending() {
                return Poll::Pending;
            }
            match self.try_io(direction, &mut operation) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.source.side(direction).hung_up.get() {
                        // No edge will come any more; what would block now is over.
                        return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                result => return Poll::Ready(result),
            }
        }
    }

    /// Does `operation` as soon as it does not block.
    ///
    /// # Errors
    /// As [`AsyncFd::poll_io`].
    pub async fn io<R>(&self, direction: Direction, mut operation: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        poll_fn(|cx| self.poll_io(cx, direction, &mut operation)).await
    }

    #[cfg(test)]
    pub(super) fn asks_for_room(&self) -> bool {
        self.source.asks_for_room.get()
    }

    fn deregister(&self) {
        // The loop borrows the manager only to dispatch, and runs no code but its own while it does: wakers are
        // collected there and called afterwards. So this never meets a borrowed manager.
        let removed = self.core.events.borrow_mut().remove_subscriber(self.id);
        drop(removed);
    }
}

impl<T: AsFd> Drop for AsyncFd<T> {
    fn drop(&mut self) {
        if self.inner.is_some() {
            self.deregister();
        }
    }
}

impl<T: AsFd> AsFd for AsyncFd<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get_ref().as_fd()
    }
}

impl AsyncFd<UnixListener> {
    /// Takes the next connection, close-on-exec.
    ///
    /// # Errors
    /// Those of `accept`. Out of descriptors (`EMFILE`, `ENFILE`) is one: wait before the next try.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.io(Direction::Read, |listener| listener.accept().map(|(stream, _)| stream))
            .await
    }
}

impl<T: AsFd> AsyncRead for &AsyncFd<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll_io(cx, Direction::Read, |fd| Ok(rustix::io::read(fd, &mut *buffer)?))
    }
}

impl<T: AsFd> AsyncWrite for &AsyncFd<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_io(cx, Direction::Write, |fd| Ok(rustix::io::write(fd, bytes)?))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends a socket's outgoing direction. A pipe or terminal ends when it is dropped.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(
            match rustix::net::shutdown(self.get_ref(), rustix::net::Shutdown::Write) {
                Ok(()) | Err(rustix::io::Errno::NOTSOCK | rustix::io::Errno::NOTCONN) => Ok(()),
                Err(error) => Err(error.into()),
            },
        )
    }
}

impl<T: AsFd + Unpin> AsyncRead for AsyncFd<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self).poll_read(cx, buffer)
    }
}

impl<T: AsFd + Unpin> AsyncWrite for AsyncFd<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_close(cx)
    }
}

impl AsyncFd<UnixStream> {
    /// Ends one or both directions.
    ///
    /// # Errors
    /// Those of `shutdown`.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.get_ref().shutdown(how)
    }
}
