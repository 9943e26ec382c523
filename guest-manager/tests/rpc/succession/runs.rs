//! What was under way when a manager ended: waits for the next run, stops, ends, and what was told already.

use std::{cell::RefCell, rc::Rc, time::Duration};

use sepal_guest_manager::{component::Exit, manager::Settings};
use sepal_schema::{
    config::{GuestConfig, OnReset, Restart, RestartPolicy},
    error::read_completion,
    guest_capnp::{event, event_sink},
    info::GuestStatus,
    report::Reason,
    transport::guard,
};

use super::durable;
use crate::{
    fake::{
        Behaviour, Does,
        keeper::{Keeper, brisk},
    },
    power::Scene,
    world::{World, info, kill, power, status, wait},
};

const HOUR: u32 = 3_600_000;

fn restarting(policy: RestartPolicy, delay_ms: u32) -> GuestConfig {
    GuestConfig {
        restart: Restart {
            policy,
            attempts: 100,
            delay_ms,
            max_delay_ms: HOUR,
            healthy_ms: HOUR,
        },
        ..durable("web")
    }
}

/// Numbers, guests and kinds of all events that are kept.
async fn told(world: &World) -> Vec<(u64, &'static str)> {
    #[derive(Default)]
    struct Sink(RefCell<Vec<(u64, &'static str)>>);
    struct Server(Rc<Sink>);
    impl event_sink::Server for Server {
        async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
            let event = params.get()?.get_event()?;
            let kind = match event.which()? {
                event::Defined(()) => "defined",
                event::Starting(()) => "starting",
                event::Started(()) => "started",
                event::Stopped(_) => "stopped",
                event::Restarting(_) => "restarting",
                event::Crashed(_) => "crashed",
                event::IoError(_) => "io-error",
                event::ShuttingDown(()) => "shutting-down",
                _ => "another",
            };
            self.0.0.borrow_mut().push((event.get_sequence(), kind));
            Ok(())
        }
    }
    let (caller, sink) = (world.caller(), Rc::new(Sink::default()));
    let last = world.manager.registry(|registry, _| registry.log().last());
    let mut request = caller.manager.subscribe_request();
    request.get().set_sink(guard::new_client(Server(sink.clone())));
    request.get().set_replay(u32::MAX);
    let subscribed = request.send().promise.await.unwrap();
    while sink.0.borrow().last().is_none_or(|(number, _)| *number < last) {
        caller.list().await;
    }
    drop(subscribed);
    sink.0.take()
}

fn kinds(told: &[(u64, &'static str)]) -> Vec<&'static str> {
    assert!(told.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0), "{told:?}");
    told.iter().map(|(_, kind)| *kind).collect()
}

#[test]
fn who_waits_to_begin_again_waits_as_long_as_was_left() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let config = restarting(RestartPolicy::OnFailure, HOUR);
        let scene = Scene::new(&world, config).await;
        world.fake.last().die(Exit::Signal(11));
        scene.heard.until("restarting", 1).await;
    });
    for _ in 0..2 {
        keeper.manager(Settings::default(), async |world| {
            let caller = world.caller();
            let guest = caller.lookup("web").await.unwrap();
            for _ in 0..10 {
                caller.list().await;
            }
            let seen = info(&guest).await;
            assert_eq!((seen.status, seen.generation), (GuestStatus::Starting, 1));
            assert_eq!((seen.upkeep.failures, world.fake.alive()), (1, 0));
        });
    }
    // A reset ends the waiting, as ever.
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        let reset = power(&guest).reset_request().send().promise.await.unwrap();
        read_completion(reset.get().unwrap()).unwrap();
        let seen = info(&guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Running, 2));
    });
}

#[test]
fn who_has_waited_long_enough_begins() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let config = restarting(RestartPolicy::Always, 50);
        let scene = Scene::new(&world, config).await;
        world.fake.last().end(Reason::Shutdown);
        scene.heard.until("restarting", 1).await;
    });
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        while status(&guest).await != GuestStatus::Running {
            world.handle.sleep(Duration::from_millis(1)).await;
        }
        let seen = info(&guest).await;
        assert_eq!((seen.generation, seen.upkeep.restarts), (2, 1));
        assert_eq!(
            kinds(&told(&world).await),
            ["defined", "starting", "started", "restarting", "starting", "started"]
        );
    });
}

