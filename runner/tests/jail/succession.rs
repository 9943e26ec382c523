//! The keeper without its manager: what stays, who may take it over, and who may not.

use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};
use sepal_runner::cgroup::Limits;
use sepal_runner::keeper::{Inherited, InheritedState, KEY_BYTES, KeeperClient, KeeperError, KeeperEvent, Key, OWN};
use sepal_runner::outer::ExitStatus;

use crate::harness::{Test, is_root};
use crate::keeper::{KEEPER, Kept, assert_gone, groups_of, limited, next, start, start_limited, wait_for};

pub(crate) fn tests() -> Vec<Test> {
    let tests: [(&str, fn()); 14] = [
        (
            "what_is_durable_stays_and_is_taken_over",
            what_is_durable_stays_and_is_taken_over,
        ),
        ("one_manager_after_the_other", one_manager_after_the_other),
        ("ends_without_anything_durable", ends_without_anything_durable),
        ("a_wrong_key_gets_nothing", a_wrong_key_gets_nothing),
        ("another_user_gets_nothing", another_user_gets_nothing),
        ("the_key_goes_to_nobody_else", the_key_goes_to_nobody_else),
        ("whoever_says_nothing_is_sent_away", whoever_says_nothing_is_sent_away),
        ("who_says_nothing_keeps_nobody_out", who_says_nothing_keeps_nobody_out),
        (
            "one_that_stands_still_hands_over_when_it_goes_on",
            one_that_stands_still_hands_over_when_it_goes_on,
        ),
        (
            "a_manager_that_lives_is_not_displaced",
            a_manager_that_lives_is_not_displaced,
        ),
        ("how_it_ended_meanwhile_is_told", how_it_ended_meanwhile_is_told),
        (
            "killing_the_orphaned_keeper_leaves_nothing",
            killing_the_orphaned_keeper_leaves_nothing,
        ),
        ("what_cannot_be_done_is_refused", what_cannot_be_done_is_refused),
        ("limits_change_while_it_runs", limits_change_while_it_runs),
    ];
    tests
        .into_iter()
        .map(|(name, test)| (format!("succession::{name}"), test))
        .collect()
}

const KEY: Key = [7; KEY_BYTES];
const LONG: Duration = Duration::from_secs(600);

/// A folder with a way in to a keeper.
struct House {
    folder: tempfile::TempDir,
    socket: PathBuf,
}

fn listener(path: &Path) -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 8).unwrap();
    socket
}

/// A keeper that may be taken over, and the way in.
fn keeper(linger: Duration) -> (KeeperClient, House) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("keeper.sock");
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    keeper.offer_succession(listener(&socket), &KEY, linger).unwrap();
    keeper.remove_with_keeper(&socket).unwrap();
    (keeper, House { folder, socket })
}

impl House {
    fn succeed(&self) -> (KeeperClient, Vec<Inherited>) {
        KeeperClient::succeed(&self.socket, &KEY, LONG).unwrap()
    }

    fn connect(&self) -> OwnedFd {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.socket).unwrap()).unwrap();
        socket
    }
}

fn note(text: &str) -> OwnedFd {
    let mut file = File::from(rustix::fs::memfd_create(c"note", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(text.as_bytes()).unwrap();
    file.into()
}

fn read(fds: &[OwnedFd]) -> Vec<String> {
    let text = |fd: &OwnedFd| {
        let (mut file, mut text) = (File::from(fd.try_clone().unwrap()), String::new());
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    };
    fds.iter().map(text).collect()
}

fn watch(keeper: &KeeperClient) -> OwnedFd {
    let pid = Pid::from_raw(keeper.pid().cast_signed()).unwrap();
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap()
}

fn is_over(fd: impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)).unwrap() > 0
}

fn pid_of(inherited: &Inherited) -> u32 {
    match inherited.state {
        InheritedState::Running { pid, .. } => pid,
        ref other => panic!("{other:?}"),
    }
}

fn exited(keeper: &mut KeeperClient) -> (u64, ExitStatus) {
    match next(keeper) {
        KeeperEvent::Exited { id, status } => (id, status),
        other => panic!("{other:?}"),
    }
}

