//! What guests at rest keep doing: wake-ups and processor time.
//!
//! All guests are measured in the same seconds: they wait in hlt, and what one does hardly stands in the way of the others. A wake-up is a thread
//! that ran, seen from its end: each time it stopped running, of its own will or not, something had woken it.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{Part, resting, units::number};
use crate::{
    bench::Bench,
    crowd::{Crowd, furnished, of_kernel},
    figure::Figure,
    guests::Image,
    processes::{Activity, Process},
    results::SEPAL,
    vmm::Running,
};

static WAKEUPS: Figure = Figure::cost("idle.wakeups", "wake-ups of a guest at rest", "/s").goal(0.0);
static CPU: Figure = Figure::cost("idle.cpu", "processor time of a guest at rest", "%").goal(0.0);
static DEVICES_WAKEUPS: Figure = Figure::cost("idle.devices-wakeups", "wake-ups with six devices", "/s")
    .goal(0.0)
    .sepal_only();
static DEVICES_CPU: Figure = Figure::cost("idle.devices-cpu", "processor time with six devices", "%")
    .goal(0.0)
    .sepal_only();
static MANAGER_WAKEUPS: Figure = Figure::cost("idle.manager-wakeups", "wake-ups of the guest manager", "/s")
    .goal(0.0)
    .sepal_only();
static MANAGER_CPU: Figure = Figure::cost("idle.manager-cpu", "processor time of the guest manager", "%")
    .goal(0.0)
    .sepal_only();
static KEEPER_WAKEUPS: Figure = Figure::cost("idle.keeper-wakeups", "wake-ups of the keeper", "/s")
    .goal(0.0)
    .sepal_only();
static KEEPER_CPU: Figure = Figure::cost("idle.keeper-cpu", "processor time of the keeper", "%")
    .goal(0.0)
    .sepal_only();

/// Guests at rest.
pub(crate) const PART: Part = Part {
    name: "idle",
    about: "wake-ups and processor time of guests at rest",
    figures: &[
        &WAKEUPS,
        &CPU,
        &DEVICES_WAKEUPS,
        &DEVICES_CPU,
        &MANAGER_WAKEUPS,
        &MANAGER_CPU,
        &KEEPER_WAKEUPS,
        &KEEPER_CPU,
    ],
    run,
};

/// MiB of each guest.
const GUEST_MIB: u16 = 128;

/// Whose rest is measured.
struct Sleeper {
    name: &'static str,
    figures: [&'static Figure; 2],
    processes: Vec<Process>,
    /// Held: it ends with this.
    _guest: Option<Box<dyn Running>>,
}

impl Sleeper {
    fn of_ours(figures: [&'static Figure; 2], process: Process) -> Self {
        Self {
            name: SEPAL,
            figures,
            processes: vec![process],
            _guest: None,
        }
    }
}

fn run(bench: &mut Bench) -> Result<()> {
    let (config, _network) = furnished(GUEST_MIB, &bench.scratch)?;
    let mut crowd = Crowd::start()?;
    crowd.add(of_kernel(Image::idle(&bench.scratch)?.kernel(), GUEST_MIB)?)?;
    crowd.add(config)?;
    let mut sleepers = vec![
        Sleeper::of_ours([&WAKEUPS, &CPU], crowd.component(0)?),
        Sleeper::of_ours([&DEVICES_WAKEUPS, &DEVICES_CPU], crowd.component(1)?),
        Sleeper::of_ours([&MANAGER_WAKEUPS, &MANAGER_CPU], crowd.manager()?),
        Sleeper::of_ours([&KEEPER_WAKEUPS, &KEEPER_CPU], crowd.keeper()?),
    ];
    sleepers.extend(peers(bench)?);
    for sleeper in &sleepers {
        resting::settle(&sleeper.processes)?;
    }
    let window = Duration::from_secs(bench.scaled(10, 2));
    for _ in 0..bench.scaled(3, 1) {
        measure(bench, &sleepers, window)?;
    }
    Ok(())
}

/// A guest of each peer.
fn peers(bench: &mut Bench) -> Result<Vec<Sleeper>> {
    let image = Image::idle(&bench.scratch)?;
    let machine = resting::machine(&image, GUEST_MIB);
    let figures: [&'static Figure; 2] = [&WAKEUPS, &CPU];
    let sleepers = bench.each_peer(&figures, |vmm| {
        let (guest, process) = resting::start(vmm, &machine)?;
        Ok(Sleeper {
            name: vmm.name(),
            figures,
            processes: process.tree()?,
            _guest: Some(guest),
        })
    });
    Ok(sleepers.into_iter().map(|(_, sleeper)| sleeper).collect())
}

/// Notes what they do in so much time.
fn measure(bench: &mut Bench, sleepers: &[Sleeper], window: Duration) -> Result<()> {
    let look = || -> Result<Vec<(Activity, Instant)>> {
        let looks = sleepers.iter().map(|sleeper| {
            let activity = resting::activity(&sleeper.processes)?;
            Ok((activity, Instant::now()))
        });
        looks.collect()
    };
    let before = look()?;
    thread::sleep(window);
    let after = look()?;
    for (sleeper, (before, after)) in sleepers.iter().zip(before.into_iter().zip(after)) {
        let done = after.0 - before.0;
        let seconds = (after.1 - before.1).as_secs_f64();
        let [wakeups, cpu] = sleeper.figures;
        let results = &mut bench.results;
        results.record(wakeups, sleeper.name, None, number(done.wakeups) / seconds);
        results.record(cpu, sleeper.name, None, number(done.cpu_ns) / 1e9 / seconds * 100.0);
    }
    Ok(())
}
