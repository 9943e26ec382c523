//! Figures: printed, never asserted. `cargo test -p sepal-runner --test jail -- --ignored --nocapture figures`.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use sepal_runner::inner::ThreadRole;
use sepal_runner::keeper::{KeeperClient, KeeperEvent};
use sepal_runner::seccomp::program_len;

use crate::harness::{Jailed, spec, status_of};
use crate::keeper::{KEEPER, next};

const STARTS: u64 = 200;

pub(crate) fn print() {
    let (mut started, mut sealed) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let spec = spec(&["wait"]);
        let start = Instant::now();
        let mut jailed = Jailed::start(spec).unwrap();
        started.push(start.elapsed());
        let report = jailed.line();
        sealed.push(start.elapsed());
        assert!(report.starts_with('['), "{report}");
        jailed.release();
    }
    show("direct: clone to exec", &mut started);
    show("direct: clone to sealed report", &mut sealed);

    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let (mut started, mut sealed) = (Vec::new(), Vec::new());
    for id in 0..STARTS {
        let (spec, control) = spec(&["wait"]);
        let start = Instant::now();
        keeper.spawn(id, spec).unwrap();
        assert!(matches!(next(&mut keeper), KeeperEvent::Started { .. }));
        started.push(start.elapsed());
        let mut control = BufReader::new(control);
        let mut report = String::new();
        control.read_line(&mut report).unwrap();
        sealed.push(start.elapsed());
        assert!(report.starts_with('['), "{report}");
        drop(control);
        assert!(matches!(next(&mut keeper), KeeperEvent::Exited { .. }));
    }
    show("keeper: request to started", &mut started);
    show("keeper: request to sealed report", &mut sealed);
    let memory = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", keeper.pid())).unwrap_or_default();
    let own: u64 = memory
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    println!(
        "figure: keeper: {} resident, {own} kB private",
        status_of(keeper.pid(), "VmRSS")
    );
    keeper.close().unwrap();

    for role in ThreadRole::ALL {
        println!("figure: {role} filter: {} instructions", program_len(role));
    }
}

fn show(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |tenths: usize| times[times.len() * tenths / 10];
    println!(
        "figure: {what}: median {:?}, 10th {:?}, 90th percentile {:?}",
        at(5),
        at(1),
        at(9)
    );
}
