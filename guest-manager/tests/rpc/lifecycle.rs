//! `GuestLifecycle` driven by a client: the table of the design, and what death does in each state.

use futures::join;
use sepal_guest_manager::component::Exit;
use sepal_schema::{
    config::GuestConfig,
    error::{Error, Kind, read_completion},
    info::GuestStatus,
    lifecycle_capnp::guest_lifecycle,
    report::Reason,
};

use crate::{
    fake::{Behaviour, Does},
    world::{AsOutput, Caller, World, impatient, info, named, run, run_lifecycle, status, wait, with},
};

fn kind<T>(result: Result<T, Error>) -> Kind {
    result.err().unwrap().kind
}

async fn stop(lifecycle: &guest_lifecycle::Client) {
    let answer = lifecycle.stop_request().send().promise.await.unwrap();
    read_completion(answer.get().unwrap()).unwrap();
}

fn bind(lifecycle: &guest_lifecycle::Client) -> sepal_schema::guest_capnp::guest::Client {
    lifecycle.bind_request().send().pipeline.get_guest()
}

async fn created(world: &World) -> (Caller, guest_lifecycle::Client) {
    let caller = world.caller();
    let lifecycle = caller.new_guest("mine").await.unwrap();
    caller.create(&lifecycle, named("")).await.unwrap();
    (caller, lifecycle)
}

/// Waits until a creation has come to the component.
async fn until_asked(world: &World, caller: &Caller, components: usize) {
    while world.fake.count() < components || world.fake.last().config.borrow().is_none() {
        caller.list().await;
    }
}

#[test]
fn everything_goes_in_one_round_trip() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        // Sent one after the other without waiting for anything.
        let create = lifecycle.create_request().send().promise;
        let guest = bind(&lifecycle);
        let run = lifecycle.run_request().send().promise;
        let serial = guest.serial_request().send().pipeline.get_serial();
        let output = serial.client.cast_to_output();
        let read = output.read_request().send().promise;
        let print = async {
            until_asked(&world, &caller, 1).await;
            world.fake.last().print(b"S");
        };
        let (create, read, ()) = join!(create, read, print);
        read_completion(create.unwrap().get().unwrap()).unwrap();
        assert_eq!(read.unwrap().get().unwrap().get_bytes().unwrap(), b"S");
        while status(&guest).await != GuestStatus::Running {}
        world.fake.last().end(Reason::Shutdown);
        let run = run.await.unwrap();
        assert!(matches!(
            run.get().unwrap().which().unwrap(),
            guest_lifecycle::run_result::Ended(_)
        ));
    });
}

#[test]
fn run_needs_create_and_happens_once() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        assert_eq!(kind(run_lifecycle(&lifecycle).await), Kind::NotCreated);
        let broken = bind(&lifecycle).serial_request().send().promise.await.err().unwrap();
        assert!(broken.to_string().contains("NOT_CREATED"), "{broken}");
        caller.create(&lifecycle, named("mine")).await.unwrap();
        let first = lifecycle.run_request().send().promise;
        while status(&bind(&lifecycle)).await != GuestStatus::Running {}
        assert_eq!(kind(run_lifecycle(&lifecycle).await), Kind::AlreadyRunning);
        assert_eq!(kind(caller.create(&lifecycle, named("")).await), Kind::AlreadyRunning);
        world.fake.last().end(Reason::Shutdown);
        first.await.unwrap();
        assert_eq!(kind(run_lifecycle(&lifecycle).await), Kind::NotCreated);
    });
}

