//! A peer as a process whose standard output is the guest's serial port.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::Errno,
};
use sepal_integration::{HarnessError, Printed, Report, end_of};

use super::{Running, Started};
use crate::guests::FIRST_BYTE;

/// By then a guest of ours has written its first byte, however busy the host is.
const FIRST_PATIENCE: Duration = Duration::from_secs(30);
/// The slowest guest has said something by then, or is done.
const PATIENCE: Duration = Duration::from_secs(300);
/// One measurement by the driver guest has ended by then.
const REPORT_PATIENCE: Duration = Duration::from_secs(100);
/// Bytes that are read at once.
const PIECE: usize = 4096;
/// Bytes of a guest's output that an error shows.
const TAIL: usize = 1000;

/// A running VMM; it is killed when this is dropped.
pub(super) struct Process {
    name: &'static str,
    child: Child,
    output: ChildStdout,
    /// What it writes to standard error: in memory, so that nobody has to read it.
    errors: File,
    /// What the guest printed so far.
    printed: Printed,
    /// Whether the process is strace, with the VMM below it.
    traced: bool,
    /// What must last as long as the process.
    _kept: Box<dyn std::any::Any>,
}

/// Why there is no more output.
enum Silence {
    /// The process has closed it.
    End,
    /// Nothing came in time.
    Patience,
    Io(io::Error),
}

impl Process {
    /// Starts a command with this standard input, under strace if there is a file for what that writes, and keeps `kept` for as long as it runs.
    pub(super) fn start(
        name: &'static str,
        mut command: Command,
        input: Stdio,
        trace: Option<&Path>,
        kept: impl std::any::Any,
    ) -> Started {
        if let Some(file) = trace {
            command = traced(&command, file);
        }
        let errors = File::from(memfd_create(c"errors", MemfdFlags::CLOEXEC)?);
        command.stdin(input).stdout(Stdio::piped()).stderr(errors.try_clone()?);
        let mut child = command.spawn()?;
        let output = child
            .stdout
            .take()
            .ok_or_else(|| anyhow::anyhow!("{name} has no output"))?;
        Ok(Box::new(Self {
            name,
            child,
            output,
            errors,
            printed: Printed::default(),
            traced: trace.is_some(),
            _kept: Box::new(kept),
        }))
    }

    /// Reads what there is, at least a byte.
    fn read_more(&mut self, deadline: Instant) -> Result<(), Silence> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|error| Silence::Io(io::Error::other(error)))?;
        let mut fds = [PollFd::new(&self.output, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return Err(Silence::Patience),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(Silence::Io(errno.into())),
        }
        let mut piece = [0; PIECE];
        match self.output.read(&mut piece) {
            Ok(0) => Err(Silence::End),
            Ok(count) => {
                self.printed.push(piece.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) => Err(Silence::Io(error)),
        }
    }

    /// Waits for something in what was not asked for yet; `search` says where it ends.
    fn wait_until(
        &mut self,
        what: &str,
        patience: Duration,
        search: impl Fn(&[u8]) -> Option<usize>,
    ) -> Result<String, HarnessError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = self.printed.take(&search) {
                return Ok(found);
            }
            self.read_more(deadline)
                .map_err(|silence| self.failure(what, &silence))?;
        }
    }

    /// What went wrong, with the last words of whoever has any.
    fn failure(&self, what: &str, silence: &Silence) -> HarnessError {
        let how = match silence {
            Silence::End => format!("it ended before {what}"),
            Silence::Patience => format!("{what} did not come in time"),
            Silence::Io(error) => format!("{what}: {error}"),
        };
        let words = self.last_line_of_errors();
        let printed = self.printed.tail(TAIL);
        let mut message = how;
        for (label, text) in [("it said", words.trim()), ("the guest printed", printed.trim())] {
            if !text.is_empty() {
                message.push_str(&format!("; {label}: {text}"));
            }
        }
        self.failed(message)
    }

    fn failed(&self, said: String) -> HarnessError {
        HarnessError::Command {
            command: self.name.to_owned(),
            said,
        }
    }

    fn last_line_of_errors(&self) -> String {
        let mut words = vec![0; self.errors.metadata().map_or(0, |metadata| metadata.len() as usize)];
        // Reading from the process's own position would move that. An error of this one would hide the one that is told about.
        let _ = self.errors.read_exact_at(&mut words, 0);
        let words = String::from_utf8_lossy(&words).into_owned();
        words
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or_default()
            .to_owned()
    }
}

/// The same command under strace.
fn traced(command: &Command, file: &Path) -> Command {
    let mut under = Command::new("strace");
    under
        .args(["-f", "-qq", "-s", "8", "-o"])
        .arg(file)
        .arg("--")
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => under.env(name, value),
            None => under.env_remove(name),
        };
    }
    under
}

impl Running for Process {
    fn first_byte(&mut self) -> Result<(), HarnessError> {
        let what = "the guest's first byte";
        let found = self.wait_until(what, FIRST_PATIENCE, |fresh| (!fresh.is_empty()).then_some(1))?;
        if found.as_bytes() == [FIRST_BYTE] {
            return Ok(());
        }
        let printed = self.printed.text();
        Err(self.failed(format!("it prints something of its own: {printed:?}")))
    }

    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError> {
        let found = self.wait_until(&format!("{text:?}"), PATIENCE, |fresh| end_of(text, fresh));
        found.map(drop)
    }

    fn report(&mut self, command: &str) -> Result<Report, HarnessError> {
        let found = self.wait_until(&format!("the report on {command}"), REPORT_PATIENCE, |fresh| {
            Report::end_in(command, fresh)
        })?;
        Report::parse(found.lines().last().unwrap_or_default())
    }

    fn end(&mut self) -> Result<(), HarnessError> {
        let deadline = Instant::now() + PATIENCE;
        // The output ends with the process, also of one that prints until its end.
        let silence = loop {
            if let Err(silence) = self.read_more(deadline) {
                break silence;
            }
        };
        if !matches!(silence, Silence::End) {
            return Err(self.failure("its end", &silence));
        }
        self.child
            .wait()
            .map(drop)
            .map_err(|error| self.failed(error.to_string()))
    }

    fn pid(&mut self) -> Result<u32, HarnessError> {
        Ok(self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.traced {
            // It ends what it runs with that signal, and then itself; killed, it would leave it behind.
            let pid = rustix::process::Pid::from_child(&self.child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        } else {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::Process;
    use crate::vmm::Running;

    fn shell(script: &str) -> Box<dyn Running> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("sh", command, Stdio::null(), None, ()).unwrap()
    }

    #[test]
    fn what_a_guest_prints_is_waited_for_in_order() {
        let mut running = shell("printf S; echo; echo ok one n=1; echo noise; echo ok two n=2; echo ok one n=3");
        running.first_byte().unwrap();
        assert_eq!(running.report("one").unwrap().value("n"), "1");
        running.wait_for("nois").unwrap();
        assert_eq!(running.report("one").unwrap().value("n"), "3");
        running.end().unwrap();
    }

    #[test]
    fn who_fails_is_told_about_in_his_own_words() {
        let error = shell("echo first >&2; echo 'no KVM here' >&2; echo >&2; exit 1")
            .first_byte()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "sh failed: it ended before the guest's first byte; it said: no KVM here"
        );
    }

    #[test]
    fn a_vmms_own_words_are_no_first_byte() {
        let error = shell("echo booting").first_byte().unwrap_err();
        assert!(error.to_string().contains("something of its own"), "{error}");
    }
}
