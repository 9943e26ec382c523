//! launch, leases, names, what is remembered.

use futures::join;
use sepal_guest_manager::{component::Exit, manager::Settings, registry::Limits};
use sepal_schema::{
    config::GuestConfig,
    error::{Error, Kind, read_completion},
    info::{GuestStatus, LayerState},
    report::Reason,
};

use crate::{
    fake::{Behaviour, Does},
    world::{Launched, info, kill, named, observer, power, read, run, status, stop, wait, with},
};

fn kind<T>(result: Result<T, Error>) -> Kind {
    result.err().unwrap().kind
}

async fn detach(launched: &Launched) -> Result<(), Error> {
    read_completion(launched.lease.detach_request().send().promise.await?.get()?)
}

#[test]
fn a_guest_runs_and_shuts_down() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        assert_eq!(launched.name, "web");
        assert_eq!(status(&launched.guest).await, GuestStatus::Running);
        let report = stop(&launched.guest, 0, false).await.unwrap();
        assert_eq!(
            (report.reason, report.uptime_ns, report.error),
            (Reason::Shutdown, 7, None)
        );
        assert_eq!(world.fake.last().pressed(), 1);
        assert_eq!(world.fake.alive(), 0, "a launched guest's component ends with it");
        assert_eq!(wait(&launched.guest).await.reason, Reason::Shutdown);
    });
}

#[test]
fn a_guest_is_described_completely() {
    run(async |world| {
        let caller = world.caller();
        let config = GuestConfig {
            cmdline: "quiet".into(),
            cpus: 2,
            memory_mib: 64,
            ..named("web")
        };
        let launched = caller.launch_config(config, true).await.unwrap();
        // Layers and descriptor are asked for in the background.
        let info = loop {
            let info = info(&launched.guest).await;
            if !info.layers.is_empty() && !info.descriptor.as_ref().unwrap().devices.is_empty() {
                break info;
            }
        };
        assert_eq!(
            (&info.name[..], info.status, info.generation),
            ("web", GuestStatus::Running, 1)
        );
        assert!(info.uptime_ns > 0 && info.stop.is_none() && info.detached && !info.paused);
        assert_eq!(info.component_pid, world.fake.last().pid);
        let descriptor = info.descriptor.unwrap();
        assert_eq!((descriptor.cpus, descriptor.memory_mib), (2, 64));
        assert_eq!(
            (&descriptor.kernel[..], &descriptor.cmdline[..]),
            ("embedded", "quiet added")
        );
        assert_eq!(descriptor.devices, ["serial", "rtc"]);
        assert_eq!(info.layers[1].state, LayerState::Waived);
        assert!(
            info.problems.iter().any(|problem| problem.contains("cgroup")),
            "{:?}",
            info.problems
        );
        kill(&launched.guest).await.unwrap();
        let info = self::info(&launched.guest).await;
        assert_eq!((info.component_pid, info.layers.len(), info.uptime_ns), (0, 0, 0));
    });
}

#[test]
fn a_name_can_be_launched_again_at_once_after_a_force_shutdown() {
    run(async |world| {
        let caller = world.caller();
        let _first = caller.launch("web").await.unwrap();
        assert_eq!(kind(caller.launch("web").await), Kind::AlreadyRunning);
        assert_eq!(kind(caller.new_guest("web").await), Kind::AlreadyRunning);
        for generation in 2..5 {
            caller.force_shutdown("web").await.unwrap();
            assert_eq!(world.fake.alive(), 0);
            assert_eq!(kind(caller.force_shutdown("web").await), Kind::NotRunning);
            let launched = caller.launch_config(named("web"), true).await.unwrap();
            assert_eq!(info(&launched.guest).await.generation, generation);
        }
        assert_eq!(kind(caller.force_shutdown("nobody").await), Kind::NotRunning);
    });
}

#[test]
fn dropping_the_lease_stops_the_guest() {
    run(async |world| {
        let caller = world.caller();
        let Launched { guest, lease, .. } = caller.launch("web").await.unwrap();
        drop(lease);
        let report = wait(&guest).await;
        assert_eq!(report.reason, Reason::Killed);
        assert!(report.detail.contains("lease"), "{}", report.detail);
        assert_eq!(report.error.unwrap().kind, Kind::ControllerForcedHalt);
        assert_eq!(world.fake.alive(), 0);
    });
}

