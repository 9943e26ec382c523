//! The jail of a guest that runs: what `info` says about it, and what the host's kernel says.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::Command,
};

use rustix::process::Signal;
use sepal_tests::{
    World, kvm_missing,
    process::{self, status},
    program,
    programs::{PROGRAMS, is_root},
};
use serde_json::Value;

/// Each layer's namespace, as `/proc/PID/ns` calls it.
const NAMESPACES: [(&str, &str); 7] = [
    ("user-namespace", "user"),
    ("pid-namespace", "pid"),
    ("root", "mnt"),
    ("network-namespace", "net"),
    ("ipc-namespace", "ipc"),
    ("uts-namespace", "uts"),
    ("cgroup-namespace", "cgroup"),
];
/// The layers that every start has, whoever the manager's user is.
const OTHERS: [&str; 6] = [
    "rlimits",
    "no-new-privs",
    "landlock",
    "capabilities",
    "not-dumpable",
    "seccomp",
];

/// A guest that runs, as `info` describes it.
struct Guest {
    info: Value,
    pid: u32,
}

impl Guest {
    /// Launches a guest with these arguments besides its name.
    fn launch(world: &World, name: &str, arguments: &[&str]) -> Self {
        let all: Vec<&str> = ["launch", name, "--detach"].iter().chain(arguments).copied().collect();
        world.guest(&all).expect_code(0);
        Self::of(world, name)
    }

    /// Launches a guest with limits; none, and says so aloud, where this host cannot enforce these.
    fn launch_limited(world: &World, name: &str, limits: &[&str]) -> Option<Self> {
        let all: Vec<&str> = ["launch", name, "--detach"].iter().chain(limits).copied().collect();
        let launched = world.guest(&all);
        if launched.code() == 1 && launched.stderr.contains("cannot be enforced") {
            println!("skipped: {}", launched.stderr);
            return None;
        }
        launched.expect_code(0);
        Some(Self::of(world, name))
    }

    fn of(world: &World, name: &str) -> Self {
        Self::look(world.guest(&["info", name, "--json"]).expect_code(0).out())
    }

    fn look(json: String) -> Self {
        let info: Value = serde_json::from_str(&json).unwrap();
        let pid = info["componentPid"].as_u64().unwrap().try_into().unwrap();
        Self { info, pid }
    }

    /// State and detail of each layer.
    fn layers(&self) -> BTreeMap<&str, (&str, &str)> {
        let layers = self.info["layers"].as_array().unwrap();
        let text = |layer: usize, key| layers[layer][key].as_str().unwrap();
        let all = (0..layers.len()).map(|layer| (text(layer, "name"), (text(layer, "state"), text(layer, "detail"))));
        all.collect()
    }

    /// Checks what `info` says of its limits, and that it is in a group of its own for them.
    fn assert_limited(&self, limits: &str) {
        assert_eq!(self.layers()["cgroup"], ("holds", limits));
        let within = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap();
        assert!(within.contains("/sepal-"), "{within}");
    }

    fn problems(&self) -> String {
        self.info["problems"].to_string()
    }

    fn namespace(&self, name: &str) -> (u64, u64) {
        namespace(&self.pid.to_string(), name)
    }
}

