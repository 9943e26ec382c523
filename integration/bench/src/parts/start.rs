//! How fast a guest is there, and gone again.
//!
//! - cold: Sepal from sending `launch` until the guest's first byte has come back, through a guest manager that runs, in the jail; peers, which have no
//!   manager, from starting their process;
//! - pooled: the same with a manager that keeps components ready, each of which is there before it is timed;
//! - component: the component alone, in its jail, without a manager;
//! - teardown: from asking until the process is gone, and the manager has said so;
//! - syscalls: how many of them a start takes (`syscalls`).
//!
//! The guest writes its byte by the first instructions that it has, on a machine of one vCPU and 128 MiB.

mod component;
mod syscalls;

use std::{
    fs::File,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Signal, pidfd_send_signal},
};
use sepal_integration::Boot;

use super::{Part, units::milliseconds};
use crate::{
    bench::Bench,
    crowd::{furnish, of_kernel},
    figure::Figure,
    guests::Image,
    launcher::{Launcher, process},
    results::SEPAL,
    vmm::{Disk, Machine, StartError, Vmm, sepal_boot},
};

static COLD: Figure = Figure::cost("start.cold", "create sent to the guest's first byte", "ms").goal(2.8);
static POOLED: Figure = Figure::cost("start.pooled", "the same, from a pool", "ms")
    .goal(1.5)
    .sepal_only();
static COMPONENT: Figure =
    Figure::cost("start.component", "component alone, jailed, to the first byte", "ms").sepal_only();
static DEVICES: Figure = Figure::cost("start.devices", "cold, with a disk and more devices", "ms");
static TEARDOWN: Figure = Figure::cost("start.teardown", "stop asked to the process's end", "ms");
static SYSCALLS: Figure = Figure::cost("start.syscalls", "system calls of the VMM to the first byte", "");
static MANAGER_SYSCALLS: Figure = Figure::cost(
    "start.manager-syscalls",
    "system calls of manager and keeper for it",
    "",
)
.sepal_only();

/// Start.
pub(crate) const PART: Part = Part {
    name: "start",
    about: "how fast a guest is there, and gone again",
    figures: &[
        &COLD,
        &POOLED,
        &COMPONENT,
        &DEVICES,
        &TEARDOWN,
        &SYSCALLS,
        &MANAGER_SYSCALLS,
    ],
    run,
};

/// Components that a pool keeps.
const POOL: &str = "2";
/// How long a pool has to fill up again, which nothing tells: far more than one start takes.
const REFILL: Duration = Duration::from_millis(50);
/// Bytes of the peers' disk.
const DISK: u64 = 64 << 20;
/// MiB of each guest with devices.
const GUEST_MIB: u16 = 128;

fn run(bench: &mut Bench) -> Result<()> {
    let folder = bench.scratch.clone();
    let (spoken, idle) = (Image::first_byte(&folder)?, Image::idle(&folder)?);
    cold(bench, &Machine::new(spoken.kernel()), &Machine::new(idle.kernel()))?;
    let rounds = bench.scaled(30, 1);
    for value in component::measure(&Machine::new(spoken.kernel()), rounds)? {
        bench.record(&COMPONENT, value);
    }
    devices(bench, &spoken)?;
    syscalls::measure(bench, &Machine::new(spoken.kernel()))?;
    pooled(bench, &Machine::new(spoken.kernel()))
}

/// Start and end, with the guest that waits: what ends it is who asked.
fn cold(bench: &mut Bench, spoken: &Machine<'_>, idle: &Machine<'_>) -> Result<()> {
    let rounds = bench.scaled(30, 1);
    let mut launcher = Launcher::start(&[])?;
    bench.alternate(&[&COLD], rounds, |vmm| {
        let took = if vmm.name() == SEPAL {
            launcher.launch(sepal_boot(spoken)?)?.0
        } else {
            first_byte(vmm, spoken)?
        };
        Ok(vec![milliseconds(took)])
    })?;
    bench.alternate(&[&TEARDOWN], rounds, |vmm| {
        let took = if vmm.name() == SEPAL {
            let (_, launched) = launcher.launch(sepal_boot(idle)?)?;
            launcher.stop(&launched)?
        } else {
            killed(vmm, idle)?
        };
        Ok(vec![milliseconds(took)])
    })
}

/// Starts, each of which finds a component that waits.
fn pooled(bench: &mut Bench, spoken: &Machine<'_>) -> Result<()> {
    let rounds = bench.scaled(30, 1);
    let mut launcher = Launcher::start(&["--pool", POOL]).context("a manager with a pool")?;
    for round in 0..=rounds {
        std::thread::sleep(REFILL);
        let (took, launched) = launcher.launch(sepal_boot(spoken).map_err(StartError::into_error)?)?;
        launcher.end(&launched)?;
        if round > 0 {
            bench.record(&POOLED, milliseconds(took));
        }
    }
    Ok(())
}

/// Starts with a disk, for all; Sepal with a network device, a console, a source of entropy, a balloon and vsock besides.
fn devices(bench: &mut Bench, spoken: &Image) -> Result<()> {
    let rounds = bench.scaled(20, 1);
    let scratch = bench.scratch.clone();
    let disk = scratch.join("start.disk");
    File::create(&disk)?.set_len(DISK)?;
    let machine = Machine {
        memory_mib: GUEST_MIB.into(),
        disk: Some(Disk {
            path: &disk,
            direct: false,
            qcow2: false,
        }),
        ..Machine::new(spoken.kernel())
    };
    let mut launcher = Launcher::start(&[])?;
    let mut networks = Vec::new();
    bench.alternate(&[&DEVICES], rounds, |vmm| {
        let took = if vmm.name() == SEPAL {
            // A disk of its own each time: the one before is let go of only when the guest is long gone.
            let (config, network) = furnish(of_kernel(spoken.kernel(), GUEST_MIB)?, &scratch)?;
            networks.push(network);
            launcher.launch(Boot::of(config))?.0
        } else {
            first_byte(vmm, &machine)?
        };
        Ok(vec![milliseconds(took)])
    })
}

/// From starting a process until its guest's first byte.
fn first_byte(vmm: &dyn Vmm, machine: &Machine<'_>) -> Result<Duration, StartError> {
    let begun = Instant::now();
    let mut running = vmm.start(machine)?;
    running.first_byte()?;
    Ok(begun.elapsed())
}

/// From killing a process until it has ended.
fn killed(vmm: &dyn Vmm, machine: &Machine<'_>) -> Result<Duration, StartError> {
    let mut running = vmm.start(machine)?;
    running.first_byte()?;
    let process = process(running.pid()?)?;
    let asked = Instant::now();
    pidfd_send_signal(&process, Signal::KILL)?;
    poll(&mut [PollFd::new(&process, PollFlags::IN)], None)?;
    Ok(asked.elapsed())
}
