//! A peer as a process whose standard output is the guest's serial port.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Command, Stdio},
};

use sepal_integration::{HarnessError, Report};

use super::{Running, StartError};

/// A running VMM; it is killed when this is dropped.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    output: BufReader<ChildStdout>,
    /// What the guest printed so far, for errors.
    printed: String,
    /// What must last as long as the process.
    _kept: Box<dyn std::any::Any>,
}

impl Process {
    /// Starts a command, and keeps `kept` for as long as it runs.
    pub(crate) fn spawn(
        name: &'static str,
        mut command: Command,
        kept: impl std::any::Any,
    ) -> Result<Box<dyn Running>, StartError> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let output = child
            .stdout
            .take()
            .ok_or_else(|| anyhow::anyhow!("{name} has no output"))?;
        Ok(Box::new(Self {
            name,
            child,
            output: BufReader::new(output),
            printed: String::new(),
            _kept: Box::new(kept),
        }))
    }

    fn line(&mut self, what: &str) -> Result<String, HarnessError> {
        let mut line = Vec::new();
        if self.output.read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            return Err(self.ended_before(what));
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        self.printed.push_str(&line);
        Ok(line)
    }

    fn ended_before(&self, what: &str) -> HarnessError {
        HarnessError::Failed(format!("{} ended before {what}:\n{}", self.name, self.printed))
    }
}

impl Running for Process {
    fn first_byte(&mut self) -> Result<(), HarnessError> {
        match self.output.read_exact(&mut [0]) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.ended_before("the guest's first byte")),
        }
    }

    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError> {
        while !self.line(text)?.contains(text) {}
        Ok(())
    }

    fn report(&mut self, command: &str) -> Result<Report, HarnessError> {
        loop {
            let line = self.line(command)?;
            if Report::is_about(command, line.as_bytes()) {
                return Report::parse(&line);
            }
        }
    }

    fn end(&mut self) -> Result<(), HarnessError> {
        // The output ends with the process, also of one that prints until its end.
        let _ = std::io::copy(&mut self.output, &mut std::io::sink());
        self.child
            .wait()
            .map(drop)
            .map_err(|error| HarnessError::Failed(error.to_string()))
    }

    fn pid(&mut self) -> Result<u32, HarnessError> {
        Ok(self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
