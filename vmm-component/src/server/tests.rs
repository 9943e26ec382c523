//! The component's server over a real connection, with machines that only pretend: the behaviour that Fuchsia's controller tests ask for,
//! and one test for each weakness of that controller.

mod endings;
mod looking;
mod successors;
mod world;

use std::{
    pin::pin,
    sync::{atomic::Ordering, mpsc},
};

use futures::{FutureExt, channel::oneshot, future};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    guest_capnp::{event_sink, observer},
    info::{GuestInfo, read_layers},
    report::{Reason, StopReport},
    transport::guard,
};

use crate::machine::{Happening, RegisterDump, ResetCause};
use world::{Build, bench, is_pending, kind};

// The ten tests of Fuchsia's controller.

#[test]
fn a_disconnect_ends_everything() {
    for running in [false, true] {
        bench(|bench| async move {
            bench.create().await.unwrap();
            let run = bench.lifecycle.run_request().send();
            if running {
                bench.until_running().await;
            }
            drop((run, bench.component, bench.lifecycle, bench.connection));
            bench.exited.await.unwrap();
            assert_eq!(bench.world.alive.load(Ordering::SeqCst), 0);
        });
    }
}

#[test]
fn a_bad_second_create_leaves_nothing() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let bad = bench
            .create_with(|params| params.get_config().unwrap().set_cpus(65))
            .await;
        assert_eq!(bad.unwrap_err().about, "cpus");
        assert_eq!(kind(bench.run().await), Kind::NotCreated);
        assert_eq!(bench.world.alive.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn create_while_running_is_refused_and_the_run_stays_pending() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let mut run = pin!(bench.run());
        bench.until_running().await;
        assert_eq!(kind(bench.create().await), Kind::AlreadyRunning);
        assert!(is_pending(&mut run, &bench).await);
    });
}

#[test]
fn run_before_create_is_refused() {
    bench(|bench| async move {
        assert_eq!(kind(bench.run().await), Kind::NotCreated);
    });
}

#[test]
fn a_second_run_is_refused_and_the_first_stays_pending() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let mut first = pin!(bench.run());
        assert_eq!(kind(bench.run().await), Kind::AlreadyRunning);
        assert!(is_pending(&mut first, &bench).await);
    });
}

#[test]
fn a_vcpu_that_cannot_start_leaves_nothing() {
    bench(|bench| async move {
        bench.world.start_fails.store(true, Ordering::SeqCst);
        bench.create().await.unwrap();
        let observer = bench.observer();
        assert_eq!(kind(bench.run().await), Kind::VcpuStartFailure);
        assert_eq!(ending(&observer).await.reason, Reason::StartFailed);
        assert_eq!(kind(bench.run().await), Kind::NotCreated);
    });
}

#[test]
fn stop_answers_with_nothing_created() {
    bench(|bench| async move {
        bench.stop().await.unwrap();
    });
}

#[test]
fn stop_answers_for_a_guest_that_never_ran() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        bench.stop().await.unwrap();
        assert_eq!(bench.world.alive.load(Ordering::SeqCst), 0);
    });
}

async fn ending(observer: &observer::Client) -> StopReport {
    let answer = observer.wait_request().send().promise.await.unwrap();
    StopReport::read_result(answer.get().unwrap()).unwrap()
}

#[test]
fn a_forced_stop_ends_the_run_and_tells_who_holds_the_guest() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        let run = bench.run();
        bench.until_running().await;
        bench.stop().await.unwrap();
        assert_eq!(kind(run.await), Kind::ControllerForcedHalt);
        let report = ending(&observer).await;
        assert_eq!(report.reason, Reason::Killed);
        assert_eq!(report.error.unwrap().kind, Kind::ControllerForcedHalt);
    });
}

#[test]
fn a_clean_shutdown_ends_the_run_and_the_guest() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        let run = bench.run();
        bench.until_running().await;
        bench.world.report(1, Happening::Shutdown);
        assert_eq!(run.await.unwrap().reason, Reason::Shutdown);
        let report = ending(&observer).await;
        assert_eq!((report.reason, report.error), (Reason::Shutdown, None));
        assert_eq!(kind(bench.run().await), Kind::NotCreated);
    });
}

// What that controller does not do well.

#[test]
fn stop_answers_after_the_machine_is_gone_and_create_may_follow() {
    bench(|bench| async move {
        for _ in 0..20 {
            bench.create().await.unwrap();
            let run = bench.run();
            let (release, held) = mpsc::channel();
            *bench.world.hold_tear_down.lock().unwrap() = Some(held);
            let mut stop = pin!(bench.stop());
            assert!(
                is_pending(&mut stop, &bench).await,
                "stop is answered before the machine is gone"
            );
            release.send(()).unwrap();
            stop.await.unwrap();
            assert_eq!(bench.world.alive.load(Ordering::SeqCst), 0);
            assert_eq!(kind(run.await), Kind::ControllerForcedHalt);
        }
    });
}

