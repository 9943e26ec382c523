//! What others see of a sealed component: its `/proc` entries, its uid, its groups.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sepal_runner::Layer;
use sepal_runner::cgroup::{Controller, Hierarchies};
use sepal_runner::outer::{ExitStatus, Program, SpawnError, UidRange};
use sepal_runner::startup::HandleKind;

use crate::harness::{Jailed, Test, is_root, spec, status_of};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        (
            "outside::a_starters_personality_is_left".into(),
            a_starters_personality_is_left,
        ),
        ("outside::status_shows_the_jail".into(), status_shows_the_jail),
        ("outside::namespaces_are_its_own".into(), namespaces_are_its_own),
        (
            "outside::root_and_descriptors_are_bare".into(),
            root_and_descriptors_are_bare,
        ),
        ("outside::no_handle_leaks_in".into(), no_handle_leaks_in),
        (
            "outside::each_component_has_its_own_uid".into(),
            each_component_has_its_own_uid,
        ),
        ("outside::limits_are_set_and_removed".into(), limits_are_set_and_removed),
        (
            "outside::handles_of_the_wrong_kind_are_refused".into(),
            handles_of_the_wrong_kind_are_refused,
        ),
        (
            "outside::programs_that_cannot_run_say_why".into(),
            programs_that_cannot_run_say_why,
        ),
        (
            "outside::standard_error_goes_where_it_is_sent".into(),
            standard_error_goes_where_it_is_sent,
        ),
        (
            "outside::a_dropped_component_is_gone".into(),
            a_dropped_component_is_gone,
        ),
    ]
}

/// A sealed component that waits.
fn waiting() -> Jailed {
    let mut jailed = Jailed::start(spec(&["wait"])).unwrap();
    jailed.report();
    jailed
}

