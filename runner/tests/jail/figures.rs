//! Figures: printed, never asserted. `cargo test -p sepal-runner --test jail -- --ignored --nocapture`.

use std::time::Instant;

use sepal_runner::inner::ThreadRole;
use sepal_runner::seccomp::program_len;

use crate::harness::{Jailed, spec};

pub(crate) fn print() {
    let mut started = Vec::new();
    let mut sealed = Vec::new();
    for _ in 0..200 {
        let spec = spec(&["wait"]);
        let start = Instant::now();
        let mut jailed = Jailed::start(spec).unwrap();
        started.push(start.elapsed());
        let report = jailed.line();
        sealed.push(start.elapsed());
        assert!(report.starts_with('['), "{report}");
        jailed.release();
    }
    for (what, times) in [("clone to exec", &mut started), ("clone to sealed report", &mut sealed)] {
        times.sort();
        println!(
            "figure: {what}: median {:?}, 10th {:?}, 90th percentile {:?}",
            times[times.len() / 2],
            times[times.len() / 10],
            times[times.len() * 9 / 10]
        );
    }
    for role in ThreadRole::ALL {
        println!("figure: {role} filter: {} instructions", program_len(role).unwrap());
    }
}