#[test]
fn what_an_older_machine_reports_does_not_end_the_newer_one() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let first = bench.run();
        bench.until_running().await;
        bench.stop().await.unwrap();
        assert_eq!(kind(first.await), Kind::ControllerForcedHalt);
        bench.create().await.unwrap();
        let mut second = pin!(bench.run());
        for _ in 0..3 {
            bench.world.report(1, Happening::Shutdown);
            bench.world.report(
                1,
                Happening::Reset {
                    how: ResetCause::TripleFault,
                },
            );
        }
        assert!(is_pending(&mut second, &bench).await);
        bench.world.report(2, Happening::Reset { how: ResetCause::I8042 });
        assert_eq!(second.await.unwrap().reason, Reason::Reset);
    });
}

#[test]
fn stop_interrupts_a_create() {
    for ready in [false, true] {
        bench(|bench| async move {
            bench
                .world
                .builds
                .lock()
                .unwrap()
                .push_back(Build::UntilCancelled { ready });
            let create = bench.create();
            let run = bench.run();
            bench
                .wait_for("the build", |world| world.building.load(Ordering::SeqCst) == 1)
                .await;
            bench.stop().await.unwrap();
            assert_eq!(kind(create.await), Kind::Cancelled);
            assert_eq!(kind(run.await), Kind::NotCreated);
            assert_eq!(bench.world.alive.load(Ordering::SeqCst), 0);
            bench.create().await.unwrap();
        });
    }
}

#[test]
fn a_device_that_breaks_is_noticed_and_the_guest_goes_on() {
    bench(|bench| async move {
        let (sender, receiver) = oneshot::channel();
        let sink: event_sink::Client = guard::new_client(Sink(std::cell::RefCell::new(Some(sender))));
        bench
            .create_with(|params| params.get_host().unwrap().set_events(sink))
            .await
            .unwrap();
        let mut run = pin!(bench.run());
        bench.until_running().await;
        bench.world.report(
            1,
            Happening::DeviceFailed {
                device: "serial".into(),
                reason: "a panic".into(),
            },
        );
        assert_eq!(receiver.await.unwrap(), ("serial".into(), "a panic".into()));
        assert!(is_pending(&mut run, &bench).await);
    });
}

struct Sink(std::cell::RefCell<Option<oneshot::Sender<(String, String)>>>);

impl event_sink::Server for Sink {
    async fn event(self: capnp::capability::Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        use sepal_schema::guest_capnp::event::Which;
        if let Which::DeviceFailed(failed) = params.get()?.get_event()?.which()? {
            let told = (failed.get_device()?.to_string()?, failed.get_reason()?.to_string()?);
            if let Some(sender) = self.0.borrow_mut().take() {
                let _ = sender.send(told);
            }
        }
        Ok(())
    }
}

#[test]
fn a_query_never_waits_behind_a_job() {
    bench(|bench| async move {
        bench
            .world
            .builds
            .lock()
            .unwrap()
            .push_back(Build::UntilCancelled { ready: false });
        let create = bench.create();
        let answer = bench.component.layers_request().send().promise.await.unwrap();
        let layers = read_layers(answer.get().unwrap().get_layers().unwrap()).unwrap();
        assert_eq!(layers[0].name, "seccomp");
        bench.stop().await.unwrap();
        assert_eq!(kind(create.await), Kind::Cancelled);
    });
}

// And the rest of the contract.

#[test]
fn create_bind_run_and_stop_in_one_round_trip() {
    bench(|bench| async move {
        let create = bench.create();
        let observer = bench.observer();
        let run = bench.run();
        let stop = bench.stop();
        let (create, run, stop) = future::join3(create, run, stop).await;
        // The stop may overtake the build; nothing is lost either way.
        assert!(
            matches!(
                create,
                Ok(())
                    | Err(Error {
                        kind: Kind::Cancelled,
                        ..
                    })
            ),
            "{create:?}"
        );
        assert!(matches!(kind(run), Kind::NotCreated | Kind::ControllerForcedHalt));
        stop.unwrap();
        // Bound to the guest that was stopped, or broken because there never was one.
        if let Ok(answer) = observer.wait_request().send().promise.await {
            assert_eq!(
                StopReport::read_result(answer.get().unwrap()).unwrap().reason,
                Reason::Killed
            );
        }
    });
}

