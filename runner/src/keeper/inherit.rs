//! The successor's side of a succession: proves itself to a keeper and takes over what that has.
//!
//! ```text
//!   ask ──> asked: the key is in the keeper's socket ── it looks, now or when it runs again ──> all that it has, and the connection
//!               └── it has ended, or hangs up: to be asked again
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::wire::{Channel, Event, Received, State, WireError};
use super::{KeeperError, Key, door, system};
use crate::outer::ExitStatus;

/// What a keeper had under one id.
#[derive(Debug)]
pub struct Inherited {
    /// Which; [`super::OWN`] is what the manager kept for itself.
    pub id: u64,
    /// It stays if this manager goes, too.
    pub durable: bool,
    /// What has become of the component.
    pub state: InheritedState,
    /// The descriptors, by their labels, in the order in which they were given.
    pub kept: BTreeMap<String, Vec<OwnedFd>>,
}

/// What has become of an inherited component.
#[derive(Debug)]
pub enum InheritedState {
    /// There was none, or it was forgotten.
    None,
    /// It starts: `Started` or `Failed` follows.
    Starting,
    /// It lives; `Exited` follows when it has ended.
    Running {
        /// Its process id in the keeper's process namespace.
        pid: u32,
        /// Readable when it has ended.
        pidfd: OwnedFd,
        /// The host uid that it has for itself, if it has one.
        host_uid: Option<u32>,
    },
    /// It has ended.
    Exited(ExitStatus),
    /// It did not start, for this reason.
    Failed(String),
}

/// A keeper that has been asked to hand over: it does so as soon as it runs and has no manager any more, however long that takes.
///
/// Watch the descriptor for input, then call [`Asked::try_take`]. Dropped, it is asked no more.
#[derive(Debug)]
pub struct Asked {
    path: PathBuf,
    /// None when all has been taken.
    channel: Option<Channel>,
    taken: BTreeMap<u64, Inherited>,
    pid: Option<u32>,
}

/// Whoever has proved itself.
pub(super) struct Succession {
    pub(super) channel: Channel,
    pub(super) pid: u32,
    pub(super) inherited: Vec<Inherited>,
}

/// Connects to what listens at `path`, if anything does; inside, what else is in the way. Never blocks.
fn reach(path: &Path, kind: SocketType) -> Result<rustix::io::Result<OwnedFd>, KeeperError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).map_err(system("making a socket"))?;
    let address = SocketAddrUnix::new(path).map_err(system("the path of a keeper's socket"))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => Ok(Ok(socket)),
        Err(Errno::AGAIN) => Err(KeeperError::Crowded { path: path.to_owned() }),
        Err(errno @ (Errno::CONNREFUSED | Errno::NOENT)) => Err(KeeperError::Ended {
            path: path.to_owned(),
            source: errno.into(),
        }),
        // Whatever it is, the keeper may be there.
        Err(errno) => Ok(Err(errno)),
    }
}

impl Asked {
    /// Connects to the keeper that listens at `path`, and says the key. Never blocks.
    pub(super) fn new(path: &Path, key: &Key) -> Result<Self, KeeperError> {
        let socket = Self::connect(path)?;
        rustix::net::send(&socket, &door::proof(key), SendFlags::NOSIGNAL).map_err(system("proving who this is"))?;
        Ok(Self {
            path: path.to_owned(),
            channel: Some(Channel::new(socket).map_err(system("using the connection"))?),
            taken: BTreeMap::new(),
            pid: None,
        })
    }

    /// A connection to the keeper that listens at `path`, which is somebody who may know the key. Never blocks.
    fn connect(path: &Path) -> Result<OwnedFd, KeeperError> {
        let socket = reach(path, SocketType::SEQPACKET)?.map_err(system("connecting to a keeper"))?;
        // Of whoever made the socket listen.
        let maker = sockopt::socket_peercred(&socket).map_err(system("asking who made the socket"))?;
        if !door::is_trusted(maker.uid) {
            return Err(KeeperError::Foreign {
                path: path.to_owned(),
                uid: maker.uid.as_raw(),
            });
        }
        Ok(socket)
    }

