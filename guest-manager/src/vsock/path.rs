//! A guest's socket device as Unix sockets, for a client that may name paths: binds the path, and joins the convention with the component.

use std::{
    fs, io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    rc::{Rc, Weak},
};

use futures::future::{LocalBoxFuture, pending};
use sepal_schema::{
    error::{Error, Kind},
    transport::{guard, reactor::Task},
    vsock_capnp::{vsock_acceptor, vsock_connection},
};

use super::convention::{Convention, Endpoint, Incoming, LINE_WITHIN};
use crate::{guest::Guest, listener::bind};

/// Stands for every port of the host on which nobody else listens (VMADDR_PORT_ANY).
const ANY_PORT: u32 = u32::MAX;

/// The Unix socket of a guest. The file is gone when this is dropped.
#[derive(Debug)]
pub(crate) struct PathSocket {
    path: PathBuf,
    /// Until it is served.
    listener: Option<UnixListener>,
    /// Holds what serves it.
    serving: Option<Task>,
}

impl Drop for PathSocket {
    fn drop(&mut self) {
        // Somebody else has removed it, then.
        let _ = fs::remove_file(&self.path);
        drop(self.serving.take());
    }
}

impl PathSocket {
    /// Binds the path, for this user alone (mode 0600). May block.
    ///
    /// # Errors
    /// About `vsock.socketPath`: `ALREADY_BOUND` if somebody listens there, `PERMISSION_DENIED`, `NOT_FOUND` (the folder), `BAD_CONFIG`.
    pub(crate) fn bind(path: &str) -> Result<Self, Error> {
        let path = PathBuf::from(path);
        let bound = bind(&path).or_else(|error| match error.kind() {
            // What a manager that was killed has left behind.
            io::ErrorKind::AddrInUse if is_stale(&path) => {
                fs::remove_file(&path)?;
                bind(&path)
            }
            _ => Err(error),
        });
        Ok(Self {
            listener: Some(bound.map_err(|error| refused(&path, &error))?),
            path,
            serving: None,
        })
    }

    /// Whether the path could be bound, as far as that can be told without doing so. May block.
    ///
    /// # Errors
    /// As for [`PathSocket::bind`].
    pub(crate) fn check(path: &str) -> Result<(), Error> {
        let path = Path::new(path);
        let checked = match fs::symlink_metadata(path) {
            Ok(_) if is_stale(path) => Ok(()),
            Ok(_) => Err(rustix::io::Errno::ADDRINUSE.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = path.parent().unwrap_or(path);
                rustix::fs::access(folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
                    .map_err(io::Error::from)
            }
            Err(error) => Err(error),
        };
        checked.map_err(|error| refused(path, &error))
    }

    /// Serves clients of the path and connections of the guest, until this is dropped.
    ///
    /// # Errors
    /// As [`super::listen`], or the socket cannot be waited for.
    pub(crate) async fn serve(&mut self, guest: &Rc<Guest>) -> Result<(), Error> {
        let Some(listener) = self.listener.take() else {
            return Ok(());
        };
        let inward = Rc::new(Inward { guest: guest.clone() });
        let convention = Convention::new(&guest.manager.handle, listener, &self.path, inward, LINE_WITHIN);
        let convention =
            convention.map_err(|error| Error::new(Kind::NoResources, format!("vsock.socketPath: {error}")))?;
        let convention = Rc::new(convention);
        let acceptor = guard::new_client(Outward {
            guest: guest.clone(),
            convention: Rc::downgrade(&convention),
        });
        let outward = super::listen_here(guest, ANY_PORT, acceptor).await?;
        self.serving = Some(guest.manager.handle.spawn_owned(async move {
            let _held = (convention, outward);
            pending::<()>().await;
        }));
        Ok(())
    }
}

fn refused(path: &Path, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => Kind::AlreadyBound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::PermissionDenied,
        io::ErrorKind::NotFound => Kind::NotFound,
        _ => Kind::BadConfig,
    };
    let message = format!("vsock.socketPath: {} cannot be bound: {error}", path.display());
    Error::new(kind, message).about("vsock.socketPath")
}

/// Whether nobody listens behind a socket file any more.
fn is_stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Takes clients of the path to the guest.
struct Inward {
    guest: Rc<Guest>,
}

impl Endpoint for Inward {
    fn connect(&self, port: u32) -> LocalBoxFuture<'static, Result<UnixStream, Error>> {
        let guest = self.guest.clone();
        Box::pin(async move {
            let remote = super::remote(&guest).await?;
            super::connect(&guest, &remote, port).await
        })
    }
}

/// Takes connections of the guest on to Unix sockets beside the path.
struct Outward {
    guest: Rc<Guest>,
    convention: Weak<Convention>,
}

impl vsock_acceptor::Server for Outward {
    async fn accept(
        self: Rc<Self>,
        params: vsock_acceptor::AcceptParams,
        _: vsock_acceptor::AcceptResults,
    ) -> Result<(), capnp::Error> {
        let params = params.get()?;
        let asked = Asked {
            guest: self.guest.clone(),
            connection: params.get_connection()?,
        };
        // Dropped, if there is nobody any more, which refuses.
        if let Some(convention) = self.convention.upgrade() {
            convention.incoming(params.get_port(), Box::new(asked));
        }
        Ok(())
    }
}

/// A connection that the guest asks for.
struct Asked {
    guest: Rc<Guest>,
    connection: vsock_connection::Client,
}

impl Incoming for Asked {
    fn open(self: Box<Self>) -> LocalBoxFuture<'static, Result<UnixStream, Error>> {
        Box::pin(async move { super::open(&self.guest, &self.connection).await })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_path_is_bound_by_one_and_cleaned_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let name = path.to_str().unwrap();
        PathSocket::check(name).unwrap();
        assert!(!path.exists());
        let bound = PathSocket::bind(name).unwrap();
        assert_eq!(PathSocket::check(name), Err(PathSocket::bind(name).unwrap_err()));
        let error = PathSocket::bind(name).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyBound, "vsock.socketPath"));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(bound);
        assert!(!path.exists());
        // What a manager leaves behind that is killed.
        drop(UnixListener::bind(&path).unwrap());
        PathSocket::check(name).unwrap();
        drop(PathSocket::bind(name).unwrap());
        fs::write(&path, "a file of somebody's").unwrap();
        assert_eq!(PathSocket::bind(name).unwrap_err().kind, Kind::AlreadyBound);
        assert_eq!(PathSocket::check(name).unwrap_err().kind, Kind::AlreadyBound);
        assert!(path.exists());
        let nowhere = folder.path().join("nowhere/vsock");
        let nowhere = nowhere.to_str().unwrap();
        let error = PathSocket::bind(nowhere).unwrap_err();
        assert_eq!((error.kind, PathSocket::check(nowhere)), (Kind::NotFound, Err(error)));
    }
}
