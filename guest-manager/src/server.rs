//! Serves connections: those that come to the manager's socket, and one that was inherited.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    os::unix::net::{UnixListener, UnixStream},
    rc::Rc,
    time::Duration,
};

use sepal_schema::transport::{AsyncFd, Connection, Limits, PeerCredentials, serve_with};

use crate::{
    client::{Client, Who},
    manager::Manager,
    manager_server::ManagerServer,
    roles::{Peer, Roles},
};

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 1024;
/// How long the manager leaves a caller waiting when it has no descriptors left.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// Serves one connection; none if its peer may not use this manager.
///
/// # Errors
/// The socket cannot be put on the event loop.
pub fn serve(manager: &Rc<Manager>, socket: UnixStream) -> io::Result<Option<Connection>> {
    let own_uid = rustix::process::geteuid().as_raw();
    let peer = PeerCredentials::of(&socket)?;
    let groups = [];
    let seen = Peer {
        uid: peer.uid,
        gid: peer.gid,
        groups: &groups,
    };
    let Some(role) = Roles::new(own_uid, []).of(seen) else {
        tracing::warn!(
            uid = peer.uid,
            pid = peer.pid,
            "connection refused: the manager serves only its own user and root"
        );
        return Ok(None);
    };
    tracing::debug!(uid = peer.uid, pid = peer.pid, "connected");
    let who = Who {
        uid: peer.uid,
        gid: peer.gid,
        pid: peer.pid,
        share: None,
    };
    let bootstrap = |fds| ManagerServer::new_client(manager.clone(), Client::new(fds, who, role)).client;
    serve_with(&manager.handle, socket, Limits::default(), bootstrap).map(Some)
}

/// The connections that are open.
#[derive(Default)]
pub struct Connections {
    open: RefCell<HashMap<u64, Rc<Connection>>>,
    last: Cell<u64>,
}

impl Connections {
    /// Keeps a connection, which counts from now on, until it ends; resolves then.
    pub fn keep(self: &Rc<Self>, connection: Connection) -> impl Future<Output = ()> + use<> {
        let number = self.last.get() + 1;
        self.last.set(number);
        let ended = connection.ended();
        self.open.borrow_mut().insert(number, Rc::new(connection));
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
        futures::future::join_all(open.iter().map(|connection| {
            connection.disconnect();
            connection.ended()
        }))
        .await;
    }
}

/// Serves those who connect, for ever.
pub async fn accept(manager: &Rc<Manager>, connections: &Rc<Connections>, listener: AsyncFd<UnixListener>) {
    loop {
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
        if connections.open.borrow().len() >= MAX_CONNECTIONS {
            tracing::warn!("connection refused: there are {MAX_CONNECTIONS}");
            continue;
        }
        match serve(manager, socket) {
            Ok(Some(connection)) => {
                let kept = connections.keep(connection);
                manager.handle.spawn(kept);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!("a connection cannot be served: {error}"),
        }
    }
}
