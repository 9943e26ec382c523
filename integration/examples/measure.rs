//! Measures what a start and an idle guest cost, through a private guest manager and the jail:
//!
//! ```text
//! cargo build --release --workspace --bins
//! cargo run --release -p sepal-integration --example measure -- [ROUNDS]
//! ```
//!
//! - start: from sending `launch` until the guest's first byte has come back to the client, the embedded guest, 128 MiB, one vCPU;
//! - memory: the component's PSS without the guest's own memory, while the guest waits at its prompt.

use std::{
    env,
    error::Error,
    fs,
    time::{Duration, Instant},
};

use sepal_integration::{Boot, Guest, Manager};

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let rounds = env::args().nth(1).map_or(Ok(50), |text| text.parse::<usize>())?;
    let mut starts = Vec::with_capacity(rounds);
    let mut memory = None;
    let mut manager = Manager::start()?;
    for round in 0..=rounds {
        let sent = Instant::now();
        let mut guest = manager.launch(Boot::new().memory_mib(128).cmdline("quiet"))?;
        guest.wait_for("S", PATIENCE)?;
        // The first round warms the page cache up.
        if round > 0 {
            starts.push(sent.elapsed());
        }
        guest.wait_for("sepal> ", PATIENCE)?;
        if memory.is_none() {
            memory = Some(overhead(&mut guest)?);
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
    if let Some((pss, rss)) = memory {
        println!("component at idle, without guest memory: PSS {pss} KiB, RSS {rss} KiB");
    }
    Ok(())
}

/// PSS and RSS of the component in KiB, without the mapping of the guest's memory.
fn overhead(guest: &mut Guest) -> Result<(u64, u64), Box<dyn Error>> {
    let pid = guest.info()?.component_pid;
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut pss, mut rss, mut counted) = (0, 0, true);
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
            "Pss:" if counted => pss += kib(),
            "Rss:" if counted => rss += kib(),
            first if first.contains('-') && !first.ends_with(':') => counted = !line.contains("memfd:"),
            _ => {}
        }
    }
    Ok((pss, rss))
}
