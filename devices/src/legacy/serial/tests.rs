//! Tests of the serial port: a driver on one side, a host on the other, with the real loop or step by step.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Condvar;
use std::time::Instant;

use proptest::prelude::*;

use super::super::uart::offset;
use super::*;
use crate::dispatch::stepper::{Reports, Stepper};
use crate::dispatch::{DeviceEvent, DispatchDevice, DispatchLoop};
use crate::stream::Life;

/// An interrupt line that a driver can wait on.
#[derive(Default)]
struct Line {
    /// Level, and rises so far.
    state: Mutex<(bool, u64)>,
    changed: Condvar,
}

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        let mut state = self.state.lock().unwrap();
        state.1 += u64::from(asserted && !state.0);
        state.0 = asserted;
        self.changed.notify_all();
    }
}

impl Line {
    fn rises(&self) -> u64 {
        self.state.lock().unwrap().1
    }

    /// Waits for an edge after `seen` edges; how many there were.
    fn wait_edge(&self, seen: u64) -> u64 {
        self.changed
            .wait_while(self.state.lock().unwrap(), |state| state.1 == seen)
            .unwrap()
            .1
    }
}

/// The guest's driver.
struct Guest {
    port: Arc<Serial>,
    line: Arc<Line>,
}

impl Guest {
    fn new(capacity: usize) -> Self {
        let line = Arc::new(Line::default());
        let guest = Self {
            port: Serial::new(line.clone(), capacity).unwrap(),
            line,
        };
        // A driver is there: data terminal ready, request to send, OUT2.
        guest.set(offset::MCR, 0x0b);
        guest
    }

    fn set(&self, register: u8, value: u8) {
        self.port.write(register.into(), &[value]);
    }

    fn get(&self, register: u8) -> u8 {
        let mut data = [0];
        self.port.read(register.into(), &mut data);
        data[0]
    }

    fn send(&self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.set(offset::DATA, *byte));
    }

    /// Reads what is there, at most `max` bytes, as a driver does.
    fn receive(&self, max: usize) -> Vec<u8> {
        let mut bytes = vec![];
        while bytes.len() < max && self.get(offset::LSR) & 1 != 0 {
            bytes.push(self.get(offset::DATA));
        }
        bytes
    }

    /// FIFOs on, receive interrupt on.
    fn enable(&self) {
        self.set(offset::IIR_FCR, 0x81);
        self.set(offset::IER, 0x01);
    }

    fn spawn(&self, host: impl Into<OwnedFd>) -> (DispatchLoop, Arc<Reports>) {
        let reports = Arc::new(Reports::default());
        let device = self.port.host_loop(host.into()).unwrap();
        (
            DispatchLoop::spawn("serial", || Ok::<_, String>(()), device, reports.clone()).unwrap(),
            reports,
        )
    }

    fn step(&self, host: impl Into<OwnedFd>) -> Stepper<SerialLoop> {
        Stepper::start(self.port.host_loop(host.into()).unwrap()).unwrap()
    }
}

/// Bytes that show when some are missing or out of order.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8)
        .collect()
}

fn read_exact(host: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    host.read_exact(&mut bytes).unwrap();
    bytes
}

/// What can be read without waiting.
fn read_now(host: &mut UnixStream) -> Vec<u8> {
    host.set_nonblocking(true).unwrap();
    let mut bytes = vec![];
    let end = host.read_to_end(&mut bytes);
    assert!(end.is_ok() || end.unwrap_err().kind() == ErrorKind::WouldBlock);
    host.set_nonblocking(false).unwrap();
    bytes
}

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn ten_megabytes_arrive_intact_while_the_host_reads() {
    let guest = Guest::new(DEFAULT_OUTPUT_CAPACITY);
    let (mut host, end) = UnixStream::pair().unwrap();
    let (running, _) = guest.spawn(end);
    let sent = pattern(10_000_000);
    let mut received = vec![];
    for block in sent.chunks(DEFAULT_OUTPUT_CAPACITY) {
        guest.send(block);
        received.extend(read_exact(&mut host, block.len()));
    }
    assert!(received == sent);
    assert_eq!(guest.port.dropped(), 0);
    running.stop(MINUTE).unwrap();
}

#[test]
fn a_host_that_does_not_read_costs_old_output_and_never_the_guests_time() {
    let guest = Guest::new(DEFAULT_OUTPUT_CAPACITY);
    let (mut host, end) = UnixStream::pair().unwrap();
    let (running, _) = guest.spawn(end);
    let sent = pattern(2_000_000);
    guest.send(&sent[..1000]);
    assert_eq!(read_exact(&mut host, 1000), sent[..1000]);
    // Nobody reads: this returns all the same.
    guest.send(&sent[1000..]);
    let dropped = guest.port.dropped() as usize;
    assert!(dropped > 0);
    let received = read_exact(&mut host, sent.len() - 1000 - dropped);
    assert!(
        received.ends_with(&sent[sent.len() - DEFAULT_OUTPUT_CAPACITY / 2..]),
        "the newest output is what is kept"
    );
    running.stop(MINUTE).unwrap();
    assert_eq!(guest.port.dropped() as usize, dropped);
    assert_eq!(host.read(&mut [0]).unwrap(), 0, "nothing more");
}

