//! A component's server at the other end of a socket pair, and machines that only pretend.

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
    crash::{Registers, read_vcpus},
    error::{Error, Kind, read_completion},
    guest_capnp::{guest, observer},
    info::{LayerInfo, LayerState},
    lifecycle_capnp::{component, guest_lifecycle},
    report::StopReport,
    transport::{Connection, Handle, Limits, Reactor, connect},
};

use crate::{
    lifecycle::Generation,
    machine::{
        Answer, Frame, Happening, MachineError, MachineEvent, MachineStats, Question, RegisterDump, Stack, Translation,
        VcpuState, VcpuStats,
    },
    server::{
        Controller,
        devices::Handles,
        vm::{Builder, Events, LastRegisters, ShowAnswer, ShowRegisters, Vm},
    },
};

/// What the next build does.
pub(super) enum Build {
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
pub(super) struct World {
    pub(super) builds: Mutex<VecDeque<Build>>,
    pub(super) start_fails: AtomicBool,
    /// A tear-down waits for a message, if there is a receiver.
    pub(super) hold_tear_down: Mutex<Option<mpsc::Receiver<()>>>,
    /// What it tells of its vCPUs then.
    pub(super) last_registers: Mutex<LastRegisters>,
    /// Where each machine so far reports.
    events: Mutex<Vec<(Generation, Events)>>,
    pub(super) building: AtomicUsize,
    pub(super) alive: AtomicUsize,
    pub(super) started: AtomicUsize,
    pub(super) buttons: AtomicUsize,
    /// What vCPUs show, in turn; after that they are stuck.
    pub(super) registers: Mutex<VecDeque<Result<RegisterDump, MachineError>>>,
    /// What stuck vCPUs were asked for.
    pub(super) unanswered: Mutex<Vec<ShowRegisters>>,
}

struct PretendedVm {
    world: Arc<World>,
    generation: Generation,
    paused: bool,
}

impl Drop for PretendedVm {
    fn drop(&mut self) {
        self.world.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Vm for PretendedVm {
    fn start(&mut self) -> Result<(), Error> {
        if self.world.start_fails.load(Ordering::SeqCst) {
            return Err(Error::new(Kind::VcpuStartFailure, "vCPU 0 did not start").about("vcpu0"));
        }
        self.world.started.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn pause(&mut self) {
        self.paused = true;
        self.world.report(self.generation, Happening::Paused);
    }
    fn is_paused(&self) -> bool {
        self.paused
    }
    fn resume(&mut self) {
        self.paused = false;
    }
    fn press_power_button(&mut self) -> Result<(), Error> {
        self.world.buttons.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn nmi(&mut self) -> Result<(), Error> {
        Ok(())
    }
    fn registers(&self, _: u8, show: ShowRegisters) -> Result<(), Error> {
        match self.world.registers.lock().unwrap().pop_front() {
            Some(registers) => show(registers),
            None => self.world.unanswered.lock().unwrap().push(show),
        }
        Ok(())
    }
    fn look(&self, _: u8, question: Question, show: ShowAnswer) -> Result<(), Error> {
        show(match question {
            Question::Memory { address: 0, .. } | Question::Translation { address: 0 } => {
                Err(MachineError::BadConfig {
                    field: "address",
                    reason: "0x0 is not mapped".to_owned(),
                })
            }
            Question::Memory { address, length } => Ok(Answer::Memory(vec![address as u8; length as usize])),
            Question::Translation { address } => Ok(Answer::Translation(Translation {
                physical: address & 0xfff,
                page_size: 4096,
                writable: false,
                user: true,
                executable: true,
            })),
            Question::Stack { most } => Ok(Answer::Stack(Stack {
                frames: (0..most as u64)
                    .map(|n| Frame {
                        address: 0x1000 + n,
                        stack_pointer: 0x2000 + n,
                        reliable: n == 0,
                    })
                    .collect(),
                end: "that is all".to_owned(),
            })),
        });
        Ok(())
    }
    fn read_memory(&self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        if address == 0 {
            return Err(Error::bad_config("address", "0x0 is no memory"));
        }
        Ok(vec![address as u8; length as usize])
    }
    fn stats(&self) -> MachineStats {
        MachineStats {
            serial_dropped: 5,
            vcpus: vec![
                VcpuStats {
                    exits: std::array::from_fn(|i| if i % 7 == 0 { 1 + i as u64 } else { 0 }),
                    cpu_time_ns: 0,
                    state: VcpuState::Running,
                };
                2
            ],
        }
    }
    fn devices(&self) -> Handles {
        Handles::default()
    }
    fn tear_down(self: Box<Self>) -> Result<LastRegisters, String> {
        let held = self.world.hold_tear_down.lock().unwrap().take();
        if let Some(held) = held {
            held.recv().unwrap();
        }
        Ok(self.world.last_registers.lock().unwrap().clone())
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
                paused: false,
            }) as Box<dyn Vm>)
        })
    }

