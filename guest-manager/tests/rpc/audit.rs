//! What the audit says of those who change something, and that it says nothing of those who look.

use sepal_guest_manager::{
    audit::Audit,
    client::{Client, Who},
    manager::Settings,
    roles::Role,
};
use sepal_schema::{
    config::{File, GuestConfig},
    error::{Kind, read_completion},
};
use serde_json::{Value, json};

use crate::world::{Caller, World, info, kill, named, run_lifecycle, with};

/// What the audit's file says in the end.
pub(crate) fn audited(test: impl AsyncFnOnce(World)) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit");
    let (audit, writer) = Audit::to_file(&path).unwrap();
    let settings = Settings {
        audit,
        ..Settings::default()
    };
    with(settings, test);
    writer.finish();
    let text = std::fs::read_to_string(&path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn caller(world: &World, uid: u32, role: Role) -> Caller {
    let who = Who {
        uid,
        gid: 100,
        pid: Some(42),
        share: None,
    };
    world.caller_with(|fds| Client::new(fds, who, role))
}

/// Deed, guest and outcome of the lines about a manager's and a lifecycle's calls.
fn deeds(lines: &[Value]) -> Vec<(&str, &str, &str)> {
    let word = |value: &'_ Value| value.as_str().map(str::to_owned);
    let interfaces = ["GuestManager.", "GuestLifecycle.", "Lease."];
    lines
        .iter()
        .map(|line| {
            let outcome = match word(&line["outcome"]) {
                Some(_) => line["outcome"].as_str(),
                None => line["outcome"]["kind"].as_str(),
            };
            (
                line["deed"].as_str().unwrap(),
                line["guest"].as_str().unwrap(),
                outcome.unwrap(),
            )
        })
        .filter(|(deed, ..)| interfaces.iter().any(|interface| deed.starts_with(interface)))
        .collect()
}

#[test]
fn every_change_is_a_line_and_no_look_is() {
    let lines = audited(async |world| {
        let alice = caller(&world, 1000, Role::Admin);
        let web = alice.launch("web").await.unwrap();
        alice.list().await;
        info(&alice.lookup("web").await.unwrap()).await;
        alice.launch("web").await.err().unwrap();
        alice.force_shutdown("web").await.unwrap();
        alice.remove("web").await.unwrap();
        alice.remove("web").await.unwrap_err();
        let detached = web.lease.detach_request().send().promise.await.unwrap();
        read_completion(detached.get().unwrap()).unwrap_err();
        alice.manager.upload_request().send().promise.await.unwrap();
        alice.manager.shutdown_request().send().promise.await.unwrap();
    });
    let expected = [
        ("GuestManager.launch", "web", "ok"),
        ("GuestManager.launch", "web", "ALREADY_RUNNING"),
        ("GuestManager.forceShutdown", "web", "ok"),
        ("GuestManager.remove", "web", "ok"),
        ("GuestManager.remove", "web", "NOT_FOUND"),
        ("Lease.detach", "web", "NOT_RUNNING"),
        ("GuestManager.upload", "", "ok"),
        ("GuestManager.shutdown", "", "ok"),
    ];
    assert_eq!(deeds(&lines), expected);
    let first = &lines[0];
    assert_eq!(
        (&first["uid"], &first["gid"], &first["pid"]),
        (&json!(1000), &json!(100), &json!(42))
    );
    assert_eq!(first["detail"], "1 vCPUs, 256 MiB");
}

#[test]
fn whoever_drives_a_guest_itself_is_noted_step_by_step() {
    let lines = audited(async |world| {
        let alice = caller(&world, 1000, Role::Operate);
        let lifecycle = alice.new_guest("lab").await.unwrap();
        run_lifecycle(&lifecycle).await.unwrap_err();
        alice.create(&lifecycle, named("another")).await.unwrap_err();
        alice.create(&lifecycle, GuestConfig::default()).await.unwrap();
        let stop = async {
            let answer = lifecycle.stop_request().send().promise.await.unwrap();
            read_completion(answer.get().unwrap()).unwrap();
        };
        let (ran, ()) = futures::join!(run_lifecycle(&lifecycle), stop);
        ran.unwrap_err();
        alice.create(&lifecycle, GuestConfig::default()).await.unwrap();
        drop(lifecycle);
        // Answered after the drop has been heard of.
        alice.list().await;
    });
    let expected = [
        ("GuestManager.newGuest", "lab", "ok"),
        ("GuestLifecycle.run", "lab", "NOT_CREATED"),
        ("GuestLifecycle.create", "lab", "BAD_CONFIG"),
        ("GuestLifecycle.create", "lab", "ok"),
        ("GuestLifecycle.run", "lab", "ok"),
        ("GuestLifecycle.stop", "lab", "ok"),
        ("GuestLifecycle.create", "lab", "ok"),
        ("GuestLifecycle.drop", "lab", "ok"),
    ];
    assert_eq!(deeds(&lines), expected);
}

#[test]
fn refusals_are_noted_with_who_was_refused() {
    let lines = audited(async |world| {
        let eve = caller(&world, 666, Role::Observe);
        eve.launch("mine").await.err().unwrap();
        eve.force_shutdown("web").await.unwrap_err();
        let operator = caller(&world, 1001, Role::Operate);
        let config = GuestConfig {
            kernel: File::Path("/etc/shadow".into()),
            ..named("mine")
        };
        let error = operator.launch_config(config, false).await.err().unwrap();
        assert_eq!(error.kind, Kind::PermissionDenied);
    });
    let expected = [
        ("GuestManager.launch", "", "PERMISSION_DENIED"),
        ("GuestManager.forceShutdown", "", "PERMISSION_DENIED"),
        ("GuestManager.launch", "mine", "PERMISSION_DENIED"),
    ];
    assert_eq!(deeds(&lines), expected);
    assert_eq!((&lines[0]["uid"], &lines[2]["uid"]), (&json!(666), &json!(1001)));
    let message = lines[2]["outcome"]["message"].as_str().unwrap();
    assert!(message.contains("/etc/shadow"), "{message}");
}

#[test]
fn what_a_lost_connection_stops_is_noted() {
    let lines = audited(async |world| {
        let alice = caller(&world, 1000, Role::Operate);
        let web = alice.launch("web").await.unwrap();
        let _db = alice.launch_config(named("db"), true).await.unwrap();
        let admin = caller(&world, 0, Role::Admin);
        let guest = admin.lookup("web").await.unwrap();
        drop(web);
        drop(alice);
        crate::world::wait(&guest).await;
        kill(&admin.lookup("db").await.unwrap()).await.unwrap();
    });
    let expected = [
        ("GuestManager.launch", "web", "ok"),
        ("GuestManager.launch", "db", "ok"),
        ("Lease.drop", "web", "ok"),
    ];
    assert_eq!(deeds(&lines), expected);
}
