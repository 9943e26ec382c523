//! `guest cpu`, `pin`, `peek` and `stack`: where vCPUs run, and what they and the memory of a guest that hangs tell.

use sepal_tests::{World, kvm_missing, until};
use serde_json::Value;

/// The processors that the test, and whatever it starts, may use.
fn own() -> Vec<u16> {
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    (0..1024).filter(|cpu| set.is_set(usize::from(*cpu))).collect()
}

fn list(numbers: &[u16]) -> Value {
    Value::from(numbers.to_vec())
}

/// The vCPUs and the scheduler, as told.
#[track_caller]
fn cpu(world: &World, name: &str) -> Value {
    serde_json::from_str(&world.guest(&["cpu", name, "--json"]).expect_code(0).out()).unwrap()
}

/// The processors that a thread of a guest may use, as the host says.
fn affinity(vcpu: &Value) -> Vec<u16> {
    let thread = vcpu["hostThread"].as_i64().unwrap().try_into().unwrap();
    let set = rustix::thread::sched_getaffinity(rustix::thread::Pid::from_raw(thread)).unwrap();
    (0..1024).filter(|cpu| set.is_set(usize::from(*cpu))).collect()
}

#[test]
fn vcpus_are_pinned_and_stay_where_they_are_when_the_guest_begins_again() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let (all, last) = (own(), *own().last().unwrap());
    let pinned = format!("1={last},1023");
    world
        .guest(&["launch", "web", "-d", "--cpus", "2", "--pin", &pinned])
        .expect_code(0);
    let told = cpu(&world, "web");
    let vcpus = told["vcpus"].as_array().unwrap();
    assert_eq!(
        (&vcpus[0]["cpus"], &vcpus[1]["cpus"]),
        (&list(&all), &list(&[last])),
        "{told}"
    );
    assert_eq!((affinity(&vcpus[0]), affinity(&vcpus[1])), (all.clone(), vec![last]));
    assert!(vcpus[0]["cpuTimeNs"].as_u64().unwrap() > 0, "{told}");
    assert_eq!(told["scheduler"]["percent"], 0, "{told}");

    world
        .guest(&["pin", "web", &format!("0={last}"), "1=all"])
        .expect_code(0);
    world.guest(&["reset", "web"]).expect_code(0);
    let told = cpu(&world, "web");
    let vcpus = told["vcpus"].as_array().unwrap();
    assert_eq!((affinity(&vcpus[0]), affinity(&vcpus[1])), (vec![last], all), "{told}");
    let table = world.guest(&["pin", "web"]).expect_code(0).out();
    assert!(
        table.starts_with(&format!("VCPU  RUNS ON\n0     {last}\n1     ")),
        "{table}"
    );

    let refused = world.guest(&["pin", "web", "0=1023"]).expect_code(1);
    assert!(refused.stderr.contains("1023 none is there"), "{refused:?}");
    let refused = world.guest(&["pin", "web", "2=all"]).expect_code(1);
    assert!(refused.stderr.contains("there is no vCPU 2"), "{refused:?}");
    let refused = world.guest(&["launch", "db", "--pin", "0=1023"]).expect_code(1);
    assert!(refused.stderr.contains("pins[0].cpus"), "{refused:?}");
    world.end();
}

#[test]
fn what_vcpus_do_is_told_by_figures_and_by_the_controller_alike() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "web", "-d", "--cpus", "2"]).expect_code(0);
    let both_tell = |state: &str| {
        let stats = world.guest(&["stats", "web", "--json"]);
        // A component that is kept from running has not told any yet.
        let stats: Value = serde_json::from_str(&stats.out()).ok()?;
        let told = cpu(&world, "web");
        let all = [&stats, &told].map(|all| all["vcpus"].as_array().unwrap());
        all.into_iter()
            .flatten()
            .all(|vcpu| vcpu["state"] == state)
            .then_some(())
    };
    // It waits for somebody to type.
    until("the guest has nothing to do", || both_tell("halted"));
    world.guest(&["pause", "web"]).expect_code(0);
    until("the guest is paused", || both_tell("paused"));
    world.guest(&["resume", "web"]).expect_code(0);
    until("the guest goes on", || both_tell("halted"));
    // What they did last is not what they do.
    world.guest(&["stop", "web", "--kill"]).expect_code(0);
    let stats = world.guest(&["stats", "web", "--json"]).expect_code(0).out();
    let stats: Value = serde_json::from_str(&stats).unwrap();
    let vcpus = stats["vcpus"].as_array().unwrap();
    assert!(vcpus.iter().all(|vcpu| vcpu["state"] == "stopped"), "{stats}");
    world.end();
}

