//! What to boot, and one guest driven step by step.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sepal_schema::{
    config::{
        self, GuestConfig,
        device::{Disk, DiskFormat, DiskMode, Network},
    },
    error::read_completion,
    guest_capnp::{guest, observer, output, power, serial},
    info::GuestInfo,
    manager_capnp::guest_manager,
    report::{Reason, StopReport},
};

use crate::{
    archive::initrd,
    error::HarnessError,
    events::News,
    manager::{Manager, PATIENCE},
    printed::{Printed, end_of},
    report::Report,
};

/// Bytes of output that an error shows.
const TAIL: usize = 4096;

/// What to boot. Everything has a default: without a kernel it is the embedded guest.
#[derive(Default)]
pub struct Boot {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    script: Option<String>,
    image: Option<&'static [u8]>,
    config: GuestConfig,
}

impl Boot {
    /// The embedded guest with the defaults of the protocol.
    pub fn new() -> Self {
        Self::default()
    }

    /// A guest of this configuration, whose files are open.
    pub fn of(config: GuestConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// The guest that drives virtio devices, with these commands; `sepal-driver-guest` says which there are.
    pub fn drivers(commands: &str) -> Self {
        let boot = Self {
            image: Some(sepal_driver_guest::IMAGE),
            ..Self::default()
        };
        boot.cmdline(format!("run={commands}")).memory_mib(128)
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

    /// With this shell script as `/script` in the initial RAM file system, where `sepal.run=script` finds it.
    #[must_use]
    pub fn script(mut self, script: impl Into<String>) -> Self {
        self.script = Some(script.into());
        self
    }

    /// With this kernel command line.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.config.cmdline = cmdline.into();
        self
    }

    /// With this many vCPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.config.cpus = cpus;
        self
    }

