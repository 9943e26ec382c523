//! Guests that fail, with real components: they begin again by their restart policy, are given up, and tell what is known of it.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

mod signals;

use rustix::process::Signal;
use sepal_tests::{World, kvm_missing, process::Process, until};
use serde_json::Value;

/// What there is to know about the guest.
fn info(world: &World) -> Value {
    let told = world.guest(&["info", "bee", "--json"]).expect_code(0);
    serde_json::from_str(&told.out()).unwrap()
}

/// The component of this run, once the guest runs.
fn component(world: &World, generation: u64) -> Process {
    until("the guest runs", || {
        let info = info(world);
        let runs = info["status"] == "running" && info["generation"] == generation;
        let pid = info["componentPid"].as_u64().filter(|_| runs)?;
        Process::of(u32::try_from(pid).unwrap())
    })
}

/// Ends the manager as a service manager would, and starts the next one.
fn next_manager(world: &mut World) {
    let manager = world.take_manager();
    manager.signal(Signal::TERM);
    manager.wait().expect_code(0);
    world.start_manager();
}

#[test]
fn a_guest_that_crashes_in_a_loop_is_given_up_and_says_why() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let policy = "on-failure,attempts=2,delay=1ms,max-delay=2ms";
    let launch = || {
        world.guest(&[
            "launch",
            "bee",
            "--restart",
            policy,
            "--cmdline",
            "quiet run=\"echo hello; crash\"",
        ])
    };
    let finished = launch().expect_code(11);
    assert!(
        finished.stderr.contains("failed 3 times in a row"),
        "{}",
        finished.stderr
    );
    assert_eq!(finished.out().matches("\nhello").count(), 3, "{}", finished.out());

    let list = world.guest(&["list"]).expect_code(0).out();
    assert!(list.contains("crash-loop (3 failures)"), "{list}");
    let told = info(&world);
    assert_eq!(
        (&told["status"], &told["failures"], &told["restarts"]),
        (&"crash-loop".into(), &3.into(), &2.into())
    );
    let crashes = told["crashes"].as_array().unwrap();
    assert_eq!(crashes.len(), 3);
    for crash in crashes {
        assert_eq!(crash["report"]["about"], "vcpu0", "{crash}");
        let rip = crash["registers"][0]["rip"].as_str().unwrap();
        assert_ne!(rip, "0x0", "{crash}");
        assert!(crash["output"].as_str().unwrap().contains("hello"), "{crash}");
        let lines = crash["lastLines"].as_array().unwrap();
        assert!(
            lines
                .iter()
                .any(|line| line.as_str().unwrap().contains("vCPU 0 failed")),
            "{crash}"
        );
    }
    let shown = world.guest(&["info", "bee"]).expect_code(0).out();
    for word in [
        "crash-loop (3 failures)",
        "run 3, ",
        "run 1, ",
        "vCPU 0 in run 3",
        "rip ",
        "printed last",
    ] {
        assert!(shown.contains(word), "{word}: {shown}");
    }

    // Whoever starts it by hand begins a new row.
    launch().expect_code(11);
    let told = info(&world);
    assert_eq!((&told["failures"], &told["generation"]), (&3.into(), &6.into()));
    assert_eq!(told["crashes"].as_array().unwrap().len(), 4);
    world.end();
}

#[test]
fn a_guest_whose_component_is_killed_begins_again() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let options = ["--detach", "--restart", "on-failure,delay=1ms,healthy=1h"];
    world.guest(&[&["launch", "bee"][..], &options].concat()).expect_code(0);
    for generation in 1..3 {
        // As the first process of its namespace it hears of no other signal that kills.
        component(&world, generation).signal(Signal::KILL);
    }
    let last = component(&world, 3);
    let told = info(&world);
    assert_eq!((&told["restarts"], &told["failures"]), (&2.into(), &2.into()));
    for crash in told["crashes"].as_array().unwrap() {
        assert_eq!(crash["report"]["reason"], "vmm-terminated", "{crash}");
        assert_eq!(crash["report"]["componentSignal"], Signal::KILL.as_raw(), "{crash}");
    }
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    assert!(!last.exists());
    assert_eq!(info(&world)["status"], "stopped");
    world.end();
}

