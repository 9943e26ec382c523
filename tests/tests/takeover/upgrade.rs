//! A manager of another version takes over: one that was built from a schema with more fields, then the first one again.
//!
//! ```text
//!   the tree's sources --copied, fields added to the schema, generated anew--> target/upgrade --> target/debug/guest-manager-next
//! ```
//!
//! The copy is built in the tree's own target folder, where all crates of others are built already; files are written only where they differ. Its crates are
//! a folder deeper than the tree's: cargo tells crates apart by where they are in their workspace, and would take one for the other.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use sepal_schema::info::GuestStatus;
use sepal_tests::{kvm_missing, program};

use crate::{
    printer,
    scene::{PROMPT, Scene},
};

/// The structs that grow, and the files that they are in.
const GROWN: [(&str, &str); 6] = [
    ("config.capnp", "GuestConfig"),
    ("guest.capnp", "Event"),
    ("guest.capnp", "GuestInfo"),
    ("lifecycle.capnp", "HostSetup"),
    ("store.capnp", "DurableGuest"),
    ("store.capnp", "StoredDefinition"),
];
/// What is copied: the manager, and the crates of ours that it is made of.
const COPIED: [&str; 5] = [
    "agent",
    "guest-manager",
    "integration/default-guest",
    "runner",
    "schema",
];

/// Adds a field behind all others of a struct: the text with it.
fn grow(text: &str, name: &str) -> String {
    let begin = text.find(&format!("struct {name} {{")).unwrap();
    // Whether the numbers in each block that is open are the struct's own: those of groups and unions are.
    let (mut blocks, mut last, mut end) = (Vec::new(), None, None);
    let mut at = begin;
    for line in text[begin..].lines() {
        let code = line.split('#').next().unwrap_or_default();
        let own = |blocks: &[bool]| blocks.iter().all(|own| *own) && !blocks.is_empty();
        if let Some(number) = code.split('@').nth(1).filter(|_| own(&blocks)) {
            let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
            last = last.max(digits.parse::<u32>().ok());
        }
        for letter in code.chars() {
            match letter {
                '{' => {
                    let other = ["enum ", "interface ", "struct "]
                        .iter()
                        .any(|word| code.contains(word));
                    blocks.push(blocks.is_empty() || !other);
                }
                '}' => drop(blocks.pop()),
                _ => {}
            }
        }
        if blocks.is_empty() {
            end = Some(at);
            break;
        }
        at += line.len() + 1;
    }
    let (next, end) = (last.unwrap() + 1, end.unwrap());
    format!(
        "{}  addedByTheNextVersion @{next} :Text;\n{}",
        &text[..end],
        &text[end..]
    )
}

fn write(path: &Path, content: &[u8]) {
    if fs::read(path).is_ok_and(|there| there == content) {
        return;
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        for entry in fs::read_dir(from).unwrap() {
            let name = entry.unwrap().file_name();
            if name != "target" {
                copy(&from.join(&name), &to.join(&name));
            }
        }
        return;
    }
    let mut content = fs::read(from).unwrap();
    let name = from.file_name().unwrap().to_string_lossy().into_owned();
    if from.parent().is_some_and(|folder| folder.ends_with("schema")) && name.ends_with(".capnp") {
        let grown = GROWN.iter().filter(|(of, _)| *of == name);
        let text = grown.fold(String::from_utf8(content).unwrap(), |text, (_, name)| grow(&text, name));
        content = text.into_bytes();
    }
    let generated = from.parent().is_some_and(|folder| folder.ends_with("generated"));
    if generated {
        // Made anew from the schema below; until then as it is in the tree, whose code may use what was not there when the copy was made.
        let copied = to.parent().and_then(Path::parent).unwrap().join(format!(".{name}"));
        if to.exists() && fs::read(&copied).is_ok_and(|there| there == content) {
            return;
        }
        write(to, &content);
        write(&copied, &content);
        return;
    }
    write(to, &content);
}

