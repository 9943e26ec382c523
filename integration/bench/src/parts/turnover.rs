//! How many guests a host starts and stops a second when it does nothing else: each writes a byte and ends by itself, and the next begins.
//!
//! Sepal's come from one guest manager, with several launches on their way at once; peers run as often at the same time, each with its own process. Both
//! have one more on their way than there are processors, so that none of those waits for a client.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
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
    let (rounds, guests) = (bench.scaled(7, 1), bench.scaled(200, 4));
    let at_once = thread::available_parallelism()?.get() + 1;
    let mut launcher = Launcher::start(&[])?;
    bench.alternate(&[&GUESTS], rounds, |vmm| {
        let took = if vmm.name() == SEPAL {
            let boots = (0..guests).map(|_| sepal_boot(&machine)).collect::<Result<_, _>>()?;
            launcher.turn_over(boots, at_once)?
        } else {
            turn_over(vmm, &machine, guests, at_once)?
        };
        Ok(vec![guests as f64 / took.as_secs_f64()])
    })
}

/// Runs so many guests of a peer, at most `at_once` at a time.
fn turn_over(vmm: &dyn Vmm, machine: &Machine<'_>, guests: usize, at_once: usize) -> Result<Duration, StartError> {
    let begun = Instant::now();
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), StartError> {
        while next.fetch_add(1, Ordering::Relaxed) < guests {
            let mut running = vmm.start(machine)?;
            running.first_byte()?;
            running.end()?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(outcome) => outcome?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok::<(), StartError>(())
    })?;
    Ok(begun.elapsed())
}
