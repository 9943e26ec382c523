//! The client that drives a guest is killed: its connection breaks off.

use sepal_schema::report::Reason;
use sepal_tests::{rpc::observer, until};

use crate::{
    at_every_state,
    states::{NAME, Scene, State},
};

at_every_state!(killed:
    when_named Named,
    while_creating Creating,
    when_created Created,
    while_running Running,
    while_paused Paused,
    when_asked_to_shut_down Asked,
    while_stopping Stopping,
    when_stopped Stopped,
);

fn killed(mut scene: Scene) {
    let mut other = scene.world.connect();
    // Another client's view of the guest outlives the one that drives it.
    let seen = (scene.guest.is_some()).then(|| other.lookup(NAME).unwrap());
    scene.driver.connection.disconnect();
    let ended = scene.driver.connection.ended();
    scene.driver.wait("the end of the connection", ended);

    until("the name is free", || other.list().is_empty().then_some(()));
    let family = until("its component is gone", || {
        let family = scene.world.family();
        (family.len() == 2).then_some(family)
    });
    assert!(
        family.iter().all(|process| process.name != "vmm-component"),
        "{family:?}"
    );
    if let Some(guest) = seen {
        let report = other
            .wait("wait", observer(&guest).wait_request().send().promise)
            .unwrap();
        let report = sepal_schema::report::StopReport::read_result(report.get().unwrap()).unwrap();
        let expected = if scene.state == State::Stopped {
            Reason::Shutdown
        } else {
            Reason::Killed
        };
        assert!(report.reason == expected, "{report:?}");
    }
    scene.lifecycle = other.new_guest(NAME).unwrap();
    scene.driver = other;
    scene.go_on_and_end();
}
