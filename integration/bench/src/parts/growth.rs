//! How costs grow with guests, vCPUs, disks and memory: each measured at several sizes, for plots with logarithmic axes, on which a cost that grows
//! with a power of the size is a line.
//!
//! What grows faster than it should is noted, not failed: it is a finding, to be looked into.

mod exponent;

use std::{path::Path, time::Duration};

use anyhow::Result;
use sepal_schema::config::GuestConfig;

use super::{
    Part, resting,
    units::{amount, milliseconds, number},
};
use crate::{
    bench::Bench,
    crowd::{Crowd, bare, empty_disk},
    figure::Figure,
    processes::total,
    results::SEPAL,
};
use exponent::steeper;

static GUESTS_START: Figure = grown("growth.guests-start", "start of the n-th guest", "ms", "guests");
static GUESTS_LIST: Figure = grown("growth.guests-list", "list of all guests", "ms", "guests");
static GUESTS_MANAGER: Figure = grown("growth.guests-manager", "memory of the guest manager", "KiB", "guests");
static GUESTS_KEEPER: Figure = grown("growth.guests-keeper", "memory of the keeper", "KiB", "guests");
static VCPUS_START: Figure = grown("growth.vcpus-start", "start", "ms", "vCPUs");
static VCPUS_MEMORY: Figure = grown("growth.vcpus-memory", "memory of the component", "KiB", "vCPUs");
static VCPUS_THREADS: Figure = grown("growth.vcpus-threads", "threads of the component", "", "vCPUs");
static DISKS_START: Figure = grown("growth.disks-start", "start", "ms", "disks");
static DISKS_MEMORY: Figure = grown("growth.disks-memory", "memory of the component", "KiB", "disks");
static DISKS_THREADS: Figure = grown("growth.disks-threads", "threads of the component", "", "disks");
static MEMORY_START: Figure = grown("growth.memory-start", "start", "ms", "MiB of guest memory");
static MEMORY_MEMORY: Figure = grown(
    "growth.memory-memory",
    "memory of the component",
    "KiB",
    "MiB of guest memory",
);
static MEMORY_THREADS: Figure = grown(
    "growth.memory-threads",
    "threads of the component",
    "",
    "MiB of guest memory",
);

const fn grown(id: &'static str, title: &'static str, unit: &'static str, with: &'static str) -> Figure {
    Figure::cost(id, title, unit).growing(with).sepal_only()
}

/// Growth.
pub(crate) const PART: Part = Part {
    name: "growth",
    about: "how costs grow with guests, vCPUs, disks and memory",
    figures: &[
        &GUESTS_START,
        &GUESTS_LIST,
        &GUESTS_MANAGER,
        &GUESTS_KEEPER,
        &VCPUS_START,
        &VCPUS_MEMORY,
        &VCPUS_THREADS,
        &DISKS_START,
        &DISKS_MEMORY,
        &DISKS_THREADS,
        &MEMORY_START,
        &MEMORY_MEMORY,
        &MEMORY_THREADS,
    ],
    run,
};

/// The power with which each may grow: one more guest costs what the first did, a list is as long as there are guests, and memory that no guest has
/// touched costs the component nothing. At the start it costs time: KVM makes tables for all of it where it has no nested page tables.
const EXPECTED: [(&Figure, f64); 13] = [
    (&GUESTS_START, 0.0),
    (&GUESTS_LIST, 1.0),
    (&GUESTS_MANAGER, 1.0),
    (&GUESTS_KEEPER, 1.0),
    (&VCPUS_START, 1.0),
    (&VCPUS_MEMORY, 1.0),
    (&VCPUS_THREADS, 1.0),
    (&DISKS_START, 1.0),
    (&DISKS_MEMORY, 1.0),
    (&DISKS_THREADS, 1.0),
    (&MEMORY_START, 1.0),
    (&MEMORY_MEMORY, 0.0),
    (&MEMORY_THREADS, 0.0),
];
/// How much steeper a step has to be to be worth a look: others use the host, too.
const TOLERANCE: f64 = 0.3;

/// MiB of a guest whose memory does not grow.
const GUEST_MIB: u16 = 128;
/// MiB of each of many.
const SMALL_MIB: u16 = 16;
/// Largest share of the host's free memory that a guest is given, in percent: none of it is touched, but the component asks whether it is there.
const SHARE: u64 = 80;