/// Waits for the keeper's end.
fn gone(keeper: &mut KeeperClient) {
    loop {
        match keeper.try_recv() {
            Ok(Some(event)) => panic!("{event:?}"),
            Ok(None) => wait_for(keeper.as_fd()),
            Err(KeeperError::Gone(_)) => return,
            Err(error) => panic!("{error}"),
        }
    }
}

fn what_is_durable_stays_and_is_taken_over() {
    let (mut keeper, house) = keeper(LONG);
    let managers = house.folder.path().join("manager.sock");
    fs::write(&managers, "").unwrap();
    keeper.remove_at_end(&managers).unwrap();
    // Said before the component is started, as a manager does.
    keeper
        .keep_descriptors(1, "record", vec![note("first"), note("second")])
        .unwrap();
    keeper.keep_descriptors(1, "gone", vec![note("x")]).unwrap();
    keeper.set_durable(1, true).unwrap();
    let (mut stays, goes) = (start(&mut keeper, 1), start(&mut keeper, 2));
    keeper
        .keep_descriptors(2, "record", vec![note("of the other")])
        .unwrap();
    keeper.keep_descriptors(OWN, "journal", vec![note("mine")]).unwrap();
    keeper.drop_descriptors(1, "gone").unwrap();
    let (process, groups) = (watch(&keeper), groups_of(stays.pid));
    keeper.leave(LONG).unwrap();

    assert_gone(&goes.pidfd);
    let (mut keeper, inherited) = house.succeed();
    assert!(!managers.exists() && house.socket.exists());
    assert!(!is_over(&stays.pidfd));
    let [own, guest] = &inherited[..] else {
        panic!("{inherited:?}")
    };
    assert_eq!((own.id, guest.id, own.durable, guest.durable), (OWN, 1, false, true));
    assert!(matches!(own.state, InheritedState::None));
    assert_eq!(read(&own.kept["journal"]), ["mine"]);
    assert_eq!(guest.kept.keys().collect::<Vec<_>>(), ["record"]);
    assert_eq!(read(&guest.kept["record"]), ["first", "second"]);
    assert_eq!(pid_of(guest), stays.pid);
    assert!(matches!(guest.state, InheritedState::Running { host_uid, .. } if host_uid.is_some() == is_root()));

    // It is this one's now, until there is nothing left.
    stays.control.get_mut().write_all(b"x").unwrap();
    assert_eq!(exited(&mut keeper), (1, ExitStatus::Code(0)));
    assert!(!is_over(&process), "what is known of it has not been released");
    keeper.release(1).unwrap();
    gone(&mut keeper);
    wait_for(&process);
    assert!(!house.socket.exists());
    assert!(groups.iter().all(|group| !group.exists()));
}

fn one_manager_after_the_other() {
    let (mut keeper, house) = keeper(LONG);
    keeper.set_durable(3, true).unwrap();
    let kept = start(&mut keeper, 3);
    let process = watch(&keeper);
    // As a killed one ends: without a word.
    drop(keeper);
    for round in 0..5 {
        let (mut keeper, inherited) = house.succeed();
        assert_eq!(pid_of(&inherited[0]), kept.pid);
        let before: Vec<_> = inherited[0].kept.keys().cloned().collect();
        assert_eq!(
            before,
            (0..round).map(|round| format!("round{round}")).collect::<Vec<_>>()
        );
        keeper
            .keep_descriptors(3, &format!("round{round}"), vec![note("x")])
            .unwrap();
        drop(keeper);
    }
    let (keeper, _) = house.succeed();
    keeper.close().unwrap();
    assert_gone(&kept.pidfd);
    wait_for(&process);
    assert!(!house.socket.exists());
}

fn ends_without_anything_durable() {
    // Nothing was said to be durable; or it was, but nobody can come.
    for offered in [true, false] {
        let (mut keeper, house) = match offered {
            true => {
                let (keeper, house) = keeper(LONG);
                (keeper, Some(house))
            }
            false => (KeeperClient::start(KEEPER).unwrap(), None),
        };
        keeper.keep_descriptors(OWN, "journal", vec![note("mine")]).unwrap();
        keeper.set_durable(1, !offered).unwrap();
        let kept = start(&mut keeper, 1);
        let process = watch(&keeper);
        drop(keeper);
        assert_gone(&kept.pidfd);
        wait_for(&process);
        assert!(house.is_none_or(|house| !house.socket.exists()));
    }
}

