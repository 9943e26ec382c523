//! The component's server over a real connection, with machines that only pretend: the behaviour that Fuchsia's controller tests ask for,
//! and one test for each weakness of that controller.

use std::{
    collections::VecDeque,
    fs::File,
    future::Future,
    os::unix::net::UnixStream,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
};

use capnp::capability::FromClientHook;
use futures::{
    FutureExt,
    channel::oneshot,
    future::{self, LocalBoxFuture},
};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    guest_capnp::{event_sink, guest, observer},
    info::{LayerInfo, LayerState, read_layers},
    lifecycle_capnp::{component, guest_lifecycle},
    report::{Reason, StopReport},
    transport::{Connection, Limits, Reactor, connect, guard, serve_with},
};

use super::{
    ComponentServer, Controller,
    vm::{Builder, Events, Vm},
};
use crate::{
    lifecycle::Generation,
    machine::{Happening, MachineEvent, MachineStats, RegisterDump, ResetCause},
};

/// What the next build does.
enum Build {
    Succeed,
    Fail(Kind),
    Panic,
    /// Goes on until it is cancelled; then fails, or succeeds because it was ready just before.
    UntilCancelled {
        ready: bool,
    },
}

/// Everything that the pretended machines share with the test.
#[derive(Default)]
struct World {
    builds: Mutex<VecDeque<Build>>,
    start_fails: AtomicBool,
    /// A tear-down waits for a message, if there is a receiver.
    hold_tear_down: Mutex<Option<mpsc::Receiver<()>>>,
    /// Where each machine so far reports.
    events: Mutex<Vec<(Generation, Events)>>,
    building: AtomicUsize,
    alive: AtomicUsize,
    started: AtomicUsize,
    buttons: AtomicUsize,
}

struct PretendedVm {
    world: Arc<World>,
    generation: Generation,
}