fn run(bench: &mut Bench) -> Result<()> {
    guests(bench)?;
    let scratch = bench.scratch.clone();
    let vcpus: &[u32] = bench.scaled(&[1, 2, 4, 8, 16, 32, 64], &[1, 2, 8]);
    grow(bench, vcpus, [&VCPUS_START, &VCPUS_MEMORY, &VCPUS_THREADS], |cpus| {
        Ok(GuestConfig {
            cpus: u8::try_from(cpus)?,
            ..bare(GUEST_MIB)
        })
    })?;
    let disks: &[u32] = bench.scaled(&[1, 2, 4, 8, 16, 32], &[1, 4, 32]);
    grow(bench, disks, [&DISKS_START, &DISKS_MEMORY, &DISKS_THREADS], |disks| {
        with_disks(disks, &scratch)
    })?;
    let memory: &[u32] = bench.scaled(&[128, 256, 512, 1024, 2048, 4096, 8192, 16_384], &[128, 1024, 4096]);
    let memory = &memory[..memory.partition_point(|mib| fits(bench, *mib))];
    grow(bench, memory, [&MEMORY_START, &MEMORY_MEMORY, &MEMORY_THREADS], |mib| {
        Ok(bare(u16::try_from(mib)?))
    })?;
    note_findings(bench);
    Ok(())
}

fn with_disks(count: u32, scratch: &Path) -> Result<GuestConfig> {
    Ok(GuestConfig {
        disks: (0..count).map(|_| empty_disk(scratch)).collect::<Result<_>>()?,
        ..bare(GUEST_MIB)
    })
}

/// Whether the host can have a guest of that size now. What does not fit is noted.
fn fits(bench: &mut Bench, mib: u32) -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = crate::processes::status_field(&text, "MemAvailable").unwrap_or(u64::MAX) / 1024;
    let fits = u64::from(mib) <= free / 100 * SHARE;
    if !fits {
        let note = format!("growth: guests of {mib} MiB are left out, of the host's memory {free} MiB are free");
        bench.results.notes.push(note);
    }
    fits
}

/// A manager that gets more and more guests.
fn guests(bench: &mut Bench) -> Result<()> {
    let sizes: &[usize] = bench.scaled(&[1, 2, 5, 10, 20, 50, 100, 200], &[1, 5, 20]);
    let mut crowd = Crowd::start()?;
    // The first start of all is another matter: what it needs comes from the disk.
    crowd.add(bare(SMALL_MIB))?;
    crowd.stop_last()?;
    let (manager, keeper) = (crowd.manager()?, crowd.keeper()?);
    for size in sizes {
        while crowd.len() + 1 < *size {
            crowd.add(bare(SMALL_MIB))?;
        }
        for round in 0..bench.scaled(11, 1) {
            if round > 0 {
                crowd.stop_last()?;
            }
            let took = crowd.add(bare(SMALL_MIB))?;
            bench.record_at(&GUESTS_START, amount(*size), milliseconds(took));
        }
        for _ in 0..bench.scaled(20, 3) {
            let took = crowd.list()?;
            bench.record_at(&GUESTS_LIST, amount(*size), milliseconds(took));
        }
        resting::settle(&[manager, keeper])?;
        for (figure, process) in [(&GUESTS_MANAGER, manager), (&GUESTS_KEEPER, keeper)] {
            let memory = total(&process.mappings()?);
            bench.record_at(figure, amount(*size), number(memory.pss));
        }
    }
    Ok(())
}

/// One guest of several sizes, which take turns: start, memory of its component, threads.
fn grow(
    bench: &mut Bench,
    sizes: &[u32],
    [start, memory, threads]: [&'static Figure; 3],
    config: impl Fn(u32) -> Result<GuestConfig>,
) -> Result<()> {
    let rounds = bench.scaled(9, 1);
    let mut crowd = Crowd::start()?;
    crowd.add(bare(GUEST_MIB))?;
    crowd.stop_last()?;
    for round in 0..rounds {
        for size in sizes {
            let config = config(*size)?;
            let guest = u64::from(config.memory_mib()) * 1024;
            let took: Duration = crowd.add(config)?;
            bench.record_at(start, f64::from(*size), milliseconds(took));
            if round == 0 {
                let process = crowd.component(0)?;
                resting::settle(&[process])?;
                let beyond = total(&process.beyond_guest(guest)?);
                bench.record_at(memory, f64::from(*size), number(beyond.pss));
                bench.record_at(threads, f64::from(*size), amount(process.threads()?));
            }
            crowd.stop_last()?;
        }
    }
    Ok(())
}

/// Notes what grows faster than it should. Of times the shortest count, which others on the host have spoiled least.
fn note_findings(bench: &mut Bench) {
    for (figure, expected) in EXPECTED {
        let measured = bench.results.measured.iter();
        let points: Vec<_> = measured
            .filter(|measured| measured.figure == figure && measured.subject == SEPAL)
            .filter_map(|measured| Some((measured.at?, measured.summary.min)))
            .collect();
        for step in steeper(&points, expected, TOLERANCE) {
            let ((from, less), (to, more)) = (step.from, step.to);
            let (with, unit) = (figure.grows_with.unwrap_or_default(), figure.unit);
            bench.results.notes.push(format!(
                "{} grows faster than it should: {less:.1} {unit} at {from} {with}, {more:.1} at {to}; a power of {:.2}, of {expected} at most",
                figure.id, step.power
            ));
        }
    }
}
