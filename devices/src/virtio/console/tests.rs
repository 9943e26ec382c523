//! Tests of the console: a fake driver on one side, sockets on the other.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::feature;
use super::super::testing::{Buffer, Rig, Used};
use super::control::event;
use super::port::receive_queue;
use super::*;

mod output;
mod rules;

const MINUTE: Duration = Duration::from_secs(60);

/// A console with its driver and the other ends of its host ends.
struct Bench {
    rig: Rig<Console>,
    handle: ConsoleHandle,
    hosts: Vec<UnixStream>,
}

impl Bench {
    /// Ports with host ends, port 0 without a name, the others "port1" and so on; the driver has accepted `features`.
    fn new(ports: usize, features: u64) -> Self {
        let mut config = ConsoleConfig::default();
        let mut hosts = Vec::new();
        for n in 0..ports {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            hosts.push(ours);
            config.ports.push(PortConfig {
                name: if n == 0 { String::new() } else { format!("port{n}") },
                host: Some(theirs.into()),
            });
        }
        let (device, handle) = Console::new(config).unwrap();
        let mut rig = Rig::new(device);
        rig.activate(features).unwrap();
        Self { rig, handle, hosts }
    }

    /// All ports are set up and open.
    fn open(ports: usize) -> Self {
        let mut bench = Self::new(ports, u64::MAX);
        bench.set_up();
        bench
    }

    fn set_up(&mut self) {
        self.control_buffers(40);
        self.say(0, event::DEVICE_READY, 1);
        for id in 0..self.hosts.len() as u32 {
            self.say(id, event::PORT_READY, 1);
            self.say(id, event::PORT_OPEN, 1);
        }
        self.heard();
    }

    fn control_buffers(&mut self, count: usize) {
        for _ in 0..count {
            self.rig.add(CONTROL_TO_DRIVER, &[Buffer::In(128)]);
        }
        self.rig.kick(CONTROL_TO_DRIVER);
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let used = self
            .rig
            .request(CONTROL_FROM_DRIVER, &[Buffer::Out(message(id, event, value, b""))]);
        assert_eq!(used.written, 0);
    }

    /// Control messages since the last call.
    fn heard(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.rig.used(CONTROL_TO_DRIVER))
            .map(|used| used.bytes[..used.written as usize].to_vec())
            .collect()
    }

    fn send(&mut self, port: usize, bytes: &[u8]) {
        let used = self.rig.request(transmit_queue(port), &[Buffer::Out(bytes.to_vec())]);
        assert_eq!(used.written, 0);
    }

    /// What the host gets until no more comes by itself.
    fn drain(&mut self, port: usize) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            self.rig.settle().unwrap();
            let bytes = read_now(&mut self.hosts[port]);
            if bytes.is_empty() {
                return all;
            }
            all.extend(bytes);
        }
    }

    /// Gives `count` buffers of `len` bytes for input.
    fn buffers(&mut self, port: usize, count: usize, len: u32) {
        for _ in 0..count {
            self.rig.add(receive_queue(port), &[Buffer::In(len)]);
        }
        self.rig.kick(receive_queue(port));
    }

    fn received(&mut self, port: usize) -> Option<Vec<u8>> {
        let Used { written, bytes, .. } = self.rig.used(receive_queue(port))?;
        Some(bytes[..written as usize].to_vec())
    }

    fn fault(&mut self, queue: u16, buffers: &[Buffer]) -> String {
        self.rig.add(queue, buffers);
        match self.rig.try_kick(queue) {
            Err(Fault::Violation(violation)) => violation.to_string(),
            other => panic!("{other:?}"),
        }
    }
}

fn message(id: u32, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
    let head = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()];
    [&head.concat(), rest].concat()
}

/// Bytes that show when some are missing or out of order.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8)
        .collect()
}

/// What can be read without waiting.
fn read_now(host: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![];
    let end = host.read_to_end(&mut bytes);
    assert!(end.is_ok() || end.unwrap_err().kind() == ErrorKind::WouldBlock);
    bytes
}

