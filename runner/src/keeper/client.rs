//! The manager's end of the keeper.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};

use super::inherit::{Asked, Inherited, Succession};
use super::wire::{Channel, CleanFile, Event, MAX_KEPT, MAX_LABEL, Received, Request, Spawn};
use super::{KeeperError, Key, WireError, system};
use crate::cgroup::Limits;
use crate::layer::Layer;
use crate::outer::{ComponentSpec, ExitStatus};

/// What the keeper reports about the component that was spawned under this `id`.
#[derive(Debug)]
pub enum KeeperEvent {
    /// It runs its binary (and seals itself next).
    Started {
        /// The component.
        id: u64,
        /// Its process id in the keeper's process namespace.
        pid: u32,
        /// Readable when it has ended.
        pidfd: OwnedFd,
        /// The host uid that it has for itself, if it has one.
        host_uid: Option<u32>,
    },
    /// It did not start, and nothing is left of it.
    Failed {
        /// The component.
        id: u64,
        /// The layer that is unavailable, if that is the reason.
        layer: Option<Layer>,
        /// The reason for a person, with the remedy and how to waive.
        message: String,
    },
    /// It has ended; its process and its groups are gone.
    Exited {
        /// The component.
        id: u64,
        /// How.
        status: ExitStatus,
    },
    /// What [`KeeperClient::keep_descriptors`] sent could not be kept.
    NotKept {
        /// Under which id.
        id: u64,
        /// Under which label.
        label: String,
        /// The reason for a person.
        message: String,
    },
    /// Answers [`KeeperClient::set_limits`], each in turn.
    LimitsSet {
        /// The component.
        id: u64,
        /// Why not, or not all of it: for a person, with the remedy.
        error: Option<String>,
    },
    /// The keeper, being of another version, does not know a request; or cannot carry it out.
    Refused {
        /// What it calls the request.
        request: String,
        /// Why.
        reason: String,
    },
}

/// How long it is waited for room at a keeper's socket before it is looked again.
const ROOM_AGAIN: Duration = Duration::from_millis(1);

/// A running keeper. Never blocks, except in [`KeeperClient::succeed`], [`KeeperClient::leave`] and [`KeeperClient::close`].
///
/// Watch the descriptor for input, and for output while [`KeeperClient::has_unsent`]; then call
/// [`KeeperClient::try_recv`] until it returns `None`. Dropping it ends all its components that are not durable.
pub struct KeeperClient {
    channel: Channel,
    pid: u32,
    /// None for one that was inherited: it is somebody else's child.
    process: Option<Child>,
}

impl fmt::Debug for KeeperClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperClient")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Asked {
    /// The keeper, and what it has, by id; none as long as it has not handed over all of it. `Exited` and the answers for components that still start
    /// follow as events.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Refused`], and any failure of the connection; it can be asked again.
    pub fn try_take(&mut self) -> Result<Option<(KeeperClient, Vec<Inherited>)>, KeeperError> {
        let taken = self.take()?.map(|taken| {
            let Succession {
                channel,
                pid,
                inherited,
            } = taken;
            let process = None;
            (KeeperClient { channel, pid, process }, inherited)
        });
        Ok(taken)
    }
}

