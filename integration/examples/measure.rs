//! Measures what a start and an idle guest cost, through a private guest manager and the jail:
//!
//! ```text
//! cargo build --release --workspace --bins
//! cargo run --release -p sepal-integration --example measure -- [ROUNDS [DEVICE...]]
//! ```
//!
//! - start: from sending `launch` until the guest's first byte has come back to the client, the embedded guest, 128 MiB, one vCPU;
//! - memory: what the component has beside the guest's own memory, right after the guest's start and once it has been idle for some seconds, and
//!   where the most of it is. PSS counts a page that n processes map as an nth; USS only what this process alone has;
//! - threads of the component.
//!
//! The devices are disk, net, console, rng, balloon, vsock, or `all` of them. The guest has no drivers for them: what is measured is what having them
//! costs.

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs::{self, File},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use sepal_integration::{Boot, Manager, disk};
use sepal_schema::config::device::{Balloon, Console, DiskFormat, DiskMode, Link, Network, Rng, Vsock};

const PATIENCE: Duration = Duration::from_secs(60);
/// Until a guest counts as idle.
const IDLE: Duration = Duration::from_secs(3);
const DEVICES: [&str; 6] = ["disk", "net", "console", "rng", "balloon", "vsock"];

fn main() -> Result<(), Box<dyn Error>> {
    let rounds = env::args().nth(1).map_or(Ok(50), |text| text.parse::<usize>())?;
    let mut devices: Vec<String> = env::args().skip(2).collect();
    if devices.iter().any(|device| device == "all") {
        devices = DEVICES.map(String::from).into();
    }
    let mut starts = Vec::with_capacity(rounds);
    let mut cost = None;
    let mut manager = Manager::start()?;
    for round in 0..=rounds {
        let mut peers = Vec::new();
        let boot = devices
            .iter()
            .try_fold(Boot::new(), |boot, name| with(boot, name, &mut peers))?;
        let sent = Instant::now();
        let mut guest = manager.launch(boot.memory_mib(128).cmdline("quiet"))?;
        guest.wait_for("S", PATIENCE)?;
        // The first round warms the page cache up.
        if round > 0 {
            starts.push(sent.elapsed());
        }
        guest.wait_for("sepal> ", PATIENCE)?;
        if cost.is_none() {
            let pid = guest.info()?.component_pid;
            let started = overhead(pid)?;
            thread::sleep(IDLE);
            cost = Some((started, overhead(pid)?, threads(pid)?));
        }
        manager = guest.finish()?;
    }
    starts.sort();
    let at = |share: usize| {
        starts
            .get((starts.len().saturating_sub(1)) * share / 100)
            .copied()
            .unwrap_or_default()
    };
    println!(
        "start, launch sent to first byte: min {:.2?}, median {:.2?}, p90 {:.2?} ({rounds} rounds)",
        at(0),
        at(50),
        at(90)
    );
    if let Some((started, idle, threads)) = cost {
        for (when, memory) in [("just started", &started), ("at idle", &idle)] {
            println!(
                "component {when}, without guest memory: PSS {} KiB, USS {} KiB, RSS {} KiB",
                memory.pss, memory.uss, memory.rss
            );
        }
        let mut parts: Vec<_> = idle.parts.into_iter().filter(|(_, kib)| *kib > 0).collect();
        parts.sort_by_key(|(_, kib)| std::cmp::Reverse(*kib));
        for (name, kib) in parts.into_iter().take(8) {
            println!("{kib:6} KiB {name}");
        }
        println!("{} threads: {}", threads.len(), threads.join(" "));
    }
    Ok(())
}

/// The guest with a device more. What is at the other end of it goes to `peers`, which keep it open.
fn with(boot: Boot, name: &str, peers: &mut Vec<UnixStream>) -> Result<Boot, Box<dyn Error>> {
    Ok(match name {
        "disk" => {
            let image = tempfile::NamedTempFile::new()?;
            File::set_len(image.as_file(), 64 << 20)?;
            boot.disk(disk(image.path(), DiskMode::ReadWrite, DiskFormat::Raw)?)
        }
        "net" => {
            let (ours, theirs) = UnixStream::pair()?;
            peers.push(ours);
            boot.network(Network::new(Link::Socket(theirs.into())))
        }
        "console" => boot.configure(|config| config.console = Some(Console::default())),
        "rng" => boot.configure(|config| config.rng = Some(Rng::default())),
        "balloon" => boot.configure(|config| config.balloon = Some(Balloon::default())),
        "vsock" => boot.configure(|config| config.vsock = Some(Vsock::default())),
        other => return Err(format!("{other}: not one of {}", DEVICES.join(", ")).into()),
    })
}

/// What the component has in memory, in KiB, without the mapping of the guest's memory.
#[derive(Default)]
struct Memory {
    pss: u64,
    rss: u64,
    uss: u64,
    /// PSS by mapping.
    parts: BTreeMap<String, u64>,
}

fn overhead(pid: u32) -> Result<Memory, Box<dyn Error>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut memory = Memory::default();
    let (mut mapping, mut counted) = (String::new(), true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let kib = || {
            words
                .clone()
                .next()
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or(0)
        };
        match first {
            "Pss:" if counted => {
                memory.pss += kib();
                *memory.parts.entry(mapping.clone()).or_default() += kib();
            }
            "Rss:" if counted => memory.rss += kib(),
            "Private_Clean:" | "Private_Dirty:" if counted => memory.uss += kib(),
            first if first.contains('-') && !first.ends_with(':') => {
                counted = !line.contains("memfd:");
                // Address, access, offset, device, inode, and the name, if it has one.
                let name = line.split_whitespace().nth(5).unwrap_or("anonymous");
                mapping = format!("{} {name}", words.next().unwrap_or_default());
            }
            _ => {}
        }
    }
    Ok(memory)
}

fn threads(pid: u32) -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        names.push(fs::read_to_string(task?.path().join("comm"))?.trim().to_owned());
    }
    names.sort();
    Ok(names)
}
