//! Managers one after the other: what the next one goes on with, and what it waits for.

mod custody;
mod runs;

use std::time::Duration;

use sepal_guest_manager::manager::Settings;
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{Disk, DiskMode, Vsock},
    },
    error::{Kind, read_completion},
    info::GuestStatus,
    report::Reason,
};

use crate::{
    fake::{
        Behaviour, Does, Process,
        keeper::{Keeper, brisk},
    },
    leases::{detach, ends_in, hasty, token},
    world::{Caller, info, kill, named, status, stop, wait},
};

/// A guest that goes on without its manager.
fn durable(name: &str) -> GuestConfig {
    GuestConfig {
        durable: true,
        ..named(name)
    }
}

/// A manager that waits for leases longer than any test takes.
fn patient() -> Settings {
    Settings {
        lease_grace: Duration::from_secs(3600),
        ..Settings::default()
    }
}

#[test]
fn a_guest_goes_on_from_manager_to_manager() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(durable("web"), false).await.unwrap();
        detach(&launched.lease).await.unwrap();
        assert!(info(&launched.guest).await.upkeep.durable);
        world.fake.last().print(b"one ");
    });
    let process = keeper.processes().remove(0);
    process.print(b"two ");
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        assert_eq!((status(&guest).await, world.fake.count()), (GuestStatus::Running, 1));
        process.print(b"three");
        let mut text = Vec::new();
        while text != b"one two three" {
            text.extend(crate::world::read(&guest, text.len() as u64, true).await.0);
        }
        assert_eq!(kill(&guest).await.unwrap().reason, Reason::Killed);
    });
    assert!(!process.alive() && keeper.holds().is_empty());
    keeper.manager(Settings::default(), async |world| {
        // It is remembered.
        let guests = world.caller().list().await;
        assert_eq!((guests.len(), guests[0].status), (1, GuestStatus::Stopped));
    });
}

#[test]
fn who_retires_leaves_what_goes_on_and_stops_the_others() {
    let keeper = Keeper::new();
    keeper.manager(patient(), async |world| {
        let caller = world.caller();
        let kept = caller.launch_config(durable("kept"), false).await.unwrap();
        let token = token(&kept.lease).await.unwrap();
        let goes = caller.launch("goes").await.unwrap();
        let retired = caller.manager.retire_request().send().promise.await.unwrap();
        read_completion(retired.get().unwrap()).unwrap();
        assert_eq!(wait(&goes.guest).await.reason, Reason::Killed);
        assert_eq!(status(&kept.guest).await, GuestStatus::Running);
        let error = caller.launch("late").await.err().unwrap();
        assert_eq!(error.kind, Kind::NoResources);
        // Its holder hangs up with all others; nothing comes of it here.
        drop(kept.lease);
        assert_eq!(ends_in(&kept.guest).await, 0);
        assert!(!token.is_empty());
    });
    keeper.manager(patient(), async |world| {
        let guests = world.caller().list().await;
        let seen: Vec<_> = guests.iter().map(|info| (&info.name[..], info.status)).collect();
        assert_eq!(seen, [("goes", GuestStatus::Stopped), ("kept", GuestStatus::Running)]);
        assert!(guests[1].upkeep.lease_ends_ms > 0);
    });
}

#[test]
fn a_lease_is_waited_for_once_however_many_managers_do_so() {
    let keeper = Keeper::new();
    let mut left = Vec::new();
    let mut secret = String::new();
    keeper.manager(patient(), async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(durable("web"), false).await.unwrap();
        secret = token(&launched.lease).await.unwrap();
        drop(launched.lease);
        left.push(ends_in(&launched.guest).await);
    });
    for _ in 0..3 {
        keeper.manager(patient(), async |world| {
            world.handle.sleep(Duration::from_millis(2)).await;
            left.push(world.caller().list().await[0].upkeep.lease_ends_ms);
        });
    }
    assert!(left.iter().all(|left| *left > 0));
    assert!(left.windows(2).all(|pair| pair[1] < pair[0]), "{left:?}");
    // Redeeming ends it, also on record; who loses it again is waited for anew.
    keeper.manager(patient(), async |world| {
        let caller = world.caller();
        let redeemed = caller.redeem_lease(&secret).await.unwrap();
        assert_eq!(ends_in(&redeemed.guest).await, 0);
    });
    keeper.manager(patient(), async |world| {
        let again = world.caller().list().await[0].upkeep.lease_ends_ms;
        assert!(again > *left.last().unwrap(), "{again} {left:?}");
    });
}

