//! One component process as the manager sees it: its connection, its last words, its end.
//!
//! How it is started is behind [`ComponentStarter`]: the real one asks the keeper (`starter`), tests put something else there.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::Rc,
};

use capnp::capability::FromClientHook;
use futures::future::LocalBoxFuture;
use sepal_schema::{
    config::Limits as ResourceLimits,
    error::Error,
    lifecycle_capnp::{component, guest_lifecycle},
    transport::{
        AsyncFd, Connection, FdTable, Handle, Limits,
        reactor::{Direction, Task},
    },
};

use crate::changed::Changed;

/// Lines of a component's standard error that are kept for reports.
const KEPT_LINES: usize = 50;
/// Longest line, in bytes; the rest goes on in the next one.
const MAX_LINE: usize = 512;
/// Bytes of standard error that are logged of one component; the rest is only kept for reports, so that nobody fills the host's logs.
const MAX_LOGGED: usize = 256 * 1024;
/// Most bytes that are read from the pipe of a dead component: the most that an unprivileged pipe holds (fs.pipe-max-size).
const MAX_REST: usize = 1024 * 1024;

/// What a component is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartRequest {
    /// The guest's name, for logs.
    pub name: Rc<str>,
    /// What the host lets it use at most.
    pub limits: ResourceLimits,
    /// Layers of the jail that may be missing.
    pub waived_layers: Vec<String>,
}

/// A component that was started.
pub struct Started {
    /// Its process id on the host.
    pub pid: u32,
    /// The manager's end of its socket.
    pub socket: UnixStream,
    /// The reading end of its standard error.
    pub stderr: Option<OwnedFd>,
    /// Kills the process; may be called again, and after the end.
    pub kill: Box<dyn Fn()>,
    /// Resolves when the process is gone and reaped.
    pub exit: LocalBoxFuture<'static, Exit>,
}

/// Starts components.
pub trait ComponentStarter {
    /// Starts one. When the future is dropped before it resolves, what it started is ended.
    ///
    /// The error is `START_FAILURE` as a rule, and names what is missing.
    fn start(&self, request: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>>;
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
    /// Nobody can tell, and why.
    Unknown(String),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(libc::SIGSYS) => f.write_str("SIGSYS: system call refused by the jail"),
            Self::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::Unknown(reason) => f.write_str(reason),
        }
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGALRM => "SIGALRM",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGHUP => "SIGHUP",
        libc::SIGILL => "SIGILL",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGTERM => "SIGTERM",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        _ => return None,
    })
}

/// A component. Dropping it kills it.
pub struct Component {
    /// Its process id on the host.
    pub pid: u32,
    client: component::Client,
    connection: Connection,
    started_with: StartRequest,
    kill: Box<dyn Fn()>,
    killed: Cell<bool>,
    exit: Changed<Option<Exit>>,
    stderr: Option<Rc<Stderr>>,
    _reader: Option<Task>,
}

impl Component {
    /// Connects to a component that was started.
    ///
    /// # Errors
    /// Its descriptors cannot be put on the event loop.
    pub fn new(handle: &Handle, request: StartRequest, started: Started) -> io::Result<Rc<Self>> {
        let Started {
            pid,
            socket,
            stderr,
            kill,
            exit,
        } = started;
        let (client, connection) = sepal_schema::transport::connect(handle, socket, Limits::default())?;
        let stderr = match stderr {
            Some(pipe) => Some(Rc::new(Stderr {
                pipe: handle.register(pipe)?,
                name: request.name.clone(),
                words: RefCell::default(),
            })),
            None => None,
        };
        let reader = stderr
            .clone()
            .map(|stderr| handle.spawn_owned(async move { stderr.read_on().await }));
        let component = Rc::new(Self {
            pid,
            client,
            connection,
            started_with: request,
            kill,
            killed: Cell::new(false),
            exit: Changed::default(),
            stderr,
            _reader: reader,
        });
        let weak = Rc::downgrade(&component);
        handle.spawn(async move {
            let exit = exit.await;
            if let Some(component) = weak.upgrade() {
                if let Some(stderr) = &component.stderr {
                    stderr.read_rest();
                }
                tracing::debug!(guest = &*component.started_with.name, pid, %exit, "component ended");
                component.exit.change(|slot| *slot = Some(exit));
            }
        });
        Ok(component)
    }

    /// Its bootstrap capability.
    pub fn client(&self) -> &component::Client {
        &self.client
    }

    /// Its bootstrap capability, as what every client can drive.
    pub fn lifecycle(&self) -> guest_lifecycle::Client {
        self.client.clone().cast_to()
    }

    /// The descriptors that travel with its messages.
    pub fn fds(&self) -> FdTable {
        self.connection.fds()
    }

    /// Resolves when its connection has ended, with the reason.
    pub async fn disconnected(&self) -> String {
        self.connection.ended().await.to_string()
    }

    /// Whether it can serve what `request` asks for: it lives, and was started with the same limits and layers.
    pub fn serves(&self, request: &StartRequest) -> bool {
        self.exit().is_none() && !self.killed.get() && self.started_with == *request
    }

    /// Kills the process. [`Component::exited`] tells when it is gone.
    pub fn kill(&self) {
        self.killed.set(true);
        (self.kill)();
    }

