//! Disks: how long requests take, and how much passes.
//!
//! One queue of a raw image of 256 MiB, driven by a guest that polls, so that what is measured is the way from the doorbell to the used ring and not
//! an interrupt. Once over the host's page cache, which shows what the VMM costs; once past it (O_DIRECT), where the host's disk costs
//! most; and once over the page cache in qcow2, where the VMM looks up where things are.
//!
//! Microseconds are the median over windows of at least eight requests of a run; megabytes a second are all bytes over all time.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;

use super::{Part, drivers::Drivers};
use crate::{
    bench::Bench,
    figure::Figure,
    vmm::{Disk, Vmm},
};

const MIB: usize = 1 << 20;
/// MiB of the images.
const IMAGE_MIB: usize = 256;
/// Alignment that every disk's O_DIRECT is content with, in bytes.
const ALIGNMENT: usize = 4096;

static READ_QD1: Figure = Figure::cost("block.read-4k-qd1", "4k read, QD1", "us").goal(3.0);
static READ_QD32: Figure = Figure::cost("block.read-4k-qd32", "4k read, QD32", "us").goal(1.0);
static WRITE_QD1: Figure = Figure::cost("block.write-4k-qd1", "4k write, QD1", "us");
static READ_64K: Figure = Figure::cost("block.read-64k-qd8", "64k read, QD8", "us").goal(7.0);
static SEQ_READ: Figure = Figure::cost("block.seq-read", "128k sequential read, QD8", "us");
static SEQ_READ_RATE: Figure = Figure::rate("block.seq-read-rate", "128k sequential read, QD8", "MB/s");
static SEQ_WRITE: Figure = Figure::cost("block.seq-write", "128k sequential write, QD8", "us");
static SEQ_WRITE_RATE: Figure = Figure::rate("block.seq-write-rate", "128k sequential write, QD8", "MB/s");
static DIRECT_READ_QD1: Figure = Figure::cost("block.direct-read-4k-qd1", "4k read, QD1, O_DIRECT", "us");
static DIRECT_READ_QD32: Figure = Figure::cost("block.direct-read-4k-qd32", "4k read, QD32, O_DIRECT", "us");
static DIRECT_WRITE_QD1: Figure = Figure::cost("block.direct-write-4k-qd1", "4k write, QD1, O_DIRECT", "us");
static DIRECT_READ_64K: Figure = Figure::cost("block.direct-read-64k-qd8", "64k read, QD8, O_DIRECT", "us");
static DIRECT_SEQ_READ: Figure = Figure::rate(
    "block.direct-seq-read-rate",
    "128k sequential read, QD8, O_DIRECT",
    "MB/s",
);
static DIRECT_SEQ_WRITE: Figure = Figure::rate(
    "block.direct-seq-write-rate",
    "128k sequential write, QD8, O_DIRECT",
    "MB/s",
);
static QCOW2_READ_QD1: Figure = Figure::cost("block.qcow2-read-4k-qd1", "4k read, QD1, qcow2", "us");
static QCOW2_READ_QD32: Figure = Figure::cost("block.qcow2-read-4k-qd32", "4k read, QD32, qcow2", "us");

/// Disks.
pub(crate) const PART: Part = Part {
    name: "block",
    about: "a virtio disk: over the page cache, past it, and in qcow2",
    figures: &[
        &READ_QD1,
        &READ_QD32,
        &WRITE_QD1,
        &READ_64K,
        &SEQ_READ,
        &SEQ_READ_RATE,
        &SEQ_WRITE,
        &SEQ_WRITE_RATE,
        &DIRECT_READ_QD1,
        &DIRECT_READ_QD32,
        &DIRECT_WRITE_QD1,
        &DIRECT_READ_64K,
        &DIRECT_SEQ_READ,
        &DIRECT_SEQ_WRITE,
        &QCOW2_READ_QD1,
        &QCOW2_READ_QD32,
    ],
    run,
};

/// One run of requests.
struct Job {
    bytes: u32,
    depth: u32,
    /// Of `blk-bench`: `r`, `w`, `sr` or `sw`.
    operation: &'static str,
    /// How many; a tenth in the short form.
    count: u32,
    /// Its figure in microseconds.
    time: Option<&'static Figure>,
    /// Its figure in megabytes a second.
    rate: Option<&'static Figure>,
}

impl Job {
    const fn new(bytes: u32, depth: u32, operation: &'static str, count: u32) -> Self {
        Self {
            bytes,
            depth,
            operation,
            count,
            time: None,
            rate: None,
        }
    }

    const fn time(self, figure: &'static Figure) -> Self {
        Self {
            time: Some(figure),
            ..self
        }
    }

    const fn rate(self, figure: &'static Figure) -> Self {
        Self {
            rate: Some(figure),
            ..self
        }
    }
}

const CACHED: [Job; 6] = [
    Job::new(4096, 1, "r", 20_000).time(&READ_QD1),
    Job::new(4096, 32, "r", 100_000).time(&READ_QD32),
    Job::new(4096, 1, "w", 5_000).time(&WRITE_QD1),
    Job::new(65_536, 8, "r", 20_000).time(&READ_64K),
    Job::new(131_072, 8, "sr", 8_000).time(&SEQ_READ).rate(&SEQ_READ_RATE),
    Job::new(131_072, 8, "sw", 2_000).time(&SEQ_WRITE).rate(&SEQ_WRITE_RATE),
];

