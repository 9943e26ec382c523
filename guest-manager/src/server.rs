//! Serves connections: those that come to the manager's sockets, and one that was inherited.
//!
//! ```text
//!   somebody connects --> who is it? --> role --none--> refused
//!                                          |
//!                             room for another of its kind? --no--> refused
//!                                          |
//!                                     ManagerServer with this role, until the connection ends
//! ```

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    os::unix::net::{UnixListener, UnixStream},
    rc::Rc,
    time::{Duration, Instant},
};

use sepal_schema::transport::{AsyncFd, Connection, Limits, serve_with};

use crate::{
    client::{Client, Who},
    manager::Manager,
    manager_server::ManagerServer,
    peer::Peer,
    roles::Role,
    serial::yield_now,
};

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 1024;
/// Most connections of clients that are not admins, so that nobody else keeps those out.
const MAX_OTHERS: usize = 768;
/// Most connections of a user who is not an admin.
const MAX_OF_USER: usize = 128;
/// How long the manager leaves a caller waiting when it has no descriptors left.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);
/// Refusals are logged this often at most.
const REFUSALS_EVERY: Duration = Duration::from_secs(1);

/// Where a client comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// The manager's socket, or an inherited one: roles are given by who it is.
    Main,
    /// The read-only socket: everyone may look, and nobody may do more.
    ReadOnly,
}

impl Door {
    /// The role of somebody who comes in here; none if that is refused.
    fn role(self, manager: &Manager, peer: &Peer) -> Option<Role> {
        match self {
            Self::Main => manager.settings.roles.of(peer.as_role_peer()),
            Self::ReadOnly => Some(Role::Observe),
        }
    }
}

/// Serves one connection, which was not accepted but inherited; none if its peer may not use this manager.
///
/// # Errors
/// The socket cannot be put on the event loop.
pub fn serve(manager: &Rc<Manager>, socket: UnixStream) -> io::Result<Option<Kept>> {
    let peer = Peer::of(&socket)?;
    match Door::Main.role(manager, &peer) {
        Some(role) => begin(manager, socket, peer.who, role, Door::Main).map(Some),
        None => Ok(None),
    }
}

fn begin(manager: &Rc<Manager>, socket: UnixStream, who: Who, role: Role, door: Door) -> io::Result<Kept> {
    tracing::debug!(uid = who.uid, pid = who.pid, %role, "connected");
    let bootstrap = |fds| {
        let client = match door {
            Door::Main => Client::new(fds, who, role),
            Door::ReadOnly => Client::read_only(fds, who),
        };
        ManagerServer::new_client(manager.clone(), client).client
    };
    let mut limits = Limits::default();
    if role < Role::Operate {
        // Who cannot launch has no use for descriptors, and could keep the loop waiting by one of a file system of their own.
        limits.unclaimed_fds = 0;
    }
    let connection = serve_with(&manager.handle, socket, limits, bootstrap)?;
    Ok(Kept {
        connection,
        uid: who.uid,
        admin: role == Role::Admin,
    })
}

/// A connection that is served.
pub struct Kept {
    connection: Connection,
    uid: u32,
    admin: bool,
}

/// The connections that are open.
#[derive(Default)]
pub struct Connections {
    open: RefCell<HashMap<u64, Rc<Kept>>>,
    last: Cell<u64>,
    refused: Refusals,
}

impl Connections {
    /// Keeps a connection, which counts from now on, until it ends; resolves then.
    pub fn keep(self: &Rc<Self>, kept: Kept) -> impl Future<Output = ()> + use<> {
        let number = self.last.get() + 1;
        self.last.set(number);
        let ended = kept.connection.ended();
        self.open.borrow_mut().insert(number, Rc::new(kept));
        let connections = self.clone();
        async move {
            let reason = ended.await;
            let connection = connections.open.borrow_mut().remove(&number);
            drop(connection);
            tracing::debug!("disconnected: {reason}");
        }
    }

    /// Ends all of them; resolves when the last answers have left, which takes a second at most.
    pub async fn end(&self) {
        let open: Vec<_> = self.open.borrow().values().cloned().collect();
        futures::future::join_all(open.iter().map(|kept| {
            kept.connection.disconnect();
            kept.connection.ended()
        }))
        .await;
    }

    /// Why there is no room for another connection of this user; none if there is.
    fn full(&self, uid: u32, admin: bool) -> Option<String> {
        let open = self.open.borrow();
        if open.len() >= MAX_CONNECTIONS {
            return Some(format!("there are {MAX_CONNECTIONS} connections"));
        }
        if admin {
            return None;
        }
        let others = || open.values().filter(|kept| !kept.admin);
        if others().count() >= MAX_OTHERS {
            return Some(format!(
                "there are {MAX_OTHERS} connections of clients that are not admins"
            ));
        }
        let of_user = others().filter(|kept| kept.uid == uid).count();
        (of_user >= MAX_OF_USER).then(|| format!("this user has {MAX_OF_USER} connections"))
    }
}

/// Logs who was refused, but not so often that somebody could fill the log by trying.
#[derive(Default)]
struct Refusals {
    told: Cell<Option<Instant>>,
    untold: Cell<u64>,
}

impl Refusals {
    fn tell(&self, who: &Who, why: &str) {
        let now = Instant::now();
        let soon = |told: Instant| now.duration_since(told) < REFUSALS_EVERY;
        if self.told.get().is_some_and(soon) {
            self.untold.set(self.untold.get() + 1);
            return;
        }
        self.told.set(Some(now));
        let untold = self.untold.take();
        tracing::warn!(uid = who.uid, pid = who.pid, untold, "connection refused: {why}");
    }
}

/// Serves those who connect, for ever.
pub async fn accept(manager: &Rc<Manager>, connections: &Rc<Connections>, listener: AsyncFd<UnixListener>, door: Door) {
    loop {
        // Others get their turn, however fast somebody connects.
        yield_now().await;
        let socket = match listener.accept().await {
            Ok(socket) => socket,
            Err(error) => {
                // One that is gone already is nobody's concern; for lack of descriptors there is nothing to do but wait for some.
                if error.kind() != io::ErrorKind::ConnectionAborted {
                    tracing::warn!("a connection cannot be accepted: {error}");
                    manager.handle.sleep(OUT_OF_DESCRIPTORS).await;
                }
                continue;
            }
        };
        if let Err(error) = welcome(manager, connections, socket, door) {
            tracing::warn!("a connection cannot be served: {error}");
        }
    }
}

fn welcome(manager: &Rc<Manager>, connections: &Rc<Connections>, socket: UnixStream, door: Door) -> io::Result<()> {
    let peer = Peer::of(&socket)?;
    let Some(role) = door.role(manager, &peer) else {
        connections.refused.tell(&peer.who, "nothing is allowed to this user");
        return Ok(());
    };
    if let Some(why) = connections.full(peer.who.uid, role == Role::Admin) {
        connections.refused.tell(&peer.who, &why);
        return Ok(());
    }
    let kept = connections.keep(begin(manager, socket, peer.who, role, door)?);
    manager.handle.spawn(kept);
    Ok(())
}
