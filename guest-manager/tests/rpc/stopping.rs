//! The ladder, kills, and the manager's own end.

use futures::join;
use sepal_schema::{
    error::{Error, Kind, read_completion},
    info::GuestStatus,
    report::Reason,
};

use crate::{
    fake::{Behaviour, Does},
    world::{impatient, kill, power, run, status, stop, wait, with},
};

fn kind<T>(result: Result<T, Error>) -> Kind {
    result.err().unwrap().kind
}

fn deaf() -> Behaviour {
    Behaviour {
        button: Does::Hangs,
        ..Behaviour::default()
    }
}

#[test]
fn a_deaf_guest_outlives_the_deadline_unless_forced() {
    run(async |world| {
        world.fake.behaviour.set(deaf());
        let caller = world.caller();
        let launched = caller.launch("deaf").await.unwrap();
        let error = stop(&launched.guest, 50, false).await.unwrap_err();
        assert_eq!(error.kind, Kind::TimedOut);
        assert!(error.message.contains("50 ms"), "{}", error.message);
        assert_eq!(status(&launched.guest).await, GuestStatus::Running);
        let report = stop(&launched.guest, 50, true).await.unwrap();
        assert_eq!(report.reason, Reason::Hangup);
        assert!(report.detail.contains("50 ms"), "{}", report.detail);
        assert_eq!(world.fake.last().pressed(), 2);
        assert_eq!(world.fake.alive(), 0);
    });
}

#[test]
fn a_component_that_does_not_stop_its_machine_is_killed() {
    with(impatient(), async |world| {
        world.fake.behaviour.set(Behaviour {
            stop: Does::Hangs,
            ..deaf()
        });
        let caller = world.caller();
        let first = caller.launch("one").await.unwrap();
        assert_eq!(stop(&first.guest, 50, true).await.unwrap().reason, Reason::Hangup);
        let second = caller.launch("two").await.unwrap();
        assert_eq!(kill(&second.guest).await.unwrap().reason, Reason::Killed);
        assert_eq!(world.fake.alive(), 0);
    });
}

#[test]
fn a_component_that_hangs_while_it_creates_is_killed() {
    with(impatient(), async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            stop: Does::Hangs,
            ..deaf()
        });
        let caller = world.caller();
        let end = async { while caller.force_shutdown("stuck").await.is_err() {} };
        let (launched, ()) = join!(caller.launch("stuck"), end);
        assert_eq!(kind(launched), Kind::ControllerForcedHalt);
        assert_eq!(world.fake.alive(), 0);
    });
}

#[test]
fn a_guest_without_a_button_is_forced_at_once_or_not_at_all() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            button: Does::Fails(Kind::NotSupported),
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launched = caller.launch("plain").await.unwrap();
        assert_eq!(kind(stop(&launched.guest, 0, false).await), Kind::NotSupported);
        let pressed = power(&launched.guest).shutdown_request().send().promise.await.unwrap();
        assert_eq!(kind(read_completion(pressed.get().unwrap())), Kind::NotSupported);
        let report = stop(&launched.guest, 0, true).await.unwrap();
        assert_eq!(report.reason, Reason::Killed);
    });
}

#[test]
fn many_may_stop_one_guest() {
    run(async |world| {
        world.fake.behaviour.set(deaf());
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let guest = &launched.guest;
        let (one, two, three) = join!(stop(guest, 50, true), kill(guest), wait(guest));
        let reasons = [one.unwrap().reason, two.unwrap().reason, three.reason];
        assert_eq!(reasons, [Reason::Killed; 3]);
    });
}

#[test]
fn the_managers_end_takes_all_guests_with_it() {
    run(async |world| {
        let caller = world.caller();
        let _one = caller.launch("one").await.unwrap();
        let lifecycle = caller.new_guest("two").await.unwrap();
        caller.create(&lifecycle, crate::world::named("")).await.unwrap();
        let stranger = world.caller_as(false);
        let refused = stranger.manager.shutdown_request().send().promise.await.unwrap();
        assert_eq!(kind(read_completion(refused.get().unwrap())), Kind::PermissionDenied);
        assert_eq!(world.fake.alive(), 2);
        let done = caller.manager.shutdown_request().send().promise.await.unwrap();
        read_completion(done.get().unwrap()).unwrap();
        assert_eq!(world.fake.alive(), 0);
        world.manager.shutdown_asked().await;
    });
}
