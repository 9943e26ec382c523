//! QEMU's monitor, for what its guests are asked to do while they run.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
};

use sepal_integration::{HarnessError, Report};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Running;

/// Where a QEMU's monitor listens.
pub(crate) struct Monitor {
    folder: TempDir,
}

impl Monitor {
    pub(crate) fn new() -> std::io::Result<Self> {
        let folder = tempfile::tempdir()?;
        Ok(Self { folder })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// What QEMU has to be told.
    pub(crate) fn arguments(&self) -> [String; 2] {
        [
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", self.socket().display()),
        ]
    }

    /// A guest that can be asked for things through this.
    pub(crate) fn of(self, running: Box<dyn Running>, memory_mib: u32) -> Monitored {
        Monitored {
            running,
            monitor: self,
            memory_mib,
        }
    }
}

/// A QEMU whose monitor is used.
pub(crate) struct Monitored {
    running: Box<dyn Running>,
    monitor: Monitor,
    memory_mib: u32,
}

impl Monitored {
    /// Connects, and has one command carried out. The guest has printed something by now: QEMU listens.
    fn execute(&self, command: &Value) -> std::io::Result<()> {
        let stream = UnixStream::connect(self.monitor.socket())?;
        let mut answers = BufReader::new(stream.try_clone()?).lines();
        // It greets first, and takes nothing before its capabilities are agreed on.
        answers.next().transpose()?;
        for command in [&json!({"execute": "qmp_capabilities"}), command] {
            writeln!(&stream, "{command}")?;
            loop {
                let answer = answers.next().transpose()?.unwrap_or_default();
                let answer: Value = serde_json::from_str(&answer)?;
                if answer.get("return").is_some() {
                    break;
                }
                // Events come between.
                if answer.get("event").is_none() {
                    return Err(std::io::Error::other(answer.to_string()));
                }
            }
        }
        Ok(())
    }
}

impl Running for Monitored {
    fn first_byte(&mut self) -> Result<(), HarnessError> {
        self.running.first_byte()
    }

    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError> {
        self.running.wait_for(text)
    }

    fn report(&mut self, command: &str) -> Result<Report, HarnessError> {
        self.running.report(command)
    }

    fn end(&mut self) -> Result<(), HarnessError> {
        self.running.end()
    }

    fn pid(&mut self) -> Result<u32, HarnessError> {
        self.running.pid()
    }

    fn request_balloon(&mut self, pages: u32) -> Result<(), HarnessError> {
        let left = (u64::from(self.memory_mib) << 20) - u64::from(pages) * 4096;
        let command = json!({"execute": "balloon", "arguments": {"value": left}});
        self.execute(&command)
            .map_err(|error| HarnessError::Failed(format!("QEMU's monitor: {error}")))
    }
}
