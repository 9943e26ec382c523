//! A guest's socket device: what clients hold of it, in front of what its component offers.
//!
//! ```text
//!   client --HostVsockEndpoint--> Endpoint --remote--> component        connect: the socket comes back, and goes on to the client
//!   client <--VsockAcceptor------ Acceptor <---------- component        a guest asks: the client gets a Connection
//!   client --VsockConnection----> Connection --------> component        open: as connect, once
//!
//!   listeners    who listens, whichever run of the guest it is
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
pub(crate) mod listeners;
pub(crate) mod path;
mod request;
pub(crate) mod reservation;
mod stream;

pub(crate) use self::convention::connect_at_once;

use std::{cell::RefCell, os::unix::net::UnixStream, rc::Rc};

use sepal_schema::{
    answer,
    bytes_capnp::byte_stream,
    config::{Handles, device::AGENT_PORT},
    error::{Error, Kind, Outcome},
    facet::Right,
    guest_capnp::guest as component_guest,
    transport::{FdTable, guard, reactor::Task},
    vsock_capnp::{
        host_vsock_endpoint::{self, stream_result},
        vsock_acceptor, vsock_connection, vsock_listener,
    },
};

pub(crate) use self::listeners::{listen_again, listen_here};
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
    },
    facets::{error_of, facet},
    guest::Guest,
};

type Reply = Result<(), capnp::Error>;

const CONNECT: Deed = Deed::new("HostVsockEndpoint.connect", &[Right::Connect]);
/// Through that port the agent does whatever it is asked for.
const CONNECT_AGENT: Deed = Deed::new("HostVsockEndpoint.connect", &[Right::Connect, Right::Agent]);
const LISTEN: Deed = Deed::new("HostVsockEndpoint.listen", &[Right::Listen]);

/// The component's side of a guest's socket device.
///
/// # Errors
/// `DEVICE_NOT_PRESENT`, or that the guest does not answer.
pub(crate) async fn remote(guest: &Guest) -> Result<host_vsock_endpoint::Client, Error> {
    let ask = |remote: &component_guest::Client| remote.host_vsock_endpoint_request().send().promise;
    facet(guest, ask, |answer| Ok(answer.outcome()?.get_endpoint()?)).await
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
    port: u32,
    acceptor: vsock_acceptor::Client,
    fds: FdTable,
) -> Result<vsock_listener::Client, Error> {
    let acceptor = guard::new_client(Acceptor {
        to: To::Owner(guest.clone(), fds),
        acceptor,
    });
    let listener = listen_here(guest, port, acceptor).await?;
    Ok(guard::new_client(Listener {
        _remote: Rc::new(RefCell::new(Some(listener))),
        _until: None,
    }))
}

/// A client's listener; the component's goes with it, and with the capability that it was made through.
struct Listener {
    _remote: Rc<RefCell<Option<vsock_listener::Client>>>,
    _until: Option<Task>,
}

impl vsock_listener::Server for Listener {}

/// Who a connection is for.
#[derive(Clone)]
enum To {
    /// Whoever launched the guest, and listens for as long as it is there.
    Owner(Rc<Guest>, FdTable),
    /// Whoever holds a capability, for as long as that lasts.
    Holder(Holder),
}

impl To {
    fn guest(&self) -> &Rc<Guest> {
        match self {
            Self::Owner(guest, _) => guest,
            Self::Holder(holder) => &holder.guest,
        }
    }

    fn fds(&self) -> &FdTable {
        match self {
            Self::Owner(_, fds) => fds,
            Self::Holder(holder) => &holder.client.fds,
        }
    }

    /// Whether a connection may still be made.
    fn check_live(&self) -> Result<(), Error> {
        match self {
            Self::Owner(..) => Ok(()),
            Self::Holder(holder) => holder.check_live(),
        }
    }

    /// Hands a socket over.
    fn hand_over(&self, socket: Result<UnixStream, Error>, result: stream_result::Builder<'_>) {
        let socket = socket.and_then(|socket| match self {
            // Nobody can take it back: it goes as it is, without a detour.
            Self::Holder(holder) if holder.grant.can_end() => {
                let counted = holder.guest.access.relay()?;
                let relayed = bridge::relay(holder.handle(), socket, counted, holder.until_ended());
                relayed.map_err(|error| Error::new(Kind::NoResources, format!("no stream: {error}")))
            }
            _ => Ok(socket),
        });
        match socket.and_then(|socket| Handles::send(self.fds(), socket.into())) {
            Ok(number) => result.init_fd().set_number(number),
            Err(error) => error.write(result.init_error()),
        }
    }

    /// Makes two streams of bytes of a socket.
    fn split(
        &self,
        socket: Result<UnixStream, Error>,
        from_guest: byte_stream::Client,
    ) -> Result<byte_stream::Client, Error> {
        let socket = socket?;
        let holder = match self {
            Self::Owner(..) => None,
            Self::Holder(holder) => Some((holder.clone(), holder.guest.access.relay()?)),
        };
        stream::split(&self.guest().manager.handle, socket, from_guest, holder)
    }
}