#[test]
fn stop_is_legal_in_every_state_and_returns_when_all_is_over() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        stop(&lifecycle).await;

        // While it is created.
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let halt = async {
            until_asked(&world, &caller, 1).await;
            stop(&lifecycle).await;
        };
        let (create, ran, ()) = join!(caller.create(&lifecycle, named("")), run_lifecycle(&lifecycle), halt);
        assert_eq!(kind(create), Kind::ControllerForcedHalt);
        assert_eq!(kind(ran), Kind::NotCreated);

        // When it is created; the component that hangs in create was still good for a stop, and is used again.
        world.fake.last().die(Exit::Code(0));
        world.fake.behaviour.set(Behaviour::default());
        caller.create(&lifecycle, named("")).await.unwrap();
        stop(&lifecycle).await;
        assert_eq!(kind(run_lifecycle(&lifecycle).await), Kind::NotCreated);

        // While it runs.
        caller.create(&lifecycle, named("")).await.unwrap();
        let guest = bind(&lifecycle);
        let halt = async {
            while status(&guest).await != GuestStatus::Running {}
            stop(&lifecycle).await;
            assert_eq!(status(&guest).await, GuestStatus::Stopped);
        };
        let (ran, ()) = join!(run_lifecycle(&lifecycle), halt);
        assert_eq!(kind(ran), Kind::ControllerForcedHalt);
        let stop = info(&guest).await.stop.unwrap();
        assert_eq!(stop.reason, Reason::Killed);
        caller.create(&lifecycle, named("")).await.unwrap();
        assert_eq!(world.fake.count(), 2, "the component is kept for the next creation");
    });
}

#[test]
fn a_creation_takes_the_place_of_one_that_never_ran() {
    run(async |world| {
        let (caller, lifecycle) = created(&world).await;
        let first = bind(&lifecycle);
        assert_eq!(info(&first).await.generation, 1);
        let config = GuestConfig {
            memory_mib: 32,
            ..named("")
        };
        caller.create(&lifecycle, config).await.unwrap();
        assert_eq!(wait(&first).await.reason, Reason::Killed);
        let second = info(&bind(&lifecycle)).await;
        assert_eq!((second.generation, second.descriptor.unwrap().memory_mib), (2, 32));
        assert_eq!(world.fake.alive(), 1);
    });
}

#[test]
fn other_limits_need_another_component() {
    run(async |world| {
        let (caller, lifecycle) = created(&world).await;
        stop(&lifecycle).await;
        let config = GuestConfig {
            waived_layers: vec!["landlock".into()],
            ..named("")
        };
        caller.create(&lifecycle, config).await.unwrap();
        assert_eq!((world.fake.count(), world.fake.alive()), (2, 1));
        assert_eq!(world.fake.requests.borrow()[1].waived_layers, ["landlock"]);
    });
}

#[test]
fn a_failed_creation_leaves_none_and_can_be_tried_again() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Fails(Kind::KernelLoadFailure),
            ..Behaviour::default()
        });
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        let error = caller.create(&lifecycle, named("")).await.unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::KernelLoadFailure, "fake"));
        assert_eq!(kind(run_lifecycle(&lifecycle).await), Kind::NotCreated);
        world.fake.last().die(Exit::Code(0));
        world.fake.behaviour.set(Behaviour::default());
        caller.create(&lifecycle, named("")).await.unwrap();
    });
}

#[test]
fn death_while_creating_is_the_answer_to_create() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        let die = async {
            until_asked(&world, &caller, 1).await;
            world.fake.last().die(Exit::Signal(9));
        };
        let (create, ()) = join!(caller.create(&lifecycle, named("")), die);
        let error = create.unwrap_err();
        assert_eq!(error.kind, Kind::VmmTerminated);
        assert!(error.message.contains("SIGKILL"), "{}", error.message);
        assert_eq!(caller.list().await[0].status, GuestStatus::VmmUnexpectedTermination);
    });
}

