//! Guests that go on while no manager runs: whoever asks about them gets one that takes them over.

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing, process::Process, until};

use crate::PROMPT;

#[test]
fn guests_without_a_manager_get_one() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    world.guest(&["launch", "bee", "--detach", "--durable"]).expect_code(0);
    world.guest(&["end-manager", "--keep"]).expect_code(0);
    // Neither of these needs one.
    let version = world.guest(&["version"]).expect_code(0).out();
    assert!(version.contains("not running"), "{version}");
    let again = world.guest(&["end-manager", "--keep"]).expect_code(1);
    assert!(again.stderr.contains("no guest manager runs"), "{}", again.stderr);

    let list = world.guest(&["list"]).expect_code(0).out();
    assert!(list.contains("bee") && list.contains("running"), "{list}");
    until("it has booted", || {
        world.guest(&["logs", "bee"]).out().contains(PROMPT).then_some(())
    });
    world.guest(&["end-manager", "--keep"]).expect_code(0);
    // An address that is given may be mistyped.
    let elsewhere = world.guest(&["--manager=/nonexistent/sock", "list"]).expect_code(1);
    assert!(
        elsewhere.stderr.contains("no guest manager runs"),
        "{}",
        elsewhere.stderr
    );
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    world.guest(&["end-manager"]).expect_code(0);
    world.end();
}

#[test]
fn all_are_ended_without_a_manager_too() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    world.guest(&["launch", "bee", "--detach", "--durable"]).expect_code(0);
    world.guest(&["end-manager", "--keep"]).expect_code(0);
    world.guest(&["end-manager"]).expect_code(0);
    world.end();
}

#[test]
fn a_keeper_that_has_ended_is_no_reason_for_a_manager() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    world.guest(&["launch", "bee", "--detach", "--durable"]).expect_code(0);
    let info = world.guest(&["list", "--json"]).expect_code(0).out();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let component = u32::try_from(info[0]["componentPid"].as_u64().unwrap()).unwrap();
    let component = Process::of(component).unwrap();
    let keeper = Process::of(component.parent).unwrap();
    world.guest(&["end-manager", "--keep"]).expect_code(0);
    keeper.signal(Signal::KILL);
    until("nothing is left of it", || {
        (world.is_gone(&keeper) && world.is_gone(&component)).then_some(())
    });
    let list = world.guest(&["list"]).expect_code(1);
    assert!(list.stderr.contains("no guest manager runs"), "{}", list.stderr);
    world.end();
}

#[test]
fn a_manager_whose_socket_was_removed_is_told_of() {
    let world = World::with_manager();
    std::fs::remove_file(world.socket()).unwrap();
    for arguments in [&["list"][..], &["launch", "bee", "--detach"]] {
        let refused = world.guest(arguments).expect_code(1).stderr;
        assert!(
            refused.contains("its socket was removed") && refused.contains("`kill "),
            "{refused}"
        );
    }
    world.end();
}
