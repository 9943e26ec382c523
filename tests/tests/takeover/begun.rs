//! What is created, or ends, while the manager is killed.

use rustix::process::Signal;
use sepal_schema::{
    config::{Restart, RestartPolicy},
    info::GuestStatus,
};
use sepal_tests::{kvm_missing, process, until};

use crate::scene::{PROMPT, Scene};

#[test]
fn a_guest_that_is_being_created_is_created_by_the_next_manager() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let files = scene.world.slow_to_create();
    let mut launched = scene.send_slow_launch("slow", &files);
    // Held in the middle of it, so that it is not faster than the test.
    let component = until("its component creates it", || {
        assert!(
            scene.rpc.poll(&mut launched).is_none(),
            "create was faster than the test"
        );
        let pid = scene.info("slow").component_pid;
        let sealed = process::try_status(pid, "Seccomp").is_some_and(|mode| mode == "2");
        process::Process::of(pid).filter(|_| pid != 0 && sealed)
    });
    component.signal(Signal::STOP);
    assert_eq!(scene.info("slow").status, GuestStatus::Starting);
    scene.kill_manager();
    component.signal(Signal::CONT);
    scene.start_manager();

    let info = scene.until_it_ran("slow");
    assert_eq!(info.generation, 1);
    assert_ne!(info.component_pid, component.pid, "with a component of its own");
    until("the first one is gone", || {
        scene.world.is_gone(&component).then_some(())
    });
    assert_eq!(scene.info("bee").status, GuestStatus::Running);
    scene.end();
}

fn restarting(name: &str) -> sepal_schema::config::GuestConfig {
    let mut config = Scene::config(name);
    config.restart = Restart {
        policy: RestartPolicy::OnFailure,
        delay_ms: 1,
        ..Restart::default()
    };
    config
}

#[test]
fn the_restart_policy_goes_on() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(restarting("bee"));
    scene.until_running("bee");
    // Before.
    scene.component("bee").signal(Signal::KILL);
    scene.until("bee", "it begins again", |info| info.generation == 2);
    scene.until_running("bee");
    scene.replace_manager();
    assert_eq!(
        (scene.info("bee").upkeep.failures, scene.info("bee").upkeep.restarts),
        (1, 1)
    );
    // After.
    scene.component("bee").signal(Signal::KILL);
    scene.until("bee", "it begins again", |info| info.generation == 3);
    scene.until_running("bee");
    // In between.
    let component = scene.component("bee");
    scene.kill_manager();
    component.signal(Signal::KILL);
    until("it is gone", || scene.world.is_gone(&component).then_some(()));
    scene.start_manager();
    scene.until("bee", "it begins again", |info| info.generation == 4);
    let info = scene.until_running("bee");
    assert_eq!((info.upkeep.failures, info.upkeep.restarts), (3, 3));
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.read_until(&guest, PROMPT);
    let crashed: Vec<_> = scene
        .events()
        .into_iter()
        .filter(|event| event.kind == "crashed")
        .collect();
    assert_eq!(crashed.len(), 3, "{crashed:?}");
    scene.end();
}

#[test]
fn how_a_guest_ended_meanwhile_is_told() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let mut config = Scene::config("bee");
    config.cmdline = "run=\"sleep 1500ms;shutdown\"".into();
    scene.launch(config);
    let component = scene.component("bee");
    scene.kill_manager();
    // The machine is gone then, and its memory with it; the component waits for whoever asks.
    until("it has ended", || {
        let threads = process::try_status(component.pid, "Threads");
        threads.is_none_or(|threads| threads == "1").then_some(())
    });
    scene.start_manager();
    let info = scene.until("bee", "its end is known", |info| {
        info.stop.is_some() && info.component_pid == 0
    });
    assert_eq!(info.status, GuestStatus::Stopped);
    assert!(info.stop.unwrap().reason == sepal_schema::report::Reason::Shutdown);
    let guest = scene.rpc.lookup("bee").unwrap();
    assert!(
        scene
            .rpc
            .read_until(&guest, "nothing like that")
            .contains("slept 1500 ms")
    );
    scene.end();
}
