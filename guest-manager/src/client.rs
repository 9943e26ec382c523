//! Who is at the other end of a client's connection, and what it may do.

use std::{cell::Cell, fmt, rc::Rc};

use sepal_schema::{config::GuestConfig, error::Error, transport::FdTable};

use crate::{
    authority::{self, Needed},
    roles::Role,
};

/// Who does something, as the audit names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Who {
    /// Effective user id of the process that connected.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
    /// Its process id; none where it has none that the manager can see.
    pub pid: Option<u32>,
    /// The share by which it came to what it uses; none if it did not come to it by one.
    pub share: Option<u64>,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}, gid {}", self.uid, self.gid)
    }
}

/// A client's connection, as the capabilities that it holds know it.
#[derive(Debug, Clone)]
pub struct Client {
    /// The descriptors that travel with its messages.
    pub fds: FdTable,
    /// Who it is.
    pub who: Who,
    /// What it may do.
    pub role: Role,
    /// It came by the read-only socket: whatever it comes by, it can only look.
    pub read_only: bool,
    /// Whether it may do what needs the manager's own authority: name paths, use networks, end the manager. Only the role admin may.
    pub trusted: bool,
    /// How many uploads it has.
    pub uploads: Rc<Cell<usize>>,
    /// How many listings it reads.
    pub listings: Rc<Cell<usize>>,
}

impl Client {
    /// The client at the other end of a connection.
    pub fn new(fds: FdTable, who: Who, role: Role) -> Self {
        Self {
            fds,
            who,
            role,
            read_only: false,
            trusted: role == Role::Admin,
            uploads: Rc::default(),
            listings: Rc::default(),
        }
    }

    /// The manager itself, which does some things that nobody asks for at the moment.
    pub fn of_the_manager() -> Self {
        let who = Who {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            pid: Some(std::process::id()),
            share: None,
        };
        Self::new(FdTable::none(), who, Role::Admin)
    }

    /// A client that came by the read-only socket.
    pub fn read_only(fds: FdTable, who: Who) -> Self {
        Self {
            read_only: true,
            ..Self::new(fds, who, Role::Observe)
        }
    }

    /// Whether its role is enough for `what`, which needs `needed`.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, naming both roles and who the client is seen as.
    pub fn check(&self, needed: Role, what: &str) -> Result<(), Error> {
        self.role.check(needed, what).map_err(|mut error| {
            let by = if self.read_only {
                ", by the read-only socket"
            } else {
                ""
            };
            error.message = format!("{} ({}{by})", error.message, self.who);
            error
        })
    }

    /// Whether it may have what a configuration asks the manager for.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` about the first field that it may not set.
    pub fn check_config(&self, config: &GuestConfig) -> Result<(), Error> {
        let Some(Needed { field, what }) = authority::needed(config) else {
            return Ok(());
        };
        self.check(Role::Admin, &what).map_err(|error| error.about(field))
    }
}
