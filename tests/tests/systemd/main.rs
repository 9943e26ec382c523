//! The units under a live systemd, which is the first process of a container: installed and started by the very commands of docs/operation.md.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod container;

use sepal_tests::{kvm_missing, until};
use serde_json::Value;

use container::Container;

/// How the documentation says that it is installed: its first block of commands.
fn documented() -> Vec<String> {
    let page = include_str!("../../../docs/operation.md");
    let lines = page.lines().skip_while(|line| !line.starts_with("    "));
    let block = lines.take_while(|line| line.starts_with("    "));
    block.map(|line| line.trim().to_owned()).collect()
}

/// The guests that run, by name, and the processes of their components.
fn running(container: &Container) -> Vec<(String, u64)> {
    let listed = container.guest("list --json");
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let runs = listed.as_array().unwrap().iter();
    let of = |guest: &Value| {
        let name = guest["name"].as_str().unwrap().to_owned();
        (name, guest["componentPid"].as_u64().unwrap())
    };
    runs.filter(|guest| guest["status"] == "running").map(of).collect()
}

/// Lines of the service's log with at most this priority (3: errors, 6: all but the debugger's).
fn log(container: &Container, priority: u8) -> String {
    container.run("journalctl --sync");
    container.run(&format!(
        "journalctl --unit sepal.service --output cat --priority {priority}"
    ))
}

#[test]
fn the_units_do_what_the_documentation_says() {
    let Some(container) = Container::start() else { return };
    let commands = documented();
    let (install, rest) = commands.split_at(2);
    for command in install {
        container.run(command);
    }
    let enable = rest[0].strip_prefix("systemctl daemon-reload && ").unwrap();
    assert_eq!(enable, "systemctl enable --now sepal.socket sepal.service");
    assert_eq!(rest[1], format!("export SEPAL_MANAGER={}", container::SOCKET));

    // The first who asks starts the manager, which is there as soon as it says so.
    container.run("systemctl daemon-reload && systemctl start sepal.socket");
    assert_eq!(container.property("ActiveState"), "inactive");
    assert!(running(&container).is_empty());
    assert_eq!(container.property("ActiveState"), "active");
    assert!(container.property("StatusText").starts_with("serving guests"));
    container.run(enable);
    let manager = container.property("MainPID");
    let status = container.run(&format!("cat /proc/{manager}/status"));
    assert!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp_filters:\t0"),
        "{status}"
    );
    container.run("systemctl reload sepal.service");
    assert_eq!(
        (container.property("MainPID"), container.property("ActiveState")),
        (manager, "active".into())
    );
    if kvm_missing() {
        return;
    }

    container.guest("launch web --durable --detach");
    container.guest("launch plain --detach");
    let (web, plain) = match &running(&container)[..] {
        [(plain, ended), (web, stays)] if plain == "plain" && web == "web" => (*stays, *ended),
        other => panic!("{other:?}"),
    };
    let alive = |pid: u64| container.run(&format!("test -e /proc/{pid} && echo yes || echo no")) == "yes";
    let only_web = || assert_eq!(running(&container), [("web".to_owned(), web)]);
    container.run("systemctl restart sepal.service");
    only_web();
    assert!(!alive(plain));
    let before = container.property("MainPID");
    container.run(&format!("kill -KILL {before}"));
    until("the next manager is there", || {
        (container.property("NRestarts") == "1" && container.property("ActiveState") == "active").then_some(())
    });
    only_web();
    container.run("systemctl stop sepal.service");
    assert_eq!(
        (container.property("ActiveState"), container.property("Result")),
        ("inactive".into(), "success".into())
    );
    assert!(alive(web));
    only_web();

    // What went wrong is in the journal, as that.
    assert_eq!(log(&container, 3), "");
    container.run(&format!("kill -KILL {web}"));
    container.guest("wait web || true");
    assert!(
        log(&container, 3).contains("the component died: killed by signal 9"),
        "{}",
        log(&container, 6)
    );
    assert!(log(&container, 6).contains("INFO ended:"), "{}", log(&container, 6));

    container.guest("launch web --durable --detach");
    container.guest("end-manager");
    until("the service has ended", || {
        (container.property("ActiveState") == "inactive").then_some(())
    });
    assert!(container.property("ControlGroup").is_empty(), "nothing is left of it");
    assert_eq!(container.run("systemctl is-active sepal.socket"), "active");
}

/// Has a way out of the container, over a tap, which is all that passt wants to see.
const WAY_OUT: &str = "ip tuntap add dev out mode tap && ip address add 192.0.2.1/24 dev out && ip link set out up && \
                       ip route add default via 192.0.2.2 && passt --version";

#[test]
fn networks_work_within_what_the_unit_leaves_the_manager() {
    let Some(container) = Container::start() else { return };
    if kvm_missing() {
        return;
    }
    if let (false, why) = container.try_run(WAY_OUT) {
        println!("skipped: no network here: {why}");
        return;
    }
    for command in &documented()[..2] {
        container.run(command);
    }
    container.run("systemctl daemon-reload && systemctl start sepal.socket");
    container.guest("launch one --net user --net tap --detach");
    container.guest("launch two --net user --cmdline 'quiet run=shutdown' < /dev/null");
    container.guest("stop one --force");
    // What serves a network ends with the guest, which is nothing to tell.
    assert!(!log(&container, 4).contains("BackendLost"), "{}", log(&container, 6));

    container.guest("launch three --net user --detach");
    container.run("kill -KILL $(pgrep -f '^passt ')");
    until("it is told", || {
        log(&container, 4).contains("BackendLost").then_some(())
    });
    container.guest("stop three --force");
    assert_eq!(
        log(&container, 4).matches("BackendLost").count(),
        1,
        "{}",
        log(&container, 6)
    );
    container.guest("end-manager");
}