fn status_shows_the_jail() {
    let jailed = waiting();
    let pid = jailed.component.pid();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status_of(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status_of(pid, "NoNewPrivs"), "1");
    assert_eq!(status_of(pid, "Seccomp"), "2");
    assert_eq!(status_of(pid, "Seccomp_filters"), "1");
    assert_eq!(status_of(pid, "NSpid").split_whitespace().last(), Some("1"));
    let uids: BTreeSet<String> = status_of(pid, "Uid").split_whitespace().map(str::to_owned).collect();
    let expected = jailed
        .component
        .host_uid()
        .unwrap_or_else(|| rustix::process::getuid().as_raw());
    assert_eq!(uids, BTreeSet::from([expected.to_string()]));
    if is_root() {
        assert_ne!(expected, 0);
        assert_eq!(status_of(pid, "Groups"), "");
        let gids: BTreeSet<String> = status_of(pid, "Gid").split_whitespace().map(str::to_owned).collect();
        assert_eq!(gids, BTreeSet::from([expected.to_string()]));
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    assert!(jailed.release().success());
}

fn namespaces_are_its_own() {
    let jailed = waiting();
    for (layer, _, name) in Layer::NAMESPACES {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{name}")).unwrap();
        assert_ne!(of(&jailed.component.pid().to_string()), of("self"), "{layer}");
    }
    assert!(jailed.release().success());
}

fn root_and_descriptors_are_bare() {
    let jailed = waiting();
    let proc = format!("/proc/{}", jailed.component.pid());
    assert_eq!(fs::read_dir(format!("{proc}/root/")).unwrap().count(), 0);
    assert_eq!(fs::read_link(format!("{proc}/cwd")).unwrap(), Path::new("/"));
    let mounts = fs::read_to_string(format!("{proc}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.starts_with("none / tmpfs ro,nosuid,nodev,noexec"), "{mounts}");
    let open: BTreeSet<u32> = fs::read_dir(format!("{proc}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    assert_eq!(open, BTreeSet::from([0, 1, 2, 3]));
    assert!(jailed.release().success());
}

fn no_handle_leaks_in() {
    // Inheritable, as a library may leave it.
    let stray = rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    // The component would refuse to start with a descriptor that its table does not list.
    let jailed = waiting();
    drop(stray);
    assert!(jailed.release().success());
}

fn each_component_has_its_own_uid() {
    let (first, second) = (waiting(), waiting());
    if is_root() {
        let (a, b) = (
            first.component.host_uid().unwrap(),
            second.component.host_uid().unwrap(),
        );
        assert_ne!(a, b);
        let small = UidRange {
            first: 0x6f00_0000 + std::process::id() % 0x1000 * 2,
            count: 1,
        };
        let in_range = || {
            let (mut spec, control) = spec(&["wait"]);
            spec.jail.uids = Some(small);
            Jailed::start((spec, control))
        };
        let mut only = in_range().unwrap();
        only.report();
        assert_eq!(only.component.host_uid(), Some(small.first));
        let error = in_range().err().expect("the only uid is in use");
        assert_eq!(error.layer(), Some(Layer::HostUid));
        assert!(error.to_string().contains("are in use"), "{error}");
        assert!(only.release().success());
    } else {
        assert_eq!(first.component.host_uid(), None);
    }
    assert!(first.release().success() && second.release().success());
}

fn limits_are_set_and_removed() {
    let (mut spec, control) = spec(&["wait"]);
    spec.jail.limits.memory_bytes = Some(256 << 20);
    spec.jail.limits.pids = Some(32);
    spec.jail.limits.cpu_millis = Some(1500);
    spec.jail.limits.cpu_weight = Some(50);
    let offered = Hierarchies::discover().unwrap();
    let complete = Controller::ALL
        .into_iter()
        .all(|controller| offered.version_of(controller).is_some());
    let mut jailed = match Jailed::start((spec, control)) {
        Ok(jailed) => jailed,
        // An ordinary user without a delegated group, or a host without controllers: said, not ignored.
        Err(error @ SpawnError::Limit { .. }) if !is_root() || !complete => {
            assert!(error.to_string().contains("limit cannot be enforced"), "{error}");
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let report = jailed.report();
    let status = report.iter().find(|status| status.layer == Layer::Cgroup).unwrap();
    assert_eq!(
        status.detail,
        "memory 268435456 bytes, 32 threads, 1.500 processors, processor weight 50"
    );
    let directories = jailed.component.cgroup_directories().to_vec();
    assert!(!directories.is_empty());
    let files = [
        ("memory.max", "268435456"),
        ("memory.limit_in_bytes", "268435456"),
        ("pids.max", "32"),
        ("cpu.max", "150000 100000"),
        ("cpu.cfs_quota_us", "150000"),
        ("cpu.weight", "50"),
        ("cpu.shares", "512"),
    ];
    let mut checked = 0;
    for directory in &directories {
        let processes = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
        assert_eq!(processes.trim(), jailed.component.pid().to_string(), "{directory:?}");
        for (file, expected) in files {
            if let Ok(content) = fs::read_to_string(directory.join(file)) {
                assert_eq!(content.trim(), expected, "{directory:?} {file}");
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 4, "each limit once");
    assert!(jailed.release().success());
    for directory in directories {
        assert!(!directory.exists(), "{directory:?}");
    }
}

fn handles_of_the_wrong_kind_are_refused() {
    let (mut spec, _control) = spec(&[]);
    let null = || fs::File::open("/dev/null").unwrap().into();
    let error = spec
        .handles
        .add("kvm", HandleKind::Kvm, null())
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "startup handle \"kvm\": it has to be Kvm, but it is character device 1:3"
    );
    let error = spec
        .handles
        .add("control", HandleKind::CharDevice, null())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "startup handle \"control\": this name is in the table already");
    assert!(spec.handles.add("No Name", HandleKind::CharDevice, null()).is_err());
}

fn programs_that_cannot_run_say_why() {
    let error = Program::open("/nonexistent/component").unwrap_err().to_string();
    assert!(
        error.starts_with("program /nonexistent/component: No such file"),
        "{error}"
    );
    assert!(Program::open("/").unwrap_err().to_string().contains("it is Directory"));

    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("plain");
    fs::write(&script, "no program").unwrap();
    for (mode, reason) in [(0o644, "Permission denied"), (0o755, "Exec format error")] {
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let (mut spec, control) = spec(&[]);
        spec.program = Program::open(&script).unwrap();
        let error = Jailed::start((spec, control)).err().expect("no program").to_string();
        assert!(error.contains("plain") && error.contains(reason), "{error}");
    }
}

fn standard_error_goes_where_it_is_sent() {
    let (mut spec, control) = spec(&["control", "panic-caught"]);
    let file = tempfile::tempfile().unwrap();
    spec.stderr = Some(file.try_clone().unwrap().into());
    let mut jailed = Jailed::start((spec, control)).unwrap();
    assert_eq!(jailed.component.wait().unwrap(), ExitStatus::Code(0));
    assert!(file.metadata().unwrap().size() > 0);
}

fn a_dropped_component_is_gone() {
    let jailed = waiting();
    let pidfd = jailed.component.pidfd().try_clone_to_owned().unwrap();
    drop(jailed);
    let gone = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    assert_eq!(gone, Err(rustix::io::Errno::SRCH));
}

fn a_starters_personality_is_left() {
    const READ_IMPLIES_EXEC: libc::c_ulong = 0x0040_0000;
    const ADDR_NO_RANDOMIZE: libc::c_ulong = 0x0004_0000;
    let thread = std::thread::spawn(|| {
        // SAFETY: concerns this thread and what it starts.
        unsafe { libc::personality(READ_IMPLIES_EXEC | ADDR_NO_RANDOMIZE) };
        let jailed = waiting();
        let personality = fs::read_to_string(format!("/proc/{}/personality", jailed.component.pid())).unwrap();
        assert_eq!(personality.trim(), "00000000");
        let maps = fs::read_to_string(format!("/proc/{}/maps", jailed.component.pid())).unwrap();
        // Where the kernel puts every program without randomization.
        assert!(!maps.starts_with("555555554000-"), "{maps}");
        assert!(jailed.release().success());
    });
    thread.join().unwrap();
}
