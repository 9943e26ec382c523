//! The host's side of the socket device, as a capability. Connections leave as sockets; the guest manager makes byte streams of them for
//! clients that cannot take descriptors.

use std::{cell::Cell, os::fd::OwnedFd};

use capnp::capability::Rc as ServerRc;
use futures::{
    StreamExt,
    channel::{mpsc, oneshot},
};
use sepal_devices::virtio::vsock::{AcceptError, ConnectError, Incoming, ListenError, Listener, VsockHandle};
use sepal_schema::{
    error::{Error, Kind},
    transport::{FdTable, guard},
    vsock_capnp::{host_vsock_endpoint, vsock_connection, vsock_listener},
};

use super::guest::GuestServer;

type Reply = Result<(), capnp::Error>;

/// Requests of the guest for one port that may wait for an answer.
const BACKLOG: u32 = 128;

fn listen_error(error: &ListenError) -> Error {
    let kind = match error {
        ListenError::AlreadyBound(_) => Kind::AlreadyBound,
        ListenError::NoResources => Kind::NoResources,
        ListenError::Gone => Kind::NotRunning,
        _ => Kind::InternalError,
    };
    Error::new(kind, error.to_string()).about("port")
}

fn connect_error(error: &ConnectError) -> Error {
    let kind = match error {
        // A guest without a driver listens nowhere.
        ConnectError::Refused(_) | ConnectError::NotReady(_) => Kind::ConnectionRefused,
        ConnectError::NoResources { .. } => Kind::NoResources,
        ConnectError::TimedOut(_) => Kind::TimedOut,
        ConnectError::Gone(_) => Kind::NotRunning,
        _ => Kind::InternalError,
    };
    Error::new(kind, error.to_string()).about("port")
}

fn accept_error(error: &AcceptError) -> Error {
    let kind = match error {
        AcceptError::Gone => Kind::NotRunning,
        AcceptError::NoResources(_) => Kind::NoResources,
        _ => Kind::InternalError,
    };
    Error::new(kind, error.to_string()).about("connection")
}

impl GuestServer {
    fn vsock(&self) -> Result<VsockHandle, Error> {
        let gone = || Error::new(Kind::DeviceNotPresent, "the guest has no vsock device").about("vsock");
        self.devices()?.vsock.ok_or_else(gone)
    }
}

/// Connects to a port of the guest.
async fn connect(vsock: Result<VsockHandle, Error>, port: u32) -> Result<OwnedFd, Error> {
    let (sender, receiver) = oneshot::channel();
    vsock?.connect(port, move |result| {
        // Nobody listens any more if the call was dropped: the connection ends with its socket.
        let _ = sender.send(result);
    });
    let result = receiver.await.unwrap_or(Err(ConnectError::Gone(port)));
    result.map_err(|error| connect_error(&error))
}

fn write_fd(fds: &FdTable, socket: Result<OwnedFd, Error>, mut to: host_vsock_endpoint::stream_result::Builder<'_>) {
    match socket.and_then(|socket| {
        fds.send(socket)
            .map_err(|error| Error::new(Kind::NoResources, error.to_string()))
    }) {
        Ok(number) => to.init_fd().set_number(number),
        Err(error) => error.write(to.reborrow().init_error()),
    }
}

fn no_streams(method: &str) -> Error {
    Error::not_supported(
        method,
        "a component gives sockets only; the guest manager makes byte streams of them",
    )
}

impl host_vsock_endpoint::Server for GuestServer {
    async fn listen(
        self: ServerRc<Self>,
        params: host_vsock_endpoint::ListenParams,
        mut results: host_vsock_endpoint::ListenResults,
    ) -> Reply {
        let params = params.get()?;
        let acceptor = params.get_acceptor()?;
        let (sender, mut requests) = mpsc::unbounded::<Incoming>();
        let listening = self.vsock().and_then(|vsock| {
            // Bounded by the backlog. When the task is gone, requests are dropped, which refuses them.
            let sink = move |incoming| drop(sender.unbounded_send(incoming));
            vsock
                .listen(params.get_port(), BACKLOG, sink)
                .map_err(|error| listen_error(&error))
        });
        match listening {
            Ok(listener) => {
                let fds = self.fds.clone();
                let spawner = self.spawner().clone();
                self.spawner().spawn(async move {
                    while let Some(incoming) = requests.next().await {
                        let mut call = acceptor.accept_request();
                        let mut to = call.get();
                        to.set_port(incoming.port);
                        to.set_source_port(incoming.peer_port);
                        to.set_connection(guard::new_client(ConnectionServer {
                            incoming: Cell::new(Some(incoming)),
                            fds: fds.clone(),
                        }));
                        // Its answer says nothing that the connection does not: an acceptor that is gone drops that. But a call that nobody waits for
                        // would be cancelled.
                        let answer = call.send().promise;
                        spawner.spawn(async move {
                            let _ = answer.await;
                        });
                    }
                });
                results
                    .get()
                    .set_listener(guard::new_client(ListenerServer { _listener: listener }));
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn connect(
        self: ServerRc<Self>,
        params: host_vsock_endpoint::ConnectParams,
        mut results: host_vsock_endpoint::ConnectResults,
    ) -> Reply {
        let port = params.get()?.get_port();
        let socket = connect(self.vsock(), port).await;
        write_fd(&self.fds, socket, results.get());
        Ok(())
    }

    async fn connect_stream(
        self: ServerRc<Self>,
        _: host_vsock_endpoint::ConnectStreamParams,
        mut results: host_vsock_endpoint::ConnectStreamResults,
    ) -> Reply {
        no_streams("connectStream").write(results.get().init_error());
        Ok(())
    }

    async fn address(
        self: ServerRc<Self>,
        _: host_vsock_endpoint::AddressParams,
        mut results: host_vsock_endpoint::AddressResults,
    ) -> Reply {
        let cid = self.vsock().map_err(|error| capnp::Error::failed(error.message))?.cid();
        // A context id of a guest has 32 bits.
        results.get().set_cid(cid as u32);
        Ok(())
    }
}

/// Listens until it is dropped.
struct ListenerServer {
    _listener: Listener,
}

impl vsock_listener::Server for ListenerServer {}

/// A request of the guest; dropping it refuses.
struct ConnectionServer {
    incoming: Cell<Option<Incoming>>,
    fds: FdTable,
}

impl ConnectionServer {
    fn take(&self) -> Result<Incoming, Error> {
        let used = || Error::bad_config("connection", "the connection has been opened before");
        self.incoming.take().ok_or_else(used)
    }
}

impl vsock_connection::Server for ConnectionServer {
    async fn open(
        self: ServerRc<Self>,
        _: vsock_connection::OpenParams,
        mut results: vsock_connection::OpenResults,
    ) -> Reply {
        let socket = self
            .take()
            .and_then(|incoming| incoming.accept().map_err(|error| accept_error(&error)));
        write_fd(&self.fds, socket, results.get());
        Ok(())
    }

    async fn open_stream(
        self: ServerRc<Self>,
        _: vsock_connection::OpenStreamParams,
        mut results: vsock_connection::OpenStreamResults,
    ) -> Reply {
        no_streams("openStream").write(results.get().init_error());
        Ok(())
    }
}
