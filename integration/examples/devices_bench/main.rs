//! Measures block and network devices with the same polling guest under Sepal, through the manager and in the jail, and under QEMU's microvm,
//! in turn, and prints both with their ratio; and the throughput of sockets and the console, which have no peer without vhost.
//!
//! ```text
//! apt-get install qemu-system-x86
//! cargo build --release --workspace --bins
//! cargo run --release -p sepal-integration --example devices_bench -- [ROUNDS] [block|net|streams]...
//! ```
//!
//! - block: a raw image of 256 MiB in the page cache, one queue; microseconds an operation, the median over the windows of a run;
//! - net: UDP datagrams over a tap in a network namespace, from the guest and to it; QEMU without vhost, as Sepal;
//! - streams: socket and console to a client of the manager.
//!
//! Every figure is the median of the rounds. Needs root, for the tap devices.

mod qemu;
mod sepal;

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    io::Write as _,
    net::UdpSocket,
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use sepal_integration::{
    HarnessError, Report,
    host::{Image, Namespace},
};

const MIB: u64 = 1 << 20;
/// Addresses on the link between guest and host.
const GUEST: &str = "10.0.0.2";
const HOST: &str = "10.0.0.1";
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Datagrams of each size.
const SIZES: [usize; 2] = [64, 1400];
const DATAGRAMS: usize = 100_000;

/// Label, and the arguments of `blk-bench`.
const BLOCK: [(&str, &str); 6] = [
    ("4k read, QD1", "4096:1:r:20000"),
    ("4k read, QD32", "4096:32:r:100000"),
    ("4k write, QD1", "4096:1:w:5000"),
    ("64k read, QD8", "65536:8:r:20000"),
    ("128k sequential read, QD8", "131072:8:sr:8000"),
    ("128k sequential write, QD8", "131072:8:sw:2000"),
];

type Failure = Box<dyn Error + Send + Sync>;

/// What a guest gets.
pub(crate) enum Device<'a> {
    /// A raw image.
    Disk(&'a Path),
    /// A tap device.
    Tap(OwnedFd),
}

/// A guest under one of the two.
pub(crate) trait Run {
    /// Waits for the guest to print this.
    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError>;
    /// Waits for the next report on a command.
    fn report(&mut self, command: &str) -> Result<Report, HarnessError>;
}

/// Starts a guest with a command line and a device.
type Start = fn(&str, Device<'_>) -> Result<Box<dyn Run>, Failure>;

const MACHINES: [(&str, Start); 2] = [("Sepal", sepal::start), ("QEMU", qemu::start)];

/// Figures by label, for each machine those of all rounds. Labels sort as they were first seen.
#[derive(Default)]
struct Figures {
    labels: Vec<String>,
    values: BTreeMap<(usize, usize), Vec<f64>>,
}

impl Figures {
    fn add(&mut self, label: &str, machine: usize, value: f64) {
        let known = self.labels.iter().position(|known| known == label);
        let index = known.unwrap_or_else(|| {
            self.labels.push(label.to_owned());
            self.labels.len() - 1
        });
        self.values.entry((index, machine)).or_default().push(value);
    }

    fn median(&self, label: usize, machine: usize) -> Option<f64> {
        let mut values = self.values.get(&(label, machine))?.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    fn print(&self, title: &str) {
        if self.labels.is_empty() {
            return;
        }
        println!("\n{title:<34} {:>10} {:>10}   Sepal/QEMU", MACHINES[0].0, MACHINES[1].0);
        for (index, label) in self.labels.iter().enumerate() {
            let show = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
            let (ours, theirs) = (self.median(index, 0), self.median(index, 1));
            let ratio = ours.zip(theirs).map(|(ours, theirs)| ours / theirs);
            println!(
                "{label:<34} {:>10} {:>10} {:>12}",
                show(ours),
                show(theirs),
                show(ratio)
            );
        }
    }
}

fn main() -> Result<(), Failure> {
    let mut arguments = env::args().skip(1).peekable();
    let rounds = match arguments.peek().map(|text| text.parse::<usize>()) {
        Some(Ok(rounds)) => {
            arguments.next();
            rounds
        }
        _ => 3,
    };
    let parts: Vec<String> = arguments.collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    let (mut block, mut net, mut streams) = (Figures::default(), Figures::default(), Figures::default());
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        if wanted("block") {
            measure_block(&mut block)?;
        }
        if wanted("net") {
            measure_net(&mut net)?;
        }
        if wanted("streams") {
            for (label, megabytes) in sepal::streams()? {
                streams.add(label, 0, megabytes);
            }
        }
    }
    block.print("block, us an operation");
    net.print("net, thousand datagrams a second");
    streams.print("streams, MB/s");
    Ok(())
}

fn measure_block(figures: &mut Figures) -> Result<(), Failure> {
    let image = Image::raw(256 * MIB)?;
    let mut file = std::fs::File::create(image.path())?;
    for _ in 0..256 {
        file.write_all(&vec![0x5a; MIB as usize])?;
    }
    file.sync_all()?;
    let commands: Vec<String> = BLOCK
        .iter()
        .map(|(_, arguments)| format!("blk-bench:{arguments}"))
        .collect();
    for (machine, (_, start)) in MACHINES.iter().enumerate() {
        let mut run = start(&commands.join(","), Device::Disk(image.path()))?;
        for (label, _) in BLOCK {
            figures.add(label, machine, run.report("blk-bench")?.number("median_us")?);
        }
    }
    Ok(())
}

fn measure_net(figures: &mut Figures) -> Result<(), Failure> {
    for (machine, (_, start)) in MACHINES.iter().enumerate() {
        let namespace = Namespace::new()?;
        let tap = namespace.tap("tap0", &format!("{HOST}/24"))?;
        let mac: Vec<String> = GUEST_MAC.iter().map(|byte| format!("{byte:02x}")).collect();
        namespace.command("ip", &["neigh", "add", GUEST, "lladdr", &mac.join(":"), "dev", "tap0"])?;
        let commands: Vec<String> = SIZES
            .iter()
            .flat_map(|size| {
                [
                    format!("net-tx:{GUEST}:{HOST}:{size}:{DATAGRAMS}"),
                    format!("net-rx:{GUEST}:{size}:{DATAGRAMS}"),
                ]
            })
            .collect();
        let mut run = start(&commands.join(","), Device::Tap(tap))?;
        for size in SIZES {
            let sent = run.report("net-tx")?.number("pps")?;
            figures.add(&format!("{size} bytes from the guest"), machine, sent / 1000.0);
            run.wait_for("waiting net-rx")?;
            let received = flood(&namespace, size, || run.report("net-rx"))?.number("pps")?;
            figures.add(&format!("{size} bytes to the guest"), machine, received / 1000.0);
        }
    }
    Ok(())
}

/// Sends datagrams to the guest for as long as `work` takes.
fn flood<T>(namespace: &Namespace, size: usize, work: impl FnOnce() -> Result<T, HarnessError>) -> Result<T, Failure> {
    let socket = namespace.enter(|| UdpSocket::bind((HOST, 0)))??;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let datagram = vec![0x55; size];
            while !over.load(Ordering::Relaxed) {
                // A full queue is no reason to stop.
                let _ = socket.send_to(&datagram, (GUEST, 9));
            }
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        Ok(result?)
    })
}
