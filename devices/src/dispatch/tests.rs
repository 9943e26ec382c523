//! Tests of the dispatch loop: start handshake, stop, quarantine, drop.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use super::*;

/// What the device under test does when its doorbell rings.
#[derive(Clone, Copy, PartialEq)]
enum Plan {
    Count,
    Panic,
    Error,
    PanicInStart,
    RefuseStart,
    PanicInStop,
    Hang,
}

struct Probe {
    plan: Plan,
    doorbell: EventFd,
    rung: Sender<u32>,
    stopped: Arc<AtomicBool>,
    quarantined: Arc<AtomicBool>,
    hang: Arc<Mutex<()>>,
}

impl DispatchDevice for Probe {
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        match self.plan {
            Plan::PanicInStart => panic!("start panics"),
            Plan::RefuseStart => Err("no backing file".into()),
            _ => watches.add(&self.doorbell, 7, EventSet::IN),
        }
    }

    fn ready(&mut self, token: u32, _: EventSet, _: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        let _ = self.doorbell.read();
        match self.plan {
            Plan::Panic => panic!("ready panics"),
            Plan::Error => return Err("ring is malformed".into()),
            Plan::Hang => {
                let _ = self.rung.send(token);
                drop(lock(&self.hang));
            }
            _ => {
                let _ = self.rung.send(token);
            }
        }
        Ok(())
    }

    fn stop(&mut self, _: Instant) {
        assert!(self.plan != Plan::PanicInStop, "stop panics");
        self.stopped.store(true, Ordering::SeqCst);
    }

    fn quarantine(&mut self) {
        self.quarantined.store(true, Ordering::SeqCst);
    }
}

struct Reports(Mutex<Sender<DeviceEvent>>);

impl DeviceReporter for Reports {
    fn report(&self, event: DeviceEvent) {
        let _ = lock(&self.0).send(event);
    }
}

/// A probe with what the test holds of it.
struct Rig {
    doorbell: EventFd,
    rung: Receiver<u32>,
    stopped: Arc<AtomicBool>,
    quarantined: Arc<AtomicBool>,
    hang: Arc<Mutex<()>>,
    events: Receiver<DeviceEvent>,
    reporter: Arc<Reports>,
}

fn rig(plan: Plan) -> (Rig, Probe) {
    let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
    let (rung_sender, rung) = channel();
    let (events_sender, events) = channel();
    let rig = Rig {
        doorbell: doorbell.try_clone().unwrap(),
        rung,
        stopped: Arc::default(),
        quarantined: Arc::default(),
        hang: Arc::default(),
        events,
        reporter: Arc::new(Reports(Mutex::new(events_sender))),
    };
    let probe = Probe {
        plan,
        doorbell,
        rung: rung_sender,
        stopped: Arc::clone(&rig.stopped),
        quarantined: Arc::clone(&rig.quarantined),
        hang: Arc::clone(&rig.hang),
    };
    (rig, probe)
}

fn spawn(plan: Plan) -> (Rig, Result<DispatchLoop, StartError>) {
    let (rig, probe) = rig(plan);
    let spawned = DispatchLoop::spawn("probe", || Ok::<_, String>(()), probe, rig.reporter.clone());
    (rig, spawned)
}

#[test]
fn events_reach_the_device_with_their_token_and_stop_joins() {
    let (rig, spawned) = spawn(Plan::Count);
    let running = spawned.unwrap();
    for _ in 0..3 {
        rig.doorbell.write(1).unwrap();
        assert_eq!(rig.rung.recv(), Ok(7));
    }
    assert_eq!(running.stop(Duration::from_secs(10)), Ok(()));
    assert!(rig.stopped.load(Ordering::SeqCst));
    // The thread is gone, and its device with it.
    assert!(rig.rung.recv().is_err());
    assert!(!rig.quarantined.load(Ordering::SeqCst));
    assert!(rig.events.try_recv().is_err());
}

