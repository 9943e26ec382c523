//! Guests that fail: they begin again as their configuration says, and what is known of each failure is told.

use std::time::Duration;

use capnp::capability::FromClientHook;
use futures::join;
use sepal_guest_manager::component::Exit;
use sepal_schema::{
    config::{
        File, GuestConfig, OnPanic, Restart, RestartPolicy,
        device::{Backend, Share},
    },
    crash::{CrashReport, Registers},
    error::{Error, Kind, Outcome, read_completion},
    facet::{Bounds, Right},
    facet_capnp::facet,
    guest_capnp::{event, guest, observer::crashes_result},
    info::GuestStatus,
    report::{ComponentEnd, Reason, Rung},
};

use crate::{
    fake::{Behaviour, Does},
    power::Scene,
    world::{World, info, kill, named, observer, power, run, status, stop, wait},
};

/// A guest with this policy, which waits 1 to 4 ms, and twice at most.
fn restarting(policy: RestartPolicy) -> GuestConfig {
    GuestConfig {
        restart: Restart {
            policy,
            attempts: 2,
            delay_ms: 1,
            max_delay_ms: 4,
            healthy_ms: 3_600_000,
        },
        ..named("web")
    }
}

/// One that waits for longer than any test takes before it begins again.
fn patient(policy: RestartPolicy) -> GuestConfig {
    let config = restarting(policy);
    GuestConfig {
        restart: Restart {
            delay_ms: 3_600_000,
            max_delay_ms: 3_600_000,
            ..config.restart
        },
        ..config
    }
}

pub(crate) async fn crashes(guest: &guest::Client) -> Vec<CrashReport> {
    let answer = observer(guest).crashes_request().send().promise.await.unwrap();
    match answer.get().unwrap().which().unwrap() {
        crashes_result::Crashes(crashes) => {
            let crashes = crashes.unwrap().iter();
            crashes.map(|crash| CrashReport::read(crash).unwrap()).collect()
        }
        crashes_result::Error(error) => panic!("{}", Error::read(error.unwrap()).unwrap()),
    }
}

fn failure() -> Error {
    Error::new(Kind::VcpuRuntimeFailure, "vCPU 1 failed: two exceptions at once").about("vcpu1")
}

/// The guest's component dies in each of its runs until it is not begun again.
async fn dies_again_and_again(world: &World, scene: &Scene, runs: u64) {
    let before = info(scene.guest()).await.generation;
    for generation in before..before + runs {
        scene.heard.until("started", generation).await;
        world.fake.last().die(Exit::Signal(11));
    }
}

#[test]
fn a_component_that_dies_again_and_again_is_given_up() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            words: "INFO begun\nERROR out of luck\n",
            ..Behaviour::default()
        });
        let scene = Scene::new(&world, restarting(RestartPolicy::OnFailure)).await;
        let guest = scene.guest();
        dies_again_and_again(&world, &scene, 2).await;
        scene.heard.until("started", 3).await;
        let seen = info(guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Running, 3));
        assert_eq!((seen.upkeep.restarts, seen.upkeep.failures), (2, 2));
        assert_eq!(seen.stop.unwrap().reason, Reason::VmmTerminated);

        world.fake.last().print(b"the last I said\n");
        world.fake.last().die(Exit::Code(3));
        let report = wait(guest).await;
        assert_eq!(report.reason, Reason::VmmTerminated);
        assert!(
            report.detail.contains("3 times in a row") && report.detail.contains("status 3"),
            "{}",
            report.detail
        );
        let seen = info(guest).await;
        assert_eq!(seen.status, GuestStatus::CrashLoop);
        assert_eq!((seen.upkeep.restarts, seen.upkeep.failures), (2, 3));
        assert_eq!((world.fake.count(), world.fake.alive()), (3, 0));
        let crashed = ["crashed", "restarting", "starting", "started"];
        let mut expected = vec!["defined", "starting", "started"];
        expected.extend(crashed.iter().chain(&crashed));
        expected.extend(["crashed", "stopped"]);
        assert_eq!(scene.heard.kinds(), expected);

        let crashes = crashes(guest).await;
        let generations: Vec<_> = crashes.iter().map(|crash| crash.generation).collect();
        assert_eq!(generations, [3, 2, 1], "newest first");
        assert_eq!(crashes[0].report, report);
        assert_eq!(crashes[0].output, "the last I said\n");
        assert_eq!(crashes[2].report.component, Some(ComponentEnd::Killed(11)));
        assert!(crashes.iter().all(|crash| crash.last_lines == ["begun", "out of luck"]));
    });
}