    /// Whether [`Component::kill`] was called.
    pub fn killed(&self) -> bool {
        self.killed.get()
    }

    /// How it ended; none while it lives.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.look(Clone::clone)
    }

    /// Waits until the process is gone and reaped.
    pub async fn exited(&self) -> Exit {
        self.exit.until(|exit| exit.clone()).await
    }

    /// The end of what it wrote to its standard error, one line a string.
    pub fn last_lines(&self) -> Vec<String> {
        let lines = |stderr: &Rc<Stderr>| stderr.words.borrow().lines().map(str::to_owned).collect();
        self.stderr.as_ref().map(lines).unwrap_or_default()
    }

    /// The last line that it wrote to its standard error, if any; none if it was killed from outside, which it cannot have commented on.
    pub fn last_line(&self) -> Option<String> {
        if let Some(Exit::Signal(libc::SIGKILL) | Exit::Unknown(_)) = self.exit() {
            return None;
        }
        self.stderr
            .as_ref()?
            .words
            .borrow()
            .lines()
            .next_back()
            .map(str::to_owned)
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        if self.exit().is_none() {
            (self.kill)();
        }
    }
}

/// The reading end of a component's standard error.
struct Stderr {
    pipe: AsyncFd<OwnedFd>,
    name: Rc<str>,
    words: RefCell<LastWords>,
}

impl Stderr {
    async fn read_on(&self) {
        let mut buffer = [0; 4096];
        loop {
            match self
                .pipe
                .io(Direction::Read, |pipe| Ok(rustix::io::read(pipe, &mut buffer)?))
                .await
            {
                Ok(0) | Err(_) => return,
                Ok(count) => self.heard(&buffer[..count]),
            }
        }
    }

    /// What is there when the process is dead; a pipe holds little, so this ends.
    fn read_rest(&self) {
        let mut buffer = [0; 4096];
        for _ in 0..MAX_REST / buffer.len() {
            match self
                .pipe
                .try_io(Direction::Read, |pipe| Ok(rustix::io::read(pipe, &mut buffer)?))
            {
                Ok(0) | Err(_) => break,
                Ok(count) => self.heard(&buffer[..count]),
            }
        }
        self.words.borrow_mut().finish(|line| log(&self.name, line));
    }

    fn heard(&self, bytes: &[u8]) {
        self.words.borrow_mut().push(bytes, |line| log(&self.name, line));
    }
}

fn log(name: &str, line: &str) {
    tracing::info!(guest = name, "component: {line}");
}

/// Splits what a component writes into lines, keeps the last ones, and says which are to be logged.
#[derive(Debug, Default)]
struct LastWords {
    kept: VecDeque<String>,
    partial: Vec<u8>,
    logged: usize,
}

impl LastWords {
    fn push(&mut self, bytes: &[u8], mut log: impl FnMut(&str)) {
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
            }
            if byte == b'\n' || self.partial.len() == MAX_LINE {
                self.line(&mut log);
            }
        }
    }

    fn finish(&mut self, mut log: impl FnMut(&str)) {
        if !self.partial.is_empty() {
            self.line(&mut log);
        }
    }

    fn line(&mut self, log: &mut impl FnMut(&str)) {
        let text = String::from_utf8_lossy(&self.partial);
        // Control characters could rewrite the terminal of whoever reads the log.
        let line: String = text
            .trim_end()
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        self.partial.clear();
        if line.is_empty() {
            return;
        }
        if self.logged < MAX_LOGGED {
            self.logged += line.len();
            log(&line);
            if self.logged >= MAX_LOGGED {
                log("(what follows is not logged any more)");
            }
        }
        if self.kept.len() == KEPT_LINES {
            self.kept.pop_front();
        }
        self.kept.push_back(line);
    }

    fn lines(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.kept.iter().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(chunks: &[&[u8]]) -> (Vec<String>, Vec<String>) {
        let (mut words, mut logged) = (LastWords::default(), Vec::new());
        for chunk in chunks {
            words.push(chunk, |line| logged.push(line.to_owned()));
        }
        words.finish(|line| logged.push(line.to_owned()));
        (words.lines().map(str::to_owned).collect(), logged)
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let (kept, logged) = words(&[b"one\ntw", b"o\r\n\n", b"\x1b[2Jthree"]);
        assert_eq!(kept, ["one", "two", " [2Jthree"]);
        assert_eq!(logged, kept);
    }

    #[test]
    fn only_the_last_lines_are_kept_and_only_so_much_is_logged() {
        let line = [b'x'; MAX_LINE];
        let chunks = vec![&line[..]; 1000];
        let (kept, logged) = words(&chunks);
        assert_eq!(kept.len(), KEPT_LINES);
        assert_eq!(logged.len(), MAX_LOGGED / MAX_LINE + 1);
    }

    #[test]
    fn ends_are_told_in_words() {
        assert_eq!(Exit::Signal(9).to_string(), "killed by signal 9 (SIGKILL)");
        assert_eq!(Exit::Signal(31).to_string(), "SIGSYS: system call refused by the jail");
        assert_eq!(Exit::Signal(64).to_string(), "killed by signal 64");
        assert_eq!(Exit::Code(3).to_string(), "exited with status 3");
    }
}
