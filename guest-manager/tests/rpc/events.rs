//! Events: their order, their replay, and subscribers that do not keep up.

use std::{cell::RefCell, future::Future, rc::Rc};

use sepal_guest_manager::{changed::Changed, manager::Settings, registry::Limits};
use sepal_schema::{
    config::{
        GuestConfig,
        device::{AGENT_PORT, Vsock},
    },
    guest_capnp::{event, event_sink, subscription},
    transport::guard,
};

use crate::{
    vsock::with_vsock,
    world::{Caller, kill, observer, power, run, with},
};

/// What a subscriber heard: guest, what happened, how many were lost before.
type Heard = (String, &'static str, u64);

fn what(event: event::Reader<'_>) -> &'static str {
    match event.which().unwrap() {
        event::Defined(()) => "defined",
        event::Starting(()) => "starting",
        event::Started(()) => "started",
        event::Paused(()) => "paused",
        event::Resumed(()) => "resumed",
        event::ShuttingDown(()) => "shutting-down",
        event::Stopped(_) => "stopped",
        event::Removed(()) => "removed",
        event::DeviceFailed(_) => "device-failed",
        event::IoError(_) => "io-error",
        event::GuestReady(()) => "guest-ready",
        _ => "another",
    }
}

/// A subscriber, which listens only as long as it is not asked to be slow.
#[derive(Default)]
struct Sink {
    heard: RefCell<Vec<Heard>>,
    slow: Changed<bool>,
    calls: Changed<usize>,
}

struct Server(Rc<Sink>);

impl event_sink::Server for Server {
    fn event(
        self: Rc<Self>,
        params: event_sink::EventParams,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let sink = self.0.clone();
        sink.calls.change(|calls| *calls += 1);
        async move {
            sink.slow.until(|slow| (!*slow).then_some(())).await;
            let params = params.get()?;
            let event = params.get_event()?;
            let name = event.get_guest()?.to_string()?;
            sink.heard.borrow_mut().push((name, what(event), params.get_dropped()));
            sink.calls.change(|_| ());
            Ok(())
        }
    }
}

impl Sink {
    /// Waits for so many events.
    async fn heard_of(&self, count: usize) {
        self.calls
            .until(|_| (self.heard.borrow().len() >= count).then_some(()))
            .await;
    }

    async fn hears(&self, count: usize) -> Vec<Heard> {
        self.heard_of(count).await;
        self.heard.borrow().clone()
    }
}

async fn subscribe(caller: &Caller, sink: &Rc<Sink>, replay: u32) -> subscription::Client {
    let mut request = caller.manager.subscribe_request();
    request.get().set_sink(guard::new_client(Server(sink.clone())));
    request.get().set_replay(replay);
    request
        .send()
        .promise
        .await
        .unwrap()
        .get()
        .unwrap()
        .get_subscription()
        .unwrap()
}

fn kinds(heard: &[Heard]) -> Vec<&'static str> {
    heard.iter().map(|(_, kind, _)| *kind).collect()
}

#[test]
fn a_life_is_told_in_order() {
    run(async |world| {
        let caller = world.caller();
        let sink = Rc::new(Sink::default());
        let _subscription = subscribe(&caller, &sink, 0).await;
        let launched = caller.launch("web").await.unwrap();
        power(&launched.guest).pause_request().send().promise.await.unwrap();
        power(&launched.guest).resume_request().send().promise.await.unwrap();
        let process = world.fake.last();
        process.tell(|event| event.init_device_failed().set_device("rng")).await;
        kill(&launched.guest).await.unwrap();
        caller.remove("web").await.unwrap();
        let expected = [
            "defined",
            "starting",
            "started",
            "paused",
            "resumed",
            "device-failed",
            "shutting-down",
            "stopped",
            "removed",
        ];
        let heard = sink.hears(expected.len()).await;
        assert_eq!(kinds(&heard), expected);
        assert!(heard.iter().all(|(name, _, dropped)| name == "web" && *dropped == 0));
    });
}

#[test]
fn an_agent_that_comes_and_goes_is_told_of_once_a_run() {
    run(async |world| {
        let caller = world.caller();
        let sink = Rc::new(Sink::default());
        let _subscription = subscribe(&caller, &sink, 0).await;
        let config = GuestConfig {
            agent: true,
            ..with_vsock(Vsock::default())
        };
        let launched = caller.launch_config(config, true).await.unwrap();
        let sockets = world.fake.last().sockets.clone();
        for _ in 0..5 {
            drop(sockets.connect(&world, AGENT_PORT).await.unwrap());
            // By then the manager has seen that it is gone.
            for _ in 0..3 {
                caller.list().await;
            }
        }
        // So many connections are heard at a time, and no more.
        let mut heard = Vec::new();
        while let Some(connection) = sockets.connect(&world, AGENT_PORT).await {
            heard.push(connection);
        }
        assert_eq!(heard.len(), 8);
        kill(&launched.guest).await.unwrap();
        let heard = kinds(&sink.hears(6).await);
        let expected = [
            "defined",
            "starting",
            "started",
            "guest-ready",
            "shutting-down",
            "stopped",
        ];
        assert_eq!(heard, expected);
    });
}

#[test]
fn the_past_is_told_first_to_those_who_ask() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let (late, all) = (Rc::new(Sink::default()), Rc::new(Sink::default()));
        let _late = subscribe(&caller, &late, 2).await;
        let _all = subscribe(&caller, &all, u32::MAX).await;
        kill(&launched.guest).await.unwrap();
        assert_eq!(
            kinds(&late.hears(4).await),
            ["starting", "started", "shutting-down", "stopped"]
        );
        assert_eq!(kinds(&all.hears(5).await)[..2], ["defined", "starting"]);
    });
}

