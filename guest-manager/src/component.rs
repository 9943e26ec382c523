//! One component process as the manager sees it: its connection, its last words, its end.
//!
//! How it is started is behind [`ComponentStarter`]: the real one asks the keeper (`starter`), tests put something else there.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::Rc,
};

use capnp::capability::FromClientHook;
use futures::future::{LocalBoxFuture, ready};
use sepal_schema::{
    config::{GuestConfig, Limits as ResourceLimits},
    crash::MAX_LAST_LINES,
    error::{Error, Kind},
    lifecycle_capnp::{component, guest_lifecycle},
    report::ComponentEnd,
    transport::{
        AsyncFd, Connection, FdTable, Handle, Limits,
        reactor::{Direction, Task},
    },
};
use tracing::Level;

use crate::{changed::Changed, model::cut, starter::Known};

/// Longest line, in bytes; the rest goes on in the next one.
const MAX_LINE: usize = 512;
/// Bytes of standard error that are logged of one component; of the rest only the last lines are kept, so that nobody fills the host's logs.
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

impl StartRequest {
    /// For a guest of this name and configuration.
    pub fn new(name: Rc<str>, config: &GuestConfig) -> Self {
        Self {
            name,
            limits: config.limits,
            waived_layers: config.waived_layers.clone(),
        }
    }
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
    /// Resolves when the process has ended, and has been reaped if whoever is to do that does not stand still.
    pub exit: LocalBoxFuture<'static, Exit>,
    /// Where what belongs to it can be kept for the next manager; none: nowhere.
    pub custody: Option<Rc<dyn Custody>>,
}

/// Where the keeper holds what belongs to a component, so that the next manager can take it over.
pub trait Custody {
    /// Holds descriptors under a label, at most 64 of them, in place of those that it held under it before.
    ///
    /// # Errors
    /// There is no keeper any more.
    fn keep(&self, label: &str, fds: Vec<OwnedFd>) -> Result<(), Error>;

    /// Which guest this is; to be said before [`Custody::set_durable`].
    fn note(&self, _known: &Known) {}

    /// From now on the component outlives this manager, and what is held outlives the component.
    ///
    /// # Errors
    /// As [`Custody::keep`].
    fn set_durable(&self) -> Result<(), Error>;

    /// Nothing is held any more, and the component ends with this manager at the latest.
    fn release(&self);

    /// Resolves when all that was said has been sent: from then on it counts, whatever becomes of this process.
    fn sent(&self) -> LocalBoxFuture<'static, ()>;
}

/// Starts components.
pub trait ComponentStarter {
    /// Starts one. When the future is dropped before it resolves, what it started is ended.
    ///
    /// The error is `START_FAILURE` as a rule, and names what is missing.
    fn start(&self, request: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>>;

    /// Changes what the host lets a component use, by its process id; resolves when that holds. `NOT_SUPPORTED` where the host cannot do it, saying what
    /// is lacking.
    fn set_limits(&self, _pid: u32, _limits: ResourceLimits) -> LocalBoxFuture<'static, Result<(), Error>> {
        let message = "limits cannot be changed here while a component runs";
        Box::pin(ready(Err(Error::new(Kind::NotSupported, message))))
    }

    /// Whether one could be started, as far as that can be told without doing so.
    ///
    /// # Errors
    /// What [`ComponentStarter::start`] would fail with.
    fn check(&self, request: &StartRequest) -> Result<(), Error>;

    /// Whether what it starts can outlive this manager.
    ///
    /// # Errors
    /// Why not.
    fn outlived(&self) -> Result<(), Error> {
        let message = "nothing that this manager starts can go on without it";
        Err(Error::not_supported("durable", message))
    }