#[test]
fn a_guest_whose_lease_ran_out_meanwhile_is_stopped_by_the_next_manager() {
    let keeper = Keeper::new();
    keeper.manager(hasty(), async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(durable("web"), false).await.unwrap();
        token(&launched.lease).await.unwrap();
        drop(launched.lease);
        assert!(ends_in(&launched.guest).await > 0);
    });
    let process = keeper.processes().remove(0);
    assert!(process.alive());
    std::thread::sleep(hasty().lease_grace);
    keeper.manager(patient(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        let report = wait(&guest).await;
        assert_eq!(report.reason, Reason::Killed);
        assert!(report.detail.contains("lease"), "{}", report.detail);
    });
}

#[test]
fn a_component_that_stands_still_is_told_of_and_taken_over_when_it_goes_on() {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(durable("web"), true).await.unwrap();
        drop(launched);
    });
    let process = keeper.processes().remove(0);
    let still = Behaviour {
        attach: Does::Hangs,
        ..Behaviour::default()
    };
    process.behave(still);
    keeper.manager(brisk(), async |world| {
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        let silent = async || {
            let problems = info(&guest).await.problems;
            problems.iter().any(|problem| problem.contains("does not answer"))
        };
        while !silent().await {
            world.handle.sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(status(&guest).await, GuestStatus::Running);
        process.behave(Behaviour::default());
        while silent().await {
            world.handle.sleep(Duration::from_millis(1)).await;
        }
        // All is well: it hears what it is asked for.
        let report = stop(&guest, 60_000, false).await.unwrap();
        assert_eq!(report.reason, Reason::Shutdown);
    });
}

#[test]
fn a_component_that_stands_still_is_stopped_by_force() {
    for force in [false, true] {
        let keeper = Keeper::new();
        keeper.manager(Settings::default(), async |world| {
            world.caller().launch_config(durable("web"), true).await.unwrap();
        });
        let process = keeper.processes().remove(0);
        process.behave(Behaviour {
            attach: Does::Hangs,
            stop: Does::Hangs,
            button: Does::Hangs,
            ..Behaviour::default()
        });
        keeper.manager(brisk(), async |world| {
            let caller = world.caller();
            let guest = caller.lookup("web").await.unwrap();
            let report = match force {
                true => stop(&guest, 10, true).await.unwrap(),
                false => kill(&guest).await.unwrap(),
            };
            let reason = if force { Reason::Hangup } else { Reason::Killed };
            assert_eq!(report.reason, reason, "{}", report.detail);
        });
        assert!(!process.alive());
    }
}

/// A guest that is taken over by a manager whose threads all wait, as for files on dead storage until its server is there again.
fn taken_over_by_a_stuck_manager(config: GuestConfig, test: impl AsyncFnOnce(&Caller, &Process)) {
    let keeper = Keeper::new();
    keeper.manager(Settings::default(), async |world| {
        let caller = world.caller();
        caller.launch_config(config, true).await.unwrap();
    });
    let process = keeper.processes().remove(0);
    keeper.manager(brisk(), async |world| {
        let hang = |_| {
            let (server, client) = std::sync::mpsc::channel::<()>();
            (server, world.handle.spawn_foreign(move || client.recv()))
        };
        let hangs: Vec<_> = (0..64).map(hang).collect();
        let caller = world.caller();
        let guest = caller.lookup("web").await.unwrap();
        assert_eq!(status(&guest).await, GuestStatus::Running);
        test(&caller, &process).await;
        assert_eq!(kill(&guest).await.unwrap().reason, Reason::Killed);
        assert!(!process.alive());
        drop(hangs);
    });
    assert!(keeper.holds().is_empty());
}

#[test]
fn a_guest_whose_images_hang_is_taken_over_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let disk = || Disk::new(File::Path(path.to_str().unwrap().into()), DiskMode::ReadWrite);
    let config = GuestConfig {
        disks: vec![disk()],
        ..durable("web")
    };
    taken_over_by_a_stuck_manager(config, async |caller, process| {
        while !process.is_attached() {
            caller.list().await;
        }
    });
}

#[test]
fn a_guest_whose_socket_hangs_when_it_is_taken_over_can_be_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let config = GuestConfig {
        vsock: Some(Vsock {
            socket_path: folder.path().join("vsock").to_str().unwrap().into(),
            ..Vsock::default()
        }),
        ..durable("web")
    };
    taken_over_by_a_stuck_manager(config, async |caller, process| {
        for _ in 0..3 {
            caller.list().await;
        }
        assert!(!process.is_attached() && process.alive());
    });
}
