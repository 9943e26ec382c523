//! The host: what the manager tells of it, which guests it refuses to hold, and what it does when memory runs short.

use std::rc::Rc;

use sepal_guest_manager::{
    capacity::Used,
    client::{Client, Who},
    manager::Settings,
    pressure,
    registry::Limits,
    roles::Role,
    state::{State, StateFolder},
};
use sepal_schema::{
    config::{GuestConfig, device::Balloon},
    device_capnp::balloon_controller::{self, size_result},
    error::{Error, Kind, Outcome, read_completion},
    guest_capnp::guest,
    info::GuestStatus,
    node_capnp::{pressure_policy, pressure_state},
};

use crate::{
    fake::{Behaviour, Does},
    fake_devices::MOST_PAGES,
    world::{Caller, World, info, kill, named, power, run, wait, with},
};

const MIB: u64 = 1 << 20;

fn small(name: &str, memory_mib: i32) -> GuestConfig {
    GuestConfig {
        memory_mib,
        ..named(name)
    }
}

fn ballooned(name: &str) -> GuestConfig {
    GuestConfig {
        balloon: Some(Balloon::default()),
        ..small(name, 100)
    }
}

fn caller(world: &World, role: Role) -> Caller {
    let who = Who {
        uid: 1234,
        gid: 100,
        pid: None,
        share: None,
    };
    world.caller_with(|fds| Client::new(fds, who, role))
}

#[test]
fn the_host_is_told_with_what_guests_were_promised() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(small("web", 48), false).await.unwrap();
        let answer = caller.manager.node_request().send().promise.await.unwrap();
        let node = answer.get().unwrap().get_node().unwrap();
        assert!(node.get_cpus() >= 1 && node.get_memory_bytes() > 0);
        assert!(!node.get_cells().unwrap().is_empty());
        let layers = node.get_layers().unwrap();
        for layer in layers {
            assert_eq!(layer.get_offered(), layer.get_remedy().unwrap().is_empty(), "{layer:?}");
        }
        assert!(layers.len() >= 15);
        let capacity = node.get_capacity().unwrap();
        assert_eq!((capacity.get_guests(), capacity.get_memory_bytes()), (1, 48 * MIB));
        assert!(capacity.get_descriptors() < capacity.get_max_descriptors());
        let findings = node.get_findings().unwrap();
        let about = |about: &str| findings.iter().any(|finding| finding.get_about().unwrap() == about);
        assert!(about("state"), "this manager keeps nothing: {findings:?}");
        kill(&launched.guest).await.unwrap();
    });
}

#[test]
fn who_may_only_redeem_tokens_is_told_nothing_and_an_observer_changes_nothing() {
    run(async |world| {
        let nobody = caller(&world, Role::None);
        let node = nobody.manager.node_request().send().promise.await.err().unwrap();
        assert!(node.to_string().contains("PERMISSION_DENIED: node"), "{node}");
        let pressure = nobody.manager.pressure_request().send().promise.await.err().unwrap();
        assert!(
            pressure.to_string().contains("PERMISSION_DENIED: pressure"),
            "{pressure}"
        );
        caller(&world, Role::Observe)
            .manager
            .node_request()
            .send()
            .promise
            .await
            .unwrap();
        let operator = caller(&world, Role::Operate);
        let refused = set_policy(&operator, |_| ()).await.unwrap_err();
        assert_eq!(refused.kind, Kind::PermissionDenied);
        assert!(state(&operator, |state| state.get_policy().unwrap().get_enabled()).await);
    });
}

#[test]
fn no_more_memory_is_promised_than_may_be() {
    let settings = Settings {
        max_memory: Some(100 * MIB),
        ..Settings::default()
    };
    with(settings, async |world| {
        let caller = world.caller();
        let first = caller.launch_config(small("first", 48), false).await.unwrap();
        let _second = caller.launch_config(small("second", 48), true).await.unwrap();
        let refused = |error: Error| {
            assert_eq!((error.kind, &*error.about), (Kind::NoResources, "memoryMib"));
            assert!(error.message.contains("96 of the 100 MiB"), "{error}");
        };
        refused(caller.check(small("third", 5)).await.unwrap_err());
        refused(caller.launch_config(small("third", 5), false).await.err().unwrap());
        assert_eq!(world.fake.count(), 2, "no component was started for it");
        caller.launch_config(small("third", 4), true).await.unwrap();
        kill(&first.guest).await.unwrap();
        caller.launch_config(small("fourth", 48), true).await.unwrap();
    });
}

