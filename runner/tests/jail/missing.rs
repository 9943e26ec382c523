//! Hosts that lack a layer. The lack is made real where a namespace can make it, and injected by a filter on the
//! starting thread where it cannot: a call that answers with the errno of a kernel without the feature.

use std::process::Command;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use sepal_runner::Layer;
use sepal_runner::outer::{ExitStatus, SpawnError};

use crate::component::EXIT_UNSEALED;
use crate::harness::{Jailed, Test, spec};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        (
            "missing::what_sealing_lacks_is_named".into(),
            what_sealing_lacks_is_named,
        ),
        ("missing::no_clone3".into(), no_clone3),
        ("missing::no_process".into(), no_process),
        ("missing::no_user_namespaces".into(), || {
            in_user_namespace("inside::no_user_namespaces", "user")
        }),
        ("missing::no_network_namespaces".into(), || {
            in_user_namespace("inside::no_network_namespaces", "net")
        }),
        ("missing::no_uids_to_give".into(), || {
            in_user_namespace("inside::no_uids_to_give", "")
        }),
        ("missing::no_starter".into(), no_starter),
    ]
}

/// Tests that run only where [`in_user_namespace`] starts them.
pub(crate) fn inside() -> Vec<Test> {
    vec![
        ("inside::no_user_namespaces".into(), || {
            refused_as_limited(Layer::UserNamespace, "user")
        }),
        ("inside::no_network_namespaces".into(), || {
            refused_as_limited(Layer::NetworkNamespace, "net")
        }),
        ("inside::no_uids_to_give".into(), no_uids_to_give),
    ]
}

/// Runs `test` on a thread for which this call, with this first argument if one is given, answers with an errno.
fn injected(call: i64, first: Option<i32>, errno: i32, test: impl FnOnce() + Send) {
    let conditions = first.map(|first| {
        let first = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, first as u64).unwrap();
        SeccompRule::new(vec![first]).unwrap()
    });
    let rules = [(call, conditions.into_iter().collect())].into();
    let (allow, refuse) = (SeccompAction::Allow, SeccompAction::Errno(errno as u32));
    let program: BpfProgram = SeccompFilter::new(rules, allow, refuse, TargetArch::x86_64)
        .unwrap()
        .try_into()
        .unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Sets no_new_privs, which the thread's children keep.
            seccompiler::apply_filter(&program).unwrap();
            test();
        });
    });
}

fn what_sealing_lacks_is_named() {
    let cases = [
        (
            Layer::Root,
            libc::SYS_mount,
            None,
            libc::EPERM,
            "mounting a tmpfs: Operation not permitted",
        ),
        (Layer::Root, libc::SYS_pivot_root, None, libc::EPERM, "pivot_root: "),
        (
            Layer::NoNewPrivs,
            libc::SYS_prctl,
            Some(libc::PR_SET_NO_NEW_PRIVS),
            libc::EINVAL,
            "Invalid argument",
        ),
        (
            Layer::Landlock,
            libc::SYS_landlock_create_ruleset,
            None,
            libc::ENOSYS,
            "the kernel has no Landlock",
        ),
        (
            Layer::Landlock,
            libc::SYS_landlock_create_ruleset,
            None,
            libc::EOPNOTSUPP,
            "not enabled at boot",
        ),
        (
            Layer::Capabilities,
            libc::SYS_prctl,
            Some(libc::PR_CAPBSET_DROP),
            libc::EPERM,
            "emptying the bounding set",
        ),
        (Layer::Capabilities, libc::SYS_capset, None, libc::EPERM, "capset: "),
        (
            Layer::NotDumpable,
            libc::SYS_prctl,
            Some(libc::PR_SET_DUMPABLE),
            libc::EINVAL,
            "PR_SET_DUMPABLE",
        ),
        (
            Layer::Seccomp,
            libc::SYS_seccomp,
            Some(1),
            libc::EINVAL,
            "installing the filter: Invalid argument",
        ),
    ];
    for (layer, call, first, errno, cause) in cases {
        injected(call, first, errno, || {
            let mut jailed = Jailed::start(spec(&["wait"])).unwrap();
            let message = jailed.line();
            assert_eq!(
                jailed.component.wait().unwrap(),
                ExitStatus::Code(EXIT_UNSEALED),
                "{layer}: {message}"
            );
            assert!(
                message.starts_with(&format!("unsealed jail layer {layer} is unavailable: ")),
                "{message}"
            );
            assert!(message.contains(cause), "{cause:?} in {message}");
            assert!(
                message.ends_with(&format!("to start without it, waive {layer}")),
                "{message}"
            );

            // With the waiver that the message speaks of, it starts.
            let (mut spec, control) = spec(&["wait"]);
            spec.jail.waived.insert(layer);
            crate::layers::rests_on_it(layer).map(|other| spec.jail.waived.insert(other));
            let mut jailed = Jailed::start((spec, control)).unwrap();
            assert!(!jailed.report().is_empty(), "{layer}");
            assert!(jailed.release().success(), "{layer}");
        });
    }
}

