//! `guest launch` and `guest attach` on a terminal, and with their streams redirected.

use std::fs::File;

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing};

use crate::{BANNER, PROMPT};

#[test]
fn launch_without_arguments_reaches_the_prompt() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let mut terminal = world.pty(&["launch"]);
    // The words for the user and the guest's own come from two places; either may be first.
    terminal.expect(PROMPT);
    let shown = terminal.screen.text();
    assert!(shown.contains(BANNER) && shown.contains("Ctrl-]"), "{shown}");
    assert!(!terminal.is_cooked());
    terminal.type_in("help\r");
    let help = terminal.expect(PROMPT);
    for command in ["help", "shutdown", "reset", "crash", "spin", "mem"] {
        assert!(help.contains(&format!("\r\n  {command}")), "{command} in {help}");
    }
    terminal.type_in("shutdown\r");
    assert_eq!(terminal.wait().code(), Some(0));
    assert!(terminal.is_cooked(), "the terminal is what it was");
    world.end();
}

#[test]
fn the_escape_stops_a_launched_guest() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let mut terminal = world.pty(&["launch", "bee"]);
    terminal.expect(PROMPT);
    terminal.type_in("\x1d");
    assert_eq!(terminal.wait().code(), Some(12));
    terminal.expect("bee: ");
    assert!(terminal.is_cooked());
    world.end();
}

#[test]
fn keys_that_end_other_programs_go_to_the_guest() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let mut terminal = world.pty(&["launch"]);
    terminal.expect(PROMPT);
    // ^C gives up the guest's command.
    terminal.type_in("sleep 1000\r");
    terminal.expect("\r\n");
    terminal.type_in("\x03");
    terminal.expect(PROMPT);
    terminal.type_in("shutdown\r");
    assert_eq!(terminal.wait().code(), Some(0));
    world.end();
}

#[test]
fn a_signal_ends_launch_with_the_terminal_restored_and_the_guest_gone() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let mut terminal = world.pty(&["launch"]);
    terminal.expect(PROMPT);
    let family = world.family();
    assert_eq!(family.len(), 4, "guest, manager, keeper, component: {family:?}");
    let guest = family.iter().find(|process| process.pid == terminal.pid()).unwrap();
    guest.signal(Signal::TERM);
    assert_eq!(terminal.wait().code(), Some(128 + 15));
    assert!(terminal.is_cooked());
    world.end();
}

#[test]
fn attach_types_into_the_guest_and_the_escape_leaves_it_running() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    let mut terminal = world.pty(&["attach", "bee"]);
    terminal.expect("connected to bee");
    terminal.type_in("echo good day\r");
    terminal.expect("\ngood day\r\n");
    terminal.expect(PROMPT);
    terminal.type_in("\x1d");
    assert_eq!(terminal.wait().code(), Some(0));
    terminal.expect("detached from bee");
    assert!(terminal.is_cooked());

    // Two terminals see the same, and both are told how it ended.
    let (mut first, mut second) = (world.pty(&["attach", "bee", "--serial"]), world.pty(&["attach", "bee"]));
    first.expect("connected to bee");
    second.expect("connected to bee");
    first.type_in("echo both\r");
    first.expect("\nboth\r\n");
    second.expect("\nboth\r\n");
    second.expect(PROMPT);
    second.type_in("reset\r");
    assert_eq!((first.wait().code(), second.wait().code()), (Some(10), Some(10)));
    first.expect("bee: ");
    world.end();
}

#[test]
fn redirected_output_holds_the_guests_bytes_alone() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let path = world.folder().join("out");
    let out = File::create(&path).unwrap();
    let command = world.command(&["launch", "--cmdline", "run=\"echo x; shutdown\""]);
    let finished = world.start_command(command, Some(out.into())).wait().expect_code(0);
    assert_eq!(finished.stderr, "");
    let out = std::fs::read_to_string(path).unwrap();
    assert!(out.starts_with(BANNER) && out.contains("\r\nx\r\n"), "{out:?}");
    // All of it is the guest's: nothing before, nothing after its last words.
    assert!(!out.contains("connected") && !out.contains("stop"), "{out:?}");
    world.end();
}

#[test]
fn commands_can_come_from_a_pipe() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let mut guest = world.start(&["launch", "--cmdline", "quiet"]);
    guest.type_in("echo piped\rshutdown\r");
    guest.close_input();
    let finished = guest.wait().expect_code(0);
    assert!(finished.out().contains("\r\npiped\r\n"), "{}", finished.out());
    world.end();
}

#[test]
fn output_that_nobody_takes_any_more_ends_launch() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let (ours, theirs) = std::io::pipe().unwrap();
    let guest = world.start_command(world.command(&["launch"]), Some(theirs.into()));
    drop(ours);
    let finished = guest.wait();
    assert_ne!(finished.code(), 0);
    world.end();
}