#[test]
fn what_a_guest_was_promised_is_given_back_however_its_creation_fails() {
    let settings = Settings {
        max_memory: Some(100 * MIB),
        ..Settings::default()
    };
    with(settings, async |world| {
        let caller = world.caller();
        for behaviour in [
            Behaviour {
                start: Does::Fails(Kind::StartFailure),
                ..Behaviour::default()
            },
            Behaviour {
                create: Does::Fails(Kind::BadConfig),
                ..Behaviour::default()
            },
            Behaviour {
                run: Does::Fails(Kind::VcpuStartFailure),
                ..Behaviour::default()
            },
        ] {
            world.fake.behaviour.set(behaviour);
            let launched = caller.launch_config(small("web", 100), true).await;
            if let Ok(launched) = launched {
                wait(&launched.guest).await;
            }
            assert_eq!(world.manager.capacity.promised(), 0, "{behaviour:?}");
        }
        world.fake.behaviour.set(Behaviour::default());
        // One that is created in the place of another has its memory.
        let lifecycle = caller.new_guest("again").await.unwrap();
        for _ in 0..3 {
            caller.create(&lifecycle, small("again", 100)).await.unwrap();
        }
        assert_eq!(world.manager.capacity.promised(), 100 * MIB);
        drop(lifecycle);
        while world.manager.capacity.promised() > 0 {
            caller.list().await;
        }
        let promised = world.manager.capacity.reserve(Used::default(), Used::default());
        assert_eq!((promised.0.used, promised.1.used), (0, 0));
    });
}

#[test]
fn no_more_guests_are_there_than_may_be() {
    let settings = Settings {
        limits: Limits {
            guests: 1,
            ..Limits::default()
        },
        ..Settings::default()
    };
    with(settings, async |world| {
        let caller = world.caller();
        let first = caller.launch("first").await.unwrap();
        let error = caller.launch("second").await.err().unwrap();
        assert_eq!(error.kind, Kind::NoResources);
        assert!(
            error.message.contains("1 guests") && error.message.contains("--max-guests"),
            "{error}"
        );
        kill(&first.guest).await.unwrap();
        caller.launch("second").await.unwrap();
    });
}

