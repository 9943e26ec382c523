//! The convention by which clients of Firecracker and Cloud Hypervisor reach a guest's ports through a Unix socket.
//!
//! ```text
//!   <path>       client: "CONNECT 52\n" ---> Endpoint::connect(52) ---> client: "OK 1073741824\n", then bytes both ways
//!                        | no such line, too long, too late                | error
//!                        '------------------ closed <----------------------'
//!
//!   <path>_52    guest connects to port 52 of the host ---> connect() there ---> Incoming::open ---> bytes both ways
//!                                                             | nobody listens: refused
//! ```
//!
//! The number after `OK` tells connections of this socket apart and means nothing else. Bytes that a client sends right behind its line belong
//! to the guest. What clients can make the manager hold is bounded: [`MAX_CONNECTIONS`], [`LINE_WITHIN`], and a few chunks for each.

use std::{
    cell::Cell,
    collections::HashMap,
    fmt, io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use futures::future::LocalBoxFuture;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use sepal_schema::{
    error::Error,
    transport::{
        AsyncFd, Handle,
        reactor::{Direction, Task},
    },
};

use super::{
    bridge::bridge,
    request::{MAX_LINE, Progress, port, progress},
};
use crate::changed::Changed;

/// A guest's socket device, as somebody on the host reaches it.
pub(super) trait Endpoint {
    /// Connects to a port of the guest.
    fn connect(&self, port: u32) -> LocalBoxFuture<'static, Result<UnixStream, Error>>;
}

/// A connection that a guest asks for. Dropping it refuses.
pub(super) trait Incoming {
    /// Grants it.
    fn open(self: Box<Self>) -> LocalBoxFuture<'static, Result<UnixStream, Error>>;
}

/// Connections of one guest's socket at a time, those included that have not asked for a port yet. More wait to be accepted.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// How long a client may take for its line.
pub(super) const LINE_WITHIN: Duration = Duration::from_secs(5);
/// The first number that a client is told.
const FIRST_NUMBER: u32 = 1 << 30;
/// How long nobody is accepted when there are no descriptors left.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// What is open, by number.
type Open = HashMap<u32, Task>;

struct Shared {
    handle: Handle,
    path: PathBuf,
    endpoint: Rc<dyn Endpoint>,
    open: Changed<Open>,
    last: Cell<u32>,
    line_within: Duration,
}

/// The socket of one guest. Dropping it ends its connections.
pub(super) struct Convention {
    shared: Rc<Shared>,
    _accepting: Task,
}

impl fmt::Debug for Convention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Convention")
            .field("path", &self.shared.path)
            .finish_non_exhaustive()
    }
}

impl Convention {
    /// Serves those who connect to `listener`, which is bound to `path`. They have to say their line within `line_within`.
    ///
    /// # Errors
    /// The socket cannot be put on the event loop.
    pub(super) fn new(
        handle: &Handle,
        listener: UnixListener,
        path: &Path,
        endpoint: Rc<dyn Endpoint>,
        line_within: Duration,
    ) -> io::Result<Self> {
        let listener = handle.register(listener)?;
        let shared = Rc::new(Shared {
            handle: handle.clone(),
            path: path.to_owned(),
            endpoint,
            open: Changed::default(),
            last: Cell::new(0),
            line_within,
        });
        let accepting = shared.clone();
        Ok(Self {
            shared,
            _accepting: handle.spawn_owned(async move { accepting.accept(listener).await }),
        })
    }

    /// The guest wants to connect to a port of the host: it is connected with whoever listens at `<path>_<port>`, or refused. Returns at
    /// once.
    pub(super) fn incoming(&self, port: u32, incoming: Box<dyn Incoming>) {
        if self.shared.open.look(HashMap::len) >= MAX_CONNECTIONS {
            tracing::debug!(port, "a guest's connection refused: there are {MAX_CONNECTIONS}");
            return;
        }
        let mut path = self.shared.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let handle = self.shared.handle.clone();
        self.shared.keep(|_| async move {
            // The path may be on slow storage.
            let socket = handle.spawn_foreign(move || connect_at_once(path.as_ref())).await??;
            let stream = incoming.open().await.map_err(io::Error::other)?;
            bridge(&handle, socket, stream).await
        });
    }
}