#[test]
fn who_is_to_be_held_is_held() {
    let keeper = Keeper::new();
    let settings = Settings {
        restart_wait: Duration::from_secs(3600),
        ..Settings::default()
    };
    keeper.manager(settings, async |world| {
        let config = GuestConfig {
            on_reset: OnReset::Pause,
            ..durable("web")
        };
        let scene = Scene::new(&world, config).await;
        // Three are let pass, then it waits.
        for generation in 1..=4 {
            scene.heard.until("starting", generation).await;
            if generation > 1 {
                scene.heard.until("paused", generation).await;
                power(scene.guest()).resume_request().send().promise.await.unwrap();
            }
            scene.heard.until("started", generation).await;
            world.fake.last().end(Reason::Reset);
            scene.heard.until("restarting", generation).await;
        }
    });
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        let seen = info(&guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Starting, 4));
        let reset = power(&guest).reset_request().send().promise.await.unwrap();
        read_completion(reset.get().unwrap()).unwrap();
        assert_eq!(status(&guest).await, GuestStatus::Running);
    });
}

#[test]
fn a_stop_that_a_manager_began_is_brought_to_its_end_by_the_next() {
    let keeper = Keeper::new();
    let slow = Settings {
        force_after: Duration::from_secs(3600),
        ..Settings::default()
    };
    keeper.manager(slow, async |world| {
        world.fake.behaviour.set(Behaviour {
            stop: Does::Hangs,
            ..Behaviour::default()
        });
        let scene = Scene::new(&world, restarting(RestartPolicy::Always, 1)).await;
        let killed = kill(scene.guest());
        let asked = world.fake.last();
        futures::future::select(std::pin::pin!(killed), std::pin::pin!(asked.asked_to_stop())).await;
    });
    keeper.manager(brisk(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        let report = wait(&guest).await;
        assert_eq!(report.reason, Reason::Killed, "{}", report.detail);
        let told = told(&world).await;
        assert_eq!(
            kinds(&told),
            ["defined", "starting", "started", "shutting-down", "stopped"]
        );
    });
    assert!(keeper.holds().is_empty());
}

#[test]
fn how_a_run_ended_is_known_although_its_component_was_already_being_killed() {
    let keeper = Keeper::new();
    for (policy, stays_ended) in [(RestartPolicy::OnFailure, true), (RestartPolicy::Always, false)] {
        keeper.manager(Settings::default(), async |world| {
            let _scene = Scene::new(&world, restarting(policy, HOUR)).await;
            let process = world.fake.last();
            process.behave(Behaviour {
                lingers: true,
                ..Behaviour::default()
            });
            process.end(Reason::Shutdown);
            process.told_of_its_end().await;
            // The manager is killed while it waits for the process to go.
        });
        let process = keeper.processes().pop().unwrap();
        process.die(Exit::Signal(9));
        keeper.manager(Settings::default(), async |world| {
            let caller = world.caller();
            let guest = caller.lookup("web").await.unwrap();
            if stays_ended {
                let report = wait(&guest).await;
                assert_eq!(report.reason, Reason::Shutdown, "{}", report.detail);
                return;
            }
            while info(&guest).await.stop.is_none() {
                caller.list().await;
            }
            let seen = info(&guest).await;
            assert_eq!((seen.status, seen.upkeep.failures), (GuestStatus::Starting, 0));
            assert_eq!(seen.stop.unwrap().reason, Reason::Shutdown);
            kill(&guest).await.unwrap();
        });
    }
}

#[test]
fn who_was_asked_to_shut_down_and_does_so_later_stays_off() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        world.fake.behaviour.set(Behaviour {
            button: Does::Hangs,
            ..Behaviour::default()
        });
        let scene = Scene::new(&world, restarting(RestartPolicy::Always, 1)).await;
        let pressed = power(scene.guest()).shutdown_request().send().promise.await.unwrap();
        read_completion(pressed.get().unwrap()).unwrap();
    });
    let process = keeper.processes().remove(0);
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        process.end(Reason::Shutdown);
        assert_eq!(wait(&guest).await.reason, Reason::Shutdown);
    });
}

#[test]
fn what_a_component_tells_again_is_not_told_on_again() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let _scene = Scene::new(&world, durable("web")).await;
        let process = world.fake.last();
        for number in 1..=2 {
            let io_error = |event: event::Builder<'_>| event.init_io_error().set_device("disk0");
            process.tell_numbered(number, io_error).await;
        }
    });
    let process = keeper.processes().remove(0);
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        while !process.is_attached() {
            info(&guest).await;
        }
        // It has not heard that the last one was heard.
        for number in 2..=3 {
            let io_error = |event: event::Builder<'_>| event.init_io_error().set_device("disk0");
            process.tell_numbered(number, io_error).await;
        }
        let told = told(&world).await;
        assert_eq!(
            kinds(&told),
            ["defined", "starting", "started", "io-error", "io-error", "io-error"]
        );
    });
}
