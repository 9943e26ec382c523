//! Resets, restarts and pauses: what a guest's holder sees of them.

use std::{io::Write, os::unix::net::UnixStream, rc::Rc, time::Duration};

use futures::{AsyncReadExt, AsyncWriteExt, join};
use sepal_guest_manager::{changed::Changed, manager::Settings};
use sepal_schema::{
    config::{
        File, GuestConfig, OnReset,
        device::{Backend, Disk, DiskMode, Listener, Share, Vsock},
    },
    error::{Error, Kind, read_completion},
    guest_capnp::{event, event_sink, guest, subscription},
    info::GuestStatus,
    report::{Reason, Rung},
    transport::guard,
};

use crate::{
    fake::{Behaviour, Does},
    vsock::{self, Taker, with_vsock},
    world::{
        Caller, Launched, World, impatient, info, kill, named, observer, power, read, run, run_lifecycle, status, stop,
        wait, with,
    },
};

/// What a subscriber heard: what happened, and of which generation.
#[derive(Default)]
pub(crate) struct Heard(Changed<Vec<(&'static str, u64)>>);

struct Ear(Rc<Heard>);

impl event_sink::Server for Ear {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        let event = params.get()?.get_event()?;
        let what = match event.which()? {
            event::Defined(()) => "defined",
            event::Starting(()) => "starting",
            event::Started(()) => "started",
            event::Paused(()) => "paused",
            event::Resumed(()) => "resumed",
            event::ShuttingDown(()) => "shutting-down",
            event::Stopped(_) => "stopped",
            event::Restarting(_) => "restarting",
            event::Crashed(_) => "crashed",
            event::GuestPanicked(_) => "panicked",
            _ => "another",
        };
        self.0.0.change(|heard| heard.push((what, event.get_generation())));
        Ok(())
    }
}

impl Heard {
    /// Waits until that has happened to a generation.
    pub(crate) async fn until(&self, what: &'static str, generation: u64) {
        let happened = |heard: &mut Vec<_>| heard.contains(&(what, generation)).then_some(());
        self.0.until(happened).await;
    }

    /// What happened so far, without the generations.
    pub(crate) fn kinds(&self) -> Vec<&'static str> {
        self.0.look(|heard| heard.iter().map(|(what, _)| *what).collect())
    }
}

/// A guest, and what is heard of it from the beginning.
pub(crate) struct Scene {
    pub(crate) caller: Caller,
    launched: Launched,
    pub(crate) heard: Rc<Heard>,
    _subscription: subscription::Client,
}

impl Scene {
    pub(crate) async fn new(world: &World, config: GuestConfig) -> Self {
        let caller = world.caller();
        let heard = Rc::new(Heard::default());
        let mut request = caller.manager.subscribe_request();
        request.get().set_sink(guard::new_client(Ear(heard.clone())));
        let answer = request.send().promise.await.unwrap();
        let subscription = answer.get().unwrap().get_subscription().unwrap();
        let launched = caller.launch_config(config, false).await.unwrap();
        Self {
            caller,
            launched,
            heard,
            _subscription: subscription,
        }
    }

    pub(crate) fn guest(&self) -> &guest::Client {
        &self.launched.guest
    }
}

pub(crate) fn on_reset(on_reset: OnReset) -> GuestConfig {
    GuestConfig {
        on_reset,
        ..named("web")
    }
}

/// A manager on which a guest that restarts too often waits for longer than any test takes.
fn slow() -> Settings {
    Settings {
        restart_wait: Duration::from_secs(3600),
        ..Settings::default()
    }
}

async fn reset(guest: &guest::Client) -> Result<(), Error> {
    read_completion(power(guest).reset_request().send().promise.await?.get()?)
}

async fn pause(guest: &guest::Client) {
    let done = power(guest).pause_request().send().promise.await.unwrap();
    read_completion(done.get().unwrap()).unwrap();
}

pub(crate) async fn resume(guest: &guest::Client) {
    let done = power(guest).resume_request().send().promise.await.unwrap();
    read_completion(done.get().unwrap()).unwrap();
}

/// Reads all that was printed until it ends like that.
async fn printed(guest: &guest::Client, end: &str) -> String {
    let mut all = Vec::new();
    while !all.ends_with(end.as_bytes()) {
        let (more, ended) = read(guest, all.len() as u64, true).await;
        assert!(!ended, "{}", String::from_utf8_lossy(&all));
        all.extend(more);
    }
    String::from_utf8(all).unwrap()
}