#[test]
fn one_guests_events_are_told_to_whoever_observes_it() {
    run(async |world| {
        let caller = world.caller();
        let one = caller.launch("one").await.unwrap();
        let sink = Rc::new(Sink::default());
        let mut request = observer(&one.guest).subscribe_request();
        request.get().set_sink(guard::new_client(Server(sink.clone())));
        let subscribed = request.send().promise.await.unwrap();
        let _two = caller.launch("two").await.unwrap();
        kill(&one.guest).await.unwrap();
        let heard = sink.hears(2).await;
        assert_eq!(kinds(&heard), ["shutting-down", "stopped"]);
        drop(subscribed);
        caller.remove("one").await.unwrap();
    });
}

#[test]
fn one_guests_past_is_told_first_to_those_who_ask() {
    run(async |world| {
        let caller = world.caller();
        let one = caller.launch("one").await.unwrap();
        let _two = caller.launch("two").await.unwrap();
        let (last, all) = (Rc::new(Sink::default()), Rc::new(Sink::default()));
        let mut subscribed = Vec::new();
        for (sink, replay) in [(&last, 1), (&all, u32::MAX)] {
            let mut request = observer(&one.guest).subscribe_request();
            request.get().set_sink(guard::new_client(Server(sink.clone())));
            request.get().set_replay(replay);
            subscribed.push(request.send().promise.await.unwrap());
        }
        kill(&one.guest).await.unwrap();
        assert_eq!(kinds(&last.hears(3).await), ["started", "shutting-down", "stopped"]);
        let all = all.hears(5).await;
        assert_eq!(
            kinds(&all),
            ["defined", "starting", "started", "shutting-down", "stopped"]
        );
        assert!(all.iter().all(|(name, ..)| name == "one"));
    });
}

#[test]
fn thousands_of_events_for_one_who_never_answers_cost_nobody_else_anything() {
    const EVENTS: usize = 4_000;
    /// Names that are taken at a time, each two events.
    const BATCH: usize = 100;
    run(async |world| {
        let caller = world.caller();
        let (never, quick) = (Rc::new(Sink::default()), Rc::new(Sink::default()));
        never.slow.change(|slow| *slow = true);
        let deaf = world.caller();
        let _never = subscribe(&deaf, &never, 0).await;
        let _quick = subscribe(&caller, &quick, 0).await;
        for batch in 1..=EVENTS / 2 / BATCH {
            let names = futures::future::join_all((0..BATCH).map(|_| caller.new_guest(""))).await;
            assert!(names.iter().all(Result::is_ok));
            drop(names);
            // So that whoever keeps up loses none.
            quick.heard_of(batch * BATCH * 2).await;
        }
        let quick = quick.hears(EVENTS).await;
        assert!(quick.iter().all(|(_, _, dropped)| *dropped == 0));
        assert_eq!(
            never.calls.look(|calls| *calls),
            1,
            "one event is under way, the others only in the ring"
        );
        never.slow.change(|slow| *slow = false);
        let late = never.hears(1025).await;
        let dropped: u64 = late.iter().map(|(_, _, dropped)| *dropped).sum();
        assert_eq!(
            (late.len() as u64 + dropped, late[1].2 as usize),
            (EVENTS as u64, EVENTS - 1025)
        );
    });
}

#[test]
fn a_slow_subscriber_has_one_call_in_flight_and_learns_what_it_lost() {
    let limits = Limits {
        events: 4,
        ..Limits::default()
    };
    with(
        Settings {
            limits,
            ..Settings::default()
        },
        async |world| {
            let caller = world.caller();
            let (slow, quick) = (Rc::new(Sink::default()), Rc::new(Sink::default()));
            slow.slow.change(|slow| *slow = true);
            let _slow = subscribe(&caller, &slow, 0).await;
            let _quick = subscribe(&caller, &quick, 0).await;
            for round in 1..=3 {
                let launched = caller.launch("web").await.unwrap();
                kill(&launched.guest).await.unwrap();
                quick.hears(round * 5).await;
            }
            slow.calls.until(|calls| (*calls > 0).then_some(())).await;
            assert_eq!(slow.calls.look(|calls| *calls), 1);
            slow.slow.change(|slow| *slow = false);
            let heard = slow.hears(5).await;
            let lost: Vec<u64> = heard.iter().map(|(_, _, dropped)| *dropped).collect();
            assert_eq!(lost, [0, 10, 0, 0, 0], "15 events, of which 4 were still there");
            assert_eq!(kinds(&heard)[1..], ["starting", "started", "shutting-down", "stopped"]);
        },
    );
}

#[test]
fn dropping_a_subscription_ends_the_events() {
    run(async |world| {
        let caller = world.caller();
        let (left, kept) = (Rc::new(Sink::default()), Rc::new(Sink::default()));
        let subscription = subscribe(&caller, &left, 0).await;
        drop(subscription);
        // A call behind the one that drops it.
        caller.list().await;
        let _kept = subscribe(&caller, &kept, 0).await;
        let _launched = caller.launch("web").await.unwrap();
        kept.hears(3).await;
        assert!(left.heard.borrow().is_empty());
    });
}
