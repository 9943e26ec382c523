//! Connections: a bootstrap capability at each end, and a future that says why it ended.
//!
//! ```text
//!   connect / serve --> running --(peer closes, limit, error, disconnect, Connection dropped)--> ending
//!                                                                                                  |
//!      what the peer holds is dropped, what leads to the peer fails with the reason                |
//!      the last messages are written, for a second at most                                         v
//!                                                                                                ended
//! ```
//!
//! When a connection has ended, nothing of it is left: capabilities that the peer held are dropped, and with them the
//! server objects that nobody else holds. That makes the life of a client the life of what it created.

use std::{
    cell::RefCell,
    future::Future,
    io, mem,
    os::{fd::AsRawFd, unix::net::UnixStream},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use capnp::{
    any_pointer,
    capability::{self, FromClientHook, Promise},
    private::capability::{ClientHook, ParamsHook, ResultsHook},
};
use capnp_rpc::{Disconnector, RpcSystem, rpc_twoparty_capnp::Side};
use futures::{
    AsyncRead, AsyncWrite, FutureExt,
    channel::oneshot,
    future::{Either, Shared, select},
};

use super::{
    fd_stream::{FdTable, PlainLink, SocketLink},
    limits::{EndReason, Limits},
    network::{Network, Wire},
    reactor::Handle,
};

/// How long the end of a connection waits for a peer to take the last messages, which tell it the reason.
const LINGER: Duration = Duration::from_secs(1);

/// Who is at the other end of a Unix socket, as the kernel noted it when the connection (or socket pair) was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id as seen from this process; `None` where it has none here (another pid namespace).
    pub pid: Option<u32>,
    /// Effective user id, as seen from this user namespace.
    pub uid: u32,
    /// Effective group id, as seen from this user namespace.
    pub gid: u32,
}

impl PeerCredentials {
    /// Asks the kernel (`SO_PEERCRED`).
    ///
    /// # Errors
    /// Those of `getsockopt`.
    pub fn of(socket: &UnixStream) -> io::Result<Self> {
        // Not through rustix, whose process ids are never 0 as this one can be.
        let mut peer = libc::ucred {
            pid: 0,
            uid: u32::MAX,
            gid: u32::MAX,
        };
        let mut length = mem::size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the pointer and length describe `peer`, a plain C struct that the kernel fills, and both live
        // through the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            pid: u32::try_from(peer.pid).ok().filter(|pid| *pid != 0),
            uid: peer.uid,
            gid: peer.gid,
        })
    }
}

/// A connection. As a future, resolves with the reason when it has ended.
///
/// Dropping it ends the connection; [`Connection::detach`] lets it go on until the peer ends it.
#[must_use = "dropping it ends the connection"]
pub struct Connection {
    wire: Rc<Wire>,
    ended: Shared<oneshot::Receiver<EndReason>>,
    peer: Option<PeerCredentials>,
    detached: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("ended", &self.wire.reason())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// The file descriptors that travel with this connection's messages.
    pub fn fds(&self) -> FdTable {
        self.wire.table().clone()
    }

    /// Who is at the other end; `None` where the connection is no Unix socket.
    pub fn peer(&self) -> Option<PeerCredentials> {
        self.peer
    }

    /// Ends the connection. It has ended when this future resolves, but begins to end at once.
    pub fn disconnect(&self) {
        self.wire.end(EndReason::ClosedHere);
    }

    /// Resolves with the reason when the connection has ended, without holding it.
    pub fn ended(&self) -> impl Future<Output = EndReason> + use<> {
        self.ended.clone().map(|reason| reason.unwrap_or(EndReason::ClosedHere))
    }

    /// Lets the connection go on until the peer ends it or the event loop is dropped.
    pub fn detach(mut self) {
        self.detached = true;
    }
}

impl Future for Connection {
    type Output = EndReason;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<EndReason> {
        self.ended
            .poll_unpin(cx)
            .map(|reason| reason.unwrap_or(EndReason::ClosedHere))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.detached {
            self.wire.end(EndReason::ClosedHere);
        }
    }
}

