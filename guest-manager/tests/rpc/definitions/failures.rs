//! What is known of failed runs is on the disk, but not as often as they fail.

use std::{fs, time::Duration};

use sepal_guest_manager::{component::Exit, manager::Settings};
use sepal_schema::config::{GuestConfig, Restart, RestartPolicy};

use super::kept::Kept;
use crate::{
    restarts::crashes,
    world::{World, named, with},
};

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
        let crashes = crashes(&started.guest).await;
        let generations: Vec<_> = crashes.iter().map(|crash| crash.generation).collect();
        assert_eq!(generations, [20, 19, 18, 17]);
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
            crate::world::wait(&started.guest).await;
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
