//! Kills as a user of the command sees them.

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing, process::Process, until};

use crate::states::{PROMPT, component, is_component, is_sealed};

/// The processes of `guest launch` with a manager of its own: the command, the manager, the keeper, the component.
fn private(world: &World) -> [Process; 4] {
    let family = world.family();
    let find = |name: &str| {
        let found = family.iter().find(|process| process.name == name);
        found.unwrap_or_else(|| panic!("{name} in {family:#?}")).clone()
    };
    ["guest", "guest-manager", "sepal-keeper", "vmm-component"].map(find)
}

#[test]
fn launch_is_killed_and_takes_its_private_manager_along() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let guest = world.start(&["launch"]);
    guest.stdout.expect(PROMPT);
    let [command, ..] = private(&world);
    command.signal(Signal::KILL);
    assert_eq!(guest.wait().code(), 128 + 9);
    world.assert_nothing_left();
}

#[test]
fn launch_is_killed_while_it_creates() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let (kernel, initrd) = world.slow_to_create();
    let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
    let guest = world.start(&["launch", "--memory", "1200M", "--kernel", kernel, "--initrd", initrd]);
    let creating = until("the component is there", || component(&world).filter(is_sealed));
    creating.signal(Signal::STOP);
    guest.signal(Signal::KILL);
    assert_eq!(guest.wait().code(), 128 + 9);
    world.assert_nothing_left();
}

#[test]
fn the_private_manager_is_killed() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let guest = world.start(&["launch"]);
    guest.stdout.expect(PROMPT);
    let [_, manager, ..] = private(&world);
    manager.signal(Signal::KILL);
    let finished = guest.wait().expect_code(1);
    assert!(
        finished.stderr.contains("the connection to the guest manager ended"),
        "{}",
        finished.stderr
    );
    world.assert_nothing_left();
}

#[test]
fn whoever_waits_is_told_that_the_manager_is_gone() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    let launched = world.start(&["launch", "bee"]);
    launched.stdout.expect(PROMPT);
    let sockets = |pid| {
        let open = sepal_tests::process::descriptors(pid);
        open.values().filter(|target| target.starts_with("socket:")).count()
    };
    let before = sockets(world.manager().pid());
    let following = world.start(&["logs", "-f", "bee"]);
    following.stdout.expect(PROMPT);
    let attached = world.start(&["attach", "bee"]);
    let (waiting, stopping) = (
        world.start(&["wait", "bee"]),
        world.start(&["wait", "bee", "--timeout", "3600"]),
    );
    // Four connections, and the stream of the one that attaches.
    let manager = world.take_manager();
    until("all are connected", || {
        (sockets(manager.pid()) >= before + 5).then_some(())
    });
    manager.signal(Signal::KILL);
    manager.wait();
    for client in [launched, following, attached, waiting, stopping] {
        let finished = client.wait().expect_code(1);
        let told = finished.stderr.to_lowercase();
        assert!(
            told.contains("connection") && told.contains("closed"),
            "{}: {}",
            finished.command,
            finished.stderr
        );
    }
    world.assert_nothing_left();
}

#[test]
fn the_keeper_of_a_launched_guest_is_killed() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let guest = world.start(&["launch"]);
    guest.stdout.expect(PROMPT);
    let [_, _, keeper, _] = private(&world);
    keeper.signal(Signal::KILL);
    let finished = guest.wait().expect_code(15);
    assert!(finished.stderr.contains("keeper"), "{}", finished.stderr);
    world.assert_nothing_left();
}

#[test]
fn manager_and_keeper_are_killed_and_the_next_start_cleans() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    launch_limited(&world);
    let keeper = world.keeper();
    let component = component(&world).unwrap();
    let manager = world.take_manager();
    // The keeper cannot clean while it stands still, and then it is dead.
    keeper.signal(Signal::STOP);
    manager.signal(Signal::KILL);
    keeper.signal(Signal::KILL);
    manager.wait();
    until("the component dies with its parent", || {
        world.is_gone(&component).then_some(())
    });
    until("no process is left", || {
        (!world.family().iter().any(is_component)).then_some(())
    });
    world.start_manager();
    until("the first keeper's groups are gone", || {
        world.groups().is_empty().then_some(())
    });
    world
        .guest(&["launch", "bee", "--cmdline", "quiet run=shutdown"])
        .expect_code(0);
    world.end();
}

#[test]
fn the_keeper_of_a_killed_manager_removes_the_groups() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    launch_limited(&world);
    world.family();
    let manager = world.take_manager();
    manager.signal(Signal::KILL);
    manager.wait();
    world.assert_nothing_left();
}

/// Launches a guest with limits, where the host can enforce them: their control groups have to be removed by somebody.
fn launch_limited(world: &World) {
    let limited = world.guest(&["launch", "bee", "--detach", "--limit-tasks", "40"]);
    if limited.code() == 1 && limited.stderr.contains("cannot be enforced") {
        println!("without limits: {}", limited.stderr);
        world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    } else {
        limited.expect_code(0);
        world.family();
        assert!(!world.groups().is_empty());
    }
}
