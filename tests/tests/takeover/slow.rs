//! Components that stand still when the next manager comes, and waits that a manager did not live to see the end of.

use rustix::process::Signal;
use sepal_schema::{
    config::{Restart, RestartPolicy},
    info::GuestStatus,
};
use sepal_tests::{kvm_missing, rpc::observer, until};
use serde_json::Value;

use crate::{
    printer,
    scene::{PROMPT, Scene},
};

/// What is told of a component that stands still.
const SILENT: &str = "does not answer";

fn is_silent(scene: &mut Scene, name: &str) -> bool {
    scene.info(name).problems.iter().any(|problem| problem.contains(SILENT))
}

#[test]
fn a_component_that_stands_still_is_told_of_until_it_goes_on() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::printing("bee"));
    scene.until_running("bee");
    let (mut position, mut next) = (0, 0);
    let text = scene.lines("bee", &mut position, 20);
    next = printer::check(&text, next);
    let component = scene.component("bee");
    component.signal(Signal::STOP);
    // Twice: the first one finds out nothing.
    scene.replace_manager();
    assert_eq!(scene.info("bee").status, GuestStatus::Running);
    scene.replace_manager();
    until("it is told of", || is_silent(&mut scene, "bee").then_some(()));
    assert_eq!(scene.info("bee").status, GuestStatus::Running);
    let shown = scene.world.guest(&["info", "bee"]).expect_code(0).out();
    assert!(shown.contains(SILENT), "{shown}");

    component.signal(Signal::CONT);
    until("it answers", || (!is_silent(&mut scene, "bee")).then_some(()));
    let text = scene.lines("bee", &mut position, 100);
    printer::check(&text, next);
    let guest = scene.rpc.lookup("bee").unwrap();
    let stats = observer(&guest).stats_request().send().promise;
    scene.rpc.wait("stats", stats).unwrap();
    scene.rpc.set_paused(&guest, true).unwrap();
    assert!(scene.info("bee").paused);
    assert_eq!(scene.component("bee").pid, component.pid);
    scene.end();
}

#[test]
fn a_component_that_stands_still_can_be_stopped() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    for name in ["killed", "stopped"] {
        scene.launch(Scene::config(name));
        scene.until_running(name);
    }
    let components = ["killed", "stopped"].map(|name| scene.component(name));
    for component in &components {
        component.signal(Signal::STOP);
    }
    scene.replace_manager();
    // As force alone does it, and as what asks first.
    let killed = scene.rpc.lookup("killed").unwrap();
    let killing = sepal_tests::rpc::power(&killed).kill_request().send().promise;
    let stopped = ["stop", "stopped", "--timeout", "0.2", "--force"];
    scene.world.guest(&stopped).expect_code(0);
    scene.rpc.wait("kill", killing).unwrap();
    for component in &components {
        until("it is gone", || scene.world.is_gone(component).then_some(()));
    }
    for name in ["killed", "stopped"] {
        assert_eq!(scene.info(name).status, GuestStatus::Stopped);
    }
    scene.end();
}

#[test]
fn a_stop_goes_on_although_the_manager_that_began_it_is_killed() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let guest = scene.launch(Scene::config("bee"));
    scene.until_running("bee");
    let component = scene.component("bee");
    component.signal(Signal::STOP);
    let mut killing = sepal_tests::rpc::power(&guest).kill_request().send().promise;
    until("it is being stopped", || {
        assert!(scene.rpc.poll(&mut killing).is_none());
        (scene.info("bee").status == GuestStatus::Stopping).then_some(())
    });
    scene.replace_manager();
    until("it is gone", || scene.world.is_gone(&component).then_some(()));
    let info = scene.until("bee", "it is stopped", |info| info.stop.is_some());
    assert_eq!(info.status, GuestStatus::Stopped);
    scene.end();
}

#[test]
fn who_waits_to_begin_again_waits_on() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let mut config = Scene::config("bee");
    config.restart = Restart {
        policy: RestartPolicy::OnFailure,
        delay_ms: 3_600_000,
        max_delay_ms: 3_600_000,
        ..Restart::default()
    };
    scene.launch(config);
    scene.until_running("bee");
    let vcpu = |scene: &Scene| {
        let told = scene.world.guest(&["stats", "bee", "--json"]).expect_code(0).out();
        let told: Value = serde_json::from_str(&told).unwrap();
        told["vcpus"][0]["state"].clone()
    };
    assert_ne!(vcpu(&scene), "stopped");
    scene.component("bee").signal(Signal::KILL);
    scene.until("bee", "it waits", |info| info.upkeep.failures == 1);
    assert_eq!(vcpu(&scene), "stopped");
    let events = scene.events();
    scene.replace_manager();
    let info = scene.info("bee");
    assert_eq!((info.status, info.generation), (GuestStatus::Starting, 1));
    assert_eq!(scene.events(), events);
    scene.world.guest(&["reset", "bee"]).expect_code(0);
    assert_eq!(scene.until_running("bee").generation, 2);
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.read_until(&guest, PROMPT);
    scene.end();
}
