//! Processes behind vhost-user devices: connected to by path, and again when they have gone.

use std::{collections::HashMap, io, os::fd::OwnedFd, rc::Rc, time::Duration};

use sepal_schema::{
    config::{GuestConfig, Handles, device::Backend},
    error::{Error, Kind},
    lifecycle_capnp::backends,
    transport::{FdTable, Handle},
};

use crate::{files::no_paths, vsock::connect_at_once};

/// How long a back end that has too many waiting already may take to take one.
const BUSY: Duration = Duration::from_secs(2);
/// How long to wait before the first try to connect again, and at most.
const WAITS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The paths of the devices' back ends, by the device's name.
pub(crate) type Paths = Rc<HashMap<String, String>>;

/// Connects to the back ends that `config` names by path, and waits for those that are not there for as long as `patience` says.
///
/// # Errors
/// `PERMISSION_DENIED` for a client that may not name paths, `FAILED_SERVICE_CONNECT`, both with the field's name.
pub(crate) async fn connect(
    handle: &Handle,
    config: &mut GuestConfig,
    may_name_paths: bool,
    patience: Duration,
) -> Result<Paths, Error> {
    let mut paths = HashMap::new();
    for (device, field, backend) in all(config) {
        let path = match backend {
            Backend::Socket(_) => continue,
            Backend::Path(path) if !may_name_paths => return Err(no_paths(&field, path)),
            Backend::Path(path) => path.clone(),
        };
        let mut attempted = attempt(handle, path.clone()).await;
        let busy = matches!(&attempted, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        let patience = if busy { patience.max(BUSY) } else { patience };
        if attempted.is_err() && !patience.is_zero() {
            let again = persist(handle, &path);
            attempted = handle.timeout(patience, again).await.map_or(attempted, Ok);
        }
        let socket = attempted.map_err(|error| nobody(&field, &path, &error))?;
        *backend = Backend::Socket(socket);
        paths.insert(device, path);
    }
    Ok(Rc::new(paths))
}

/// Where the back ends are that `config` names by path; nobody is connected to.
pub(crate) fn paths(config: &mut GuestConfig) -> Paths {
    let path = |(device, _, backend): (String, String, &mut Backend)| match backend {
        Backend::Path(path) => Some((device, path.clone())),
        Backend::Socket(_) => None,
    };
    Rc::new(all(config).filter_map(path).collect())
}

/// Every back end of a configuration: its device's name, its field, and itself.
fn all(config: &mut GuestConfig) -> impl Iterator<Item = (String, String, &mut Backend)> {
    let shares = config.shares.iter_mut().enumerate();
    let shares = shares.map(|(i, share)| (format!("share{i}"), format!("shares[{i}].backend"), &mut share.backend));
    let others = config.vhost_user.iter_mut().enumerate();
    let others = others.map(|(i, device)| {
        let (name, field) = (format!("vhost-user{i}"), format!("vhostUser[{i}].backend"));
        (name, field, &mut device.backend)
    });
    shares.chain(others)
}

fn nobody(field: &str, path: &str, error: &dyn std::fmt::Display) -> Error {
    let message = format!("{field}: nobody serves at {path}: {error}");
    Error::new(Kind::FailedServiceConnect, message).about(field)
}

/// The back ends that `config` names by path: field and path.
pub(crate) fn named(config: &mut GuestConfig) -> Vec<(String, String)> {
    let path = |(_, field, backend): (_, String, &mut Backend)| match backend {
        Backend::Path(path) => Some((field, path.clone())),
        Backend::Socket(_) => None,
    };
    all(config).filter_map(path).collect()
}

/// Whether there is a socket at a back end's path. It is not connected to: some back ends serve whoever comes first, and end with them. May block.
///
/// # Errors
/// `FAILED_SERVICE_CONNECT` about the field.
pub(crate) fn check(field: &str, path: &str) -> Result<(), Error> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(()),
        Ok(_) => Err(nobody(field, path, &"it is no socket")),
        Err(error) => Err(nobody(field, path, &error)),
    }
}

async fn attempt(handle: &Handle, path: String) -> io::Result<OwnedFd> {
    let connect = move || {
        let socket = connect_at_once(path.as_ref())?;
        socket.set_nonblocking(false)?;
        Ok::<_, io::Error>(socket)
    };
    let connected = handle.spawn_foreign(connect).await;
    Ok(connected.map_err(io::Error::other)??.into())
}

/// Tries until somebody serves. That a listener has come back is nothing that the system would tell: the socket's file may be there long before,
/// or all along.
async fn persist(handle: &Handle, path: &str) -> OwnedFd {
    let (mut wait, longest) = WAITS;
    loop {
        handle.sleep(wait).await;
        if let Ok(socket) = attempt(handle, path.to_owned()).await {
            return socket;
        }
        wait = (wait * 2).min(longest);
    }
}

/// Connects a component's devices again.
pub(crate) struct Reconnector {
    pub(crate) handle: Handle,
    pub(crate) paths: Paths,
    /// The descriptors that travel with the component's messages.
    pub(crate) fds: FdTable,
}

impl Reconnector {
    async fn connect(&self, device: &str) -> Result<OwnedFd, Error> {
        let Some(path) = self.paths.get(device) else {
            let message = format!("{device}: its process was given as a socket, and cannot be connected to again");
            return Err(Error::not_supported("device", message));
        };
        Ok(persist(&self.handle, path).await)
    }
}

impl backends::Server for Reconnector {
    async fn reconnect(
        self: Rc<Self>,
        params: backends::ReconnectParams,
        mut results: backends::ReconnectResults,
    ) -> Result<(), capnp::Error> {
        let device = params.get()?.get_device()?.to_string()?;
        let sent = match self.connect(&device).await {
            Ok(socket) => Handles::send(&self.fds, socket),
            Err(error) => Err(error),
        };
        match sent {
            Ok(number) => results.get().init_fd().set_number(number),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}