#[test]
fn who_starts_it_anew_begins_a_new_row_and_the_crashes_before_are_still_known() {
    run(async |world| {
        let scene = Scene::new(&world, restarting(RestartPolicy::OnFailure)).await;
        dies_again_and_again(&world, &scene, 3).await;
        wait(scene.guest()).await;
        let config = restarting(RestartPolicy::OnFailure);
        let again = scene.caller.launch_config(config, false).await.unwrap();
        let seen = info(&again.guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Running, 4));
        assert_eq!((seen.upkeep.restarts, seen.upkeep.failures), (0, 0));
        assert_eq!(crashes(&again.guest).await.len(), 3);
        for generation in 4..6 {
            scene.heard.until("started", generation).await;
            world.fake.last().die(Exit::Signal(6));
        }
        scene.heard.until("started", 6).await;
        let crashes = crashes(&again.guest).await;
        let generations: Vec<_> = crashes.iter().map(|crash| crash.generation).collect();
        assert_eq!(generations, [5, 4, 3, 2], "four are kept");
        assert_eq!(status(&again.guest).await, GuestStatus::Running);
    });
}

#[test]
fn where_the_vcpus_were_is_known_of_a_guest_whose_vcpu_failed() {
    run(async |world| {
        let scene = Scene::new(&world, restarting(RestartPolicy::Never)).await;
        let at = |rip| Registers {
            rip,
            halted: rip == 10,
            ..Registers::default()
        };
        let process = world.fake.last();
        *process.registers.borrow_mut() = vec![(0, at(10)), (1, at(20))];
        process.finish(Err(failure()));
        let report = wait(scene.guest()).await;
        assert_eq!((report.reason, report.rung), (Reason::Crash, Rung::None));
        assert_eq!(status(scene.guest()).await, GuestStatus::Stopped);
        let crashes = crashes(scene.guest()).await;
        assert_eq!(crashes.len(), 1);
        assert_eq!(crashes[0].report.about, "vcpu1");
        assert_eq!(crashes[0].registers, [at(10), at(20)]);
    });
}

#[test]
fn of_a_crash_is_told_what_its_holder_may_see() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            words: "out of luck\n",
            ..Behaviour::default()
        });
        let scene = Scene::new(&world, restarting(RestartPolicy::Never)).await;
        let process = world.fake.last();
        process.print(b"a secret\n");
        *process.registers.borrow_mut() = vec![(0, Registers::default())];
        process.finish(Err(failure()));
        wait(scene.guest()).await;
        for (rights, output, inside) in [
            (&[Right::Observe][..], false, false),
            (&[Right::Observe, Right::Output], true, false),
            (&[Right::Observe, Right::Debug], false, true),
            (&[Right::Observe, Right::Output, Right::Debug], true, true),
        ] {
            let mut request = scene.guest().clone().cast_to::<facet::Client>().narrow_request();
            let bounds = Bounds {
                only: Some(rights.iter().copied().collect()),
                ..Bounds::default()
            };
            bounds.write(request.get().init_bounds());
            let answer = request.send().promise.await.unwrap();
            let narrowed = answer.get().unwrap().outcome().unwrap().get_facet().unwrap();
            let crash = crashes(&narrowed.cast_to()).await.remove(0);
            assert_eq!(crash.report.about, "vcpu1");
            assert_eq!(!crash.output.is_empty(), output, "{rights:?}");
            assert_eq!(
                (!crash.registers.is_empty(), !crash.last_lines.is_empty()),
                (inside, inside),
                "{rights:?}"
            );
        }
    });
}

#[test]
fn what_is_known_of_a_crash_is_there_when_the_crash_is_told() {
    run(async |world| {
        let scene = Scene::new(&world, patient(RestartPolicy::OnFailure)).await;
        world.fake.last().finish(Err(failure()));
        scene.heard.until("crashed", 1).await;
        assert_eq!(crashes(scene.guest()).await.len(), 1);
    });
}

#[test]
fn a_guest_that_ends_well_has_no_crashes_and_stays_ended() {
    run(async |world| {
        for (reason, policy) in [
            (Reason::Shutdown, RestartPolicy::OnFailure),
            (Reason::Reset, RestartPolicy::OnFailure),
            (Reason::Shutdown, RestartPolicy::Never),
        ] {
            let scene = Scene::new(&world, restarting(policy)).await;
            world.fake.last().end(reason);
            assert_eq!(wait(scene.guest()).await.reason, reason);
            assert!(crashes(scene.guest()).await.is_empty());
        }
    });
}

