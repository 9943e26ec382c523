//! Definitions: what is kept, what starts from them, what the next manager finds.

mod failures;
mod hostile;
mod kept;

use std::{fs, os::fd::OwnedFd, path::Path, time::Duration};

use sepal_guest_manager::{component::Exit, definitions::autostart};
use sepal_schema::{
    config::{
        File, GuestConfig, Restart, RestartPolicy, Uuid,
        device::{Disk, DiskMode},
    },
    error::Kind,
    info::GuestStatus,
    report::Reason,
};

use self::kept::{Kept, about, error, next};
use crate::{
    fake::{Behaviour, Does},
    restarts::crashes,
    world::{Launched, info, kill, named, run, wait},
};

#[test]
fn a_definition_is_there_until_it_is_undefined_whoever_is_the_manager() {
    let kept = Kept::new();
    let mut first = None;
    kept.manager(async |world| {
        let caller = world.caller();
        let config = GuestConfig {
            cpus: 3,
            kernel: kept.file("kernel"),
            ..named("web")
        };
        let (uuid, warnings) = caller.define(config).await.unwrap();
        assert_eq!(warnings, [""; 0]);
        let seen = caller.seen("web").await.unwrap();
        assert_eq!((seen.status, seen.generation), (GuestStatus::NotStarted, 0));
        assert_eq!(
            (seen.upkeep.uuid, seen.upkeep.defined, seen.upkeep.autostart),
            (Some(uuid), true, false)
        );
        assert_eq!(seen.descriptor.unwrap().cpus, 3);
        caller.define(named("db")).await.unwrap();
        caller.set_autostart("web", true).await.unwrap();
        assert_eq!(caller.definition("web").await, Ok((3, true)));
        first = Some(uuid);
    });
    kept.manager(async |world| {
        let caller = world.caller();
        let names: Vec<_> = caller.list().await.into_iter().map(|info| info.name).collect();
        assert_eq!(names, ["db", "web"]);
        let seen = caller.seen("web").await.unwrap();
        assert_eq!(
            (seen.upkeep.uuid, seen.upkeep.autostart, seen.status),
            (first, true, GuestStatus::NotStarted)
        );
        let started = caller.start("web", true).await.unwrap();
        assert_eq!(
            world.fake.last().config.borrow().as_ref().map(|config| config.cpus),
            Some(3)
        );
        caller.undefine("db").await.unwrap();
        assert_eq!(about(caller.undefine("db").await, Kind::NotFound), "name");
        assert_eq!(about(caller.definition("db").await, Kind::NotFound), "name");
        assert!(caller.seen("db").await.is_none());
        kill(&started.guest).await.unwrap();
        let seen = caller.seen("web").await.unwrap();
        assert_eq!((seen.status, seen.upkeep.uuid), (GuestStatus::Stopped, first));
        assert_eq!(seen.stop.unwrap().reason, Reason::Killed);
        assert_eq!(about(caller.remove("web").await, Kind::AlreadyBound), "name");
    });
    kept.manager(async |world| {
        let names: Vec<_> = world.caller().list().await.into_iter().map(|info| info.name).collect();
        assert_eq!(names, ["web"]);
    });
}

#[test]
fn a_definition_is_refused_with_the_field_that_is_wrong() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        assert_eq!(
            about(caller.define(GuestConfig::default()).await, Kind::BadConfig),
            "name"
        );
        assert_eq!(about(caller.define(named("no/slash")).await, Kind::BadConfig), "name");
        let (pipe, _writer) = std::io::pipe().unwrap();
        let config = GuestConfig {
            kernel: File::Fd(OwnedFd::from(pipe)),
            ..named("web")
        };
        assert_eq!(about(caller.define(config).await, Kind::BadConfig), "kernel");
        let (pipe, _writer) = std::io::pipe().unwrap();
        let config = GuestConfig {
            disks: vec![Disk::new(File::Fd(OwnedFd::from(pipe)), DiskMode::ReadOnly)],
            ..named("web")
        };
        assert_eq!(about(caller.define(config).await, Kind::BadConfig), "disks[0].image");
        let upload = caller.manager.upload_request().send().promise.await.unwrap();
        let config = GuestConfig {
            kernel: File::Upload(upload.get().unwrap().get_upload().unwrap()),
            ..named("web")
        };
        assert_eq!(about(caller.define(config).await, Kind::BadConfig), "kernel");
        let config = GuestConfig {
            kernel: File::Path(kept.path("")),
            ..named("web")
        };
        assert_eq!(
            about(caller.define(config).await, Kind::BadConfig),
            "kernel",
            "a folder is no kernel"
        );
        assert!(caller.list().await.is_empty());
        // One that works, and then one of the same name or UUID.
        let (uuid, _) = caller.define(named("web")).await.unwrap();
        assert_eq!(about(caller.define(named("web")).await, Kind::AlreadyBound), "name");
        let same = GuestConfig {
            uuid: Some(uuid),
            ..named("db")
        };
        assert_eq!(about(caller.define(same).await, Kind::AlreadyBound), "uuid");
        assert!(caller.seen("db").await.is_none());
        let same = GuestConfig {
            uuid: Some(uuid),
            ..named("db")
        };
        assert_eq!(
            about(caller.launch_config(same, true).await, Kind::AlreadyBound),
            "uuid"
        );
        assert!(caller.seen("db").await.is_none(), "what was not created leaves nothing");
    });
}

