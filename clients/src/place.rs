//! Where the guest manager is, and the program that leads there if it is on another machine.
//!
//! ```text
//!   nothing, unix:PATH, PATH            this machine: a Unix socket, which carries descriptors
//!   ssh://[USER@]HOST[:PORT][/PATH]     another:  guest --(pipes)--> ssh --> guest relay --> Unix socket
//! ```
//!
//! The pipes carry bytes alone. The program ends when they are closed; one that does not is killed, and one that outlives this program is sent SIGTERM
//! by the kernel.

use std::{
    cell::RefCell,
    ffi::{OsStr, OsString},
    fmt,
    io::{self, BufReader},
    os::{fd::AsFd, unix::ffi::OsStrExt, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

use crate::terminal;

/// How long ssh has to end once nothing is left to be said.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long its last words may take to arrive after its end: a process that it leaves behind (a connection that is shared) may keep them open.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// The program that is run, unless another is named.
const SSH: &str = "ssh";

/// How the command line names a guest manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// On this machine, listening here.
    Socket(PathBuf),
    /// On another machine.
    Ssh(Remote),
}

/// A guest manager on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    /// `[USER@]HOST`, as ssh takes it.
    destination: String,
    port: Option<u16>,
    /// Where it listens there, if not at the user's own socket.
    socket: Option<String>,
}

impl Address {
    /// Reads `unix:PATH`, `PATH` or `ssh://[USER@]HOST[:PORT][/PATH]`.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub(crate) fn parse(text: OsString) -> Result<Self, String> {
        let path = |path: &[u8]| match path {
            [] => Err("the path of a socket is missing".to_owned()),
            path => Ok(Self::Socket(OsStr::from_bytes(path).into())),
        };
        let bytes = text.as_bytes();
        if let Some(socket) = bytes.strip_prefix(b"unix:") {
            return path(socket);
        }
        if let Some(rest) = bytes.strip_prefix(b"ssh://") {
            let rest = str::from_utf8(rest).map_err(|_| "the address is not UTF-8".to_owned())?;
            return Remote::parse(rest).map(Self::Ssh);
        }
        if let Some((scheme, _)) = text.to_str().and_then(|text| text.split_once("://")) {
            return Err(format!(
                "{scheme}:// leads nowhere; ssh://[USER@]HOST[:PORT][/PATH], unix:PATH and PATH do"
            ));
        }
        path(bytes)
    }
}

impl Remote {
    fn parse(text: &str) -> Result<Self, String> {
        let (authority, path) = match text.find('/') {
            Some(slash) => text.split_at(slash),
            None => (text, ""),
        };
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, authority),
        };
        let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').unwrap_or(port))),
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        // Such a name would be an option of ssh's.
        if host.is_empty() || host.starts_with('-') || user.is_some_and(|user| user.is_empty() || user.starts_with('-'))
        {
            return Err(format!("'{authority}' names no host; [USER@]HOST[:PORT] does"));
        }
        let port = match port.map(str::parse::<u16>) {
            None => None,
            Some(Ok(port @ 1..)) => Some(port),
            Some(_) => return Err(format!("'{authority}' has no port that can be; 1 to 65535 are")),
        };
        Ok(Self {
            destination: user.map_or_else(|| host.to_owned(), |user| format!("{user}@{host}")),
            port,
            socket: (path.len() > 1).then(|| path.to_owned()),
        })
    }

    /// The arguments for ssh.
    fn arguments(&self, otherwise: Otherwise) -> Vec<String> {
        let mut arguments = vec!["-T".to_owned()];
        if let Some(port) = self.port {
            arguments.extend(["-p".to_owned(), port.to_string()]);
        }
        arguments.extend(["--", &self.destination, "guest", "relay"].map(str::to_owned));
        match otherwise {
            // Nothing is said of the latter: it is what the other side does unless told otherwise.
            Otherwise::Fail | Otherwise::Resume => {}
            Otherwise::Private => arguments.push("--private".to_owned()),
            Otherwise::Daemon => arguments.push("--start".to_owned()),
        }
        if let Some(socket) = &self.socket {
            // A shell on the other side reads this.
            arguments.extend(["--socket".to_owned(), quote(socket)]);
        }
        arguments
    }
}

/// A word that a shell takes as it is.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What to do where no guest manager runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Otherwise {
    /// Say so.
    Fail,
    /// Start one that stays if there are guests that go on without any; else say so.
    Resume,
    /// Start one that ends with the connection.
    Private,
    /// Start one that stays.
    Daemon,
}

/// Where the guest manager of this command is.
pub(crate) struct Place {
    address: Option<Address>,
    ssh: OsString,
    tunnel: RefCell<Option<Tunnel>>,
}

/// The program that leads to another machine.
struct Tunnel {
    child: Child,
    /// The last line that it said.
    last: mpsc::Receiver<String>,
}

