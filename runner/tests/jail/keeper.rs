//! The keeper: what it reports, and that nothing is left whoever is killed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use sepal_runner::Layer;
use sepal_runner::cgroup::{Groups, Limits};
use sepal_runner::keeper::{KeeperClient, KeeperError, KeeperEvent};
use sepal_runner::outer::{ExitStatus, Program};

use crate::harness::{Test, is_root, spec};

/// Set for the process that plays the manager: a directory for its socket.
pub(crate) const MANAGER: &str = "SEPAL_TEST_MANAGER";

pub(crate) const KEEPER: &str = env!("CARGO_BIN_EXE_sepal-keeper");

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("keeper::starts_and_reports".into(), starts_and_reports),
        ("keeper::failures_are_answers".into(), failures_are_answers),
        (
            "keeper::a_killed_component_is_reported".into(),
            a_killed_component_is_reported,
        ),
        ("keeper::many_at_once".into(), many_at_once),
        ("keeper::closing_ends_everything".into(), closing_ends_everything),
        (
            "keeper::one_that_stands_still_is_not_waited_for".into(),
            one_that_stands_still_is_not_waited_for,
        ),
        (
            "keeper::files_that_were_replaced_stay".into(),
            files_that_were_replaced_stay,
        ),
        (
            "keeper::files_whose_lock_another_has_stay".into(),
            files_whose_lock_another_has_stay,
        ),
        (
            "keeper::components_are_not_spared_where_memory_runs_out".into(),
            components_are_not_spared_where_memory_runs_out,
        ),
        (
            "keeper::signals_of_a_terminal_do_not_end_it".into(),
            signals_of_a_terminal_do_not_end_it,
        ),
        (
            "keeper::killing_the_keeper_leaves_nothing".into(),
            killing_the_keeper_leaves_nothing,
        ),
        (
            "keeper::killing_it_at_any_moment_leaves_nothing".into(),
            killing_it_at_any_moment_leaves_nothing,
        ),
        (
            "keeper::killing_the_manager_leaves_nothing".into(),
            killing_the_manager_leaves_nothing,
        ),
        ("keeper::is_not_for_hands".into(), is_not_for_hands),
    ]
}

pub(crate) fn wait_for(fd: impl AsFd) {
    let mut poll = [PollFd::new(&fd, PollFlags::IN)];
    while rustix::event::poll(&mut poll, None) == Err(rustix::io::Errno::INTR) {}
}

pub(crate) fn next(keeper: &mut KeeperClient) -> KeeperEvent {
    loop {
        if let Some(event) = keeper.try_recv().unwrap() {
            return event;
        }
        wait_for(keeper.as_fd());
    }
}

/// A component under a keeper.
pub(crate) struct Kept {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) control: BufReader<UnixStream>,
}

pub(crate) fn limited() -> bool {
    is_root() && Path::new("/sys/fs/cgroup").exists()
}

pub(crate) fn start(keeper: &mut KeeperClient, id: u64) -> Kept {
    let limits = Limits {
        pids: limited().then_some(16),
        ..Limits::default()
    };
    start_limited(keeper, id, limits)
}

pub(crate) fn start_limited(keeper: &mut KeeperClient, id: u64, limits: Limits) -> Kept {
    let (mut spec, control) = spec(&["wait"]);
    spec.jail.limits = limits;
    keeper.spawn(id, spec).unwrap();
    match next(keeper) {
        KeeperEvent::Started {
            id: started,
            pid,
            pidfd,
            host_uid,
        } => {
            assert_eq!(started, id);
            assert_eq!(host_uid.is_some(), is_root());
            let mut kept = Kept {
                pid,
                pidfd,
                control: BufReader::new(control),
            };
            let mut report = String::new();
            kept.control.read_line(&mut report).unwrap();
            assert!(report.starts_with('['), "{report}");
            kept
        }
        other => panic!("{other:?}"),
    }
}

