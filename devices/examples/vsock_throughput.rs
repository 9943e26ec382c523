//! How fast the socket device moves bytes, without a virtual machine: a fake driver on a bench, and a thread with the host's end of a connection.
//!
//! `cargo run --release -p sepal-devices --features testing --example vsock_throughput`
//!
//! What the fake driver needs for its own side is not counted: the figures are bytes for each second that the device itself works.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use sepal_devices::virtio::testing::{Buffer, Rig};
use sepal_devices::virtio::vsock::device::{RECEIVE, TRANSMIT};
use sepal_devices::virtio::vsock::packet::{HOST_CID, Header, Op, STREAM};
use sepal_devices::virtio::vsock::{Vsock, VsockConfig};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const CID: u64 = 3;
const GUEST_PORT: u32 = 1024;
/// Bytes that each direction moves.
const TOTAL: usize = 2 << 30;
/// Bytes of a receive buffer, as Linux makes them: a page without the room that its own bookkeeping takes.
const BUFFER: u32 = 4096 - 384;

struct Bench {
    rig: Rig<Vsock>,
    host_port: u32,
    /// What the device's side said last.
    last: Header,
    received: usize,
    working: Duration,
}

impl Bench {
    /// A connection of the host, and its socket.
    fn new() -> Outcome<(Self, UnixStream)> {
        let (device, handle) = Vsock::new(VsockConfig::new(CID))?;
        let mut bench = Self {
            rig: Rig::active(device),
            host_port: 0,
            last: Header::default(),
            received: 0,
            working: Duration::ZERO,
        };
        for _ in 0..128 {
            bench.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
        }
        bench.rig.kick(RECEIVE);
        let (sender, answer) = channel();
        handle.connect(GUEST_PORT, move |answer| drop(sender.send(answer)));
        bench.rig.settle()?;
        bench.collect();
        bench.host_port = bench.last.src_port;
        bench.send(Op::Response, 0);
        bench.kick(TRANSMIT)?;
        Ok((bench, answer.recv()??.into()))
    }

    /// Makes a packet available.
    fn send(&mut self, op: Op, len: u32) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: self.host_port,
            len,
            kind: STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: 256 * 1024,
            fwd_cnt: self.received as u32,
        };
        let mut packet = header.bytes().to_vec();
        packet.resize(Header::BYTES + len as usize, 7);
        self.rig.add(TRANSMIT, &[Buffer::Out(packet)]);
    }

    fn kick(&mut self, queue: u16) -> Outcome<()> {
        let start = Instant::now();
        self.rig.try_kick(queue)?;
        self.working += start.elapsed();
        while self.rig.used(TRANSMIT).is_some() {}
        Ok(())
    }

    /// Lets the device work on what the host did; waits for that if there is nothing else.
    fn step(&mut self, wait: bool) -> Outcome<()> {
        let start = Instant::now();
        if self.rig.step()? == 0 && wait {
            self.rig.wait()?;
        } else {
            self.working += start.elapsed();
        }
        Ok(())
    }

    /// Takes what the device gave, and gives it new buffers: how many there were.
    fn collect(&mut self) -> usize {
        let mut count = 0;
        while let Some(used) = self.rig.used(RECEIVE) {
            if let Some(bytes) = used.bytes.first_chunk() {
                self.last = Header::parse(bytes);
                self.received += self.last.len as usize;
            }
            self.rig.add(RECEIVE, &[Buffer::In(BUFFER)]);
            count += 1;
        }
        count
    }

    fn report(&self, what: &str, wall: Duration) {
        let mib = (TOTAL >> 20) as f64;
        println!(
            "{what}: {:.0} MiB/s of the device's time, {:.0} MiB/s with the fake driver and the host's thread",
            mib / self.working.as_secs_f64(),
            mib / wall.as_secs_f64()
        );
    }
}

fn to_guest() -> Outcome<()> {
    let (mut bench, mut socket) = Bench::new()?;
    let host = std::thread::spawn(move || {
        let bytes = vec![1; 64 * 1024];
        for _ in 0..TOTAL / bytes.len() {
            socket.write_all(&bytes)?;
        }
        Ok::<_, std::io::Error>(socket)
    });
    let start = Instant::now();
    bench.working = Duration::ZERO;
    let mut told = 0;
    while bench.received < TOTAL {
        bench.step(true)?;
        while bench.collect() > 0 {
            // As Linux does: when less than a packet of 64 KiB would be believed to fit.
            if bench.received - told > 192 * 1024 {
                told = bench.received;
                bench.send(Op::CreditUpdate, 0);
                bench.kick(TRANSMIT)?;
            }
            bench.kick(RECEIVE)?;
        }
        if bench.last.op == Op::CreditRequest as u16 {
            bench.last.op = 0;
            told = bench.received;
            bench.send(Op::CreditUpdate, 0);
            bench.kick(TRANSMIT)?;
        }
    }
    bench.report("host -> guest", start.elapsed());
    drop(host.join());
    Ok(())
}

fn to_host(packet: u32) -> Outcome<()> {
    let (mut bench, mut socket) = Bench::new()?;
    let host = std::thread::spawn(move || {
        let mut bytes = vec![0; 256 * 1024];
        while matches!(socket.read(&mut bytes), Ok(1..)) {}
    });
    let start = Instant::now();
    bench.working = Duration::ZERO;
    let mut sent = 0;
    while sent < TOTAL {
        let held = (sent as u32).wrapping_sub(bench.last.fwd_cnt);
        let mut room = bench.last.buf_alloc.saturating_sub(held);
        let mut count = 0;
        while room >= packet && count < 64 {
            bench.send(Op::Data, packet);
            (room, sent, count) = (room - packet, sent + packet as usize, count + 1);
        }
        if count == 0 {
            bench.step(true)?;
        } else {
            bench.kick(TRANSMIT)?;
        }
        if bench.collect() > 0 {
            bench.kick(RECEIVE)?;
        }
    }
    bench.report(&format!("guest -> host, packets of {packet} bytes"), start.elapsed());
    drop(bench);
    drop(host.join());
    Ok(())
}

fn main() -> Outcome<()> {
    to_guest()?;
    to_host(64 * 1024)?;
    to_host(4096)?;
    Ok(())
}
