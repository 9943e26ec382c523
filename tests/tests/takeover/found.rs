//! What the next manager knows, counts and answers from its first moment on.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
};

use rustix::process::Signal;
use sepal_schema::{
    config::{
        self, OnReset,
        device::{Disk, DiskFormat, DiskMode, Vsock},
    },
    device_capnp::disk_controller::{self, list_result},
    error::{Error, Outcome},
    guest_capnp::guest,
    info::GuestStatus,
};
use sepal_tests::{kvm_missing, program, until};
use serde_json::Value;

use crate::scene::{PROMPT, Scene};

/// A disk of this image, which is made.
fn disk(scene: &Scene, mode: DiskMode) -> Disk {
    let path = scene.world.folder().join("image");
    let image = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let image = image.unwrap();
    image.set_len(1 << 20).unwrap();
    let mut disk = Disk::new(config::File::Fd(image.into()), mode);
    disk.format = DiskFormat::Raw;
    disk
}

/// The manager with further options, as a program.
fn manager_with(scene: &Scene, options: &str) -> PathBuf {
    let script = scene.world.folder().join("manager");
    let manager = program("guest-manager");
    fs::write(
        &script,
        format!("#!/bin/sh\nexec {} {options} \"$@\"\n", manager.display()),
    )
    .unwrap();
    fs::set_permissions(&script, Permissions::from_mode(0o700)).unwrap();
    script
}

/// How many disks a guest's component tells of.
#[track_caller]
fn disks(scene: &mut Scene, guest: &guest::Client) -> u32 {
    let asked = guest.disk_controller_request().send().promise;
    let answer = scene.rpc.wait("the disks", asked).unwrap();
    let controller = answer.get().unwrap().outcome().unwrap().get_controller();
    let controller: disk_controller::Client = controller.unwrap();
    let answer = scene.rpc.wait("the disks", controller.list_request().send().promise);
    match answer.unwrap().get().unwrap().which().unwrap() {
        list_result::Disks(disks) => disks.unwrap().len(),
        list_result::Error(error) => panic!("{:?}", Error::read(error.unwrap())),
    }
}

#[test]
fn a_guest_answers_as_soon_as_the_next_manager_does() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let mut config = Scene::config("bee");
    // Files are looked at again apart from all else.
    config.disks = vec![disk(&scene, DiskMode::ReadWrite)];
    let path = scene.world.folder().join("vsock");
    config.vsock = Some(Vsock {
        socket_path: path.display().to_string(),
        ..Vsock::default()
    });
    scene.launch(config);
    for _ in 0..3 {
        scene.replace_manager();
        let guest = scene.rpc.lookup("bee").unwrap();
        assert_eq!(disks(&mut scene, &guest), 1);
    }
    // A component that stands still meanwhile has not heard of the end of one manager when the next one comes.
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.read_until(&guest, PROMPT);
    let component = scene.component("bee");
    component.signal(Signal::STOP);
    scene.replace_manager();
    component.signal(Signal::CONT);
    let guest = scene.rpc.lookup("bee").unwrap();
    assert_eq!(disks(&mut scene, &guest), 1);
    // Managers that are killed may not have said so.
    until("it is taken over", || {
        let log = scene.log();
        let last = log.rsplit("listening at").next().unwrap();
        last.contains("taken over guest").then_some(())
    });
    assert!(!scene.log().contains("not as it was"), "{}", scene.log());
    scene.end();
}

#[test]
fn what_is_not_as_it_should_be_is_told_by_the_next_manager() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let manager = manager_with(&scene, "--scratch /nonexistent");
    scene.kill_manager();
    scene.start_version(&manager);
    let mut config = Scene::config("bee");
    config.disks = vec![disk(&scene, DiskMode::VolatileWrite)];
    scene.launch(config);
    let before = scene.until_running("bee").problems;
    assert!(before[0].contains("disks[0] is kept in memory"), "{before:?}");
    for _ in 0..2 {
        scene.replace_manager();
        assert_eq!(scene.info("bee").problems, before);
    }
    scene.end();
}

#[test]
fn a_guest_that_waits_before_its_first_instruction_goes_on_waiting() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let mut config = Scene::config("bee");
    config.cmdline = "run=reset".into();
    config.on_reset = OnReset::Pause;
    scene.launch(config);
    let held = |scene: &mut Scene, generation| {
        scene.until("bee", "it waits", |info| info.paused && info.generation == generation)
    };
    held(&mut scene, 2);
    let events = scene.events();
    scene.replace_manager();
    let info = scene.info("bee");
    assert_eq!(
        (info.paused, info.generation, info.status),
        (true, 2, GuestStatus::Starting)
    );
    assert_eq!(scene.events(), events, "nothing has happened to it");
    // It begins, resets itself, and waits once more.
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.set_paused(&guest, false).unwrap();
    held(&mut scene, 3);
    scene.replace_manager();
    held(&mut scene, 3);
    scene.end();
}

#[test]
fn guests_that_were_taken_over_count_and_keep_their_names() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    for name in ["one", "two"] {
        scene.launch(Scene::config(name));
    }
    let uuid = scene.info("one").upkeep.uuid.unwrap().to_string();
    let audit = scene.world.folder().join("audit");
    let token = scene.world.guest(&["share", "one", "power", "--only", "pause"]);
    let token = token.expect_code(0).out().trim().to_owned();
    scene.kill_manager();
    let options = format!("--max-guests 3 --max-memory 100M --audit {}", audit.display());
    let manager = manager_with(&scene, &options);
    scene.start_version(&manager);

    let refused = |options: &[&str], words: &[&str]| {
        let launch = [&["launch", "--detach"], options].concat();
        let finished = scene.world.guest(&launch).expect_code(1);
        for word in words {
            assert!(finished.stderr.contains(word), "{word:?} is not in {}", finished.stderr);
        }
    };
    refused(&["one", "--memory=32M"], &["ALREADY_RUNNING", "\"one\" is running"]);
    refused(&["other", "--memory=32M", "--uuid", &uuid], &["ALREADY_BOUND", "one"]);
    refused(&["other", "--memory=64M"], &["NO_RESOURCES", "64 MiB", "100 MiB"]);
    scene
        .world
        .guest(&["launch", "three", "--detach", "--memory=16M"])
        .expect_code(0);
    refused(&["four", "--memory=16M"], &["NO_RESOURCES", "3"]);

    // What was shared is as narrow as before, and what is done with it is noted under its number.
    let redeem = |action: &str| scene.world.guest(&["redeem", &token, action]);
    redeem("pause").expect_code(0);
    assert!(redeem("kill").expect_code(1).stderr.contains("PERMISSION_DENIED"));
    let metrics = scene.world.guest(&["metrics"]).expect_code(0).out();
    assert!(
        ["one", "three"]
            .iter()
            .all(|name| metrics.contains(&format!("\"{name}\""))),
        "{metrics}"
    );
    let noted = fs::read_to_string(&audit).unwrap();
    let lines: Vec<Value> = noted.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let paused = lines.iter().find(|line| line["deed"] == "Power.pause").unwrap();
    assert_eq!(
        (&paused["share"], &paused["outcome"]),
        (&Value::from(1), &Value::from("ok")),
        "{noted}"
    );
    scene.world.guest(&["stop", "one", "--force"]).expect_code(0);
    scene
        .world
        .guest(&["launch", "four", "--detach", "--memory=16M"])
        .expect_code(0);
    scene.end();
}