#[test]
fn a_guest_that_is_always_wanted_begins_again_unless_somebody_ends_it() {
    run(async |world| {
        let scene = Scene::new(&world, restarting(RestartPolicy::Always)).await;
        let guest = scene.guest();
        // More often than it might fail.
        for generation in 1..6 {
            scene.heard.until("started", generation).await;
            let reason = if generation % 2 == 0 {
                Reason::Shutdown
            } else {
                Reason::Reset
            };
            world.fake.last().end(reason);
        }
        scene.heard.until("started", 6).await;
        let seen = info(guest).await;
        assert_eq!((seen.upkeep.restarts, seen.upkeep.failures), (5, 0));
        let report = stop(guest, 60_000, false).await.unwrap();
        assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::Asked));

        let scene = Scene::new(&world, restarting(RestartPolicy::Always)).await;
        assert_eq!(kill(scene.guest()).await.unwrap().reason, Reason::Killed);
        assert_eq!(status(scene.guest()).await, GuestStatus::Stopped);
    });
}

#[test]
fn a_guest_that_waits_to_begin_again_can_be_stopped_and_reset() {
    run(async |world| {
        let scene = Scene::new(&world, patient(RestartPolicy::OnFailure)).await;
        let guest = scene.guest();
        world.fake.last().die(Exit::Signal(11));
        scene.heard.until("restarting", 1).await;
        let seen = info(guest).await;
        assert_eq!((seen.status, seen.upkeep.failures), (GuestStatus::Starting, 1));
        let reset = power(guest).reset_request().send().promise.await.unwrap();
        read_completion(reset.get().unwrap()).unwrap();
        assert_eq!(info(guest).await.generation, 2);

        world.fake.last().die(Exit::Signal(11));
        scene.heard.until("restarting", 2).await;
        let report = kill(guest).await.unwrap();
        assert_eq!(report.reason, Reason::Killed);
        assert_eq!((world.fake.count(), world.fake.alive()), (2, 0));
    });
}

#[test]
fn who_launches_a_guest_that_cannot_run_is_told_at_once() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Fails(Kind::NoResources),
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launched = caller.launch_config(patient(RestartPolicy::Always), false).await;
        assert_eq!(launched.err().unwrap().kind, Kind::NoResources);
        assert_eq!(world.fake.count(), 1);
        let crashes = crashes(&caller.lookup("web").await.unwrap()).await;
        assert_eq!(crashes[0].report.reason, Reason::StartFailed);
    });
}

#[test]
fn a_guest_that_ran_and_cannot_be_created_again_has_failed() {
    run(async |world| {
        let scene = Scene::new(&world, restarting(RestartPolicy::OnFailure)).await;
        world.fake.behaviour.set(Behaviour {
            create: Does::Fails(Kind::NoResources),
            ..Behaviour::default()
        });
        world.fake.last().die(Exit::Signal(11));
        let report = wait(scene.guest()).await;
        assert_eq!(report.reason, Reason::StartFailed);
        assert_eq!(report.error.unwrap().kind, Kind::NoResources);
        let seen = info(scene.guest()).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::CrashLoop, 3));
    });
}

#[test]
fn who_insists_does_not_wait_to_hear_what_kept_it_from_running() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            start: Does::Fails(Kind::StartFailure),
            ..Behaviour::default()
        });
        let caller = world.caller();
        // A file that is not there yet, then a component that does not start, then all is well.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        let mut config = restarting(RestartPolicy::OnFailure);
        config.kernel = File::Path(path.to_str().unwrap().into());
        config.restart.attempts = 1000;
        let lifecycle = caller.new_guest("web").await.unwrap();
        let slot = world.manager.registry(|registry, _| registry.lookup("web")).unwrap();
        let slot = world.manager.slot(slot).unwrap();
        let client = sepal_guest_manager::client::Client::new(
            sepal_schema::transport::FdTable::none(),
            sepal_guest_manager::client::Who {
                uid: 0,
                gid: 0,
                pid: None,
                share: None,
            },
            sepal_guest_manager::roles::Role::Admin,
        );
        let guest = slot.create(config, &client, true).unwrap();
        guest.insist();
        let failures = || world.manager.info(slot.id, None).unwrap().upkeep.failures;
        let failed = async |times| {
            while failures() < times {
                world.handle.sleep(Duration::from_millis(1)).await;
            }
        };
        failed(1).await;
        assert_eq!(world.fake.requests.borrow().len(), 0);
        std::fs::write(&path, "image").unwrap();
        while world.fake.requests.borrow().is_empty() {
            world.handle.sleep(Duration::from_millis(1)).await;
        }
        world.fake.behaviour.set(Behaviour::default());
        guest.started().await.unwrap();
        assert!(guest.generation() > 2);
        drop(lifecycle);
        guest.ended().await;
    });
}

