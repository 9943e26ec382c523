//! Components that wait for their guests.

use std::{
    collections::HashSet,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use sepal_guest_manager::component::Exit;
use sepal_schema::{
    config::{GuestConfig, Limits},
    error::Kind,
};

use crate::{
    fake::{Behaviour, Does},
    world::{info, named, run, stop, with_pool},
};

#[test]
fn a_launch_takes_one_that_waits_and_another_takes_its_place() {
    with_pool(2, async |world, pool| {
        pool.until_waiting(2).await;
        let caller = world.caller();
        assert!(caller.list().await.is_empty(), "what waits is no guest");
        let waits = world.fake.processes.borrow()[0].clone();
        let launched = caller.launch("web").await.unwrap();
        assert!(waits.is_running());
        assert_eq!(info(&launched.guest).await.component_pid, waits.pid);
        pool.until_waiting(2).await;
        assert_eq!((world.fake.count(), world.fake.alive()), (3, 3));
        // Its end is no affair of the pool's.
        stop(&launched.guest, 0, false).await.unwrap();
        assert_eq!((world.fake.count(), world.fake.alive(), pool.waiting()), (3, 2, 2));
    });
}

#[test]
fn what_asks_for_limits_or_waives_layers_gets_one_that_was_started_so() {
    with_pool(1, async |world, pool| {
        pool.until_waiting(1).await;
        let caller = world.caller();
        let limits = Limits {
            tasks: 40,
            ..Limits::default()
        };
        let limited = GuestConfig {
            limits,
            ..named("limited")
        };
        let _limited = caller.launch_config(limited, true).await.unwrap();
        assert_eq!(world.fake.requests.borrow().last().unwrap().limits, limits);
        let waived = GuestConfig {
            waived_layers: vec!["landlock".into()],
            ..named("waived")
        };
        let _waived = caller.launch_config(waived, true).await.unwrap();
        assert_eq!(world.fake.requests.borrow().last().unwrap().waived_layers, ["landlock"]);
        assert_eq!(
            (world.fake.count(), pool.waiting()),
            (3, 1),
            "the one that waits still does"
        );
        assert!(!world.fake.processes.borrow()[0].is_running());
    });
}

#[test]
fn one_that_dies_is_replaced() {
    with_pool(1, async |world, pool| {
        pool.until_waiting(1).await;
        world.fake.last().die(Exit::Signal(9));
        pool.until_waiting(0).await;
        pool.until_waiting(1).await;
        assert_eq!((world.fake.count(), world.fake.alive()), (2, 1));
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        assert_eq!(
            info(&launched.guest).await.component_pid,
            world.fake.processes.borrow()[1].pid
        );
    });
}

#[test]
fn one_whose_connection_is_gone_is_not_handed_out() {
    with_pool(1, async |world, pool| {
        pool.until_waiting(1).await;
        let dead = world.fake.last();
        dead.hang_up();
        // The loop is what closes it.
        let caller = world.caller();
        caller.list().await;
        let _launched = caller.launch("web").await.unwrap();
        assert!(!dead.alive() && !dead.is_running());
        assert_eq!(
            world
                .fake
                .processes
                .borrow()
                .iter()
                .filter(|process| process.is_running())
                .count(),
            1
        );
    });
}

#[test]
fn as_long_as_none_can_be_started_launch_says_why_and_then_they_wait_again() {
    with_pool(1, async |world, pool| {
        world.fake.behaviour.set(Behaviour {
            start: Does::Fails(Kind::StartFailure),
            ..Behaviour::default()
        });
        let error = world.caller().launch("web").await.err().unwrap();
        assert_eq!(error.kind, Kind::StartFailure);
        assert_eq!(pool.waiting(), 0);
        world.fake.behaviour.set(Behaviour::default());
        pool.until_waiting(1).await;
    });
}

#[test]
fn all_seats_back_off_together_and_the_log_says_it_once() {
    let log = Log::default();
    let to = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || to.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        with_pool(8, async |world, pool| {
            world.fake.behaviour.set(Behaviour {
                start: Does::Fails(Kind::StartFailure),
                ..Behaviour::default()
            });
            while log.warnings().len() < 3 {
                world.handle.sleep(Duration::from_millis(1)).await;
            }
            world.fake.behaviour.set(Behaviour::default());
            pool.until_waiting(8).await;
        });
    });
    let warnings = log.warnings();
    for (warning, pause) in warnings.iter().zip(["100 ms", "200 ms", "400 ms"]) {
        assert!(
            warning.contains(&format!("for {pause}: the fake does not start")),
            "{warning}"
        );
    }
    // Each names another pause: no seat has said what another had.
    let pauses: HashSet<_> = warnings
        .iter()
        .map(|line| line.split_once(" for ").unwrap().1)
        .collect();
    assert_eq!(pauses.len(), warnings.len(), "{warnings:?}");
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn warnings(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().filter(|line| line.contains("no component waits"));
        lines.map(str::to_owned).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn those_who_wait_end_with_the_pool() {
    with_pool(3, async |world, pool| {
        pool.until_waiting(3).await;
        let fake = world.fake.clone();
        drop((world, pool));
        assert_eq!((fake.count(), fake.alive()), (3, 0));
    });
}

#[test]
fn without_a_pool_nobody_waits() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        assert_eq!(world.fake.count(), 1);
        stop(&launched.guest, 0, false).await.unwrap();
        assert_eq!((world.fake.count(), world.fake.alive()), (1, 0));
    });
}
