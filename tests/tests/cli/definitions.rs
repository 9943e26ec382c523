//! Definitions by the command line: kept, started, changed, shown and forgotten, across the end of the guest manager.

use std::{fs, path::Path};

use sepal_tests::{Finished, World, kvm_missing};
use serde_json::Value;

use crate::{BANNER, PROMPT};

const UUID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

fn says(finished: &Finished, words: &[&str]) {
    for words in words {
        assert!(finished.stderr.contains(words), "{words:?} in {}", finished.stderr);
    }
}

fn json(world: &World, arguments: &[&str]) -> Value {
    let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&world.guest(&arguments).expect_code(0).out()).unwrap()
}

/// The manager ends, and another begins.
fn restart(world: &mut World) {
    world.guest(&["end-manager"]).expect_code(0);
    world.take_manager().wait().expect_code(0);
    world.start_manager();
}

fn write(world: &World, text: &str) -> String {
    fs::write(world.folder().join("root.img"), vec![0; 1 << 20]).unwrap();
    let path = world.folder().join("bee.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_definition_is_kept_shown_changed_and_forgotten() {
    let mut world = World::with_manager();
    let text = format!(
        "name = \"bee\"\nuuid = \"{UUID}\"\nmemory = \"64M\"\n\n[[disk]]\nfile = \"root.img\"\nmode = \"ro\"\n"
    );
    let file = write(&world, &text);
    let defined = world.guest(&["define", "-f", &file]).expect_code(0);
    assert_eq!((&defined.out()[..], &defined.stderr[..]), ("", ""));
    let list = world.guest(&["list"]).expect_code(0).out();
    let row: Vec<&str> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((row[0], row.last()), ("bee", Some(&"yes")), "{list}");

    let info = json(&world, &["info", "bee"]);
    assert_eq!(
        (&info["uuid"], &info["componentPid"]),
        (&UUID.into(), &Value::Null),
        "{info}"
    );
    assert!(world.guest(&["info", "bee"]).expect_code(0).out().contains("defined"));
    let toml = world.guest(&["info", "bee", "--toml"]).expect_code(0).out();

    // What is printed defines the same, also under another name.
    let printed = world.guest(&["definition", "bee"]).expect_code(0).out();
    let image = world.folder().join("root.img");
    assert!(
        printed.contains(&format!("file = \"{}\"", image.display())),
        "{printed}"
    );
    assert!(printed.contains(UUID), "{printed}");
    assert_eq!(printed, toml);
    let copy = write(&world, &printed);
    let again = world.guest(&["define", "-f", &copy]).expect_code(1);
    says(&again, &["ALREADY_BOUND", "bee.toml:", "--replace"]);
    world.guest(&["define", "ant", "-f", &copy]).expect_code(1);
    let other = json(
        &world,
        &["define", "ant", "-f", &copy, "--uuid", &UUID.replace('6', "7")],
    );
    assert_eq!(
        (&other["name"], &other["warnings"]),
        (&"ant".into(), &Value::Array(Vec::new()))
    );
    assert_eq!(world.guest(&["definition", "bee"]).expect_code(0).out(), printed);
    world
        .guest(&["define", "-f", &copy, "--replace", "--memory", "128M", "--autostart"])
        .expect_code(0);
    let changed = world.guest(&["definition", "bee"]).expect_code(0).out();
    assert!(
        changed.contains("memory = \"128M\"") && changed.contains("autostart = true"),
        "{changed}"
    );
    world.guest(&["autostart", "bee", "off"]).expect_code(0);

    restart(&mut world);
    let names: Vec<Value> = json(&world, &["list"]).as_array().unwrap().clone();
    let names: Vec<&Value> = names.iter().map(|guest| &guest["name"]).collect();
    assert_eq!(names, [&Value::from("ant"), &Value::from("bee")]);
    assert_eq!(
        world.guest(&["definition", "bee"]).expect_code(0).out(),
        changed.replace("autostart = true\n", "")
    );
    for name in ["ant", "bee"] {
        world.guest(&["undefine", name]).expect_code(0);
        says(&world.guest(&["undefine", name]).expect_code(1), &["NOT_FOUND", name]);
    }
    for command in [
        &["definition", "bee"][..],
        &["start", "bee"],
        &["autostart", "bee", "on"],
    ] {
        says(&world.guest(command).expect_code(1), &["NOT_FOUND", "bee"]);
    }
    world.guest(&["autostart", "bee", "perhaps"]).expect_code(2);
    assert_eq!(json(&world, &["list"]), Value::Array(Vec::new()));
    world.end();
}

#[test]
fn what_is_not_there_yet_is_a_warning_and_what_cannot_be_an_error() {
    let world = World::with_manager();
    let file = write(&world, "name = \"bee\"\nkernel = \"later\"\n");
    let defined = world.guest(&["define", "-f", &file]).expect_code(0);
    says(&defined, &["warning: ", "later"]);
    let file = write(&world, "cpus = 4\n\n[limits]\ntasks = 1\n");
    says(
        &world.guest(&["define", "ant", "-f", &file]).expect_code(1),
        &["BAD_CONFIG", "bee.toml:4:9:", "^"],
    );
    says(
        &world.guest(&["define", "--memory", "64M"]).expect_code(1),
        &["BAD_CONFIG", "name"],
    );
    world.end();
}

#[test]
fn a_guest_starts_from_its_definition_by_itself_if_it_shall() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    let options = ["--memory", "64M", "--cmdline", "quiet", "--autostart"];
    let define: Vec<&str> = ["define", "bee"].into_iter().chain(options).collect();
    world.guest(&define).expect_code(0);
    assert_eq!(world.guest(&["start", "bee"]).expect_code(0).out(), "");
    says(
        &world.guest(&["start", "bee"]).expect_code(1),
        &["ALREADY_RUNNING", "bee"],
    );
    let info = json(&world, &["info", "bee"]);
    for (key, value) in [
        ("status", Value::from("running")),
        ("defined", true.into()),
        ("autostart", true.into()),
        ("memoryMib", 64.into()),
        ("detached", true.into()),
    ] {
        assert_eq!(info[key], value, "{key} of {info}");
    }
    let toml = world.guest(&["info", "bee", "--toml"]).expect_code(0).out();
    assert_eq!(toml, world.guest(&["definition", "bee"]).expect_code(0).out());

    // A definition that is gone leaves the guest alone, which is gone in its turn when it ends.
    world.guest(&["undefine", "bee"]).expect_code(0);
    let info = json(&world, &["info", "bee"]);
    assert_eq!(
        (&info["status"], &info["defined"]),
        (&"running".into(), &false.into()),
        "{info}"
    );
    world.guest(&define).expect_code(0);

    restart(&mut world);
    world.guest(&["wait", "bee", "--timeout", "10ms"]).expect_code(124);
    let info = json(&world, &["info", "bee"]);
    assert_eq!(
        (&info["status"], &info["autostart"]),
        (&"running".into(), &true.into()),
        "{info}"
    );
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    let list = json(&world, &["list"]);
    assert_eq!(
        (&list[0]["status"], &list[0]["defined"]),
        (&"stopped".into(), &true.into()),
        "{list}"
    );

    let mut terminal = world.pty(&["start", "bee", "--attach"]);
    terminal.expect(BANNER);
    terminal.expect(PROMPT);
    terminal.type_in("\x1d");
    assert_eq!(terminal.wait().code(), Some(0));
    terminal.expect("detached from bee, which runs on");
    assert_eq!(json(&world, &["info", "bee"])["status"], "running");
    world.end();
}

