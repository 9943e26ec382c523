//! A guest's socket device: what clients hold of it, in front of what its component offers.
//!
//! ```text
//!   client --HostVsockEndpoint--> Endpoint --remote--> component        connect: the socket comes back, and goes on to the client
//!   client <--VsockAcceptor------ Acceptor <---------- component        a guest asks: the client gets a Connection
//!   client --VsockConnection----> Connection --------> component        open: as connect, once
//!
//!   path         the same as Unix sockets, for clients of other monitors
//!     convention   who may wait how long, and how many
//!       request      the line that a client begins with (pure)
//!       bridge       bytes both ways between two sockets
//!   stream       for clients that receive no descriptors
//!   reservation  context ids that the host's kernel gives to nobody else
//! ```
//!
//! No capability of the component's reaches a client: calls can be given up, and ends are told in words.

mod bridge;
mod convention;
pub(crate) mod path;
mod request;
pub(crate) mod reservation;
mod stream;

use std::{cell::RefCell, os::unix::net::UnixStream, rc::Rc};

use sepal_schema::{
    bytes_capnp::byte_stream,
    config::Handles,
    error::{Error, Kind, Outcome},
    guest_capnp::guest as component_guest,
    transport::{FdTable, guard},
    vsock_capnp::{
        host_vsock_endpoint::{self, byte_stream_result, stream_result},
        vsock_acceptor, vsock_connection, vsock_listener,
    },
};

use crate::{
    facets::{error_of, facet},
    guest::Guest,
    model::bounded_error,
};

type Reply = Result<(), capnp::Error>;

/// The component's side of a guest's socket device.
///
/// # Errors
/// `DEVICE_NOT_PRESENT`, or that the guest does not answer.
pub(crate) async fn remote(guest: &Guest) -> Result<host_vsock_endpoint::Client, Error> {
    let ask = |remote: &component_guest::Client| remote.host_vsock_endpoint_request().send().promise;
    facet(guest, ask, |answer| Ok(answer.outcome()?.get_endpoint()?)).await
}

/// A guest's socket device, for a client with whose messages the descriptors of `fds` travel.
///
/// # Errors
/// As [`remote`].
pub(crate) async fn endpoint(guest: &Rc<Guest>, fds: FdTable) -> Result<host_vsock_endpoint::Client, Error> {
    let remote = remote(guest).await?;
    Ok(guard::new_client(Endpoint {
        guest: guest.clone(),
        remote,
        fds,
    }))
}

/// Connects to a port of the guest.
///
/// # Errors
/// `CONNECTION_REFUSED`, `NO_RESOURCES`, `TIMED_OUT`, or that the guest does not answer.
pub(crate) async fn connect(
    guest: &Guest,
    remote: &host_vsock_endpoint::Client,
    port: u32,
) -> Result<UnixStream, Error> {
    let mut call = remote.connect_request();
    call.get().set_port(port);
    let answer = guest.answer(call.send().promise).await?;
    taken(guest, answer.get()?)
}

/// Grants a connection that the guest asked for.
///
/// # Errors
/// `NOT_RUNNING`: the guest does not wait any more. `NO_RESOURCES`.
pub(crate) async fn open(guest: &Guest, connection: &vsock_connection::Client) -> Result<UnixStream, Error> {
    let answer = guest.answer(connection.open_request().send().promise).await?;
    taken(guest, answer.get()?)
}

/// The socket that came with an answer of the component.
fn taken(guest: &Guest, answer: stream_result::Reader<'_>) -> Result<UnixStream, Error> {
    match answer.which().map_err(capnp::Error::from)? {
        stream_result::Fd(fd) => {
            let fd = guest.component_fds()?.take(fd?.get_number());
            let fd = fd.map_err(|error| Error::new(Kind::InternalError, error.to_string()))?;
            Ok(fd.into())
        }
        stream_result::Error(error) => Err(error_of(error)),
    }
}

/// Has a client of the guest's listen on a port of the host, until what is returned is dropped.
///
/// # Errors
/// `ALREADY_BOUND`, `NO_RESOURCES`, or that the guest does not answer.
pub(crate) async fn listen(
    guest: &Rc<Guest>,
    remote: &host_vsock_endpoint::Client,
    port: u32,
    acceptor: vsock_acceptor::Client,
    fds: FdTable,
) -> Result<vsock_listener::Client, Error> {
    let acceptor = guard::new_client(Acceptor {
        guest: guest.clone(),
        acceptor,
        fds,
    });
    let listener = listen_here(guest, remote, port, acceptor).await?;
    Ok(guard::new_client(Listener { _remote: listener }))
}

/// Listens with an acceptor of the manager's own, until what is returned is dropped.
///
/// # Errors
/// As [`listen`].
pub(crate) async fn listen_here(
    guest: &Guest,
    remote: &host_vsock_endpoint::Client,
    port: u32,
    acceptor: vsock_acceptor::Client,
) -> Result<vsock_listener::Client, Error> {
    let mut call = remote.listen_request();
    call.get().set_port(port);
    call.get().set_acceptor(acceptor);
    let answer = guest.answer(call.send().promise).await?;
    Ok(answer.get()?.outcome().map_err(bounded_error)?.get_listener()?)
}

