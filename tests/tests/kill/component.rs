//! The component is killed.

use sepal_schema::{
    error::{Error, Kind},
    info::GuestStatus,
    report::Reason,
};
use sepal_tests::{rpc::observer, until};

use crate::{
    at_every_state,
    states::{PROMPT, Scene, State},
};

at_every_state!(killed:
    while_creating Creating,
    when_created Created,
    while_running Running,
    while_paused Paused,
    when_asked_to_shut_down Asked,
    while_stopping Stopping,
    when_stopped Stopped,
);

fn killed(scene: Scene) {
    let component = scene.component.clone().unwrap();
    scene.kill(&component);
    check_and_go_on(scene, "killed by signal 9 (SIGKILL)");
}

/// The component is gone, for the reason that has `words` in it: who waits is told, and the next creation has a new one.
pub(crate) fn check_and_go_on(mut scene: Scene, words: &str) {
    let (status, reason, kind) = match scene.state {
        // The guest had ended before: that is how it ended.
        State::Stopped => (GuestStatus::Stopped, Reason::Shutdown, Kind::InternalError),
        // It was to end anyway.
        State::Stopping => (GuestStatus::Stopped, Reason::Killed, Kind::ControllerForcedHalt),
        _ => (
            GuestStatus::VmmUnexpectedTermination,
            Reason::VmmTerminated,
            Kind::VmmTerminated,
        ),
    };
    let unexpected = reason == Reason::VmmTerminated;
    let is_told = |error: &Error| {
        let says = !unexpected || error.message.contains(words);
        assert!(error.kind == kind && says, "{:?}: {error:?}", scene.state);
    };
    if let Some(create) = scene.create.take() {
        is_told(&scene.driver.wait("the answer to create", create).unwrap_err());
    }
    if let Some(run) = scene.run.take() {
        is_told(&scene.driver.wait("the answer to run", run).unwrap_err());
    }
    for answer in std::mem::take(&mut scene.pending) {
        scene.driver.wait("the answer to stop", answer);
    }
    let info = until("the manager has noticed", || {
        scene
            .info()
            .filter(|info| info.status == status && info.component_pid == 0)
    });
    let stop = info.stop.unwrap();
    assert!(stop.reason == reason, "{stop:?}");
    assert!(!unexpected || stop.detail.contains(words), "{stop:?}");
    let told = info.problems.iter().any(|problem| problem.contains("component died"));
    assert_eq!(told, unexpected, "{:?}", info.problems);
    if let Some(guest) = scene.guest.take() {
        let report = scene
            .driver
            .wait("wait", observer(&guest).wait_request().send().promise)
            .unwrap();
        let told = sepal_schema::report::StopReport::read_result(report.get().unwrap())
            .unwrap()
            .reason;
        assert!(told == reason, "{told:?}");
        // What it printed is still to be had.
        let output = scene.driver.read_until(&guest, PROMPT);
        assert!(output.contains(PROMPT), "{output}");
    }
    scene.go_on_and_end();
}