#[test]
fn bind_without_a_guest_says_why() {
    bench(|bench| async move {
        let Err(error) = bench.guest().power_request().send().promise.await else {
            panic!("there is a guest");
        };
        assert!(error.to_string().contains("NOT_CREATED"), "{error}");
    });
}

#[test]
fn a_create_that_fails_or_panics_says_so_and_leaves_nothing() {
    bench(|bench| async move {
        bench
            .world
            .builds
            .lock()
            .unwrap()
            .extend([Build::Fail(Kind::KernelLoadFailure), Build::Panic]);
        assert_eq!(kind(bench.create().await), Kind::KernelLoadFailure);
        assert_eq!(kind(bench.create().await), Kind::InternalError);
        assert_eq!(kind(bench.run().await), Kind::NotCreated);
        bench.create().await.unwrap();
    });
}

#[test]
fn a_vcpu_that_fails_is_a_crash_with_its_reason() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        let run = bench.run();
        bench.until_running().await;
        let registers = Box::<RegisterDump>::default();
        bench.world.report(
            1,
            Happening::VcpuFailed {
                vcpu: 3,
                reason: "emulation failure".into(),
                registers,
            },
        );
        let error = run.await.unwrap_err();
        assert_eq!(error.kind, Kind::VcpuRuntimeFailure);
        assert_eq!(error.message, "vCPU 3 failed: emulation failure");
        assert_eq!(ending(&observer).await.reason, Reason::Crash);
    });
}

#[test]
fn power_is_for_a_guest_that_runs() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let power = bench.guest().power_request().send().pipeline.get_power();
        let press = || {
            let answer = power.shutdown_request().send().promise;
            async move { read_completion(answer.await.unwrap().get().unwrap()) }
        };
        assert_eq!(kind(press().await), Kind::NotRunning);
        let run = bench.run();
        bench.until_running().await;
        press().await.unwrap();
        assert_eq!(bench.world.buttons.load(Ordering::SeqCst), 1);
        let paused = power.pause_request().send().promise.await.unwrap();
        read_completion(paused.get().unwrap()).unwrap();
        let info = bench.observer().info_request().send().promise.await.unwrap();
        assert!(GuestInfo::read_result(info.get().unwrap()).unwrap().paused);
        let resumed = power.resume_request().send().promise.await.unwrap();
        read_completion(resumed.get().unwrap()).unwrap();
        power.kill_request().send().promise.await.unwrap();
        assert_eq!(kind(run.await), Kind::ControllerForcedHalt);
        // A newer guest is none of this capability's business.
        bench.create().await.unwrap();
        let mut newer = pin!(bench.run().fuse());
        assert_eq!(kind(press().await), Kind::NotRunning);
        power.kill_request().send().promise.await.unwrap();
        assert!(is_pending(&mut newer, &bench).await);
    });
}

#[test]
fn a_guest_that_ends_while_it_is_paused_is_not_paused_any_more() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        let power = bench.guest().power_request().send().pipeline.get_power();
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        let paused = power.pause_request().send().promise.await.unwrap();
        read_completion(paused.get().unwrap()).unwrap();
        power.kill_request().send().promise.await.unwrap();
        let info = observer.info_request().send().promise.await.unwrap();
        assert!(!GuestInfo::read_result(info.get().unwrap()).unwrap().paused);
    });
}

#[test]
fn news_of_a_pause_that_a_resume_overtook_are_old() {
    bench(|bench| async move {
        let (sender, receiver) = oneshot::channel();
        let sink: event_sink::Client = guard::new_client(Sink(std::cell::RefCell::new(Some(sender))));
        bench
            .create_with(|params| params.get_host().unwrap().set_events(sink))
            .await
            .unwrap();
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        bench.world.report(1, Happening::Paused);
        // News are taken in order: once this one is through, so is the other.
        bench.world.report(
            1,
            Happening::DeviceFailed {
                device: "serial".into(),
                reason: "a panic".into(),
            },
        );
        receiver.await.unwrap();
        let info = bench.observer().info_request().send().promise.await.unwrap();
        assert!(!GuestInfo::read_result(info.get().unwrap()).unwrap().paused, "it runs");
    });
}

#[test]
fn what_only_a_manager_may_leave_out_is_refused() {
    bench(|bench| async move {
        let outcome = bench.create_with(|params| {
            params.get_config().unwrap().init_kernel().set_path("/vmlinux");
        });
        let error = outcome.await.unwrap_err();
        assert_eq!((error.kind, error.about.as_str()), (Kind::BadConfig, "kernel"));
        let outcome = bench.create_with(|params| params.get_config().unwrap().init_kernel().set_none(()));
        assert_eq!(outcome.await.unwrap_err().about, "kernel");
    });
}
