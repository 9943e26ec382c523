//! Configuration files: guests that are made from them, and what is said of those that are wrong.

use std::{fs, path::Path};

use sepal_tests::{Finished, World, kvm_missing};
use serde_json::Value;

/// Writes a configuration, and an image beside it; the path of the first.
fn configuration(world: &World, text: &str) -> String {
    let folder = world.folder().join("guests");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("root.img"), vec![0; 1 << 20]).unwrap();
    let path = folder.join("bee.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn says(finished: &Finished, path: &str, words: &[&str]) {
    assert_eq!(finished.out(), "");
    let said = finished.stderr.replace(path, "bee.toml");
    for words in words {
        assert!(said.contains(words), "{words:?} in {said}");
    }
}

const BEE: &str = r#"
name = "bee"
memory = "64M"
cpus = 2
cmdline = "quiet"
uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8"
watchdog = "stop"
console = { ports = 2 }
balloon = true

[[disk]]
file = "root.img"
mode = "ro"
id = "root"
bps = "10M"

[limits]
tasks = 100
"#;

#[test]
fn a_guest_is_made_from_a_file_that_options_are_added_to() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let file = configuration(&world, BEE);
    let fit = world.guest(&["launch", "--check", "-f", &file]).expect_code(0);
    assert_eq!((&fit.out()[..], &fit.stderr[..]), ("", ""));
    let image = Path::new(&file).with_file_name("root.img");
    let another = format!("{},ro,id=more", image.display());
    let options = [
        "--memory=128M",
        "--cmdline-add=one=1",
        "--no-balloon",
        "--disk",
        &another,
        "--detach",
    ];
    let launch: Vec<&str> = ["launch", "-f", &file].into_iter().chain(options).collect();
    assert_eq!(world.guest(&launch).expect_code(0).out().trim(), "bee");
    let info: Value = serde_json::from_str(&world.guest(&["info", "bee", "--json"]).expect_code(0).out()).unwrap();
    assert_eq!((&info["cpus"], &info["memoryMib"]), (&2.into(), &128.into()));
    assert!(info["cmdline"].as_str().unwrap().ends_with("quiet one=1"), "{info}");
    let devices = info["devices"].as_array().unwrap();
    for (device, there) in [
        ("disk0", true),
        ("disk1", true),
        ("console", true),
        ("watchdog", true),
        ("balloon", false),
    ] {
        assert_eq!(devices.contains(&device.into()), there, "{device} in {info}");
    }
    // From standard input, names begin in the folder where the command runs, and another name makes another guest.
    let mut command = world.command(&["launch", "ant", "--detach", "-f", "-"]);
    command.current_dir(Path::new(&file).parent().unwrap());
    let mut launching = world.start_command(command, None);
    launching.type_in(&BEE.replace("67e55044", "00000001"));
    launching.close_input();
    assert_eq!(launching.wait().expect_code(0).out().trim(), "ant");
    world.end();
}

#[test]
fn what_is_wrong_in_a_file_is_shown_where_it_is() {
    let world = World::new();
    let wrong = "name = \"bee\"\nmamory = \"64M\"\n\n[[disk]]\nfile = 7\n";
    let file = configuration(&world, wrong);
    for command in ["launch", "define"] {
        let finished = world.guest(&[command, "-f", &file]).expect_code(1);
        let shown = "guest: bee.toml:2:1: 'mamory' is not known here; did you mean 'memory'?\n  |\n2 | mamory = \"64M\"\n  | ^^^^^^\n\
                     bee.toml:5:8: 'file' needs a string, and this is a number\n  |\n5 | file = 7\n  |        ^\n";
        says(&finished, &file, &[shown]);
    }
    let file = configuration(&world, "name = \"bee\"\nmemory = 64M\n");
    says(
        &world.guest(&["launch", "-f", &file]).expect_code(1),
        &file,
        &["bee.toml:2:", "2 | memory = 64M\n"],
    );
    let file = configuration(&world, "[[disk]]\nfile = \"nothing.img\"\n");
    let finished = world.guest(&["launch", "-f", &file]).expect_code(1);
    says(
        &finished,
        &file,
        &[
            "bee.toml:2:8: opening the disk",
            "nothing.img",
            "No such file",
            "2 | file = ",
        ],
    );
    fs::write(&file, [0xff]).unwrap();
    says(
        &world.guest(&["launch", "-f", &file]).expect_code(1),
        &file,
        &["bee.toml:1:", "UTF-8"],
    );
    fs::remove_file(&file).unwrap();
    says(
        &world.guest(&["launch", "-f", &file]).expect_code(1),
        &file,
        &["reading the configuration", "No such file"],
    );
    says(
        &world.guest(&["launch", "-f", "/dev/zero"]).expect_code(1),
        &file,
        &["more than", "no configuration"],
    );
    world.assert_nothing_left();
}

#[test]
fn what_only_the_guest_manager_finds_is_shown_there_too() {
    let world = World::with_manager();
    for (text, words) in [
        ("name = \"b b\"", "BAD_CONFIG: bee.toml:1:8: the name"),
        (
            "cpus = 4\n\n[limits]\ntasks = 1",
            "BAD_CONFIG: bee.toml:4:9: limits.tasks is 1",
        ),
        (
            "[[disk]]\nfile = \"root.img\"\nid = \"a\"\n[[disk]]\nfile = \"root.img\"\nid = \"a\"",
            "BAD_CONFIG: bee.toml:6:6: disks[1] has the id",
        ),
        (
            "[[disk]]\nfile = \"root.img\"\nburst-bytes = \"1M\"",
            "BAD_CONFIG: bee.toml:3:15: disks[0].rateLimit.burstBytes",
        ),
        (
            "[[pin]]\nvcpu = 3\ncpus = \"0\"",
            "BAD_CONFIG: bee.toml:2:8: pins[0].vcpu is 3",
        ),
        (
            "[restart]\npolicy = \"always\"\ndelay = \"2s\"\nmax-delay = \"1s\"",
            "BAD_CONFIG: bee.toml:4:13: restart.maxDelayMs",
        ),
        ("waive-layers = [\"seccomp\", \"chastity\"]", "BAD_CONFIG: bee.toml:1:"),
        (
            "on-panic = \"stop\"\npanic-device = false",
            "BAD_CONFIG: bee.toml:1:12:",
        ),
        (
            "[[share]]\ntag = \"home\"\nsocket = \"fs.sock\"",
            "FAILED_SERVICE_CONNECT: bee.toml:3:10:",
        ),
    ] {
        let file = configuration(&world, text);
        let finished = world.guest(&["launch", "--check", "-f", &file]).expect_code(1);
        says(&finished, &file, &[words]);
        assert!(finished.stderr.contains("^"), "{}", finished.stderr);
    }
    // What an option says is no fault of the file's.
    let file = configuration(&world, "name = \"bee\"\n");
    let finished = world.guest(&["launch", "b b", "--check", "-f", &file]).expect_code(1);
    assert!(finished.stderr.contains("BAD_CONFIG: the name"), "{}", finished.stderr);
    world.end();
}
