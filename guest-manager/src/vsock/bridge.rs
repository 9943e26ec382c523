//! Carries bytes between two stream sockets, both ways, until both are done.
//!
//! ```text
//!   one --bytes--> other       each way by itself: the end of one way is passed on by shutdown(2), and so is a
//!   one <--bytes-- other       receiver that takes no more; what waits in between is never more than a chunk
//! ```

use std::{future::Future, io, os::unix::net::UnixStream, pin::pin};

use futures::future::{Either, join, select};
use rustix::net::{SendFlags, Shutdown};
use sepal_schema::transport::{AsyncFd, Handle, reactor::Direction};

use super::stream::receive;
use crate::serial::{hang_up, yield_now};

/// Bytes that are carried at a time.
const CHUNK: usize = 32 * 1024;

/// Carries bytes between the two, until both ways have ended or either side is closed.
///
/// # Errors
/// The sockets cannot be put on the event loop.
pub(super) async fn bridge(handle: &Handle, one: UnixStream, other: UnixStream) -> io::Result<()> {
    let (one, other) = (handle.register(one)?, handle.register(other)?);
    join(carry(&one, &other), carry(&other, &one)).await;
    Ok(())
}

/// A socket in place of `socket`, which it is bridged with until `ended` resolves: then both end, whoever has descriptors of them. `kept` is
/// kept as long.
///
/// # Errors
/// No socket is to be had, or they cannot be put on the event loop.
pub(super) fn relay(
    handle: &Handle,
    socket: UnixStream,
    kept: impl Sized + 'static,
    ended: impl Future<Output = ()> + 'static,
) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let (one, other) = (handle.register(socket)?, handle.register(ours)?);
    handle.spawn(async move {
        {
            let both = join(carry(&one, &other), carry(&other, &one));
            select(pin!(ended), pin!(both)).await;
        }
        hang_up(&one);
        hang_up(&other);
        drop(kept);
    });
    Ok(theirs)
}

/// Carries bytes one way.
async fn carry(from: &AsyncFd<UnixStream>, to: &AsyncFd<UnixStream>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match select(pin!(receive(from, &mut buffer)), pin!(refuses(to))).await {
            Either::Left((Ok(count @ 1..), _)) => count,
            // The end, or the sender is gone.
            Either::Left(_) => break,
            Either::Right(_) => {
                // Whoever still sends learns that nobody receives. Fails only if it is gone as well.
                let _ = rustix::net::shutdown(from, Shutdown::Read);
                break;
            }
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match send(to, rest).await {
                Ok(sent) => rest = &rest[sent..],
                Err(_) => {
                    let _ = rustix::net::shutdown(from, Shutdown::Read);
                    return;
                }
            }
        }
        yield_now().await;
    }
    // Fails only if there is nobody to tell.
    let _ = rustix::net::shutdown(to, Shutdown::Write);
}

/// Sends without asking first whether there is room: [`refuses`] may have taken that back.
async fn send(socket: &AsyncFd<UnixStream>, bytes: &[u8]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match socket.try_io(Direction::Write, |socket| Ok(rustix::net::send(socket, bytes, flags)?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Waits until the other end takes nothing any more: sending nothing fails then (unix(7): EPIPE).
async fn refuses(socket: &AsyncFd<UnixStream>) {
    while rustix::net::send(socket, &[], SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok() {
        socket.exhausted(Direction::Write);
        socket.writable().await;
    }
}
