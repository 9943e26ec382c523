//! The commands that look, and guests that live on without the client that launched them.

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing, process::Process, until};
use serde_json::Value;

use crate::{BANNER, PROMPT};

/// The output of a command with `--json`.
#[track_caller]
fn json(world: &World, arguments: &[&str]) -> Value {
    let all: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&world.guest(&all).expect_code(0).out()).unwrap()
}

#[test]
fn detach_leaves_a_daemon_and_the_guest() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let launched = world.guest(&["launch", "--detach"]).expect_code(0);
    let name = launched.out().trim_end().to_owned();
    assert!(!name.is_empty() && launched.stderr.is_empty(), "{launched:?}");
    let info = json(&world, &["info", &name]);
    assert_eq!(
        (&info["status"], &info["detached"]),
        (&"running".into(), &true.into()),
        "{info}"
    );

    let versions = json(&world, &["version"]);
    assert_eq!(
        (&versions["guest"], &versions["protocol"]),
        (&versions["manager"], &1.into()),
        "{versions}"
    );
    let daemon = Process::of(versions["managerPid"].as_u64().unwrap().try_into().unwrap()).unwrap();
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(daemon.pid.cast_signed())).unwrap();
    assert_eq!(
        session.as_raw_nonzero().get().cast_unsigned(),
        daemon.pid,
        "it leads a session of its own"
    );

    world.guest(&["stop", &name]).expect_code(0);
    assert!(daemon.exists(), "the manager stays");
    // A second one finds the first.
    world.guest(&["launch", "--detach", "bee"]).expect_code(0);
    assert_eq!(json(&world, &["version"])["managerPid"], daemon.pid);
    daemon.signal(Signal::TERM);
    world.assert_nothing_left();
}

#[test]
fn list_and_info_show_the_guests() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    assert_eq!(
        world.guest(&["list"]).expect_code(0).out(),
        "NAME  STATUS  CPUS  MEMORY  UPTIME  PID  DEFINED\n"
    );
    let add = ["--cmdline", "quiet", "--cmdline-add", "one=1", "--cmdline-add", "two=2"];
    let first: Vec<&str> = ["launch", "bee", "-d", "--memory", "64M", "--cpus", "2"]
        .into_iter()
        .chain(add)
        .collect();
    world.guest(&first).expect_code(0);
    world
        .guest(&[
            "launch",
            "ant",
            "-d",
            "--memory",
            "1G",
            "--cmdline",
            "quiet run=shutdown",
        ])
        .expect_code(0);
    world.guest(&["wait", "ant"]).expect_code(0);

    let table = world.guest(&["list"]).expect_code(0).out();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1][..5], ["ant", "stopped", "(shutdown)", "1", "1024M"], "{table}");
    assert_eq!(rows[2][..4], ["bee", "running", "2", "64M"], "{table}");
    let guests = json(&world, &["list"]);
    assert_eq!((&guests[0]["name"], &guests[1]["name"]), (&"ant".into(), &"bee".into()));

    let bee = json(&world, &["info", "bee"]);
    for (key, value) in [
        ("status", Value::from("running")),
        ("generation", 1.into()),
        ("cpus", 2.into()),
        ("memoryMib", 64.into()),
        ("kernel", "embedded".into()),
        ("stop", Value::Null),
        ("paused", false.into()),
        ("detached", true.into()),
    ] {
        assert_eq!(bee[key], value, "{key} of {bee}");
    }
    assert!(bee["cmdline"].as_str().unwrap().contains("quiet one=1 two=2"), "{bee}");
    assert!(bee["devices"].as_array().unwrap().contains(&"serial".into()), "{bee}");
    let pid: u32 = bee["componentPid"].as_u64().unwrap().try_into().unwrap();
    assert!(world.family().iter().any(|process| process.pid == pid), "{bee}");

    let text = world.guest(&["info", "bee"]).expect_code(0).out();
    for words in [
        "name       bee",
        "status     running",
        "memory     64 MiB",
        "LAYER",
        "seccomp",
        "(detached)",
    ] {
        assert!(text.contains(words), "{words:?} in {text}");
    }
    let ant = json(&world, &["info", "ant"]);
    assert_eq!(
        (&ant["status"], &ant["stop"]["reason"]),
        (&"stopped".into(), &"shutdown".into()),
        "{ant}"
    );
    assert_eq!(
        (&ant["componentPid"], &ant["layers"]),
        (&Value::Null, &Value::Array(vec![])),
        "{ant}"
    );
    world.end();
}