#[test]
fn a_guest_that_resets_itself_begins_again_under_the_same_capabilities() {
    run(async |world| {
        let scene = Scene::new(&world, on_reset(OnReset::Restart)).await;
        let guest = scene.guest();
        let waiting = observer(guest).wait_request().send().promise;
        let first = world.fake.last();
        first.print(b"one\n");
        first.end(Reason::Reset);
        scene.heard.until("started", 2).await;
        assert_eq!((world.fake.count(), world.fake.alive()), (2, 1));

        let second = world.fake.last();
        second.print(b"two\n");
        assert_eq!(printed(guest, "two\n").await, "one\ntwo\n");
        let mut typed = guest.serial_request().send().pipeline.get_serial().write_request();
        typed.get().set_bytes(b"hello");
        typed.send().await.unwrap();
        let mut arrived = [0; 5];
        let mut serial = world.handle.register(second.serial()).unwrap();
        serial.read_exact(&mut arrived).await.unwrap();
        assert_eq!(&arrived, b"hello");

        let seen = info(guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Running, 2));
        let before = seen.stop.unwrap();
        assert_eq!((before.reason, before.rung), (Reason::Reset, Rung::None));
        let expected = ["defined", "starting", "started", "restarting", "starting", "started"];
        assert_eq!(scene.heard.kinds(), expected);

        second.end(Reason::Shutdown);
        let ended = waiting.await.unwrap();
        let report = sepal_schema::report::StopReport::read_result(ended.get().unwrap()).unwrap();
        assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::None));
    });
}

#[test]
fn a_reset_from_outside_begins_again_whatever_the_configuration_says() {
    run(async |world| {
        let scene = Scene::new(&world, named("web")).await;
        let guest = scene.guest();
        pause(guest).await;
        assert!(info(guest).await.paused);
        reset(guest).await.unwrap();
        let seen = info(guest).await;
        assert_eq!(
            (seen.status, seen.generation, seen.paused),
            (GuestStatus::Running, 2, false)
        );
        let before = seen.stop.unwrap();
        assert_eq!((before.reason, before.rung), (Reason::Reset, Rung::Forced));
        // Two at a time are one.
        let (one, two) = join!(reset(guest), reset(guest));
        assert_eq!((one, two), (Ok(()), Ok(())));
        assert_eq!((info(guest).await.generation, world.fake.count()), (3, 3));
        kill(guest).await.unwrap();
        assert_eq!(reset(guest).await.unwrap_err().kind, Kind::NotRunning);
    });
}

#[test]
fn a_component_that_does_not_answer_is_killed_for_a_reset() {
    with(impatient(), async |world| {
        world.fake.behaviour.set(Behaviour {
            stop: Does::Hangs,
            ..Behaviour::default()
        });
        let scene = Scene::new(&world, named("web")).await;
        reset(scene.guest()).await.unwrap();
        let seen = info(scene.guest()).await;
        assert_eq!((seen.generation, seen.stop.unwrap().rung), (2, Rung::Killed));
        assert_eq!((world.fake.count(), world.fake.alive()), (2, 1));
        assert!(!scene.heard.kinds().contains(&"crashed"));
    });
}

#[test]
fn what_was_never_run_is_not_reset() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("web").await.unwrap();
        caller.create(&lifecycle, named("")).await.unwrap();
        let guest = caller.lookup("web").await.unwrap();
        let error = reset(&guest).await.unwrap_err();
        assert_eq!(error.kind, Kind::NotRunning);
        assert!(error.message.contains("has not been run"), "{error}");
    });
}

#[test]
fn a_client_that_drives_the_lifecycle_sees_one_run() {
    run(async |world| {
        let caller = world.caller();
        let lifecycle = caller.new_guest("web").await.unwrap();
        let config = GuestConfig {
            on_reset: OnReset::Restart,
            ..named("")
        };
        caller.create(&lifecycle, config).await.unwrap();
        let guest = caller.lookup("web").await.unwrap();
        let restart = async {
            world.fake.last().running().await;
            world.fake.last().end(Reason::Reset);
            while info(&guest).await.generation == 1 || status(&guest).await != GuestStatus::Running {}
            world.fake.last().end(Reason::Shutdown);
        };
        let (ended, ()) = join!(run_lifecycle(&lifecycle), restart);
        assert_eq!(ended.unwrap().reason, Reason::Shutdown);
        assert_eq!(world.fake.count(), 2);
    });
}