/// Connects as a client: returns the bootstrap capability of whoever serves the other end.
///
/// `handle` is the event loop of this thread, which drives the connection.
///
/// # Errors
/// When the socket cannot be put on the event loop.
pub fn connect<C: FromClientHook>(handle: &Handle, socket: UnixStream, limits: Limits) -> io::Result<(C, Connection)> {
    let peer = PeerCredentials::of(&socket)?;
    let link = SocketLink {
        socket: handle.register(socket)?,
        takes: limits.unclaimed_fds > 0,
    };
    let wire = Wire::new(Box::new(link), true, Side::Client, limits);
    let (client, connection) = start(handle, wire, Side::Client, None, Some(peer));
    Ok((C::new(client.hook), connection))
}

/// Serves `bootstrap` to whoever connects at the other end.
///
/// # Errors
/// When the socket cannot be put on the event loop.
pub fn serve(
    handle: &Handle,
    socket: UnixStream,
    limits: Limits,
    bootstrap: capability::Client,
) -> io::Result<Connection> {
    serve_with(handle, socket, limits, |_| bootstrap)
}

/// As [`serve`], for a bootstrap capability that takes descriptors from the connection's table, or its peer's credentials.
///
/// # Errors
/// When the socket cannot be put on the event loop.
pub fn serve_with(
    handle: &Handle,
    socket: UnixStream,
    limits: Limits,
    bootstrap: impl FnOnce(FdTable) -> capability::Client,
) -> io::Result<Connection> {
    let peer = PeerCredentials::of(&socket)?;
    let link = SocketLink {
        socket: handle.register(socket)?,
        takes: limits.unclaimed_fds > 0,
    };
    let wire = Wire::new(Box::new(link), true, Side::Server, limits);
    let bootstrap = bootstrap(wire.table().clone());
    let (_, connection) = start(handle, wire, Side::Server, Some(bootstrap), Some(peer));
    Ok(connection)
}

/// Connects as a client over two byte streams that carry no file descriptors, such as the pipes of an ssh process.
pub fn connect_plain<C: FromClientHook>(
    handle: &Handle,
    reader: impl AsyncRead + Unpin + 'static,
    writer: impl AsyncWrite + Unpin + 'static,
    limits: Limits,
) -> (C, Connection) {
    let link = Box::new(PlainLink { reader, writer });
    let wire = Wire::new(link, false, Side::Client, limits);
    let (client, connection) = start(handle, wire, Side::Client, None, None);
    (C::new(client.hook), connection)
}

/// Serves `bootstrap` over two byte streams that carry no file descriptors.
pub fn serve_plain(
    handle: &Handle,
    reader: impl AsyncRead + Unpin + 'static,
    writer: impl AsyncWrite + Unpin + 'static,
    limits: Limits,
    bootstrap: capability::Client,
) -> Connection {
    let link = Box::new(PlainLink { reader, writer });
    let wire = Wire::new(link, false, Side::Server, limits);
    start(handle, wire, Side::Server, Some(bootstrap), None).1
}

fn start(
    handle: &Handle,
    wire: Rc<Wire>,
    side: Side,
    bootstrap: Option<capability::Client>,
    peer: Option<PeerCredentials>,
) -> (capability::Client, Connection) {
    let bootstrap = bootstrap.map(|client| Revocable(Rc::new(RefCell::new(client.hook))));
    let revocable = bootstrap.clone();
    let bootstrap = bootstrap.map(|hook| capability::Client::new(Box::new(hook)));
    let mut system = RpcSystem::new(Box::new(Network::new(wire.clone())), bootstrap);
    // On the serving side this would ask the client for a bootstrap capability, which it does not have.
    let client = match side {
        Side::Client => system.bootstrap(Side::Server),
        Side::Server => capnp_rpc::new_broken_cap(capnp::Error::failed("the client serves nothing".into())),
    };
    let (ended, receiver) = oneshot::channel();
    let driver = Driver {
        disconnector: Some(system.get_disconnector()),
        system: Some(system),
        wire: wire.clone(),
        revocable,
        ended: Some(ended),
    };
    handle.spawn(driver.run(handle.clone()));
    (
        client,
        Connection {
            wire,
            ended: receiver.shared(),
            peer,
            detached: false,
        },
    )
}