    /// With this much memory, in MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: i32) -> Self {
        self.config.memory_mib = memory_mib;
        self
    }

    /// With a further disk.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.config.disks.push(disk);
        self
    }

    /// With a further network device.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.config.networks.push(network);
        self
    }

    /// With whatever else the configuration has.
    #[must_use]
    pub fn configure(mut self, change: impl FnOnce(&mut GuestConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Starts a private guest manager and launches the guest; its vCPUs run when this returns.
    ///
    /// # Errors
    /// [`HarnessError`]: a program is missing, the manager could not be started, or it refused.
    pub fn start(self) -> Result<Guest, HarnessError> {
        Manager::start()?.launch(self)
    }

    /// The configuration, with its files opened.
    pub(crate) fn config(self) -> Result<GuestConfig, HarnessError> {
        let mut config = self.config;
        if let Some(image) = self.image {
            config.kernel = config::File::Fd(temporary(image)?.into());
        }
        if let Some(path) = self.kernel {
            config.kernel = open(path)?;
        }
        match (self.initrd, self.script) {
            (Some(path), Some(script)) => {
                let file = initrd(&path, &[("script", script.as_bytes())])?;
                config.initrd = config::File::Fd(file.into_file().into());
            }
            (Some(path), None) => config.initrd = open(path)?,
            (None, _) => {}
        }
        Ok(config)
    }
}

/// An image as a disk, opened for what `mode` needs.
///
/// # Errors
/// When it cannot be opened.
pub fn disk(path: &Path, mode: DiskMode, format: DiskFormat) -> Result<Disk, HarnessError> {
    let file = OpenOptions::new()
        .read(true)
        .write(mode == DiskMode::ReadWrite)
        .open(path);
    let file = file.map_err(|source| HarnessError::Open {
        path: path.into(),
        source,
    })?;
    let mut disk = Disk::new(config::File::Fd(file.into()), mode);
    disk.format = format;
    Ok(disk)
}

fn open(path: PathBuf) -> Result<config::File, HarnessError> {
    match File::open(&path) {
        Ok(file) => Ok(config::File::Fd(file.into())),
        Err(source) => Err(HarnessError::Open { path, source }),
    }
}

/// A file without a name that holds this.
fn temporary(content: &[u8]) -> Result<File, HarnessError> {
    let written = tempfile::tempfile().and_then(|mut file| {
        file.write_all(content)?;
        file.rewind()?;
        Ok(file)
    });
    written.map_err(HarnessError::io("writing a temporary file"))
}

/// A guest that was launched. Dropping it ends the guest and its manager.
pub struct Guest {
    pub(crate) manager: Manager,
    pub(crate) guest: guest::Client,
    /// Held: the guest ends when it is dropped. None of a guest that somebody else launched.
    _lease: Option<guest_manager::lease::Client>,
    pub(crate) news: Option<News>,
    output: Printed,
    /// Position of the serial port's output after what has been read.
    position: u64,
    ended: bool,
}

impl Guest {
    pub(crate) fn new(manager: Manager, guest: guest::Client, lease: Option<guest_manager::lease::Client>) -> Self {
        Self {
            manager,
            guest,
            _lease: lease,
            news: None,
            output: Printed::default(),
            position: 0,
            ended: false,
        }
    }

    /// Waits until the guest prints `text`, after what earlier waits have found; if that is empty, until it prints anything at all. Returns the
    /// output from there to the end of the text.
    ///
    /// # Errors
    /// [`HarnessError::TimedOut`], [`HarnessError::Ended`].
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<String, HarnessError> {
        self.wait_until(&format!("the text {text:?}"), patience, |fresh| end_of(text, fresh))
    }

    /// Waits until the guest has printed a whole line with `text` in it, after what earlier waits have found. Returns the line.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for).
    pub fn wait_for_line(&mut self, text: &str, patience: Duration) -> Result<String, HarnessError> {
        let found = self.wait_until(&format!("a line with {text:?}"), patience, |fresh| {
            let after = end_of(text, fresh)?;
            end_of("\n", &fresh[after..]).map(|end| after + end)
        })?;
        Ok(found.lines().last().unwrap_or_default().to_owned())
    }

    /// Waits for the line in which the guest reports on `name`: `ok NAME ...` or `fail NAME ...`.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for); [`HarnessError::Failed`] if it reports a failure, of this or of the whole guest.
    pub fn wait_for_report(&mut self, name: &str, patience: Duration) -> Result<Report, HarnessError> {
        let found = self.wait_until(&format!("a report on {name:?}"), patience, |fresh| {
            Report::end_in(name, fresh)
        })?;
        Report::parse(found.lines().last().unwrap_or_default())
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
            if let Some(found) = self.output.take(&search) {
                return Ok(found);
            }
            if self.ended {
                let how = self.wait(PATIENCE)?;
                return Err(HarnessError::Ended {
                    what: what.into(),
                    how: how.detail,
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
            let sent = self.manager.within(PATIENCE, request.send())?;
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
        let answer = self.manager.within(PATIENCE, power.shutdown_request().send().promise)?;
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
        let answer = self.manager.within(PATIENCE, asked)?;
        let answer = answer.ok_or_else(|| self.timed_out("the report of the guest's end", patience))??;
        Ok(StopReport::read_result(answer.get()?)?)
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
        let answer = self.manager.within(PATIENCE, asked)?;
        let answer = answer.ok_or_else(|| self.timed_out("the guest's information", PATIENCE))??;
        Ok(GuestInfo::read_result(answer.get()?)?)
    }

    /// Everything that the guest printed so far and a wait has collected.
    pub fn output(&self) -> String {
        self.output.text()
    }

    /// Ends the guest, and hands its manager back.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn finish(mut self) -> Result<Manager, HarnessError> {
        let power: power::Client = self.guest.power_request().send().pipeline.get_power();
        let asked = power.kill_request().send().promise;
        let answer = self.manager.within(PATIENCE, asked)?;
        answer.ok_or_else(|| self.timed_out("stopping the guest", PATIENCE))??;
        Ok(self.manager)
    }

    fn observer(&self) -> observer::Client {
        self.guest.observer_request().send().pipeline.get_observer()
    }

    /// Reads output as it comes; false if none came in time.
    fn read_more(&mut self, patience: Duration) -> Result<bool, HarnessError> {
        let output: output::Client = self.observer().output_request().send().pipeline.get_output();
        let mut request = output.read_request();
        request.get().set_position(self.position);
        let Some(answer) = self.manager.within(patience, request.send().promise)? else {
            return Ok(false);
        };
        let answer = answer?;
        let piece = answer.get()?;
        if piece.get_dropped() > 0 {
            let lost = format!("[{} bytes lost]", piece.get_dropped());
            self.output.push(lost.as_bytes());
        }
        let bytes = piece.get_bytes()?;
        self.output.push(bytes);
        self.position = piece.get_position() + bytes.len() as u64;
        self.ended = piece.get_ended();
        Ok(true)
    }

    pub(crate) fn timed_out(&self, what: &str, patience: Duration) -> HarnessError {
        HarnessError::TimedOut {
            what: what.into(),
            patience,
            output: self.tail(),
        }
    }

    fn tail(&self) -> String {
        self.output.tail(TAIL)
    }
}
