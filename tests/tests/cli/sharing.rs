//! Tokens: who may do what with a guest that is not theirs, and until when.

use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::Command,
};

use sepal_tests::{Finished, World, kvm_missing, program, programs::is_root};
use serde_json::Value;

use crate::PROMPT;

#[track_caller]
fn says(finished: &Finished, words: &[&str]) {
    for word in words {
        assert!(
            finished.stderr.contains(word),
            "{word:?} is not in {}: {}",
            finished.command,
            finished.stderr
        );
    }
}

/// Shares something; the token.
#[track_caller]
fn share(world: &World, arguments: &[&str]) -> String {
    let all: Vec<&str> = ["share"].iter().chain(arguments).copied().collect();
    let shared = world.guest(&all).expect_code(0);
    let token = shared.out();
    assert_eq!(token.lines().count(), 1, "the token is alone on standard output");
    says(&shared, &["guest redeem TOKEN", "guest revoke"]);
    token.trim_end().to_owned()
}

fn world() -> Option<World> {
    if kvm_missing() {
        return None;
    }
    let world = World::with_manager();
    let launch = [
        "launch",
        "bee",
        "--detach",
        "--balloon",
        "--memory-device=64M",
        "--console=2",
        "--vsock",
        "--no-agent",
    ];
    world.guest(&launch).expect_code(0);
    Some(world)
}

#[test]
fn a_token_does_what_it_is_for() {
    let Some(world) = world() else { return };
    let observer = share(&world, &["bee", "observer"]);
    let info = world.guest(&["redeem", &observer]).expect_code(0).out();
    assert!(info.contains("status") && info.contains("running"), "{info}");
    world.guest(&["redeem", &observer, "info", "--json"]).expect_code(0);
    let events = world
        .guest(&["redeem", &observer, "events", "--no-follow"])
        .expect_code(0)
        .out();
    assert!(events.contains("started"), "{events}");
    for arguments in [&["stats"][..], &["stats", "--json"]] {
        let all: Vec<&str> = ["redeem", &observer].iter().chain(arguments).copied().collect();
        world.guest(&all).expect_code(0);
    }
    let stats = share(&world, &["bee", "stats"]);
    assert!(world.guest(&["redeem", &stats]).expect_code(0).out().contains("VCPU"));

    let serial = share(&world, &["bee", "serial"]);
    let mut attached = world.start(&["redeem", &serial]);
    attached.type_in("echo from afar\r");
    attached.stdout.expect("\nfrom afar\r\n");
    attached.stdout.expect(PROMPT);
    let read = world.guest(&["redeem", &serial, "read"]).expect_code(0).out();
    assert!(read.contains("from afar"), "{read}");
    let power = share(&world, &["bee", "power"]);
    world.guest(&["redeem", &power, "pause"]).expect_code(0);
    assert!(world.guest(&["list"]).expect_code(0).out().contains("paused"));
    world.guest(&["redeem", &power, "resume"]).expect_code(0);
    let waiting = world.start(&["redeem", &observer, "wait"]);
    let debug = share(&world, &["bee", "debug"]);
    assert!(
        world
            .guest(&["redeem", &debug, "registers"])
            .expect_code(0)
            .out()
            .contains("rip")
    );
    let stopped = world
        .guest(&["redeem", &power, "stop", "--timeout", "60s", "--force"])
        .expect_code(0);
    says(&stopped, &["bee: "]);
    waiting.wait().expect_code(0);
    // Who holds the port alone is told that there is nothing more.
    says(&attached.wait().expect_code(0), &["bee: the guest has ended"]);
    world.end();
}

