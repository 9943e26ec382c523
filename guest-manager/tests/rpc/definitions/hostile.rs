//! Definitions on storage that hangs, in folders that others have written to, and asked for by many at once.

use std::{
    fs,
    os::{fd::AsFd, unix::net::UnixListener},
    pin::pin,
    sync::mpsc,
    time::Duration,
};

use futures::future::join_all;
use rustix::fs::{FlockOperation, flock};
use sepal_guest_manager::{definitions::autostart, roles::Role};
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{Backend, Disk, DiskMode, Share},
    },
    error::{Error, Kind, read_completion},
    info::GuestStatus,
};

use super::kept::{Kept, about, error, next};
use crate::{
    fake::{Behaviour, Does},
    world::{Caller, kill, named},
};

async fn set_policy(caller: &Caller) -> Result<(), Error> {
    let mut request = caller.manager.set_pressure_policy_request();
    let mut policy = request.get().init_policy();
    policy.set_calm_ms(60_000);
    policy.set_stall_percent(50);
    policy.set_window_ms(2_000);
    read_completion(request.send().promise.await?.get()?)
}

#[test]
fn settings_of_a_later_version_stay_as_they_are() {
    let kept = Kept::new();
    kept.manager(async |world| set_policy(&world.caller()).await.unwrap());
    let file = kept.folder.path().join("state/settings.sepal");
    let mut newer = fs::read(&file).unwrap();
    newer[8] = 200;
    fs::write(&file, &newer).unwrap();
    // Something that only that version knows.
    fs::copy(&file, kept.folder.path().join("state/networks.sepal")).unwrap();
    kept.manager(async |world| {
        let error = set_policy(&world.caller()).await.unwrap_err();
        assert_eq!(error.kind, Kind::NoStorage);
        assert!(error.message.contains("cannot read, and leaves alone"), "{error}");
        world.caller().define(named("web")).await.unwrap();
    });
    assert_eq!(fs::read(&file).unwrap(), newer);
    assert_eq!(
        fs::read(kept.folder.path().join("state/networks.sepal")).unwrap(),
        newer
    );
}

#[test]
fn one_that_is_never_created_does_not_keep_the_others_from_starting_with_the_manager() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        for name in ["a", "b", "c", "d", "e", "f"] {
            caller.define_as(named(name), true, false).await.unwrap();
        }
    });
    kept.manager(async |world| {
        let caller = world.caller();
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let manager = world.manager.clone();
        world
            .handle
            .spawn(autostart::start_all_within(manager, Duration::from_millis(1)));
        while world.fake.count() < 6 {
            caller.list().await;
        }
        let all = caller.list().await;
        assert!(all.iter().all(|info| info.status == GuestStatus::Starting));
    });
}

#[test]
fn an_image_that_is_let_go_of_late_does_not_keep_its_guest_from_starting_with_the_manager() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let config = GuestConfig {
            disks: vec![Disk::new(kept.file("image"), DiskMode::ReadWrite)],
            ..named("web")
        };
        world.caller().define_as(config, true, false).await.unwrap();
    });
    // As a component keeps it whose manager and keeper have been killed, until it has ended.
    let kept_open = fs::File::open(kept.path("image")).unwrap();
    flock(&kept_open, FlockOperation::LockExclusive).unwrap();
    kept.manager(async |world| {
        let caller = world.caller();
        let starting = autostart::start_all(world.manager.clone());
        let mut starting = pin!(starting);
        // Long enough for several attempts, which nobody hears of; and what waits can be stopped.
        let waited = world.handle.timeout(Duration::from_millis(400), &mut starting).await;
        assert!(waited.is_err() && world.fake.count() == 0);
        let info = caller.seen("web").await.unwrap();
        assert_eq!((info.status, info.generation), (GuestStatus::Starting, 1));
        kill(&caller.lookup("web").await.unwrap()).await.unwrap();
        starting.await;
        assert_eq!(caller.seen("web").await.unwrap().status, GuestStatus::Stopped);

        let starting = autostart::start_all(world.manager.clone());
        let mut starting = pin!(starting);
        let waited = world.handle.timeout(Duration::from_millis(50), &mut starting).await;
        assert!(waited.is_err());
        drop(kept_open);
        starting.await;
        let info = caller.seen("web").await.unwrap();
        assert_eq!((info.status, info.generation), (GuestStatus::Running, 2));
        assert_eq!((info.upkeep.failures, world.fake.count()), (0, 1));
    });
}