#[test]
fn two_guests_at_once_do_not_meet() {
    if kvm_missing() {
        return;
    }
    let world = World::new();
    let (mut first, mut second) = (world.start(&["launch"]), world.start(&["launch"]));
    for (guest, word) in [(&mut first, "uno"), (&mut second, "due")] {
        guest.stdout.expect(PROMPT);
        guest.type_in(&format!("echo {word}\r"));
        guest.stdout.expect(&format!("\r\n{word}\r\n"));
    }
    first.type_in("shutdown\r");
    let finished = first.wait().expect_code(0);
    assert!(!finished.out().contains("due"));
    second.type_in("reset\r");
    let finished = second.wait().expect_code(10);
    assert!(!finished.out().contains("uno"));
    world.end();
}

#[test]
fn logs_print_what_the_guest_printed() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world
        .guest(&["launch", "bee", "-d", "--cmdline", "nobutton run=\"echo early\""])
        .expect_code(0);
    let following = world.start(&["logs", "bee", "-f"]);
    following.stdout.expect("\r\nearly\r\n");
    following.stdout.expect(PROMPT);
    let logs = world.guest(&["logs", "bee"]).expect_code(0).out();
    assert!(logs.starts_with(BANNER) && logs.ends_with(PROMPT), "{logs:?}");
    let mut attached = world.start(&["attach", "bee"]);
    attached.type_in("echo late\rshutdown\r");
    attached.close_input();
    attached.wait().expect_code(0);
    let followed = following.wait().expect_code(0).out();
    assert!(followed.contains("\r\nlate\r\n"), "{followed:?}");
    // It is remembered after its end, whole.
    assert_eq!(world.guest(&["logs", "bee"]).expect_code(0).out(), followed);
    world.end();
}

#[test]
fn wait_gives_up_after_its_time() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "bee", "-d"]).expect_code(0);
    let finished = world.guest(&["wait", "bee", "--timeout", "0.3"]).expect_code(124);
    assert!(
        finished.stderr.contains("TIMED_OUT") && finished.stderr.contains("0.3 s"),
        "{}",
        finished.stderr
    );
    assert_eq!(json(&world, &["info", "bee"])["status"], "running");
    world.end();
}

#[test]
fn a_guest_ends_with_the_client_that_launched_it() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&["launch", "bee"]);
    guest.stdout.expect(PROMPT);
    let waiting = world.start(&["wait", "bee"]);
    drop(guest);
    waiting.wait().expect_code(12);
    let info = json(&world, &["info", "bee"]);
    assert_eq!(info["stop"]["reason"], "killed", "{info}");
    until("its component is gone", || {
        let names = world
            .family()
            .into_iter()
            .map(|process| process.name)
            .collect::<Vec<_>>();
        (!names.iter().any(|name| name.contains("component"))).then_some(())
    });
    world.end();
}

#[test]
fn what_has_ended_can_be_forgotten_and_a_manager_ended() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    world
        .guest(&["launch", "ant", "--cmdline", "quiet run=shutdown"])
        .expect_code(0);
    world.guest(&["launch", "bee", "-d"]).expect_code(0);
    world.guest(&["remove", "ant"]).expect_code(0);
    let again = world.guest(&["remove", "ant"]).expect_code(1);
    assert!(again.stderr.contains("NOT_FOUND"), "{}", again.stderr);
    let runs = world.guest(&["remove", "bee"]).expect_code(1);
    assert!(runs.stderr.contains("ALREADY_RUNNING"), "{}", runs.stderr);
    let names = json(&world, &["list"]);
    assert_eq!((names.as_array().unwrap().len(), &names[0]["name"]), (1, &"bee".into()));

    let waiting = world.start(&["attach", "bee"]);
    world.family();
    world.guest(&["end-manager"]).expect_code(0);
    world.take_manager().wait().expect_code(0);
    assert_ne!(waiting.wait().code(), 0);
    world.assert_nothing_left();
}
