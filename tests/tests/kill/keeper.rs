//! The keeper is killed, and its components with it, also those that would outlive the manager; that goes on with a new one.

use crate::{
    at_every_state,
    component::check_and_go_on,
    states::{Scene, State},
};
use rustix::process::Signal;
use sepal_tests::{World, kvm_missing, process::Process, until};

at_every_state!(killed:
    when_named Named,
    while_creating Creating,
    when_created Created,
    while_running Running,
    while_paused Paused,
    when_asked_to_shut_down Asked,
    while_stopping Stopping,
    when_stopped Stopped,
);

fn killed(scene: Scene) {
    let keeper = scene.world.keeper();
    scene.kill(&keeper);
    let Some(component) = scene.component.clone() else {
        assert!(scene.state == State::Named);
        scene.go_on_and_end();
        return;
    };
    until("the component ends with its parent", || {
        scene.world.is_gone(&component).then_some(())
    });
    check_and_go_on(scene, "keeper");
}

/// Every process of the world's that goes by this name.
fn named(world: &World, name: &str) -> Vec<Process> {
    let mut all = world.family();
    all.retain(|process| process.name == name && process.state != 'Z');
    // What one has forked has its name for a moment.
    let pids: Vec<_> = all.iter().map(|process| process.pid).collect();
    all.retain(|process| !pids.contains(&process.parent));
    all
}

#[test]
fn guests_that_would_outlive_their_manager_end_with_the_keeper() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let launch = |name| drop(world.guest(&["launch", name, "--detach", "--durable"]).expect_code(0));
    let kill = |process: &Process| {
        process.signal(Signal::KILL);
        until("it is reaped", || world.is_gone(process).then_some(()));
    };
    launch("one");
    launch("two");
    let keepers = named(&world, "sepal-keeper");
    let [keeper] = &keepers[..] else { panic!("{keepers:#?}") };
    let components = named(&world, "vmm-component");
    assert!(components.len() >= 2, "{components:#?}");
    kill(keeper);
    for component in &components {
        until("a component ends with its parent", || {
            world.is_gone(component).then_some(())
        });
    }
    until("the manager has heard of it", || {
        let list = world.guest(&["list"]).expect_code(0).out();
        (list.matches("vmm-terminated").count() == 2).then_some(())
    });

    // The manager goes on with a new keeper, whose guests the next manager has again.
    launch("one");
    let managers = named(&world, "guest-manager");
    let [manager] = &managers[..] else {
        panic!("{managers:#?}")
    };
    kill(manager);
    launch("three");
    let list = world.guest(&["list"]).expect_code(0).out();
    assert!(list.contains("one") && list.contains("three"), "{list}");
    // What had ended is remembered.
    assert!(list.contains("two") && list.contains("vmm-terminated"), "{list}");
    assert_eq!(list.matches("running").count(), 2, "{list}");
    world.guest(&["end-manager"]).expect_code(0);
    world.end();
}