#[test]
fn what_is_narrowed_stays_narrow() {
    let Some(world) = world() else { return };
    let balloon = share(&world, &["bee", "balloon", "--balloon", "0..64M"]);
    world.guest(&["redeem", &balloon, "set", "16M"]).expect_code(0);
    says(
        &world.guest(&["redeem", &balloon, "set", "128M"]).expect_code(1),
        &["PERMISSION_DENIED", "hint:"],
    );
    assert!(
        world
            .guest(&["redeem", &balloon, "size"])
            .expect_code(0)
            .out()
            .contains("16 MiB")
    );
    let memory = share(&world, &["bee", "memory", "--memory", "..8M"]);
    world.guest(&["redeem", &memory, "set", "4M"]).expect_code(0);
    says(
        &world.guest(&["redeem", &memory, "set", "16M"]).expect_code(1),
        &["PERMISSION_DENIED"],
    );
    let power = share(
        &world,
        &[
            "bee",
            "power",
            "--only",
            "pause,share",
            "--expires",
            "1h",
            "--rate",
            "5/20",
        ],
    );
    says(
        &world.guest(&["redeem", &power, "reset"]).expect_code(1),
        &["PERMISSION_DENIED", "reset"],
    );
    let described = world.guest(&["redeem", &power, "describe"]).expect_code(0).out();
    for words in ["permits", "pause, share", "59m", "5 a second, 20 at once"] {
        assert!(described.contains(words), "{words:?} in {described}");
    }
    let text = world
        .guest(&["redeem", &power, "describe", "--json"])
        .expect_code(0)
        .out();
    let described: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&described["kind"], &described["guest"], &described["burst"]),
        (&"power".into(), &"bee".into(), &20.into())
    );
    // Only what is printed: what is typed is not.
    let output = share(&world, &["bee", "serial", "--only", "output"]);
    let mut attached = world.pty(&["redeem", &output]);
    attached.expect("connected to bee");
    attached.type_in("echo mine\r");
    let mut typing = world.start(&["attach", "bee"]);
    typing.type_in("echo theirs\r");
    attached.expect("\ntheirs\r\n");
    assert!(!attached.screen.text().contains("mine"), "{}", attached.screen.text());
    attached.type_in("\x1d");
    assert_eq!(attached.wait().code(), Some(0));
    drop(typing);
    world.guest(&["stop", "bee", "--kill"]).expect_code(0);
    world.end();
}

#[test]
fn shares_are_listed_and_taken_back() {
    let Some(world) = world() else { return };
    let serial = share(&world, &["bee", "serial", "--label", "for the night shift"]);
    let shared = world
        .guest(&["share", "bee", "observer", "--once", "--json"])
        .expect_code(0)
        .out();
    let once: Value = serde_json::from_str(&shared).unwrap();
    let table = world.guest(&["shares", "bee"]).expect_code(0).out();
    assert!(
        table.contains("for the night shift") && table.contains("0 of 1"),
        "{table}"
    );
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let text = world.guest(&["shares", "bee", "--json"]).expect_code(0).out();
    let shares: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&shares[0]["kind"], &shares[1]["id"]), (&"serial".into(), &once["id"]));
    let once = once["token"].as_str().unwrap();
    world.guest(&["redeem", once]).expect_code(0);
    says(
        &world.guest(&["redeem", once]).expect_code(1),
        &["NOT_FOUND", "guest shares"],
    );

    // Whoever is connected by it loses the connection, and is told why.
    let mut attached = world.pty(&["redeem", &serial]);
    attached.expect("connected to bee");
    world.guest(&["revoke", "bee", "1"]).expect_code(0);
    attached.expect("REVOKED");
    attached.expect("hint:");
    assert_eq!(attached.wait().code(), Some(1));
    assert!(attached.is_cooked());
    says(&world.guest(&["redeem", &serial]).expect_code(1), &["NOT_FOUND"]);
    says(
        &world.guest(&["revoke", "bee", "77"]).expect_code(1),
        &["NOT_FOUND", "guest shares bee"],
    );
    world.guest(&["revoke", "bee", "all"]).expect_code(0);
    assert_eq!(world.guest(&["shares", "bee"]).expect_code(0).out().lines().count(), 1);
    world.guest(&["stop", "bee", "--kill"]).expect_code(0);
    world.end();
}

#[test]
fn a_token_is_not_used_up_by_a_mistake() {
    let Some(world) = world() else { return };
    let token = share(&world, &["bee", "power", "--once"]);
    for wrong in [&[][..], &["size"], &["attach"], &["fly"]] {
        let all: Vec<&str> = ["redeem", &token].iter().chain(wrong).copied().collect();
        let finished = world.guest(&all).expect_code(2);
        if wrong != ["fly"] {
            says(&finished, &["power", "shutdown|stop|kill|pause", "not been used up"]);
        }
    }
    // Nor by a look at it, or by asking for more than it permits.
    let stop = share(&world, &["bee", "power", "--once", "--only", "pause"]);
    for _ in 0..2 {
        let told = world.guest(&["redeem", &stop, "describe"]).expect_code(0).out();
        assert!(told.contains("pause"), "{told}");
    }
    let refused = world.guest(&["redeem", &stop, "kill"]).expect_code(1);
    says(
        &refused,
        &[
            "PERMISSION_DENIED",
            "the right kill",
            "permits pause",
            "not been used up",
        ],
    );
    world.guest(&["redeem", &stop, "pause"]).expect_code(0);
    says(
        &world.guest(&["redeem", &stop, "describe"]).expect_code(1),
        &["NOT_FOUND"],
    );
    world.guest(&["redeem", &token, "kill"]).expect_code(0);
    says(
        &world.guest(&["redeem", "power.1.nonsense", "kill"]).expect_code(1),
        &["NOT_FOUND"],
    );
    says(&world.guest(&["redeem", "what is this"]).expect_code(1), &["NOT_FOUND"]);
    world.end();
}

