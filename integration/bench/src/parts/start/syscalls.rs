//! How many system calls a start takes, as strace(1) sees them. Sepal's manager and keeper are looked at from outside while they start one guest, and
//! with them whatever they start; peers are started under it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::{MANAGER_SYSCALLS, SYSCALLS};
use crate::{
    bench::Bench,
    launcher::Launcher,
    results::SEPAL,
    vmm::{Machine, StartError, on_path, sepal_boot},
};

/// Counts them once, for everybody.
pub(super) fn measure(bench: &mut Bench, machine: &Machine<'_>) -> Result<()> {
    if on_path("strace").is_none() {
        bench.skip(&[&SYSCALLS, &MANAGER_SYSCALLS], "there is no strace");
        return Ok(());
    }
    let file = bench.scratch.join("trace");
    let mut of_managers = None;
    bench.alternate(&[&SYSCALLS], 1, |vmm| {
        let count = if vmm.name() == SEPAL {
            let (component, managers) = sepal(machine, &file)?;
            of_managers = Some(managers);
            component
        } else {
            let traced = Machine {
                trace: Some(&file),
                ..*machine
            };
            let mut running = vmm.start(&traced)?;
            running.first_byte()?;
            running.end()?;
            drop(running);
            let trace = fs::read_to_string(&file)?;
            count(before_the_byte(&trace)).values().sum()
        };
        Ok(vec![count as f64])
    })?;
    if let Some(count) = of_managers {
        bench.record(&MANAGER_SYSCALLS, count as f64);
    }
    Ok(())
}

/// System calls of a component up to its guest's first byte, and those of manager and keeper until the client had it.
fn sepal(machine: &Machine<'_>, file: &Path) -> Result<(usize, usize), StartError> {
    let mut launcher = Launcher::start(&[])?;
    // What is done only once is not part of a start.
    drop(launcher.launch(sepal_boot(machine)?)?);
    let manager = launcher.process()?.0;
    let known = [vec![manager], children(manager)?].concat();
    let tracer = Tracer::attach(&known, file)?;
    let launched = launcher.launch(sepal_boot(machine)?);
    tracer.detach()?;
    launched?;
    let trace = fs::read_to_string(file)?;
    let threads: Vec<u32> = known
        .iter()
        .map(|&pid| threads(pid))
        .collect::<Result<Vec<_>>>()?
        .concat();
    let of = |trace: &str, ours: bool| -> usize {
        let counts = count(trace);
        let wanted = counts.iter().filter(|(pid, _)| threads.contains(pid) == ours);
        wanted.map(|(_, count)| count).sum()
    };
    Ok((of(before_the_byte(&trace), false), of(&trace, true)))
}

/// The trace up to the line in which the guest's byte is written somewhere, all of it if there is none.
fn before_the_byte(trace: &str) -> &str {
    let mut end = 0;
    for line in trace.split_inclusive('\n') {
        end += line.len();
        if line.contains("write") && line.contains("\"S\"") || line.contains("send") && line.contains("\"S\"") {
            return trace.get(..end).unwrap_or(trace);
        }
    }
    trace
}

/// Calls by process or thread: a line that tells how an earlier call went on, a signal or an end is none.
fn count(trace: &str) -> HashMap<u32, usize> {
    let mut counts = HashMap::new();
    for line in trace.lines() {
        let Some((pid, what)) = line.split_once(' ') else {
            continue;
        };
        let what = what.trim_start();
        let Ok(pid) = pid.parse() else { continue };
        if !what.starts_with(['<', '+', '-']) {
            *counts.entry(pid).or_default() += 1;
        }
    }
    counts
}

/// The children of a process.
fn children(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in threads(pid)? {
        let list = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children"))?;
        children.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

fn threads(pid: u32) -> Result<Vec<u32>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        threads.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(threads)
}

/// An strace of processes that run.
struct Tracer {
    child: Child,
}

impl Tracer {
    /// Starts it; it sees all that they do when this returns.
    fn attach(processes: &[u32], file: &Path) -> Result<Self> {
        File::create(file)?;
        let mut command = Command::new("strace");
        command.args(["-f", "-s", "8", "-o"]).arg(file);
        for pid in processes {
            command.args(["-p", &pid.to_string()]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting strace")?;
        let stderr = child.stderr.take().context("strace's standard error")?;
        let tracer = Self { child };
        let mut left = processes.len();
        let mut said = String::new();
        let mut lines = BufReader::new(stderr).lines();
        while left > 0 {
            let line = lines.next().transpose()?;
            let line = line.with_context(|| format!("strace does not look at the manager: {said}"))?;
            if line.contains("attached") {
                left -= 1;
            }
            said = line;
        }
        // It says more as processes come and go, and must not wait for who reads that.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(tracer)
    }

    /// Has it let go of all; the file has everything then.
    fn detach(mut self) -> Result<()> {
        self.interrupt()?;
        // How it ends says nothing: it was interrupted.
        self.child.wait().context("waiting for strace")?;
        Ok(())
    }

    fn interrupt(&self) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), Signal::INT)?)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.interrupt();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::{before_the_byte, count};

    const TRACE: &str = "\
100   openat(AT_FDCWD, \"/dev/kvm\", O_RDWR) = 3
100   ioctl(3, KVM_RUN <unfinished ...>
101   read(4,  <unfinished ...>
100   <... ioctl resumed>, 0) = 0
100   --- SIGUSR1 {si_signo=SIGUSR1} ---
100   write(1, \"S\", 1) = 1
101   <... read resumed>\"\", 8) = 0
101   close(4) = 0
101   +++ exited with 0 +++
";

    #[test]
    fn each_call_counts_once() {
        let counts = count(TRACE);
        assert_eq!((counts[&100], counts[&101]), (3, 2));
    }

    #[test]
    fn what_comes_after_the_byte_does_not_count() {
        let counts = count(before_the_byte(TRACE));
        assert_eq!((counts[&100], counts[&101]), (3, 1));
        assert_eq!(before_the_byte("1 close(2) = 0\n"), "1 close(2) = 0\n");
    }
}