#[test]
fn files_that_hang_with_others_keep_no_definition_from_being_kept() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        // As files on dead storage do, until its server is there again.
        let hang = |_| {
            let (server, client) = mpsc::channel::<()>();
            (server, world.handle.spawn_foreign(move || client.recv()))
        };
        let hangs: Vec<_> = (0..64).map(hang).collect();
        set_policy(&caller).await.unwrap();
        // None that names no file waits for those of others.
        caller.launch_config(named("transient"), true).await.unwrap();
        caller.undefine("web").await.unwrap_err();
        drop(hangs);
    });
}

#[test]
fn a_back_end_that_is_too_busy_to_be_connected_to_is_told() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        let path = kept.path("busy.sock");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(listener.as_fd(), 0).unwrap();
        let _waits = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let config = |name: &str| GuestConfig {
            shares: vec![Share {
                tag: "home".into(),
                backend: Backend::Path(path.clone()),
                queues: 0,
            }],
            ..named(name)
        };
        caller.define(config("web")).await.unwrap();
        let starts = (0..6).map(|i| {
            let (caller, config) = (&caller, config(&format!("web{i}")));
            async move { about(caller.launch_config(config, true).await, Kind::FailedServiceConnect) }
        });
        let told = join_all(starts).await;
        assert!(told.iter().all(|about| about == "shares[0].backend"), "{told:?}");
        // It is connected to as soon as it takes somebody.
        let start = caller.start("web", true);
        let serves = async {
            drop(listener.accept().unwrap());
            world.handle.sleep(Duration::from_millis(1)).await;
        };
        let (started, ()) = futures::join!(start, serves);
        kill(&started.unwrap().guest).await.unwrap();
    });
}

#[test]
fn whoever_is_first_what_is_told_is_what_is_kept() {
    let kept = Kept::new();
    let mut left = Vec::new();
    kept.manager(async |world| {
        let callers = [world.caller(), world.caller(), world.caller()];
        for round in 0..12_u8 {
            let all = callers.iter().enumerate().map(|(i, caller)| async move {
                let config = |cpus| GuestConfig { cpus, ..named("web") };
                match (usize::from(round) + i) % 6 {
                    0 => caller.define_as(config(round + 1), false, true).await.map(drop),
                    1 => caller.define(config(round + 20)).await.map(drop),
                    2 => caller.undefine("web").await,
                    3 => caller.start("web", true).await.map(drop),
                    4 => caller.set_autostart("web", round % 2 == 0).await,
                    _ => caller.launch_config(named("web"), true).await.map(drop),
                }
            });
            for outcome in join_all(all).await {
                let expected = [Kind::AlreadyBound, Kind::AlreadyRunning, Kind::NotFound];
                assert!(
                    outcome
                        .as_ref()
                        .err()
                        .is_none_or(|error| expected.contains(&error.kind)),
                    "{outcome:?}"
                );
            }
            let (seen, definition) = (callers[0].seen("web").await, callers[0].definition("web").await);
            assert_eq!(seen.is_some_and(|info| info.upkeep.defined), definition.is_ok());
            let _ = callers[0].force_shutdown("web").await;
            left = vec![definition];
        }
    });
    kept.manager(async |world| {
        let now = world.caller().definition("web").await;
        assert_eq!(
            now.ok(),
            left.remove(0).ok(),
            "the next manager knows what the one before told"
        );
    });
}