/// Fewer: a disk takes as long as a disk does.
const DIRECT: [Job; 6] = [
    Job::new(4096, 1, "r", 1_000).time(&DIRECT_READ_QD1),
    Job::new(4096, 32, "r", 8_000).time(&DIRECT_READ_QD32),
    Job::new(4096, 1, "w", 500).time(&DIRECT_WRITE_QD1),
    Job::new(65_536, 8, "r", 1_000).time(&DIRECT_READ_64K),
    Job::new(131_072, 8, "sr", 500).rate(&DIRECT_SEQ_READ),
    Job::new(131_072, 8, "sw", 500).rate(&DIRECT_SEQ_WRITE),
];

const QCOW2: [Job; 2] = [
    Job::new(4096, 1, "r", 20_000).time(&QCOW2_READ_QD1),
    Job::new(4096, 32, "r", 100_000).time(&QCOW2_READ_QD32),
];

/// The figures of jobs, in the order of their values.
fn figures(jobs: &[Job]) -> Vec<&'static Figure> {
    jobs.iter().flat_map(|job| [job.time, job.rate]).flatten().collect()
}

fn run(bench: &mut Bench) -> Result<()> {
    let drivers = Drivers::new(bench)?;
    let raw = bench.scratch.join("disk.img");
    fill(&raw, bench.short).context("making an image")?;
    let disk = |path, direct, qcow2| Disk { path, direct, qcow2 };
    measure(bench, &drivers, &CACHED, disk(&raw, false, false))?;
    match reads_directly(&raw) {
        Ok(()) => measure(bench, &drivers, &DIRECT, disk(&raw, true, false))?,
        Err(error) => bench.skip(
            &figures(&DIRECT),
            format!(
                "the file system of {} has no O_DIRECT ({error}); TMPDIR names another",
                bench.scratch.display()
            ),
        ),
    }
    let qcow2 = bench.scratch.join("disk.qcow2");
    match convert(&raw, &qcow2) {
        Ok(()) => measure(bench, &drivers, &QCOW2, disk(&qcow2, false, true))?,
        Err(error) => bench.skip(&figures(&QCOW2), format!("{error:#}")),
    }
    for path in [&raw, &qcow2] {
        // Later parts need the room more than they need a reason why it cannot be had.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

fn measure(bench: &mut Bench, drivers: &Drivers, jobs: &[Job], disk: Disk<'_>) -> Result<()> {
    let part = bench.scaled(1, 10);
    let commands: Vec<_> = jobs
        .iter()
        .map(|job| {
            let Job {
                bytes,
                depth,
                operation,
                count,
                ..
            } = job;
            format!("blk-bench:{bytes}:{depth}:{operation}:{}", count / part)
        })
        .collect();
    let cmdline = format!("run={}", commands.join(","));
    bench.alternate(&figures(jobs), bench.scaled(5, 1), |vmm: &dyn Vmm| {
        let mut machine = drivers.machine(&cmdline);
        // A VMM that is killed leaves a note in an image in qcow2, for which the next one may refuse it.
        let fresh = disk.path.with_extension("fresh");
        if disk.qcow2 {
            fs::copy(disk.path, &fresh)?;
        }
        let path = if disk.qcow2 { &fresh } else { disk.path };
        machine.disk = Some(Disk { path, ..disk });
        let mut guest = vmm.start(&machine)?;
        let mut values = Vec::new();
        for job in jobs {
            let report = guest.report("blk-bench")?;
            if job.time.is_some() {
                values.push(report.number("median_us")?);
            }
            if job.rate.is_some() {
                values.push(f64::from(job.bytes) / report.number("mean_us")?);
            }
        }
        Ok(values)
    })
}

/// A raw image without holes, all of it in the page cache, and on the disk as well but in the short form.
fn fill(path: &Path, short: bool) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let piece = vec![0x5a; MIB];
    for _ in 0..IMAGE_MIB {
        file.write_all(&piece)?;
    }
    if short { Ok(()) } else { file.sync_all() }
}

/// Whether the file can be read past the page cache.
fn reads_directly(path: &Path) -> std::io::Result<()> {
    let flags = i32::try_from(OFlags::DIRECT.bits()).map_err(std::io::Error::other)?;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let buffer = &mut vec![0; 2 * ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let aligned = buffer.get_mut(start..start + ALIGNMENT);
    file.read_exact_at(aligned.unwrap_or_default(), 0)
}

/// The same in qcow2, by QEMU's own tool, in the page cache.
fn convert(raw: &Path, qcow2: &Path) -> Result<()> {
    let arguments = ["convert", "-f", "raw", "-O", "qcow2"];
    let output = Command::new("qemu-img").args(arguments).args([raw, qcow2]).output();
    let output = output.context("qemu-img, which makes images in qcow2")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "qemu-img: {}", said.trim());
    Ok(())
}