#[test]
fn setup_runs_first_on_the_loops_thread() {
    let (rig, probe) = rig(Plan::PanicInStart);
    let (sender, names) = channel();
    let setup = move || {
        sender.send(std::thread::current().name().map(str::to_owned)).unwrap();
        Err("filter refused")
    };
    let refused = DispatchLoop::spawn("probe", setup, probe, rig.reporter.clone())
        .err()
        .unwrap();
    assert_eq!(
        refused.to_string(),
        "probe: its thread could not be set up: filter refused"
    );
    assert_eq!(names.recv().unwrap().as_deref(), Some("probe"));
}

#[test]
fn a_device_that_refuses_to_start_is_the_result_of_spawn() {
    let (rig, spawned) = spawn(Plan::RefuseStart);
    assert_eq!(
        spawned.err().unwrap().to_string(),
        "probe: did not start: no backing file"
    );
    assert!(rig.rung.recv().is_err(), "the device is dropped");
    assert!(rig.events.try_recv().is_err(), "nothing is reported twice");
}

#[test]
fn a_panic_in_start_is_the_result_of_spawn() {
    let (_rig, spawned) = spawn(Plan::PanicInStart);
    assert_eq!(
        spawned.err().unwrap().to_string(),
        "probe: panicked while it started: start panics"
    );
}

#[test]
fn devices_that_are_begun_together_start_together() {
    let meeting = Arc::new(Barrier::new(2));
    let starting: Vec<_> = (0..2)
        .map(|_| {
            let (rig, probe) = rig(Plan::Count);
            let meeting = Arc::clone(&meeting);
            // Neither gets past this without the other.
            let setup = move || {
                meeting.wait();
                Ok::<_, String>(())
            };
            let starting = DispatchLoop::begin("probe", setup, probe, rig.reporter.clone());
            (rig, starting.unwrap())
        })
        .collect();
    for (_rig, starting) in starting {
        let running = starting.wait().unwrap();
        assert_eq!(running.stop(Duration::from_secs(10)), Ok(()));
    }
}

#[test]
fn nobody_has_to_wait_for_a_device_that_was_begun() {
    let (rig, probe) = rig(Plan::Count);
    let starting = DispatchLoop::begin("probe", || Ok::<_, String>(()), probe, rig.reporter.clone());
    drop(starting.unwrap());
    assert!(rig.rung.recv().is_err(), "the thread is gone, and its device with it");
    assert!(rig.events.try_recv().is_err());
}

/// Ends only when another does so at the same time.
struct Sociable(Arc<Barrier>);