impl Drop for Convention {
    fn drop(&mut self) {
        // They would go with the last task, which is later.
        drop(self.shared.open.change(std::mem::take));
    }
}

impl Shared {
    /// Runs what `connection` makes of its number, and counts it until it is done.
    fn keep<F>(self: &Rc<Self>, connection: impl FnOnce(u32) -> F)
    where
        F: Future<Output = io::Result<()>> + 'static,
    {
        let number = self.last.get() % FIRST_NUMBER;
        self.last.set(number + 1);
        let number = FIRST_NUMBER + number;
        let (shared, running) = (Rc::downgrade(self), connection(number));
        let task = self.handle.spawn_owned(async move {
            if let Err(error) = running.await {
                tracing::debug!(number, "a connection with a guest ended: {error}");
            }
            if let Some(shared) = shared.upgrade() {
                drop(shared.open.change(|open| open.remove(&number)));
            }
        });
        self.open.change(|open| open.insert(number, task));
    }

    async fn accept(self: Rc<Self>, listener: AsyncFd<UnixListener>) {
        loop {
            self.open
                .until(|open| (open.len() < MAX_CONNECTIONS).then_some(()))
                .await;
            match listener.accept().await {
                Ok(client) => {
                    let (handle, endpoint) = (self.handle.clone(), self.endpoint.clone());
                    let within = self.line_within;
                    self.keep(|number| serve(handle, endpoint, client, number, within));
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("{}: nobody can be accepted: {error}", self.path.display());
                    self.handle.sleep(OUT_OF_DESCRIPTORS).await;
                }
            }
        }
    }
}

/// Connects to a Unix socket, which says yes or no at once: one that has too many waiting already says no. The socket does not block.
pub(crate) fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// One client, from its line to its end.
async fn serve(
    handle: Handle,
    endpoint: Rc<dyn Endpoint>,
    client: UnixStream,
    number: u32,
    within: Duration,
) -> io::Result<()> {
    let client = handle.register(client)?;
    let Ok(line) = handle.timeout(within, line(&client)).await else {
        return Err(io::ErrorKind::TimedOut.into());
    };
    let Some(port) = port(&line?) else {
        return Err(io::Error::other("it did not begin with CONNECT, a port and a newline"));
    };
    let stream = endpoint.connect(port).await.map_err(io::Error::other)?;
    let answer = format!("OK {number}\n");
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    // Nothing was sent before, so there is room.
    rustix::net::send(&client, answer.as_bytes(), flags)?;
    bridge(&handle, client.into_inner(), stream).await
}

/// A client's line, without its newline; takes nothing of what follows.
async fn line(client: &AsyncFd<UnixStream>) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let mut bytes = [0; MAX_LINE];
        let peek = |socket: &UnixStream| {
            let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
            Ok(rustix::net::recv(socket, &mut bytes, flags)?.1)
        };
        let count = client.io(Direction::Read, peek).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let before = line.len();
        line.extend_from_slice(&bytes[..count]);
        let progress = progress(&line);
        if let Progress::Line(len) = progress {
            line.truncate(len);
        }
        // As many as were seen, so they are there.
        let seen = &mut bytes[..line.len() - before];
        rustix::net::recv(client, seen, RecvFlags::DONTWAIT)?;
        match progress {
            Progress::Line(len) => {
                line.truncate(len - 1);
                return Ok(line);
            }
            Progress::More => {}
            Progress::TooLong => return Err(io::Error::other("its first line is too long")),
        }
    }
}

#[cfg(test)]
mod tests;
