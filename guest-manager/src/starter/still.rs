//! A keeper that stands still, because it is stopped (SIGSTOP, a debugger) or has to be fetched from slow storage: what is said of it, and how its components
//! end without it.
//!
//! ```text
//!   a component that is to end:  the keeper is asked to kill it --> Exited
//!                                   '-- nothing within [`PATIENCE`] --> killed here, by its pidfd --> its threads are gone
//! ```
//!
//! A pidfd stands for one process, whatever becomes of its number. The component is the first process of its process namespace: what is in there goes with it.

use std::{fs, io, os::fd::AsFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::Signal,
};
use sepal_schema::transport::{Handle, reactor::Direction};

use crate::component::Exit;

/// How long a keeper may take to kill a component and say so; that takes milliseconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// What there is to say of a keeper that does not answer, and how that is mended, as far as it can be told.
pub(super) fn words(pid: u32) -> String {
    let silent = format!("the keeper (process {pid}) does not answer");
    match state(pid) {
        Some('T') => format!("{silent}: it is stopped, and goes on with `kill -CONT {pid}`"),
        Some('t') => format!("{silent}: a debugger holds it"),
        _ => silent,
    }
}

/// Whether somebody has stopped it.
pub(super) fn is_stopped(pid: u32) -> bool {
    matches!(state(pid), Some('T' | 't'))
}

/// The state of a process, as proc_pid_stat(5) has it.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name stands in parentheses before that, and may hold any character.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Kills a process.
///
/// # Errors
/// It is another user's, or not to be seen from here.
pub(super) fn kill(process: impl AsFd) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Kills a component, and waits until it has ended: until all of its threads have, reaped or not.
///
/// # Errors
/// As [`kill`], or there is no room on the event loop.
pub(super) async fn end(handle: &Handle, process: impl AsFd, keeper: u32) -> io::Result<Exit> {
    if has_ended(&process) {
        return Ok(Exit::Unknown(format!("it ended, and {}", words(keeper))));
    }
    kill(&process)?;
    let watched = handle.register(&process)?;
    loop {
        watched.exhausted(Direction::Read);
        if has_ended(&process) {
            return Ok(Exit::Signal(libc::SIGKILL));
        }
        watched.readable().await;
    }
}

/// Whether it is not there any more, or only waits to be reaped.
fn has_ended(process: impl AsFd) -> bool {
    let mut poll = [PollFd::new(&process, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid};
    use sepal_schema::transport::Reactor;

    use super::*;

    /// A keeper that is stopped, and what it says of it; killed in the end.
    #[test]
    fn what_is_stopped_is_told_with_the_remedy() {
        let mut still = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_child(&still);
        assert!(!is_stopped(still.id()));
        kill_process(pid, Signal::STOP).unwrap();
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT).unwrap();
        assert!(is_stopped(still.id()));
        let words = words(still.id());
        assert!(words.contains(&format!("`kill -CONT {}`", still.id())), "{words}");
        still.kill().unwrap();
        still.wait().unwrap();
    }

    #[test]
    fn a_process_ends_without_whoever_reaps_it() {
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()).unwrap();
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        let exit = reactor.run_until(end(&handle, &pidfd, 1)).unwrap().unwrap();
        assert_eq!(exit, Exit::Signal(libc::SIGKILL));
        // It waits to be reaped: how it ended only its parent can tell.
        let exit = reactor.run_until(end(&handle, &pidfd, 1)).unwrap().unwrap();
        assert!(
            matches!(&exit, Exit::Unknown(why) if why.contains("(process 1) does not answer")),
            "{exit}"
        );
        process.wait().unwrap();
        reactor.run_until(end(&handle, &pidfd, 1)).unwrap().unwrap();
    }
}