#[test]
fn a_guest_that_rests_is_shown_as_it_would_be_started() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let define = |options: &[&str]| {
        let all: Vec<&str> = ["define", "bee", "--replace"].iter().chain(options).copied().collect();
        world.guest(&all).expect_code(0);
    };
    define(&["--memory", "64M"]);
    world.guest(&["start", "bee"]).expect_code(0);
    define(&["--memory", "128M", "--restart", "on-failure,attempts=2", "--durable"]);
    let shown = |memory: u64, policy: &str, durable: bool| {
        let info = json(&world, &["info", "bee"]);
        let told = (&info["memoryMib"], &info["restart"]["policy"], &info["durable"]);
        assert_eq!(told, (&memory.into(), &policy.into(), &durable.into()), "{info}");
        let row = json(&world, &["list"])[0].clone();
        assert_eq!(row["memoryMib"], memory, "{row}");
        let toml = world.guest(&["info", "bee", "--toml"]).expect_code(0).out();
        assert!(toml.contains(&format!("memory = \"{memory}M\"")), "{toml}");
    };
    shown(64, "never", false);
    world.guest(&["stop", "bee", "--kill"]).expect_code(0);
    shown(128, "on-failure", true);
    let text = world.guest(&["info", "bee"]).expect_code(0).out();
    for words in ["on-failure: after 0.1s", "given up after 3", "durable", "128 MiB"] {
        assert!(text.contains(words), "{words:?} in {text}");
    }
    define(&["--memory", "32M"]);
    shown(32, "never", false);
    world.end();
}

#[test]
fn what_a_guest_runs_with_makes_it_again() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let text = format!(
        "name = \"bee\"\nuuid = \"{UUID}\"\nmemory = \"64M\"\ncmdline = \"quiet\"\nwatchdog = \"stop\"\nconsole = {{ ports = 2 }}\n\n[restart]\npolicy = \"on-failure\"\n\n\
         [[disk]]\nfile = \"root.img\"\nmode = \"ro\"\n"
    );
    let file = write(&world, &text);
    world.guest(&["launch", "-f", &file, "--detach"]).expect_code(0);
    let toml = world.guest(&["info", "bee", "--toml"]).expect_code(0);
    assert_eq!(toml.stderr, "");
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    world.guest(&["remove", "bee"]).expect_code(0);
    let copy = write(&world, &toml.out());
    assert!(Path::new(&copy).exists());
    world.guest(&["launch", "-f", &copy, "--detach"]).expect_code(0);
    assert_eq!(world.guest(&["info", "bee", "--toml"]).expect_code(0).out(), toml.out());
    world.end();
}

#[test]
fn a_manager_without_a_folder_says_so() {
    let mut world = World::new();
    world.start_manager_by(
        std::process::Command::new(sepal_tests::program("guest-manager")),
        |command, socket, ready| {
            command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
        },
    );
    says(
        &world.guest(&["define", "bee", "--memory", "64M"]).expect_code(1),
        &["NO_STORAGE", "--state"],
    );
    world.end();
}