fn namespace(process: &str, name: &str) -> (u64, u64) {
    let metadata = fs::metadata(format!("/proc/{process}/ns/{name}")).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Checks everything that holds for every component, under this uid.
fn check(guest: &Guest, uid: u32) {
    let layers = guest.layers();
    for (layer, name) in NAMESPACES {
        assert_eq!(layers[layer].0, "holds", "{layers:?}");
        assert_ne!(guest.namespace(name), namespace("self", name), "{layer}");
    }
    for layer in OTHERS {
        assert_eq!(layers[layer].0, "holds", "{layers:?}");
    }
    assert_eq!(
        layers.len(),
        NAMESPACES.len() + OTHERS.len() + 2,
        "and host-uid, and cgroup: {layers:?}"
    );

    let threads = process::threads(guest.pid);
    assert!(threads.len() > 1, "control, vCPU, devices: {threads:?}");
    for thread in threads {
        // Threads that made the machine may be about to end.
        let Ok(text) = fs::read_to_string(format!("/proc/{}/task/{thread}/status", guest.pid)) else {
            continue;
        };
        let of = |key: &str| process::status_of(&text, key);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(of(set), "0000000000000000", "{set} of thread {}", of("Name"));
        }
        assert_eq!((of("NoNewPrivs"), of("Seccomp")), ("1".into(), "2".into()), "{text}");
        // What serves the guest has narrowed itself beyond what all of them share.
        let serves = thread != guest.pid && !["build", "loader"].contains(&&*of("Name"));
        let filters = if serves { "2" } else { "1" };
        assert_eq!(of("Seccomp_filters"), filters, "{text}");
        let ids = |key: &str| {
            of(key)
                .split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect::<BTreeSet<u32>>()
        };
        assert_eq!(ids("Uid"), [uid].into(), "{text}");
    }
    assert_eq!(status(guest.pid, "NSpid").split_whitespace().last(), Some("1"));
    let limits = fs::read_to_string(format!("/proc/{}/limits", guest.pid)).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(5), Some("0"), "{core}");

    check_root(guest.pid);
    check_descriptors(guest.pid);
}

fn check_root(pid: u32) {
    let proc = format!("/proc/{pid}");
    assert_eq!(fs::read_dir(format!("{proc}/root/")).unwrap().count(), 0);
    assert_eq!(fs::read_link(format!("{proc}/cwd")).unwrap(), Path::new("/"));
    let mounts = fs::read_to_string(format!("{proc}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.starts_with("none / tmpfs ro,nosuid,nodev,noexec"), "{mounts}");
}

/// Nothing but what has no path, and the handles that a start gives.
fn check_descriptors(pid: u32) {
    let open = process::descriptors(pid);
    for (number, target) in &open {
        let kind = target.split([':', '[']).next().unwrap();
        let fine = match kind {
            "socket" | "pipe" | "anon_inode" => true,
            "/memfd" => *target == "/memfd:guest-ram" || *target == "/memfd:guest-ram (deleted)",
            // Standard output goes nowhere.
            "/dev/null" => *number == 1,
            "/dev/kvm" => *number == 4,
            _ => false,
        };
        assert!(fine, "descriptor {number} is {target}: {open:#?}");
    }
    let count = |kind: &str| open.values().filter(|target| target.starts_with(kind)).count();
    assert_eq!((count("/memfd"), count("anon_inode:kvm-vm")), (1, 1), "{open:#?}");
    // The control socket, which is held twice, and the serial port's; the lifeline and standard error.
    let sockets: BTreeSet<_> = open.values().filter(|target| target.starts_with("socket")).collect();
    assert_eq!((sockets.len(), count("socket"), count("pipe")), (2, 3, 2), "{open:#?}");
}

/// The uid that a component of this test's manager has to run under.
fn expected_uid(guest: &Guest) -> u32 {
    let own = rustix::process::geteuid().as_raw();
    let (state, detail) = guest.layers()["host-uid"];
    if !is_root() {
        assert_eq!(
            (state, detail),
            ("not-requested", &*format!("runs as its starter's uid {own}"))
        );
        return own;
    }
    assert_eq!(state, "holds");
    let uid: u32 = detail.strip_prefix("uid and gid ").unwrap().parse().unwrap();
    assert!(uid > 0xffff, "{uid} is nobody's that the host has");
    uid
}

#[test]
fn what_info_lists_is_in_force() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let first = Guest::launch(&world, "bee", &["--cpus", "2"]);
    check(&first, expected_uid(&first));
    assert_eq!(first.layers()["cgroup"], ("not-requested", "no limits"));
    let second = Guest::launch(&world, "ant", &[]);
    check(&second, expected_uid(&second));
    for (_, name) in NAMESPACES {
        assert_ne!(first.namespace(name), second.namespace(name), "{name}");
    }
    if is_root() {
        assert_ne!(expected_uid(&first), expected_uid(&second));
    }
    // A long detail goes on in the next line.
    let text = world.guest(&["info", "bee"]).expect_code(0).out();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for (layer, (state, detail)) in first.layers() {
        let told = format!(" {layer} {state} {detail}");
        assert!(text.contains(told.trim_end()), "{told:?} in {text}");
    }
    world.end();
}

#[test]
fn limits_are_enforced_by_groups_that_go_with_the_guest() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let limits = ["--limit-memory", "300M", "--limit-tasks", "40", "--limit-cpu", "150"];
    let Some(guest) = Guest::launch_limited(&world, "bee", &limits) else {
        return;
    };
    guest.assert_limited("memory 314572800 bytes, 40 threads, 1.500 processors");
    world.family();
    let groups = world.groups();
    assert!(!groups.is_empty());
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    let component = Path::new("/proc").join(guest.pid.to_string());
    assert!(!component.exists(), "stop returns after the process is gone");
    world.end();
}

