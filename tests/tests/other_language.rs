//! A client in another language: Python with pycapnp, which gets the schema files and the socket and nothing else.
//!
//! pycapnp comes from PyPI, into a virtual environment in the user's cache, once.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use sepal_tests::{World, kvm_missing};

/// The version that the client is written for; it brings its own Cap'n Proto.
const PYCAPNP: &str = "2.2.4";

/// Copies the schema files, as somebody would who has only them.
fn schemas(world: &World) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("schema");
    let to = world.folder().join("schema");
    for folder in ["", "capnp"] {
        fs::create_dir_all(to.join(folder)).unwrap();
        for entry in fs::read_dir(from.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "capnp") {
                fs::copy(&path, to.join(folder).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    to
}

/// Runs the client through a scenario against a manager of its own; returns the lines that it printed.
fn run(scenario: &str) -> Option<Vec<String>> {
    if kvm_missing() {
        return None;
    }
    let python = sepal_tests::python::with("pycapnp", PYCAPNP);
    let world = World::with_manager();
    let mut command = Command::new(python);
    command
        .arg("-I")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pycapnp/client.py"))
        .arg(schemas(&world))
        .arg(world.socket())
        .arg(scenario)
        .current_dir(world.folder());
    let mut client = world.start_command(command, None);
    client.close_input();
    let finished = client.wait().expect_code(0);
    let lines: Vec<String> = finished.out().lines().map(str::to_owned).collect();
    println!("{}", finished.out());
    assert_eq!(lines.last().map(String::as_str), Some(&*format!("done: {scenario}")));
    world.end();
    Some(lines)
}

/// The value of the only line that tells about `what`.
fn value<'a>(lines: &'a [String], what: &str) -> &'a str {
    let mut values = lines
        .iter()
        .filter_map(|line| line.strip_prefix(what)?.strip_prefix(": "));
    let value = values.next().unwrap_or_else(|| panic!("nothing about {what:?}"));
    assert_eq!(values.next(), None, "{what} is told twice");
    value
}

#[test]
fn it_creates_runs_reads_types_and_stops() {
    let Some(lines) = run("lifecycle") else { return };
    let value = |what| value(&lines, what);
    assert_eq!(value("version"), env!("CARGO_PKG_VERSION"));
    assert_eq!((value("protocol"), value("protocol constant")), ("1", "1"));
    assert_eq!((value("newGuest"), value("create")), ("lifecycle", "ok"));
    assert!(
        value("banner").starts_with("Sepal default guest"),
        "{}",
        value("banner")
    );
    assert!(value("info").contains("memory: 31 MiB"), "{}", value("info"));
    assert_eq!((value("status"), value("memory")), ("running", "32"));
    assert!(value("cmdline").contains("hello=python"), "{}", value("cmdline"));
    let layers = value("layers");
    for layer in ["seccomp", "landlock", "pid-namespace", "root", "capabilities"] {
        assert!(layers.contains(&format!("{layer}=holds")), "{layer} in {layers}");
    }
    assert_eq!(value("stop"), "ok");
    assert_eq!(value("run"), "error controllerForcedHalt");
}

#[test]
fn it_can_match_on_errors() {
    let Some(lines) = run("errors") else { return };
    for (what, kind) in [
        ("bad name", "badConfig about 'name'"),
        ("lookup", "notFound"),
        ("run first", "notCreated"),
        ("unbuilt", "notSupported about 'sound'"),
        ("instance id", "badConfig about 'instanceId'"),
        ("kernel", "kernelLoadFailure"),
        ("memory", "guestInitializationFailure"),
        ("disk", "badConfig about 'disks[0].image'"),
        ("taken", "alreadyRunning"),
        ("remove", "notFound"),
        ("force", "notRunning"),
    ] {
        let told = value(&lines, what);
        assert!(told.starts_with(kind), "{what}: {told}, not {kind}");
    }
    // A capability that was never to be had says why.
    let bind = value(&lines, "bind");
    assert!(
        bind.contains("GUEST_INITIALIZATION_FAILURE: the guest needs 2147483647 MiB"),
        "{bind}"
    );
}

#[test]
fn it_is_called_back_and_a_dropped_lease_stops_the_guest() {
    let Some(lines) = run("events") else { return };
    assert_eq!(value(&lines, "launch"), "launched");
    assert_eq!(value(&lines, "name"), "adder");
    assert_eq!(value(&lines, "list"), "adder=running");
    assert_eq!(value(&lines, "ended"), "killed");
    assert_eq!(value(&lines, "remove"), "ok");
    let events: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("event: ")).collect();
    let expected = ["defined", "starting", "started", "shuttingDown", "stopped", "removed"];
    assert_eq!(events, expected.map(|event| format!("adder {event} 0")));
}

#[test]
fn a_console_that_it_holds_is_revoked() {
    let Some(lines) = run("capabilities") else { return };
    let value = |what| value(&lines, what);
    assert_eq!(value("event"), "boa started");
    assert_eq!((value("read"), value("rights")), ("True", "output"));
    assert_eq!(value("write"), "PERMISSION_DENIED");
    assert_eq!((value("token"), value("redeemed")), ("serial", "serial of boa"));
    assert_eq!((value("typed"), value("again")), ("True", "notFound"));
    for what in ["revoke", "revoke the first"] {
        assert_eq!(value(what), "ok");
    }
    for what in ["waiting", "read again", "open", "first"] {
        assert_eq!(value(what), "revoked", "{what}");
    }
    assert_eq!(value("own"), "works");
}
