//! Two hundred guests of one manager: defined, started, listed, watched and stopped, the manager killed in the middle and another in its place.
//!
//! What it took is printed (`cargo test -p sepal-tests --test many -- --nocapture`) and asserted nowhere: the host may be busy.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{cell::RefCell, collections::BTreeSet, fs, rc::Rc, time::Instant};

use futures::{StreamExt, stream};
use sepal_schema::{
    config::GuestConfig,
    error::{Error, Outcome, read_completion},
    guest_capnp::{event, event_sink, subscription},
    info::{GuestInfo, GuestStatus},
    manager_capnp::guest_manager::listing,
    transport::guard,
};
use sepal_tests::{Rpc, World, kvm_missing, until};

/// How many there are.
const GUESTS: usize = 200;
/// How many calls are under way at a time.
const AT_ONCE: usize = 8;
/// Guests that are stopped by the first manager.
const STOPPED_EARLY: usize = 50;

fn name(number: usize) -> String {
    format!("guest-{number:03}")
}

fn config(number: usize) -> GuestConfig {
    GuestConfig {
        name: name(number),
        memory_mib: 16,
        cmdline: "nobutton".into(),
        durable: true,
        ..GuestConfig::default()
    }
}

/// Carries out a call for each guest, some at a time, and prints how long it took.
fn all<F>(rpc: &mut Rpc, what: &str, guests: std::ops::Range<usize>, call: impl Fn(&Rpc, usize) -> F)
where
    F: Future<Output = Result<(), Error>>,
{
    let begun = Instant::now();
    let calls: Vec<_> = guests.map(|number| (number, call(rpc, number))).collect();
    let count = calls.len();
    // Sent one after the other, as each before it is answered.
    let mut answers = stream::iter(calls)
        .map(|(number, call)| async move { (number, call.await) })
        .buffer_unordered(AT_ONCE);
    for _ in 0..count {
        let (number, outcome) = rpc.wait(what, answers.next()).unwrap();
        outcome.unwrap_or_else(|error| panic!("{what} {}: {error}", name(number)));
    }
    println!("{what}: {count} guests in {:.2} s", begun.elapsed().as_secs_f64());
}

/// All guests, read page by page from one listing.
fn browse(rpc: &mut Rpc) -> Vec<GuestInfo> {
    let begun = Instant::now();
    let opened = rpc.wait("browse", rpc.manager.browse_request().send().promise).unwrap();
    let count = opened.get().unwrap().get_count();
    let listing: listing::Client = opened.get().unwrap().get_listing().unwrap();
    let (mut guests, mut pages) = (Vec::new(), 0);
    loop {
        let page = rpc.wait("next", listing.next_request().send().promise).unwrap();
        let page = page.get().unwrap();
        guests.extend(
            page.get_guests()
                .unwrap()
                .iter()
                .map(|info| GuestInfo::read(info).unwrap()),
        );
        pages += 1;
        if page.get_ended() {
            break;
        }
    }
    assert_eq!(guests.len(), usize::try_from(count).unwrap());
    println!(
        "listed: {count} guests, {pages} pages, in {:.1} ms",
        begun.elapsed().as_secs_f64() * 1e3
    );
    guests
}

/// The names of the guests that have figures of their vCPU.
fn watched(rpc: &mut Rpc) -> BTreeSet<String> {
    let begun = Instant::now();
    let (mut names, mut last, mut calls) = (BTreeSet::new(), String::new(), 0);
    loop {
        let mut request = rpc.manager.stats_request();
        request.get().set_after(&last);
        let answer = rpc.wait("stats", request.send().promise).unwrap();
        let answer = answer.get().unwrap();
        for guest in answer.get_guests().unwrap() {
            last = guest.get_name().unwrap().to_string().unwrap();
            if !guest.has_error() && guest.get_stats().unwrap().get_vcpus().unwrap().len() == 1 {
                names.insert(last.clone());
            }
        }
        calls += 1;
        if !answer.get_more() {
            break;
        }
    }
    let (count, took) = (names.len(), begun.elapsed().as_secs_f64() * 1e3);
    println!("watched: figures of {count} guests, {calls} calls, in {took:.1} ms");
    names
}

/// Hears the sequence numbers of events.
#[derive(Default)]
struct Sink {
    sequences: RefCell<Vec<u64>>,
    started: RefCell<BTreeSet<String>>,
}

impl Sink {
    /// Runs the loop until it has heard of so many starts.
    fn until_started(&self, rpc: &mut Rpc, count: usize) {
        until("each start is an event", || {
            // Each answer comes after some of the events that were told before.
            rpc.wait("version", rpc.manager.version_request().send().promise)
                .unwrap();
            (self.started.borrow().len() == count).then_some(())
        });
    }
}

struct Server(Rc<Sink>);

impl event_sink::Server for Server {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        let params = params.get()?;
        assert_eq!(params.get_dropped(), 0);
        let event = params.get_event()?;
        self.0.sequences.borrow_mut().push(event.get_sequence());
        if let event::Started(()) = event.which()? {
            self.0.started.borrow_mut().insert(event.get_guest()?.to_string()?);
        }
        Ok(())
    }
}

