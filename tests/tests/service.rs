//! The guest manager under a service manager: sockets that it is passed, what it tells, its log for the journal, and the units.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    fs,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            fs::DirBuilderExt,
            net::{UnixDatagram, UnixListener},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::process::Signal;
use sepal_tests::{PATIENCE, Running, World, kvm_missing, process::Process, program};

/// The number under which the first socket is passed (sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// Whoever looks for what a manager left finds what goes on without another's, too: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// What a service manager has: sockets, and where it is told things.
struct Service {
    world: World,
    socket: UnixListener,
    notices: UnixDatagram,
    _alone: MutexGuard<'static, ()>,
}

impl Service {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let world = World::new();
        let folder = world.folder().join("sepal");
        fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(world.state_home()).unwrap();
        let socket = UnixListener::bind(world.socket()).unwrap();
        let notices = UnixDatagram::bind(world.folder().join("notify")).unwrap();
        notices.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            world,
            socket,
            notices,
            _alone: alone,
        }
    }

    /// Starts a guest manager as a service; `before` is what a shell is to do first.
    fn start(&self, before: &str, arguments: &[&str]) -> Running {
        let mut command = Command::new("sh");
        let script = format!("LISTEN_PID=$$; export LISTEN_PID; {before} exec \"$0\" \"$@\"");
        command
            .arg("-c")
            .arg(script)
            .arg(program("guest-manager"))
            .args(arguments);
        command.arg("--state").arg(self.world.state());
        command.env("XDG_RUNTIME_DIR", self.world.folder());
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "manager");
        command.env("NOTIFY_SOCKET", self.world.folder().join("notify"));
        command.env_remove("RUST_LOG");
        let number = self.socket.as_raw_fd();
        let pass = move || {
            // SAFETY: system calls on numbers; the socket is open, and what the number of the copy may have stood for is needed no more.
            let passed = unsafe {
                match number == FIRST {
                    true => libc::fcntl(FIRST, libc::F_SETFD, 0),
                    false => libc::dup2(number, FIRST),
                }
            };
            if passed < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls only, which are async-signal-safe.
        unsafe { command.pre_exec(pass) };
        self.world.start_command(command, None)
    }

    /// The next thing that the service manager is told.
    fn notice(&self) -> String {
        let mut buffer = [0; 512];
        let length = self.notices.recv(&mut buffer).expect("a notice comes");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    fn until_ready(&self, manager: &Running) {
        let notice = self.notice();
        let expected = format!("READY=1\nMAINPID={}\n", manager.pid());
        assert!(notice.starts_with(&expected), "{notice}");
    }

    fn stop(&self, manager: Running) {
        manager.signal(Signal::TERM);
        let notice = self.notice();
        assert!(notice.starts_with("STOPPING=1\n"), "{notice}");
        manager.wait().expect_code(0);
    }

    fn end(self) {
        let Self {
            world, socket, _alone, ..
        } = self;
        drop(socket);
        fs::remove_file(world.socket()).unwrap();
        world.end();
    }
}

#[test]
fn a_service_manager_passes_the_socket_and_is_told_how_it_goes() {
    let service = Service::new();
    let manager = service.start("", &[]);
    service.until_ready(&manager);
    assert!(service.world.guest(&["list"]).expect_code(0).out().starts_with("NAME"));

    manager.signal(Signal::HUP);
    let notice = service.notice();
    assert!(notice.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{notice}");
    service.until_ready(&manager);

    service.stop(manager);
    assert!(service.world.socket().exists(), "the socket is the service manager's");
    // Whoever connects meanwhile is served by the next one.
    let early = service.world.start(&["whoami"]);
    let manager = service.start("", &[]);
    service.until_ready(&manager);
    early.wait().expect_code(0);
    service.stop(manager);
    service.end();
}

/// The component of a running guest.
fn component(world: &World, name: &str) -> Process {
    let info = world.guest(&["info", name, "--json"]).expect_code(0).out();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["status"], "running", "{info}");
    let pid = info["componentPid"].as_u64().unwrap();
    Process::of(pid.try_into().unwrap()).unwrap()
}

/// A keeper, which ends with this, and its components with it.
struct Keeper(Process);

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.0.exists() {
            self.0.signal(Signal::KILL);
        }
    }
}

#[test]
fn durable_guests_outlive_a_restart_of_the_service() {
    if kvm_missing() {
        return;
    }
    let service = Service::new();
    // A file: the keeper has it as well, and outlives the manager.
    let log = "exec 2>>\"$XDG_RUNTIME_DIR/log\";";
    let manager = service.start(log, &[]);
    service.until_ready(&manager);
    let launch = ["launch", "web", "--durable", "--balloon", "--detach"];
    service.world.guest(&launch).expect_code(0);
    let before = component(&service.world, "web");
    let _keeper = Keeper(Process::of(before.parent).unwrap());
    service.stop(manager);
    assert!(before.exists());
    let manager = service.start(log, &[]);
    service.until_ready(&manager);
    assert_eq!(component(&service.world, "web").pid, before.pid);
    service.world.guest(&["end-manager"]).expect_code(0);
    assert!(service.notice().starts_with("STOPPING=1\n"));
    manager.wait().expect_code(0);
    service.end();
}