#[test]
fn what_is_not_there_yet_is_a_warning() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        let disk = |file| Disk::new(file, DiskMode::ReadOnly);
        let config = GuestConfig {
            kernel: File::Path(kept.path("later")),
            disks: vec![disk(File::Path(kept.path("later.img"))), disk(kept.file("there.img"))],
            ..named("web")
        };
        let (_, warnings) = caller.define(config).await.unwrap();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(
            warnings[0].starts_with("kernel: ") && warnings[0].ends_with("/later is not there"),
            "{warnings:?}"
        );
        assert!(warnings[1].starts_with("disks[0].image: "), "{warnings:?}");
        assert_eq!(about(caller.start("web", true).await, Kind::NotFound), "kernel");
        assert_eq!(caller.seen("web").await.unwrap().status, GuestStatus::Stopped);
        kept.file("later");
        kept.file("later.img");
        caller.start("web", true).await.unwrap();
    });
}

#[test]
fn whoever_may_operate_starts_what_an_administrator_has_defined() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let (admin, operator) = (world.caller(), world.caller_as(false));
        let config = || GuestConfig {
            kernel: kept.file("kernel"),
            ..named("web")
        };
        assert_eq!(error(operator.define(config()).await).0, Kind::PermissionDenied);
        admin.define(config()).await.unwrap();
        assert_eq!(error(operator.undefine("web").await).0, Kind::PermissionDenied);
        assert_eq!(
            error(operator.set_autostart("web", true).await).0,
            Kind::PermissionDenied
        );
        assert_eq!(operator.definition("web").await, Ok((0, false)));
        assert_eq!(about(operator.start("db", true).await, Kind::NotFound), "name");
        let Launched { guest, lease, .. } = operator.start("web", false).await.unwrap();
        assert_eq!(info(&guest).await.status, GuestStatus::Running);
        assert_eq!(about(admin.start("web", true).await, Kind::AlreadyRunning), "name");
        drop(lease);
        assert_eq!(wait(&guest).await.reason, Reason::Killed);
        // Only `start` takes the name.
        assert_eq!(about(admin.launch("web").await, Kind::AlreadyBound), "name");
        assert_eq!(about(admin.new_guest("web").await, Kind::AlreadyBound), "name");
        let started = admin.start("web", true).await.unwrap();
        assert_eq!(info(&started.guest).await.generation, 2);
        assert!(info(&started.guest).await.detached);
    });
}

#[test]
fn what_runs_goes_on_when_its_definition_changes_or_goes() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        let cpus = |cpus| GuestConfig { cpus, ..named("web") };
        let (uuid, _) = caller.define(cpus(1)).await.unwrap();
        let started = caller.start("web", true).await.unwrap();
        assert_eq!(caller.define_as(cpus(2), true, true).await.unwrap().0, uuid);
        let other = GuestConfig {
            uuid: Some(Uuid::from_bytes([9; 16])),
            ..cpus(2)
        };
        assert_eq!(
            about(caller.define_as(other, true, true).await, Kind::AlreadyBound),
            "uuid"
        );
        let seen = info(&started.guest).await;
        assert_eq!((seen.descriptor.unwrap().cpus, seen.upkeep.autostart), (1, true));
        kill(&started.guest).await.unwrap();
        let started = caller.start("web", true).await.unwrap();
        let seen = info(&started.guest).await;
        assert_eq!((seen.descriptor.unwrap().cpus, seen.upkeep.uuid), (2, Some(uuid)));
        caller.undefine("web").await.unwrap();
        let seen = info(&started.guest).await;
        assert_eq!((seen.status, seen.upkeep.defined), (GuestStatus::Running, false));
        kill(&started.guest).await.unwrap();
        caller.remove("web").await.unwrap();
        // And the other way round.
        let launched = caller.launch_config(named("web"), true).await.unwrap();
        let uuid = info(&launched.guest).await.upkeep.uuid.unwrap();
        assert_eq!(caller.define(cpus(4)).await.unwrap().0, uuid);
        kill(&launched.guest).await.unwrap();
        let started = caller.start("web", true).await.unwrap();
        assert_eq!(info(&started.guest).await.upkeep.uuid, Some(uuid));
    });
}