/// A keeper that has lost its manager, and its component.
fn orphaned() -> (House, Kept, OwnedFd) {
    let (mut keeper, house) = keeper(LONG);
    keeper.set_durable(1, true).unwrap();
    let kept = start(&mut keeper, 1);
    let process = watch(&keeper);
    drop(keeper);
    (house, kept, process)
}

/// Ends what a test leaves.
fn end(house: &House) {
    house.succeed().0.close().unwrap();
}

fn a_wrong_key_gets_nothing() {
    let (house, kept, _) = orphaned();
    let mut wrong = KEY;
    wrong[KEY_BYTES - 1] ^= 1;
    match KeeperClient::succeed(&house.socket, &wrong, LONG) {
        Err(KeeperError::Refused { path }) => assert_eq!(path, house.socket),
        other => panic!("{other:?}"),
    }
    // Nor what is no key at all: each is hung up on, without a word.
    for said in [&b"x"[..], &[0; 36], &[0; 4096], br#"{"release":{"id":1}}"#] {
        let socket = house.connect();
        rustix::net::send(&socket, said, SendFlags::NOSIGNAL).unwrap();
        let mut answer = [0; 16];
        let answered = rustix::net::recv(&socket, &mut answer, RecvFlags::empty());
        assert!(
            matches!(answered, Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET)),
            "{answered:?}"
        );
    }
    let (keeper, inherited) = house.succeed();
    assert_eq!(pid_of(&inherited[0]), kept.pid);
    keeper.close().unwrap();
}

/// Runs as another user, who may do nothing but be; none where there is no other.
fn as_another<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    if !is_root() {
        println!("as root this is tried by another user");
        return None;
    }
    let other = thread::spawn(|| {
        // SAFETY: the raw call, with plain numbers, changes the uid of this thread alone, which ends soon.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_533, 65_533, 65_533) }, 0);
        act()
    });
    Some(other.join().unwrap())
}

fn another_user_gets_nothing() {
    let (house, kept, _) = orphaned();
    // Whatever the folder may let through.
    for path in [house.folder.path(), &house.socket] {
        fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    }
    let socket = house.socket.clone();
    // The key is right.
    if let Some(taken) = as_another(move || {
        let connected =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::connect(&connected, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        let proof = [&1_u32.to_le_bytes()[..], &KEY].concat();
        let _ = rustix::net::send(&connected, &proof, SendFlags::NOSIGNAL);
        rustix::net::recv(&connected, &mut [0; 16], RecvFlags::empty()).map(|(_, length)| length)
    }) {
        assert!(matches!(taken, Ok(0) | Err(rustix::io::Errno::CONNRESET)), "{taken:?}");
    }
    assert!(!is_over(&kept.pidfd));
    end(&house);
}

fn the_key_goes_to_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let socket = folder.path().join("keeper.sock");
    let path = socket.clone();
    if let Some(fake) = as_another(move || listener(&path)) {
        match KeeperClient::succeed(&socket, &KEY, LONG) {
            Err(KeeperError::Foreign { path, uid: 65_533 }) => assert_eq!(path, socket),
            other => panic!("{other:?}"),
        }
        let came = rustix::net::accept(&fake).unwrap();
        let said = rustix::net::recv(&came, &mut [0; 64], RecvFlags::empty()).unwrap();
        assert_eq!(said.1, 0, "something was said");
        fs::remove_file(&socket).unwrap();
    }
    // And one that nobody listens at is told from one that refuses.
    drop(listener(&socket));
    for stale in [socket, folder.path().join("nothing")] {
        match KeeperClient::succeed(&stale, &KEY, LONG) {
            Err(KeeperError::Ended { path, .. }) => assert_eq!(path, stale),
            other => panic!("{other:?}"),
        }
    }
}

fn whoever_says_nothing_is_sent_away() {
    let (house, kept, _) = orphaned();
    let silent = house.connect();
    let (keeper, inherited) = house.succeed();
    assert_eq!(pid_of(&inherited[0]), kept.pid);
    assert_eq!(
        rustix::net::recv(&silent, &mut [0; 16], RecvFlags::empty()).unwrap().1,
        0
    );
    keeper.close().unwrap();
}

