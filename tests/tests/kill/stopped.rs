//! A component that does not react any more: everything else goes on, and force still works.

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing, until};

use crate::states::{PROMPT, component};

#[test]
fn a_component_that_stands_still_is_listed_and_stopped_by_force() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&["launch", "bee"]);
    guest.stdout.expect(PROMPT);
    let still = component(&world).unwrap();
    still.signal(Signal::STOP);
    let table = world.guest(&["list"]).expect_code(0).out();
    assert!(table.contains("bee") && table.contains("running"), "{table}");
    let info = world.guest(&["info", "bee"]).expect_code(0).out();
    assert!(info.contains("seccomp"), "{info}");
    assert!(world.guest(&["logs", "bee"]).expect_code(0).out().contains(PROMPT));
    world.guest(&["wait", "bee", "--timeout", "0.1"]).expect_code(124);
    // Asking is of no use; it is told so.
    world.guest(&["stop", "bee", "--timeout", "0.2"]).expect_code(124);
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    guest.wait().expect_code(12);
    until("it is reaped", || world.is_gone(&still).then_some(()));
    // The name is free at once.
    world
        .guest(&["launch", "bee", "--cmdline", "quiet run=shutdown"])
        .expect_code(0);
    world.end();
}

#[test]
fn a_component_that_stands_still_does_not_outlive_its_client() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let guest = world.start(&["launch"]);
    guest.stdout.expect(PROMPT);
    component(&world).unwrap().signal(Signal::STOP);
    guest.signal(Signal::KILL);
    guest.wait();
    world.assert_nothing_left();
}

#[test]
fn a_manager_ends_although_a_component_stands_still() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    component(&world).unwrap().signal(Signal::STOP);
    world.end();
}
