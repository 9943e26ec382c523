//! Queries wait for nobody: neither for a guest that is created or stopped, nor for a component that does not answer.

use std::{cell::Cell, future::Future, rc::Rc};

use sepal_schema::{
    error::{Error, Kind, Outcome},
    guest_capnp::{guest, statistics::stats_result},
    info::GuestStatus,
};

use crate::{
    fake::{Behaviour, Does},
    world::{Caller, World, info, kill, named, observer, run, stop},
};

/// Lost bytes of serial output and age, of a guest's figures.
async fn stats(guest: &guest::Client) -> Result<(u64, u64), Error> {
    let answer = observer(guest).stats_request().send().promise.await?;
    match answer.get()?.which().unwrap() {
        stats_result::Stats(stats) => {
            let stats = stats?;
            Ok((stats.get_serial_dropped(), stats.get_age_ns()))
        }
        stats_result::Error(error) => Err(Error::read(error?)?),
    }
}

/// Asks until there are figures that `enough` finds good enough: on a busy host an answer may well take longer than the manager waits.
async fn stats_until(guest: &guest::Client, enough: impl Fn(u64, u64) -> bool) {
    while !stats(guest).await.is_ok_and(|(lost, age)| enough(lost, age)) {}
}

/// Asks all that can be asked, of a guest in this state.
async fn ask_everything(caller: &Caller, status: GuestStatus) {
    let listed = caller.list().await;
    assert_eq!((&listed[0].name[..], listed[0].status), ("slow", status));
    let guest = caller.lookup("slow").await.unwrap();
    assert_eq!(info(&guest).await.status, status);
    caller.manager.who_am_i_request().send().promise.await.unwrap();
    caller.manager.version_request().send().promise.await.unwrap();
    // Whatever it says.
    let _ = stats(&guest).await;
}

/// Starts something that takes its time, and tells whether it is done.
fn begin(world: &World, slow: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
    let done = Rc::new(Cell::new(false));
    let told = done.clone();
    world.handle.spawn(async move {
        slow.await;
        told.set(true);
    });
    done
}

#[test]
fn while_a_guest_is_created() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let caller = Rc::new(world.caller());
        let launching = caller.clone();
        let launched = begin(&world, async move {
            let error = launching.launch_config(named("slow"), true).await.err().unwrap();
            assert_eq!(error.kind, Kind::ControllerForcedHalt);
        });
        while caller.list().await.is_empty() {}
        ask_everything(&caller, GuestStatus::Starting).await;
        assert!(!launched.get(), "the creation hangs all the time");
        caller.force_shutdown("slow").await.unwrap();
    });
}

#[test]
fn while_a_guest_is_stopped_with_a_deadline() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            button: Does::Hangs,
            stop: Does::Hangs,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launched = caller.launch("slow").await.unwrap();
        let guest = launched.guest.clone();
        let asked = begin(&world, async move {
            stop(&guest, 1_000_000, false).await.unwrap();
        });
        ask_everything(&caller, GuestStatus::Running).await;
        assert!(!asked.get(), "the deadline is far away");
        let guest = launched.guest.clone();
        let forced = begin(&world, async move {
            kill(&guest).await.unwrap();
        });
        world.fake.last().asked_to_stop().await;
        ask_everything(&caller, GuestStatus::Stopping).await;
        assert!(!asked.get() && !forced.get(), "the component does not answer to stop");
        world.fake.last().die(sepal_guest_manager::component::Exit::Signal(9));
    });
}

#[test]
fn figures_of_a_component_that_does_not_answer_have_an_age() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("slow").await.unwrap();
        let figures = &world.fake.last().figures;
        // The first question is put when the guest starts.
        figures.asked.until(|asked| (*asked == 1).then_some(())).await;
        stats_until(&launched.guest, |lost, age| (lost, age) == (17, 0)).await;
        let before = figures.asked.look(|asked| *asked);
        figures.mute.change(|mute| *mute = true);
        figures.lost.set(1);
        for _ in 0..3 {
            let (lost, age) = stats(&launched.guest).await.unwrap();
            assert!(lost == 17 && age > 0, "{lost}, {age} ns old");
        }
        figures.asked.until(|asked| (*asked > before).then_some(())).await;
        assert_eq!(
            figures.asked.look(|asked| *asked),
            before + 1,
            "it has still to answer the first"
        );
        // The late answer counts for whoever asks next.
        figures.mute.change(|mute| *mute = false);
        stats_until(&launched.guest, |lost, age| (lost, age) == (18, 0)).await;

        kill(&launched.guest).await.unwrap();
        let (lost, age) = stats(&launched.guest).await.unwrap();
        assert!(lost == 18 && age > 0, "the last figures stay");
    });
}

#[test]
fn figures_that_were_never_told_are_an_error() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("slow").await.unwrap();
        caller.create(&lifecycle, named("")).await.unwrap();
        let process = world.fake.last();
        process.figures.mute.change(|mute| *mute = true);
        let guest = lifecycle.bind_request().send().pipeline.get_guest();
        assert_eq!(stats(&guest).await.unwrap_err().kind, Kind::TimedOut);
        drop(lifecycle.stop_request().send().promise.await.unwrap());
        assert_eq!(stats(&guest).await.unwrap_err().kind, Kind::NotRunning);
    });
}

#[test]
fn figures_are_asked_for_one_at_a_time() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("slow").await.unwrap();
        let figures = &world.fake.last().figures;
        stats_until(&launched.guest, |lost, age| (lost, age) == (17, 0)).await;
        let before = figures.asked.look(|asked| *asked);
        figures.mute.change(|mute| *mute = true);
        let many = futures::future::join_all((0..50).map(|_| stats(&launched.guest))).await;
        assert!(
            many.iter().all(|answer| matches!(answer, Ok((17, age)) if *age > 0)),
            "{many:?}"
        );
        figures.asked.until(|asked| (*asked > before).then_some(())).await;
        assert_eq!(figures.asked.look(|asked| *asked), before + 1);
    });
}

#[test]
fn nobody_is_found_who_is_not_there_at_once_too() {
    run(async |world| {
        let caller = world.caller();
        let mut request = caller.manager.lookup_request();
        request.get().set_name("missing");
        let answer = request.send().promise.await.unwrap();
        assert_eq!(answer.get().unwrap().outcome().err().unwrap().kind, Kind::NotFound);
    });
}
