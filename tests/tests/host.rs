//! The host as the command line tells of it, and what it refuses to hold.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::process::Command;

use sepal_tests::{World, kvm_missing, program};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A world whose manager was started by this script of a shell, which has the manager's program and arguments after it.
fn with_manager_by(script: &str, arguments: &[&str]) -> World {
    let mut world = World::new();
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(program("guest-manager"));
    world.start_manager_by(command, |command, socket, ready| {
        command
            .arg("--socket")
            .arg(socket)
            .arg("--ready-fd")
            .arg(ready)
            .args(arguments);
    });
    world
}

const START: &str = "exec \"$0\" \"$@\"";

#[test]
fn the_doctor_looks_at_the_host_with_and_without_a_manager() {
    for world in [World::new(), World::with_manager()] {
        let finished = world.guest(&["doctor", "--json"]);
        let report = json(&finished.out());
        let findings = report["findings"].as_array().unwrap();
        let problems = findings
            .iter()
            .filter(|finding| finding["severity"] == "problem")
            .count();
        assert_eq!(finished.code(), i32::from(problems > 0), "{findings:#?}");
        for finding in findings {
            assert!(!finding["what"].as_str().unwrap().is_empty() && !finding["remedy"].as_str().unwrap().is_empty());
        }
        let node = &report["node"];
        assert!(node["cpus"].as_u64().unwrap() >= 1 && node["memoryBytes"].as_u64().unwrap() > 0);
        assert!(node["cells"].as_array().is_some_and(|cells| !cells.is_empty()));
        let layers = node["layers"].as_array().unwrap();
        assert!(layers.iter().any(|layer| layer["name"] == "seccomp"), "{layers:?}");
        if !kvm_missing() {
            assert_eq!(
                (&node["kvm"]["usable"], &node["kvm"]["apiVersion"]),
                (&Value::Bool(true), &Value::from(12))
            );
            let capabilities = node["kvm"]["capabilities"].as_array().unwrap();
            let irqfd = capabilities
                .iter()
                .find(|capability| capability["name"] == "KVM_CAP_IRQFD")
                .unwrap();
            assert!(irqfd["value"].as_u64().unwrap() > 0 && irqfd["needed"] == true);
        }

        let words = world.guest(&["doctor"]);
        assert_eq!(words.code(), i32::from(problems > 0));
        let words = words.out();
        for part in ["processors", "memory cells", "jail", "seccomp", "offered"] {
            assert!(words.contains(part), "{part}: {words}");
        }
        match problems {
            0 => assert!(
                words.lines().last().unwrap().starts_with("Guests can be started"),
                "{words}"
            ),
            _ => assert!(words.lines().last().unwrap().contains("problem"), "{words}"),
        }
        world.end();
    }
}

#[test]
fn a_host_whose_manager_cannot_be_asked_has_a_problem() {
    let world = World::new();
    let finished = world
        .guest(&["--manager", "/nowhere/manager.sock", "doctor"])
        .expect_code(1);
    let words = finished.out();
    assert!(
        words.contains("problem") && words.contains("/nowhere/manager.sock"),
        "{words}"
    );
    let finished = world
        .guest(&["--manager", "/nowhere/manager.sock", "doctor", "--json"])
        .expect_code(1);
    let report = json(&finished.out());
    assert_eq!(
        (&report["node"], &report["findings"][0]["about"]),
        (&Value::Null, &Value::from("manager"))
    );
    world.end();
}