#[test]
fn a_manager_that_keeps_nothing_says_how_to_make_it() {
    run(async |world| {
        let caller = world.caller();
        for outcome in [
            caller.define(named("web")).await.map(drop),
            caller.undefine("web").await,
            caller.set_autostart("web", true).await,
            caller.definition("web").await.map(drop),
            caller.start("web", true).await.map(drop),
        ] {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind, Kind::NoStorage);
            assert!(error.message.contains("--state DIR"), "{error}");
        }
        let launched = caller.launch_config(named("web"), true).await.unwrap();
        assert!(info(&launched.guest).await.upkeep.uuid.is_some());
        let (listing, count) = caller.browse().await.unwrap();
        assert_eq!((count, next(&listing, 0).await.names), (1, vec!["web".to_owned()]));
    });
}

#[test]
fn all_guests_are_read_page_by_page_as_of_one_moment() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        for name in ["a", "c", "d"] {
            caller.define(named(name)).await.unwrap();
        }
        let _ended = caller.launch_config(named("b"), true).await.unwrap();
        caller.force_shutdown("b").await.unwrap();
        caller.start("c", true).await.unwrap();
        let (listing, count) = caller.browse().await.unwrap();
        assert_eq!(count, 4);
        let page = next(&listing, 3).await;
        assert_eq!(
            (&page.names[..], page.ended),
            (&["a", "b", "c"].map(str::to_owned)[..], false)
        );
        caller.undefine("d").await.unwrap();
        let page = next(&listing, 3).await;
        assert_eq!((&page.names[..], page.ended), (&["d".to_owned()][..], true));
        assert!(next(&listing, 3).await.names.is_empty());
        let mut held = vec![listing];
        while held.len() < 16 {
            held.push(caller.browse().await.unwrap().0);
        }
        let refused = caller.browse().await.err().unwrap();
        assert!(refused.message.contains("NO_RESOURCES"), "{refused}");
        assert!(world.caller().browse().await.is_ok(), "another connection has its own");
        held.clear();
        // It is heard of when what was let go of has arrived.
        while caller.browse().await.is_err() {}
    });
}

#[test]
fn what_is_marked_starts_with_the_manager() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        for name in ["a", "b", "c", "d", "e", "f"] {
            caller.define_as(named(name), true, false).await.unwrap();
        }
        caller.define(named("not-marked")).await.unwrap();
        assert_eq!(world.fake.count(), 0);
    });
    kept.manager(async |world| {
        let caller = world.caller();
        caller.start("a", true).await.unwrap();
        autostart::start_all(world.manager.clone()).await;
        let all = caller.list().await;
        let running: Vec<_> = all
            .iter()
            .filter(|info| info.status == GuestStatus::Running)
            .map(|info| &info.name[..])
            .collect();
        assert_eq!(running, ["a", "b", "c", "d", "e", "f"]);
        assert!(all.iter().all(|info| info.detached == info.upkeep.autostart));
        assert_eq!(world.fake.count(), 6);
    });
}

