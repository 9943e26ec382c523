//! The device against back ends: one on the `vhost-user-backend` crate, ones that break the protocol, and virtiofsd.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::vhost_user::testing::Bench;

mod echo;
mod scripted;
mod transport;
mod virtiofsd;

use echo::Echo;

/// The device that most tests use: two queues, and configuration from the back end.
fn settings() -> Settings {
    Settings {
        kind: DeviceKind::Other(2),
        queue_sizes: vec![64, 64],
        config: ConfigSource::BackEnd,
    }
}

fn connect(socket: UnixStream) -> (VhostUser, VhostUserHandle) {
    VhostUser::connect(socket.into(), settings()).unwrap()
}

/// Steps until `done` gives something.
fn until<R>(bench: &mut Bench, mut done: impl FnMut(&mut Bench) -> Option<R>) -> R {
    loop {
        if let Some(result) = done(bench) {
            return result;
        }
        // A back end that listens to a lent bell makes no event here: look again soon.
        bench.step(10);
    }
}

fn answer(bench: &mut Bench, queue: u16) -> Vec<u8> {
    until(bench, |bench| {
        assert_eq!(bench.reports(), [], "while an answer was awaited");
        bench.answer(queue)
    })
}

fn ask(bench: &mut Bench, queue: u16, text: &[u8]) {
    bench.request(queue, text, 4096);
    let mut expected = text.to_vec();
    expected.reverse();
    assert_eq!(answer(bench, queue), expected);
}

fn reports(bench: &mut Bench, count: usize) -> Vec<DeviceEvent> {
    let mut reports = Vec::new();
    until(bench, |bench| {
        reports.extend(bench.reports());
        (reports.len() >= count).then_some(())
    });
    reports
}

fn lost(reason: &str) -> DeviceEvent {
    DeviceEvent::BackendLost {
        device: "device".into(),
        reason: reason.into(),
    }
}

fn restored() -> DeviceEvent {
    DeviceEvent::BackendRestored {
        device: "device".into(),
    }
}

#[test]
fn a_back_end_serves_every_queue() {
    for lends in [false, true] {
        let echo = Echo::start();
        let (device, _) = connect(echo.connect());
        assert_eq!(device.features(), echo::DEVICE_FEATURE);
        assert_eq!(device.config().bytes[..4], *b"conf");
        let mut bench = Bench::new(device, lends);
        bench.activate();
        for round in 0..100u32 {
            for queue in [0, 1] {
                ask(&mut bench, queue, format!("{queue}, {round}").as_bytes());
            }
        }
        until(&mut bench, |bench| (bench.interrupts(0) > 0).then_some(()));
        until(&mut bench, |bench| (bench.interrupts(1) > 0).then_some(()));
        assert_eq!(bench.reports(), []);
    }
}

#[test]
fn requests_made_before_the_driver_was_ready_are_served() {
    let echo = Echo::start();
    let mut bench = Bench::new(connect(echo.connect()).0, false);
    bench.activate();
    bench.reset();
    bench.activate();
    // All at once, with one ring.
    for n in 0..8u8 {
        bench.request(0, &[n; 100], 100);
    }
    for n in 0..8 {
        assert_eq!(answer(&mut bench, 0), [n; 100]);
    }
}

#[test]
fn after_a_reset_the_driver_begins_anew() {
    let echo = Echo::start();
    let mut bench = Bench::new(connect(echo.connect()).0, true);
    for _ in 0..5 {
        bench.activate();
        ask(&mut bench, 0, b"before");
        ask(&mut bench, 1, b"and the other");
        bench.reset();
    }
    assert_eq!(bench.reports(), []);
}

#[test]
fn a_queue_is_reset_alone() {
    let echo = Echo::start();
    let mut bench = Bench::new(connect(echo.connect()).0, true);
    bench.activate();
    ask(&mut bench, 0, b"first");
    ask(&mut bench, 1, b"second");
    bench.reset_queue(0);
    ask(&mut bench, 1, b"goes on");
    ask(&mut bench, 0, b"begins anew");
    assert_eq!(bench.reports(), []);
}

#[test]
fn what_the_driver_writes_to_the_configuration_reaches_the_back_end() {
    let echo = Echo::start();
    let mut bench = Bench::new(connect(echo.connect()).0, false);
    bench.activate();
    bench.write_config(32, &[9]);
    until(&mut bench, |_| (echo.written() == Some((32, vec![9]))).then_some(()));
    assert_eq!(bench.reports(), []);
}

#[test]
fn the_device_goes_on_with_the_next_back_end() {
    let first = Echo::start();
    let (device, handle) = connect(first.connect());
    let mut bench = Bench::new(device, true);
    bench.activate();
    ask(&mut bench, 0, b"to the first");
    drop(first);
    assert_eq!(reports(&mut bench, 1), [lost("the back end closed the connection")]);
    assert!(!handle.is_connected());
    // Nobody serves this one, and it is not lost.
    bench.request(0, b"to whoever comes", 100);
    let second = Echo::start();
    handle.reconnect(second.connect().into());
    assert_eq!(reports(&mut bench, 1), [restored()]);
    assert!(handle.is_connected());
    assert_eq!(answer(&mut bench, 0), b"semoc reveohw ot");
    ask(&mut bench, 1, b"to the second");
}

#[test]
fn a_back_end_that_serves_makes_way_for_another() {
    let (first, second) = (Echo::start(), Echo::start());
    let (device, handle) = connect(first.connect());
    let mut bench = Bench::new(device, true);
    bench.activate();
    ask(&mut bench, 0, b"to the first");
    handle.reconnect(second.connect().into());
    assert_eq!(
        reports(&mut bench, 2),
        [lost("another back end takes its place"), restored()]
    );
    ask(&mut bench, 0, b"to the second");
    ask(&mut bench, 1, b"to the second");
}

#[test]
fn a_back_end_can_go_and_come_while_the_driver_is_not_there() {
    let first = Echo::start();
    let (device, handle) = connect(first.connect());
    let mut bench = Bench::new(device, true);
    drop(first);
    assert_eq!(reports(&mut bench, 1).len(), 1);
    // A driver that comes meanwhile waits, and can be reset.
    bench.activate();
    bench.reset();
    bench.activate();
    let second = Echo::start();
    handle.reconnect(second.connect().into());
    assert_eq!(reports(&mut bench, 1), [restored()]);
    ask(&mut bench, 0, b"after all");
    bench.reset();
    handle.reconnect(Echo::start().connect().into());
    assert_eq!(reports(&mut bench, 2).len(), 2);
}

#[test]
fn a_device_that_stops_lets_go_of_the_rings() {
    let echo = Echo::start();
    let mut bench = Bench::new(connect(echo.connect()).0, true);
    bench.activate();
    ask(&mut bench, 0, b"last words");
    bench.call(|device, _| device.stop(Instant::now() + Duration::from_secs(60)));
    assert!(bench.device.started().is_empty());
}

#[test]
fn guest_memory_that_is_in_no_file_makes_no_device() {
    let echo = Echo::start();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    assert!(memory_table(&memory).is_err());
    let two = Settings {
        queue_sizes: vec![64; 3],
        ..settings()
    };
    let refused = VhostUser::connect(echo.connect().into(), two).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "the back end cannot serve this device: it serves 2 queues, and the device has 3"
    );
}
