//! What happens to guests, their figures and registers, and who asks.

use sepal_tests::{World, kvm_missing};
use serde_json::Value;

use crate::PROMPT;

/// Names of the events that were printed as JSON.
fn names(text: &str) -> Vec<String> {
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events
        .map(|event| event["event"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn events_are_told_as_they_happen() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let all = world.start(&["events", "--replay", "1024"]);
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    for words in ["bee         defined", "bee         starting", "bee         started"] {
        all.stdout.expect(words);
    }
    let of_bee = world.start(&["events", "bee", "--json", "--replay", "9"]);
    of_bee.stdout.expect("\"started\"");
    world.guest(&["pause", "bee"]).expect_code(0);
    world.guest(&["resume", "bee"]).expect_code(0);
    world.guest(&["stop", "bee", "--kill"]).expect_code(0);
    // Who follows a guest is done when it has ended.
    let told = names(&of_bee.wait().expect_code(0).out());
    let order = ["starting", "started", "paused", "resumed", "stopped"];
    let positions: Vec<_> = order
        .iter()
        .map(|name| told.iter().position(|told| told == name))
        .collect();
    assert!(
        positions.iter().all(Option::is_some) && positions.is_sorted(),
        "{told:?}"
    );
    all.stdout.expect("stopped");
    drop(all);

    let past = world
        .guest(&["events", "bee", "--no-follow", "--json"])
        .expect_code(0)
        .out();
    assert_eq!(names(&past).last().map(String::as_str), Some("stopped"), "{past}");
    let last: Value = serde_json::from_str(past.lines().last().unwrap()).unwrap();
    for key in ["sequence", "timeNs", "guest", "generation", "dropped", "event", "stop"] {
        assert!(!last[key].is_null(), "{key} of {last}");
    }
    assert_eq!(last["stop"]["reason"], "killed");
    let lines = world.guest(&["events", "--no-follow"]).expect_code(0).out();
    assert!(lines.lines().all(|line| line.chars().count() <= 80), "{lines}");
    let two = world
        .guest(&["events", "--no-follow", "--replay", "2"])
        .expect_code(0)
        .out();
    assert_eq!(two.lines().count(), 2, "{two}");
    world.end();
}

#[test]
fn events_that_nobody_reads_any_more_end_the_command() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let (ours, theirs) = std::io::pipe().unwrap();
    world
        .guest(&["launch", "bee", "--cmdline", "quiet run=shutdown"])
        .expect_code(0);
    let events = world.start_command(world.command(&["events", "--replay=1"]), Some(theirs.into()));
    drop(ours);
    events.wait().expect_code(0);
    world.end();
}

#[test]
fn figures_and_registers() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let image = world.folder().join("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let disk = format!("--disk={},ro", image.display());
    let mut guest = world.start(&["launch", "bee", "--cpus=2", &disk, "--balloon"]);
    guest.stdout.expect(PROMPT);
    let text = world.guest(&["stats", "bee"]).expect_code(0).out();
    for words in [
        "VCPU",
        "EXITS",
        "REASON",
        "DISK",
        "disk0",
        "balloon",
        "uptime",
        "resident",
        "serial output lost",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
    let json = world.guest(&["stats", "bee", "--json"]).expect_code(0).out();
    let stats: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(stats["vcpus"].as_array().unwrap().len(), 2, "{stats}");
    assert!(
        stats["vcpus"][0]["exits"].as_u64().unwrap() > 0 && stats["ageSeconds"].is_number(),
        "{stats}"
    );
    let reasons = stats["vcpus"][0]["reasons"].as_object().unwrap();
    let sum: u64 = reasons.values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(sum, stats["vcpus"][0]["exits"].as_u64().unwrap(), "{stats}");
    assert!(stats["uptimeSeconds"].as_f64().unwrap() > 0.0, "{stats}");
    let memory = |key: &str| stats["memory"][key].as_u64().unwrap();
    assert_eq!(memory("guestBytes"), 256 << 20, "{stats}");
    assert!(
        memory("residentBytes") > memory("sharedBytes") && memory("sharedBytes") > 1 << 20,
        "{stats}"
    );

    let text = world.guest(&["registers", "bee"]).expect_code(0).out();
    for words in ["rip ", "cr3 ", "cs ", "privilege level"] {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    let json = world
        .guest(&["registers", "bee", "--vcpu", "1", "--json"])
        .expect_code(0)
        .out();
    let registers: Value = serde_json::from_str(&json).unwrap();
    assert!(registers["cr0"].as_str().unwrap().starts_with("0x"), "{registers}");
    let wrong = world.guest(&["registers", "bee", "--vcpu", "7"]).expect_code(1);
    assert!(wrong.stderr.contains("BAD_CONFIG"), "{}", wrong.stderr);
    guest.type_in("shutdown\r");
    guest.wait().expect_code(0);
    world.end();
}

#[test]
fn a_guest_is_paused_and_goes_on() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut guest = world.start(&["launch", "bee"]);
    guest.stdout.expect(PROMPT);
    world.guest(&["pause", "bee"]).expect_code(0);
    guest.type_in("echo later\r");
    assert!(world.guest(&["list"]).expect_code(0).out().contains("paused"));
    world.guest(&["resume", "bee"]).expect_code(0);
    guest.stdout.expect("\nlater\r\n");
    guest.stdout.expect(PROMPT);
    // This guest takes it for its end.
    world.guest(&["nmi", "bee"]).expect_code(0);
    guest.wait().expect_code(10);
    let gone = world.guest(&["pause", "bee"]).expect_code(1);
    assert!(
        gone.stderr.contains("NOT_RUNNING") && gone.stderr.contains("hint:"),
        "{}",
        gone.stderr
    );
    world.end();
}

#[test]
fn a_guest_that_is_reset_begins_again() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut guest = world.start(&["launch", "bee"]);
    guest.stdout.expect(PROMPT);
    world.guest(&["reset", "bee"]).expect_code(0);
    // On the same terminal.
    guest.stdout.expect(crate::BANNER);
    guest.stdout.expect(PROMPT);
    guest.type_in("shutdown\r");
    guest.wait().expect_code(0);

    let mut guest = world.start(&["launch", "ant", "--on-reset", "restart"]);
    guest.stdout.expect(PROMPT);
    guest.type_in("reset\r");
    guest.stdout.expect(crate::BANNER);
    guest.stdout.expect(PROMPT);
    guest.type_in("shutdown\r");
    guest.wait().expect_code(0);
    // To be looked into before its first instruction.
    world
        .guest(&["launch", "wasp", "--detach", "--on-reset=pause", "--on-panic=restart"])
        .expect_code(0);
    let info = world.guest(&["info", "wasp"]).expect_code(0).out();
    assert!(info.contains("panic"), "a panic can only be told by its device: {info}");
    let events = world.start(&["events", "wasp", "--replay=9"]);
    events.stdout.expect("started");
    let mut typing = world.start(&["attach", "wasp"]);
    typing.type_in("reset\r");
    events.stdout.expect("restarting");
    events.stdout.expect("paused");
    assert!(world.guest(&["list"]).expect_code(0).out().contains("paused"));
    world.guest(&["resume", "wasp"]).expect_code(0);
    typing.stdout.expect(PROMPT);
    typing.type_in("shutdown\r");
    typing.wait().expect_code(0);
    events.wait().expect_code(0);
    for option in ["--on-reset=explode", "--on-panic=explode"] {
        let wrong = world.guest(&["launch", option]).expect_code(2);
        assert!(wrong.stderr.contains("'explode'"), "{}", wrong.stderr);
    }
    world.end();
}

#[test]
fn the_manager_tells_who_one_is() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let text = world.guest(&["whoami"]).expect_code(0).out();
    assert!(text.contains("admin") && text.contains("everything"), "{text}");
    let json = world.guest(&["whoami", "--json"]).expect_code(0).out();
    let who: Value = serde_json::from_str(&json).unwrap();
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(
        (&who["uid"], &who["role"], &who["readOnly"]),
        (&uid.into(), &"admin".into(), &false.into())
    );
    world.end();
}