/// Builds the next version of the manager.
fn next_version() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let manager = program("guest-manager");
    let target = manager.parent().and_then(Path::parent).unwrap();
    let tree = target.join("upgrade");
    let crates = tree.join("next");
    for name in COPIED {
        copy(&root.join(name), &crates.join(name));
    }
    copy(&root.join("Cargo.lock"), &tree.join("Cargo.lock"));
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let (before, rest) = manifest.split_once("members = [").unwrap();
    let (_, after) = rest.split_once("]\n").unwrap();
    let (_, after) = after.split_once("]\n").unwrap();
    let members = COPIED.map(|name| format!("\"next/{name}\""));
    let after = after.replace("{ path = \"", "{ path = \"next/");
    let manifest = format!("{before}members = [{}]\n{after}", members.join(", "));
    write(&tree.join("Cargo.toml"), manifest.as_bytes());
    let path = crates.join("guest-manager/Cargo.toml");
    let manifest = fs::read_to_string(root.join("guest-manager/Cargo.toml")).unwrap();
    let renamed = manifest.replacen("name = \"guest-manager\"", "name = \"guest-manager-next\"", 1);
    write(&path, renamed.as_bytes());

    let cargo = |arguments: &[&str]| {
        let mut command = Command::new(option_env!("CARGO").unwrap_or("cargo"));
        command
            .args(arguments)
            .current_dir(&tree)
            .env("CARGO_TARGET_DIR", target);
        let done = command.env("SEPAL_REGENERATE", "1").output().unwrap();
        assert!(
            done.status.success(),
            "{arguments:?}\n{}",
            String::from_utf8_lossy(&done.stderr)
        );
    };
    cargo(&["test", "--offline", "-p", "sepal-schema", "--test", "generated"]);
    cargo(&[
        "build",
        "--offline",
        "-p",
        "sepal-guest-manager",
        "--bin",
        "guest-manager-next",
    ]);
    let built = target.join("debug/guest-manager-next");
    let generated = fs::read_to_string(crates.join("schema/src/generated/store_capnp.rs")).unwrap();
    assert!(generated.contains("added_by_the_next_version"));
    built
}

#[test]
fn guests_go_on_from_one_version_to_the_next_and_back() {
    if kvm_missing() {
        return;
    }
    let (old, new) = (program("guest-manager"), next_version());
    let mut scene = Scene::new();
    for config in [Scene::config("one"), Scene::config("two"), Scene::printing("printer")] {
        let name = config.name.clone();
        scene.launch(config);
        scene.until_running(&name);
    }
    let files = scene.world.slow_to_create();
    let (mut position, mut next) = (0, 0);
    for (round, version) in [&new, &old].into_iter().enumerate() {
        let text = scene.lines("printer", &mut position, 20);
        next = printer::check(&text, next);
        let (events, before) = (scene.events(), scene.info("one"));
        // One is being created.
        let slow = format!("slow{round}");
        let mut launched = scene.send_slow_launch(&slow, &files);
        sepal_tests::until("it is being created", || {
            assert!(
                scene.rpc.poll(&mut launched).is_none(),
                "it was created before it could be interrupted"
            );
            Some(()).filter(|()| scene.info(&slow).component_pid != 0)
        });
        scene.kill_manager();
        scene.start_version(version);

        assert_eq!(scene.events()[..events.len()], events[..]);
        let after = scene.info("one");
        assert_eq!(
            (after.component_pid, after.status),
            (before.component_pid, GuestStatus::Running)
        );
        let text = scene.lines("printer", &mut position, 20);
        next = printer::check(&text, next);
        let guest = scene.rpc.lookup("two").unwrap();
        assert!(scene.rpc.read_until(&guest, PROMPT).contains(PROMPT));
        scene.until_it_ran(&slow);
        // What it launches itself goes on, too.
        let own = format!("own{round}");
        scene.launch(Scene::config(&own));
        scene.until_running(&own);
    }
    scene.end();
}
