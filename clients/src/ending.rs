//! The end of a guest manager: its connection ends a moment before it has let go of its socket and of its state folder, and the process a moment after.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, pidfd_open},
};
use sepal_schema::transport::{Handle, reactor::Direction};

use crate::{manager::Manager, place::Place};

/// How long its process may take to end once its connection has. That takes a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the process is called (`/proc/PID/comm`).
const NAME: &str = "guest-manager";

/// Whether a process is called as guest managers are.
pub(crate) fn is_manager(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    name.is_ok_and(|name| name.trim_end() == NAME)
}

/// The process of a guest manager on this machine.
pub(crate) struct Process {
    pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// The one behind this connection, which is to be open still when this returns; none if it is on another machine, or cannot be seen from here.
    pub(crate) async fn of(place: &Place, manager: &Manager) -> Result<Option<Self>> {
        if !place.is_here() {
            return Ok(None);
        }
        let answer = manager.client.version_request().send().promise.await?;
        // Where a service manager made the socket, that is the peer; where the guest manager is in a container, it says the number that it has there.
        let peer = manager.connection.peer().and_then(|peer| peer.pid);
        let candidates = [peer, Some(answer.get()?.get_pid())];
        Ok(candidates.into_iter().flatten().find_map(Self::named))
    }

    /// A process, if it is called as guest managers are.
    fn named(pid: u32) -> Option<Self> {
        let fd = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        is_manager(pid).then_some(Self { pid, fd })
    }

    /// Waits for its end, which has begun.
    pub(crate) async fn ended(self, handle: &Handle) -> Result<()> {
        let fd = handle.register(self.fd).context("waiting for the guest manager")?;
        // A process's descriptor is readable when it has ended (pidfd_open(2)).
        let ended = |fd: &OwnedFd| {
            let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&Timespec::default()))? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        };
        match handle.timeout(PATIENCE, fd.io(Direction::Read, ended)).await {
            Ok(ended) => ended.context("waiting for the guest manager"),
            Err(_) => bail!(
                "the guest manager has ended its connections, but its process {} is still there after {} s",
                self.pid,
                PATIENCE.as_secs()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use sepal_schema::transport::Reactor;

    use super::*;

    #[test]
    fn only_guest_managers_are_waited_for() {
        assert!(Process::named(std::process::id()).is_none());
        assert!(Process::named(0).is_none() && Process::named(u32::MAX).is_none());
    }

    #[test]
    fn the_end_of_a_process_is_noticed() {
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let process = Process { pid: child.id(), fd };
        drop(child.stdin.take());
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        reactor.run_until(process.ended(&handle)).unwrap().unwrap();
        assert!(child.wait().unwrap().success());
    }
}