/// A client's listener; the component's goes with it.
struct Listener {
    _remote: vsock_listener::Client,
}

impl vsock_listener::Server for Listener {}

/// A client's view of a guest's socket device.
struct Endpoint {
    guest: Rc<Guest>,
    remote: host_vsock_endpoint::Client,
    fds: FdTable,
}

/// Hands a socket to a client.
fn hand_over(fds: &FdTable, socket: Result<UnixStream, Error>, result: stream_result::Builder<'_>) {
    let number = socket.and_then(|socket| Handles::send(fds, socket.into()));
    match number {
        Ok(number) => result.init_fd().set_number(number),
        Err(error) => error.write(result.init_error()),
    }
}

/// Hands a socket to a client as two streams of bytes.
fn hand_over_streams(
    guest: &Guest,
    socket: Result<UnixStream, Error>,
    from_guest: byte_stream::Client,
    mut result: byte_stream_result::Builder<'_>,
) {
    let to_guest = socket.and_then(|socket| stream::split(&guest.manager.handle, socket, from_guest));
    match to_guest {
        Ok(to_guest) => result.set_to_guest(to_guest),
        Err(error) => error.write(result.init_error()),
    }
}

impl sepal_schema::facet_capnp::facet::Server for Endpoint {}

impl host_vsock_endpoint::Server for Endpoint {
    async fn listen(
        self: Rc<Self>,
        params: host_vsock_endpoint::ListenParams,
        mut results: host_vsock_endpoint::ListenResults,
    ) -> Reply {
        let (port, acceptor) = {
            let params = params.get()?;
            (params.get_port(), params.get_acceptor()?)
        };
        match listen(&self.guest, &self.remote, port, acceptor, self.fds.clone()).await {
            Ok(listener) => results.get().set_listener(listener),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn connect(
        self: Rc<Self>,
        params: host_vsock_endpoint::ConnectParams,
        mut results: host_vsock_endpoint::ConnectResults,
    ) -> Reply {
        let port = params.get()?.get_port();
        let socket = connect(&self.guest, &self.remote, port).await;
        hand_over(&self.fds, socket, results.get());
        Ok(())
    }

    async fn connect_stream(
        self: Rc<Self>,
        params: host_vsock_endpoint::ConnectStreamParams,
        mut results: host_vsock_endpoint::ConnectStreamResults,
    ) -> Reply {
        let (port, from_guest) = {
            let params = params.get()?;
            (params.get_port(), params.get_from_guest()?)
        };
        let socket = connect(&self.guest, &self.remote, port).await;
        hand_over_streams(&self.guest, socket, from_guest, results.get());
        Ok(())
    }

    async fn address(
        self: Rc<Self>,
        _: host_vsock_endpoint::AddressParams,
        mut results: host_vsock_endpoint::AddressResults,
    ) -> Reply {
        results.get().set_cid(self.guest.cid());
        Ok(())
    }
}

/// Takes connections of the guest to a client that listens.
struct Acceptor {
    guest: Rc<Guest>,
    acceptor: vsock_acceptor::Client,
    fds: FdTable,
}

impl vsock_acceptor::Server for Acceptor {
    async fn accept(self: Rc<Self>, params: vsock_acceptor::AcceptParams, _: vsock_acceptor::AcceptResults) -> Reply {
        let mut call = self.acceptor.accept_request();
        {
            let params = params.get()?;
            call.get().set_port(params.get_port());
            call.get().set_source_port(params.get_source_port());
            call.get().set_connection(guard::new_client(Connection {
                guest: self.guest.clone(),
                remote: RefCell::new(Some(params.get_connection()?)),
                fds: self.fds.clone(),
            }));
        }
        // Apart from this call: a component that does not wait for the answer must not take the question back.
        let answer = call.send().promise;
        self.guest.manager.handle.spawn(async move { drop(answer.await) });
        Ok(())
    }
}

/// A connection that the guest asked for, until a client has opened it.
struct Connection {
    guest: Rc<Guest>,
    remote: RefCell<Option<vsock_connection::Client>>,
    fds: FdTable,
}

impl Connection {
    async fn socket(&self) -> Result<UnixStream, Error> {
        let remote = self.remote.borrow_mut().take();
        let remote = remote.ok_or_else(|| Error::new(Kind::BadConfig, "the connection has been opened already"))?;
        open(&self.guest, &remote).await
    }
}

impl vsock_connection::Server for Connection {
    async fn open(
        self: Rc<Self>,
        _: vsock_connection::OpenParams,
        mut results: vsock_connection::OpenResults,
    ) -> Reply {
        let socket = self.socket().await;
        hand_over(&self.fds, socket, results.get());
        Ok(())
    }

    async fn open_stream(
        self: Rc<Self>,
        params: vsock_connection::OpenStreamParams,
        mut results: vsock_connection::OpenStreamResults,
    ) -> Reply {
        let from_guest = params.get()?.get_from_guest()?;
        let socket = self.socket().await;
        hand_over_streams(&self.guest, socket, from_guest, results.get());
        Ok(())
    }
}
