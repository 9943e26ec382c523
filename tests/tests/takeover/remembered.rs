//! What the next manager remembers of guests that had ended, and how it goes on counting.

use sepal_schema::{info::GuestStatus, report::Reason};
use sepal_tests::kvm_missing;

use crate::scene::Scene;

#[test]
fn guests_that_had_ended_are_remembered_and_counted_on() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    scene.launch(Scene::config("bee"));
    let definition = ["--memory=32M", "--cmdline", "quiet run=shutdown"];
    scene
        .world
        .guest(&[&["define", "defined"], &definition[..]].concat())
        .expect_code(0);
    for generation in 1..=2 {
        scene.world.guest(&["start", "defined"]).expect_code(0);
        scene.until("defined", "it has ended", |info| {
            info.generation == generation && info.status == GuestStatus::Stopped
        });
    }
    let mut config = Scene::config("ant");
    (config.durable, config.cmdline) = (false, "quiet run=shutdown".into());
    scene.launch(config);
    let before = scene.until("ant", "it has ended", |info| info.status == GuestStatus::Stopped);
    let events = scene.events();
    scene.replace_manager();

    assert_eq!(scene.events(), events);
    let after = scene.info("ant");
    assert_eq!((after.status, after.generation), (GuestStatus::Stopped, 1));
    assert_eq!(
        after.stop.as_ref().map(|stop| stop.time_ns),
        before.stop.map(|stop| stop.time_ns)
    );
    assert!(after.stop.unwrap().reason == Reason::Shutdown);
    let defined = scene.info("defined");
    assert_eq!((defined.status, defined.generation), (GuestStatus::Stopped, 2));
    scene.world.guest(&["start", "defined"]).expect_code(0);
    scene.until("defined", "it has ended again", |info| {
        info.generation == 3 && info.status == GuestStatus::Stopped
    });
    scene.launch(Scene::config("ant"));
    assert_eq!(scene.until_running("ant").generation, 2);
    scene.world.guest(&["undefine", "defined"]).expect_code(0);
    scene.end();
}