async fn state<T>(caller: &Caller, read: impl FnOnce(pressure_state::Reader<'_>) -> T) -> T {
    let answer = caller.manager.pressure_request().send().promise.await.unwrap();
    read(answer.get().unwrap().get_state().unwrap())
}

/// Sets the policy that is there, with some changes.
async fn set_policy(caller: &Caller, change: impl FnOnce(pressure_policy::Builder<'_>)) -> Result<(), Error> {
    let mut request = caller.manager.set_pressure_policy_request();
    let mut policy = request.get().init_policy();
    policy.set_enabled(true);
    // Nothing is given back by itself during a test, and the host's own pressure never counts.
    policy.set_calm_ms(3_600_000);
    policy.set_stall_percent(100);
    policy.set_window_ms(10_000);
    change(policy);
    read_completion(request.send().promise.await?.get()?)
}

async fn balloon(guest: &guest::Client) -> balloon_controller::Client {
    let answer = guest.balloon_controller_request().send().promise.await.unwrap();
    answer.get().unwrap().outcome().unwrap().get_controller().unwrap()
}

async fn try_by_hand(guest: &guest::Client, pages: u32) -> Result<(), Error> {
    let mut request = balloon(guest).await.request_balloon_size_request();
    request.get().set_pages(pages);
    read_completion(request.send().promise.await.unwrap().get().unwrap())
}

async fn set_by_hand(guest: &guest::Client, pages: u32) {
    try_by_hand(guest, pages).await.unwrap();
}

/// What the guest's component was asked for, in MiB.
async fn asked(guest: &guest::Client) -> u32 {
    let answer = balloon(guest)
        .await
        .get_balloon_size_request()
        .send()
        .promise
        .await
        .unwrap();
    match answer.get().unwrap().which().unwrap() {
        size_result::Size(size) => size.get_requested_pages() / 256,
        size_result::Error(error) => panic!("{error:?}"),
    }
}

/// Waits until the guest's component was asked for so much.
async fn until_asked(guest: &guest::Client, mib: u32) {
    while asked(guest).await != mib {}
}

#[test]
fn memory_is_taken_when_it_runs_short_and_given_back_when_it_does_not() {
    run(async |world| {
        let caller = world.caller();
        set_policy(&caller, |_| ()).await.unwrap();
        let web = caller.launch_config(ballooned("web"), true).await.unwrap().guest;
        let plain = caller.launch_config(small("plain", 100), false).await.unwrap();
        assert!(!state(&caller, |state| state.get_under_pressure()).await);
        pressure::pressed(&world.manager);
        until_asked(&web, 5).await;
        pressure::pressed(&world.manager);
        until_asked(&web, 10).await;
        let (pressed, taken) = state(&caller, |state| (state.get_under_pressure(), state.get_taken_bytes())).await;
        assert!(pressed && taken == 10 * MIB, "{taken}");
        for _ in 0..20 {
            pressure::pressed(&world.manager);
        }
        until_asked(&web, 50).await;
        // Calm from now on.
        set_policy(&caller, |mut policy| policy.set_calm_ms(1)).await.unwrap();
        until_asked(&web, 0).await;
        let (taken, up, down) = state(&caller, |state| {
            (state.get_taken_bytes(), state.get_inflations(), state.get_deflations())
        })
        .await;
        assert_eq!((taken, up, down), (0, 10, 10));
        kill(&plain.guest).await.unwrap();
    });
}

#[test]
fn who_sets_a_balloon_by_hand_keeps_it() {
    run(async |world| {
        let caller = world.caller();
        set_policy(&caller, |_| ()).await.unwrap();
        let (by_hand, other) = (
            caller.launch_config(ballooned("by-hand"), true).await.unwrap().guest,
            caller.launch_config(ballooned("other"), true).await.unwrap().guest,
        );
        set_by_hand(&by_hand, 256 * 20).await;
        pressure::pressed(&world.manager);
        until_asked(&other, 5).await;
        assert_eq!(asked(&by_hand).await, 20);
        // An empty one is nobody's.
        set_by_hand(&by_hand, 0).await;
        pressure::pressed(&world.manager);
        until_asked(&by_hand, 5).await;
        until_asked(&other, 10).await;
        // Whoever takes over what was taken owes nothing to the policy.
        set_by_hand(&by_hand, 256 * 5).await;
        set_policy(&caller, |mut policy| policy.set_enabled(false))
            .await
            .unwrap();
        until_asked(&other, 0).await;
        assert_eq!(asked(&by_hand).await, 5);
        pressure::pressed(&world.manager);
        assert_eq!(
            state(&caller, |state| state.get_taken_bytes()).await,
            0,
            "it is switched off"
        );
    });
}

#[test]
fn who_fails_to_set_a_balloon_by_hand_keeps_nothing() {
    run(async |world| {
        let caller = world.caller();
        set_policy(&caller, |_| ()).await.unwrap();
        let web = caller.launch_config(ballooned("web"), true).await.unwrap().guest;
        pressure::pressed(&world.manager);
        until_asked(&web, 5).await;
        let refused = try_by_hand(&web, MOST_PAGES + 1).await.unwrap_err();
        assert_eq!(refused.kind, Kind::BadConfig);
        let taken = state(&caller, |state| state.get_taken_bytes()).await;
        assert_eq!((asked(&web).await, taken), (5, 5 * MIB));
        pressure::pressed(&world.manager);
        until_asked(&web, 10).await;
        set_policy(&caller, |mut policy| policy.set_enabled(false))
            .await
            .unwrap();
        until_asked(&web, 0).await;
    });
}

#[test]
fn a_component_that_takes_no_more_gives_back_what_it_took() {
    run(async |world| {
        let caller = world.caller();
        set_policy(&caller, |mut policy| policy.set_step_percent(40))
            .await
            .unwrap();
        let large = GuestConfig {
            memory_mib: 600,
            ..ballooned("large")
        };
        let large = caller.launch_config(large, true).await.unwrap().guest;
        pressure::pressed(&world.manager);
        until_asked(&large, 240).await;
        // 300 MiB are more than it can do.
        pressure::pressed(&world.manager);
        while state(&caller, |state| state.get_taken_bytes()).await != 240 * MIB {}
        pressure::pressed(&world.manager);
        assert_eq!(
            state(&caller, |state| state.get_inflations()).await,
            2,
            "it is not asked again"
        );
        set_policy(&caller, |mut policy| policy.set_enabled(false))
            .await
            .unwrap();
        until_asked(&large, 0).await;
    });
}

#[test]
fn a_guest_that_begins_again_has_an_empty_balloon_and_takes_part() {
    run(async |world| {
        let caller = world.caller();
        set_policy(&caller, |_| ()).await.unwrap();
        let guest = caller.launch_config(ballooned("web"), true).await.unwrap().guest;
        set_by_hand(&guest, 256 * 20).await;
        let reset = power(&guest).reset_request().send().promise.await.unwrap();
        read_completion(reset.get().unwrap()).unwrap();
        while info(&guest).await.status != GuestStatus::Running {}
        assert_eq!(asked(&guest).await, 0);
        pressure::pressed(&world.manager);
        until_asked(&guest, 5).await;
    });
}

#[test]
fn a_policy_outlives_the_manager_that_keeps_state() {
    let above = tempfile::tempdir().unwrap();
    let kept = || Settings {
        state: State::Kept(Rc::new(StateFolder::open(&above.path().join("state")).unwrap())),
        ..Settings::default()
    };
    with(kept(), async |world| {
        set_policy(&world.caller(), |mut policy| policy.set_step_percent(7))
            .await
            .unwrap();
    });
    with(kept(), async |world| {
        let policy = world.manager.pressure.policy();
        assert_eq!((policy.step_percent, policy.calm.as_secs()), (7, 3600));
    });
}

#[test]
fn a_policy_that_cannot_be_is_refused() {
    run(async |world| {
        let caller = world.caller();
        let refused = set_policy(&caller, |mut policy| policy.set_step_percent(51))
            .await
            .unwrap_err();
        assert_eq!((refused.kind, &*refused.about), (Kind::BadConfig, "stepPercent"));
        let step = state(&caller, |state| state.get_policy().unwrap().get_step_percent()).await;
        assert_eq!(step, 5, "the old one holds");
    });
}