    /// Has this kept for the next manager, beside no component, and says how that one comes.
    ///
    /// # Errors
    /// As [`ComponentStarter::outlived`], or the keeper is gone.
    fn keep_for_successor(&self, _: BTreeMap<String, OwnedFd>) -> Result<(), Error> {
        self.outlived()
    }
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

impl Exit {
    /// As reports have it; none where nobody can tell.
    pub(crate) fn component_end(&self) -> Option<ComponentEnd> {
        match self {
            Self::Code(code) => u8::try_from(*code).ok().map(ComponentEnd::Exited),
            Self::Signal(signal) => u8::try_from(*signal).ok().map(ComponentEnd::Killed),
            Self::Unknown(_) => None,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(libc::SIGSYS) => f.write_str("SIGSYS: system call refused by the jail"),
            Self::Signal(libc::SIGBUS) => write!(
                f,
                "killed by signal {} (SIGBUS): memory of the guest was not there any more, as where the file behind it was cut short",
                libc::SIGBUS
            ),
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

/// A component. Dropping it kills it, unless it is left to the next manager.
pub struct Component {
    /// Its process id on the host.
    pub pid: u32,
    client: component::Client,
    connection: Connection,
    started_with: RefCell<StartRequest>,
    kill: Box<dyn Fn()>,
    killed: Cell<bool>,
    /// It goes on when this is dropped.
    left: Cell<bool>,
    custody: Option<Rc<dyn Custody>>,
    exit: Changed<Option<Exit>>,
    stderr: Option<Rc<Stderr>>,
    _reader: Option<Task>,
}

impl Component {
    /// Connects to a component that was started.
    ///
    /// # Errors
    /// Its descriptors cannot be put on the event loop; it is killed then, as nobody else would have it.
    pub fn new(handle: &Handle, request: StartRequest, started: Started) -> io::Result<Rc<Self>> {
        let Started {
            pid,
            socket,
            stderr,
            kill,
            exit,
            custody,
        } = started;
        let connected = sepal_schema::transport::connect(handle, socket, Limits::default());
        let connected = connected.and_then(|connected| Ok((connected, Stderr::new(handle, &request.name, stderr)?)));
        let ((client, connection), stderr) = connected.inspect_err(|_| kill())?;
        let reader = stderr
            .clone()
            .map(|stderr| handle.spawn_owned(async move { stderr.read_on().await }));
        let component = Rc::new(Self {
            pid,
            client,
            connection,
            started_with: RefCell::new(request),
            kill,
            killed: Cell::new(false),
            left: Cell::new(false),
            custody,
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
                tracing::debug!(guest = &*component.started_with.borrow().name, pid, %exit, "component ended");
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
        self.exit().is_none() && !self.killed.get() && *self.started_with.borrow() == *request
    }

    /// What the host lets it use.
    pub fn limits(&self) -> ResourceLimits {
        self.started_with.borrow().limits
    }

    /// What the host lets it use has been changed.
    pub(crate) fn has_limits(&self, limits: ResourceLimits) {
        self.started_with.borrow_mut().limits = limits;
    }

    /// Kills the process. [`Component::exited`] tells when it is gone.
    pub fn kill(&self) {
        self.killed.set(true);
        (self.kill)();
    }

    /// Where what belongs to it can be kept for the next manager.
    pub(crate) fn custody(&self) -> Option<&Rc<dyn Custody>> {
        self.custody.as_ref()
    }

    /// Another descriptor of the reading end of its standard error.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn words(&self) -> io::Result<Option<OwnedFd>> {
        let copy = |stderr: &Rc<Stderr>| stderr.pipe.get_ref().try_clone();
        self.stderr.as_ref().map(copy).transpose()
    }

    /// From now on dropping it does not end it.
    pub(crate) fn leave(&self) {
        self.left.set(true);
    }

    /// Whether [`Component::kill`] was called.
    pub fn killed(&self) -> bool {
        self.killed.get()
    }

    /// How it ended; none while it lives.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.look(Clone::clone)
    }

    /// Waits until the process has ended, and as a rule been reaped.
    pub async fn exited(&self) -> Exit {
        self.exit.until(|exit| exit.clone()).await
    }

    /// The last line that it wrote to its standard error, if any; none if it was killed from outside, which it cannot have commented on.
    pub fn last_line(&self) -> Option<String> {
        if let Some(Exit::Signal(libc::SIGKILL) | Exit::Unknown(_)) = self.exit() {
            return None;
        }
        self.stderr.as_ref()?.words.borrow().last().cloned()
    }

    /// The last lines that it wrote to its standard error so far, oldest first, however it ended.
    pub fn last_lines(&self) -> Vec<String> {
        let Some(stderr) = &self.stderr else {
            return Vec::new();
        };
        stderr.read_waiting();
        stderr.words.borrow().lines.iter().cloned().collect()
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        if self.exit().is_none() && !self.left.get() {
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
    fn new(handle: &Handle, name: &Rc<str>, pipe: Option<OwnedFd>) -> io::Result<Option<Rc<Self>>> {
        let Some(pipe) = pipe else { return Ok(None) };
        Ok(Some(Rc::new(Self {
            pipe: handle.register(pipe)?,
            name: name.clone(),
            words: RefCell::default(),
        })))
    }

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

    /// What is there when the process is dead.
    fn read_rest(&self) {
        self.read_waiting();
        self.words
            .borrow_mut()
            .finish(|level, line| log(&self.name, level, line));
    }

    /// What waits in the pipe, which holds little, so that this ends.
    fn read_waiting(&self) {
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
    }

    fn heard(&self, bytes: &[u8]) {
        self.words
            .borrow_mut()
            .push(bytes, |level, line| log(&self.name, level, line));
    }
}

/// The last line that is in the pipe of a component that is dead.
pub(crate) fn last_words(stderr: OwnedFd) -> Option<String> {
    last_lines(stderr).pop()
}

/// The last lines that are in the pipe of a component that is dead, oldest first.
pub(crate) fn last_lines(stderr: OwnedFd) -> Vec<String> {
    if rustix::io::ioctl_fionbio(&stderr, true).is_err() {
        return Vec::new();
    }
    let (mut words, mut buffer) = (LastWords::default(), [0; 4096]);
    for _ in 0..MAX_REST / buffer.len() {
        match rustix::io::read(&stderr, &mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => words.push(&buffer[..count], |_, _| {}),
        }
    }
    words.finish(|_, _| {});
    words.lines.into()
}

fn log(name: &str, level: Level, line: &str) {
    match level {
        Level::ERROR => tracing::error!(guest = name, "component: {line}"),
        Level::WARN => tracing::warn!(guest = name, "component: {line}"),
        Level::INFO => tracing::info!(guest = name, "component: {line}"),
        _ => tracing::debug!(guest = name, "component: {line}"),
    }
}

/// A line without the level that the component's logger put before it. One without any was written past the logger, by a panic as a rule.
fn level(line: &str) -> (Level, &str) {
    let (word, rest) = line.trim_start().split_once(' ').unwrap_or((line, ""));
    match word {
        "ERROR" => (Level::ERROR, rest),
        "WARN" => (Level::WARN, rest),
        "INFO" => (Level::INFO, rest),
        "DEBUG" | "TRACE" => (Level::DEBUG, rest),
        _ => (Level::WARN, line),
    }
}

/// Splits what a component writes into lines, keeps the last ones, and says which are to be logged.
#[derive(Debug, Default)]
struct LastWords {
    /// At most [`MAX_LAST_LINES`], oldest first.
    lines: VecDeque<String>,
    partial: Vec<u8>,
    logged: usize,
}

impl LastWords {
    fn last(&self) -> Option<&String> {
        self.lines.back()
    }

    fn push(&mut self, bytes: &[u8], mut log: impl FnMut(Level, &str)) {
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
            }
            if byte == b'\n' || self.partial.len() == MAX_LINE {
                self.line(&mut log);
            }
        }
    }

    fn finish(&mut self, mut log: impl FnMut(Level, &str)) {
        if !self.partial.is_empty() {
            self.line(&mut log);
        }
    }

    fn line(&mut self, log: &mut impl FnMut(Level, &str)) {
        let text = String::from_utf8_lossy(&self.partial);
        let line = cut(text.trim_end(), usize::MAX);
        self.partial.clear();
        let (level, line) = level(&line);
        if line.is_empty() {
            return;
        }
        if self.logged < MAX_LOGGED {
            self.logged += line.len();
            log(level, line);
            if self.logged >= MAX_LOGGED {
                log(Level::WARN, "(what follows is not logged any more)");
            }
        }
        if self.lines.len() == MAX_LAST_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(chunks: &[&[u8]]) -> (Option<String>, Vec<(Level, String)>) {
        let (mut words, mut logged) = (LastWords::default(), Vec::new());
        for chunk in chunks {
            words.push(chunk, |level, line| logged.push((level, line.to_owned())));
        }
        words.finish(|level, line| logged.push((level, line.to_owned())));
        (words.last().cloned(), logged)
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let (last, logged) = words(&[b"one\ntw", b"o\r\n\n", b"\x1b[2Jthree"]);
        assert_eq!(last.unwrap(), " [2Jthree");
        let lines: Vec<_> = logged.iter().map(|(_, line)| line.as_str()).collect();
        assert_eq!(lines, ["one", "two", " [2Jthree"]);
    }

    #[test]
    fn lines_have_the_level_that_the_component_gave_them() {
        let text =
            b"ERROR rip=0\n WARN  odd\n INFO all is well\nDEBUG x\nTRACE y\nINFORMAL\nthread 'vcpu' panicked\nERROR \n";
        let (last, logged) = words(&[text]);
        let expected = [
            (Level::ERROR, "rip=0"),
            (Level::WARN, " odd"),
            (Level::INFO, "all is well"),
            (Level::DEBUG, "x"),
            (Level::DEBUG, "y"),
            (Level::WARN, "INFORMAL"),
            (Level::WARN, "thread 'vcpu' panicked"),
        ];
        let logged: Vec<_> = logged.iter().map(|(level, line)| (*level, line.as_str())).collect();
        assert_eq!(logged, expected);
        assert_eq!(last.unwrap(), "thread 'vcpu' panicked");
    }

    #[test]
    fn only_so_much_is_logged() {
        let line = [b'x'; MAX_LINE];
        let chunks = vec![&line[..]; 1000];
        let (last, logged) = words(&chunks);
        assert_eq!(last.unwrap().len(), MAX_LINE);
        assert_eq!(logged.len(), MAX_LOGGED / MAX_LINE + 1);
    }

    #[test]
    fn the_last_lines_are_kept_for_whoever_asks_why_it_ended() {
        let mut words = LastWords::default();
        for i in 0..100 {
            words.push(format!("INFO line {i}\n").as_bytes(), |_, _| {});
        }
        words.push(b"no end of line", |_, _| {});
        words.finish(|_, _| {});
        assert_eq!(words.lines.len(), MAX_LAST_LINES);
        assert_eq!((&words.lines[0][..], &words.lines[18][..]), ("line 81", "line 99"));
        assert_eq!(words.last().unwrap(), "no end of line");
    }

    #[test]
    fn ends_are_told_in_words() {
        assert_eq!(Exit::Signal(9).to_string(), "killed by signal 9 (SIGKILL)");
        assert!(
            Exit::Signal(7)
                .to_string()
                .contains("(SIGBUS): memory of the guest was not there")
        );
        assert_eq!(Exit::Signal(31).to_string(), "SIGSYS: system call refused by the jail");
        assert_eq!(Exit::Signal(64).to_string(), "killed by signal 64");
        assert_eq!(Exit::Code(3).to_string(), "exited with status 3");
    }
}
