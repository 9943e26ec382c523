//! The manager is killed.

use sepal_schema::transport::EndReason;

use crate::{
    at_every_state,
    states::{NAME, Scene},
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
    // Taken note of, so that all of them are looked for.
    let before = scene.world.family();
    assert_eq!(before.len(), 2 + usize::from(scene.component.is_some()), "{before:?}");
    let manager = scene.world.take_manager();
    manager.signal(rustix::process::Signal::KILL);
    assert_eq!(manager.wait().code(), 128 + 9);

    if let Some(create) = scene.create.take() {
        let error = scene.driver.wait("the answer to create", create).unwrap_err();
        assert!(error.message.starts_with("broken"), "{error:?}");
    }
    if let Some(run) = scene.run.take() {
        let error = scene.driver.wait("the answer to run", run).unwrap_err();
        assert!(error.message.starts_with("broken"), "{error:?}");
    }
    let ended = scene.driver.connection.ended();
    let reason = scene.driver.wait("the end of the connection", ended);
    assert!(
        matches!(reason, EndReason::ClosedByPeer | EndReason::Io(..)),
        "{reason:?}"
    );
    // The keeper cleans: processes, groups, the socket, the lock.
    scene.world.assert_nothing_left();

    scene.world.start_manager();
    scene.driver = scene.world.connect();
    assert!(scene.driver.list().is_empty(), "guests end with their manager");
    scene.lifecycle = scene.driver.new_guest(NAME).unwrap();
    scene.go_on_and_end();
}