#[test]
fn a_component_that_waited_has_the_same_jail() {
    if kvm_missing() {
        return;
    }
    let world = World::with_pool(2);
    let waited = world.components();
    assert_eq!(world.guest(&["list", "--json"]).expect_code(0).out().trim(), "[]");
    let first = Guest::launch(&world, "bee", &[]);
    assert!(
        waited.iter().any(|process| process.pid == first.pid),
        "{waited:?} {}",
        first.pid
    );
    check(&first, expected_uid(&first));
    assert_eq!(first.layers()["cgroup"], ("not-requested", "no limits"));
    let second = Guest::launch(&world, "ant", &[]);
    check(&second, expected_uid(&second));
    for (_, name) in NAMESPACES {
        assert_ne!(first.namespace(name), second.namespace(name), "{name}");
    }
    world.until_waiting(4);
    // What needs something of its start is started for it.
    let before = world.components();
    let waived = Guest::launch(&world, "cow", &["--waive-layer", "landlock"]);
    assert!(before.iter().all(|process| process.pid != waived.pid));
    assert_eq!(waived.layers()["landlock"].0, "waived");
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    assert!(!Path::new("/proc").join(first.pid.to_string()).exists());
    world.end();
}

#[test]
fn limits_hold_where_components_wait() {
    if kvm_missing() {
        return;
    }
    let world = World::with_pool(1);
    let waits = world.components();
    let Some(guest) = Guest::launch_limited(&world, "bee", &["--limit-tasks", "40"]) else {
        return;
    };
    assert_ne!(guest.pid, waits[0].pid);
    guest.assert_limited("40 threads");
    world.end();
}

#[test]
fn a_waiting_component_that_is_killed_is_replaced_and_none_outlives_the_manager() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_pool(1);
    let victim = world.components().remove(0);
    victim.signal(Signal::KILL);
    world.until_waiting(2);
    let next = world.components().remove(0);
    assert_ne!(next.pid, victim.pid);
    let guest = Guest::launch(&world, "bee", &[]);
    assert_eq!(guest.pid, next.pid);
    world.until_waiting(3);
    assert_eq!(
        world.family().len(),
        4,
        "manager, keeper, the guest's component, and the one that waits"
    );
    let manager = world.take_manager();
    manager.signal(Signal::KILL);
    assert_eq!(manager.wait().code(), 128 + 9);
    world.assert_nothing_left();
}

#[test]
fn a_waived_layer_is_told() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let guest = Guest::launch(
        &world,
        "bee",
        &["--waive-layer", "landlock", "--waive-layer", "uts-namespace"],
    );
    let layers = guest.layers();
    for (layer, (state, _)) in &layers {
        let waived = ["landlock", "uts-namespace"].contains(layer);
        assert_eq!(*state == "waived", waived, "{layers:?}");
    }
    assert_eq!(guest.namespace("uts"), namespace("self", "uts"));
    assert_ne!(guest.namespace("net"), namespace("self", "net"));
    let problems = guest.problems();
    assert!(
        problems.contains("landlock") && problems.contains("uts-namespace"),
        "{problems}"
    );
    let text = world.guest(&["info", "bee"]).expect_code(0).out();
    assert!(text.contains("\nproblem: The jail lacks"), "{text}");
    world.end();
}