#[test]
fn a_guest_that_is_always_wanted_begins_again_until_it_is_stopped() {
    if kvm_missing() {
        return;
    }
    for way in ["shutdown", "reset triple"] {
        let world = World::with_manager();
        let cmdline = format!("quiet run=\"echo again; {way}\"");
        let guest = world.start(&[
            "launch",
            "bee",
            "--restart",
            "always,delay=1ms,max-delay=2ms",
            "--cmdline",
            &cmdline,
        ]);
        guest.stdout.expect("again");
        // More often than it may fail.
        until("it has begun again", || {
            (info(&world)["restarts"].as_u64()? > 6).then_some(())
        });
        world.guest(&["stop", "bee", "--force"]).expect_code(0);
        let finished = guest.wait();
        assert!(finished.out().matches("again").count() > 6, "{}", finished.out());
        let told = info(&world);
        assert_eq!(
            (&told["status"], &told["failures"]),
            (&"stopped".into(), &0.into()),
            "{told}"
        );
        assert_eq!(told["crashes"], Value::Array(Vec::new()));
        world.end();
    }
}

#[test]
fn a_guest_that_turns_itself_off_or_resets_has_not_failed() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    for (way, code) in [("shutdown", 0), ("reset triple", 10)] {
        let cmdline = format!("quiet run=\"{way}\"");
        world
            .guest(&[
                "launch",
                "bee",
                "--restart",
                "on-failure,delay=1ms",
                "--cmdline",
                &cmdline,
            ])
            .expect_code(code);
        assert_eq!(info(&world)["restarts"], 0);
    }
    world.end();
}

#[test]
fn a_guest_that_waits_for_its_next_run_can_be_seen_and_stopped() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = world.start(&[
        "launch",
        "bee",
        "--restart",
        "on-failure,delay=1h,max-delay=1h",
        "--cmdline",
        "quiet run=crash",
    ]);
    until("it waits", || {
        let list = world.guest(&["list"]).out();
        list.contains("starting (after 1 failure)").then_some(())
    });
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    guest.wait().expect_code(12);
    world.end();
}

#[test]
fn what_is_known_of_a_defined_guest_that_crashed_outlives_the_manager() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    world
        .guest(&["define", "bee", "--cmdline", "quiet run=crash"])
        .expect_code(0);
    let crash = |world: &World, generation: u64| {
        world.guest(&["start", "bee"]).expect_code(0);
        until("it has crashed", || {
            let info = info(world);
            (info["status"] == "stopped" && info["generation"] == generation).then_some(info)
        })
    };
    let before = crash(&world, 1);
    next_manager(&mut world);
    let told = info(&world);
    assert_eq!(
        (&told["status"], &told["generation"]),
        (&"stopped".into(), &1.into()),
        "{told}"
    );
    for same in ["stop", "crashes", "detached"] {
        assert_eq!(told[same], before[same], "{same}");
    }
    assert_eq!(told["crashes"].as_array().unwrap().len(), 1);
    let shown = world.guest(&["info", "bee"]).expect_code(0).out();
    assert!(shown.contains("vCPU 0 in run 1") && shown.contains("rip "), "{shown}");

    crash(&world, 2);
    // One that ends with its manager is known to have been the last.
    world
        .guest(&["define", "bee", "--replace", "--cmdline", "quiet"])
        .expect_code(0);
    world.guest(&["start", "bee"]).expect_code(0);
    component(&world, 3);
    next_manager(&mut world);
    let told = info(&world);
    let crashes = told["crashes"].as_array().unwrap();
    let runs: Vec<_> = crashes.iter().map(|crash| &crash["generation"]).collect();
    assert_eq!(runs, [2, 1], "{told}");
    assert_eq!(
        (&told["stop"]["reason"], &told["generation"]),
        (&"killed".into(), &3.into()),
        "{told}"
    );
    world.end();
}
