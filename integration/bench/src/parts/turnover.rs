//! How many guests a host starts and stops a second when it does nothing else: each writes a byte and ends by itself, and the next begins.
//!
//! Sepal's come from one guest manager, with several launches on their way at once; peers run as often at the same time, each with its own process. Both
//! have one more on their way than there are processors, so that none of those waits for a client.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::Part;
use crate::{
    bench::Bench,
    figure::Figure,
    guests::Image,
    launcher::Launcher,
    results::SEPAL,
    vmm::{Machine, StartError, Vmm, sepal_boot},
};

static GUESTS: Figure = Figure::rate("turnover.guests", "guests started and stopped", "/s").goal(100.0);

/// Turnover.
pub(crate) const PART: Part = Part {
    name: "turnover",
    about: "how many guests come and go in a second",
    figures: &[&GUESTS],
    run,
};

fn run(bench: &mut Bench) -> Result<()> {
    let image = Image::first_byte(&bench.scratch)?;
    let machine = Machine::new(image.kernel());
    let (rounds, during) = bench.scaled((5, Duration::from_secs(2)), (1, Duration::from_millis(50)));
    let at_once = thread::available_parallelism()?.get() + 1;
    let mut launcher = Launcher::start(&[])?;
    bench.alternate(&[&GUESTS], rounds, |vmm| {
        let rate = if vmm.name() == SEPAL {
            let boot = || sepal_boot(&machine).map_err(StartError::into_error);
            launcher.turn_over(boot, at_once, during)?
        } else {
            turn_over(vmm, &machine, at_once, during)?
        };
        Ok(vec![rate])
    })
}

/// Runs guests of a peer for so long, at most `at_once` at a time: how many there were a second.
fn turn_over(vmm: &dyn Vmm, machine: &Machine<'_>, at_once: usize, during: Duration) -> Result<f64, StartError> {
    let begun = Instant::now();
    let work = || -> Result<f64, StartError> {
        let mut count = 0.0;
        while begun.elapsed() < during {
            let mut running = vmm.start(machine)?;
            running.first_byte()?;
            running.end()?;
            count += 1.0;
        }
        Ok(count)
    };
    let count: f64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let counts = workers.into_iter().map(|worker| match worker.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        counts.sum::<Result<f64, StartError>>()
    })?;
    Ok(count / begun.elapsed().as_secs_f64())
}
