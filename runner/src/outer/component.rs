//! A started component: the rest of its start, its end, and what its starter holds for it meanwhile.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};

use super::uid::HostUid;
use super::{Runner, SpawnError, UidRange, child, host_uid, limit, system};
use crate::cgroup::Group;
use crate::layer::Layer;

/// How a component ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// It exited with this status.
    Code(i32),
    /// This signal killed it; 31 (SIGSYS) is a forbidden system call.
    Signal(i32),
}

impl ExitStatus {
    /// True for status 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

/// A component whose child process exists; it may not run its binary yet.
#[derive(Debug)]
pub struct Component {
    pub(super) pid: Pid,
    pub(super) pidfd: OwnedFd,
    pub(super) label: PathBuf,
    pub(super) uid: Option<HostUid>,
    pub(super) group: Option<Group>,
    pub(super) channel: Option<OwnedFd>,
    pub(super) exit: Option<ExitStatus>,
}

impl Component {
    /// The rest of the starter's part: id maps, v1 groups, and the byte that lets the child go on.
    pub(super) fn admit(
        &mut self,
        runner: &Runner,
        own_uid: Option<UidRange>,
        user_namespace: bool,
    ) -> Result<(), SpawnError> {
        let pid = self.pid();
        if let Some(uids) = own_uid {
            self.uid = Some(uids.take(pid).map_err(|error| host_uid(&error))?);
        }
        if user_namespace {
            let layer = if own_uid.is_some() {
                Layer::HostUid
            } else {
                Layer::UserNamespace
            };
            let map = |file: &str, content: String| {
                fs::write(format!("/proc/{pid}/{file}"), &content).map_err(|error| SpawnError::Layer {
                    layer,
                    cause: format!("writing {content:?} to the {file} of its user namespace: {error}"),
                })
            };
            let (uid, gid) = match &self.uid {
                Some(host) => (host.uid, host.uid),
                None => {
                    // Without privileges a gid map is only to be had for giving up setgroups.
                    map("setgroups", "deny".to_owned())?;
                    (runner.uid, runner.gid)
                }
            };
            map("gid_map", format!("0 {gid} 1"))?;
            map("uid_map", format!("0 {uid} 1"))?;
        }
        if let Some(group) = &self.group {
            group.admit(pid).map_err(limit)?;
        }
        if let Some(channel) = &self.channel {
            rustix::net::send(channel, &[1], rustix::net::SendFlags::NOSIGNAL)
                .map_err(system("letting the child go on"))?;
        }
        Ok(())
    }

    /// Readable once `exec` has succeeded or failed; `None` after [`Component::finish_start`].
    #[must_use]
    pub fn starting(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(AsFd::as_fd)
    }

    /// Waits until the binary runs.
    ///
    /// # Errors
    ///
    /// [`SpawnError`]: what kept the child from it. The child is gone then.
    pub fn finish_start(&mut self) -> Result<(), SpawnError> {
        let Some(channel) = self.channel.take() else {
            return Ok(());
        };
        let mut message = [0_u8; child::FAILURE_LEN];
        let read = loop {
            match rustix::net::recv(&channel, &mut message, rustix::net::RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                other => break other.map_err(system("waiting for exec"))?.0,
            }
        };
        let Some((step, errno)) = child::parse_failure(message.get(..read).unwrap_or_default()) else {
            return Ok(());
        };
        let source = io::Error::from_raw_os_error(errno);
        Err(match step {
            child::Step::Descriptors => SpawnError::System {
                action: "laying out the handles",
                source,
            },
            child::Step::Session => SpawnError::System {
                action: "setsid",
                source,
            },
            child::Step::Signals => SpawnError::System {
                action: "unblocking signals",
                source,
            },
            child::Step::Personality => SpawnError::System {
                action: "resetting the personality",
                source,
            },
            child::Step::Uid => SpawnError::Layer {
                layer: Layer::HostUid,
                cause: format!("changing to the uid: {source}"),
            },
            child::Step::Exec => SpawnError::Program {
                path: self.label.clone(),
                reason: exec_failure(&source),
            },
        })
    }

    /// Its process id, as the starter sees it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// The handle on its process: readable when it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The host uid that it has for itself, if it has one.
    #[must_use]
    pub fn host_uid(&self) -> Option<u32> {
        self.uid.as_ref().map(|host| host.uid)
    }

    /// Its cgroup directories, if it has limits.
    #[must_use]
    pub fn cgroup_directories(&self) -> &[PathBuf] {
        self.group.as_ref().map_or(&[], Group::directories)
    }

    /// Kills it. Succeeds if it is dead already.
    ///
    /// # Errors
    ///
    /// If the system refuses the signal.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Err(errno) if errno != Errno::SRCH => Err(errno.into()),
            _ => Ok(()),
        }
    }

    /// Waits for its end, reaps it and removes its groups.
    ///
    /// # Errors
    ///
    /// If the process was reaped by someone else.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut poll, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Like [`Component::wait`], but returns `None` at once while it lives.
    ///
    /// # Errors
    ///
    /// If the process was reaped by someone else.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.exit.is_none() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let Some(status) = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options)? else {
                return Ok(None);
            };
            self.ended(status.exit_status(), status.terminating_signal());
        }
        Ok(self.exit)
    }
}

impl Component {
    /// Takes note that the process was reaped with this status; its groups are empty then, and go.
    pub(crate) fn ended(&mut self, code: Option<i32>, signal: Option<i32>) {
        self.exit = code.map(ExitStatus::Code).or(signal.map(ExitStatus::Signal));
        if let Some(group) = &mut self.group {
            group.remove();
        }
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        if self.exit.is_none() && self.kill().is_ok() {
            let _ = self.wait();
        }
    }
}

/// What an exec error means for someone who installed the program.
fn exec_failure(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EACCES) => " (the component's own uid has to be able to execute it: chmod o+rx)",
        Some(libc::ENOENT) => " (its dynamic linker is missing)",
        Some(libc::ENOEXEC) => " (it is no program for this machine)",
        _ => "",
    };
    format!("cannot be executed: {error}{hint}")
}
