//! The successor's side of a succession: proves itself to a keeper and takes over what that has.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::wire::{Channel, Event, Received, State, WireError};
use super::{KeeperError, Key, door, system};
use crate::outer::ExitStatus;

/// How long a keeper may take to hand over: twice as long as it lets another candidate think.
const PATIENCE: Duration = Duration::from_secs(10);

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

/// Whoever has proved itself.
pub(super) struct Succession {
    pub(super) channel: Channel,
    pub(super) pid: u32,
    pub(super) inherited: Vec<Inherited>,
}

/// Takes over from the keeper that listens at `path`.
pub(super) fn take_over(path: &Path, key: &Key) -> Result<Succession, KeeperError> {
    let deadline = Instant::now() + PATIENCE;
    let mut channel = connect(path, key)?;
    let mut taken: BTreeMap<u64, Inherited> = BTreeMap::new();
    let mut pid = None;
    loop {
        let Received { message, fds, .. } = match channel.receive::<Event>() {
            Ok(Some(received)) => received,
            Ok(None) => {
                wait(&channel, deadline, path)?;
                continue;
            }
            Err(WireError::Closed) if pid.is_none() => return Err(KeeperError::Refused { path: path.to_owned() }),
            Err(error) => return Err(error.into()),
        };
        match message {
            Ok(Event::Hello { pid: keeper, .. }) => pid = Some(keeper),
            Ok(Event::Inherited { id, durable, state }) => {
                let inherited = Inherited {
                    id,
                    durable,
                    state: inherited_state(state, fds)?,
                    kept: BTreeMap::new(),
                };
                taken.insert(id, inherited);
            }
            Ok(Event::InheritedFds { id, label, count }) => {
                if fds.len() != count {
                    return Err(lacking(&label));
                }
                if let Some(inherited) = taken.get_mut(&id) {
                    inherited.kept.insert(label, fds);
                }
            }
            Ok(Event::InheritedAll) => {
                let Some(pid) = pid else {
                    return Err(KeeperError::Protocol("no greeting".to_owned()));
                };
                return Ok(Succession {
                    channel,
                    pid,
                    inherited: taken.into_values().collect(),
                });
            }
            // Whatever else a keeper of another version says.
            _ => {}
        }
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

/// Connects, sees to it that it is to somebody who may know the key, and says it.
fn connect(path: &Path, key: &Key) -> Result<Channel, KeeperError> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(system("making a socket"))?;
    // Where others wait already, connecting waits for them.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))
        .map_err(system("setting a timeout"))?;
    let address = SocketAddrUnix::new(path).map_err(system("the path of a keeper's socket"))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(silent(path)),
        Err(errno) => {
            return Err(KeeperError::Ended {
                path: path.to_owned(),
                source: errno.into(),
            });
        }
    }
    // Of whoever made the socket listen.
    let maker = sockopt::socket_peercred(&socket).map_err(system("asking who made the socket"))?;
    if !door::is_trusted(maker.uid) {
        return Err(KeeperError::Foreign {
            path: path.to_owned(),
            uid: maker.uid.as_raw(),
        });
    }
    rustix::net::send(&socket, &door::proof(key), SendFlags::NOSIGNAL).map_err(system("proving who this is"))?;
    Channel::new(socket).map_err(system("using the connection"))
}

fn silent(path: &Path) -> KeeperError {
    KeeperError::Silent {
        path: path.to_owned(),
        seconds: PATIENCE.as_secs(),
    }
}

fn wait(channel: &Channel, deadline: Instant, path: &Path) -> Result<(), KeeperError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(silent(path));
    }
    let timeout = Timespec::try_from(left).ok();
    let connection = channel.as_fd();
    let mut poll = [PollFd::new(&connection, PollFlags::IN)];
    match rustix::event::poll(&mut poll, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(system("waiting for the keeper")(errno)),
    }
}