#[test]
fn the_first_byte_rings_and_the_next_ones_go_together() {
    let guest = Guest::new(1024);
    let (mut host, end) = UnixStream::pair().unwrap();
    let mut stepper = guest.step(end);
    stepper.settle();
    guest.send(b"a");
    assert_eq!(stepper.step(), 1, "the doorbell");
    assert_eq!(read_now(&mut host), b"a");
    guest.send(b"bcd");
    assert!(guest.port.doorbell.read().is_err(), "not rung: the loop's timer runs");
    stepper.wait();
    assert_eq!(read_now(&mut host), b"bcd");
    // A quarter of the ring is too much to wait for the timer.
    guest.send(&[b'x'; 256]);
    assert!(guest.port.doorbell.read().is_ok());
    while guest.port.state().output != Output::Asleep {
        stepper.wait();
    }
    assert_eq!(read_now(&mut host), [b'x'; 256]);
    assert_eq!(stepper.step(), 0, "asleep");
    guest.send(b"z");
    assert_eq!(stepper.step(), 1);
    assert_eq!(read_now(&mut host), b"z");
}

#[test]
fn output_from_before_the_loop_is_kept() {
    let guest = Guest::new(4);
    guest.send(b"lost last");
    assert_eq!(guest.port.dropped(), 5);
    let (mut host, end) = UnixStream::pair().unwrap();
    let _stepper = guest.step(end);
    assert_eq!(read_now(&mut host), b"last");
}

#[test]
fn a_port_without_room_for_output_drops_it() {
    let guest = Guest::new(0);
    guest.send(b"abc");
    assert_eq!(guest.port.dropped(), 3);
}

#[test]
fn a_megabyte_of_input_arrives_intact_by_interrupts() {
    let guest = Guest::new(16);
    let (mut host, end) = UnixStream::pair().unwrap();
    let (running, _) = guest.spawn(end);
    guest.enable();
    let sent = pattern(1_000_000);
    let copy = sent.clone();
    let writer = std::thread::spawn(move || {
        host.write_all(&copy).unwrap();
        host
    });
    let (mut received, mut seen) = (vec![], 0);
    while received.len() < sent.len() {
        seen = guest.line.wait_edge(seen);
        while guest.get(offset::IIR_FCR) & 1 == 0 {
            received.extend(guest.receive(usize::MAX));
        }
    }
    assert!(received == sent);
    drop(writer.join().unwrap());
    running.stop(MINUTE).unwrap();
}