#[test]
fn a_guest_may_wait_paused_before_its_first_instruction() {
    run(async |world| {
        let scene = Scene::new(&world, on_reset(OnReset::Pause)).await;
        let guest = scene.guest();
        world.fake.last().end(Reason::Reset);
        scene.heard.until("paused", 2).await;
        let seen = info(guest).await;
        assert_eq!(
            (seen.generation, seen.paused, seen.status),
            (2, true, GuestStatus::Starting)
        );
        assert!(!world.fake.last().is_running());
        pause(guest).await;
        let error = stop(guest, 50, false).await.unwrap_err();
        assert_eq!(error.kind, Kind::TimedOut);
        assert!(error.message.contains("is paused"), "{error}");

        resume(guest).await;
        assert!(world.fake.last().is_running());
        let seen = info(guest).await;
        assert_eq!(
            (seen.generation, seen.paused, seen.status),
            (2, false, GuestStatus::Running)
        );
        let expected = [
            "defined",
            "starting",
            "started",
            "restarting",
            "starting",
            "paused",
            "resumed",
            "started",
        ];
        assert_eq!(scene.heard.kinds(), expected);

        // What waits can be stopped, too.
        world.fake.last().end(Reason::Reset);
        scene.heard.until("paused", 3).await;
        let report = stop(guest, 50, true).await.unwrap();
        assert_eq!((report.reason, report.rung), (Reason::Hangup, Rung::Forced));
        assert_eq!(world.fake.alive(), 0);
    });
}

/// Has the guest reset itself until it has to wait.
async fn reset_too_often(world: &World, scene: &Scene) {
    for generation in 1..=4 {
        scene.heard.until("started", generation).await;
        world.fake.last().end(Reason::Reset);
    }
    scene.heard.until("restarting", 4).await;
}

#[test]
fn a_guest_that_restarts_too_often_waits_and_can_be_stopped_at_once() {
    with(slow(), async |world| {
        let scene = Scene::new(&world, on_reset(OnReset::Restart)).await;
        let guest = scene.guest();
        reset_too_often(&world, &scene).await;
        let seen = info(guest).await;
        assert_eq!((seen.status, seen.generation), (GuestStatus::Starting, 4));
        let error = scene
            .caller
            .launch_config(named("web"), false)
            .await
            .map(drop)
            .unwrap_err();
        assert!(error.message.contains("is restarting"), "{error}");
        assert_eq!(stop(guest, 50, false).await.unwrap_err().kind, Kind::TimedOut);
        let report = kill(guest).await.unwrap();
        assert_eq!((report.reason, report.rung), (Reason::Killed, Rung::Forced));
        assert_eq!((world.fake.count(), world.fake.alive()), (4, 0));
        assert_eq!(wait(guest).await, report);
    });
}

#[test]
fn a_reset_ends_the_waiting() {
    with(slow(), async |world| {
        let scene = Scene::new(&world, on_reset(OnReset::Restart)).await;
        reset_too_often(&world, &scene).await;
        reset(scene.guest()).await.unwrap();
        assert_eq!((info(scene.guest()).await.generation, world.fake.count()), (5, 5));
    });
}

#[test]
fn a_dropped_lease_ends_a_guest_that_is_restarting() {
    with(slow(), async |world| {
        let scene = Scene::new(&world, on_reset(OnReset::Restart)).await;
        reset_too_often(&world, &scene).await;
        let Launched { guest, lease, .. } = scene.launched;
        drop(lease);
        assert_eq!(wait(&guest).await.reason, Reason::Killed);
    });
}

#[test]
fn a_guest_that_cannot_be_created_again_ends_with_the_reason() {
    for broken in [
        Behaviour {
            create: Does::Fails(Kind::NoResources),
            ..Behaviour::default()
        },
        Behaviour {
            start: Does::Fails(Kind::StartFailure),
            ..Behaviour::default()
        },
    ] {
        run(async |world| {
            let scene = Scene::new(&world, on_reset(OnReset::Restart)).await;
            world.fake.behaviour.set(broken);
            let error = reset(scene.guest()).await.unwrap_err();
            assert!(matches!(error.kind, Kind::NoResources | Kind::StartFailure), "{error}");
            let report = wait(scene.guest()).await;
            assert_eq!((report.reason, report.error), (Reason::StartFailed, Some(error)));
            assert_eq!(world.fake.alive(), 0);
        });
    }
}