/// The groups of a component; empty if it has none.
pub(crate) fn groups_of(pid: u32) -> Vec<PathBuf> {
    let mut groups = Vec::new();
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    for line in own.lines().filter(|line| line.contains("/sepal/")) {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap(), fields.next().unwrap());
        for mount in ["/sys/fs/cgroup".into(), format!("/sys/fs/cgroup/{controllers}")] {
            let group = PathBuf::from(format!("{mount}{path}"));
            groups.extend(group.exists().then_some(group));
        }
    }
    assert_eq!(groups.is_empty(), !limited(), "{own}");
    groups
}

pub(crate) fn assert_gone(pidfd: &OwnedFd) {
    wait_for(pidfd);
    let dead = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    assert!(matches!(dead, Ok(()) | Err(rustix::io::Errno::SRCH)), "{dead:?}");
}

fn starts_and_reports() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let mut kept = start(&mut keeper, 7);
    assert_eq!(
        fs::read_to_string(format!("/proc/{}/comm", keeper.pid())).unwrap(),
        "sepal-keeper\n"
    );
    let groups = groups_of(kept.pid);
    kept.control.get_mut().write_all(b"x").unwrap();
    match next(&mut keeper) {
        KeeperEvent::Exited { id: 7, status } => assert!(status.success()),
        other => panic!("{other:?}"),
    }
    assert_gone(&kept.pidfd);
    for group in groups {
        assert!(!group.exists(), "{group:?}");
    }
    keeper.close().unwrap();
}

fn failures_are_answers() {
    match KeeperClient::start("/nonexistent/sepal-keeper") {
        Err(error @ KeeperError::Binary { .. }) => {
            assert!(
                error
                    .to_string()
                    .starts_with("keeper binary /nonexistent/sepal-keeper: No such file"),
                "{error}"
            );
        }
        other => panic!("{other:?}"),
    }
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let plain = directory.path().join("plain");
    fs::write(&plain, "").unwrap();
    let (mut bad, _control) = spec(&[]);
    bad.program = Program::open(&plain).unwrap();
    keeper.spawn(1, bad).unwrap();
    match next(&mut keeper) {
        KeeperEvent::Failed {
            id: 1,
            layer: None,
            message,
        } => {
            assert!(
                message.contains("plain") && message.contains("Permission denied"),
                "{message}"
            );
        }
        other => panic!("{other:?}"),
    }
    let (mut bad, _control) = spec(&[]);
    bad.jail.limits.pids = Some(0);
    keeper.spawn(1, bad).unwrap();
    match next(&mut keeper) {
        KeeperEvent::Failed {
            id: 1,
            layer: Some(Layer::Cgroup),
            message,
        } => {
            assert_eq!(
                message,
                "limit cannot be enforced: the pids limit is 0, but has to be 1 to 4194304"
            );
        }
        other => panic!("{other:?}"),
    }
    // It goes on after failures, and an id serves once at a time.
    let _kept = start(&mut keeper, 1);
    keeper.spawn(1, spec(&[]).0).unwrap();
    match next(&mut keeper) {
        KeeperEvent::Failed { id: 1, message, .. } => assert_eq!(message, "a component with the id 1 exists"),
        other => panic!("{other:?}"),
    }
    // Nothing to kill.
    keeper.kill(99).unwrap();
    keeper.close().unwrap();
}

fn a_killed_component_is_reported() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    for by_keeper in [true, false] {
        let kept = start(&mut keeper, 1);
        let groups = groups_of(kept.pid);
        if by_keeper {
            keeper.kill(1).unwrap();
        } else {
            rustix::process::pidfd_send_signal(&kept.pidfd, Signal::KILL).unwrap();
        }
        match next(&mut keeper) {
            KeeperEvent::Exited { id: 1, status } => assert_eq!(status, ExitStatus::Signal(libc::SIGKILL)),
            other => panic!("{other:?}"),
        }
        assert!(!Path::new(&format!("/proc/{}", kept.pid)).exists());
        for group in groups {
            assert!(!group.exists(), "{group:?}");
        }
    }
    keeper.close().unwrap();
}

