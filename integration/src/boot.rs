//! One guest of a private guest manager, driven step by step.

use std::{
    fs::File,
    future::Future,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::io::FdFlags;
use sepal_schema::{
    config::{self, GuestConfig},
    error::{Error, read_completion},
    guest_capnp::{guest, observer, output, power, serial},
    info::GuestInfo,
    manager_capnp::guest_manager,
    report::{Reason, StopReport},
    transport::{Connection, Limits, Reactor, connect},
};

use crate::programs::program;

/// How long the manager may take for anything that does not depend on the guest.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of output that an error shows.
const TAIL: usize = 4096;

/// Why a step of a run failed.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A program is not there.
    #[error("the program {0} is not built; run: cargo build --workspace")]
    MissingProgram(String),
    /// A kernel or initramfs could not be built.
    #[error("{} failed:\n{said}", script.display())]
    Artifact {
        /// The build script.
        script: PathBuf,
        /// What it printed on standard error.
        said: String,
    },
    /// The host refused something.
    #[error("{step}: {source}")]
    Io {
        /// What was asked of it.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A file of the guest cannot be opened.
    #[error("opening {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manager or the component answered with a typed error.
    #[error(transparent)]
    Refused(#[from] Error),
    /// The connection broke.
    #[error("talking to the guest manager: {0}")]
    Rpc(#[from] capnp::Error),
    /// What was waited for did not come.
    #[error("{what} did not happen within {patience:?}; the guest's last output:\n{output}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        patience: Duration,
        /// The end of the guest's output.
        output: String,
    },
    /// The guest ended before.
    #[error("the guest ended before {what}; its last output:\n{output}")]
    Ended {
        /// What was waited for.
        what: String,
        /// The end of the guest's output.
        output: String,
    },
}

impl HarnessError {
    /// Wraps an I/O error; for `map_err`.
    pub(crate) fn io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { step, source }
    }
}

/// What to boot. Everything has a default: without a kernel it is the embedded guest.
#[derive(Debug, Default, Clone)]
pub struct Boot {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    cpus: u8,
    memory_mib: i32,
}

impl Boot {
    /// The embedded guest with the defaults of the protocol.
    pub fn new() -> Self {
        Self::default()
    }

    /// Boots this ELF image or bzImage.
    #[must_use]
    pub fn kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.kernel = Some(path.into());
        self
    }

    /// With this initial RAM file system.
    #[must_use]
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// With this kernel command line.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// With this many vCPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// With this much memory, in MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: i32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Starts a private guest manager and launches the guest; its vCPUs run when this returns.
    ///
    /// # Errors
    /// [`HarnessError`]: a program is missing, the manager could not be started, or it refused.
    pub fn start(self) -> Result<Guest, HarnessError> {
        let config = GuestConfig {
            kernel: open(self.kernel)?,
            initrd: open(self.initrd)?,
            cmdline: self.cmdline,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            ..GuestConfig::default()
        };
        Guest::launch(config)
    }
}

fn open(path: Option<PathBuf>) -> Result<config::File, HarnessError> {
    let Some(path) = path else {
        return Ok(config::File::None);
    };
    match File::open(&path) {
        Ok(file) => Ok(config::File::Fd(file.into())),
        Err(source) => Err(HarnessError::Open { path, source }),
    }
}

/// A guest that was launched. Dropping it ends the guest and its manager.
pub struct Guest {
    reactor: Reactor,
    guest: guest::Client,
    /// Held: the guest ends when it is dropped.
    lease: Option<guest_manager::lease::Client>,
    connection: Option<Connection>,
    manager: Child,
    output: Vec<u8>,
    /// Position of the serial port's output after what has been read.
    position: u64,
    /// Where the next wait looks for its text.
    seen: usize,
    ended: bool,
}

