//! Who is at the other end of a client's connection, and what it may do.

use std::{cell::Cell, rc::Rc};

use sepal_schema::transport::{FdTable, PeerCredentials};

/// A client's connection, as the capabilities that it holds know it.
#[derive(Debug, Clone)]
pub struct Client {
    /// The descriptors that travel with its messages.
    pub fds: FdTable,
    /// Whether it may do what needs the manager's own authority: name paths, end the manager.
    pub trusted: bool,
    /// How many uploads it has.
    pub uploads: Rc<Cell<usize>>,
}

impl Client {
    /// The client at the other end of a connection.
    pub fn new(fds: FdTable, trusted: bool) -> Self {
        Self {
            fds,
            trusted,
            uploads: Rc::default(),
        }
    }
}

/// Whether a peer has the manager's own authority anyway: the same user, or root.
pub fn trusted(peer: PeerCredentials, own_uid: u32) -> bool {
    peer.uid == own_uid || peer.uid == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_user_and_root_are_trusted() {
        let peer = |uid| PeerCredentials { pid: None, uid, gid: 0 };
        assert!(trusted(peer(7), 7) && trusted(peer(0), 7) && trusted(peer(0), 0));
        assert!(!trusted(peer(8), 7) && !trusted(peer(7), 0));
        // What the kernel shows for a user that is unknown in this namespace.
        assert!(!trusted(peer(65534), 7));
    }
}
