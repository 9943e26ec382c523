//! Queries wait for nobody, with real guests: components that are stopped in the middle, and subscribers that never read.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{cell::RefCell, fs::File, future::Future, pin::Pin, rc::Rc, time::Instant};

use rustix::process::Signal;
use sepal_schema::{
    config::{self, GuestConfig},
    error::{Error, Kind},
    guest_capnp::{event, event_sink, guest, statistics::stats_result, subscription},
    info::GuestStatus,
    transport::guard,
};
use sepal_tests::{
    PATIENCE, Rpc, World, kvm_missing,
    process::{self, Process},
    rpc::{observer, power},
    until,
};

const NAME: &str = "bee";

type Pending = Pin<Box<dyn Future<Output = bool>>>;

/// The component, once it has closed its jail.
fn component(world: &World) -> Process {
    until("the component is there", || {
        let family = world.family();
        let found = family.into_iter().find(|process| process.name == "vmm-component")?;
        (process::try_status(found.pid, "Seccomp")? == "2").then_some(found)
    })
}

fn freeze(component: &Process) {
    component.signal(Signal::STOP);
    until("it stands still", || {
        Process::of(component.pid).filter(|process| process.state == 'T')
    });
}

fn quiet() -> GuestConfig {
    GuestConfig {
        name: NAME.into(),
        cmdline: "nobutton".into(),
        memory_mib: 32,
        ..GuestConfig::default()
    }
}

/// The age of a guest's figures.
fn age(rpc: &mut Rpc, guest: &guest::Client) -> Result<u64, Error> {
    let asked = observer(guest).stats_request().send().promise;
    let answer = rpc.wait("stats", asked).unwrap();
    match answer.get().unwrap().which().unwrap() {
        stats_result::Stats(stats) => {
            let stats = stats.unwrap();
            assert_eq!(stats.get_vcpus().unwrap().len(), 1);
            Ok(stats.get_age_ns())
        }
        stats_result::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
    }
}

/// Asks all that can be asked while `pending` is not done.
fn ask_everything(rpc: &mut Rpc, pending: &mut Pending, status: GuestStatus) {
    let listed = rpc.list();
    assert_eq!((&listed[0].name[..], listed[0].status), (NAME, status));
    let guest = rpc.lookup(NAME).unwrap();
    assert_eq!(rpc.info(&guest).status, status);
    let asked = rpc.manager.who_am_i_request().send().promise;
    rpc.wait("whoAmI", asked).unwrap();
    // Whatever they are.
    let _ = age(rpc, &guest);
    let heard = Rc::new(Sink::default());
    let _subscription = subscribe(rpc, &heard, 1);
    heard.until(rpc, 1);
    assert!(rpc.poll(pending).is_none(), "what is asked during is still under way");
}

/// A subscriber: what it heard, and how many events it lost.
#[derive(Default)]
struct Sink {
    heard: RefCell<Vec<(&'static str, u64)>>,
}

struct Server(Rc<Sink>);

impl event_sink::Server for Server {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        let params = params.get()?;
        let kind = match params.get_event()?.which()? {
            event::Defined(()) => "defined",
            event::Removed(()) => "removed",
            _ => "another",
        };
        self.0.heard.borrow_mut().push((kind, params.get_dropped()));
        Ok(())
    }
}

impl Sink {
    /// Runs the loop until so many events are there.
    #[track_caller]
    fn until(&self, rpc: &mut Rpc, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.heard.borrow().len() < count {
            assert!(Instant::now() < deadline, "{count} events: not within {PATIENCE:?}");
            // Each answer comes after the events that were told before.
            let asked = rpc.manager.version_request().send().promise;
            rpc.wait("version", asked).unwrap();
        }
    }
}

fn subscribe(rpc: &mut Rpc, sink: &Rc<Sink>, replay: u32) -> subscription::Client {
    let mut request = rpc.manager.subscribe_request();
    request.get().set_sink(guard::new_client(Server(sink.clone())));
    request.get().set_replay(replay);
    let asked = request.send().promise;
    rpc.wait("subscribe", asked)
        .unwrap()
        .get()
        .unwrap()
        .get_subscription()
        .unwrap()
}