fn who_says_nothing_keeps_nobody_out() {
    let (house, kept, _) = orphaned();
    // One after the other, each would be let think for 5 s.
    let silent: Vec<OwnedFd> = (0..40).map(|_| house.connect()).collect();
    let (keeper, inherited) = KeeperClient::succeed(&house.socket, &KEY, Duration::from_secs(30)).unwrap();
    assert_eq!(pid_of(&inherited[0]), kept.pid);
    for silent in silent {
        assert_eq!(
            rustix::net::recv(&silent, &mut [0; 16], RecvFlags::empty()).unwrap().1,
            0
        );
    }
    keeper.close().unwrap();
}

fn one_that_stands_still_hands_over_when_it_goes_on() {
    let (house, kept, process) = orphaned();
    let signal = |signal| rustix::process::pidfd_send_signal(&process, signal).unwrap();
    signal(Signal::STOP);
    let mut first = KeeperClient::ask(&house.socket, &KEY).unwrap();
    // Who says nothing waits there, too, until there is no more room.
    let mut others = Vec::new();
    let crowded = loop {
        assert!(others.len() < 100);
        match KeeperClient::ask(&house.socket, &[0; KEY_BYTES]) {
            Ok(asked) => others.push(asked),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(&crowded, KeeperError::Crowded { path } if *path == house.socket),
        "{crowded}"
    );
    assert!(first.try_take().unwrap().is_none());
    signal(Signal::CONT);
    let (keeper, inherited) = loop {
        match first.try_take().unwrap() {
            Some(taken) => break taken,
            None => wait_for(first.watched().unwrap()),
        }
    };
    assert_eq!(pid_of(&inherited[0]), kept.pid);
    keeper.close().unwrap();
    for other in &mut others {
        wait_for(other.watched().unwrap());
        assert!(other.try_take().is_err());
    }
}

fn a_manager_that_lives_is_not_displaced() {
    let (mut first, house) = keeper(LONG);
    first.set_durable(1, true).unwrap();
    let kept = start(&mut first, 1);
    let waits = house.connect();
    let proof = [&1_u32.to_le_bytes()[..], &KEY].concat();
    rustix::net::send(&waits, &proof, SendFlags::NOSIGNAL).unwrap();
    // The keeper goes on doing what the first one asks for.
    for _ in 0..3 {
        let mut other = start(&mut first, 2);
        other.control.get_mut().write_all(b"x").unwrap();
        assert_eq!(exited(&mut first).0, 2);
    }
    assert!(!is_over(&waits), "it was told something");
    first.leave(LONG).unwrap();
    wait_for(&waits);
    let mut greeting = vec![0; 4096];
    let (greeting, _) = rustix::net::recv(&waits, &mut greeting[..], RecvFlags::empty())
        .map(|(_, length)| (String::from_utf8_lossy(&greeting[..length]).into_owned(), length))
        .unwrap();
    assert!(greeting.contains("hello") && greeting.contains("version"), "{greeting}");
    // That one goes, too.
    drop(waits);
    assert!(!is_over(&kept.pidfd));
    end(&house);
}

fn how_it_ended_meanwhile_is_told() {
    for linger in [LONG, Duration::ZERO] {
        let (mut keeper, house) = keeper(linger);
        keeper.set_durable(1, true).unwrap();
        keeper.keep_descriptors(1, "record", vec![note("x")]).unwrap();
        let kept = start(&mut keeper, 1);
        let process = watch(&keeper);
        drop(keeper);
        rustix::process::pidfd_send_signal(&kept.pidfd, Signal::KILL).unwrap();
        if linger.is_zero() {
            // Nobody is expected any more.
            wait_for(&process);
            assert!(!house.socket.exists());
            continue;
        }
        // Its parent has to have seen it: then it is no process any more.
        while Path::new(&format!("/proc/{}", kept.pid)).exists() {
            thread::yield_now();
        }
        let (mut keeper, inherited) = house.succeed();
        assert!(matches!(
            inherited[0].state,
            InheritedState::Exited(ExitStatus::Signal(9))
        ));
        assert_eq!(read(&inherited[0].kept["record"]), ["x"]);
        keeper.release(1).unwrap();
        gone(&mut keeper);
    }
}

fn killing_the_orphaned_keeper_leaves_nothing() {
    let (house, kept, process) = orphaned();
    rustix::process::pidfd_send_signal(&process, Signal::KILL).unwrap();
    assert_gone(&kept.pidfd);
    wait_for(&process);
    assert!(matches!(
        KeeperClient::succeed(&house.socket, &KEY, LONG),
        Err(KeeperError::Ended { .. })
    ));
    let _ = sepal_runner::cgroup::Groups::new().unwrap().sweep();
}

fn what_cannot_be_done_is_refused() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    keeper.offer_succession(note("no socket"), &KEY, LONG).unwrap();
    match next(&mut keeper) {
        KeeperEvent::Refused { request, reason } => {
            assert_eq!(request, "succession");
            assert!(reason.contains("SOCK_SEQPACKET"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let many = (0..65).map(|_| note("x")).collect();
    assert!(matches!(
        keeper.keep_descriptors(1, "many", many),
        Err(KeeperError::Protocol(_))
    ));
    let long = "x".repeat(65);
    assert!(matches!(
        keeper.keep_descriptors(1, &long, Vec::new()),
        Err(KeeperError::Protocol(_))
    ));
    keeper.spawn(OWN, crate::harness::spec(&["wait"]).0).unwrap();
    assert!(matches!(next(&mut keeper), KeeperEvent::Failed { id: OWN, .. }));
    keeper.close().unwrap();
}

/// What a file of one of the component's groups says.
fn says(groups: &[PathBuf], files: [&str; 2]) -> String {
    let mut found = groups.iter().flat_map(|group| files.map(|file| group.join(file)));
    let file = found
        .find(|file| file.exists())
        .unwrap_or_else(|| panic!("{files:?} in {groups:?}"));
    fs::read_to_string(file).unwrap().trim().to_owned()
}

fn limits_set(keeper: &mut KeeperClient) -> (u64, Option<String>) {
    match next(keeper) {
        KeeperEvent::LimitsSet { id, error } => (id, error),
        other => panic!("{other:?}"),
    }
}

fn limits_change_while_it_runs() {
    let mut keeper = KeeperClient::start(KEEPER).unwrap();
    let kept = start_limited(&mut keeper, 1, Limits::default());
    let wrong = Limits {
        cpu_weight: Some(0),
        ..Limits::default()
    };
    keeper.set_limits(1, wrong).unwrap();
    let (_, error) = limits_set(&mut keeper);
    assert!(error.unwrap().contains("has to be 1 to 10000"));
    keeper.set_limits(2, Limits::default()).unwrap();
    assert_eq!(limits_set(&mut keeper), (2, Some("the component has ended".to_owned())));
    if limited() {
        let weight = |weight| Limits {
            cpu_weight: Some(weight),
            cpu_millis: Some(500),
            ..Limits::default()
        };
        for (limits, shares) in [(weight(200), ["200", "2048"]), (weight(50), ["50", "512"])] {
            keeper.set_limits(1, limits).unwrap();
            assert_eq!(limits_set(&mut keeper), (1, None));
            let groups = groups_of(kept.pid);
            assert!(shares.contains(&&*says(&groups, ["cpu.weight", "cpu.shares"])));
            assert!(["50000 100000", "50000"].contains(&&*says(&groups, ["cpu.max", "cpu.cfs_quota_us"])));
        }
        // One more, without those before.
        let limits = Limits {
            pids: Some(99),
            ..Limits::default()
        };
        keeper.set_limits(1, limits).unwrap();
        assert_eq!(limits_set(&mut keeper), (1, None));
        let groups = groups_of(kept.pid);
        assert_eq!(says(&groups, ["pids.max"; 2]), "99");
        assert!(["100", "1024"].contains(&&*says(&groups, ["cpu.weight", "cpu.shares"])));
        assert!(["max 100000", "-1"].contains(&&*says(&groups, ["cpu.max", "cpu.cfs_quota_us"])));
        keeper.kill(1).unwrap();
        exited(&mut keeper);
        assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
    }
    keeper.close().unwrap();
}