#[test]
fn what_serves_one_run_only_keeps_a_guest_from_beginning_again() {
    run(async |world| {
        let with_share = |on_reset| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let share = Share {
                tag: "home".into(),
                backend: Backend::Socket(theirs.into()),
                queues: 0,
            };
            let config = GuestConfig {
                shares: vec![share],
                on_reset,
                ..named("web")
            };
            (config, ours)
        };
        let caller = world.caller();
        let (config, _backend) = with_share(OnReset::Restart);
        let refused = caller.launch_config(config, false).await.map(drop).unwrap_err();
        let about = |error: &Error| (error.kind, error.about.clone());
        let expected = (Kind::NotSupported, "shares[0].backend".to_owned());
        assert_eq!(about(&refused), expected);

        let (config, backend) = with_share(OnReset::Stop);
        let launched = caller.launch_config(config, false).await.unwrap();
        assert_eq!(about(&reset(&launched.guest).await.unwrap_err()), expected);
        assert_eq!(world.fake.count(), 1);
        world.fake.last().end(Reason::Reset);
        assert_eq!(wait(&launched.guest).await.reason, Reason::Reset);
        // Nobody holds the other end any more.
        world.fake.last().config.take();
        let mut backend = world.handle.register(backend).unwrap();
        assert_eq!(backend.read(&mut [0]).await.unwrap(), 0);
    });
}

#[test]
fn what_was_written_to_a_volatile_disk_is_dropped() {
    run(async |world| {
        let image = tempfile::tempfile().unwrap();
        image.set_len(1 << 20).unwrap();
        let scratch = tempfile::tempfile().unwrap();
        let mut disk = Disk::new(File::Fd(image.into()), DiskMode::VolatileWrite);
        disk.scratch = File::Fd(scratch.try_clone().unwrap().into());
        let config = GuestConfig {
            disks: vec![disk],
            ..named("web")
        };
        let scene = Scene::new(&world, config).await;
        (&scratch).write_all(b"written").unwrap();
        reset(scene.guest()).await.unwrap();
        assert_eq!(scratch.metadata().unwrap().len(), 0);
        let config = world.fake.last().config.take().unwrap();
        assert!(matches!(
            (&config.disks[0].image, &config.disks[0].scratch),
            (File::Fd(_), File::Fd(_))
        ));
    });
}

#[test]
fn whoever_listens_goes_on_listening() {
    run(async |world| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let taker = Taker::default();
        let listener = Listener {
            port: 99,
            acceptor: guard::new_client(taker.clone()),
        };
        let config = with_vsock(Vsock {
            listeners: vec![listener],
            socket_path: path.to_str().unwrap().to_owned(),
            ..Vsock::default()
        });
        let scene = Scene::new(&world, config).await;
        let endpoint = vsock::endpoint(scene.guest()).await.unwrap();
        let kept = vsock::listen(&endpoint, 52, taker.clone()).await.unwrap();
        drop(vsock::listen(&endpoint, 53, taker.clone()).await.unwrap());
        reset(scene.guest()).await.unwrap();

        let sockets = world.fake.last().sockets.clone();
        for port in [99, 52] {
            let open = async {
                let (asked, _, connection) = taker.next().await;
                assert_eq!(asked, port);
                let answer = connection.open_request().send().promise.await.unwrap();
                vsock::socket(&world, &scene.caller, answer.get().unwrap()).unwrap()
            };
            let (guest, socket) = join!(sockets.connect(&world, port), open);
            vsock::talk(&guest.unwrap(), &socket).await;
        }
        // Nobody listens there any more: not by name, and beside the path neither.
        assert!(sockets.connect(&world, 53).await.is_none());
        // What connects to the guest finds the one that runs.
        let (connected, guest) = join!(
            vsock::connect(&world, &scene.caller, &endpoint, 22),
            sockets.next(&world)
        );
        assert_eq!(guest.0, 22);
        vsock::talk(&connected.unwrap(), &guest.1).await;
        let mut client = world.handle.register(UnixStream::connect(&path).unwrap()).unwrap();
        client.write_all(b"CONNECT 23\n").await.unwrap();
        assert_eq!(sockets.next(&world).await.0, 23);
        drop(kept);
    });
}