#[test]
fn what_cannot_be_shared_says_why() {
    let Some(world) = world() else { return };
    for (arguments, code, words) in [
        (&["bee", "soul"][..], 2, &["'soul' is no facet", "console"][..]),
        (
            &["bee", "power", "--only", "fly"],
            2,
            &["'fly' is no right", "shutdown"],
        ),
        (&["bee", "balloon", "--balloon", "2M..1M"], 2, &["nothing is in"]),
        (&["bee", "power", "--expires", "soon"], 2, &["'soon' is no time"]),
        (&["bee", "power", "--expires", "0"], 2, &["--expires", "at least 1 s"]),
        (&["bee", "power", "--rate", "0"], 2, &["no number of calls"]),
        (
            &["bee", "serial", "--only", "kill"],
            1,
            &["BAD_CONFIG", "those of serial are output"],
        ),
        (&["bee", "balloon", "--balloon", "0..4097"], 1, &["BAD_CONFIG", "4096"]),
        (
            &["bee", "power", "--uid", "no-such-user"],
            1,
            &["no user \"no-such-user\""],
        ),
        (&["bee", "console", "--port", "9"], 1, &["DEVICE_NOT_PRESENT"]),
        (&["bee", "disk"], 1, &["DEVICE_NOT_PRESENT"]),
        (&["wasp", "power"], 1, &["NOT_FOUND", "guest list"]),
    ] {
        let all: Vec<&str> = ["share"].iter().chain(arguments).copied().collect();
        says(&world.guest(&all).expect_code(code), words);
    }
    world.guest(&["stop", "bee", "--kill"]).expect_code(0);
    world.end();
}

/// A user that nobody is.
const STRANGER: u32 = 64_999;

#[test]
fn who_may_do_nothing_else_can_redeem() {
    if kvm_missing() {
        return;
    }
    if !is_root() {
        println!("who_may_do_nothing_else_can_redeem skipped: only root can be somebody else");
        return;
    }
    let mut world = World::new();
    let open = |path: &std::path::Path| fs::set_permissions(path, Permissions::from_mode(0o711)).unwrap();
    open(world.folder());
    world.start_manager_by(Command::new(program("guest-manager")), |command, socket, ready| {
        command
            .arg("--socket")
            .arg(socket)
            .args(["--ready-fd", ready, "--allow", "everyone=none"]);
    });
    open(world.socket().parent().unwrap());
    let own = world.folder().join("guest");
    fs::copy(program("guest"), &own).unwrap();
    fs::set_permissions(&own, Permissions::from_mode(0o755)).unwrap();
    let stranger = |arguments: &[&str]| {
        let mut command = Command::new(&own);
        command.args(arguments).env("XDG_RUNTIME_DIR", world.folder());
        command.uid(STRANGER).gid(STRANGER).current_dir("/");
        let mut running = world.start_command(command, None);
        running.close_input();
        running.wait()
    };
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    let who = stranger(&["whoami"]).expect_code(0).out();
    assert!(who.contains("none") && who.contains("redeem"), "{who}");
    for arguments in [
        &["list"][..],
        &["info", "bee"],
        &["stop", "bee"],
        &["launch"],
        &["end-manager"],
        &["events"],
    ] {
        says(
            &stranger(arguments).expect_code(1),
            &["PERMISSION_DENIED", "guest whoami"],
        );
    }
    let observer = share(&world, &["bee", "observer"]);
    assert!(
        stranger(&["redeem", &observer])
            .expect_code(0)
            .out()
            .contains("running")
    );
    let told = stranger(&["redeem", &observer, "events", "--no-follow"])
        .expect_code(0)
        .out();
    assert!(told.contains("started"), "{told}");
    // What is for one user is for nobody else, and is not used up by others.
    let uid = STRANGER.to_string();
    let power = share(&world, &["bee", "power", "--once", "--uid", &uid]);
    says(
        &world.guest(&["redeem", &power, "kill"]).expect_code(1),
        &["PERMISSION_DENIED"],
    );
    assert!(
        world
            .guest(&["shares", "bee"])
            .expect_code(0)
            .out()
            .contains(&format!("by {uid}"))
    );
    says(&stranger(&["redeem", &power, "kill"]).expect_code(0), &["bee: "]);
    world.guest(&["wait", "bee"]).expect_code(12);
    world.end();
}
