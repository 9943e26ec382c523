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
    collections::HashMap,
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use sepal_schema::transport::{
    AsyncFd, Handle,
    reactor::{Direction, Task},
};

use super::{
    Endpoint, Incoming,
    bridge::bridge,
    request::{MAX_LINE, Progress, port, progress},
};
use crate::{
    changed::Changed,
    listener::{ListenError, Listening},
};

/// Connections of one guest's socket at a time, those included that have not asked for a port yet. More wait to be accepted.
pub const MAX_CONNECTIONS: usize = 256;
/// How long a client may take for its line.
pub const LINE_WITHIN: Duration = Duration::from_secs(5);
/// Longest path, in bytes: with `_` and a port behind it, it is still shorter than the 108 of a Unix socket's address.
pub const MAX_PATH: usize = 90;
/// The first number that a client is told.
const FIRST_NUMBER: u32 = 1 << 30;
/// How long nobody is accepted when there are no descriptors left.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// Why the socket cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum ConventionError {
    /// The path is relative, or too long for the sockets beside it.
    #[error("vsock.socketPath: {}: it has to be an absolute path of at most {MAX_PATH} bytes", .0.display())]
    Path(PathBuf),
    /// Nobody can listen there.
    #[error("vsock.socketPath: {0}")]
    Listen(#[from] ListenError),
    /// The socket cannot be put on the event loop.
    #[error("vsock.socketPath: {0}")]
    Host(#[from] io::Error),
}

/// What is open, by number.
type Open = HashMap<u32, Task>;

struct Shared {
    handle: Handle,
    path: PathBuf,
    endpoint: Rc<dyn Endpoint>,
    open: Changed<Open>,
    last: std::cell::Cell<u32>,
    line_within: Duration,
}

/// The socket of one guest. Dropping it removes the socket and ends its connections.
pub struct Convention {
    shared: Rc<Shared>,
    listening: Listening,
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
    /// Offers the ports of a guest at `path`, for this user alone (mode 0600). A lock file is beside it, by which one manager has it.
    ///
    /// # Errors
    /// [`ConventionError`].
    pub fn new(handle: &Handle, path: &Path, endpoint: Rc<dyn Endpoint>) -> Result<Self, ConventionError> {
        Self::with_line_within(handle, path, endpoint, LINE_WITHIN)
    }

    fn with_line_within(
        handle: &Handle,
        path: &Path,
        endpoint: Rc<dyn Endpoint>,
        line_within: Duration,
    ) -> Result<Self, ConventionError> {
        if !path.is_absolute() || path.as_os_str().len() > MAX_PATH {
            return Err(ConventionError::Path(path.to_owned()));
        }
        let listening = Listening::new(path)?;
        let listener = handle.register(listening.socket().try_clone()?)?;
        let shared = Rc::new(Shared {
            handle: handle.clone(),
            path: path.to_owned(),
            endpoint,
            open: Changed::default(),
            last: std::cell::Cell::new(0),
            line_within,
        });
        let accepting = shared.clone();
        Ok(Self {
            shared,
            listening,
            _accepting: handle.spawn_owned(async move { accepting.accept(listener).await }),
        })
    }

    /// Files that a killed manager leaves.
    pub fn files(&self) -> Vec<PathBuf> {
        self.listening.files()
    }

    /// The guest wants to connect to a port of the host: it is connected with whoever listens at `<path>_<port>`, or refused. Returns at
    /// once.
    pub fn incoming(&self, port: u32, incoming: Box<dyn Incoming>) {
        if self.shared.open.look(HashMap::len) >= MAX_CONNECTIONS {
            tracing::debug!(port, "a guest's connection refused: there are {MAX_CONNECTIONS}");
            return;
        }
        let Ok(socket) = self.shared.host_port(port) else {
            return;
        };
        let handle = self.shared.handle.clone();
        self.shared.keep(move |_| async move {
            match incoming.open().await {
                Ok(fd) => bridge(&handle, socket, fd).await,
                // The guest has given up, or ended.
                Err(_) => Ok(()),
            }
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

    async fn accept(self: Rc<Self>, listener: AsyncFd<std::os::unix::net::UnixListener>) {
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

    /// Connects to whoever listens for the guest's connections to this port. A Unix socket answers at once: yes, or no.
    fn host_port(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }
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
    let fd = endpoint.connect(port).await.map_err(io::Error::other)?;
    let answer = format!("OK {number}\n");
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    // Nothing was sent before, so there is room.
    rustix::net::send(&client, answer.as_bytes(), flags)?;
    bridge(&handle, client.into_inner(), fd).await
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