#[test]
fn a_lost_connection_stops_what_it_launched_unless_detached() {
    run(async |world| {
        let watcher = world.caller();
        let caller = world.caller();
        let _leased = caller.launch("leased").await.unwrap();
        let detached = caller.launch("detached").await.unwrap();
        detach(&detached).await.unwrap();
        let _from_the_start = caller.launch_config(named("from-the-start"), true).await.unwrap();
        let leased = watcher.lookup("leased").await.unwrap();
        drop(caller);
        assert_eq!(wait(&leased).await.reason, Reason::Killed);
        for name in ["detached", "from-the-start"] {
            let guest = watcher.lookup(name).await.unwrap();
            let info = info(&guest).await;
            assert_eq!((info.status, info.detached), (GuestStatus::Running, true));
        }
        assert_eq!(world.fake.alive(), 2);
    });
}

#[test]
fn a_launch_that_nobody_waits_for_any_more_is_stopped() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let (watcher, caller) = (world.caller(), world.caller());
        let launch = caller.launch("web");
        let gone = async {
            let guest = loop {
                if let Ok(guest) = watcher.lookup("web").await {
                    break guest;
                }
            };
            caller.connection.disconnect();
            wait(&guest).await
        };
        let (launched, report) = join!(launch, gone);
        assert!(launched.is_err());
        assert_eq!(report.reason, Reason::Killed);
        assert_eq!(world.fake.alive(), 0);
    });
}

#[test]
fn names_are_chosen_checked_and_limited() {
    let limits = Limits {
        guests: 2,
        ..Limits::default()
    };
    with(
        Settings {
            limits,
            ..Settings::default()
        },
        async |world| {
            let caller = world.caller();
            let first = caller.launch("").await.unwrap();
            assert_eq!(first.name, "guest-1");
            assert_eq!(kind(caller.launch("../etc").await), Kind::BadConfig);
            let _second = caller.new_guest("").await.unwrap();
            assert_eq!(kind(caller.launch("third").await), Kind::NoResources);
            kill(&first.guest).await.unwrap();
            caller.launch("third").await.unwrap();
        },
    );
}

#[test]
fn an_ended_guest_is_remembered_until_it_is_removed() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        world.fake.last().print(b"last words");
        assert_eq!(kind(caller.remove("web").await), Kind::AlreadyRunning);
        world.fake.last().end(Reason::Reset);
        wait(&launched.guest).await;
        drop(launched);
        let guest = caller.lookup("web").await.unwrap();
        let info = info(&guest).await;
        assert_eq!(
            (info.status, info.stop.unwrap().reason),
            (GuestStatus::Stopped, Reason::Reset)
        );
        assert_eq!(read(&guest, 0, true).await, (b"last words".to_vec(), true));
        assert_eq!(kind(kill(&guest).await), Kind::NotRunning);
        assert_eq!(kind(stop(&guest, 0, true).await), Kind::NotRunning);
        let pause = power(&guest).pause_request().send().promise.await.unwrap();
        assert_eq!(kind(read_completion(pause.get().unwrap())), Kind::NotRunning);
        caller.remove("web").await.unwrap();
        assert_eq!(kind(caller.lookup("web").await), Kind::NotFound);
        assert_eq!(kind(caller.remove("web").await), Kind::NotFound);
        // Who holds it still knows how it ended.
        assert_eq!(wait(&guest).await.reason, Reason::Reset);
        assert_eq!(self::info(&guest).await.status, GuestStatus::Stopped);
    });
}

#[test]
fn the_oldest_ended_guests_are_forgotten() {
    let limits = Limits {
        remembered: 2,
        ..Limits::default()
    };
    with(
        Settings {
            limits,
            ..Settings::default()
        },
        async |world| {
            let caller = world.caller();
            for name in ["a", "b", "c"] {
                let launched = caller.launch(name).await.unwrap();
                kill(&launched.guest).await.unwrap();
            }
            let names: Vec<String> = caller.list().await.into_iter().map(|info| info.name).collect();
            assert_eq!(names, ["b", "c"]);
        },
    );
}

