//! How long the serial port takes: from a guest's write until the byte is in the host reader's hands, and what a write costs the vCPU.
//!
//! Beside the port's own way (doorbell, thread, write) it measures the two ways that were weighed against it: a write straight from the
//! vCPU's thread for each byte, and the bare wake-up of a thread by an eventfd. `cargo run -p sepal-devices --example serial_latency`.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sepal_devices::bus::BusDevice;
use sepal_devices::dispatch::{DeviceEvent, DeviceReporter, DispatchLoop};
use sepal_devices::interrupt::InterruptLine;
use sepal_devices::legacy::serial::{DEFAULT_OUTPUT_CAPACITY, Serial};
use vmm_sys_util::eventfd::EventFd;

struct Nowhere;

impl InterruptLine for Nowhere {
    fn set(&self, _: bool) {}
}

impl DeviceReporter for Nowhere {
    fn report(&self, event: DeviceEvent) {
        println!("{event:?}");
    }
}

const ROUNDS: usize = 500;

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    if let (Some(median), Some(p99)) = (times.get(times.len() / 2), times.get(times.len() * 99 / 100)) {
        println!(
            "{what}: median {:.1} us, 99th percentile {:.1} us",
            median.as_secs_f64() * 1e6,
            p99.as_secs_f64() * 1e6
        );
    }
}

/// Notes when each read of the host end returned, and how much it gave.
fn reader(mut host: UnixStream) -> Receiver<(Instant, usize)> {
    let (sender, reads) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(n @ 1..) = host.read(&mut buffer) {
            if sender.send((Instant::now(), n)).is_err() {
                return;
            }
        }
    });
    reads
}

/// Sends single bytes after silence; the time until each was read, and the time that sending took.
fn first_bytes(
    reads: &Receiver<(Instant, usize)>,
    mut send: impl FnMut() -> std::io::Result<()>,
) -> Result<(Vec<Duration>, Vec<Duration>), Box<dyn Error>> {
    let (mut arrived, mut took) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        sleep(Duration::from_millis(4));
        let start = Instant::now();
        send()?;
        took.push(start.elapsed());
        arrived.push(reads.recv()?.0 - start);
    }
    Ok((arrived, took))
}

fn main() -> Result<(), Box<dyn Error>> {
    let (host, end) = UnixStream::pair()?;
    let reads = reader(host);
    let port = Serial::new(Arc::new(Nowhere), DEFAULT_OUTPUT_CAPACITY)?;
    let device = port.host_loop(end.into())?;
    let running = DispatchLoop::spawn("serial", || Ok::<_, std::io::Error>(()), device, Arc::new(Nowhere))?;

    let (arrived, took) = first_bytes(&reads, || {
        port.write(0, b"x");
        Ok(())
    })?;
    print("first byte, through the loop, until read", arrived);
    print("first byte, through the loop, vCPU's own time", took);

    let (host, mut end) = UnixStream::pair()?;
    let direct = reader(host);
    let (arrived, took) = first_bytes(&direct, || end.write_all(b"x"))?;
    print("first byte, written by the vCPU, until read", arrived);
    print("first byte, written by the vCPU, vCPU's own time", took);

    let (ping, woken) = (EventFd::new(0)?, EventFd::new(0)?);
    let (ping_there, woken_there) = (ping.try_clone()?, woken.try_clone()?);
    std::thread::spawn(move || while ping_there.read().is_ok() && woken_there.write(1).is_ok() {});
    let mut round_trips = vec![];
    for _ in 0..ROUNDS {
        sleep(Duration::from_millis(4));
        let start = Instant::now();
        ping.write(1)?;
        woken.read()?;
        round_trips.push(start.elapsed() / 2);
    }
    print("wake-up of a thread by an eventfd", round_trips);

    // A guest that prints at the pace of its exits: a byte every 10 us.
    let (count, start) = (20_000, Instant::now());
    let mut spent = Duration::ZERO;
    for i in 1..=count {
        while start.elapsed() < i * Duration::from_micros(10) {}
        let write = Instant::now();
        port.write(0, b"y");
        spent += write.elapsed();
    }
    let (mut bytes, mut wakes) = (0, 0);
    while bytes < count as usize {
        bytes += reads.recv()?.1;
        wakes += 1;
    }
    println!(
        "a byte every 10 us: {:.2} us of the vCPU's time a byte, {:.0} bytes a write, {} dropped",
        (spent / count).as_secs_f64() * 1e6,
        f64::from(count) / f64::from(wakes),
        port.dropped()
    );

    let (start, mut spent) = (Instant::now(), Duration::ZERO);
    for _ in 0..count {
        let write = Instant::now();
        end.write_all(b"y")?;
        spent += write.elapsed();
    }
    println!(
        "a byte at a time written by the vCPU: {:.2} us of its time a byte ({:.1} ms in all)",
        (spent / count).as_secs_f64() * 1e6,
        start.elapsed().as_secs_f64() * 1e3
    );

    running.stop(Duration::from_secs(1))?;
    Ok(())
}