fn many_at_once() {
    const COUNT: u64 = 24;
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let controls: Vec<UnixStream> = (1..=COUNT)
        .map(|id| {
            let (spec, control) = spec(&["wait"]);
            keeper.spawn(id, spec).unwrap();
            control
        })
        .collect();
    let mut uids = Vec::new();
    let mut started = 0;
    while started < COUNT {
        if let KeeperEvent::Started { host_uid, .. } = next(&mut keeper) {
            uids.extend(host_uid);
            started += 1;
        }
    }
    uids.sort_unstable();
    uids.dedup();
    assert_eq!(uids.len() as u64, if is_root() { COUNT } else { 0 });
    drop(controls);
    let mut ended = 0;
    while ended < COUNT {
        if let KeeperEvent::Exited { status, .. } = next(&mut keeper) {
            assert!(status.success(), "{status:?}");
            ended += 1;
        }
    }
    keeper.close().unwrap();
}

fn one_that_stands_still_is_not_waited_for() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let pid = Pid::from_raw(keeper.pid().cast_signed()).unwrap();
    let watched = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let kept = start(&mut keeper, 1);
    assert!(!keeper.has_unheard());
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::Pid(pid), stopped).unwrap();
    keeper.kill(1).unwrap();
    assert!(keeper.has_unheard());
    let closed = keeper.close_within(std::time::Duration::from_millis(1));
    let error = closed.unwrap_err().to_string();
    assert!(error.contains(&pid.as_raw_pid().to_string()), "{error}");
    // It does what it was told, and ends, as soon as it can.
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    assert_gone(&kept.pidfd);
    wait_for(&watched);
}

fn closing_ends_everything() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, kept_file) = (directory.path().join("socket"), directory.path().join("kept"));
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::write(&kept_file, "").unwrap();
    keeper.remove_at_end(&socket).unwrap();
    keeper.remove_at_end(&kept_file).unwrap();
    keeper.keep(&kept_file).unwrap();
    let kept = start(&mut keeper, 1);
    let groups = groups_of(kept.pid);
    keeper.close().unwrap();
    assert_gone(&kept.pidfd);
    assert!(!socket.exists() && kept_file.exists());
    for group in groups {
        assert!(!group.parent().unwrap().exists(), "{group:?}");
    }
}

fn files_that_were_replaced_stay() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, other) = (directory.path().join("socket"), directory.path().join("other"));
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    fs::write(&socket, "one manager's").unwrap();
    keeper.remove_at_end(&socket).unwrap();
    fs::write(&other, "the next one's").unwrap();
    fs::rename(&other, &socket).unwrap();
    keeper.close().unwrap();
    assert_eq!(fs::read_to_string(&socket).unwrap(), "the next one's");
}

fn files_whose_lock_another_has_stay() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, lock) = (directory.path().join("socket"), directory.path().join("lock"));
    for file in [&socket, &lock] {
        fs::write(file, "").unwrap();
    }
    let next = fs::File::open(&lock).unwrap();
    rustix::fs::flock(&next, FlockOperation::LockExclusive).unwrap();
    let keeper_ends = || {
        let mut keeper = KeeperClient::start(KEEPER).unwrap();
        keeper.remove_unless_locked(&socket, &lock).unwrap();
        keeper.remove_unless_locked(&lock, &lock).unwrap();
        keeper.close().unwrap();
        (socket.exists(), lock.exists())
    };
    assert_eq!(keeper_ends(), (true, true), "the next manager's");
    drop(next);
    assert_eq!(keeper_ends(), (false, false), "nobody's");
}

fn components_are_not_spared_where_memory_runs_out() {
    let score = |pid: u32| format!("/proc/{pid}/oom_score_adj");
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    if fs::write(score(keeper.pid()), "-100").is_err() {
        println!("skipped: to spare a process takes CAP_SYS_RESOURCE");
        return;
    }
    let kept = start(&mut keeper, 1);
    // The keeper answers to this when it has done with the start.
    let other = start(&mut keeper, 2);
    assert_eq!(fs::read_to_string(score(kept.pid)).unwrap().trim(), "0");
    drop(other);
    keeper.close().unwrap();
}