fn subscribe(rpc: &mut Rpc, sink: &Rc<Sink>) -> subscription::Client {
    let mut request = rpc.manager.subscribe_request();
    request.get().set_sink(guard::new_client(Server(sink.clone())));
    let answer = rpc.wait("subscribe", request.send().promise).unwrap();
    answer.get().unwrap().get_subscription().unwrap()
}

/// Prints what the components have of the host's memory, where that can be read.
fn print_memory(guests: &[GuestInfo], when: &str) {
    let pss = |pid: u32| -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    let pids = guests.iter().map(|info| info.component_pid).filter(|pid| *pid != 0);
    let sizes: Option<Vec<u64>> = pids.map(pss).collect();
    match sizes {
        Some(sizes) => {
            let (count, kib) = (sizes.len(), sizes.iter().sum::<u64>());
            let mib = kib as f64 / 1024.0;
            println!("{when}: {count} components have {mib:.1} MiB, guest memory included");
        }
        None => println!("{when}: only root can tell the memory of components"),
    }
}

/// Checks that exactly these guests run, and returns their generations.
fn check(guests: &[GuestInfo], running: std::ops::Range<usize>) -> Vec<u64> {
    assert_eq!(guests.len(), GUESTS);
    for (number, info) in guests.iter().enumerate() {
        assert_eq!(info.name, name(number));
        // What was not running when the manager was killed is as if it had not been started.
        let resting = matches!(info.status, GuestStatus::Stopped | GuestStatus::NotStarted);
        let as_it_should = match running.contains(&number) {
            true => info.status == GuestStatus::Running,
            false => resting,
        };
        assert!(as_it_should && info.upkeep.defined && info.upkeep.durable, "{info:?}");
    }
    guests.iter().map(|info| info.generation).collect()
}

#[test]
fn two_hundred_guests_survive_their_manager() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    let mut rpc = world.connect();
    let sink = Rc::new(Sink::default());
    let subscription = subscribe(&mut rpc, &sink);
    all(&mut rpc, "defined", 0..GUESTS, |rpc, number| {
        let mut request = rpc.manager.define_request();
        let encoded = config(number).encode(request.get().init_definition().init_config(), &rpc.connection.fds());
        async move {
            encoded?;
            request.send().promise.await?.get()?.outcome().map(drop)
        }
    });
    let start = |rpc: &Rpc, number: usize| {
        let mut request = rpc.manager.start_request();
        request.get().set_name(name(number));
        request.get().set_detach(true);
        async move { request.send().promise.await?.get()?.outcome().map(drop) }
    };
    all(&mut rpc, "started", 0..GUESTS, start);
    let running = browse(&mut rpc);
    let before = check(&running, 0..GUESTS);
    until("all have figures", || (watched(&mut rpc).len() == GUESTS).then_some(()));
    sink.until_started(&mut rpc, GUESTS);
    print_memory(&running, "running");

    let stop = |rpc: &Rpc, number: usize| {
        let mut request = rpc.manager.force_shutdown_request();
        request.get().set_name(name(number));
        async move { read_completion(request.send().promise.await?.get()?) }
    };
    all(&mut rpc, "stopped", 0..STOPPED_EARLY, stop);
    drop((subscription, rpc));

    // Kills it; its keeper and the guests go on.
    drop(world.take_manager());
    let begun = Instant::now();
    world.start_manager();
    let mut rpc = world.connect();
    println!("another manager listens after {:.2} s", begun.elapsed().as_secs_f64());
    let running = browse(&mut rpc);
    let after = check(&running, STOPPED_EARLY..GUESTS);
    assert_eq!(before[STOPPED_EARLY..], after[STOPPED_EARLY..], "none was begun again");
    let sequence = *sink.sequences.borrow().last().unwrap();
    let late = Rc::new(Sink::default());
    let subscription = subscribe(&mut rpc, &late);
    until("all have figures", || {
        (watched(&mut rpc).len() == GUESTS - STOPPED_EARLY).then_some(())
    });
    print_memory(&running, "taken over");

    // Those that go on are still listening, and those that were stopped can be started.
    for number in [STOPPED_EARLY, GUESTS - 1] {
        let guest = rpc.lookup(&name(number)).unwrap();
        let mut request = guest.serial_request().send().pipeline.get_serial().write_request();
        request.get().set_bytes(b"echo still here\n");
        rpc.wait("typing", request.send()).unwrap();
        rpc.read_until(&guest, "\nstill here");
    }
    all(&mut rpc, "started again", 0..STOPPED_EARLY, start);
    late.until_started(&mut rpc, STOPPED_EARLY);
    assert!(
        late.sequences.borrow().first().is_some_and(|first| *first > sequence),
        "events are counted on"
    );
    check(&browse(&mut rpc), 0..GUESTS);
    all(&mut rpc, "stopped", 0..GUESTS, stop);
    check(&browse(&mut rpc), 0..0);
    all(&mut rpc, "undefined", 0..GUESTS, |rpc, number| {
        let mut request = rpc.manager.undefine_request();
        request.get().set_name(name(number));
        async move { read_completion(request.send().promise.await?.get()?) }
    });
    let left = browse(&mut rpc);
    assert!(left.iter().all(|info| !info.upkeep.defined), "{left:?}");
    drop((subscription, rpc));
    world.end();
}
