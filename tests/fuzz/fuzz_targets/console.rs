//! The console: any output, control messages and buffers for input, and hosts that write, read and close.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::virtio::console::{Console, ConsoleConfig, PortConfig};
use sepal_devices::virtio::device::VirtioDevice;
use sepal_fuzz::driver::{Driver, RingStep, ignore_broken_pipes};

#[derive(Arbitrary, Debug)]
enum Step {
    Ring(RingStep),
    Control { id: u8, event: u8, value: bool },
    Output { port: u8, bytes: u16 },
    Buffers { port: u8, rooms: Vec<u16> },
    HostWrites { port: u8, bytes: u16 },
    HostReads { port: u8, bytes: u16 },
    HostCloses { port: u8, half: bool },
    Resize { port: u8, cols: u16, rows: u16 },
}

const PORTS: usize = 3;

fn receive_queue(port: usize) -> u8 {
    [0, 4, 6][port]
}

fn send(driver: &mut Driver<Console>, queue: u8, out: Vec<u8>) {
    driver.apply(RingStep::Request {
        queue,
        out,
        split: 0,
        rooms: Vec::new(),
    });
    driver.kick(queue.into());
}

fuzz_target!(|steps: Vec<Step>| {
    ignore_broken_pipes();
    let mut hosts: Vec<Option<UnixStream>> = Vec::new();
    let mut config = ConsoleConfig::default();
    for n in 0..PORTS {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_nonblocking(true).expect("a socket");
        hosts.push(Some(ours));
        config.ports.push(PortConfig {
            name: "port".repeat(n),
            host: Some(theirs.into()),
        });
    }
    let (device, handle) = Console::new(config).expect("an eventfd");
    let mut driver = Driver::new(device);
    let (mut written, mut read) = ([0; PORTS], [0; PORTS]);
    for step in steps {
        match step {
            Step::Ring(step) => driver.apply(step),
            Step::Control { id, event, value } => {
                let message = vec![id % 4, 0, 0, 0, event % 9, 0, value.into(), 0];
                send(&mut driver, 3, message);
            }
            Step::Output { port, bytes } => {
                let port = usize::from(port) % PORTS;
                send(&mut driver, receive_queue(port) + 1, vec![b'o'; bytes.into()]);
            }
            Step::Buffers { port, rooms } => {
                let port = usize::from(port) % PORTS;
                for room in rooms {
                    driver.apply(RingStep::Request {
                        queue: receive_queue(port),
                        out: Vec::new(),
                        split: 0,
                        rooms: vec![room],
                    });
                }
                driver.kick(receive_queue(port).into());
            }
            Step::HostWrites { port, bytes } => {
                let port = usize::from(port) % PORTS;
                if let Some(host) = &mut hosts[port] {
                    // What does not fit is not written.
                    written[port] += host.write(&vec![b'i'; bytes.into()]).unwrap_or(0) as u64;
                }
                driver.settle();
            }
            Step::HostReads { port, bytes } => {
                let port = usize::from(port) % PORTS;
                if let Some(host) = &mut hosts[port] {
                    read[port] += host.read(&mut vec![0; bytes.into()]).unwrap_or(0) as u64;
                }
                driver.settle();
            }
            Step::HostCloses { port, half } => {
                let host = &mut hosts[usize::from(port) % PORTS];
                match host {
                    Some(socket) if half => drop(socket.shutdown(std::net::Shutdown::Write)),
                    _ => *host = None,
                }
                driver.settle();
            }
            Step::Resize { port, cols, rows } => {
                let known = handle.resize(port.into(), cols, rows).is_ok();
                assert_eq!(known, usize::from(port) < PORTS);
                driver.settle();
            }
        }
    }
    driver.settle();
    driver.rig.device.stop(Instant::now());
    for port in 0..PORTS {
        let stats = handle.stats(port).expect("a port");
        if let Some(host) = &mut hosts[port] {
            let mut rest = Vec::new();
            let _ = host.read_to_end(&mut rest);
            read[port] += rest.len() as u64;
            assert_eq!(
                read[port] + stats.dropped,
                stats.from_guest,
                "output is delivered or counted"
            );
        }
        assert!(stats.to_guest <= written[port]);
    }
});
