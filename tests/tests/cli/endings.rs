//! How guests end, and how their exit statuses tell it.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use sepal_tests::{World, kvm_missing, program, until};
use serde_json::Value;

use crate::PROMPT;

/// How often a manager is ended: what happens in between takes less than a millisecond.
const ROUNDS: usize = 50;

/// Launches a guest that runs these commands, to its end.
fn run(commands: &str) -> Option<(World, sepal_tests::Finished)> {
    if kvm_missing() {
        return None;
    }
    let world = World::with_manager();
    let cmdline = format!("quiet run=\"{commands}\"");
    let finished = world.guest(&["launch", "bee", "--cmdline", &cmdline]);
    Some((world, finished))
}

/// Whoever cannot be told anything sees the status.
#[test]
fn a_standard_error_that_takes_nothing_changes_no_status() {
    let world = World::new();
    for (arguments, status) in [("info wasp", 1), ("redeem power.1.x", 2), ("list --no-such-option", 2)] {
        let mut command = Command::new("sh");
        let script = format!("exec {} {arguments} 2>/dev/full", program("guest").display());
        command.args(["-c", &script]).env("XDG_RUNTIME_DIR", world.folder());
        command.env("XDG_STATE_HOME", world.state_home());
        let mut guest = world.start_command(command, None);
        guest.close_input();
        guest.wait().expect_code(status);
    }
    world.end();
}

#[test]
fn shutdown_is_0() {
    let Some((world, finished)) = run("shutdown") else {
        return;
    };
    let finished = finished.expect_code(0);
    assert_eq!(finished.stderr, "", "there is nothing to say about it");
    world.guest(&["wait", "bee"]).expect_code(0);
    world.end();
}

#[test]
fn every_way_of_resetting_is_10() {
    for way in ["acpi", "i8042", "triple"] {
        let Some((world, finished)) = run(&format!("reset {way}")) else {
            return;
        };
        let finished = finished.expect_code(10);
        assert!(finished.stderr.starts_with("bee: "), "{}", finished.stderr);
        let stop = json(&world, "bee")["stop"].clone();
        assert_eq!(stop["reason"], "reset", "{stop}");
        world.guest(&["wait", "bee"]).expect_code(10);
        world.end();
    }
}

#[test]
fn crash_is_11_and_the_log_has_the_registers() {
    let Some((mut world, finished)) = run("crash") else {
        return;
    };
    let finished = finished.expect_code(11);
    assert!(
        finished.stderr.contains("bee: ") && finished.stderr.contains("vCPU"),
        "{}",
        finished.stderr
    );
    let stop = json(&world, "bee")["stop"].clone();
    assert_eq!(
        (&stop["reason"], &stop["error"]),
        (&"crash".into(), &"VCPU_RUNTIME_FAILURE".into()),
        "{stop}"
    );
    let manager = world.take_manager();
    manager.signal(rustix::process::Signal::TERM);
    let log = manager.wait().expect_code(0).stderr.to_lowercase();
    for register in ["rip", "rsp", "cr3", "rflags"] {
        assert!(log.contains(register), "{register} in the log:\n{log}");
    }
    world.end();
}

#[test]
fn stop_by_force_is_12() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&["launch", "bee", "--cmdline", "quiet run=spin"]);
    guest.stdout.expect("spin");
    let stopped = world.guest(&["stop", "bee", "--force"]).expect_code(0);
    assert!(stopped.stderr.starts_with("bee: "), "{}", stopped.stderr);
    let finished = guest.wait().expect_code(12);
    assert!(finished.stderr.starts_with("bee: "), "{}", finished.stderr);
    world.guest(&["wait", "bee"]).expect_code(12);
    world.end();
}