#[test]
fn a_panic_is_a_failure_where_there_is_a_policy() {
    run(async |world| {
        let config = GuestConfig {
            panic_device: true,
            on_panic: OnPanic::Restart,
            ..restarting(RestartPolicy::OnFailure)
        };
        let scene = Scene::new(&world, config).await;
        for generation in 1..=3 {
            scene.heard.until("started", generation).await;
            let process = world.fake.last();
            process.print(b"Kernel panic - not syncing\n");
            process
                .tell(|mut event| event.set_guest_panicked(event::Panic::Panicked))
                .await;
        }
        let report = wait(scene.guest()).await;
        assert_eq!(report.reason, Reason::Crash);
        assert!(
            report.detail.starts_with("it failed 3 times in a row"),
            "{}",
            report.detail
        );
        assert_eq!(status(scene.guest()).await, GuestStatus::CrashLoop);
        let crashes = crashes(scene.guest()).await;
        assert_eq!(crashes[0].output, "Kernel panic - not syncing\n".repeat(3));
    });
}

#[test]
fn two_runs_of_which_one_was_good_are_no_row() {
    run(async |world| {
        let mut config = restarting(RestartPolicy::OnFailure);
        config.restart.attempts = 1;
        config.restart.healthy_ms = 1;
        let scene = Scene::new(&world, config).await;
        for generation in 1..5 {
            scene.heard.until("started", generation).await;
            while info(scene.guest()).await.uptime_ns < 1_000_000 {}
            world.fake.last().die(Exit::Signal(11));
        }
        scene.heard.until("started", 5).await;
        let seen = info(scene.guest()).await;
        assert_eq!((seen.upkeep.restarts, seen.upkeep.failures), (4, 1));
    });
}

#[test]
fn what_serves_one_run_only_is_refused_where_more_are_wanted() {
    run(async |world| {
        let caller = world.caller();
        let share = Share {
            tag: "files".into(),
            backend: Backend::Socket(std::os::unix::net::UnixStream::pair().unwrap().0.into()),
            queues: 0,
        };
        let config = GuestConfig {
            shares: vec![share],
            ..restarting(RestartPolicy::OnFailure)
        };
        let error = caller.launch_config(config, false).await.err().unwrap();
        assert_eq!(
            (error.kind, &error.about[..]),
            (Kind::NotSupported, "shares[0].backend")
        );
    });
}

#[test]
fn what_would_create_a_guest_again_is_told() {
    run(async |world| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        std::fs::write(&path, "image").unwrap();
        let caller = world.caller();
        let config = GuestConfig {
            kernel: File::Fd(std::fs::File::open(&path).unwrap().into()),
            initrd: File::Fd(tempfile::tempfile().unwrap().into()),
            cmdline: "quiet".into(),
            ..restarting(RestartPolicy::Always)
        };
        let wanted = config.restart;
        let launched = caller.launch_config(config, false).await.unwrap();
        let observer = observer(&launched.guest);
        let (answer, seen) = join!(observer.configuration_request().send().promise, info(&launched.guest));
        let answer = answer.unwrap();
        let answer = answer.get().unwrap().outcome().unwrap();
        let missing: Vec<_> = answer
            .get_missing()
            .unwrap()
            .iter()
            .map(|field| field.unwrap().to_string().unwrap())
            .collect();
        assert_eq!(missing, ["initrd"]);
        let told = GuestConfig::decode(answer.get_config().unwrap(), &caller.connection.fds()).unwrap();
        assert!(matches!(&told.kernel, File::Path(told) if **told == *path.to_str().unwrap()));
        assert_eq!(
            (&told.name[..], &told.cmdline[..], told.restart),
            ("web", "quiet", wanted)
        );
        assert_eq!(told.uuid, seen.upkeep.uuid);
    });
}