#[test]
fn a_name_is_its_own_whatever_files_are_called() {
    let kept = Kept::new();
    let long: String = "aZ09._-".chars().cycle().take(64).collect();
    let names = [
        &long[..],
        "web",
        "web.sepal",
        "web.sepal.new",
        "web.sepal.broken",
        "WEB",
        "0",
        "settings",
    ];
    kept.manager(async |world| {
        let caller = world.caller();
        for (i, name) in (1..).zip(names) {
            let config = GuestConfig { cpus: i, ..named(name) };
            caller.define(config).await.unwrap();
        }
        for name in [
            "Ä",
            "e\u{301}",
            "a b",
            "a/b",
            "..",
            ".a",
            "-a",
            "a\0",
            &format!("{long}x"),
        ] {
            assert_eq!(
                about(caller.define(named(name)).await, Kind::BadConfig),
                "name",
                "{name:?}"
            );
        }
        caller.undefine("web").await.unwrap();
    });
    kept.manager(async |world| {
        let caller = world.caller();
        for (i, name) in (1..).zip(names) {
            match name {
                "web" => assert_eq!(error(caller.definition(name).await).0, Kind::NotFound),
                _ => assert_eq!(caller.definition(name).await, Ok((i, false)), "{name}"),
            }
        }
        let reader = world.caller_as(false);
        let (listing, count) = reader.browse().await.unwrap();
        assert_eq!((count, next(&listing, 0).await.names.len()), (7, 7));
    });
}

#[test]
fn paths_that_no_file_can_have_are_refused_by_their_field() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        let long = format!("/{}", "long/".repeat(819));
        assert_eq!(long.len(), 4096);
        for path in ["/a\0b", "relative", "", &long] {
            let kernel = GuestConfig {
                kernel: File::Path(path.into()),
                ..named("web")
            };
            assert_eq!(
                about(caller.define(kernel).await, Kind::BadConfig),
                "kernel",
                "{path:?}"
            );
            let disk = GuestConfig {
                disks: vec![Disk::new(File::Path(path.into()), DiskMode::ReadOnly)],
                ..named("web")
            };
            assert_eq!(
                about(caller.define(disk).await, Kind::BadConfig),
                "disks[0].image",
                "{path:?}"
            );
            let share = GuestConfig {
                shares: vec![Share {
                    tag: "home".into(),
                    backend: Backend::Path(path.into()),
                    queues: 0,
                }],
                ..named("web")
            };
            assert_eq!(
                about(caller.define(share).await, Kind::BadConfig),
                "shares[0].backend",
                "{path:?}"
            );
        }
        // One that names itself, and one whose folder is a file.
        std::os::unix::fs::symlink(kept.path("loop"), kept.path("loop")).unwrap();
        fs::write(kept.path("file"), "").unwrap();
        for path in [kept.path("loop"), format!("{}/in-it", kept.path("file"))] {
            let config = GuestConfig {
                kernel: File::Path(path),
                ..named("web")
            };
            assert_eq!(about(caller.define(config).await, Kind::BadConfig), "kernel");
        }
        // A link is followed when the guest starts, and not before.
        std::os::unix::fs::symlink(kept.path("kernel"), kept.path("link")).unwrap();
        let config = || GuestConfig {
            kernel: File::Path(kept.path("link")),
            ..named("web")
        };
        let (_, warnings) = caller.define(config()).await.unwrap();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert_eq!(about(caller.start("web", true).await, Kind::NotFound), "kernel");
        kept.file("kernel");
        let started = caller.start("web", true).await.unwrap();
        kill(&started.guest).await.unwrap();
        // Gone again by the next start.
        fs::remove_file(kept.path("kernel")).unwrap();
        assert_eq!(about(caller.start("web", true).await, Kind::NotFound), "kernel");
    });
}

#[test]
fn an_observer_defines_nothing() {
    let kept = Kept::new();
    kept.manager(async |world| {
        world.caller().define(named("web")).await.unwrap();
        for role in [Role::Observe, Role::Operate] {
            let caller = world.caller_with(|fds| {
                let who = sepal_guest_manager::client::Client::of_the_manager().who;
                sepal_guest_manager::client::Client::new(fds, who, role)
            });
            for refused in [
                caller.define(named("db")).await.map(drop),
                caller.undefine("web").await,
                caller.set_autostart("web", true).await,
            ] {
                assert_eq!(error(refused).0, Kind::PermissionDenied);
            }
            caller.definition("web").await.unwrap();
        }
        assert_eq!(world.caller().definition("web").await, Ok((0, false)));
    });
}