#[test]
fn stop_presses_the_power_button() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&["launch", "bee"]);
    guest.stdout.expect(PROMPT);
    let stopped = world.guest(&["stop", "bee", "--json"]).expect_code(0);
    let ending: Value = serde_json::from_str(&stopped.out()).unwrap();
    assert_eq!(
        (&ending["reason"], &ending["rung"]),
        (&"shutdown".into(), &"asked".into()),
        "{ending}"
    );
    guest.wait().expect_code(0);
    // Nothing is left to be stopped.
    let again = world.guest(&["stop", "bee"]).expect_code(1);
    assert!(again.stderr.contains("NOT_RUNNING"), "{}", again.stderr);
    world.end();
}

#[test]
fn a_guest_that_does_not_react_runs_on_until_it_is_forced_which_is_14() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&["launch", "bee", "--cmdline", "nobutton"]);
    guest.stdout.expect(PROMPT);
    let waiting = world.start(&["wait", "bee"]);
    let asked = world.guest(&["stop", "bee", "--timeout", "1"]).expect_code(124);
    assert!(
        asked.stderr.contains("TIMED_OUT") && asked.stderr.contains("--force"),
        "{}",
        asked.stderr
    );
    assert_eq!(json(&world, "bee")["status"], "running");
    let begun = Instant::now();
    let forced = world
        .guest(&["stop", "bee", "--force", "--timeout", "200ms"])
        .expect_code(0);
    assert!(begun.elapsed() >= Duration::from_millis(200), "it gets its time");
    assert!(forced.stderr.starts_with("bee: forced: "), "{}", forced.stderr);
    let told = waiting.wait().expect_code(14);
    assert!(told.stderr.starts_with("bee: "), "{}", told.stderr);
    guest.wait().expect_code(14);
    assert_eq!(json(&world, "bee")["stop"]["reason"], "hangup");
    world.end();
}

#[test]
fn a_component_that_is_killed_is_15() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&["launch", "bee"]);
    guest.stdout.expect(PROMPT);
    let waiting = world.start(&["wait", "bee", "--json"]);
    let pid = json(&world, "bee")["componentPid"].as_u64().unwrap();
    let component = sepal_tests::process::Process::of(pid.try_into().unwrap()).unwrap();
    component.signal(rustix::process::Signal::KILL);
    let finished = guest.wait().expect_code(15);
    assert!(finished.stderr.contains("SIGKILL"), "{}", finished.stderr);
    let ending: Value = serde_json::from_str(&waiting.wait().expect_code(15).out()).unwrap();
    assert_eq!(
        (&ending["reason"], &ending["error"]),
        (&"vmm-terminated".into(), &"VMM_TERMINATED".into()),
        "{ending}"
    );
    assert_eq!(
        (&ending["componentSignal"], &ending["componentExitStatus"]),
        (&9.into(), &Value::Null)
    );
    let info = json(&world, "bee");
    assert_eq!(info["status"], "vmm-terminated");
    assert!(
        info["problems"][0].as_str().unwrap().contains("component died"),
        "{info}"
    );
    until("it is reaped", || (!component.exists()).then_some(()));
    world.end();
}

/// `guest info --json`.
fn json(world: &World, name: &str) -> Value {
    serde_json::from_str(&world.guest(&["info", name, "--json"]).expect_code(0).out()).unwrap()
}

#[test]
fn a_manager_that_was_ended_is_gone_and_another_can_begin_at_once() {
    let mut world = World::with_manager();
    for round in 0..ROUNDS {
        let end: &[&str] = if round % 2 == 0 {
            &["end-manager"]
        } else {
            &["end-manager", "--keep"]
        };
        world.guest(end).expect_code(0);
        let listed = world.guest(&["list"]).expect_code(1);
        assert!(
            listed.stderr.contains("no guest manager runs"),
            "round {round}: {}",
            listed.stderr
        );
        // Nobody has waited for the first one's process, whose state folder the next one uses.
        let ended = world.take_manager();
        world.start_manager();
        ended.wait().expect_code(0);
    }
    world.end();
}