    /// Whether a keeper listens at `path`. It takes packets, so that a stream is refused, and takes no place among those who wait for it.
    pub(super) fn look(path: &Path) -> Result<(), KeeperError> {
        match reach(path, SocketType::STREAM)? {
            Ok(_) | Err(Errno::PROTOTYPE) => Ok(()),
            Err(errno) => Err(system("looking for a keeper")(errno)),
        }
    }

    /// Takes what has come; none as long as that is not all.
    pub(super) fn take(&mut self) -> Result<Option<Succession>, KeeperError> {
        while let Some(channel) = &mut self.channel {
            let Received { message, fds, .. } = match channel.receive::<Event>() {
                Ok(Some(received)) => received,
                Ok(None) => return Ok(None),
                Err(WireError::Closed) if self.pid.is_none() => {
                    return Err(KeeperError::Refused {
                        path: self.path.clone(),
                    });
                }
                Err(error) => return Err(error.into()),
            };
            match message {
                Ok(Event::Hello { pid, .. }) => self.pid = Some(pid),
                Ok(Event::Inherited { id, durable, state }) => {
                    let inherited = Inherited {
                        id,
                        durable,
                        state: inherited_state(state, fds)?,
                        kept: BTreeMap::new(),
                    };
                    self.taken.insert(id, inherited);
                }
                Ok(Event::InheritedFds { id, label, count }) => {
                    if fds.len() != count {
                        return Err(lacking(&label));
                    }
                    if let Some(inherited) = self.taken.get_mut(&id) {
                        inherited.kept.insert(label, fds);
                    }
                }
                Ok(Event::InheritedAll) => {
                    let (Some(pid), Some(channel)) = (self.pid, self.channel.take()) else {
                        return Err(KeeperError::Protocol("no greeting".to_owned()));
                    };
                    return Ok(Some(Succession {
                        channel,
                        pid,
                        inherited: std::mem::take(&mut self.taken).into_values().collect(),
                    }));
                }
                // Whatever else a keeper of another version says.
                _ => {}
            }
        }
        Err(KeeperError::Gone("all that it had has been taken".to_owned()))
    }

    /// Waits until something has come, for `patience` at most.
    pub(super) fn wait(&self, patience: Duration) -> Result<(), KeeperError> {
        let Some(connection) = self.channel.as_ref().filter(|_| !patience.is_zero()) else {
            return Err(KeeperError::Silent {
                path: self.path.clone(),
            });
        };
        let timeout = Timespec::try_from(patience).ok();
        let mut poll = [PollFd::new(connection, PollFlags::IN)];
        match rustix::event::poll(&mut poll, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(system("waiting for the keeper")(errno)),
        }
    }

    /// Another descriptor of the connection, to be watched.
    ///
    /// # Errors
    ///
    /// There are no descriptors left.
    pub fn watched(&self) -> io::Result<OwnedFd> {
        let channel = self.channel.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        channel.as_fd().try_clone_to_owned()
    }
}

fn lacking(label: &str) -> KeeperError {
    KeeperError::Protocol(format!(
        "not all descriptors of {label:?} arrived; the limit of open files may be too low"
    ))
}

fn inherited_state(state: State, mut fds: Vec<OwnedFd>) -> Result<InheritedState, KeeperError> {
    Ok(match state {
        State::None => InheritedState::None,
        State::Starting => InheritedState::Starting,
        State::Running { pid, host_uid } => InheritedState::Running {
            pid,
            pidfd: fds.pop().ok_or_else(|| lacking("pidfd"))?,
            host_uid,
        },
        State::Exited { status } => InheritedState::Exited(status),
        State::Failed { message } => InheritedState::Failed(message),
    })
}
