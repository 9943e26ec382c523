//! A network device over a tap: packets a second, bytes a second, round trips.
//!
//! The tap is in a network namespace of its own, whose end the host's network stack serves, so packets go through that and nowhere else. Nobody uses vhost,
//! which would take the VMM out of the way. The guest polls. Packets from the guest count when the host's interface has received them, those to the
//! guest when its driver has.

use std::{
    net::UdpSocket,
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use rustix::process::geteuid;
use sepal_integration::host::Namespace;
use serde_json::Value;

use super::{Part, drivers::Drivers, units::median_microseconds};
use crate::{
    bench::Bench,
    figure::Figure,
    vmm::{Running, Started, Tap, Vmm, mac},
};

static PING: Figure = Figure::cost("net.ping", "ping from the guest, 56 bytes", "us");
static ECHO: Figure = Figure::cost("net.echo", "UDP echo by the guest, 64 bytes", "us");
static SENT_64: Figure = Figure::rate("net.sent-64", "datagrams from the guest, 64 bytes", "/s");
static RECEIVED_64: Figure = Figure::rate("net.received-64", "datagrams to the guest, 64 bytes", "/s");
static SENT_1400: Figure = Figure::rate("net.sent-1400", "datagrams from the guest, 1400 bytes", "/s");
static RECEIVED_1400: Figure = Figure::rate("net.received-1400", "datagrams to the guest, 1400 bytes", "/s");
static BULK_SENT: Figure = Figure::rate("net.bulk-sent", "frames of 60 KB from the guest", "MB/s");
static BULK_RECEIVED: Figure = Figure::rate("net.bulk-received", "frames of 60 KB to the guest", "MB/s");

/// Small packets and round trips.
const PACKETS: [&Figure; 6] = [&PING, &ECHO, &SENT_64, &RECEIVED_64, &SENT_1400, &RECEIVED_1400];
/// Bytes a second.
const BULK: [&Figure; 2] = [&BULK_SENT, &BULK_RECEIVED];

/// A network device.
pub(crate) const PART: Part = Part {
    name: "net",
    about: "a virtio network device over a tap: packets and bytes a second, round trips",
    figures: &[
        &PING,
        &ECHO,
        &SENT_64,
        &RECEIVED_64,
        &SENT_1400,
        &RECEIVED_1400,
        &BULK_SENT,
        &BULK_RECEIVED,
    ],
    run,
};

const TAP: &str = "tap0";
/// Addresses on the link between guest and host.
const GUEST: &str = "10.0.0.2";
const HOST: &str = "10.0.0.1";
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// UDP ports.
const ECHO_PORT: u16 = 7;
const DISCARD_PORT: u16 = 9;
/// Bytes of the datagrams.
const SIZES: [usize; 2] = [64, 1400];
/// Bytes of the largest datagrams, and of the tap's frames then: nearly what the length of an IP packet can say.
const LARGE: usize = 60_000;
const LARGE_MTU: &str = "60100";
/// How long the guest may take to echo.
const PATIENCE: Duration = Duration::from_secs(5);

fn run(bench: &mut Bench) -> Result<()> {
    if !geteuid().is_root() {
        bench.skip(PART.figures, "making a tap device in a network namespace needs root");
        return Ok(());
    }
    if !Path::new("/dev/net/tun").exists() {
        bench.skip(PART.figures, "this host has no tap devices (/dev/net/tun)");
        return Ok(());
    }
    let drivers = Drivers::new(bench)?;
    let (trips, packets) = (bench.scaled(2000, 50), bench.scaled(50_000, 2000));
    let mut commands = vec![format!("net-ping:{GUEST}:{HOST}:{trips}"), format!("net-serve:{GUEST}")];
    for size in SIZES {
        commands.extend(both_ways(size, packets));
    }
    let cmdline = format!("run={}", commands.join(","));
    bench.alternate(&PACKETS, bench.scaled(5, 1), |vmm: &dyn Vmm| {
        let lane = Lane::new(None)?;
        lane.namespace.here(|| {
            let mut guest = lane.start(vmm, &drivers, &cmdline)?;
            let ping = guest.report("net-ping")?.number("median_us")?;
            guest.wait_for("waiting net-serve")?;
            let socket = UdpSocket::bind((HOST, 0))?;
            let mut values = vec![ping, echo(&socket, trips)?];
            // From here on it answers nothing.
            let mut before = lane.arrived()?;
            socket.send_to(&[0], (GUEST, DISCARD_PORT))?;
            guest.report("net-serve")?;
            for size in SIZES {
                let (sent, arrived) = lane.sent(guest.as_mut(), before)?;
                before = arrived;
                values.extend([sent, lane.received(guest.as_mut(), size)?]);
            }
            Ok(values)
        })?
    })?;
    let cmdline = format!("run={}", both_ways(LARGE, bench.scaled(10_000, 500)).join(","));
    bench.alternate(&BULK, bench.scaled(5, 1), |vmm: &dyn Vmm| {
        let lane = Lane::new(Some(LARGE_MTU))?;
        lane.namespace.here(|| {
            let mut guest = lane.start(vmm, &drivers, &cmdline)?;
            let (sent, _) = lane.sent(guest.as_mut(), 0.0)?;
            let received = lane.received(guest.as_mut(), LARGE)?;
            Ok([sent, received].map(|packets| packets * LARGE as f64 / 1e6).into())
        })?
    })
}

/// What the guest is told to send and to receive datagrams of a size.
fn both_ways(size: usize, count: usize) -> [String; 2] {
    [
        format!("net-tx:{GUEST}:{HOST}:{size}:{count}"),
        format!("net-rx:{GUEST}:{size}:{count}"),
    ]
}

/// A tap device in a namespace, and who takes what comes out of it.
struct Lane {
    namespace: Namespace,
    tap: OwnedFd,
    /// Nobody reads what comes here: it is dropped without an answer, which would cost the host more than the packet.
    _discard: UdpSocket,
}

impl Lane {
    fn new(mtu: Option<&str>) -> Result<Self> {
        let namespace = Namespace::new()?;
        let tap = namespace.tap(TAP, &format!("{HOST}/24"))?;
        if let Some(mtu) = mtu {
            namespace.command("ip", &["link", "set", TAP, "mtu", mtu])?;
        }
        namespace.command("ip", &["neigh", "add", GUEST, "lladdr", &mac(GUEST_MAC), "dev", TAP])?;
        let discard = namespace.enter(|| UdpSocket::bind((HOST, DISCARD_PORT)))??;
        Ok(Self {
            namespace,
            tap,
            _discard: discard,
        })
    }

    fn start(&self, vmm: &dyn Vmm, drivers: &Drivers, cmdline: &str) -> Started {
        let mut machine = drivers.machine(cmdline);
        machine.tap = Some(Tap {
            fd: &self.tap,
            mac: GUEST_MAC,
        });
        vmm.start(&machine)
    }

    /// Packets that the host's end has received so far.
    fn arrived(&self) -> Result<f64> {
        let printed = self
            .namespace
            .command("ip", &["-j", "-s", "link", "show", "dev", TAP])?;
        let links: Value = serde_json::from_slice(&printed).context("what ip says about a tap")?;
        let packets = links.pointer("/0/stats64/rx/packets").and_then(Value::as_f64);
        packets.ok_or_else(|| anyhow!("no count of packets in {links}"))
    }
    /// Packets a second that came from the guest, and how many there were in all: nothing else comes while it waits for packets to receive.
    fn sent(&self, guest: &mut dyn Running, before: f64) -> Result<(f64, f64)> {
        let report = guest.report("net-tx")?;
        guest.wait_for("waiting net-rx")?;
        let arrived = self.arrived()?;
        // There may have been a question for the host's address besides.
        let packets = report.number("packets")?.min(arrived - before);
        Ok((packets / report.number("us")? * 1e6, arrived))
    }

    /// Packets a second that came to the guest, which waits for them.
    fn received(&self, guest: &mut dyn Running, size: usize) -> Result<f64> {
        let socket = UdpSocket::bind((HOST, 0))?;
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let datagram = vec![0x55; size];
                while !over.load(Ordering::Relaxed) {
                    // A full queue is no reason to stop.
                    let _ = socket.send_to(&datagram, (GUEST, DISCARD_PORT));
                }
            });
            let report = guest.report("net-rx");
            over.store(true, Ordering::Relaxed);
            Ok(report?.number("pps")?)
        })
    }
}

/// The median of so many datagrams there and back, in microseconds.
fn echo(socket: &UdpSocket, trips: usize) -> Result<f64> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut times = Vec::with_capacity(trips);
    for _ in 0..trips {
        let start = Instant::now();
        socket.send_to(&[0x55; SIZES[0]], (GUEST, ECHO_PORT))?;
        socket.recv(&mut [0; 2 * SIZES[0]]).context("the guest's echo")?;
        times.push(start.elapsed());
    }
    median_microseconds(times)
}