fn signals_of_a_terminal_do_not_end_it() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    // It answers once, so it has taken charge of its signals.
    let kept = start(&mut keeper, 1);
    let pid = Pid::from_raw(keeper.pid().cast_signed()).unwrap();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        rustix::process::kill_process(pid, signal).unwrap();
    }
    // A session of its own. Not `rustix`'s getsid, which cannot say 0: the answer where a session's leader is outside this PID namespace.
    // SAFETY: the call takes numbers only.
    let session = |pid: i32| unsafe { libc::getsid(pid) };
    assert_eq!(session(pid.as_raw_pid()), pid.as_raw_pid());
    assert_ne!(session(0), pid.as_raw_pid());
    keeper.kill(1).unwrap();
    assert!(matches!(next(&mut keeper), KeeperEvent::Exited { id: 1, .. }));
    assert_gone(&kept.pidfd);
    keeper.close().unwrap();
}

fn killing_the_keeper_leaves_nothing() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let kept = start(&mut keeper, 1);
    let groups = groups_of(kept.pid);
    rustix::process::kill_process(Pid::from_raw(keeper.pid().cast_signed()).unwrap(), Signal::KILL).unwrap();
    assert_gone(&kept.pidfd);
    wait_for(keeper.as_fd());
    let error = loop {
        match keeper.try_recv() {
            Ok(_) => wait_for(keeper.as_fd()),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, KeeperError::Gone(_)), "{error}");
    assert!(keeper.close().is_err());
    // Empty groups are all that a killed keeper leaves; the next one to start sweeps them. Another test's keeper may
    // have done so already.
    let _ = Groups::new().unwrap().sweep();
    for group in groups {
        assert!(!group.exists(), "{group:?}");
    }
}

fn killing_it_at_any_moment_leaves_nothing() {
    use std::io::Read;
    for moment in 0..40 {
        let mut keeper = KeeperClient::start(KEEPER).unwrap();
        drop(start(&mut keeper, 2));
        assert!(matches!(next(&mut keeper), KeeperEvent::Exited { .. }));
        let (spec, mut control) = spec(&["wait"]);
        keeper.spawn(1, spec).unwrap();
        // From before the clone to after the seal; what has to hold is the same at each.
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_micros(100 * moment) {
            std::hint::spin_loop();
        }
        rustix::process::kill_process(Pid::from_raw(keeper.pid().cast_signed()).unwrap(), Signal::KILL).unwrap();
        // Ends when the last copy of the component's socket is gone: with the component, which waits for this end.
        let mut said = String::new();
        let _ = control.read_to_string(&mut said);
        assert!(!said.contains("unsealed") || said.contains("is gone"), "{said}");
        assert!(keeper.close().is_err());
    }
    let _ = Groups::new().unwrap().sweep();
}

/// A manager in a process of its own, for [`killing_the_manager_leaves_nothing`].
pub(crate) fn manager() -> ! {
    let directory = PathBuf::from(std::env::var_os(MANAGER).unwrap());
    let socket = directory.join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    keeper.remove_at_end(&socket).unwrap();
    let kept = start(&mut keeper, 1);
    println!("{} {}", keeper.pid(), kept.pid);
    // Until it is killed.
    loop {
        std::thread::park();
    }
}

fn killing_the_manager_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut manager = Command::new(std::env::current_exe().unwrap())
        .env(MANAGER, directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(manager.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let pids: Vec<u32> = line.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    let [keeper, component] = pids[..] else {
        panic!("{line:?}")
    };
    let groups = groups_of(component);
    let open =
        |pid: u32| rustix::process::pidfd_open(Pid::from_raw(pid.cast_signed()).unwrap(), PidfdFlags::empty()).unwrap();
    let (keeper, component) = (open(keeper), open(component));
    assert!(directory.path().join("socket").exists());
    manager.kill().unwrap();
    manager.wait().unwrap();
    wait_for(&component);
    wait_for(&keeper);
    assert!(!directory.path().join("socket").exists());
    for group in groups {
        assert!(!group.exists(), "{group:?}");
    }
}

fn is_not_for_hands() {
    let output = Command::new(KEEPER).stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("the guest manager starts the keeper"), "{message}");
}
