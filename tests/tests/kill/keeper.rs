//! The keeper is killed, and its components with it, also those that would outlive the manager; that goes on with a new one. Or it stands still: what is to
//! be stopped is stopped without it, and what is to begin begins by another one.

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

/// Waits until it has ended, reaped or not.
fn ended(process: &Process) {
    until("it ends", || {
        let now = Process::of(process.pid).filter(|now| now.start == process.start);
        now.is_none_or(|now| now.state == 'Z').then_some(())
    });
}

/// What a keeper that stands still has: as many guests as names, on their own, and itself.
fn still(names: &[&str]) -> (World, Process, Vec<Process>) {
    let world = World::with_manager();
    for name in names {
        world.guest(&["launch", name, "--detach"]).expect_code(0);
    }
    let components = world.components();
    assert_eq!(components.len(), names.len(), "{components:#?}");
    let keeper = world.keeper();
    keeper.signal(Signal::STOP);
    until("it is stopped", || {
        (Process::of(keeper.pid)?.state == 'T').then_some(())
    });
    (world, keeper, components)
}

#[test]
fn guests_are_stopped_although_the_keeper_stands_still() {
    if kvm_missing() {
        return;
    }
    let (world, keeper, components) = still(&["one", "two", "three"]);
    world.guest(&["stop", "one", "--kill"]).expect_code(0);
    world
        .guest(&["stop", "two", "--timeout", "0.1", "--force"])
        .expect_code(0);
    components[..2].iter().for_each(ended);
    let log = world.manager().stderr.text();
    assert!(log.contains(&format!("kill -CONT {}", keeper.pid)), "{log}");

    // What begins does so by another keeper.
    world.guest(&["reset", "three"]).expect_code(0);
    ended(&components[2]);
    until("it runs again", || {
        let list = world.guest(&["list"]).expect_code(0).out();
        (list.matches("running").count() == 1).then_some(())
    });
    world.guest(&["launch", "one", "--detach"]).expect_code(0);
    let begun = named(&world, "vmm-component");
    let begun: Vec<_> = begun.iter().filter(|process| process.parent != keeper.pid).collect();
    assert_eq!(begun.len(), 2, "{begun:#?}");

    // It goes on, and says late what nobody waits for any more.
    keeper.signal(Signal::CONT);
    for component in &components {
        until("it is reaped", || world.is_gone(component).then_some(()));
    }
    world.guest(&["stop", "one", "--kill"]).expect_code(0);
    let list = world.guest(&["list"]).expect_code(0).out();
    assert_eq!(list.matches("running").count(), 1, "{list}");
    world.end();
}

#[test]
fn a_manager_ends_although_its_keeper_stands_still() {
    if kvm_missing() {
        return;
    }
    for asked in [true, false] {
        let (mut world, keeper, components) = still(&["one", "two"]);
        let manager = world.take_manager();
        match asked {
            true => drop(world.guest(&["end-manager"]).expect_code(0)),
            false => manager.signal(Signal::TERM),
        }
        ended(&manager.process());
        components.iter().for_each(ended);
        // It ends by itself as soon as it can.
        keeper.signal(Signal::CONT);
        manager.wait().expect_code(0);
        world.assert_nothing_left();
    }
}

#[test]
fn what_waits_ends_with_the_manager_although_the_keeper_stands_still() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_pool(2);
    world.until_waiting(2);
    let (keeper, components) = (world.keeper(), world.components());
    keeper.signal(Signal::STOP);
    let manager = world.take_manager();
    manager.signal(Signal::TERM);
    ended(&manager.process());
    components.iter().for_each(ended);
    keeper.signal(Signal::CONT);
    manager.wait().expect_code(0);
    world.assert_nothing_left();
}

#[test]
fn a_durable_guest_outlives_its_manager_although_the_keeper_stands_still() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    world.guest(&["launch", "one", "--detach", "--durable"]).expect_code(0);
    world.guest(&["launch", "two", "--detach"]).expect_code(0);
    let keeper = world.keeper();
    keeper.signal(Signal::STOP);
    let manager = world.take_manager();
    manager.signal(Signal::TERM);
    ended(&manager.process());
    keeper.signal(Signal::CONT);
    world.start_manager();
    until("it runs on", || {
        let list = world.guest(&["list"]).expect_code(0).out();
        let runs = |line: &str| line.contains("one") && line.contains("running");
        (list.lines().any(runs) && list.matches("running").count() == 1).then_some(())
    });
    world.guest(&["stop", "one", "--kill"]).expect_code(0);
    // Nothing is left in the keeper, which has had its standard error so far.
    manager.wait().expect_code(0);
    world.end();
}
