//! What stands still, says nothing or is full when one manager follows another: none of it costs a guest.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{ErrorKind, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
};

use rustix::{
    fs::OFlags,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    process::Signal,
};
use sepal_schema::{config::GuestConfig, error::Kind, info::GuestStatus, report::Reason};
use sepal_tests::{
    kvm_missing,
    process::{self, Process},
    until,
};

use crate::{
    printer,
    scene::{PROMPT, Scene},
};

/// The keeper of a guest's component.
fn keeper_of(component: &Process) -> Process {
    Process::of(component.parent).unwrap()
}

/// A guest of a manager that was killed, whose keeper stands still; and the next manager.
fn with_a_still_keeper(config: GuestConfig) -> (Scene, Process, Process) {
    let mut scene = Scene::new();
    let name = config.name.clone();
    scene.launch(config);
    scene.until_running(&name);
    let component = scene.component(&name);
    let keeper = keeper_of(&component);
    keeper.signal(Signal::STOP);
    scene.kill_manager();
    scene.start_manager();
    (scene, component, keeper)
}

#[test]
fn a_keeper_that_stands_still_keeps_its_guests() {
    if kvm_missing() {
        return;
    }
    let (mut scene, component, keeper) = with_a_still_keeper(Scene::printing("bee"));
    let uuid = scene.info("bee").upkeep.uuid;
    // Its name is its own, and it is told why nothing can be done with it.
    let info = scene.info("bee");
    assert_eq!(
        (info.status, info.generation, info.component_pid),
        (GuestStatus::Starting, 1, 0)
    );
    assert!(
        info.problems.iter().any(|problem| problem.contains("does not answer")),
        "{info:?}"
    );
    assert!(scene.log().contains("does not answer"), "{}", scene.log());
    assert_eq!(
        scene.rpc.launch(Scene::config("bee"), true).map(drop).unwrap_err().kind,
        Kind::AlreadyRunning
    );
    let error = scene.rpc.lookup("bee").map(drop).unwrap_err();
    assert!(error.message.contains("does not answer"), "{error:?}");
    let refused = GuestConfig {
        uuid,
        ..Scene::config("ant")
    };
    assert_eq!(
        scene.rpc.launch(refused, true).map(drop).unwrap_err().kind,
        Kind::AlreadyBound
    );
    // The manager serves others meanwhile.
    scene.launch(Scene::config("cat"));
    scene.until_running("cat");

    keeper.signal(Signal::CONT);
    let info = scene.until("bee", "it is taken over", |info| info.component_pid != 0);
    assert_eq!(
        (info.component_pid, info.generation, info.upkeep.uuid),
        (component.pid, 1, uuid)
    );
    assert!(
        info.problems.iter().all(|problem| !problem.contains("does not answer")),
        "{info:?}"
    );
    let text = scene.lines("bee", &mut 0, 20);
    printer::check(&text, 0);
    // It has cleaned up behind the manager that it was started by, and left the next one's files alone.
    let socket = scene.world.socket();
    assert!(socket.exists() && socket.with_extension("sock.lock").exists());
    // It is this manager's now, and the next one's.
    scene.replace_manager();
    for name in ["bee", "cat"] {
        assert_eq!(scene.info(name).status, GuestStatus::Running);
    }
    assert_eq!(scene.info("bee").component_pid, component.pid);
    scene.end();
}

#[test]
fn a_keeper_whose_key_cannot_be_used_keeps_its_guests_until_it_can() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    scene.until_running("bee");
    let component = scene.component("bee");
    let (folder, files) = (scene.world.state().join("keepers"), scene.keepers_files());
    // As a backup may have restored them.
    let set_mode = |mode| {
        for name in files.iter().filter(|name| !name.ends_with(".sock")) {
            fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
        }
    };
    scene.kill_manager();
    set_mode(0o644);
    scene.start_manager();
    let info = scene.info("bee");
    assert_eq!((info.status, info.component_pid), (GuestStatus::Starting, 0));
    let log = scene.log();
    assert!(
        log.contains("reading its key: ") && log.contains(".key: others may have"),
        "{log}"
    );
    assert!(
        info.problems
            .iter()
            .any(|problem| problem.contains("its key cannot be used"))
    );
    assert_eq!(
        scene.rpc.launch(Scene::config("bee"), true).map(drop).unwrap_err().kind,
        Kind::AlreadyRunning
    );
    set_mode(0o600);
    let info = scene.until("bee", "it is taken over", |info| info.component_pid != 0);
    assert_eq!((info.component_pid, info.generation), (component.pid, 1));
    scene.end();
}

#[test]
fn a_keeper_that_ends_instead_of_answering_has_its_guests_told_as_dead() {
    if kvm_missing() {
        return;
    }
    let (mut scene, component, keeper) = with_a_still_keeper(Scene::config("bee"));
    keeper.signal(Signal::KILL);
    let info = scene.until("bee", "it is told", |info| info.stop.is_some());
    assert_eq!(info.status, GuestStatus::VmmUnexpectedTermination);
    assert!(info.stop.unwrap().detail.contains("keeper"));
    until("it is gone", || scene.world.is_gone(&component).then_some(()));
    scene.launch(Scene::config("bee"));
    assert_eq!(scene.until_running("bee").generation, 2);
    scene.end();
}

#[test]
fn whoever_waits_and_says_nothing_keeps_no_manager_out() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let component = scene.component("bee");
    let name = scene
        .keepers_files()
        .into_iter()
        .find(|name| name.ends_with(".sock"))
        .unwrap();
    let address = SocketAddrUnix::new(scene.world.state().join("keepers").join(name)).unwrap();
    let silent = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::connect(&socket, &address).map(|()| socket)
    };
    // As many as there is room for, while the keeper has a manager.
    let crowd: Vec<OwnedFd> = std::iter::from_fn(|| silent().ok()).collect();
    assert!(crowd.len() >= 9, "{}", crowd.len());
    scene.replace_manager();
    let info = scene.until("bee", "it is taken over", |info| info.component_pid != 0);
    assert_eq!((info.component_pid, info.status), (component.pid, GuestStatus::Running));
    assert!(!scene.log().contains("does not answer"), "{}", scene.log());
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.read_until(&guest, PROMPT);
    scene.end();
}

#[test]
fn a_log_that_nobody_reads_holds_nothing_up() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let mut config = Scene::config("bee");
    config.cmdline = "quiet run=\"sleep 1500ms; crash\"".into();
    scene.launch(config);
    let component = scene.component("bee");
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let log = OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(format!("/proc/{}/fd/2", component.pid));
    let mut log = match log {
        Ok(log) => log,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            println!("skipped: to fill a component's log takes CAP_SYS_PTRACE");
            return scene.end();
        }
        Err(error) => panic!("{error}"),
    };
    // It reads no more, so that the log is full from here on.
    scene.world.manager().signal(Signal::STOP);
    while log.write(b"x").is_ok() {}
    scene.kill_manager();
    // What the component says about the end of a vCPU finds no room, and the machine goes all the same.
    until("the machine is gone", || {
        let threads = process::try_status(component.pid, "Threads");
        threads.is_none_or(|threads| threads == "1").then_some(())
    });
    drop(log);
    scene.start_manager();
    let info = scene.until("bee", "its end is known", |info| info.stop.is_some());
    assert!(info.stop.unwrap().reason == Reason::Crash);
    scene.end();
}
