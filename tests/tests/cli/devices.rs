//! Devices on the command line: what is refused and why, and what can be seen and changed of a guest that has some.

use std::fs;

use sepal_tests::{Finished, World, kvm_missing};

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

#[test]
fn options_that_are_wrong_say_so() {
    let world = World::new();
    for (option, words) in [
        ("--disk=", &["a disk needs a file"][..]),
        ("--disk=a,read-only", &["'read-only' is not known here", "volatile"]),
        ("--disk=a,format=vmdk", &["vmdk", "qcow2"]),
        ("--net=wifi", &["'wifi' is no network", "user"]),
        ("--net=user,mac=12", &["'12' is no address"]),
        ("--vsock=many", &["'many' is no context id"]),
        ("--console=33", &["1 to 32 ports"]),
        ("--share=home", &["TAG=SOCKET"]),
        ("--vhost-user=toaster=/x", &["TYPE=SOCKET"]),
        ("--watchdog=bark", &["bark", "reset"]),
        ("--memory-device=much", &["much"]),
    ] {
        let finished = world.guest(&["launch", option]).expect_code(2);
        says(&finished, words);
    }
    world.end();
}

#[test]
fn devices_that_cannot_be_had_say_why() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let file = |name: &str, content: &[u8]| {
        let path = world.folder().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (raw, odd) = (file("raw", &[0; 4096]), file("odd", &[0; 100]));
    let qcow2 = file("qcow2", &[&b"QFI\xfb\0\0\0\x03"[..], &[0; 504]].concat());
    let many: Vec<String> = (0..33).map(|_| format!("--disk={raw},ro")).collect();
    let folder = world.folder().to_str().unwrap().to_owned();
    for (options, words) in [
        (
            vec!["--disk=/nonexistent/disk".to_owned()],
            &["/nonexistent/disk", "No such file"][..],
        ),
        (
            vec![format!("--disk={folder},ro")],
            &["BAD_CONFIG", "disks[0].image", "a directory"],
        ),
        (
            vec![format!("--disk={odd}")],
            &["BAD_CONFIG", "100 bytes", "block size"],
        ),
        (vec![format!("--disk={qcow2}")], &["BAD_CONFIG", "qcow2"]),
        (
            vec![format!("--disk={raw},format=qcow2")],
            &["BAD_CONFIG", "no qcow2 image"],
        ),
        (
            vec![format!("--disk={raw},id=twentyone-characters-")],
            &["BAD_CONFIG", "disks[0].id", "20"],
        ),
        (
            vec![format!("--disk={raw},ro,id=a"), format!("--disk={raw},ro,id=a")],
            &["BAD_CONFIG", "\"a\"", "disks[0]"],
        ),
        (many, &["BAD_CONFIG", "33", "32"]),
        (
            vec!["--net=user,mac=01:00:00:00:00:01".into()],
            &["BAD_CONFIG", "multicast"],
        ),
        (vec!["--vsock=2".into()], &["BAD_CONFIG", "vsock.cid"]),
        (
            vec!["--share=home=/nonexistent/fs.sock".into()],
            &["FAILED_SERVICE_CONNECT", "/nonexistent/fs.sock"],
        ),
        (
            vec!["--memory-device=3M".into()],
            &["BAD_CONFIG", "memoryDevice.regionSize"],
        ),
    ] {
        let arguments: Vec<&str> = ["launch"]
            .into_iter()
            .chain(options.iter().map(String::as_str))
            .collect();
        says(&world.guest(&arguments).expect_code(1), words);
    }
    world.end();
}

#[test]
fn a_guest_without_devices_has_none_to_show() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    for command in [
        &["balloon", "stats", "bee"][..],
        &["mem", "show", "bee"],
        &["disk", "list", "bee"],
        &["net", "list", "bee"],
        &["vsock", "connect", "bee", "1"],
        &["console", "bee"],
        &["exec", "bee", "true"],
    ] {
        says(
            &world.guest(command).expect_code(1),
            &["DEVICE_NOT_PRESENT", "left it out"],
        );
    }
    world.end();
}

#[test]
fn devices_can_be_seen_and_changed() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let image = world.folder().join("image");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let disk = format!("--disk={},volatile,id=root", image.display());
    let launch = [
        "launch",
        "bee",
        "--detach",
        &disk,
        "--rng",
        "--balloon",
        "--console=2",
        "--memory-device=64M",
    ];
    world.guest(&launch).expect_code(0);
    let devices = world.guest(&["info", "bee"]).expect_code(0);
    for name in ["disk0", "rng", "balloon", "console", "memory"] {
        assert!(devices.out().contains(name), "{name}: {}", devices.out());
    }
    let disks = world.guest(&["disk", "list", "bee", "--json"]).expect_code(0);
    for word in ["\"id\": \"root\"", "\"mode\": \"volatile\"", "\"bytes\": 8388608"] {
        assert!(disks.out().contains(word), "{word}: {}", disks.out());
    }
    world.guest(&["disk", "stats", "bee"]).expect_code(0);
    says(
        &world.guest(&["disk", "resize", "bee", "disk7", "16M"]).expect_code(1),
        &["NOT_FOUND", "disk7"],
    );
    // What is behind the new size would be lost.
    for disk in ["disk0", "root"] {
        let refused = world.guest(&["disk", "resize", "bee", disk, "4M"]).expect_code(1);
        says(&refused, &["BAD_CONFIG", disk, "8388608", "--shrink"]);
    }
    world.guest(&["balloon", "set", "bee", "16M"]).expect_code(0);
    let balloon = world.guest(&["balloon", "stats", "bee"]).expect_code(0);
    assert!(balloon.out().contains("16 MiB"), "{}", balloon.out());
    says(
        &world.guest(&["balloon", "set", "bee", "1T"]).expect_code(1),
        &["BAD_CONFIG", "pages"],
    );
    world.guest(&["mem", "request", "bee", "4M"]).expect_code(0);
    let memory = world.guest(&["mem", "show", "bee"]).expect_code(0);
    assert!(memory.out().contains("requested  4 MiB"), "{}", memory.out());
    says(
        &world.guest(&["mem", "request", "bee", "3M"]).expect_code(1),
        &["BAD_CONFIG", "multiple"],
    );
    // Nobody else may write to what this guest reads.
    let writer = format!("--disk={}", image.display());
    says(
        &world.guest(&["launch", &writer]).expect_code(1),
        &["ALREADY_RUNNING", "guest \"bee\""],
    );
    world.guest(&["stop", "--force", "bee"]).expect_code(0);
    world.end();
}