#[test]
fn a_layer_that_the_host_lacks_fails_the_start_unless_waived() {
    if kvm_missing() {
        return;
    }
    let mut world = World::new();
    // A user namespace in which no other may be made, as on hosts that forbid them.
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
    command
        .args(["echo 0 >/proc/sys/user/max_uts_namespaces; exec \"$@\"", "sh"])
        .arg(program("guest-manager"));
    world.start_manager_by(command, |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
    });
    let refused = world.guest(&["launch", "bee"]).expect_code(1);
    for words in [
        "START_FAILURE",
        "uts-namespace",
        "user.max_uts_namespaces",
        "waive uts-namespace",
    ] {
        assert!(refused.stderr.contains(words), "{words:?} in {}", refused.stderr);
    }
    // Nor can a manager in there give a uid away that it does not have.
    let guest = Guest::launch(
        &world,
        "bee",
        &["--waive-layer", "uts-namespace", "--waive-layer", "host-uid"],
    );
    let layers = guest.layers();
    assert_eq!(
        (layers["uts-namespace"].0, layers["host-uid"].0, layers["seccomp"].0),
        ("waived", "waived", "holds")
    );
    world.end();
}

/// A uid and a group that nobody has.
const USER: u32 = 54321;
const GROUP: u32 = 54322;

/// Programs, as a user who is nobody else runs them, with this supplementary group.
fn as_user(command: &mut Command) {
    let (uid, gid) = (USER.to_string(), GROUP.to_string());
    command.args(["--reuid", &uid, "--regid", &uid, "--groups", &gid, "--inh-caps=-all"]);
}

#[test]
fn an_ordinary_user_in_the_group_of_kvm_has_the_same_jail() {
    if kvm_missing() {
        return;
    }
    if !is_root() {
        println!(
            "skipped: only root can become a user in a group of its own; the other tests have run as an ordinary one"
        );
        return;
    }
    let mut world = World::new();
    // The build folder may be one that only root may enter.
    let programs = world.folder().join("bin");
    fs::create_dir(&programs).unwrap();
    for name in PROGRAMS {
        fs::copy(program(name), programs.join(name)).unwrap();
    }
    fs::create_dir(world.folder().join("sepal")).unwrap();
    fs::set_permissions(world.folder().join("sepal"), fs::Permissions::from_mode(0o700)).unwrap();
    chown(world.folder().join("sepal"), Some(USER), Some(USER)).unwrap();
    chown(world.folder(), Some(USER), Some(USER)).unwrap();

    // The device node with another group, for the manager alone: in a mount namespace of its own.
    let node = fs::metadata("/dev/kvm").unwrap().rdev();
    let script = format!(
        "mount -t tmpfs -o mode=755 none /mnt
        mknod -m 660 /mnt/kvm c {} {}
        chown 0:{GROUP} /mnt/kvm
        mount --bind /mnt/kvm /dev/kvm
        exec setpriv \"$@\"",
        rustix::fs::major(node),
        rustix::fs::minor(node)
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"]);
    as_user(&mut command);
    command.arg(programs.join("guest-manager"));
    world.start_manager_by(command, |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
    });
    assert_eq!(
        status(world.manager().pid(), "Uid").split_whitespace().next(),
        Some(&*USER.to_string())
    );

    let guest = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        as_user(&mut command);
        command
            .arg(programs.join("guest"))
            .arg("--manager")
            .arg(world.socket())
            .args(arguments);
        let mut running = world.start_command(command, None);
        running.close_input();
        running.wait()
    };
    guest(&["launch", "bee", "--detach"]).expect_code(0);
    let bee = Guest::look(guest(&["info", "bee", "--json"]).expect_code(0).out());
    check(&bee, USER);
    assert_eq!(bee.layers()["host-uid"].0, "not-requested");
    guest(&["stop", "bee"]).expect_code(0);
    // A limit that such a user cannot have enforced is refused, not forgotten.
    let refused = guest(&["launch", "--limit-memory", "1G"]).expect_code(1);
    assert!(
        refused.stderr.contains("START_FAILURE") && refused.stderr.contains("limit"),
        "{}",
        refused.stderr
    );
    world.end();
}
