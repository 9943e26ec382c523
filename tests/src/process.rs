//! Processes as `/proc` tells about them (proc(5)).

use std::{collections::BTreeMap, fs, path::Path};

/// A process at the moment it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// Its name, as the kernel knows it.
    pub name: String,
    /// `R`, `S`, `Z` (ended, not yet reaped) and so on.
    pub state: char,
    /// When it started, in clock ticks since boot: tells it from a later process with the same id.
    pub start: u64,
    /// Its command line, spaces between the arguments.
    pub cmdline: String,
}

impl Process {
    /// Looks at a process; none if there is none.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // The name stands in parentheses and may hold any character.
        let (head, tail) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = tail.split_whitespace().collect();
        Some(Self {
            pid,
            name: head.split_once('(')?.1.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            start: fields.get(19)?.parse().ok()?,
            cmdline: String::from_utf8_lossy(&cmdline).replace('\0', " ").trim().to_owned(),
        })
    }

    /// True as long as this very process is there, ended but not reaped included.
    pub fn exists(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.start == self.start)
    }

    /// Sends a signal, if this very process is still there.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid.cast_signed());
        if let (true, Some(pid)) = (self.exists(), pid) {
            // It may end in between.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

/// All processes, by their ids.
pub fn all() -> BTreeMap<u32, Process> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, Process::of(pid)?))).collect()
}

/// The environment that a process was started with, spaces between the variables; empty if it is not ours to see.
pub fn environment(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// The value of a line of `/proc/PID/status`, without surrounding blanks.
///
/// # Panics
/// If the process or the line is not there.
pub fn status(pid: u32, key: &str) -> String {
    try_status(pid, key).unwrap_or_else(|| panic!("process {pid} is gone"))
}

/// The same for a process that may be gone.
///
/// # Panics
/// If the line is not there.
pub fn try_status(pid: u32, key: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(status_of(&text, key))
}

/// The value of a line of a text like `/proc/PID/status`.
///
/// # Panics
/// If the line is not there.
pub fn status_of(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

/// Threads of a process: their ids.
pub fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// What the open descriptors of a process are, by their numbers, as `/proc/PID/fd` words it.
pub fn descriptors(pid: u32) -> BTreeMap<u32, String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let target = |path: &Path| Some(fs::read_link(path).ok()?.to_string_lossy().into_owned());
    entries
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, target(&entry.path())?)))
        .collect()
}

/// The most resident memory that the process ever had, in KiB (`VmHWM`).
///
/// # Panics
/// If the process is gone.
pub fn peak_kib(pid: u32) -> u64 {
    status(pid, "VmHWM").split_whitespace().next().unwrap().parse().unwrap()
}

/// Mount points that this process sees, one line each without the numbers that change.
pub fn mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table
        .lines()
        .map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned());
    points.collect()
}