/// Drives the RPC system of a connection, and takes everything down with it, also when it is dropped in between.
struct Driver {
    system: Option<RpcSystem<Side>>,
    disconnector: Option<Disconnector<Side>>,
    wire: Rc<Wire>,
    revocable: Option<Revocable>,
    ended: Option<oneshot::Sender<EndReason>>,
}

impl Driver {
    async fn run(mut self, handle: Handle) {
        let Some(system) = self.system.as_mut() else { return };
        let (wire, revocable) = (&self.wire, &self.revocable);
        let deadline = async {
            wire.ending().await;
            // Does not wait for a peer that does not read.
            revoke(revocable.as_ref(), wire);
            handle.sleep(LINGER).await;
        };
        // The library has assertions that a peer could find a way to; they must not end the process.
        let system = AssertUnwindSafe(system).catch_unwind();
        let finished = select(system, Box::pin(deadline)).await;
        if let Either::Left((Err(panic), _)) = &finished {
            tracing::error!(panic = super::panic_message(&**panic), "the RPC system panicked");
            self.wire.end(EndReason::Internal);
        }
        drop(finished);
        drop(self);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.wire.end(EndReason::ClosedHere);
        let taken_down = catch_unwind(AssertUnwindSafe(|| {
            // Lets go of what the peer holds even if the library never came to it: an exported object may well hold a
            // capability of this connection, and then nothing else would break the circle.
            if let Some(mut disconnector) = self.disconnector.take() {
                let _ = disconnector.poll_unpin(&mut Context::from_waker(Waker::noop()));
            }
            drop(self.system.take());
        }));
        if let Err(panic) = taken_down {
            tracing::error!(
                panic = super::panic_message(&*panic),
                "the end of a connection panicked"
            );
        }
        revoke(self.revocable.as_ref(), &self.wire);
        // What still fits into the socket leaves, if the loop did not come to it.
        let _ = self.wire.poll_drive(&mut Context::from_waker(Waker::noop()));
        self.wire.close();
        if let (Some(ended), Some(reason)) = (self.ended.take(), self.wire.reason()) {
            let _ = ended.send(reason);
        }
    }
}

fn revoke(bootstrap: Option<&Revocable>, wire: &Wire) {
    if let Some(bootstrap) = bootstrap {
        let reason = wire.reason().unwrap_or(EndReason::ClosedHere);
        bootstrap.revoke(capnp::Error::disconnected(reason.to_string()));
    }
}

/// A bootstrap capability that can be taken back: the RPC system keeps its own for as long as anybody holds a
/// capability of the connection, and the object behind it may be who holds one.
#[derive(Clone)]
struct Revocable(Rc<RefCell<Box<dyn ClientHook>>>);

impl Revocable {
    fn revoke(&self, error: capnp::Error) {
        let hook = self.0.replace(capnp_rpc::new_broken_cap(error).hook);
        drop(hook);
    }

    fn hook(&self) -> Box<dyn ClientHook> {
        self.0.borrow().add_ref()
    }
}

impl ClientHook for Revocable {
    fn add_ref(&self) -> Box<dyn ClientHook> {
        Box::new(self.clone())
    }

    fn new_call(
        &self,
        interface: u64,
        method: u16,
        size: Option<capnp::MessageSize>,
    ) -> capability::Request<any_pointer::Owned, any_pointer::Owned> {
        self.hook().new_call(interface, method, size)
    }

    fn call(
        &self,
        interface: u64,
        method: u16,
        params: Box<dyn ParamsHook>,
        results: Box<dyn ResultsHook>,
    ) -> Promise<(), capnp::Error> {
        self.hook().call(interface, method, params, results)
    }

    fn get_brand(&self) -> usize {
        0
    }

    fn get_ptr(&self) -> usize {
        Rc::as_ptr(&self.0).addr()
    }

    fn get_resolved(&self) -> Option<Box<dyn ClientHook>> {
        Some(self.hook())
    }

    fn when_more_resolved(&self) -> Option<Promise<Box<dyn ClientHook>, capnp::Error>> {
        Some(Promise::ok(self.hook()))
    }

    fn when_resolved(&self) -> Promise<(), capnp::Error> {
        self.hook().when_resolved()
    }
}
