//! A guest's vsock as Unix sockets, after the convention of Firecracker ("Hybrid vsock") and Cloud Hypervisor:
//!
//! ```text
//!   host -> guest:  connect to PATH, send "CONNECT <port>\n", read "OK <number>\n", then the stream
//!   guest -> host:  the guest connects to port P of the host; the manager connects to PATH_P and joins the two
//! ```
//!
//! A line that is none, or a port on which nobody listens, closes the connection.

use std::{
    fs, io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::net::RecvFlags;
use sepal_schema::{
    error::{Error, Kind},
    transport::{
        AsyncFd, Handle, guard,
        reactor::{Direction, Task},
    },
    vsock_capnp::{host_vsock_endpoint, vsock_acceptor, vsock_connection},
};

use super::stream::{join_sockets, send_all};
use crate::{changed::Changed, guest::Guest};

/// The longest line that a client may say: "CONNECT 4294967295\n".
const MAX_LINE: usize = 19;
/// Clients of the path that may be connected at a time.
const MAX_CLIENTS: usize = 256;
/// Stands for every port of the host on which nobody else listens (VMADDR_PORT_ANY).
const ANY_PORT: u32 = u32::MAX;

/// The Unix socket of a guest. The file is gone when this is dropped.
#[derive(Debug)]
pub(crate) struct PathSocket {
    path: PathBuf,
    listener: Option<UnixListener>,
    task: Option<Task>,
}

impl Drop for PathSocket {
    fn drop(&mut self) {
        drop(self.task.take());
        // Somebody else has removed it, then.
        let _ = fs::remove_file(&self.path);
    }
}

impl PathSocket {
    /// Binds the path. May block.
    ///
    /// # Errors
    /// About `vsock.socketPath`: `ALREADY_BOUND` if somebody listens there, `PERMISSION_DENIED`, `NOT_FOUND` (the folder), `BAD_CONFIG`.
    pub(crate) fn bind(path: &str) -> Result<Self, Error> {
        let refused = |error: &io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => Kind::AlreadyBound,
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::PermissionDenied,
                io::ErrorKind::NotFound => Kind::NotFound,
                _ => Kind::BadConfig,
            };
            let message = format!("vsock.socketPath: {path} cannot be bound: {error}");
            Error::new(kind, message).about("vsock.socketPath")
        };
        let path = PathBuf::from(path);
        let bound = UnixListener::bind(&path).or_else(|error| match error.kind() {
            // What a manager that was killed has left behind.
            io::ErrorKind::AddrInUse if is_stale(&path) => {
                fs::remove_file(&path)?;
                UnixListener::bind(&path)
            }
            _ => Err(error),
        });
        Ok(Self {
            listener: Some(bound.map_err(|error| refused(&error))?),
            path,
            task: None,
        })
    }

    /// Serves clients of the path and connections of the guest, until this is dropped.
    ///
    /// # Errors
    /// As [`super::listen`], or the socket cannot be waited for.
    pub(crate) async fn serve(&mut self, guest: &Rc<Guest>, remote: host_vsock_endpoint::Client) -> Result<(), Error> {
        let handle = guest.manager.handle.clone();
        let Some(listener) = self.listener.take() else {
            return Ok(());
        };
        let ready = listener.set_nonblocking(true).and_then(|()| handle.register(listener));
        let listener = ready.map_err(|error| Error::new(Kind::NoResources, format!("vsock.socketPath: {error}")))?;
        let acceptor = guard::new_client(Outward {
            guest: guest.clone(),
            path: self.path.clone(),
        });
        let outward = super::listen_here(guest, &remote, ANY_PORT, acceptor).await?;
        let guest = guest.clone();
        self.task = Some(handle.spawn_owned(async move {
            let _outward = outward;
            accept(&guest, &remote, &listener).await;
        }));
        Ok(())
    }
}

/// Whether nobody listens behind a socket file any more.
fn is_stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

async fn accept(guest: &Rc<Guest>, remote: &host_vsock_endpoint::Client, listener: &AsyncFd<UnixListener>) {
    let clients = Rc::new(Changed::new(0usize));
    let mut number = 1 << 30;
    loop {
        clients.until(|count| (*count < MAX_CLIENTS).then_some(())).await;
        let accepted = listener.io(Direction::Read, |listener| listener.accept()).await;
        let handle = &guest.manager.handle;
        let socket = match accepted.and_then(|(socket, _)| {
            socket.set_nonblocking(true)?;
            handle.register(socket)
        }) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(guest = &*guest.name, "no connection by vsock.socketPath: {error}");
                // Out of descriptors, as a rule, which passes.
                handle.sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        number += 1;
        let counted = Counted::new(clients.clone());
        let (guest, remote) = (guest.clone(), remote.clone());
        handle.spawn(async move {
            let _counted = counted;
            if let Err(error) = inward(&guest, &remote, &socket, number).await {
                tracing::debug!(guest = &*guest.name, "a client of vsock.socketPath: {error}");
            }
        });
    }
}

/// Counts a client.
struct Counted(Rc<Changed<usize>>);