impl Guest {
    fn launch(config: GuestConfig) -> Result<Self, HarnessError> {
        use guest_manager::launch_result::Which;
        let mut reactor = Reactor::new().map_err(HarnessError::io("making the event loop"))?;
        let (ours, theirs) = UnixStream::pair().map_err(HarnessError::io("making a socket pair"))?;
        let manager = start_manager(theirs.into())?;
        let (client, connection) = connect::<guest_manager::Client>(&reactor.handle(), ours, Limits::default())
            .map_err(HarnessError::io("connecting to the guest manager"))?;
        let mut request = client.launch_request();
        config.encode(request.get().init_config(), &connection.fds())?;
        let response = within(&mut reactor, PATIENCE, request.send().promise)?;
        let response = response.unwrap_or_else(|| Err(capnp::Error::overloaded("launch was not answered".into())))?;
        let (guest, lease) = match response.get()?.which().map_err(capnp::Error::from)? {
            Which::Launched(launched) => (launched.get_guest()?, launched.get_lease()?),
            Which::Error(error) => return Err(Error::read(error?)?.into()),
        };
        Ok(Self {
            reactor,
            guest,
            lease: Some(lease),
            connection: Some(connection),
            manager,
            output: Vec::new(),
            position: 0,
            seen: 0,
            ended: false,
        })
    }

    /// Waits until the guest prints `text`, after what earlier waits have found. Returns the output from there to the end of the text.
    ///
    /// # Errors
    /// [`HarnessError::TimedOut`], [`HarnessError::Ended`].
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<String, HarnessError> {
        self.wait_until(&format!("the text {text:?}"), patience, |fresh| {
            find(fresh, text.as_bytes()).map(|at| at + text.len())
        })
    }

    /// Waits until the guest has printed a whole line with `text` in it, after what earlier waits have found. Returns the line.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for).
    pub fn wait_for_line(&mut self, text: &str, patience: Duration) -> Result<String, HarnessError> {
        let found = self.wait_until(&format!("a line with {text:?}"), patience, |fresh| {
            let after = find(fresh, text.as_bytes())? + text.len();
            find(&fresh[after..], b"\n").map(|end| after + end + 1)
        })?;
        Ok(found.lines().last().unwrap_or_default().to_owned())
    }

    /// Waits until `search` finds something in the output that earlier waits have not passed; it returns where that ends.
    fn wait_until(
        &mut self,
        what: &str,
        patience: Duration,
        search: impl Fn(&[u8]) -> Option<usize>,
    ) -> Result<String, HarnessError> {
        let deadline = Instant::now() + patience;
        loop {
            let fresh = &self.output[self.seen..];
            if let Some(end) = search(fresh) {
                let found = String::from_utf8_lossy(&fresh[..end]).into_owned();
                self.seen += end;
                return Ok(found);
            }
            if self.ended {
                return Err(HarnessError::Ended {
                    what: what.into(),
                    output: self.tail(),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.read_more(left)? {
                return Err(self.timed_out(what, patience));
            }
        }
    }

    /// Types on the guest's serial port.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn type_text(&mut self, text: &str) -> Result<(), HarnessError> {
        let serial: serial::Client = self.guest.serial_request().send().pipeline.get_serial();
        for piece in text.as_bytes().chunks(64 * 1024) {
            let mut request = serial.write_request();
            request.get().set_bytes(piece);
            let sent = within(&mut self.reactor, PATIENCE, request.send())?;
            sent.ok_or_else(|| self.timed_out("taking the typed text", PATIENCE))??;
        }
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn press_power_button(&mut self) -> Result<(), HarnessError> {
        let power: power::Client = self.guest.power_request().send().pipeline.get_power();
        let answer = within(&mut self.reactor, PATIENCE, power.shutdown_request().send().promise)?;
        let answer = answer.ok_or_else(|| self.timed_out("pressing the power button", PATIENCE))??;
        Ok(read_completion(answer.get()?)?)
    }

    /// Waits until the guest has ended, and collects the rest of its output.
    ///
    /// # Errors
    /// [`HarnessError::TimedOut`].
    pub fn wait(&mut self, patience: Duration) -> Result<StopReport, HarnessError> {
        let deadline = Instant::now() + patience;
        while !self.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.read_more(left)? {
                return Err(self.timed_out("the guest's end", patience));
            }
        }
        let asked = self.observer().wait_request().send().promise;
        let answer = within(&mut self.reactor, PATIENCE, asked)?;
        let answer = answer.ok_or_else(|| self.timed_out("the report of the guest's end", patience))??;
        Ok(StopReport::read(answer.get()?)?)
    }

    /// Waits for the guest's end and checks its reason.
    ///
    /// # Panics
    /// If the reason is another; the message shows the report and the guest's last output.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn assert_ends_with(&mut self, reason: Reason, patience: Duration) -> Result<StopReport, HarnessError> {
        let report = self.wait(patience)?;
        assert!(
            report.reason == reason,
            "expected {reason:?}, got {report:?}; the guest's last output:\n{}",
            self.tail()
        );
        Ok(report)
    }

    /// What the manager knows about the guest.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn info(&mut self) -> Result<GuestInfo, HarnessError> {
        let asked = self.observer().info_request().send().promise;
        let answer = within(&mut self.reactor, PATIENCE, asked)?;
        let answer = answer.ok_or_else(|| self.timed_out("the guest's information", PATIENCE))??;
        Ok(GuestInfo::read(answer.get()?.get_info()?)?)
    }

