//! The keeper is killed, and its components with it; the manager goes on with a new one.

use crate::{
    at_every_state,
    component::check_and_go_on,
    states::{Scene, State},
};
use sepal_tests::until;

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

fn killed(scene: Scene) {
    let keeper = scene.world.keeper();
    scene.kill(&keeper);
    let Some(component) = scene.component.clone() else {
        assert!(scene.state == State::Named);
        scene.go_on_and_end();
        return;
    };
    until("the component ends with its parent", || {
        scene.world.is_gone(&component).then_some(())
    });
    check_and_go_on(scene, "keeper");
}
