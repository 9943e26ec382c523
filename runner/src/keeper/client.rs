//! The manager's end of the keeper.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::wire::{Channel, CleanFile, Event, Request, Spawn};
use super::{KeeperError, system};
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
}

/// A running keeper. Never blocks, except in [`KeeperClient::close`].
///
/// Watch the descriptor for input, and for output while [`KeeperClient::has_unsent`]; then call
/// [`KeeperClient::try_recv`] until it returns `None`. Dropping it ends all its components.
pub struct KeeperClient {
    channel: Channel,
    process: Child,
}

impl fmt::Debug for KeeperClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperClient")
            .field("pid", &self.process.id())
            .finish_non_exhaustive()
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
        Ok(Self { channel, process })
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
        let fds = [program].into_iter().chain(spec.stderr).chain(handle_fds).collect();
        Ok(self.channel.send(&request, fds)?)
    }

    /// Kills a component. Its `Exited` follows; nothing happens if there is none under this id.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`].
    pub fn kill(&mut self, id: u64) -> Result<(), KeeperError> {
        Ok(self.channel.send(&Request::Kill { id }, Vec::new())?)
    }

    /// Has a file (a listening socket, say) removed when this process ends, if the path names the same file then.
    ///
    /// # Errors
    ///
    /// [`KeeperError::System`] if the file cannot be looked at; [`KeeperError::Gone`].
    pub fn remove_at_end(&mut self, path: &Path) -> Result<(), KeeperError> {
        let path = std::path::absolute(path).map_err(system("resolving the path of a file to remove"))?;
        let metadata = path.symlink_metadata().map_err(system("looking at a file to remove"))?;
        let file = CleanFile {
            path,
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        Ok(self.channel.send(&Request::Remove(file), Vec::new())?)
    }

    /// Takes [`KeeperClient::remove_at_end`] back.
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
        let received = match self.channel.receive::<Event>() {
            Ok(Some(received)) => received,
            Ok(None) => {
                flushed?;
                return Ok(None);
            }
            Err(super::WireError::Closed) => {
                let status = self.process.try_wait();
                let how = status
                    .ok()
                    .flatten()
                    .map_or("its connection is closed".to_owned(), |status| status.to_string());
                return Err(KeeperError::Gone(how));
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Some(match received {
            (Event::Started { id, pid, host_uid }, mut fds) => {
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
            (Event::Failed { id, layer, message }, _) => KeeperEvent::Failed { id, layer, message },
            (Event::Exited { id, status }, _) => KeeperEvent::Exited { id, status },
        }))
    }

    /// The keeper's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends all components and the keeper, and waits until it is done.
    ///
    /// # Errors
    ///
    /// [`KeeperError::Gone`] if the keeper did not end as it should.
    pub fn close(self) -> Result<(), KeeperError> {
        let Self { channel, mut process } = self;
        drop(channel);
        match process.wait().map_err(system("waiting for the keeper"))? {
            status if status.success() => Ok(()),
            status => Err(KeeperError::Gone(status.to_string())),
        }
    }
}

impl AsFd for KeeperClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