fn no_clone3() {
    injected(libc::SYS_clone3, None, libc::ENOSYS, || {
        let error = Jailed::start(spec(&["wait"])).err().expect("no clone3").to_string();
        assert!(
            error.contains("user-namespace") && error.contains("not implemented"),
            "{error}"
        );
    });
}

fn no_process() {
    injected(libc::SYS_clone3, None, libc::EAGAIN, || {
        let error = Jailed::start(spec(&["wait"])).err().expect("no process");
        assert_eq!(error.layer(), None, "{error}");
        assert!(error.to_string().contains("pids.max"), "{error}");
    });
}

/// Runs one of the tests in a user namespace of its own, in which no (more) namespaces of a kind can be made.
fn in_user_namespace(test: &str, without: &str) {
    let limit = if without.is_empty() {
        String::new()
    } else {
        format!("echo 0 > /proc/sys/user/max_{without}_namespaces && ")
    };
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "sh", "-c"])
        .arg(format!("{limit}exec \"$0\" --exact --nocapture {test}"))
        .arg(std::env::current_exe().unwrap())
        .env(crate::harness::INSIDE, "1")
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

fn refused_as_limited(layer: Layer, name: &str) {
    let (mut limited, control) = spec(&["wait"]);
    limited.jail.waived.insert(Layer::HostUid);
    let error = Jailed::start((limited, control)).err().expect("no namespaces");
    assert_eq!(error.layer(), Some(layer), "{error}");
    let message = error.to_string();
    assert!(
        message.contains(&format!("a new {name} namespace: the host's limit")),
        "{message}"
    );
    assert!(
        message.contains(&format!("raise user.max_{name}_namespaces")),
        "{message}"
    );
    assert!(message.ends_with(&format!("waive {layer}")), "{message}");
}

/// Root of a namespace that has one uid: the range for components is not mapped there.
fn no_uids_to_give() {
    let error = Jailed::start(spec(&["wait"])).err().expect("no uids");
    assert!(
        matches!(
            error,
            SpawnError::Layer {
                layer: Layer::HostUid,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("gid_map"), "{error}");
    let (mut waived, control) = spec(&["wait"]);
    waived.jail.waived.insert(Layer::HostUid);
    let mut jailed = Jailed::start((waived, control)).unwrap();
    jailed.report();
    assert!(jailed.release().success());
}

fn no_starter() {
    let component = Command::new(std::env::current_exe().unwrap())
        .env(sepal_runner::startup::STARTUP_VARIABLE, "{}")
        .output()
        .unwrap();
    assert!(!component.status.success());
    let message = String::from_utf8_lossy(&component.stderr).into_owned();
    assert!(message.contains("missing field"), "{message}");
}
