//! The manager is killed, and the next one has everything.

use sepal_schema::info::GuestStatus;
use sepal_tests::{kvm_missing, rpc::observer};

use crate::{
    printer,
    scene::{PROMPT, Scene, Told},
};

/// Checks that events are numbered without gaps.
#[track_caller]
fn check_numbers(events: &[Told]) {
    for pair in events.windows(2) {
        assert_eq!(pair[0].sequence + 1, pair[1].sequence, "{events:?}");
    }
}

#[test]
fn three_guests_go_on_twice_in_a_row() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    for (name, config) in [
        ("one", Scene::config("one")),
        ("two", Scene::config("two")),
        ("printer", Scene::printing("printer")),
    ] {
        scene.launch(config);
        scene.until_running(name);
    }
    for name in ["one", "two"] {
        let guest = scene.rpc.lookup(name).unwrap();
        scene.rpc.read_until(&guest, PROMPT);
    }
    let (mut position, mut next) = (0, 0);
    let text = scene.lines("printer", &mut position, 50);
    next = printer::check(&text, next);
    for round in 0..2 {
        let before: Vec<_> = scene.rpc.list();
        let events = scene.events();
        check_numbers(&events);
        scene.replace_manager();

        let after = scene.rpc.list();
        assert_eq!(after.len(), 3, "{after:?}");
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(
                (
                    &before.name,
                    before.component_pid,
                    before.generation,
                    &before.upkeep.uuid
                ),
                (&after.name, after.component_pid, after.generation, &after.upkeep.uuid)
            );
            assert!(after.uptime_ns > before.uptime_ns, "{before:?} {after:?}");
            assert_eq!(after.status, GuestStatus::Running);
            assert!(after.upkeep.durable && after.detached, "{after:?}");
            assert_eq!(before.descriptor, after.descriptor);
            assert_eq!(before.layers, after.layers);
        }
        // Nothing is told twice, and what was told is told again to whoever asks.
        assert_eq!(scene.events(), events, "round {round}");

        // What was printed before, meanwhile and since, without a gap.
        let text = scene.lines("printer", &mut position, 100);
        next = printer::check(&text, next);
        let all = scene.lines("printer", &mut 0, 150);
        assert!(printer::check(&all, 0) >= next, "from the beginning on");

        // Its keys arrive.
        let guest = scene.rpc.lookup("one").unwrap();
        let serial = guest.serial_request().send().pipeline.get_serial();
        let mut request = serial.write_request();
        request.get().set_bytes(format!("echo round {round}\r").as_bytes());
        scene.rpc.wait("typing", request.send()).unwrap();
        scene.rpc.read_until(&guest, &format!("\nround {round}"));
        // Its component answers.
        let stats = observer(&guest).stats_request().send().promise;
        scene.rpc.wait("stats", stats).unwrap();
        scene.rpc.set_paused(&guest, true).unwrap();
        scene.rpc.set_paused(&guest, false).unwrap();
    }
    let events = scene.events();
    check_numbers(&events);
    let paused = events.iter().filter(|event| event.kind == "paused").count();
    assert_eq!(paused, 2, "{events:?}");
    scene.end();
}

#[test]
fn a_guest_that_is_paused_is_found_paused() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let guest = scene.launch(Scene::config("bee"));
    scene.rpc.set_paused(&guest, true).unwrap();
    let events = scene.events();
    scene.replace_manager();
    assert!(scene.info("bee").paused);
    assert_eq!(scene.events(), events);
    let guest = scene.rpc.lookup("bee").unwrap();
    scene.rpc.set_paused(&guest, false).unwrap();
    scene.rpc.read_until(&guest, PROMPT);
    scene.end();
}

#[test]
fn what_was_shared_can_be_redeemed() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let share = |arguments: &[&str]| {
        let out = scene
            .world
            .guest(&[&["share", "bee"], arguments].concat())
            .expect_code(0)
            .out();
        out.trim().to_owned()
    };
    let (lasting, once, revoked) = (share(&["observer"]), share(&["observer", "--once"]), share(&["serial"]));
    scene.world.guest(&["redeem", &once, "--", "info"]).out();
    scene.world.guest(&["revoke", "bee", "3"]).expect_code(0);
    scene.replace_manager();
    let mut redeem = |token: &str| {
        let mut request = scene.rpc.manager.redeem_request();
        request.get().set_token(token);
        let answer = scene.rpc.wait("redeem", request.send().promise).unwrap();
        let answer = answer.get().unwrap();
        match answer.has_error() {
            true => Err(answer.get_error().unwrap().get_message().unwrap().to_string().unwrap()),
            false => Ok(answer.get_guest().unwrap().to_string().unwrap()),
        }
    };
    assert_eq!(redeem(&lasting), Ok("bee".to_owned()));
    assert!(redeem(&revoked).is_err());
    assert_eq!(redeem(&lasting), Ok("bee".to_owned()), "as often as one likes");
    scene.end();
}

#[test]
fn only_those_that_are_to_go_on_do() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("stays"));
    let mut config = Scene::config("goes");
    config.durable = false;
    scene.launch(config);
    let goes = scene.component("goes");
    scene.kill_manager();
    sepal_tests::until("it ends with the manager", || scene.world.is_gone(&goes).then_some(()));
    scene.start_manager();
    let names: Vec<_> = scene.rpc.list().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["stays"]);
    scene.end();
}