impl Drop for PretendedVm {
    fn drop(&mut self) {
        self.world.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Vm for PretendedVm {
    fn start(&mut self) -> Result<(), Error> {
        if self.world.start_fails.load(Ordering::SeqCst) {
            return Err(Error::new(Kind::VcpuStartFailure, "vCPU 0 did not start"));
        }
        self.world.started.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn pause(&mut self) {
        self.world.report(self.generation, Happening::Paused);
    }
    fn resume(&mut self) {}
    fn press_power_button(&mut self) -> Result<(), Error> {
        self.world.buttons.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn nmi(&mut self) -> Result<(), Error> {
        Ok(())
    }
    fn stats(&self) -> MachineStats {
        MachineStats::default()
    }
    fn tear_down(self: Box<Self>) -> Result<(), String> {
        let held = self.world.hold_tear_down.lock().unwrap().take();
        if let Some(held) = held {
            held.recv().unwrap();
        }
        Ok(())
    }
}

impl World {
    fn builder(self: &Arc<Self>) -> Builder {
        let world = self.clone();
        Arc::new(move |generation, _, events, cancel| {
            world.building.fetch_add(1, Ordering::SeqCst);
            let build = world.builds.lock().unwrap().pop_front().unwrap_or(Build::Succeed);
            world.events.lock().unwrap().push((generation, events));
            match build {
                Build::Fail(kind) => return Err(Error::new(kind, "as the test wants it")),
                Build::Panic => panic!("as the test wants it"),
                Build::UntilCancelled { ready } => {
                    while !cancel.load(Ordering::SeqCst) {
                        std::thread::yield_now();
                    }
                    if !ready {
                        return Err(Error::new(Kind::Cancelled, "cancelled"));
                    }
                }
                Build::Succeed => {}
            }
            assert_eq!(world.alive.fetch_add(1, Ordering::SeqCst), 0, "two machines at once");
            Ok(Box::new(PretendedVm {
                world: world.clone(),
                generation,
            }) as Box<dyn Vm>)
        })
    }

    fn report(&self, generation: Generation, what: Happening) {
        let events = self.events.lock().unwrap();
        let (_, report) = events
            .iter()
            .find(|(known, _)| *known == generation)
            .expect("no such machine");
        report(MachineEvent { generation, what });
    }
}

struct Bench {
    component: component::Client,
    lifecycle: guest_lifecycle::Client,
    connection: Connection,
    fds: sepal_schema::transport::FdTable,
    world: Arc<World>,
    exited: oneshot::Receiver<()>,
}

/// Runs a test against a component's server at the other end of a socket pair.
fn bench<F: Future<Output = ()>>(test: impl FnOnce(Bench) -> F) {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    let world = Arc::<World>::default();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (controller, exited) = Controller::new(&handle, world.builder());
    let layers = vec![LayerInfo {
        name: "seccomp".into(),
        state: LayerState::Holds,
        detail: "pretended".into(),
    }];
    let server = serve_with(&handle, theirs, Limits::default(), |fds| {
        ComponentServer::client(controller.clone(), fds, layers).client
    });
    server.unwrap().detach();
    drop(controller);
    let (component, connection) = connect::<component::Client>(&handle, ours, Limits::default()).unwrap();
    let lifecycle = component.clone().cast_to::<guest_lifecycle::Client>();
    let bench = Bench {
        component,
        lifecycle,
        fds: connection.fds(),
        connection,
        world: world.clone(),
        exited,
    };
    let patience = reactor.handle();
    let finished = reactor
        .run_until(patience.timeout(std::time::Duration::from_secs(30), test(bench)))
        .unwrap();
    finished.expect("the test did not end");
}

type RunAnswer = Result<StopReport, Error>;

impl Bench {
    fn create(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        self.create_with(|_| {})
    }

    fn create_with(
        &self,
        fill: impl FnOnce(guest_lifecycle::create_params::Builder<'_>),
    ) -> LocalBoxFuture<'static, Result<(), Error>> {
        let mut request = self.lifecycle.create_request();
        let kernel = self.fds.send(File::open("/dev/null").unwrap().into()).unwrap();
        request.get().init_config().init_kernel().init_fd().set_number(kernel);
        fill(request.get());
        let answer = request.send().promise;
        async move { read_completion(answer.await.unwrap().get().unwrap()) }.boxed_local()
    }

    fn run(&self) -> impl Future<Output = RunAnswer> + use<> {
        use guest_lifecycle::run_result::Which;
        let answer = self.lifecycle.run_request().send().promise;
        async move {
            match answer.await.unwrap().get().unwrap().which().unwrap() {
                Which::Ended(report) => Ok(StopReport::read(report.unwrap()).unwrap()),
                Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
            }
        }
    }

    fn stop(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        let answer = self.lifecycle.stop_request().send().promise;
        async move { read_completion(answer.await.unwrap().get().unwrap()) }
    }

    fn guest(&self) -> guest::Client {
        self.lifecycle.bind_request().send().pipeline.get_guest()
    }

    fn observer(&self) -> observer::Client {
        self.guest().observer_request().send().pipeline.get_observer()
    }

    async fn wait_for(&self, what: &str, holds: impl Fn(&World) -> bool) {
        // The pretended machines live on other threads; each round trip gives them time.
        while !holds(&self.world) {
            let alive = self.component.layers_request().send().promise.await;
            assert!(alive.is_ok(), "the server ended while the test waited for: {what}");
        }
    }

    async fn until_running(&self) {
        self.wait_for("start", |world| world.started.load(Ordering::SeqCst) > 0)
            .await;
    }
}

fn kind<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Kind {
    outcome.unwrap_err().kind
}

async fn is_pending<T>(future: impl Future<Output = T>, bench: &Bench) -> bool {
    // Another call on the same connection is answered meanwhile.
    let other = bench.component.layers_request().send().promise;
    match future::select(pin!(future), pin!(other)).await {
        future::Either::Left(_) => false,
        future::Either::Right(_) => true,
    }
}

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
    StopReport::read(answer.get().unwrap()).unwrap()
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
            assert_eq!(StopReport::read(answer.get().unwrap()).unwrap().reason, Reason::Killed);
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
        assert!(info.get().unwrap().get_info().unwrap().get_paused());
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
