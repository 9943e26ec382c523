//! `guest top` on a terminal and without one, and `guest stats --all`.

use std::io::Read;

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing};
use serde_json::Value;

use crate::PROMPT;

/// Enters the alternate screen, and leaves it (xterm's control sequences).
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?1049l";

#[test]
fn a_terminal_shows_guests_live_and_is_what_it_was_afterwards() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "ant", "--detach"]).expect_code(0);
    let mut top = world.pty(&["top", "--interval", "100ms"]);
    top.expect(ENTER);
    top.expect("1 guest,");
    top.expect("ant ");
    assert!(!top.is_cooked());
    // Who comes is seen without a key.
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    top.expect("2 guests,");
    top.expect("bee ");
    // The heading that sorts stands out.
    top.expect("\x1b[1;4mCPU%");
    top.type_in("m");
    top.expect("\x1b[1;4mMEM");
    top.type_in("\x1b[C");
    top.expect("\x1b[1;4mREAD");
    top.resize(120, 10);
    // Names have the room that there is now.
    top.expect(&format!("NAME{}STATE", " ".repeat(50)));
    world.guest(&["stop", "ant", "--kill"]).expect_code(0);
    top.expect("1 guest,");
    top.type_in("q");
    assert_eq!(top.wait().code(), Some(0));
    top.expect(LEAVE);
    assert!(top.is_cooked());
    world.guest(&["stop", "bee", "--kill"]).expect_code(0);
    world.end();
}

#[test]
fn a_signal_or_the_managers_end_leaves_the_terminal_as_it_was() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    for signal in [Signal::TERM, Signal::HUP] {
        let mut top = world.pty(&["top"]);
        top.expect("0 guests,");
        let process = sepal_tests::process::Process::of(top.pid()).unwrap();
        process.signal(signal);
        assert_eq!(top.wait().code(), Some(128 + signal.as_raw()));
        top.expect(LEAVE);
        assert!(top.is_cooked());
    }
    let mut top = world.pty(&["top"]);
    top.expect("0 guests,");
    world.guest(&["end-manager"]).expect_code(0);
    assert_eq!(top.wait().code(), Some(1));
    top.expect(LEAVE);
    top.expect("guest manager ended");
    assert!(top.is_cooked());
    world.take_manager().wait().expect_code(0);
    world.end();
}

#[test]
fn without_a_terminal_it_prints_blocks() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut busy = world.start(&["launch", "zebra"]);
    busy.stdout.expect(PROMPT);
    world.guest(&["launch", "ant", "--detach"]).expect_code(0);
    busy.type_in("spin\r");
    let top = |arguments: &[&str]| {
        let all = [&["top", "--interval=300ms"], arguments].concat();
        world.guest(&all).expect_code(0).out()
    };
    let text = top(&["--once"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(
        lines[0].contains("2 guests, CPU ") && lines[1].starts_with("NAME "),
        "{text}"
    );
    assert!(lines[1..].iter().all(|line| line.chars().count() <= 80), "{text}");
    // The one that spins comes first, and the idle one first by name.
    let spins = |block: &Value| block["guests"][0]["name"] == "zebra";
    let block = until_block(&world, spins);
    assert!(
        block["guests"][0]["perSecond"]["cpuPercent"].as_f64() > block["guests"][1]["perSecond"]["cpuPercent"].as_f64()
    );
    let text = top(&["--once", "--sort=name"]);
    let first = text.lines().nth(2).unwrap();
    assert!(
        first.starts_with("ant ") && text.lines().nth(3).unwrap().starts_with("zebra "),
        "{text}"
    );
    let text = top(&["--batch=2"]);
    assert_eq!(text.matches("NAME ").count(), 2, "{text}");

    // Standard output that nobody reads any more ends whatever goes on printing, also if there is nothing to print.
    for (endless, prints) in [
        (&["top", "-i", "100ms"][..], false),
        (&["events"], false),
        (&["logs", "-f", "ant"], true),
    ] {
        let (mut ours, theirs) = std::io::pipe().unwrap();
        let endless = world.start_command(world.command(endless), Some(theirs.into()));
        if prints {
            // All that there is, which is one piece.
            assert!(ours.read(&mut [0; 1 << 16]).unwrap() > 0);
        }
        drop(ours);
        endless.wait().expect_code(0);
    }
    world.guest(&["logs", "nobody"]).expect_code(1);

    let text = world.guest(&["stats", "--all"]).expect_code(0).out();
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.contains("\nant ") && text.contains("\nzebra "), "{text}");
    let json = world.guest(&["stats", "--all", "--json"]).expect_code(0).out();
    let all: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&all[0]["name"], &all[1]["name"]), (&"ant".into(), &"zebra".into()));
    assert!(all[1]["vcpus"][0]["reasons"]["io"].as_u64().unwrap() > 0, "{all}");
    assert!(all[1]["memory"]["residentBytes"].as_u64().unwrap() > 0, "{all}");
    assert!(all[1]["uptimeSeconds"].as_f64().unwrap() > 0.0, "{all}");
    world.guest(&["stats"]).expect_code(2);
    world.guest(&["stop", "zebra", "--kill"]).expect_code(0);
    busy.wait().expect_code(12);
    world.guest(&["stop", "ant", "--kill"]).expect_code(0);
    world.end();
}

/// Looks until a block is as it is to be: a guest that spins need not get a processor at once.
fn until_block(world: &World, good: impl Fn(&Value) -> bool) -> Value {
    sepal_tests::until("a block", || {
        let json = world
            .guest(&["top", "--once", "--json", "-i=200ms"])
            .expect_code(0)
            .out();
        Some(serde_json::from_str(&json).unwrap()).filter(&good)
    })
}