#[test]
fn what_keeps_a_guest_from_starting_is_told_and_remembered() {
    run(async |world| {
        let caller = world.caller();
        let cases = [
            (
                Behaviour {
                    start: Does::Fails(Kind::StartFailure),
                    ..Behaviour::default()
                },
                Kind::StartFailure,
            ),
            (
                Behaviour {
                    create: Does::Fails(Kind::KernelLoadFailure),
                    ..Behaviour::default()
                },
                Kind::KernelLoadFailure,
            ),
            (
                Behaviour {
                    run: Does::Fails(Kind::VcpuStartFailure),
                    ..Behaviour::default()
                },
                Kind::VcpuStartFailure,
            ),
        ];
        for (behaviour, expected) in cases {
            world.fake.behaviour.set(behaviour);
            assert_eq!(kind(caller.launch("web").await), expected);
            let infos = caller.list().await;
            let stop = infos[0].stop.as_ref().unwrap();
            assert_eq!(
                (infos[0].status, stop.reason),
                (GuestStatus::Stopped, Reason::StartFailed)
            );
            assert_eq!((stop.error.as_ref().unwrap().kind, stop.uptime_ns), (expected, 0));
            assert_eq!(world.fake.alive(), 0);
        }
        world.fake.behaviour.set(Behaviour::default());
        caller.launch("web").await.unwrap();
    });
}

#[test]
fn a_guest_that_ends_at_once_was_launched_all_the_same() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            quick: true,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launched = caller.launch("quick").await.unwrap();
        assert_eq!(wait(&launched.guest).await.reason, Reason::Shutdown);
    });
}

#[test]
fn queries_do_not_wait_for_a_component_that_never_answers() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launch = caller.launch("stuck");
        let look = async {
            let guest = loop {
                if let Ok(guest) = caller.lookup("stuck").await {
                    break guest;
                }
            };
            assert_eq!(caller.list().await[0].status, GuestStatus::Starting);
            assert_eq!(status(&guest).await, GuestStatus::Starting);
            assert_eq!(read(&guest, 0, false).await, (Vec::new(), false));
            assert_eq!(kill(&guest).await.unwrap().reason, Reason::Killed);
        };
        let (launched, ()) = join!(launch, look);
        assert_eq!(kind(launched), Kind::ControllerForcedHalt);
    });
}

#[test]
fn a_running_guests_component_that_dies_is_told_with_its_last_words() {
    run(async |world| {
        let words = "first line\nfatal: out of luck\n";
        world.fake.behaviour.set(Behaviour {
            words,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let power = power(&launched.guest);
        let stuck = power.nmi_request().send().promise;
        // Comes after it, and so does the death.
        status(&launched.guest).await;
        world.fake.last().die(Exit::Signal(31));
        let report = wait(&launched.guest).await;
        assert_eq!(report.reason, Reason::VmmTerminated);
        for expected in ["SIGSYS: system call refused by the jail", "fatal: out of luck"] {
            assert!(report.detail.contains(expected), "{}", report.detail);
        }
        assert_eq!(status(&launched.guest).await, GuestStatus::VmmUnexpectedTermination);
        let answer = stuck.await.unwrap();
        assert_eq!(kind(read_completion(answer.get().unwrap())), Kind::VmmTerminated);
        world.fake.behaviour.set(Behaviour::default());
        let again = caller.launch("web").await.unwrap();
        assert_eq!(status(&again.guest).await, GuestStatus::Running);
    });
}

#[test]
fn pausing_is_seen() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let power = power(&launched.guest);
        let paused = power.pause_request().send().promise.await.unwrap();
        read_completion(paused.get().unwrap()).unwrap();
        let info = info(&launched.guest).await;
        assert!(info.paused && info.problems.iter().any(|problem| problem.contains("paused")));
        let resumed = power.resume_request().send().promise.await.unwrap();
        read_completion(resumed.get().unwrap()).unwrap();
        assert!(!self::info(&launched.guest).await.paused);
    });
}

#[test]
fn counters_come_from_the_component() {
    use sepal_schema::guest_capnp::statistics::stats_result;
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        // On a busy host the first answer may be late.
        let lost = loop {
            let answer = observer(&launched.guest).stats_request().send().promise.await.unwrap();
            match answer.get().unwrap().which().unwrap() {
                stats_result::Stats(stats) => break stats.unwrap().get_serial_dropped(),
                stats_result::Error(error) => assert_eq!(Error::read(error.unwrap()).unwrap().kind, Kind::TimedOut),
            }
        };
        assert_eq!(lost, 17);
    });
}