#[test]
fn while_a_guest_is_created_from_a_huge_image() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut driver = world.connect();
    let (kernel, initrd) = world.slow_to_create();
    let config = GuestConfig {
        memory_mib: 1200,
        kernel: config::File::Fd(File::open(kernel).unwrap().into()),
        initrd: config::File::Fd(File::open(initrd).unwrap().into()),
        ..quiet()
    };
    let lifecycle = driver.new_guest(NAME).unwrap();
    let create = driver.send_create(&lifecycle, config).unwrap();
    let mut create: Pending = Box::pin(async move { create.await.is_ok() });
    // Sends what waits.
    driver.list();
    let component = component(&world);
    freeze(&component);
    ask_everything(&mut driver, &mut create, GuestStatus::Starting);
    let mut other = world.connect();
    let guest = other.lookup(NAME).unwrap();
    assert_eq!(age(&mut other, &guest).unwrap_err().kind, Kind::TimedOut);
    component.signal(Signal::CONT);
    assert!(driver.wait("create", create));
    drop((lifecycle, driver, other));
    world.end();
}

#[test]
fn while_a_component_stands_still_and_its_guest_is_stopped_with_a_deadline() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut driver = world.connect();
    let launched = driver.launch(quiet(), true).unwrap();
    until("there are figures", || age(&mut driver, &launched.guest).ok());
    let component = component(&world);
    freeze(&component);
    let mut request = power(&launched.guest).stop_request();
    request.get().set_timeout_ms(1_000_000);
    let stop = request.send().promise;
    let mut stop: Pending = Box::pin(async move { stop.await.is_ok() });
    ask_everything(&mut driver, &mut stop, GuestStatus::Running);
    let (first, second) = (
        age(&mut driver, &launched.guest).unwrap(),
        age(&mut driver, &launched.guest).unwrap(),
    );
    assert!(0 < first && first < second, "{first}, then {second}");
    component.signal(Signal::CONT);
    until("the component tells again", || {
        (age(&mut driver, &launched.guest).unwrap() == 0).then_some(())
    });
    drop((stop, launched, driver));
    world.end();
}

#[test]
fn ten_thousand_events_for_one_who_never_reads_take_no_memory_and_delay_nobody() {
    const EVENTS: usize = 10_000;
    /// Bytes; the events alone would take many times as much if they were kept for each subscriber.
    const GROWTH: u64 = 8 << 20;
    let world = World::with_manager();
    let mut driver = world.connect();
    let sink = Rc::new(Sink::default());
    let _kept = subscribe(&mut driver, &sink, 0);
    // These do not read from their sockets any more.
    let never: Vec<_> = (0..8)
        .map(|_| {
            let mut never = world.connect();
            let sink = Rc::new(Sink::default());
            let subscription = subscribe(&mut never, &sink, 0);
            (never, sink, subscription)
        })
        .collect();
    let resident = || {
        let text = process::status(world.manager().pid(), "VmRSS");
        let kib: u64 = text.strip_suffix("kB").unwrap().trim().parse().unwrap();
        kib << 10
    };
    let mut before = 0;
    for pair in 0..EVENTS / 2 {
        if pair == 600 {
            // The ring is full, and all has been used once.
            before = resident();
        }
        // A name that is taken and given back: two events, and no guest.
        drop(driver.new_guest(NAME).unwrap());
        if pair % 256 == 0 {
            sink.until(&mut driver, pair * 2);
        }
    }
    sink.until(&mut driver, EVENTS);
    let growth = resident().saturating_sub(before);
    assert!(growth < GROWTH, "{growth} bytes more");
    let heard = sink.heard.borrow();
    assert!(heard.iter().all(|(_, dropped)| *dropped == 0), "who reads loses none");
    assert_eq!(heard.iter().filter(|(kind, _)| *kind == "defined").count(), EVENTS / 2);

    let (mut late, late_sink, _subscription) = never.into_iter().next().unwrap();
    let all = |sink: &Sink| -> u64 { sink.heard.borrow().iter().map(|(_, dropped)| 1 + dropped).sum() };
    while all(&late_sink) < EVENTS as u64 {
        let next = late_sink.heard.borrow().len() + 1;
        late_sink.until(&mut late, next);
    }
    let heard = late_sink.heard.borrow().len();
    assert!(heard <= 1024 + 1, "{heard} were kept");
    drop((driver, late));
    world.end();
}