impl Counted {
    fn new(clients: Rc<Changed<usize>>) -> Self {
        clients.change(|count| *count += 1);
        Self(clients)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.change(|count| *count -= 1);
    }
}

/// Serves a client of the path.
async fn inward(
    guest: &Rc<Guest>,
    remote: &host_vsock_endpoint::Client,
    socket: &AsyncFd<UnixStream>,
    number: u32,
) -> Result<(), Error> {
    let port = parse(&line(socket).await?)?;
    let stream = super::connect(guest, remote, port).await?;
    let failed = |error: io::Error| Error::new(Kind::NoResources, error.to_string());
    let stream = guest.manager.handle.register(stream).map_err(failed)?;
    send_all(socket, format!("OK {number}\n").as_bytes())
        .await
        .map_err(failed)?;
    join_sockets(socket, &stream).await;
    Ok(())
}

/// The first line, and not a byte more.
async fn line(socket: &AsyncFd<UnixStream>) -> Result<Vec<u8>, Error> {
    let failed = |error: io::Error| Error::new(Kind::InternalError, error.to_string());
    let mut line = Vec::new();
    while line.len() < MAX_LINE && !line.ends_with(b"\n") {
        let mut byte = [0];
        let receive = |socket: &UnixStream| Ok(rustix::net::recv(socket, &mut byte[..], RecvFlags::DONTWAIT)?.1);
        if socket.io(Direction::Read, receive).await.map_err(failed)? == 0 {
            break;
        }
        line.push(byte[0]);
    }
    Ok(line)
}

/// The port of "CONNECT <port>\n".
fn parse(line: &[u8]) -> Result<u32, Error> {
    let port = line
        .strip_suffix(b"\n")
        .and_then(|line| line.strip_prefix(b"CONNECT "))
        .filter(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    port.ok_or_else(|| {
        Error::new(
            Kind::BadConfig,
            "a client has to begin with CONNECT, a blank, a port and a newline",
        )
    })
}

/// Takes connections of the guest on to Unix sockets beside the path.
struct Outward {
    guest: Rc<Guest>,
    path: PathBuf,
}

impl vsock_acceptor::Server for Outward {
    async fn accept(
        self: Rc<Self>,
        params: vsock_acceptor::AcceptParams,
        _: vsock_acceptor::AcceptResults,
    ) -> Result<(), capnp::Error> {
        let (port, connection) = {
            let params = params.get()?;
            (params.get_port(), params.get_connection()?)
        };
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let handle = self.guest.manager.handle.clone();
        // Dropped with its connection, which refuses the guest, if nobody listens there.
        if let Err(error) = outward(&self.guest, &handle, path.into(), connection).await {
            tracing::debug!(guest = &*self.guest.name, port, "a connection of the guest: {error}");
        }
        Ok(())
    }
}

async fn outward(
    guest: &Rc<Guest>,
    handle: &Handle,
    path: PathBuf,
    connection: vsock_connection::Client,
) -> Result<(), Error> {
    let failed = |error: io::Error| Error::new(Kind::ConnectionRefused, error.to_string());
    let connected = handle.spawn_blocking(move || UnixStream::connect(path)).await;
    let service = connected.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?;
    let service = service.and_then(|service| {
        service.set_nonblocking(true)?;
        handle.register(service)
    });
    let service = service.map_err(failed)?;
    let stream = super::open(guest, &connection).await?;
    let stream = handle.register(stream).map_err(failed)?;
    handle.spawn(async move { join_sockets(&service, &stream).await });
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_is_bound_by_one_and_cleaned_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let name = path.to_str().unwrap();
        let bound = PathSocket::bind(name).unwrap();
        let error = PathSocket::bind(name).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyBound, "vsock.socketPath"));
        drop(bound);
        assert!(!path.exists());
        // What a manager leaves behind that is killed.
        drop(UnixListener::bind(&path).unwrap());
        drop(PathSocket::bind(name).unwrap());
        fs::write(&path, "a file of somebody's").unwrap();
        assert_eq!(PathSocket::bind(name).unwrap_err().kind, Kind::AlreadyBound);
        assert!(path.exists());
        let nowhere = folder.path().join("nowhere/vsock");
        assert_eq!(
            PathSocket::bind(nowhere.to_str().unwrap()).unwrap_err().kind,
            Kind::NotFound
        );
    }

    #[test]
    fn lines_are_read() {
        assert_eq!(parse(b"CONNECT 4294967295\n").unwrap(), u32::MAX);
        assert_eq!(parse(b"CONNECT 52\n").unwrap(), 52);
        for line in [
            "",
            "\n",
            "CONNECT \n",
            "CONNECT 52",
            "connect 52\n",
            "CONNECT +5\n",
            "CONNECT 4294967296\n",
        ] {
            assert!(parse(line.as_bytes()).is_err(), "{line:?}");
        }
        assert_eq!("CONNECT 4294967295\n".len(), MAX_LINE);
    }

    proptest! {
        #[test]
        fn every_port_is_read_back(port: u32, noise in proptest::collection::vec(any::<u8>(), 0..24)) {
            prop_assert_eq!(parse(format!("CONNECT {port}\n").as_bytes()).unwrap(), port);
            let _ = parse(&noise);
        }
    }
}