    /// Everything that the guest printed so far and a wait has collected.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Ends the guest and its manager, and returns how the manager ended.
    ///
    /// # Errors
    /// When the manager cannot be waited for.
    pub fn close(mut self) -> Result<ExitStatus, HarnessError> {
        self.let_go();
        self.manager
            .wait()
            .map_err(HarnessError::io("waiting for the guest manager"))
    }

    fn let_go(&mut self) {
        self.lease = None;
        if let Some(connection) = self.connection.take() {
            connection.disconnect();
            let _ = self.reactor.run_until(connection);
        }
    }

    fn observer(&self) -> observer::Client {
        self.guest.observer_request().send().pipeline.get_observer()
    }

    /// Reads output as it comes; false if none came in time.
    fn read_more(&mut self, patience: Duration) -> Result<bool, HarnessError> {
        let output: output::Client = self.observer().output_request().send().pipeline.get_output();
        let mut request = output.read_request();
        request.get().set_position(self.position);
        let Some(answer) = within(&mut self.reactor, patience, request.send().promise)? else {
            return Ok(false);
        };
        let answer = answer?;
        let piece = answer.get()?;
        if piece.get_dropped() > 0 {
            self.output
                .extend_from_slice(format!("[{} bytes lost]", piece.get_dropped()).as_bytes());
        }
        let bytes = piece.get_bytes()?;
        self.output.extend_from_slice(bytes);
        self.position = piece.get_position() + bytes.len() as u64;
        self.ended = piece.get_ended();
        Ok(true)
    }

    fn timed_out(&self, what: &str, patience: Duration) -> HarnessError {
        HarnessError::TimedOut {
            what: what.into(),
            patience,
            output: self.tail(),
        }
    }

    fn tail(&self) -> String {
        let start = self.output.len().saturating_sub(TAIL);
        String::from_utf8_lossy(&self.output[start..]).into_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.let_go();
        let _ = self.manager.wait();
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len().max(1))
        .position(|window| window == needle)
}

/// Runs a future on the loop; `None` if it takes longer than `patience`.
fn within<F: Future>(reactor: &mut Reactor, patience: Duration, future: F) -> Result<Option<F::Output>, HarnessError> {
    let handle = reactor.handle();
    let outcome = reactor.run_until(async move { handle.timeout(patience, future).await });
    Ok(outcome.map_err(HarnessError::io("running the event loop"))?.ok())
}

/// A manager that serves one connection and ends with it.
fn start_manager(connection: OwnedFd) -> Result<Child, HarnessError> {
    let mut command = Command::new(program("guest-manager")?);
    command
        .arg("--fd")
        .arg(connection.as_raw_fd().to_string())
        .stdin(Stdio::null());
    rustix::io::fcntl_setfd(&connection, FdFlags::empty()).map_err(|errno| HarnessError::Io {
        step: "passing the connection on",
        source: errno.into(),
    })?;
    command.spawn().map_err(HarnessError::io("starting the guest manager"))
}
