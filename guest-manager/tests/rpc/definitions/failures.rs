//! What is known of failed runs is on the disk, but not as often as they fail.

use std::{fs, time::Duration};

use sepal_guest_manager::{component::Exit, manager::Settings};
use sepal_schema::{
    config::{GuestConfig, Restart, RestartPolicy},
    error::Kind,
    guest_capnp::guest,
    info::GuestStatus,
    report::Reason,
};

use super::kept::{Kept, about};
use crate::{
    restarts::crashes,
    world::{World, info, kill, named, stop, wait, with},
};

/// Which runs are known to have failed, newest first.
async fn failed(guest: &guest::Client) -> Vec<u64> {
    crashes(guest).await.iter().map(|crash| crash.generation).collect()
}

/// The component of the run of this number dies.
async fn dies(world: &World, run: usize) {
    while world.fake.count() < run {
        world.handle.sleep(Duration::from_millis(1)).await;
    }
    world.fake.last().running().await;
    world.fake.last().die(Exit::Signal(11));
}

#[test]
fn a_guest_that_fails_again_and_again_does_not_keep_the_disk_busy() {
    let kept = Kept::new();
    let file = kept.folder.path().join("state/definitions/web.sepal");
    let settings = Settings {
        failures_rest: Duration::from_secs(3600),
        ..kept.settings()
    };
    with(settings, async |world| {
        let caller = world.caller();
        let restart = Restart {
            policy: RestartPolicy::OnFailure,
            attempts: 100,
            delay_ms: 1,
            max_delay_ms: 1,
            healthy_ms: 3_600_000,
        };
        let config = GuestConfig {
            restart,
            ..named("web")
        };
        caller.define(config).await.unwrap();
        let before = fs::read(&file).unwrap();
        caller.start("web", true).await.unwrap();
        dies(&world, 1).await;
        // The first failure is written at once, by the by.
        while fs::read(&file).unwrap() == before {
            caller.list().await;
        }
        let first = fs::read(&file).unwrap();
        for run in 2..=20 {
            dies(&world, run).await;
        }
        while world.fake.count() < 21 {
            caller.list().await;
        }
        assert_eq!(fs::read(&file).unwrap(), first);
        // At the end of the manager nothing is left unwritten.
        world.manager.end("the test is over").await;
        assert_ne!(fs::read(&file).unwrap(), first);
    });
    kept.manager(async |world| {
        let caller = world.caller();
        let started = caller.start("web", true).await.unwrap();
        assert_eq!(failed(&started.guest).await, [20, 19, 18, 17]);
    });
}

#[test]
fn what_was_still_to_be_written_goes_with_the_definition() {
    let kept = Kept::new();
    let settings = Settings {
        failures_rest: Duration::from_secs(3600),
        ..kept.settings()
    };
    with(settings, async |world| {
        let caller = world.caller();
        caller.define(named("web")).await.unwrap();
        for run in 1..=2 {
            let started = caller.start("web", true).await.unwrap();
            dies(&world, run).await;
            wait(&started.guest).await;
        }
        caller.undefine("web").await.unwrap();
        caller.define(named("web")).await.unwrap();
        world.manager.end("the test is over").await;
    });
    kept.manager(async |world| {
        let caller = world.caller();
        let started = caller.start("web", true).await.unwrap();
        assert!(crashes(&started.guest).await.is_empty());
    });
}

#[test]
fn what_is_known_of_failures_is_there_before_the_guest_is_started_again() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        caller.define(named("web")).await.unwrap();
        caller.define(named("quiet")).await.unwrap();
        for run in 1..=2 {
            let started = caller.start("web", true).await.unwrap();
            dies(&world, run).await;
            wait(&started.guest).await;
        }
        let started = caller.start("quiet", true).await.unwrap();
        kill(&started.guest).await.unwrap();
        world.manager.end("the test is over").await;
    });
    kept.manager(async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        assert_eq!(failed(&guest).await, [2, 1]);
        let seen = caller.seen("web").await.unwrap();
        assert_eq!(
            (seen.status, seen.generation),
            (GuestStatus::VmmUnexpectedTermination, 2)
        );
        assert_eq!(info(&guest).await, seen);
        let last = seen.stop.unwrap();
        assert_eq!(last, crashes(&guest).await[0].report);
        assert_eq!(wait(&guest).await, last);
        // It is what it would be after its end: nothing that could be stopped.
        assert_eq!(stop(&guest, 1, true).await.unwrap_err().kind, Kind::NotRunning);
        assert_eq!(caller.force_shutdown("web").await.unwrap_err().kind, Kind::NotRunning);
        assert_eq!(about(caller.remove("web").await, Kind::AlreadyBound), "name");
        // Nothing is written of a guest that has never failed.
        let seen = caller.seen("quiet").await.unwrap();
        assert_eq!((seen.status, seen.stop), (GuestStatus::NotStarted, None));
        assert_eq!(about(caller.lookup("quiet").await, Kind::NotFound), "name");
    });
    kept.manager(async |world| {
        let caller = world.caller();
        // A new definition of the same name keeps what is known.
        caller.define_as(named("web"), false, true).await.unwrap();
        let started = caller.start("web", true).await.unwrap();
        assert_eq!(info(&started.guest).await.generation, 3);
        dies(&world, 1).await;
        wait(&started.guest).await;
        assert_eq!(failed(&started.guest).await, [3, 2, 1]);
        world.manager.end("the test is over").await;
    });
    kept.manager(async |world| {
        let caller = world.caller();
        assert_eq!(failed(&caller.lookup("web").await.unwrap()).await, [3, 2, 1]);
        caller.undefine("web").await.unwrap();
        assert!(caller.seen("web").await.is_none());
        assert_eq!(about(caller.lookup("web").await, Kind::NotFound), "name");
    });
}

#[test]
fn a_run_that_did_not_fail_is_known_to_be_the_last_where_an_older_one_did() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        caller.define(named("web")).await.unwrap();
        let started = caller.start("web", true).await.unwrap();
        dies(&world, 1).await;
        wait(&started.guest).await;
        world.manager.end("the test is over").await;
    });
    kept.manager(async |world| {
        // It ends with its manager.
        let caller = world.caller();
        caller.start("web", true).await.unwrap();
        world.manager.end("the test is over").await;
    });
    kept.manager(async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        let seen = info(&guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Stopped, 2));
        assert_eq!(seen.stop.unwrap().reason, Reason::Killed);
        assert_eq!(failed(&guest).await, [1]);
    });
}
