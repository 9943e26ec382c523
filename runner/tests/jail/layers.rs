//! Attempts in every role, the report of a sealed component, and layers that are waived or missing.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::thread;

use sepal_runner::inner::ThreadRole;
use sepal_runner::outer::{ExitStatus, Runner};
use sepal_runner::startup::HandleKind;
use sepal_runner::{Layer, LayerState};

use crate::attempts::Attempt;
use crate::component::{EXIT_ALLOWED, EXIT_REFUSED, EXIT_UNSEALED};
use crate::harness::{Jailed, Test, is_root, kvm, spec};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        (
            "layers::a_sealed_component_reports_every_layer".into(),
            every_layer_is_reported,
        ),
        ("layers::each_can_be_waived".into(), each_layer_can_be_waived),
        (
            "layers::what_was_made_ahead_is_the_next_components_alone".into(),
            what_was_made_ahead_is_the_next_components_alone,
        ),
    ]
}

pub(crate) fn attempt_in_every_role(attempt: &Attempt) {
    for role in ThreadRole::ALL {
        let (mut spec, control) = spec(&[&role.to_string(), attempt.name]);
        if attempt.name == "kvm-guest" {
            // To make one without KVM is no test; what may not run one cannot be asked to.
            let Some(kvm) = kvm().filter(|_| attempt.allowed.contains(&role)) else {
                continue;
            };
            spec.handles.add("kvm", HandleKind::Kvm, kvm).unwrap();
        }
        let mut jailed = Jailed::start((spec, control)).unwrap();
        let report = jailed.line();
        assert!(report.starts_with('['), "{role}: {report}");
        let answer = jailed.line();
        let status = jailed.component.wait().unwrap();
        if !attempt.allowed.contains(&role) {
            assert_eq!(status, ExitStatus::Signal(libc::SIGSYS), "{role}: {answer}");
        } else if attempt.errno == 0 {
            assert_eq!(status, ExitStatus::Code(EXIT_ALLOWED), "{role}: {answer}");
        } else {
            assert_eq!(status, ExitStatus::Code(EXIT_REFUSED), "{role}: {answer}");
            assert_eq!(answer, format!("errno {}", attempt.errno), "{role}");
        }
    }
}

fn every_layer_is_reported() {
    let mut jailed = Jailed::start(spec(&["wait"])).unwrap();
    let report = jailed.report();
    for layer in Layer::ALL {
        let found: Vec<_> = report.iter().filter(|status| status.layer == layer).collect();
        let [status] = found.as_slice() else {
            panic!("{layer} is reported {} times", found.len())
        };
        let expected = match layer {
            Layer::Cgroup => LayerState::NotRequested,
            Layer::HostUid if !is_root() => LayerState::NotRequested,
            _ => LayerState::Holds,
        };
        assert_eq!(status.state, expected, "{status:?}");
        assert!(!status.detail.is_empty(), "{layer}");
    }
    assert!(jailed.release().success());
}

/// The layer that has to be waived with this one.
pub(crate) fn rests_on_it(layer: Layer) -> Option<Layer> {
    match layer {
        Layer::UserNamespace => Some(Layer::HostUid),
        Layer::NoNewPrivs => Some(Layer::Seccomp),
        _ => None,
    }
}

fn each_layer_can_be_waived() {
    for layer in Layer::ALL {
        let (mut spec, control) = spec(&["wait"]);
        spec.jail.waived.insert(layer);
        rests_on_it(layer).map(|other| spec.jail.waived.insert(other));
        let started = Jailed::start((spec, control));
        if layer == Layer::UserNamespace && !is_root() {
            // Without a user namespace an ordinary user gets none of the others.
            let error = started.err().expect("no privilege").to_string();
            assert!(error.starts_with("jail layer pid-namespace is unavailable"), "{error}");
            continue;
        }
        let mut jailed = started.unwrap_or_else(|error| panic!("{layer}: {error}"));
        let first = jailed.line();
        if !first.starts_with('[') {
            let status = jailed.component.wait().unwrap();
            assert_eq!(status, ExitStatus::Code(EXIT_UNSEALED), "{layer}");
            // Landlock and filters rest on no_new_privs or privilege, which the error says.
            panic!("{layer}: {first}");
        }
        let report: Vec<sepal_runner::LayerStatus> = serde_json::from_str(&first).unwrap();
        let status = report.iter().find(|status| status.layer == layer).unwrap();
        let expected = if layer == Layer::Cgroup {
            LayerState::NotRequested
        } else {
            LayerState::Waived
        };
        assert_eq!(status.state, expected, "{status:?}");
        assert!(jailed.release().success(), "{layer}");
    }
}

/// The network, IPC and UTS namespaces of a process, or of the calling thread.
fn namespaces(of: &str) -> [u64; 3] {
    ["net", "ipc", "uts"].map(|name| fs::metadata(format!("/proc/{of}/ns/{name}")).unwrap().ino())
}

fn what_was_made_ahead_is_the_next_components_alone() {
    // On a thread of its own, which is moved and then gone.
    let moved = thread::spawn(|| {
        let home = namespaces("thread-self");
        let mut runner = Runner::new().unwrap();
        let mut start = |waived: Option<Layer>| {
            runner.prepare();
            let ahead = namespaces("thread-self");
            let (mut spec, control) = spec(&["wait"]);
            spec.jail.waived.extend(waived);
            let mut component = runner.spawn(spec).unwrap();
            // It has sealed itself, and checked that these are not its starter's.
            assert!(BufReader::new(&control).read_line(&mut String::new()).is_ok());
            // An ordinary user may not look at them.
            let own = is_root().then(|| namespaces(&component.pid().to_string()));
            (&control).write_all(b"x").unwrap();
            assert!(component.wait().unwrap().success(), "{waived:?}");
            (ahead, own, namespaces("thread-self"))
        };
        let (first, taken, _) = start(None);
        let (second, left, after) = start(Some(Layer::IpcNamespace));
        let (third, taken_again, _) = start(None);
        let (Some(taken), Some(left), Some(taken_again)) = (taken, left, taken_again) else {
            return;
        };
        assert_eq!((taken, taken_again), (first, third));
        // Numbers of namespaces that are gone are given again, so that those made later may have them.
        for kind in 0..3 {
            assert!(![first[kind], second[kind], third[kind]].contains(&home[kind]));
        }
        // One that goes without a layer starts from where its starter began: nothing of what another has been made.
        assert_eq!(after, home);
        assert_eq!(left[1], home[1]);
        assert!(left[0] != home[0] && left[2] != home[2]);
    });
    moved.join().unwrap();
}