#[test]
fn what_cannot_be_started_with_the_manager_is_tried_as_its_policy_says() {
    let kept = Kept::new();
    let restart = |policy| Restart {
        policy,
        attempts: 2,
        delay_ms: 1,
        max_delay_ms: 4,
        ..Restart::default()
    };
    kept.manager(async |world| {
        let caller = world.caller();
        for (name, policy) in [("never", RestartPolicy::Never), ("tried", RestartPolicy::OnFailure)] {
            let config = GuestConfig {
                restart: restart(policy),
                ..named(name)
            };
            caller.define_as(config, true, false).await.unwrap();
        }
        world.fake.behaviour.set(Behaviour {
            create: Does::Fails(Kind::DeviceInitializationFailure),
            ..Behaviour::default()
        });
        let tries = autostart::start_all(world.manager.clone());
        world.handle.timeout(Duration::from_secs(30), tries).await.unwrap();
        assert_eq!(world.fake.count(), 1 + 3, "once, and once with two more attempts");
        for name in ["never", "tried"] {
            let stop = caller.seen(name).await.unwrap().stop.unwrap();
            assert_eq!(stop.error.unwrap().kind, Kind::DeviceInitializationFailure);
        }
        assert_eq!(caller.seen("never").await.unwrap().status, GuestStatus::Stopped);
        let tried = caller.seen("tried").await.unwrap();
        assert_eq!((tried.status, tried.upkeep.failures), (GuestStatus::CrashLoop, 3));
        world.fake.behaviour.set(Behaviour::default());
        autostart::start_all(world.manager.clone()).await;
        assert_eq!(world.fake.alive(), 2);
    });
}

#[test]
fn what_is_known_of_a_failure_outlives_the_manager() {
    let kept = Kept::new();
    let file = kept.folder.path().join("state/definitions/web.sepal");
    kept.manager(async |world| {
        let caller = world.caller();
        caller.define(named("web")).await.unwrap();
        let before = fs::read(&file).unwrap();
        let started = caller.start("web", true).await.unwrap();
        world.fake.last().die(Exit::Signal(11));
        assert_eq!(wait(&started.guest).await.reason, Reason::VmmTerminated);
        // It is written by the by.
        while fs::read(&file).unwrap() == before {
            caller.list().await;
        }
        // What is known of it stays when the definition changes.
        let config = GuestConfig {
            cpus: 2,
            ..named("web")
        };
        caller.define_as(config, false, true).await.unwrap();
    });
    kept.manager(async |world| {
        let caller = world.caller();
        let started = caller.start("web", true).await.unwrap();
        let crashes = crashes(&started.guest).await;
        assert_eq!(crashes.len(), 1);
        assert_eq!(crashes[0].report.reason, Reason::VmmTerminated);
        assert!(
            crashes[0].report.detail.contains("SIGSEGV"),
            "{}",
            crashes[0].report.detail
        );
    });
}

fn only_file(folder: &Path, ending: &str) -> std::path::PathBuf {
    let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let file = files.find(|path| path.to_str().unwrap().ends_with(ending));
    file.unwrap_or_else(|| panic!("nothing in {} ends with {ending}", folder.display()))
}

#[test]
fn a_broken_file_is_kept_aside_and_the_others_are_there() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        for name in ["broken", "good"] {
            caller.define(named(name)).await.unwrap();
        }
    });
    let folder = kept.folder.path().join("state/definitions");
    let file = only_file(&folder, "broken.sepal");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    kept.manager(async |world| {
        let caller = world.caller();
        assert!(caller.seen("broken").await.is_none());
        assert!(caller.seen("good").await.is_some());
        caller.define(named("broken")).await.unwrap();
    });
    assert_eq!(
        fs::read(only_file(&folder, ".broken")).unwrap(),
        bytes[..bytes.len() / 2]
    );
    // What a later version has written is left alone, and its name with it.
    let mut newer = bytes;
    newer[8] = 200;
    fs::write(&file, &newer).unwrap();
    kept.manager(async |world| {
        let error = world.caller().define(named("broken")).await.unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::NoStorage, "name"));
    });
    assert_eq!(fs::read(&file).unwrap(), newer);
}

#[test]
fn what_the_disk_does_not_take_is_not_defined() {
    let kept = Kept::new();
    kept.manager(async |world| {
        let caller = world.caller();
        caller.define(named("before")).await.unwrap();
        let folder = kept.folder.path().join("state/definitions");
        // A folder that cannot be replaced by a file.
        fs::create_dir_all(folder.join("web.sepal/in-it")).unwrap();
        let error = caller.define(named("web")).await.unwrap_err();
        assert_eq!(error.kind, Kind::NoStorage);
        assert!(error.message.contains("state folder"), "{error}");
        assert!(caller.seen("web").await.is_none());
        caller.launch_config(named("web"), true).await.unwrap();
        fs::remove_dir_all(folder.join("web.sepal")).unwrap();
        caller.define(named("web")).await.unwrap();
        assert!(caller.seen("web").await.unwrap().upkeep.defined);
    });
}