impl KeeperClient {
    /// Starts a keeper from its binary. For one held open, pass `/proc/self/fd/<number>`.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Binary`], naming the path, if it cannot be executed.
    pub fn start(binary: impl AsRef<Path>) -> Result<Self, KeeperError> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(system("making the connection"))?;
        let binary = binary.as_ref();
        let process = Command::new(binary)
            .stdin(theirs)
            .stdout(Stdio::null())
            .current_dir("/")
            .env_clear()
            .spawn()
            .map_err(|source| KeeperError::Binary {
                path: binary.to_owned(),
                source,
            })?;
        let channel = Channel::new(ours).map_err(system("using the connection"))?;
        Ok(Self {
            channel,
            pid: process.id(),
            process: Some(process),
        })
    }

    /// Takes over from a manager that is gone: as [`KeeperClient::ask`], and waits for the answer for at most `patience`.
    ///
    /// # Errors
    ///
    /// As [`KeeperClient::ask`] and [`Asked::try_take`]; [`KeeperError::Silent`].
    pub fn succeed(path: &Path, key: &Key, patience: Duration) -> Result<(Self, Vec<Inherited>), KeeperError> {
        let deadline = Instant::now() + patience;
        let mut asked = loop {
            match Self::ask(path, key) {
                // Nothing tells when there is room again.
                Err(KeeperError::Crowded { .. }) if Instant::now() < deadline => std::thread::sleep(ROOM_AGAIN),
                asked => break asked?,
            }
        };
        loop {
            if let Some(taken) = asked.try_take()? {
                return Ok(taken);
            }
            asked.wait(deadline.saturating_duration_since(Instant::now()))?;
        }
    }

    /// Connects to the keeper of a manager that is gone, and proves to know the key. Never blocks: what comes of it, [`Asked::try_take`] tells.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Ended`] if nobody listens there (the socket can be removed), [`KeeperError::Foreign`], [`KeeperError::Crowded`], and any failure of
    /// the connection, after which it can be tried again.
    pub fn ask(path: &Path, key: &Key) -> Result<Asked, KeeperError> {
        Asked::new(path, key)
    }

    /// Looks whether a keeper listens at `path`, which notices nothing of that: for who has no key. Never blocks.
    ///
    /// # Errors
    ///
    /// As [`KeeperClient::ask`].
    pub fn look(path: &Path) -> Result<(), KeeperError> {
        Asked::look(path)
    }

    /// Asks for a component; `id` is the caller's to choose, and free again after `Failed` or `Exited`.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`], or [`KeeperError::Protocol`] if the arguments are longer than a message.
    pub fn spawn(&mut self, id: u64, spec: ComponentSpec) -> Result<(), KeeperError> {
        let (handles, handle_fds) = spec.handles.into_parts();
        let (program, label) = spec.program.into_parts();
        let request = Request::Spawn(Spawn {
            id,
            program: label,
            args: spec.args.into_iter().map(std::ffi::CString::into_bytes).collect(),
            handles,
            stderr: spec.stderr.is_some(),
            jail: spec.jail,
        });
        let fds = [program].into_iter().chain(spec.stderr).chain(handle_fds);
        Ok(self.channel.send(&request, fds.map(Arc::new).collect())?)
    }

    /// Kills a component. Its `Exited` follows; nothing happens if there is none under this id.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn kill(&mut self, id: u64) -> Result<(), KeeperError> {
        Ok(self.channel.send(&Request::Kill { id }, Vec::new())?)
    }

    /// Has descriptors held beside a component, or beside none, for this manager's successor. They replace what is held under the
    /// same label, and are held until [`KeeperClient::drop_descriptors`] or [`KeeperClient::release`], until the component of an id
    /// that is not durable ends, or, unless the id is durable or [`super::OWN`], until this manager is gone.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`]; [`KeeperError::Protocol`] for more than [`MAX_KEPT`] descriptors, or a label of more than
    /// [`MAX_LABEL`] bytes.
    pub fn keep_descriptors(&mut self, id: u64, label: &str, fds: Vec<OwnedFd>) -> Result<(), KeeperError> {
        if fds.len() > MAX_KEPT || label.len() > MAX_LABEL {
            let reason = format!(
                "{} descriptors under a label of {} bytes: at most {MAX_KEPT} and {MAX_LABEL} are possible",
                fds.len(),
                label.len()
            );
            return Err(KeeperError::Protocol(reason));
        }
        let request = Request::Keep {
            id,
            label: label.to_owned(),
            count: fds.len(),
        };
        Ok(self.channel.send(&request, fds.into_iter().map(Arc::new).collect())?)
    }

    /// Has what is held under this label closed.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn drop_descriptors(&mut self, id: u64, label: &str) -> Result<(), KeeperError> {
        let label = label.to_owned();
        Ok(self.channel.send(&Request::DropKept { id, label }, Vec::new())?)
    }

    /// Has all that is held under this id closed, and what was remembered of it forgotten. A component that lives goes on, but is not
    /// durable any more.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn release(&mut self, id: u64) -> Result<(), KeeperError> {
        Ok(self.channel.send(&Request::Release { id }, Vec::new())?)
    }

    /// Whether the component under this id, and what is held for it, outlives this manager; may be said before the component is
    /// started. How a durable one ended is remembered, too, until [`KeeperClient::release`] or the next start under the same id.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn set_durable(&mut self, id: u64, durable: bool) -> Result<(), KeeperError> {
        Ok(self.channel.send(&Request::Durable { id, durable }, Vec::new())?)
    }

    /// Says how a successor comes: by `listener`, a socket of type `SOCK_SEQPACKET` that listens, and if it knows `key`. Without that
    /// nothing outlives this manager. When no manager and no component is left, the keeper waits for `linger` (in milliseconds, at most
    /// 49 days) as long as it remembers anything durable, then ends. Replaces what was said before.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn offer_succession(&mut self, listener: OwnedFd, key: &Key, linger: Duration) -> Result<(), KeeperError> {
        let request = Request::Succession {
            key: key.to_vec(),
            linger_ms: u32::try_from(linger.as_millis()).unwrap_or(u32::MAX),
        };
        Ok(self.channel.send(&request, vec![Arc::new(listener)])?)
    }

    /// Changes the limits of a component that runs to these and no others; [`KeeperEvent::LimitsSet`] follows.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn set_limits(&mut self, id: u64, limits: Limits) -> Result<(), KeeperError> {
        Ok(self.channel.send(&Request::Limits { id, limits }, Vec::new())?)
    }

    /// Has a file (a listening socket, say) removed when this manager is gone, if the path names the same file then.
    ///
    /// # Errors
    ///
    /// [`KeeperError::System`] if the file cannot be looked at; [`KeeperError::Gone`].
    pub fn remove_at_end(&mut self, path: &Path) -> Result<(), KeeperError> {
        self.remove(path, None, false)
    }

    /// As [`KeeperClient::remove_at_end`], unless somebody holds the lock (flock(2)) in the file `lock` by then: whoever does has put files of its own in
    /// their place, or taken these over. The file `lock` has the process id of whoever holds it. `path` may be the lock file itself.
    ///
    /// # Errors
    ///
    /// As [`KeeperClient::remove_at_end`].
    pub fn remove_unless_locked(&mut self, path: &Path, lock: &Path) -> Result<(), KeeperError> {
        let lock = std::path::absolute(lock).map_err(system("resolving the path of a lock file"))?;
        self.remove(path, Some(lock), false)
    }

    /// Has a file (the socket at which a successor comes, say) removed when the keeper ends, if the path names the same file then.
    ///
    /// # Errors
    ///
    /// [`KeeperError::System`] if the file cannot be looked at; [`KeeperError::Gone`].
    pub fn remove_with_keeper(&mut self, path: &Path) -> Result<(), KeeperError> {
        self.remove(path, None, true)
    }

    fn remove(&mut self, path: &Path, lock: Option<PathBuf>, with_keeper: bool) -> Result<(), KeeperError> {
        let path = std::path::absolute(path).map_err(system("resolving the path of a file to remove"))?;
        let metadata = path.symlink_metadata().map_err(system("looking at a file to remove"))?;
        let file = CleanFile {
            path,
            device: metadata.dev(),
            inode: metadata.ino(),
            with_keeper,
            lock,
            owner: std::process::id(),
        };
        Ok(self.channel.send(&Request::Remove(file), Vec::new())?)
    }

    /// Takes [`KeeperClient::remove_at_end`] and [`KeeperClient::remove_with_keeper`] back.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn keep(&mut self, path: &Path) -> Result<(), KeeperError> {
        let path = std::path::absolute(path).map_err(system("resolving the path of a file to keep"))?;
        Ok(self.channel.send(&Request::Forget { path }, Vec::new())?)
    }

    /// True while requests wait for room in the connection.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.channel.has_unsent()
    }

    /// Sends what waits and returns the next event, if one has come.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`] when the keeper has died, and all components with it.
    pub fn try_recv(&mut self) -> Result<Option<KeeperEvent>, KeeperError> {
        // Events that came before the end are still to be had, so a failure to send does not matter yet.
        let flushed = self.channel.flush();
        loop {
            let Received { message, fds, .. } = match self.channel.receive::<Event>() {
                Ok(Some(received)) => received,
                Ok(None) => {
                    flushed?;
                    return Ok(None);
                }
                Err(WireError::Closed) => {
                    let status = self
                        .process
                        .as_mut()
                        .and_then(|process| process.try_wait().ok().flatten());
                    let how = status.map_or("its connection is closed".to_owned(), |status| status.to_string());
                    return Err(KeeperError::Gone(how));
                }
                Err(error) => return Err(error.into()),
            };
            // What a keeper of another version says besides is for managers of that version.
            if let Ok(event) = message
                && let Some(event) = told(event, fds)?
            {
                return Ok(Some(event));
            }
        }
    }

    /// The keeper's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the keeper has not yet read all that was said: soon it has, unless it stands still.
    #[must_use]
    pub fn has_unheard(&self) -> bool {
        self.channel.has_unsent() || self.channel.has_unread()
    }

    /// Ends all components, durable or not, and the keeper, and waits until it is done.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`] if the keeper did not end as it should.
    pub fn close(self) -> Result<(), KeeperError> {
        self.close_by(None)
    }

    /// As [`KeeperClient::close`], but waits for `patience` at most. A keeper that stands still ends when it goes on.
    ///
    /// # Errors
    ///
    /// As [`KeeperClient::close`], and [`KeeperError::Unresponsive`].
    pub fn close_within(self, patience: Duration) -> Result<(), KeeperError> {
        self.close_by(Some(Instant::now() + patience))
    }

    fn close_by(mut self, deadline: Option<Instant>) -> Result<(), KeeperError> {
        // One that is gone already has nothing left to end; to one that does not read, the end of the connection says it, too.
        let _ = self.channel.send(&Request::End, Vec::new());
        let _ = self.flush_all(deadline);
        let Some(mut process) = self.process.take() else {
            return self.drain(deadline);
        };
        let pid = self.pid;
        drop(self);
        if let Some(deadline) = deadline {
            // Its number is its own until it is waited for.
            let watched = rustix::process::pidfd_open(Pid::from_child(&process), PidfdFlags::empty())
                .map_err(system("watching the keeper"))?;
            wait_until(&watched, PollFlags::IN, pid, Some(deadline))?;
        }
        match process.wait().map_err(system("waiting for the keeper"))? {
            status if status.success() => Ok(()),
            status => Err(KeeperError::Gone(status.to_string())),
        }
    }

    /// Ends this connection, having sent all that waits: what is durable goes on, for a successor to take over; the rest ends. What cannot be sent within
    /// `patience`, because the keeper stands still, is lost.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`]; [`KeeperError::Unresponsive`] if something is lost.
    pub fn leave(mut self, patience: Duration) -> Result<(), KeeperError> {
        self.flush_all(Some(Instant::now() + patience))
    }

    /// Waits until all is sent that waits.
    fn flush_all(&mut self, deadline: Option<Instant>) -> Result<(), KeeperError> {
        self.channel.flush()?;
        while self.channel.has_unsent() {
            self.wait(PollFlags::OUT, deadline)?;
            self.channel.flush()?;
        }
        Ok(())
    }

    /// Waits until the keeper has closed the connection, which it does when all is done.
    fn drain(&mut self, deadline: Option<Instant>) -> Result<(), KeeperError> {
        loop {
            match self.channel.receive::<Event>() {
                Ok(Some(_)) => {}
                Ok(None) => self.wait(PollFlags::IN, deadline)?,
                Err(WireError::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait(&self, wanted: PollFlags, deadline: Option<Instant>) -> Result<(), KeeperError> {
        wait_until(&self.channel, wanted, self.pid, deadline)
    }
}

/// Waits until a descriptor of the keeper `pid` is ready, or may be.
fn wait_until(fd: impl AsFd, wanted: PollFlags, pid: u32, deadline: Option<Instant>) -> Result<(), KeeperError> {
    let mut poll = [PollFd::new(&fd, wanted)];
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut poll, timeout.as_ref()) {
            Ok(0) => return Err(KeeperError::Unresponsive { pid }),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(system("waiting for the keeper")(errno)),
        }
    }
}

/// What an event says to the manager; none if it is said elsewhere.
fn told(event: Event, mut fds: Vec<OwnedFd>) -> Result<Option<KeeperEvent>, KeeperError> {
    Ok(Some(match event {
        Event::Started { id, pid, host_uid } => {
            let pidfd = fds
                .pop()
                .ok_or_else(|| KeeperError::Protocol("no pidfd with a start".to_owned()))?;
            KeeperEvent::Started {
                id,
                pid,
                pidfd,
                host_uid,
            }
        }
        Event::Failed { id, layer, message } => KeeperEvent::Failed { id, layer, message },
        Event::Exited { id, status } => KeeperEvent::Exited { id, status },
        Event::NotKept { id, label, message } => KeeperEvent::NotKept { id, label, message },
        Event::LimitsSet { id, error } => KeeperEvent::LimitsSet { id, error },
        Event::Refused { request, reason } => KeeperEvent::Refused { request, reason },
        // A succession is over before events are asked for.
        Event::Hello { .. } | Event::Inherited { .. } | Event::InheritedFds { .. } | Event::InheritedAll => {
            return Ok(None);
        }
    }))
}

impl AsFd for KeeperClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