    pub(super) fn report(&self, generation: Generation, what: Happening) {
        let events = self.events.lock().unwrap();
        let (_, report) = events
            .iter()
            .find(|(known, _)| *known == generation)
            .expect("no such machine");
        report(MachineEvent { generation, what });
    }
}

pub(super) struct Bench {
    pub(super) component: component::Client,
    pub(super) lifecycle: guest_lifecycle::Client,
    pub(super) connection: Connection,
    pub(super) handle: Handle,
    pub(super) fds: sepal_schema::transport::FdTable,
    pub(super) world: Arc<World>,
    pub(super) exited: oneshot::Receiver<()>,
}

/// Runs a test against a component's server at the other end of a socket pair.
pub(super) fn bench<F: Future<Output = ()>>(test: impl FnOnce(Bench) -> F) {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    let world = Arc::<World>::default();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let layers = vec![LayerInfo {
        name: "seccomp".into(),
        state: LayerState::Holds,
        detail: "pretended".into(),
    }];
    let (controller, exited) = Controller::new(&handle, layers, world.builder());
    controller.serve(theirs).unwrap();
    drop(controller);
    let (component, connection) = connect::<component::Client>(&handle, ours, Limits::default()).unwrap();
    let lifecycle = component.clone().cast_to::<guest_lifecycle::Client>();
    let bench = Bench {
        component,
        lifecycle,
        handle: handle.clone(),
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

pub(super) type RunAnswer = Result<StopReport, Error>;

impl Bench {
    pub(super) fn create(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        self.create_with(|_| {})
    }

    pub(super) fn create_with(
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

    pub(super) fn run(&self) -> impl Future<Output = RunAnswer> + use<> {
        let run = self.run_and_tell();
        async move { run.await.0 }
    }

    /// What run answers, and where it says that the vCPUs were.
    pub(super) fn run_and_tell(&self) -> impl Future<Output = (RunAnswer, Vec<Registers>)> + use<> {
        use guest_lifecycle::run_result::Which;
        let answer = self.lifecycle.run_request().send().promise;
        async move {
            let answer = answer.await.unwrap();
            let answer = answer.get().unwrap();
            let ended = match answer.which().unwrap() {
                Which::Ended(report) => Ok(StopReport::read(report.unwrap()).unwrap()),
                Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
            };
            (ended, read_vcpus(answer).unwrap())
        }
    }

    pub(super) fn stop(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        let answer = self.lifecycle.stop_request().send().promise;
        async move { read_completion(answer.await.unwrap().get().unwrap()) }
    }

    pub(super) fn guest(&self) -> guest::Client {
        self.lifecycle.bind_request().send().pipeline.get_guest()
    }

    pub(super) fn observer(&self) -> observer::Client {
        self.guest().observer_request().send().pipeline.get_observer()
    }

    pub(super) async fn wait_for(&self, what: &str, holds: impl Fn(&World) -> bool) {
        // The pretended machines live on other threads; each round trip gives them time.
        while !holds(&self.world) {
            let alive = self.component.layers_request().send().promise.await;
            assert!(alive.is_ok(), "the server ended while the test waited for: {what}");
        }
    }

    pub(super) async fn until_running(&self) {
        self.wait_for("start", |world| world.started.load(Ordering::SeqCst) > 0)
            .await;
    }
}

pub(super) fn kind<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Kind {
    outcome.unwrap_err().kind
}

pub(super) async fn is_pending<T>(future: impl Future<Output = T>, bench: &Bench) -> bool {
    // Another call on the same connection is answered meanwhile.
    let other = bench.component.layers_request().send().promise;
    match future::select(pin!(future), pin!(other)).await {
        future::Either::Left(_) => false,
        future::Either::Right(_) => true,
    }
}