/// How the program ended that led to another machine, if not well.
#[derive(Debug)]
pub(crate) struct Broken {
    program: String,
    status: String,
    words: Option<String>,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ended with {}", self.program, self.status)?;
        match &self.words {
            Some(words) => write!(f, ": {words}"),
            None => Ok(()),
        }
    }
}

impl Place {
    /// A manager at `address` (none: the user's own), and the program to run for other machines (none: ssh).
    pub(crate) fn new(address: Option<Address>, ssh: Option<OsString>) -> Self {
        Self {
            address,
            ssh: ssh.unwrap_or_else(|| SSH.into()),
            tunnel: RefCell::default(),
        }
    }

    /// The address that was given.
    pub(crate) fn address(&self) -> Option<&Address> {
        self.address.as_ref()
    }

    /// Whether the manager is on this machine.
    pub(crate) fn is_here(&self) -> bool {
        !matches!(self.address, Some(Address::Ssh(_)))
    }

    /// Starts the program that leads to `remote`, and returns what it writes and reads.
    pub(crate) fn dial(&self, remote: &Remote, otherwise: Otherwise) -> Result<(ChildStdout, ChildStdin)> {
        let mut command = Command::new(&self.ssh);
        command
            .args(remote.arguments(otherwise))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: prctl is a system call, and nothing else happens between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", self.ssh.display()))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (sender, last) = mpsc::channel();
        *self.tunnel.borrow_mut() = Some(Tunnel { child, last });
        let streams = (stdin.zip(stdout), stderr);
        let (Some((stdin, stdout)), Some(stderr)) = streams else {
            anyhow::bail!("{} was started without pipes", self.ssh.display());
        };
        let listen = move |stderr: ChildStderr| {
            // Nobody asks for it if all went well.
            let _ = sender.send(terminal::relay(BufReader::new(stderr)));
        };
        terminal::spawn("ssh", move || listen(stderr)).context("starting a thread for what ssh says")?;
        Ok((stdout, stdin))
    }

    /// Waits for the program that led to another machine, once its pipes are closed. Returns how it ended unless it did well.
    pub(crate) fn close(&self) -> Option<Broken> {
        let Tunnel { mut child, last } = self.tunnel.borrow_mut().take()?;
        let ended = wait(&child, PATIENCE);
        if !ended {
            // It has nothing to tell that anybody would wait for.
            let _ = child.kill();
        }
        let status = child.wait().ok().filter(|status| ended && !status.success())?;
        Some(Broken {
            program: self.ssh.display().to_string(),
            status: describe(status),
            words: last.recv_timeout(LAST_WORDS).ok().filter(|words| !words.is_empty()),
        })
    }
}

fn describe(status: ExitStatus) -> String {
    status
        .code()
        .map_or_else(|| status.to_string(), |code| format!("status {code}"))
}

/// Whether a child has ended within `patience`.
fn wait(child: &Child, patience: Duration) -> bool {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return false;
    };
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    let timeout = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut poll = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    matches!(rustix::event::poll(&mut poll, Some(&timeout)), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Result<Address, String> {
        Address::parse(text.into())
    }

    #[test]
    fn sockets_of_this_machine() {
        assert_eq!(address("unix:/run/x"), Ok(Address::Socket("/run/x".into())));
        assert_eq!(address("sub/x"), Ok(Address::Socket("sub/x".into())));
        for (text, word) in [("", "missing"), ("unix:", "missing"), ("tcp://x", "tcp://")] {
            assert!(address(text).unwrap_err().contains(word), "{text}");
        }
    }

    #[test]
    fn other_machines() {
        let arguments = |text: &str, otherwise| match address(text) {
            Ok(Address::Ssh(remote)) => remote.arguments(otherwise).join(" "),
            other => panic!("{other:?}"),
        };
        for (text, expected) in [
            ("ssh://host", "-T -- host guest relay"),
            ("ssh://host/", "-T -- host guest relay"),
            ("ssh://me@host:2222", "-T -p 2222 -- me@host guest relay"),
            ("ssh://me@[fe80::1]:22", "-T -p 22 -- me@fe80::1 guest relay"),
            ("ssh://[::1]", "-T -- ::1 guest relay"),
            (
                "ssh://host/run/it's/x.sock",
                r"-T -- host guest relay --socket '/run/it'\''s/x.sock'",
            ),
        ] {
            assert_eq!(arguments(text, Otherwise::Fail), expected, "{text}");
        }
        assert!(arguments("ssh://host", Otherwise::Private).ends_with("--private"));
        assert!(arguments("ssh://host", Otherwise::Daemon).ends_with("--start"));
        for (text, word) in [
            ("ssh://", "names no host"),
            ("ssh:///run/x", "names no host"),
            ("ssh://-oProxyCommand=x", "names no host"),
            ("ssh://-l@host", "names no host"),
            ("ssh://@host", "names no host"),
            ("ssh://host:0", "no port"),
            ("ssh://host:x", "no port"),
            ("ssh://[::1]x", "no port"),
        ] {
            let error = address(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