#[test]
fn what_is_passed_for_others_is_not_taken() {
    let service = Service::new();
    let world = &service.world;
    let elsewhere = world.folder().join("elsewhere");
    let path = elsewhere.to_str().unwrap();
    let manager = service.start("LISTEN_PID=1;", &["--socket", path]);
    service.until_ready(&manager);
    world.guest(&["--manager", path, "whoami"]).expect_code(0);
    // Nobody takes what was passed to another process: who connects there waits.
    let waits = world.start(&["whoami"]);
    service.stop(manager);
    assert!(!elsewhere.exists());
    let manager = service.start("", &[]);
    service.until_ready(&manager);
    waits.wait().expect_code(0);
    service.stop(manager);
    service.end();
}

#[test]
fn a_socket_of_no_known_name_is_refused() {
    let service = Service::new();
    let manager = service.start("LISTEN_FDNAMES=ssh;", &[]);
    let ended = manager.wait().expect_code(1);
    assert!(
        ended
            .stderr
            .contains("\"ssh\", which names no socket of a guest manager"),
        "{}",
        ended.stderr
    );
    service.end();
}

#[test]
fn managers_that_commands_start_say_nothing_to_whoever_runs_the_command() {
    let Service {
        world,
        socket,
        notices,
        _alone,
    } = Service::new();
    // Nobody listens at the user's own place, so that one is started for the look.
    drop(socket);
    fs::remove_file(world.socket()).unwrap();
    let mut command = world.command(&["doctor"]);
    command.env("NOTIFY_SOCKET", world.folder().join("notify"));
    let looked = world.start_command(command, None).wait();
    assert!(looked.out().contains("jail"), "{}", looked.stderr);
    notices.set_nonblocking(true).unwrap();
    let nothing = notices.recv(&mut [0; 64]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
    world.end();
}

#[test]
fn the_log_is_fit_for_the_journal() {
    let service = Service::new();
    let journal = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/$$/fd/2); export JOURNAL_STREAM;";
    let manager = service.start(journal, &[]);
    service.until_ready(&manager);
    manager.stderr.expect("listening at");
    manager.signal(Signal::TERM);
    let log = manager.wait().expect_code(0).stderr;
    for line in log.lines() {
        let (priority, rest) = line.split_at(3);
        assert!(["<3>", "<4>", "<6>", "<7>"].contains(&priority), "{line}");
        let level = rest.trim_start().split(' ').next();
        assert!(
            matches!(level, Some("ERROR" | "WARN" | "INFO" | "DEBUG")),
            "no time: {line}"
        );
    }
    service.end();
}

/// The units, with a program in place of the manager's that is there.
fn units(folder: &str, to: &Path) -> Vec<PathBuf> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging/systemd")
        .join(folder);
    let names = ["sepal.service", "sepal.socket"];
    names
        .map(|name| {
            let text = fs::read_to_string(from.join(name)).unwrap();
            let path = to.join(name);
            fs::write(
                &path,
                text.replace("/usr/bin/guest-manager", program("guest-manager").to_str().unwrap()),
            )
            .unwrap();
            path
        })
        .into()
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    for (folder, whose) in [("", "--system"), ("user", "--user")] {
        let to = tempfile::tempdir().unwrap();
        let mut command = Command::new("systemd-analyze");
        command.args([whose, "verify"]).args(units(folder, to.path()));
        // Where there is no user manager to ask.
        command.env("XDG_RUNTIME_DIR", to.path());
        let Ok(output) = command.output() else {
            println!("skipped: no systemd-analyze");
            return;
        };
        let told = String::from_utf8_lossy(&output.stderr);
        let about_ours: Vec<_> = told.lines().filter(|line| line.contains("sepal.")).collect();
        assert!(output.status.success() && about_ours.is_empty(), "{whose}: {told}");
    }
}

#[test]
fn the_units_name_options_that_the_manager_has() {
    for folder in ["", "user"] {
        let to = tempfile::tempdir().unwrap();
        let service = fs::read_to_string(&units(folder, to.path())[0]).unwrap();
        let start = service
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart="))
            .unwrap();
        let mut words = start.split(' ');
        let mut command = Command::new(words.next().unwrap());
        // With --version, nothing is started; what is wrong is told all the same.
        let output = command.args(words).arg("--version").output().unwrap();
        assert!(
            output.status.success(),
            "{start}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