#[test]
fn the_share_of_a_guest_is_changed_or_it_is_said_what_the_host_lacks() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "web", "-d"]).expect_code(0);
    let changed = world.guest(&["cpu", "web", "--weight", "200", "--limit", "50%"]);
    match changed.code() {
        0 => {
            assert_eq!(cpu(&world, "web")["scheduler"]["weight"], 200);
            // The other one stays.
            world.guest(&["cpu", "web", "--limit", "none"]).expect_code(0);
            let text = world.guest(&["cpu", "web"]).expect_code(0).out();
            assert!(text.ends_with("weight 200, limit none\n"), "{text}");
        }
        _ => {
            assert!(changed.stderr.contains("NOT_SUPPORTED"), "{changed:?}");
            assert_eq!(cpu(&world, "web")["scheduler"]["weight"], 0);
        }
    }
    world.end();
}

#[test]
fn memory_and_stacks_are_shown() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "web", "-d", "--memory", "16M"]).expect_code(0);
    // The embedded guest is an ELF file at 1 MiB, which it sees at the same address.
    let shown = world.guest(&["peek", "web", "0x100000", "20"]).expect_code(0).out();
    let expected = "0000000000100000  7f 45 4c 46 02 01 01 00  ";
    assert!(shown.starts_with(expected) && shown.lines().count() == 2, "{shown}");
    let physical = world.guest(&["peek", "web", "0000000000100000", "20", "--physical"]);
    assert_eq!(physical.expect_code(0).out(), shown);
    let raw = world.guest(&["peek", "web", "1048576", "200K", "--raw"]).expect_code(0);
    assert_eq!((&raw.stdout[..4], raw.stdout.len()), (&b"\x7fELF"[..], 200 << 10));
    let none = world.guest(&["peek", "web", "0x100000", "0"]).expect_code(0);
    assert_eq!(none.out(), "");
    let led = world
        .guest(&["peek", "web", "0x100123", "--translate"])
        .expect_code(0)
        .out();
    assert!(led.starts_with("physical  0x100123\n"), "{led}");
    let refused = world
        .guest(&["peek", "web", "0x1000000", "1", "--physical"])
        .expect_code(1);
    assert!(refused.stderr.contains("0x1000000 is not memory"), "{refused:?}");
    let refused = world.guest(&["peek", "web", "0xffffffffff000000"]).expect_code(1);
    assert!(
        refused.stderr.contains("0xffffffffff000000 is not mapped"),
        "{refused:?}"
    );

    // Names for what is there, made up: all of its text is one function.
    let map = world.folder().join("System.map");
    std::fs::write(&map, "0000000000100000 T whatever\n").unwrap();
    let stack = world.guest(&["stack", "web", "--symbols", map.to_str().unwrap()]);
    let stack = stack.expect_code(0).out();
    let first = stack.lines().next().unwrap();
    assert!(
        first.starts_with("  0   0x00000000001") && first.contains("  whatever+0x"),
        "{stack}"
    );
    let told = world
        .guest(&["stack", "web", "--frames", "1", "--json"])
        .expect_code(0)
        .out();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(
        (&told["frames"][0]["reliable"], told["frames"].as_array().unwrap().len()),
        (&true.into(), 1)
    );
    let refused = world
        .guest(&["stack", "web", "--symbols", "/nonexistent"])
        .expect_code(1);
    assert!(
        refused.stderr.contains("reading the symbols in /nonexistent"),
        "{refused:?}"
    );
    world.end();
}

#[test]
fn tokens_for_looking_in_and_for_vcpus_are_for_that() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "web", "-d"]).expect_code(0);
    let token = |arguments: &[&str]| {
        let all: Vec<&str> = ["share", "web"].iter().chain(arguments).copied().collect();
        world.guest(&all).expect_code(0).out().trim_end().to_owned()
    };
    let debug = token(&["debug"]);
    let shown = world
        .guest(&["redeem", &debug, "peek", "0x100000", "4"])
        .expect_code(0)
        .out();
    assert!(shown.contains("7f 45 4c 46"), "{shown}");
    let shown = world.guest(&["redeem", &debug, "stack"]).expect_code(0).out();
    assert!(shown.starts_with("  0   0x"), "{shown}");
    world.guest(&["redeem", &debug, "pin", "0=all"]).expect_code(2);

    let looks = token(&["cpu", "--only", "observe"]);
    let shown = world.guest(&["redeem", &looks, "cpus"]).expect_code(0).out();
    assert!(shown.starts_with("VCPU  STATE"), "{shown}");
    let refused = world.guest(&["redeem", &looks, "pin", "0=all"]).expect_code(1);
    assert!(refused.stderr.contains("needs the right cpu"), "{refused:?}");
    let pins = token(&["cpu"]);
    world.guest(&["redeem", &pins, "pin", "0=all"]).expect_code(0);
    world.end();
}
