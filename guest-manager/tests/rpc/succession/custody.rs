//! What is kept with the keeper, in which order, and what becomes of a guest where that cannot be.

use std::{cell::Cell, os::unix::net::UnixStream, rc::Rc};

use sepal_guest_manager::{
    component::{Component, Exit, StartRequest, Started},
    manager::Settings,
};
use sepal_schema::{
    config::{GuestConfig, Restart, RestartPolicy},
    error::Kind,
    info::GuestStatus,
    report::Reason,
    transport::Reactor,
};

use super::durable;
use crate::{
    fake::keeper::Keeper,
    power::Scene,
    world::{info, kill, named, status},
};

fn restarting() -> GuestConfig {
    GuestConfig {
        restart: Restart {
            policy: RestartPolicy::OnFailure,
            attempts: 1000,
            delay_ms: 1,
            max_delay_ms: 1,
            healthy_ms: 3_600_000,
        },
        ..durable("web")
    }
}

#[test]
fn everything_is_kept_before_a_component_may_go_on_and_nothing_is_let_go_of_before_the_next_one_has_it() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let scene = Scene::new(&world, restarting()).await;
        world.fake.last().die(Exit::Signal(11));
        scene.heard.until("started", 2).await;
        kill(scene.guest()).await.unwrap();
    });
    let story = keeper.story.take();
    let all = |pid: u32| {
        let labels = ["record", "config.0", "rings", "ports", "log", "successors", "durable"];
        labels.map(|label| match label {
            "durable" => format!("{pid}: durable"),
            label => format!("{pid}: {label}"),
        })
    };
    let mut expected = vec!["own".to_owned()];
    expected.extend(all(1000));
    expected.extend(all(1001));
    expected.extend(["1000: release".to_owned(), "1001: release".to_owned()]);
    assert_eq!(story, expected);
}

#[test]
fn what_cannot_be_kept_is_not_started_and_whoever_launches_it_is_told() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        keeper.fails.set(Some(Kind::StartFailure));
        let error = caller.launch_config(durable("web"), false).await.err().unwrap();
        assert_eq!(error.kind, Kind::StartFailure);
        // Of others nothing is kept.
        caller.launch_config(named("other"), true).await.unwrap();
        keeper.fails.set(None);
        caller.launch_config(durable("web"), true).await.unwrap();
        // The keeper goes while the component is there.
        let process = world.fake.last();
        assert!(process.alive());
    });
    assert_eq!(keeper.processes().len(), 1);
}

#[test]
fn a_guest_whose_next_component_cannot_be_kept_is_tried_again() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let scene = Scene::new(&world, restarting()).await;
        keeper.fails.set(Some(Kind::NoStorage));
        world.fake.last().die(Exit::Signal(11));
        scene.heard.until("restarting", 3).await;
        let failed = info(scene.guest()).await;
        assert_eq!(failed.stop.unwrap().reason, Reason::StartFailed);
        keeper.fails.set(None);
        while status(scene.guest()).await != GuestStatus::Running {
            scene.caller.list().await;
        }
    });
    // And goes on without the manager.
    keeper.manager(Settings::default(), async |world| {
        let guests = world.caller().list().await;
        assert_eq!(guests[0].status, GuestStatus::Running);
        assert!(guests[0].upkeep.durable);
    });
}

#[test]
fn what_is_taken_over_where_nothing_more_can_be_kept_goes_on() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        world.caller().launch_config(durable("web"), true).await.unwrap();
    });
    keeper.fails.set(Some(Kind::NoStorage));
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        assert_eq!(status(&guest).await, GuestStatus::Running);
        let error = caller.launch_config(durable("other"), true).await.err().unwrap();
        assert_eq!(error.kind, Kind::NoStorage);
        assert_eq!(status(&guest).await, GuestStatus::Running);
    });
    keeper.fails.set(None);
    keeper.manager(Settings::default(), async |world| {
        let guests = world.caller().list().await;
        let runs = guests.iter().filter(|info| info.status == GuestStatus::Running);
        assert_eq!(runs.map(|info| &*info.name).collect::<Vec<_>>(), ["web"]);
    });
}

#[test]
fn a_component_that_nobody_can_hear_is_killed() {
    let reactor = Reactor::new().unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let killed = Rc::new(Cell::new(false));
    let kill = killed.clone();
    let started = Started {
        pid: 1,
        socket: ours,
        // Nothing that an event loop could wait for.
        stderr: Some(tempfile::tempfile().unwrap().into()),
        kill: Box::new(move || kill.set(true)),
        exit: Box::pin(std::future::pending()),
        custody: None,
    };
    let request = StartRequest::new("web".into(), &GuestConfig::default());
    assert!(Component::new(&reactor.handle(), request, started).is_err());
    assert!(killed.get());
}