/// Writes until the socket takes no more: how many bytes.
fn write_now(host: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match host.write(&bytes[done..]) {
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    done
}

#[test]
fn ports_are_announced_and_described() {
    let mut bench = Bench::new(3, u64::MAX);
    bench.control_buffers(10);
    bench.say(0, event::DEVICE_READY, 1);
    let added: Vec<_> = (0..3).map(|id| message(id, event::DEVICE_ADD, 1, b"")).collect();
    assert_eq!(bench.heard(), added);
    bench.say(0, event::PORT_READY, 1);
    bench.say(2, event::PORT_READY, 1);
    assert_eq!(
        bench.heard(),
        [
            message(0, event::CONSOLE_PORT, 1, b""),
            message(0, event::PORT_OPEN, 1, b""),
            message(2, event::PORT_NAME, 1, b"port2"),
            message(2, event::PORT_OPEN, 1, b""),
        ]
    );
}

#[test]
fn messages_wait_for_the_drivers_buffers() {
    let mut bench = Bench::new(2, u64::MAX);
    for _ in 0..1000 {
        bench.say(0, event::DEVICE_READY, 1);
        bench.say(1, event::PORT_READY, 1);
    }
    bench.control_buffers(1);
    assert_eq!(bench.heard(), [message(0, event::DEVICE_ADD, 1, b"")]);
    bench.control_buffers(40);
    assert_eq!(
        bench.heard(),
        [
            message(1, event::PORT_NAME, 1, b"port1"),
            message(1, event::PORT_OPEN, 1, b""),
        ],
        "the port was set up after it was announced"
    );
}

#[test]
fn input_waits_until_the_guest_opens_the_port() {
    let mut bench = Bench::new(2, u64::MAX);
    bench.hosts[1].write_all(b"early").unwrap();
    bench.buffers(1, 4, 64);
    bench.say(1, event::PORT_READY, 1);
    assert_eq!(bench.received(1), None);
    assert!(!bench.handle.stats(1).unwrap().guest_open);
    bench.say(1, event::PORT_OPEN, 1);
    assert_eq!(bench.received(1).unwrap(), b"early");
    assert!(bench.handle.stats(1).unwrap().guest_open);
    bench.say(1, event::PORT_OPEN, 0);
    bench.hosts[1].write_all(b"late").unwrap();
    bench.rig.settle().unwrap();
    assert_eq!(bench.received(1), None);
    bench.say(1, event::PORT_OPEN, 1);
    assert_eq!(bench.received(1).unwrap(), b"late");
    assert_eq!(bench.handle.stats(1).unwrap().to_guest, 9);
}

#[test]
fn input_beyond_the_guests_room_makes_the_host_wait_and_is_whole() {
    let mut bench = Bench::open(1);
    let sent = pattern(3 << 20);
    let (mut written, mut received) = (0, Vec::new());
    while received.len() < sent.len() {
        written += write_now(&mut bench.hosts[0], &sent[written..]);
        bench.rig.settle().unwrap();
        assert!(written - received.len() < 1 << 20, "the socket and one chunk at most");
        bench.buffers(0, 3, 4096);
        while let Some(bytes) = bench.received(0) {
            received.extend(bytes);
        }
    }
    assert!(received == sent);
}

#[test]
fn bulk_input_is_taken_in_turns() {
    let mut bench = Bench::open(1);
    let sent = pattern(150_000);
    assert_eq!(write_now(&mut bench.hosts[0], &sent), sent.len());
    bench.buffers(0, 64, 4096);
    let received: Vec<u8> = std::iter::from_fn(|| bench.received(0)).flatten().collect();
    assert!(received == sent);
    assert!(bench.rig.bench.interrupts(0) > 0);
}

#[test]
fn a_host_that_closes_is_drained_and_reported_once() {
    let mut bench = Bench::open(2);
    let sent = pattern(100_000);
    assert_eq!(write_now(&mut bench.hosts[1], &sent), sent.len());
    bench.hosts.pop();
    bench.rig.settle().unwrap();
    let closed = DeviceEvent::HostClosed {
        device: "device port 1".into(),
    };
    assert_eq!(bench.rig.reports(), [closed]);
    assert_eq!(bench.heard(), [message(1, event::PORT_OPEN, 0, b"")]);
    let mut received = Vec::new();
    while received.len() < sent.len() {
        bench.buffers(1, 10, 4096);
        received.extend(std::iter::from_fn(|| bench.received(1)).flatten());
    }
    assert!(received == sent);
    bench.send(1, &[b'x'; 5000]);
    assert_eq!(bench.rig.reports(), []);
    let stats = bench.handle.stats(1).unwrap();
    assert_eq!((stats.dropped, stats.host_open), (0, false), "discarded, not dropped");
    bench.send(0, b"others go on");
    assert_eq!(read_now(&mut bench.hosts[0]), b"others go on");
}

#[test]
fn a_host_that_only_ends_its_input_still_gets_output() {
    let mut bench = Bench::open(1);
    bench.hosts[0].shutdown(std::net::Shutdown::Write).unwrap();
    bench.buffers(0, 2, 64);
    assert_eq!(bench.received(0), None);
    bench.send(0, b"still here");
    assert_eq!(read_now(&mut bench.hosts[0]), b"still here");
    assert_eq!(bench.rig.reports(), []);
}

#[test]
fn a_host_that_closes_while_output_waits_ends_the_waiting() {
    let mut bench = Bench::open(1);
    bench.send(0, &[b'x'; 1 << 20]);
    bench.hosts.clear();
    bench.rig.settle().unwrap();
    assert_eq!(bench.rig.reports().len(), 1);
    bench.rig.device.stop(Instant::now() + MINUTE);
}

#[test]
fn a_port_without_a_host_end_discards_and_is_closed() {
    let (device, handle) = Console::new(ConsoleConfig {
        ports: vec![PortConfig::default()],
        consoles: 1,
    })
    .unwrap();
    let rig = Rig::active(device);
    let mut bench = Bench {
        rig,
        handle,
        hosts: Vec::new(),
    };
    bench.control_buffers(4);
    bench.say(0, event::PORT_READY, 1);
    bench.say(0, event::PORT_OPEN, 1);
    assert_eq!(bench.heard(), [message(0, event::CONSOLE_PORT, 1, b"")]);
    bench.buffers(0, 1, 64);
    bench.send(0, b"nobody hears this");
    assert_eq!(bench.received(0), None);
    assert_eq!(
        bench.handle.stats(0).unwrap(),
        PortStats {
            from_guest: 17,
            guest_open: true,
            ..PortStats::default()
        }
    );
}

#[test]
fn a_size_is_told_by_message_and_by_configuration() {
    let mut bench = Bench::open(2);
    bench.handle.resize(0, 80, 25).unwrap();
    bench.handle.resize(0, 132, 43).unwrap();
    bench.handle.resize(1, 10, 10).unwrap();
    bench.rig.settle().unwrap();
    assert_eq!(bench.heard(), [message(0, event::RESIZE, 1, &[132, 0, 43, 0])]);
    assert_eq!(bench.rig.bench.config()[..4], [132, 0, 43, 0]);
    assert_eq!(bench.rig.bench.config_changes(), 1);
    bench.rig.reset();
    bench.rig.activate(u64::MAX).unwrap();
    bench.control_buffers(10);
    bench.say(0, event::PORT_READY, 1);
    assert!(bench.heard().contains(&message(0, event::RESIZE, 1, &[132, 0, 43, 0])));
    assert_eq!(
        bench.handle.resize(2, 1, 1).unwrap_err().to_string(),
        "the console has no port 2: there are 2"
    );
    assert!(bench.handle.stats(2).is_err());
}

#[test]
fn without_multiport_there_is_port_0_which_is_open() {
    let mut bench = Bench::new(3, F_SIZE);
    bench.hosts[0].write_all(b"in").unwrap();
    bench.hosts[1].write_all(b"not for now").unwrap();
    bench.buffers(0, 1, 64);
    bench.buffers(1, 1, 64);
    assert_eq!(bench.received(0).unwrap(), b"in");
    assert_eq!(bench.received(1), None);
    bench.send(0, b"out");
    assert_eq!(read_now(&mut bench.hosts[0]), b"out");
    bench.handle.resize(0, 80, 25).unwrap();
    bench.rig.settle().unwrap();
    assert_eq!(bench.rig.bench.config_changes(), 1);
    // The control queues do not exist for this driver.
    bench.rig.add(CONTROL_FROM_DRIVER, &[Buffer::Out(vec![0xff])]);
    bench.rig.kick(CONTROL_FROM_DRIVER);
    assert_eq!(bench.heard(), [] as [Vec<u8>; 0]);
}

#[test]
fn a_reset_keeps_what_came_from_the_host_and_what_goes_there() {
    let mut bench = Bench::open(1);
    // More than the driver has room for, so that some of it is in the device.
    bench.hosts[0].write_all(&pattern(10_000)).unwrap();
    bench.buffers(0, 1, 1000);
    assert_eq!(bench.received(0).unwrap(), pattern(10_000)[..1000]);
    // In the middle of a large chain, with a host that takes no more.
    bench.rig.add(1, &[Buffer::Out(vec![b'x'; 3 << 20])]);
    bench.rig.call(|device, context| device.notify(1, context)).unwrap();
    assert!(bench.rig.used(1).is_none());
    bench.rig.reset();
    bench.rig.settle().unwrap();
    assert!(!bench.handle.stats(0).unwrap().guest_open);
    let waited = read_now(&mut bench.hosts[0]);
    assert!(!waited.is_empty() && waited.iter().all(|b| *b == b'x'));
    bench.rig.settle().unwrap();
    assert!(
        !read_now(&mut bench.hosts[0]).is_empty(),
        "the ring goes out while the device rests"
    );
    bench.rig.activate(u64::MAX).unwrap();
    bench.set_up();
    bench.buffers(0, 10, 1000);
    let rest: Vec<u8> = std::iter::from_fn(|| bench.received(0)).flatten().collect();
    assert!(rest == pattern(10_000)[1000..]);
    bench.drain(0);
    bench.send(0, b"new");
    assert_eq!(
        read_now(&mut bench.hosts[0]),
        b"new",
        "nothing of the chain that was given up"
    );
}

#[test]
fn single_queues_can_be_reset() {
    let mut bench = Bench::open(2);
    bench.rig.add(5, &[Buffer::Out(vec![b'x'; 3 << 20])]);
    bench.rig.call(|device, context| device.notify(5, context)).unwrap();
    bench.rig.reset_queue(5).unwrap();
    bench.buffers(1, 2, 16);
    bench.rig.reset_queue(4).unwrap();
    bench.hosts[1].write_all(b"in").unwrap();
    bench.rig.settle().unwrap();
    assert_eq!(bench.received(1), None, "the buffers were given up");
    bench.buffers(1, 1, 16);
    assert_eq!(bench.received(1).unwrap(), b"in");
    for queue in [CONTROL_TO_DRIVER, CONTROL_FROM_DRIVER] {
        bench.rig.reset_queue(queue).unwrap();
    }
    bench.drain(1);
    bench.send(1, b"new");
    assert_eq!(read_now(&mut bench.hosts[1]), b"new");
}

#[test]
fn full_and_empty_rings_and_indices_that_wrap_around() {
    let mut bench = Bench::open(1);
    bench.rig.kick(1);
    for n in 0..1100_u32 {
        for _ in 0..60 {
            bench.rig.add(1, &[Buffer::Out(n.to_le_bytes().to_vec())]);
        }
        bench.rig.kick(1);
        assert_eq!(std::iter::from_fn(|| bench.rig.used(1)).count(), 60);
        assert_eq!(read_now(&mut bench.hosts[0]), n.to_le_bytes().repeat(60));
    }
    for n in 0..1100_u32 {
        bench.buffers(0, 60, 4);
        bench.hosts[0].write_all(&n.to_le_bytes().repeat(60)).unwrap();
        bench.rig.settle().unwrap();
        let received: Vec<u8> = std::iter::from_fn(|| bench.received(0)).flatten().collect();
        assert_eq!(received, n.to_le_bytes().repeat(60));
    }
}

#[test]
fn a_stop_brings_out_what_waits_or_counts_it() {
    let mut bench = Bench::open(2);
    bench.send(0, &[b'x'; 500_000]);
    bench.send(1, &[b'x'; 500_000]);
    let (waiting, lost) = (bench.hosts.swap_remove(0), bench.handle.stats(0).unwrap().dropped);
    let (mut slow, handle, mut device) = (waiting, bench.handle, bench.rig.device);
    let reader = std::thread::spawn(move || {
        slow.set_nonblocking(false).unwrap();
        let mut bytes = Vec::new();
        slow.read_to_end(&mut bytes).unwrap();
        bytes.len() as u64
    });
    // Port 0 is brought out; nobody reads port 1, for which no time is left.
    device.ports[0].stop(Instant::now() + MINUTE);
    device.stop(Instant::now());
    drop(device);
    assert_eq!(reader.join().unwrap(), 500_000 - lost);
    let stats = handle.stats(1).unwrap();
    assert_eq!(read_now(&mut bench.hosts[0]).len() as u64, 500_000 - stats.dropped);
}

#[test]
fn a_console_has_1_to_32_ports_with_short_names() {
    let new = |ports| Console::new(ConsoleConfig { ports, consoles: 1 });
    let error = |ports: Vec<PortConfig>| new(ports).err().unwrap().to_string();
    assert_eq!(error(vec![]), "a console of 0 ports; there can be 1 to 32");
    assert_eq!(
        error((0..33).map(|_| PortConfig::default()).collect()),
        "a console of 33 ports; there can be 1 to 32"
    );
    let long = PortConfig {
        name: "x".repeat(65),
        host: None,
    };
    assert_eq!(error(vec![long]), "the name of console port 0 is longer than 64 bytes");
    let ports = (0..32).map(|_| PortConfig::default()).collect();
    let (device, handle) = new(ports).unwrap();
    assert_eq!((device.queue_sizes().len(), handle.ports()), (66, 32));
    assert_eq!(device.config().bytes[4..8], [32, 0, 0, 0]);
    assert_eq!(device.features() & feature::TRANSPORT, 0);
}

#[test]
fn queues_belong_to_ports_as_the_standard_has_it() {
    let roles: Vec<_> = (0..8).map(Role::of).collect();
    assert_eq!(
        roles,
        [
            Role::Input(0),
            Role::Output(0),
            Role::ToDriver,
            Role::FromDriver,
            Role::Input(1),
            Role::Output(1),
            Role::Input(2),
            Role::Output(2),
        ]
    );
    for port in 0..MOST_PORTS {
        assert_eq!(Role::of(receive_queue(port)), Role::Input(port));
        assert_eq!(Role::of(transmit_queue(port)), Role::Output(port));
    }
}
