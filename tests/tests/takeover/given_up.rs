//! Managers that give way or end, keepers that are killed, and those who would like to have what is not theirs.

use std::{
    io::Write,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    process::Command,
};

use rustix::{
    net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType},
    process::Signal,
};
use sepal_schema::{error::read_completion, info::GuestStatus};
use sepal_tests::{kvm_missing, process::Process, until};

use crate::scene::{PROMPT, Scene};

#[test]
fn a_manager_that_retires_leaves_what_goes_on() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let lease = scene.rpc.launch(Scene::config("kept"), false).unwrap();
    scene.launch(Scene::config("detached"));
    let mut config = Scene::config("goes");
    config.durable = false;
    scene.launch(config);
    let (kept, goes) = (scene.component("kept"), scene.component("goes"));
    let asked = scene.rpc.manager.retire_request().send().promise;
    let answer = scene.rpc.wait("retire", asked).unwrap();
    read_completion(answer.get().unwrap()).unwrap();
    scene.world.take_manager().wait().expect_code(0);
    drop(lease);
    assert!(!goes.exists() && kept.exists());

    scene.start_manager();
    let guests = scene.rpc.list();
    let names: Vec<_> = guests.iter().map(|info| (&info.name[..], info.status)).collect();
    assert_eq!(
        names,
        [
            ("detached", GuestStatus::Running),
            ("goes", GuestStatus::Stopped),
            ("kept", GuestStatus::Running)
        ]
    );
    // Who held the lease is waited for, as if the manager had been killed.
    assert!(scene.info("kept").upkeep.lease_ends_ms > 0);
    assert_eq!(scene.info("detached").upkeep.lease_ends_ms, 0);
    scene.end();
}

#[test]
fn a_manager_that_is_asked_to_end_by_a_signal_leaves_what_goes_on() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let component = scene.component("bee");
    let manager = scene.world.take_manager();
    manager.signal(Signal::TERM);
    manager.wait().expect_code(0);
    assert!(component.exists());
    scene.start_manager();
    assert_eq!(scene.info("bee").component_pid, component.pid);
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.read_until(&guest, PROMPT);
    scene.end();
}

#[test]
fn what_goes_on_ends_with_its_keeper() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let component = scene.component("bee");
    let keeper = Process::of(component.parent).unwrap();
    scene.kill_manager();
    keeper.signal(Signal::KILL);
    until("all of it is gone", || {
        (scene.world.is_gone(&component) && scene.world.is_gone(&keeper)).then_some(())
    });
    // What it would have removed is removed by the next manager.
    assert_eq!(scene.keepers_files().len(), 3);
    scene.start_manager();
    assert!(scene.rpc.list().is_empty());
    assert_eq!(scene.keepers_files(), Vec::<String>::new());
    scene.launch(Scene::config("bee"));
    scene.until_running("bee");
    scene.end();
}

#[test]
fn who_does_not_know_the_key_gets_nothing() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let component = scene.component("bee");
    let folder = scene.world.state().join("keepers");
    let path = |end: &str| {
        let names = scene.keepers_files();
        folder.join(names.iter().find(|name| name.ends_with(end)).unwrap())
    };
    let (socket, key) = (path(".sock"), path(".key"));
    for file in [&folder, &key] {
        let mode = std::fs::metadata(file).unwrap();
        assert_eq!(mode.permissions().mode() & 0o077, 0, "{}", file.display());
        assert_eq!(mode.uid(), rustix::process::geteuid().as_raw());
    }
    scene.kill_manager();
    // The right folder, the right user, another key.
    let kind = SocketType::SEQPACKET;
    let stranger = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&stranger, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    rustix::net::send(&stranger, &[0; 32], SendFlags::NOSIGNAL).unwrap();
    let heard = rustix::net::recv(&stranger, &mut [0; 64], RecvFlags::empty());
    assert_eq!(
        heard.map_or(0, |(_, count)| count),
        0,
        "the keeper hangs up and says nothing"
    );
    // Another user does not even come there.
    if rustix::process::geteuid().is_root() {
        let looked = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
            .arg(&key)
            .output()
            .unwrap();
        assert!(!looked.status.success() && looked.stdout.is_empty(), "{looked:?}");
    }
    scene.start_manager();
    assert_eq!(scene.info("bee").component_pid, component.pid);
    scene.end();
}

#[test]
fn what_is_no_keeper_is_in_nobodys_way() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    scene.kill_manager();
    let folder = scene.world.state().join("keepers");
    let write = |name: &str, mode: u32, bytes: &[u8]| {
        let mut file = std::fs::File::create(folder.join(name)).unwrap();
        file.write_all(bytes).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
    };
    // Nobody listens there any more; no socket at all; a key that others can read, one that is too short, none; and somebody who listens without one.
    drop(UnixListener::bind(folder.join("a.sock")).unwrap());
    write("a.key", 0o600, &[7; 32]);
    write("b.sock", 0o600, b"nothing");
    write("b.key", 0o600, &[7; 32]);
    write("c.sock", 0o600, b"nothing");
    write("c.key", 0o644, &[7; 32]);
    write("d.sock", 0o600, b"nothing");
    write("d.key", 0o600, &[7; 5]);
    write("e.sock", 0o600, b"nothing");
    let kind = SocketType::SEQPACKET;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(folder.join("f.sock")).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    scene.start_manager();
    assert_eq!(scene.info("bee").status, GuestStatus::Running);
    let log = scene.log();
    assert!(
        log.contains("reading its key: ") && log.contains("the keeper f is asked again"),
        "{log}"
    );
    // What nobody listens behind is gone, whatever its key.
    let left = std::fs::read_dir(&folder).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    let strange = |name: &&std::ffi::OsString| name.len() < 10;
    assert_eq!(left.iter().filter(strange).collect::<Vec<_>>(), ["f.sock"]);
    drop(listener);
    std::fs::remove_file(folder.join("f.sock")).unwrap();
    scene.end();
}

#[test]
fn what_cannot_go_on_is_refused() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let refused = scene
        .world
        .guest(&["launch", "bee", "--durable", "--detach", "--net", "user"])
        .expect_code(1);
    assert!(refused.stderr.contains("networks[0]"), "{}", refused.stderr);
    let lifecycle = scene.rpc.new_guest("driven").unwrap();
    let error = scene.rpc.create(&lifecycle, Scene::config("driven")).unwrap_err();
    assert_eq!(error.about, "durable", "{error:?}");
    drop(lifecycle);
    scene.end();
}
