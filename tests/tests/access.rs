//! Who may do what, with the programs as they are: users, groups, the read-only socket, the audit.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{
    fs,
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use rustix::{
    io::FdFlags,
    process::{Gid, Signal, Uid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use sepal_schema::{
    error::{Kind, read_completion},
    manager_capnp::Role,
    transport::Limits,
};
use sepal_tests::{Rpc, World, program, programs::is_root, until};

/// Says aloud that a test is skipped unless root runs it: it takes the ids of others.
fn not_root() -> bool {
    if !is_root() {
        let test = thread::current().name().unwrap_or("test").to_owned();
        let _ = io::Write::write_fmt(
            &mut io::stderr(),
            format_args!("{test} skipped: only root can be somebody else\n"),
        );
    }
    !is_root()
}

/// Connects as another user. The kernel notes the ids of the thread that connects, so that a thread of its own has them.
fn connect_as(path: &Path, uid: u32, gid: u32, groups: &[u32]) -> io::Result<UnixStream> {
    let groups: Vec<Gid> = groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
    let (uid, gid, path) = (Uid::from_raw(uid), Gid::from_raw(gid), path.to_owned());
    let connect = move || {
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        UnixStream::connect(path)
    };
    thread::spawn(connect).join().unwrap()
}

fn rpc_as(path: &Path, uid: u32, groups: &[u32]) -> Rpc {
    Rpc::over(connect_as(path, uid, uid, groups).unwrap(), Limits::default())
}

/// The socket that anybody may read by.
fn read_only(world: &World) -> PathBuf {
    world.folder().join("sepal/look.sock")
}

/// A manager in a folder that everyone can reach, with these arguments.
fn manager_with(world: &mut World, arguments: &[&str]) {
    let open = |folder: &Path| fs::set_permissions(folder, fs::Permissions::from_mode(0o711)).unwrap();
    open(world.folder());
    let folder = world.socket().parent().unwrap().to_owned();
    fs::create_dir(&folder).unwrap();
    open(&folder);
    world.start_manager_by(Command::new(program("guest-manager")), |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
        command.args(arguments);
    });
}

/// Uid, role, and whether it came by the read-only socket.
fn who_am_i(rpc: &mut Rpc) -> (u32, Role, bool) {
    let asked = rpc.manager.who_am_i_request().send().promise;
    let answer = rpc.wait("whoAmI", asked).unwrap();
    let who = answer.get().unwrap();
    (who.get_uid(), who.get_role().unwrap(), who.get_read_only())
}

fn force_shutdown(rpc: &mut Rpc, name: &str) -> Result<(), sepal_schema::error::Error> {
    let mut request = rpc.manager.force_shutdown_request();
    request.get().set_name(name);
    let asked = request.send().promise;
    read_completion(rpc.wait("forceShutdown", asked).unwrap().get().unwrap())
}

/// Whether the other end has closed the connection without a word.
fn is_refused(mut socket: UnixStream) -> bool {
    socket.set_read_timeout(Some(sepal_tests::PATIENCE)).unwrap();
    match socket.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

#[test]
fn roles_come_with_the_connection() {
    if not_root() {
        return;
    }
    let mut world = World::new();
    let allowed = ["--allow", "uid:1234=observe", "--allow", "gid:4321=operate"];
    manager_with(&mut world, &allowed);
    let socket = world.socket();
    assert_eq!(mode(&socket), 0o666);
    assert_eq!(mode(&socket.with_extension("sock.lock")), 0o600);

    assert_eq!(who_am_i(&mut world.connect()), (0, Role::Admin, false));
    let mut observer = rpc_as(&socket, 1234, &[1, 2]);
    assert_eq!(who_am_i(&mut observer), (1234, Role::Observe, false));
    assert!(observer.list().is_empty());
    let error = force_shutdown(&mut observer, "web").unwrap_err();
    assert_eq!(error.kind, Kind::PermissionDenied);
    assert!(error.message.contains("uid 1234"), "{error}");
    // By more groups than fit into the room that is there at first.
    let many: Vec<u32> = (5000..5100).chain([4321]).collect();
    assert_eq!(
        who_am_i(&mut rpc_as(&socket, 1234, &many)),
        (1234, Role::Operate, false)
    );
    let effective = connect_as(&socket, 77, 4321, &[]).unwrap();
    let mut effective = Rpc::over(effective, Limits::default());
    assert_eq!(who_am_i(&mut effective), (77, Role::Operate, false));
    assert_eq!(
        force_shutdown(&mut effective, "web").unwrap_err().kind,
        Kind::NotRunning
    );

    assert!(is_refused(connect_as(&socket, 77, 77, &[]).unwrap()));
    until("the refusal is logged", || {
        world
            .manager()
            .stderr
            .text()
            .contains("connection refused")
            .then_some(())
    });
    world.end();
}

#[test]
fn everyone_may_look_by_the_read_only_socket() {
    if not_root() {
        return;
    }
    let mut world = World::new();
    let path = read_only(&world);
    manager_with(&mut world, &["--read-only-socket", path.to_str().unwrap()]);
    assert_eq!((mode(&world.socket()), mode(&path)), (0o600, 0o666));
    let error = connect_as(&world.socket(), 1234, 1234, &[]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);

    let mut stranger = rpc_as(&path, 1234, &[]);
    assert_eq!(who_am_i(&mut stranger), (1234, Role::Observe, true));
    assert!(stranger.list().is_empty());
    let mut root = Rpc::connect(&path);
    assert_eq!(who_am_i(&mut root), (0, Role::Observe, true));
    let error = force_shutdown(&mut root, "web").unwrap_err();
    assert_eq!(error.kind, Kind::PermissionDenied);
    assert!(error.message.contains("read-only socket"), "{error}");
    assert_eq!(
        force_shutdown(&mut world.connect(), "web").unwrap_err().kind,
        Kind::NotRunning
    );
    world.end();
}

#[test]
fn one_user_does_not_take_all_connections() {
    if not_root() {
        return;
    }
    let mut world = World::new();
    let path = read_only(&world);
    manager_with(&mut world, &["--read-only-socket", path.to_str().unwrap()]);
    let mut taken: Vec<Rpc> = (0..128).map(|_| rpc_as(&path, 1234, &[])).collect();
    for rpc in &mut taken {
        who_am_i(rpc);
    }
    assert!(is_refused(connect_as(&path, 1234, 1234, &[]).unwrap()));
    assert_eq!(who_am_i(&mut rpc_as(&path, 1235, &[])).0, 1235);
    assert_eq!(who_am_i(&mut world.connect()).0, 0);
    drop(taken);
    until("there is room again", || {
        (!is_refused_now(connect_as(&path, 1234, 1234, &[]).unwrap())).then_some(())
    });
    world.end();
}

/// As [`is_refused`], for somebody who may be served: the manager says nothing first, so that it is asked.
fn is_refused_now(socket: UnixStream) -> bool {
    let mut rpc = Rpc::over(socket, Limits::default());
    let asked = rpc.manager.who_am_i_request().send().promise;
    rpc.wait("whoAmI or a refusal", asked).is_err()
}

#[test]
fn the_audit_survives_its_rotation() {
    let mut world = World::new();
    let path = world.folder().join("audit");
    manager_with(&mut world, &["--audit", path.to_str().unwrap()]);
    let lines = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let line = |path: &Path, name: &str| {
        until("it is noted", || {
            lines(path).lines().find(|line| line.contains(name)).map(str::to_owned)
        })
    };
    let mut rpc = world.connect();
    force_shutdown(&mut rpc, "first").unwrap_err();
    let first: serde_json::Value = serde_json::from_str(&line(&path, "first")).unwrap();
    assert_eq!(first["deed"], "GuestManager.forceShutdown");
    assert_eq!(
        (&first["guest"], &first["outcome"]["kind"]),
        (&"first".into(), &"NOT_RUNNING".into())
    );
    assert_eq!(first["uid"], rustix::process::geteuid().as_raw());
    assert_eq!(first["pid"], std::process::id());
    assert_eq!(mode(&path), 0o600);

    let old = world.folder().join("audit.1");
    fs::rename(&path, &old).unwrap();
    world.manager().signal(Signal::HUP);
    until("the new file is there", || path.exists().then_some(()));
    force_shutdown(&mut rpc, "second").unwrap_err();
    line(&path, "second");
    assert!(!lines(&old).contains("second") && !lines(&path).contains("first"));
    world.end();
}

#[test]
fn an_audit_that_nobody_reads_holds_nobody_up() {
    // A pipe that nobody reads takes no more after a while, as a disk that hangs does. The log goes there, and the audit to the log.
    let mut world = World::new();
    let (mut reader, writer) = io::pipe().unwrap();
    rustix::io::fcntl_setfd(&writer, FdFlags::empty()).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec "$@" 2>"/proc/self/fd/$0""#]);
    command.arg(writer.as_raw_fd().to_string());
    command.arg(program("guest-manager"));
    world.start_manager_by(command, |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
    });
    drop(writer);
    let mut rpc = world.connect();
    // Each is a line of more than 100 bytes; a pipe holds 64 KiB, and 4096 lines wait.
    for _ in 0..6000 {
        force_shutdown(&mut rpc, "missing").unwrap_err();
    }
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains("lines of the log are lost") {
        let count = reader.read(&mut buffer).unwrap();
        text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    assert!(
        text.contains("deed=\"GuestManager.forceShutdown\" guest=\"missing\""),
        "{text}"
    );
    drop((rpc, reader));
    world.end();
}

#[test]
fn what_cannot_be_is_refused_at_the_start() {
    let world = World::new();
    let path = |name: &str| world.folder().join(name).to_str().unwrap().to_owned();
    fs::write(path("precious"), "").unwrap();
    std::os::unix::fs::symlink("precious", path("link")).unwrap();
    let (socket, link) = (path("m.sock"), path("link"));
    let refused = [
        (vec!["--allow", "uid:1234=observe"], 1, "--socket"),
        (vec!["--socket", &socket, "--allow", "uid:1234=king"], 2, "no role"),
        (vec!["--socket", &socket, "--allow", "1234"], 2, "SUBJECT=ROLE"),
        (
            vec!["--socket", &socket, "--allow", "user:no-such-user=observe"],
            2,
            "no-such-user",
        ),
        (vec!["--socket", &socket, "--audit", &link], 1, "--audit"),
    ];
    for (arguments, code, said) in refused {
        let mut command = Command::new(program("guest-manager"));
        command.args(&arguments);
        let finished = world.start_command(command, None).wait().expect_code(code);
        assert!(finished.stderr.contains(said), "{arguments:?}: {}", finished.stderr);
    }
    assert_eq!(fs::read(path("precious")).unwrap(), b"");
    world.assert_nothing_left();
}

#[test]
fn whoever_listens_for_others_in_a_closed_folder_is_told() {
    let mut world = World::new();
    world.start_manager_by(Command::new(program("guest-manager")), |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
        command.args(["--allow", "everyone=none"]);
    });
    until("it is logged", || {
        let log = world.manager().stderr.text();
        (log.contains("not everyone can reach") && log.contains("has the mode 700")).then_some(())
    });
    world.end();
}