/// A client's view of a guest's socket device.
pub(crate) struct Endpoint(pub(crate) Holder);

facets!(Endpoint { 0 });

impl Endpoint {
    async fn connect_to(&self, port: u32) -> Result<UnixStream, Error> {
        let guest = &self.0.guest;
        let connect = async {
            self.0.grant.check_port(port)?;
            connect(guest, &remote(guest).await?, port).await
        };
        let deed = match port == AGENT_PORT && guest.has_agent {
            true => CONNECT_AGENT,
            false => CONNECT,
        };
        self.0.perform(deed, format!("port {port}"), connect).await
    }

    async fn listen_on(&self, port: u32, acceptor: vsock_acceptor::Client) -> Result<vsock_listener::Client, Error> {
        let (holder, guest) = (&self.0, &self.0.guest);
        let listen = async {
            holder.grant.check_port(port)?;
            let acceptor = guard::new_client(Acceptor {
                to: To::Holder(holder.clone()),
                acceptor,
            });
            let listener = listen_here(guest, port, acceptor).await?;
            let listener = Rc::new(RefCell::new(Some(listener)));
            let (held, ended) = (Rc::downgrade(&listener), holder.until_ended());
            let until = holder.handle().spawn_owned(async move {
                ended.await;
                let listener = held.upgrade().and_then(|listener| listener.take());
                drop(listener);
            });
            Ok(guard::new_client(Listener {
                _remote: listener,
                _until: Some(until),
            }))
        };
        holder.perform(LISTEN, format!("port {port}"), listen).await
    }
}

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
        answer!(results, set_listener, self.listen_on(port, acceptor).await);
        Ok(())
    }

    async fn connect(
        self: Rc<Self>,
        params: host_vsock_endpoint::ConnectParams,
        mut results: host_vsock_endpoint::ConnectResults,
    ) -> Reply {
        let port = params.get()?.get_port();
        let socket = self.connect_to(port).await;
        To::Holder(self.0.clone()).hand_over(socket, results.get());
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
        let socket = self.connect_to(port).await;
        answer!(
            results,
            set_to_guest,
            To::Holder(self.0.clone()).split(socket, from_guest)
        );
        Ok(())
    }

    async fn address(
        self: Rc<Self>,
        _: host_vsock_endpoint::AddressParams,
        mut results: host_vsock_endpoint::AddressResults,
    ) -> Reply {
        match self.0.check_live() {
            Ok(()) => results.get().set_cid(self.0.guest.cid()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

/// Takes connections of the guest to a client that listens.
struct Acceptor {
    to: To,
    acceptor: vsock_acceptor::Client,
}

impl vsock_acceptor::Server for Acceptor {
    async fn accept(self: Rc<Self>, params: vsock_acceptor::AcceptParams, _: vsock_acceptor::AcceptResults) -> Reply {
        // One that came before the component heard that nobody listens any more is refused.
        self.to.check_live().map_err(|error| error.exception())?;
        let mut call = self.acceptor.accept_request();
        {
            let params = params.get()?;
            call.get().set_port(params.get_port());
            call.get().set_source_port(params.get_source_port());
            call.get().set_connection(guard::new_client(Connection {
                to: self.to.clone(),
                remote: RefCell::new(Some(params.get_connection()?)),
            }));
        }
        // Apart from this call: a component that does not wait for the answer must not take the question back.
        let answer = call.send().promise;
        self.to.guest().manager.handle.spawn(async move { drop(answer.await) });
        Ok(())
    }
}

/// A connection that the guest asked for, until a client has opened it.
struct Connection {
    to: To,
    remote: RefCell<Option<vsock_connection::Client>>,
}

impl Connection {
    async fn socket(&self) -> Result<UnixStream, Error> {
        self.to.check_live()?;
        let remote = self.remote.borrow_mut().take();
        let remote = remote.ok_or_else(|| Error::new(Kind::BadConfig, "the connection has been opened already"))?;
        let open = open(self.to.guest(), &remote);
        match &self.to {
            To::Owner(..) => open.await,
            To::Holder(holder) => holder.while_live(open).await,
        }
    }
}

impl vsock_connection::Server for Connection {
    async fn open(
        self: Rc<Self>,
        _: vsock_connection::OpenParams,
        mut results: vsock_connection::OpenResults,
    ) -> Reply {
        let socket = self.socket().await;
        self.to.hand_over(socket, results.get());
        Ok(())
    }

    async fn open_stream(
        self: Rc<Self>,
        params: vsock_connection::OpenStreamParams,
        mut results: vsock_connection::OpenStreamResults,
    ) -> Reply {
        let from_guest = params.get()?.get_from_guest()?;
        let socket = self.socket().await;
        answer!(results, set_to_guest, self.to.split(socket, from_guest));
        Ok(())
    }
}