#[test]
fn a_guest_that_does_not_read_stops_the_host_without_a_busy_loop() {
    let guest = Guest::new(16);
    let (mut host, end) = UnixStream::pair().unwrap();
    let mut stepper = guest.step(end);
    guest.enable();
    host.set_nonblocking(true).unwrap();
    let sent = pattern(4 << 20);
    let mut taken = 0;
    // Until neither side moves any more.
    loop {
        match host.write(&sent[taken..]) {
            Ok(n) => taken += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if stepper.step() == 0 {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(taken < sent.len());
    assert_eq!(stepper.step(), 0);
    let mut received = vec![];
    while received.len() < taken {
        received.extend(guest.receive(usize::MAX));
        stepper.step();
    }
    assert!(received[..] == sent[..taken]);
}

#[test]
fn a_closed_host_end_discards_output_and_leaves_the_loop_at_rest() {
    let guest = Guest::new(1024);
    let (host, end) = UnixStream::pair().unwrap();
    let mut stepper = guest.step(end);
    drop(host);
    stepper.settle();
    assert_eq!(
        stepper.reports.take(),
        [DeviceEvent::HostClosed {
            device: "device".into()
        }]
    );
    guest.send(&[b'x'; 5000]);
    assert_eq!(stepper.step(), 0);
    assert_eq!(guest.port.dropped(), 0, "discarded, not dropped for slowness");
    stepper.device().stop(Instant::now() + MINUTE);
}

#[test]
fn a_host_end_that_closes_while_output_waits_ends_the_waiting() {
    let guest = Guest::new(1 << 20);
    let (host, end) = UnixStream::pair().unwrap();
    let mut stepper = guest.step(end);
    guest.send(&vec![b'x'; 1 << 20]);
    stepper.settle();
    assert!(stepper.device().blocked);
    drop(host);
    stepper.settle();
    assert_eq!(stepper.reports.take().len(), 1);
    assert!(guest.port.state().ring.is_empty());
}

#[test]
fn input_from_before_the_close_still_arrives() {
    let guest = Guest::new(1024);
    let (mut host, end) = UnixStream::pair().unwrap();
    let mut stepper = guest.step(end);
    guest.enable();
    let sent = pattern(50_000);
    host.write_all(&sent).unwrap();
    drop(host);
    let mut received = vec![];
    while received.len() < sent.len() {
        stepper.settle();
        let bytes = guest.receive(100);
        assert!(!bytes.is_empty());
        received.extend(bytes);
    }
    assert!(received == sent);
    stepper.settle();
    assert_eq!(guest.receive(1), b"");
    assert_eq!(stepper.device().host.life(), Life::Gone);
}

#[test]
fn a_host_that_only_ends_its_input_still_gets_output() {
    let guest = Guest::new(1024);
    let (mut host, end) = UnixStream::pair().unwrap();
    let mut stepper = guest.step(end);
    guest.enable();
    host.write_all(b"bye").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    stepper.settle();
    assert_eq!(guest.receive(10), b"bye");
    guest.send(b"still here");
    stepper.step();
    assert!(read_exact(&mut host, 1).starts_with(b"s"));
    assert_eq!(stepper.reports.take(), []);
}

#[test]
fn a_pipe_carries_output_alone() {
    let guest = Guest::new(1024);
    let (read, write) = std::io::pipe().unwrap();
    let (running, reports) = guest.spawn(write);
    guest.send(b"through a pipe");
    running.stop(MINUTE).unwrap();
    let mut text = String::new();
    File::from(OwnedFd::from(read)).read_to_string(&mut text).unwrap();
    assert_eq!(text, "through a pipe");
    assert_eq!(reports.take(), []);
}

#[test]
fn a_pipe_carries_input_alone() {
    let guest = Guest::new(1024);
    let (read, mut write) = std::io::pipe().unwrap();
    let mut stepper = guest.step(read);
    guest.enable();
    write.write_all(b"in").unwrap();
    drop(write);
    guest.send(b"out");
    stepper.settle();
    assert_eq!(guest.receive(10), b"in");
}

#[test]
fn a_regular_file_is_refused_when_the_loop_starts() {
    let guest = Guest::new(16);
    let device = guest.port.host_loop(tempfile::tempfile().unwrap().into()).unwrap();
    let error = Stepper::start(device).err().unwrap().to_string();
    assert!(error.starts_with("the host end cannot be watched: "), "{error}");
}

#[test]
fn last_words_are_flushed_when_the_loop_stops() {
    let guest = Guest::new(1 << 20);
    let (mut host, end) = UnixStream::pair().unwrap();
    let (running, _) = guest.spawn(end);
    // More than the socket holds, so the stop has to wait for the reader.
    let sent = pattern(1 << 20);
    guest.send(&sent);
    running.request_stop(MINUTE);
    let mut received = vec![];
    host.read_to_end(&mut received).unwrap();
    assert!(received == sent);
    running.stop(MINUTE).unwrap();
    assert_eq!(guest.port.dropped(), 0);
}

#[test]
fn a_stop_waits_for_a_full_host_only_until_its_deadline() {
    let guest = Guest::new(1 << 20);
    let (mut host, end) = UnixStream::pair().unwrap();
    let (running, _) = guest.spawn(end);
    let sent = pattern(1 << 20);
    guest.send(&sent);
    running.stop(Duration::from_millis(20)).unwrap();
    let mut received = vec![];
    host.read_to_end(&mut received).unwrap();
    assert!(sent.starts_with(&received));
    assert_eq!(
        received.len() + guest.port.dropped() as usize,
        sent.len(),
        "what the host did not take is counted"
    );
}

#[test]
fn the_guest_goes_on_after_its_loop_has_ended() {
    let guest = Guest::new(1024);
    let (_host, end) = UnixStream::pair().unwrap();
    let (running, _) = guest.spawn(end);
    drop(running);
    guest.send(&[b'x'; 5000]);
    assert_eq!(guest.get(offset::LSR) & 0x60, 0x60);
}

#[test]
fn interrupts_follow_the_registers() {
    let guest = Guest::new(1024);
    guest.set(offset::IER, 0x02);
    assert_eq!(guest.line.rises(), 1);
    assert_eq!(guest.get(offset::IIR_FCR), 0x02);
    assert!(!guest.line.state.lock().unwrap().0);
    guest.send(b"ab");
    assert_eq!(guest.line.rises(), 2, "one edge for what the driver has not seen yet");
    guest.set(offset::IER, 0);
    assert!(!guest.line.state.lock().unwrap().0);
}

#[test]
fn wide_accesses_are_consecutive_ports() {
    let guest = Guest::new(16);
    guest.port.write(u64::from(offset::SCRATCH), &[0x5a, 1, 2, 3]);
    let mut data = [0; 4];
    guest.port.read(u64::from(offset::MSR), &mut data);
    assert_eq!(data, [0xb0, 0x5a, 0xff, 0xff]);
    guest.port.read(u64::MAX, &mut data);
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        ops in prop::collection::vec((any::<bool>(), 0u64..10, prop::collection::vec(any::<u8>(), 1..=8)), 1..200),
        input in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let guest = Guest::new(32);
        let (mut host, end) = UnixStream::pair().unwrap();
        let mut stepper = guest.step(end);
        host.write_all(&input).unwrap();
        for (write, offset, mut data) in ops {
            if write {
                guest.port.write(offset, &data);
            } else {
                guest.port.read(offset, &mut data);
            }
            stepper.step();
        }
        let state = guest.port.state();
        prop_assert_eq!(guest.line.state.lock().unwrap().0, state.uart.interrupt());
    }
}