#[test]
fn the_policy_for_pressure_is_shown_changed_and_switched_off() {
    let world = World::with_manager();
    let state = |world: &World| json(&world.guest(&["pressure", "--json"]).expect_code(0).out());
    let before = state(&world);
    assert_eq!(
        (&before["policy"]["enabled"], &before["takenBytes"]),
        (&Value::Bool(true), &Value::from(0))
    );
    let set = [
        "pressure",
        "set",
        "--stall",
        "20",
        "--window",
        "2s",
        "--calm",
        "1m",
        "--reserve",
        "80",
    ];
    world.guest(&set).expect_code(0);
    let policy = &state(&world)["policy"];
    let expected = [
        ("stallPercent", 20),
        ("windowMs", 2000),
        ("calmMs", 60_000),
        ("reservePercent", 80),
        ("stepPercent", 5),
    ];
    for (field, value) in expected {
        assert_eq!(policy[field], value, "{policy}");
    }
    world.guest(&["pressure", "set", "--off"]).expect_code(0);
    let words = world.guest(&["pressure"]).expect_code(0).out();
    assert!(words.contains("policy") && words.contains("off"), "{words}");
    let wrong = world
        .guest(&["pressure", "set", "--window", "10ms"])
        .expect_code(1)
        .stderr;
    assert!(wrong.contains("BAD_CONFIG") && wrong.contains("windowMs"), "{wrong}");
    world.end();
}

#[test]
fn guests_that_would_not_fit_are_refused_with_the_numbers() {
    let world = with_manager_by(START, &["--max-memory", "100M", "--max-guests", "2"]);
    let refused = world
        .guest(&["launch", "large", "--memory", "128M", "--detach"])
        .expect_code(1)
        .stderr;
    assert!(
        refused.contains("NO_RESOURCES") && refused.contains("0 of the 100 MiB"),
        "{refused}"
    );
    let checked = world
        .guest(&["launch", "large", "--memory", "128M", "--check"])
        .expect_code(1)
        .stderr;
    assert!(checked.contains("0 of the 100 MiB"), "{checked}");
    let everything = world
        .guest(&["launch", "huge", "--memory", "2000G", "--detach"])
        .expect_code(1)
        .stderr;
    assert!(
        everything.contains("GUEST_INITIALIZATION_FAILURE") && everything.contains("2048000 MiB"),
        "{everything}"
    );
    if !kvm_missing() {
        world
            .guest(&["launch", "one", "--memory", "64M", "--detach"])
            .expect_code(0);
        let refused = world
            .guest(&["launch", "two", "--memory", "64M", "--detach"])
            .expect_code(1)
            .stderr;
        assert!(refused.contains("64 of the 100 MiB"), "{refused}");
        world
            .guest(&["launch", "two", "--memory", "32M", "--detach"])
            .expect_code(0);
        let refused = world
            .guest(&["launch", "three", "--memory", "1M", "--detach"])
            .expect_code(1)
            .stderr;
        assert!(
            refused.contains("there are 2 guests") && refused.contains("--max-guests"),
            "{refused}"
        );
        let report = json(&world.guest(&["doctor", "--json"]).out());
        let capacity = &report["node"]["capacity"];
        assert_eq!(
            (&capacity["guests"], &capacity["maxGuests"]),
            (&Value::from(2), &Value::from(2))
        );
        assert_eq!(capacity["memoryBytes"], 96 << 20);
        world.guest(&["stop", "--force", "one"]).expect_code(0);
        world
            .guest(&["launch", "two-again", "--memory", "64M", "--detach"])
            .expect_code(0);
    }
    world.end();
}

#[test]
fn a_manager_with_few_descriptors_says_so() {
    // Sixty-four are kept for connections, and any guest takes sixteen: none fits, however few the manager has open.
    let world = with_manager_by("ulimit -n 80; exec \"$0\" \"$@\"", &[]);
    let refused = world.guest(&["launch", "web", "--detach"]).expect_code(1).stderr;
    assert!(
        refused.contains("NO_RESOURCES") && refused.contains("of 80 are in use"),
        "{refused}"
    );
    assert!(refused.contains("LimitNOFILE"), "{refused}");
    let words = world.guest(&["doctor"]).expect_code(1).out();
    assert!(
        words.contains("may have 80 descriptors") && words.contains("about 0 more guests"),
        "{words}"
    );
    world.end();
}