impl DispatchDevice for Sociable {
    fn start(&mut self, _: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn stop(&mut self, _: Instant) {
        self.0.wait();
    }
}

#[test]
fn loops_are_asked_to_end_before_any_is_joined() {
    let meeting = Arc::new(Barrier::new(4));
    let begin = |name: String| {
        let device = Sociable(Arc::clone(&meeting));
        DispatchLoop::begin(name, || Ok::<_, String>(()), device, rig(Plan::Count).0.reporter).unwrap()
    };
    let running: Vec<_> = (0..2).map(|n| begin(format!("{n}")).wait().unwrap()).collect();
    let starting: Vec<_> = (2..4).map(|n| begin(format!("{n}"))).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    assert_eq!(DispatchLoop::stop_all(running, starting, deadline), []);
}

#[test]
fn loops_that_do_not_end_are_told_of_and_waited_for_only_once() {
    let gate = Arc::new(Mutex::new(()));
    let held = lock(&gate);
    let names: Vec<_> = (0..16).map(|n| format!("stuck {n}")).collect();
    let starting: Vec<_> = names
        .iter()
        .map(|name| {
            let (rig, probe) = rig(Plan::Count);
            let gate = Arc::clone(&gate);
            let setup = move || {
                drop(lock(&gate));
                Ok::<_, String>(())
            };
            (
                rig.rung,
                DispatchLoop::begin(name.as_str(), setup, probe, rig.reporter).unwrap(),
            )
        })
        .collect();
    let (rungs, starting): (Vec<_>, Vec<_>) = starting.into_iter().unzip();
    let (hanging, spawned) = spawn(Plan::Hang);
    let held_too = lock(&hanging.hang);
    hanging.doorbell.write(1).unwrap();
    assert_eq!(hanging.rung.recv(), Ok(7));
    let (willing, another) = spawn(Plan::Count);

    let begun = Instant::now();
    let errors = DispatchLoop::stop_all([spawned.unwrap(), another.unwrap()], starting, begun);
    // Each by itself would be waited for as long as all of them are.
    assert!(begun.elapsed() < HANG_GRACE * 17, "waited for more than once");
    let hung = |device: &str| StopError::Hung { device: device.into() };
    let expected: Vec<_> = std::iter::once("probe")
        .chain(names.iter().map(String::as_str))
        .map(hung)
        .collect();
    assert_eq!(errors, expected);
    assert!(
        willing.stopped.load(Ordering::SeqCst),
        "what ends is joined after one that does not"
    );

    drop((held, held_too));
    for rung in rungs.into_iter().chain([hanging.rung]) {
        assert!(rung.recv().is_err(), "let go, the thread ends by itself");
    }
}

#[test]
fn a_device_that_did_not_start_says_so_when_it_is_stopped() {
    for (plan, reason) in [
        (Plan::RefuseStart, "no backing file"),
        (Plan::PanicInStart, "start panics"),
    ] {
        let (rig, probe) = rig(plan);
        let starting = DispatchLoop::begin("probe", || Ok::<_, String>(()), probe, rig.reporter).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let errors = DispatchLoop::stop_all([], [starting], deadline);
        let told: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(told, [format!("probe: failed: it did not start: {reason}")]);
        assert!(rig.rung.recv().is_err(), "the device is dropped");
    }
}

/// Rings the doorbell of a device that then fails with `reason`.
fn fails_when_rung(plan: Plan, reason: &str) {
    let (rig, spawned) = spawn(plan);
    let running = spawned.unwrap();
    rig.doorbell.write(1).unwrap();
    assert_eq!(
        rig.events.recv(),
        Ok(DeviceEvent::Failed {
            device: "probe".into(),
            reason: reason.into()
        })
    );
    assert!(
        rig.quarantined.load(Ordering::SeqCst),
        "quarantined before it is reported"
    );
    assert_eq!(
        running.stop(Duration::from_secs(10)),
        Err(StopError::Failed {
            device: "probe".into(),
            reason: reason.into()
        })
    );
    assert!(!rig.stopped.load(Ordering::SeqCst));
}

#[test]
fn a_panic_quarantines_and_reports() {
    fails_when_rung(Plan::Panic, "ready panics");
}

#[test]
fn an_error_quarantines_and_reports() {
    fails_when_rung(Plan::Error, "ring is malformed");
}

#[test]
fn a_panic_in_stop_is_the_result_of_stop() {
    let (rig, spawned) = spawn(Plan::PanicInStop);
    let error = spawned.unwrap().stop(Duration::from_secs(10)).unwrap_err();
    assert_eq!(error.to_string(), "probe: failed: stop panics");
    assert!(rig.events.recv().is_ok());
}

#[test]
fn a_device_that_hangs_does_not_hang_stop() {
    let (rig, spawned) = spawn(Plan::Hang);
    let running = spawned.unwrap();
    let held = lock(&rig.hang);
    rig.doorbell.write(1).unwrap();
    assert_eq!(rig.rung.recv(), Ok(7));
    assert_eq!(
        running.stop(Duration::ZERO),
        Err(StopError::Hung { device: "probe".into() })
    );
    drop(held);
    // Let go, the thread ends by itself.
    assert!(rig.rung.recv().is_err());
    assert!(rig.stopped.load(Ordering::SeqCst));
}

#[test]
fn dropping_the_loop_ends_it() {
    let (rig, spawned) = spawn(Plan::Count);
    drop(spawned.unwrap());
    assert!(rig.rung.recv().is_err());
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let long = "ä".repeat(REASON_MAX);
    let message = panic_message(&long);
    assert_eq!(message, "ä".repeat(REASON_MAX / 2));
}
