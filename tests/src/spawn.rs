//! Programs with captured output, and their ends.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, Signal},
};

use crate::{capture::Capture, patience::PATIENCE, process::Process};

/// The children of this process that are not reaped yet, each with the world that it belongs to. Locked while one is started or reaped, so that
/// whoever looks at processes meanwhile can tell children from orphans that came to this process.
static CHILDREN: Mutex<BTreeMap<u32, u64>> = Mutex::new(BTreeMap::new());

/// The children and their worlds, none starting or being reaped as long as the guard lives.
pub(crate) fn children() -> MutexGuard<'static, BTreeMap<u32, u64>> {
    // A test that failed meanwhile has not left it half changed.
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What ends a program that does nothing about it. A shell without job control ignores some of them for what it starts in the background, `nohup` others; programs
/// inherit that, and keep it.
const ENDINGS: [libc::c_int; 5] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE];

/// Starts a program that belongs to the world `owner`. Everything that tests start comes by here, and begins with no signal ignored, however the tests
/// were started.
pub(crate) fn spawn(command: &mut Command, owner: u64) -> Child {
    let restore = || match ENDINGS.iter().all(|&signal| reset(signal)) {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    };
    // SAFETY: between fork and exec it makes system calls only, which are async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(restore) };
    let mut children = children();
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    children.insert(child.id(), owner);
    child
}

/// Gives a signal its default meaning, in this process.
fn reset(signal: libc::c_int) -> bool {
    // SAFETY: no handler is installed, so no code of ours runs on the signal.
    unsafe { libc::signal(signal, libc::SIG_DFL) != libc::SIG_ERR }
}

/// Reaps a child if it has ended.
pub(crate) fn reap(child: &mut Child) -> Option<ExitStatus> {
    let mut children = children();
    let status = child.try_wait().unwrap()?;
    children.remove(&child.id());
    Some(status)
}

/// Kills a child unless it has ended, and reaps it.
pub(crate) fn end(child: &mut Child) {
    if reap(child).is_none() {
        let _ = child.kill();
        wait(child);
    }
}

/// How a program ended, and what it printed.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Its exit status; 128 and the number for a signal, as a shell tells it.
    pub fn code(&self) -> i32 {
        let signal = self.status.signal().map(|signal| 128 + signal);
        self.status.code().or(signal).unwrap()
    }

    /// Its standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Checks the exit status.
    ///
    /// # Panics
    /// If it is another, with what the program printed.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code(),
            code,
            "exit status of {}\n-- stdout\n{}\n-- stderr\n{}",
            self.command,
            self.out(),
            self.stderr
        );
        self
    }
}

/// A program that runs. Dropping it kills it.
pub struct Running {
    command: String,
    child: Child,
    /// What it prints on standard output, unless that goes elsewhere.
    pub stdout: Capture,
    /// What it prints on standard error.
    pub stderr: Capture,
}

impl Running {
    /// Starts a program; standard output that was not sent elsewhere is captured, and standard error as well.
    ///
    /// # Panics
    /// If it cannot be started.
    pub(crate) fn start(mut command: Command, stdout: Option<Stdio>, owner: u64) -> Self {
        let captured = stdout.is_none();
        command
            .stdin(Stdio::piped())
            .stdout(stdout.unwrap_or_else(Stdio::piped))
            .stderr(Stdio::piped());
        let mut child = spawn(&mut command, owner);
        let stdout = match child.stdout.take() {
            Some(pipe) if captured => Capture::of(pipe),
            _ => Capture::of(std::io::empty()),
        };
        let stderr = Capture::of(child.stderr.take().unwrap());
        Self {
            command: describe(&command),
            child,
            stdout,
            stderr,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process.
    ///
    /// # Panics
    /// If it was reaped already.
    pub fn process(&self) -> Process {
        Process::of(self.pid()).expect("not reaped yet")
    }

    /// Types on its standard input.
    ///
    /// # Panics
    /// If it takes no more input.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("its input is open");
        stdin.write_all(text.as_bytes()).unwrap();
    }

    /// Ends its standard input.
    pub fn close_input(&mut self) {
        self.child.stdin = None;
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process().signal(signal);
    }

    /// True if it has not ended yet.
    pub fn runs(&mut self) -> bool {
        reap(&mut self.child).is_none()
    }

    /// Waits until it has ended and everything that it printed is here.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    #[track_caller]
    pub fn wait(mut self) -> Finished {
        let status = wait(&mut self.child).unwrap_or_else(|| {
            let (stdout, stderr) = (self.stdout.text(), self.stderr.text());
            panic!(
                "{} does not end\n-- stdout\n{stdout}\n-- stderr\n{stderr}",
                self.command
            )
        });
        for (what, capture) in [("output", &self.stdout), ("error", &self.stderr)] {
            assert!(
                capture.ended(),
                "{}: somebody keeps its standard {what} open",
                self.command
            );
        }
        Finished {
            command: self.command.clone(),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.text(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Waits for a child's end; none after [`PATIENCE`].
pub(crate) fn wait(child: &mut Child) -> Option<ExitStatus> {
    wait_for(child, PATIENCE)
}

/// Waits for a child's end; none after `patience`.
pub(crate) fn wait_for(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    if let Some(status) = reap(child) {
        return Some(status);
    }
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut poll = [PollFd::new(&pidfd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: patience.as_secs().cast_signed(),
        tv_nsec: patience.subsec_nanos().into(),
    };
    rustix::event::poll(&mut poll, Some(&timeout)).unwrap();
    reap(child)
}

/// A command in one line, for messages.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_started_ignores_nothing_that_ends_it() {
        // As for a test run in the background of a script.
        // SAFETY: no handler is installed.
        let before = unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
        let running = Running::start(Command::new("cat"), None, 0);
        // SAFETY: what was there before, which was no handler either.
        unsafe { libc::signal(libc::SIGINT, before) };
        let ignored = u64::from_str_radix(&crate::process::status(running.pid(), "SigIgn"), 16).unwrap();
        assert!(
            ENDINGS.iter().all(|signal| ignored & 1 << (signal - 1) == 0),
            "{ignored:x}"
        );
        running.signal(Signal::INT);
        assert_eq!(running.wait().code(), 128 + libc::SIGINT);
    }
}
