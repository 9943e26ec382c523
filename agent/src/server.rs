//! What the agent does with a connection: greets, takes one request, carries it out, and ends.
//!
//! ```text
//!   Hello, Hello --> Put: files::put    Get: files::get    Exec: exec::run
//!                      '------------------'------------------'---> Finished, Exited, Killed or Failed; the connection is closed
//! ```
//!
//! A host that goes away ends its operation: half a file is removed, a program is killed. What goes wrong in an operation is told to the
//! host and hurts no other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::protocol::{Decoder, ErrorKind, Malformed, Message, ToAgent, ToHost, VERSION};

mod exec;
mod files;

/// What the agent says that it is.
const SOFTWARE: &str = concat!("sepal-agent ", env!("CARGO_PKG_VERSION"));

/// How long a host may stay silent after its operation before the connection is closed anyway.
const LINGER: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Why an operation ended early.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    /// It cannot be done, which the host is told.
    #[error("{1}")]
    Failed(ErrorKind, String),
    /// The host went away, or does not speak the protocol: there is nobody to tell.
    #[error("the host went away: {0}")]
    Host(String),
}

impl Trouble {
    /// A failure to do `what`.
    fn io(what: &str, error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::PermissionDenied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory => ErrorKind::NotAFile,
            io::ErrorKind::InvalidInput => ErrorKind::BadRequest,
            _ => ErrorKind::Other,
        };
        Self::Failed(kind, format!("{what}: {error}"))
    }

    fn bad(message: &str) -> Self {
        Self::Failed(ErrorKind::BadRequest, message.into())
    }
}

impl From<Malformed> for Trouble {
    fn from(error: Malformed) -> Self {
        Self::Host(error.to_string())
    }
}

/// A stream of messages that blocks.
struct Connection {
    socket: OwnedFd,
    decoder: Decoder,
}

impl Connection {
    /// The next message of the host; `None` at the end of the stream.
    fn receive(&mut self) -> Result<Option<ToAgent>, Trouble> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(message) = self.decoder.take()? {
                return Ok(Some(message));
            }
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Trouble::Host(errno.to_string())),
            }
        }
    }

    fn send(&self, message: &ToHost) -> Result<(), Trouble> {
        send_all(self.socket.as_fd(), &message.encode())
    }

    /// Says that nothing follows, and drops what the host still sends until it hangs up: a socket that is closed with something unread resets its
    /// connection, and the last message with it.
    fn linger(&self) {
        // Fails only on a connection that is gone.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        let mut buffer = [0; 16 << 10];
        loop {
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, Some(&LINGER)) {
                Err(Errno::INTR) => {}
                Ok(1..) => match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                    Ok((1.., _)) | Err(Errno::INTR | Errno::AGAIN) => {}
                    _ => return,
                },
                _ => return,
            }
        }
    }
}

fn send_all(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Trouble> {
    while !bytes.is_empty() {
        match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Trouble::Host(errno.to_string())),
        }
    }
    Ok(())
}

/// The agent's greeting, which the host hears first on each connection, and on the one by which the agent says that it is ready.
pub fn greeting() -> Vec<u8> {
    ToHost::Hello {
        version: VERSION,
        software: SOFTWARE.into(),
    }
    .encode()
}

/// Serves one connection until its operation is over. Blocks; `socket` has to be a connected stream socket that blocks, too.
pub fn serve(socket: OwnedFd) {
    let mut connection = Connection {
        socket,
        decoder: Decoder::default(),
    };
    if let Err(Trouble::Failed(kind, message)) = operate(&mut connection) {
        // A host that is not there is none to tell.
        let _ = connection.send(&ToHost::Failed { kind, message });
    }
    connection.linger();
}

/// Tells a host that there is no room for its operation, and that nothing follows. To be kept open for a while, as a socket that is closed with
/// something unread resets its connection, and this answer with it.
pub fn refuse(socket: &OwnedFd) {
    let busy = ToHost::Failed {
        kind: ErrorKind::Busy,
        message: "the agent has as many operations under way as it can".into(),
    };
    let bytes = [greeting(), busy.encode()].concat();
    // Fits into any socket's buffer; a host that is gone needs no answer.
    let _ = rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
}

fn operate(connection: &mut Connection) -> Result<(), Trouble> {
    send_all(connection.socket.as_fd(), &greeting())?;
    match connection.receive()? {
        Some(ToAgent::Hello { version: VERSION, .. }) => {}
        Some(ToAgent::Hello { version, .. }) => {
            let message = format!("the host speaks version {version} of the protocol, the agent version {VERSION}");
            return Err(Trouble::bad(&message));
        }
        Some(_) => return Err(Trouble::bad("no greeting")),
        None => return Ok(()),
    }
    match connection.receive()? {
        Some(ToAgent::Put { path, mode }) => files::put(connection, &path, mode),
        Some(ToAgent::Get { path }) => files::get(connection, &path),
        Some(ToAgent::Exec(command)) => exec::run(connection, &command),
        Some(_) => Err(Trouble::bad("no request where one was expected")),
        // Only wanted to know whether the agent is there.
        None => Ok(()),
    }
}