#[test]
fn a_component_that_gives_up_before_it_has_created_anything_says_why() {
    run(async |world| {
        let words = "vmm-component: closing the jail: jail layer landlock is unavailable\n";
        world.fake.behaviour.set(Behaviour {
            create: Does::Hangs,
            words,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        let die = async {
            until_asked(&world, &caller, 1).await;
            world.fake.last().die(Exit::Code(1));
        };
        let (create, ()) = join!(caller.create(&lifecycle, named("")), die);
        let error = create.unwrap_err();
        assert_eq!(error.kind, Kind::StartFailure);
        assert!(error.message.contains("landlock"), "{}", error.message);
        assert_eq!(caller.list().await[0].status, GuestStatus::Stopped);
    });
}

#[test]
fn death_of_a_created_guest_is_noticed_and_another_component_comes() {
    run(async |world| {
        let (caller, lifecycle) = created(&world).await;
        let guest = bind(&lifecycle);
        status(&guest).await;
        world.fake.last().die(Exit::Code(1));
        let report = wait(&guest).await;
        assert_eq!(report.reason, Reason::VmmTerminated);
        assert!(report.detail.contains("status 1"), "{}", report.detail);
        assert_eq!(kind(run_lifecycle(&lifecycle).await), Kind::NotCreated);
        caller.create(&lifecycle, named("")).await.unwrap();
        assert_eq!((world.fake.count(), world.fake.alive()), (2, 1));
    });
}

#[test]
fn death_while_running_is_the_answer_to_run() {
    run(async |world| {
        let (_caller, lifecycle) = created(&world).await;
        let guest = bind(&lifecycle);
        let die = async {
            while status(&guest).await != GuestStatus::Running {}
            world.fake.last().die(Exit::Signal(11));
        };
        let (ran, ()) = join!(run_lifecycle(&lifecycle), die);
        assert_eq!(kind(ran), Kind::VmmTerminated);
    });
}

#[test]
fn death_while_stopping_ends_the_stop() {
    run(async |world| {
        world.fake.behaviour.set(Behaviour {
            stop: Does::Hangs,
            ..Behaviour::default()
        });
        let (_caller, lifecycle) = created(&world).await;
        let guest = bind(&lifecycle);
        let die = async {
            world.fake.last().asked_to_stop().await;
            assert_eq!(status(&guest).await, GuestStatus::Stopping);
            world.fake.last().die(Exit::Signal(6));
        };
        let ((), ()) = join!(stop(&lifecycle), die);
        assert_eq!(wait(&guest).await.reason, Reason::Killed);
    });
}

#[test]
fn death_of_an_idle_component_is_no_ones_business() {
    run(async |world| {
        let (caller, lifecycle) = created(&world).await;
        stop(&lifecycle).await;
        assert_ne!(caller.list().await[0].component_pid, 0);
        world.fake.last().die(Exit::Signal(9));
        while caller.list().await[0].component_pid != 0 {}
        assert_eq!(caller.list().await[0].status, GuestStatus::Stopped);
        caller.create(&lifecycle, named("")).await.unwrap();
    });
}

#[test]
fn a_component_that_breaks_off_its_connection_is_killed() {
    with(impatient(), async |world| {
        let (_caller, lifecycle) = created(&world).await;
        let guest = bind(&lifecycle);
        status(&guest).await;
        world.fake.last().hang_up();
        let report = wait(&guest).await;
        assert_eq!(report.reason, Reason::VmmTerminated);
        assert!(report.detail.contains("broke off its connection"), "{}", report.detail);
        assert_eq!(world.fake.alive(), 0);
    });
}

#[test]
fn letting_go_of_the_lifecycle_frees_the_name_and_ends_the_component() {
    run(async |world| {
        let (caller, lifecycle) = created(&world).await;
        let guest = bind(&lifecycle);
        assert_eq!(status(&guest).await, GuestStatus::Starting);
        drop(lifecycle);
        let _again = caller.new_guest("mine").await.unwrap();
        assert_eq!(wait(&guest).await.reason, Reason::Killed);
        while world.fake.alive() > 0 {
            caller.list().await;
        }
        assert_eq!(caller.list().await.len(), 1);
    });
}

#[test]
fn what_only_the_manager_may_say_is_refused() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("mine").await.unwrap();
        let mut request = lifecycle.create_request();
        request.get().init_host().set_unassisted(true);
        let answer = request.send().promise.await.unwrap();
        let error = read_completion(answer.get().unwrap()).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "host"));
        assert_eq!(kind(caller.create(&lifecycle, named("other")).await), Kind::BadConfig);
        assert_eq!(kind(caller.new_guest("no spaces").await), Kind::BadConfig);
    });
}
