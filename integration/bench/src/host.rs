//! The host, as far as a reader has to know it to judge the figures.

use std::{fs, process::Command, thread};

use serde::{Deserialize, Serialize};

/// The host.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Host {
    /// The processor's name.
    pub(crate) processor: String,
    /// Processors that may be used.
    pub(crate) processors: usize,
    /// MiB of memory.
    pub(crate) memory_mib: u64,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// What runs guests: `vmx`, `svm`, or `no hardware virtualization`.
    pub(crate) virtualization: String,
    /// Load average of the last minute, before the run.
    pub(crate) load: f64,
    /// How Sepal was built: `release` or `debug`.
    pub(crate) build: String,
    /// The commit that it was built from, `+` if files differ from it; empty outside a repository.
    pub(crate) commit: String,
    /// When the run began, in UTC.
    pub(crate) when: String,
}

/// What a command prints; empty if there is none of it.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok();
    let printed = output
        .filter(|output| output.status.success())
        .map(|output| output.stdout);
    String::from_utf8_lossy(&printed.unwrap_or_default()).trim().to_owned()
}

impl Host {
    /// Looks.
    pub(crate) fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = processor.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':'))
                .map_or(String::new(), |(_, value)| value.trim().to_owned())
        };
        let flags = field("flags");
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        let memory = read("/proc/meminfo");
        let kib = memory.lines().find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        });
        Self {
            processor: field("model name"),
            processors: thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            virtualization: if has("vmx") {
                "vmx"
            } else if has("svm") {
                "svm"
            } else {
                "no hardware virtualization"
            }
            .to_owned(),
            load: read("/proc/loadavg")
                .split_whitespace()
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
            build: if cfg!(debug_assertions) { "debug" } else { "release" }.to_owned(),
            commit: said(
                "git",
                &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty=+"],
            ),
            when: said("date", &["-u", "+%Y-%m-%d %H:%M"]),
        }
    }
}
