//! Panics, failures, and the rungs of the ladder: what a guest's holder sees of them.

use futures::join;
use sepal_schema::{
    config::{GuestConfig, OnPanic, OnReset},
    error::{Error, Kind},
    info::GuestStatus,
    news::Panic,
    report::{Reason, Rung},
};

use crate::{
    fake::{Behaviour, Does, Process},
    power::{Scene, on_reset, resume},
    world::{impatient, info, named, run, status, stop, wait, with},
};

fn on_panic(on_panic: OnPanic) -> GuestConfig {
    GuestConfig {
        panic_device: true,
        on_panic,
        ..named("web")
    }
}

async fn panic(process: &Process) {
    process
        .tell(|mut event| event.set_guest_panicked(Panic::Panicked))
        .await;
}

#[test]
fn a_panic_is_only_told_unless_the_configuration_says_more() {
    run(async |world| {
        let scene = Scene::new(&world, on_panic(OnPanic::Leave)).await;
        panic(&world.fake.last()).await;
        scene.heard.until("panicked", 1).await;
        assert_eq!(status(scene.guest()).await, GuestStatus::Running);
    });
}

#[test]
fn a_panic_may_stop_the_guest() {
    run(async |world| {
        let scene = Scene::new(&world, on_panic(OnPanic::Stop)).await;
        panic(&world.fake.last()).await;
        let report = wait(scene.guest()).await;
        assert_eq!((report.reason, report.rung), (Reason::Crash, Rung::Forced));
        assert!(report.detail.contains("kernel panicked"), "{}", report.detail);
        scene.heard.until("stopped", 1).await;
        let expected = ["defined", "starting", "started", "panicked", "shutting-down", "stopped"];
        assert_eq!(scene.heard.kinds(), expected);
    });
}

#[test]
fn a_panic_may_restart_the_guest() {
    run(async |world| {
        let scene = Scene::new(&world, on_panic(OnPanic::Restart)).await;
        panic(&world.fake.last()).await;
        scene.heard.until("started", 2).await;
        let before = info(scene.guest()).await.stop.unwrap();
        assert_eq!(before.reason, Reason::Crash);
        assert!(before.detail.contains("kernel panicked"), "{}", before.detail);
        let expected = [
            "defined",
            "starting",
            "started",
            "panicked",
            "restarting",
            "starting",
            "started",
        ];
        assert_eq!(scene.heard.kinds(), expected);
    });
}

#[test]
fn a_panic_may_pause_the_guest() {
    run(async |world| {
        let scene = Scene::new(&world, on_panic(OnPanic::Pause)).await;
        panic(&world.fake.last()).await;
        scene.heard.until("paused", 1).await;
        assert!(info(scene.guest()).await.paused);
        resume(scene.guest()).await;
        scene.heard.until("resumed", 1).await;
    });
}

#[test]
fn the_report_says_which_rung_it_took() {
    with(impatient(), async |world| {
        let caller = world.caller();
        let deaf = Behaviour {
            button: Does::Hangs,
            ..Behaviour::default()
        };
        let dead = Behaviour {
            stop: Does::Hangs,
            ..deaf
        };
        for (behaviour, expected) in [
            (Behaviour::default(), (Reason::Shutdown, Rung::Asked)),
            (deaf, (Reason::Hangup, Rung::Forced)),
            (dead, (Reason::Hangup, Rung::Killed)),
        ] {
            world.fake.behaviour.set(behaviour);
            let launched = caller.launch("web").await.unwrap();
            let report = stop(&launched.guest, 50, true).await.unwrap();
            assert_eq!((report.reason, report.rung), expected);
        }
        // What it does by itself is no rung, also where somebody kills it at the same time.
        world.fake.behaviour.set(Behaviour::default());
        let launched = caller.launch("web").await.unwrap();
        world.fake.last().end(Reason::Shutdown);
        let report = wait(&launched.guest).await;
        assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::None));
    });
}

#[test]
fn a_guest_that_is_being_created_is_waited_for_and_asked() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launch = caller.launch("web");
        let end = async {
            let guest = loop {
                if let Ok(guest) = caller.lookup("web").await {
                    break guest;
                }
            };
            let error = stop(&guest, 50, false).await.unwrap_err();
            assert_eq!(error.kind, Kind::TimedOut);
            assert!(error.message.contains("was not created"), "{error}");
            stop(&guest, 50, true).await.unwrap()
        };
        let (launched, report) = join!(launch, end);
        assert!(launched.is_err());
        assert_eq!((report.reason, report.rung), (Reason::Hangup, Rung::Forced));
    });
}

#[test]
fn the_ladder_goes_on_with_a_guest_that_begins_again() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            button: Does::Hangs,
            ..Behaviour::default()
        });
        let scene = Scene::new(&world, on_reset(OnReset::Restart)).await;
        let reboot = async {
            world.fake.last().was_pressed().await;
            // The next one listens.
            world.fake.behaviour.set(Behaviour::default());
            world.fake.last().end(Reason::Reset);
        };
        let (report, ()) = join!(stop(scene.guest(), 0, false), reboot);
        let report = report.unwrap();
        assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::Asked));
        assert_eq!(world.fake.count(), 2);
    });
}

#[test]
fn failures_are_told_before_what_follows() {
    run(async |world| {
        let scene = Scene::new(&world, named("web")).await;
        let failure = Error::new(Kind::VcpuRuntimeFailure, "vCPU 1 failed").about("vcpu 1");
        world.fake.last().finish(Err(failure));
        let report = wait(scene.guest()).await;
        assert_eq!((report.reason, &report.about[..]), (Reason::Crash, "vcpu1"));
        scene.heard.until("stopped", 1).await;
        assert_eq!(scene.heard.kinds()[3..], ["crashed", "stopped"]);

        let scene = Scene::new(&world, named("db")).await;
        world.fake.last().die(sepal_guest_manager::component::Exit::Signal(11));
        assert_eq!(wait(scene.guest()).await.reason, Reason::VmmTerminated);
        scene.heard.until("stopped", 1).await;
        assert_eq!(scene.heard.kinds()[3..], ["crashed", "stopped"]);
    });
}
