//! A component that does what a test wants, and the starter that "starts" it.

mod machine;

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io::Write,
    os::unix::net::UnixStream,
    rc::Rc,
};

use futures::{channel::oneshot, future::LocalBoxFuture};
use sepal_guest_manager::{
    changed::Changed,
    component::{ComponentStarter, Exit, StartRequest, Started},
};
use sepal_schema::{
    config::{self, File, GuestConfig},
    crash::{Registers, write_vcpus},
    error::{Error, Kind, write_completion},
    guest_capnp::event_sink,
    info::{LayerInfo, LayerState, write_layers},
    lifecycle_capnp::{component, guest_lifecycle, host_setup},
    report::{Reason, Rung, StopReport},
    transport::{Connection, FdTable, Handle, Limits, guard, serve_with},
};

use self::machine::Machine;
use crate::{fake_devices::Told, vsock};

type Reply = Result<(), capnp::Error>;

/// What a component does with a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Does {
    #[default]
    Works,
    Fails(Kind),
    Hangs,
}

/// How components behave that are started from now on.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Behaviour {
    pub(crate) start: Does,
    pub(crate) create: Does,
    pub(crate) run: Does,
    /// `run` returns at once: the guest shut down before anybody could tell that it had started.
    pub(crate) quick: bool,
    pub(crate) stop: Does,
    /// Works: the guest shuts down. Hangs: it ignores the button. Fails: there is none.
    pub(crate) button: Does,
    /// Whether its limits can be changed.
    pub(crate) limit: Does,
    /// It says that it is the test's own process, in which the test can have threads.
    pub(crate) is_the_test: bool,
    /// What it writes to standard error when it starts.
    pub(crate) words: &'static str,
}

/// Starts fake components, and remembers them.
pub(crate) struct Fake {
    handle: Handle,
    pub(crate) behaviour: Cell<Behaviour>,
    pub(crate) processes: RefCell<Vec<Rc<Process>>>,
    pub(crate) requests: RefCell<Vec<StartRequest>>,
    /// Limits that were changed, and of which process.
    pub(crate) limited: RefCell<Vec<(u32, config::Limits)>>,
}

impl Fake {
    pub(crate) fn new(handle: &Handle) -> Rc<Self> {
        Rc::new(Self {
            handle: handle.clone(),
            behaviour: Cell::default(),
            processes: RefCell::default(),
            requests: RefCell::default(),
            limited: RefCell::default(),
        })
    }

    /// The component that was started last.
    pub(crate) fn last(&self) -> Rc<Process> {
        self.processes.borrow().last().unwrap().clone()
    }

    /// How many components were started.
    pub(crate) fn count(&self) -> usize {
        self.processes.borrow().len()
    }

    /// How many components live.
    pub(crate) fn alive(&self) -> usize {
        let processes = self.processes.borrow();
        processes.iter().filter(|process| process.alive()).count()
    }
}

/// The starter that the manager gets.
pub(crate) struct Starter(pub(crate) Rc<Fake>);

impl ComponentStarter for Starter {
    fn start(&self, request: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>> {
        let fake = self.0.clone();
        fake.requests.borrow_mut().push(request);
        Box::pin(async move {
            let behaviour = fake.behaviour.get();
            match behaviour.start {
                Does::Works => {}
                Does::Fails(kind) => return Err(Error::new(kind, "the fake does not start")),
                Does::Hangs => futures::future::pending().await,
            }
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (exit, exited) = oneshot::channel();
            let process = Rc::new(Process {
                pid: match behaviour.is_the_test {
                    true => std::process::id(),
                    false => 1000 + u32::try_from(fake.count()).unwrap(),
                },
                behaviour,
                exit: RefCell::new(Some(exit)),
                connection: RefCell::default(),
                state: Changed::default(),
                events: RefCell::default(),
                serial: RefCell::default(),
                consoles: RefCell::default(),
                config: RefCell::default(),
                registers: RefCell::default(),
                figures: Figures::default(),
                sockets: Rc::default(),
                told: Rc::default(),
            });
            let serve = |fds: FdTable| {
                let process = process.clone();
                process.sockets.set_fds(fds.clone());
                guard::new_client::<component::Client, _>(Server { process, fds }).client
            };
            let connection = serve_with(&fake.handle, theirs, Limits::default(), serve).unwrap();
            *process.connection.borrow_mut() = Some(connection);
            let (stderr, mut words) = std::io::pipe().unwrap();
            words.write_all(behaviour.words.as_bytes()).unwrap();
            let pid = process.pid;
            let killed = Rc::downgrade(&process);
            fake.processes.borrow_mut().push(process);
            Ok(Started {
                pid,
                socket: ours,
                stderr: Some(stderr.into()),
                kill: Box::new(move || {
                    if let Some(process) = killed.upgrade() {
                        process.die(Exit::Signal(9));
                    }
                }),
                exit: Box::pin(async move { exited.await.unwrap_or(Exit::Unknown("the test is over".into())) }),
                custody: None,
            })
        })
    }

    fn set_limits(&self, pid: u32, limits: config::Limits) -> LocalBoxFuture<'static, Result<(), Error>> {
        self.0.limited.borrow_mut().push((pid, limits));
        Box::pin(futures::future::ready(match self.0.behaviour.get().limit {
            Does::Fails(kind) => Err(Error::new(kind, "the fake has no limits")),
            Does::Works | Does::Hangs => Ok(()),
        }))
    }

    fn check(&self, _: &StartRequest) -> Result<(), Error> {
        match self.0.behaviour.get().start {
            Does::Fails(kind) => Err(Error::new(kind, "the fake does not start")),
            Does::Works | Does::Hangs => Ok(()),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    created: bool,
    running: bool,
    /// How `run` returns.
    result: Option<Result<StopReport, Error>>,
    pressed: usize,
    stops: usize,
    /// A create that is under way is to give up.
    cancelled: bool,
}

/// A component's figures.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    /// It does not answer as long as this is set.
    pub(crate) mute: Changed<bool>,
    /// How often it was asked.
    pub(crate) asked: Changed<u64>,
    /// Lost bytes of serial output, and 17.
    pub(crate) lost: Cell<u64>,
}

/// A component's "process".
pub(crate) struct Process {
    pub(crate) pid: u32,
    behaviour: Behaviour,
    exit: RefCell<Option<oneshot::Sender<Exit>>>,
    connection: RefCell<Option<Connection>>,
    state: Changed<State>,
    events: RefCell<Option<event_sink::Client>>,
    serial: RefCell<Option<UnixStream>>,
    /// Its ends of the console's ports.
    pub(crate) consoles: RefCell<Vec<UnixStream>>,
    pub(crate) config: RefCell<Option<GuestConfig>>,
    /// Where its vCPUs were, told with the end of the run.
    pub(crate) registers: RefCell<Vec<(u8, Registers)>>,
    /// What it tells of its figures.
    pub(crate) figures: Figures,
    /// Its guest's.
    pub(crate) sockets: Rc<vsock::Sockets>,
    /// What its devices were told.
    pub(crate) told: Rc<Told>,
}

impl Process {
    pub(crate) fn alive(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Ends as a process does: everything that it had open closes.
    pub(crate) fn die(&self, exit: Exit) {
        let told = self.exit.borrow_mut().take();
        drop(self.connection.borrow_mut().take());
        drop(self.serial.borrow_mut().take());
        self.consoles.borrow_mut().clear();
        drop(self.events.borrow_mut().take());
        if let Some(told) = told {
            let _ = told.send(exit);
        }
    }

    /// Closes the connection without ending.
    pub(crate) fn hang_up(&self) {
        drop(self.connection.borrow_mut().take());
    }

    /// The guest prints.
    pub(crate) fn print(&self, text: &[u8]) {
        self.serial.borrow_mut().as_mut().unwrap().write_all(text).unwrap();
    }

    /// Its end of the serial port.
    pub(crate) fn serial(&self) -> UnixStream {
        self.serial.borrow().as_ref().unwrap().try_clone().unwrap()
    }

    /// The guest ends by itself.
    pub(crate) fn end(&self, reason: Reason) {
        let report = StopReport {
            reason,
            detail: format!("{reason:?}"),
            error: None,
            uptime_ns: 7,
            time_ns: 0,
            about: String::new(),
            rung: Rung::None,
            component: None,
        };
        self.finish(Ok(report));
    }

    /// `run` returns.
    pub(crate) fn finish(&self, result: Result<StopReport, Error>) {
        drop(self.serial.borrow_mut().take());
        self.state.change(|state| {
            state.created = false;
            if state.running {
                state.running = false;
                state.result = Some(result);
            }
        });
    }

    /// Waits until its guest runs.
    pub(crate) async fn running(&self) {
        self.state.until(|state| state.running.then_some(())).await;
    }

    /// Whether its guest runs.
    pub(crate) fn is_running(&self) -> bool {
        self.state.look(|state| state.running)
    }

    /// Waits until its power button is pressed.
    pub(crate) async fn was_pressed(&self) {
        self.state.until(|state| (state.pressed > 0).then_some(())).await;
    }

    /// How often its power button was pressed.
    pub(crate) fn pressed(&self) -> usize {
        self.state.look(|state| state.pressed)
    }

    /// Waits until it is asked to stop its machine.
    pub(crate) async fn asked_to_stop(&self) {
        self.state.until(|state| (state.stops > 0).then_some(())).await;
    }

    /// Tells the manager that something happened.
    pub(crate) async fn tell(&self, fill: impl FnOnce(sepal_schema::guest_capnp::event::Builder<'_>)) {
        let sink = self.events.borrow().clone().unwrap();
        let mut call = sink.event_request();
        fill(call.get().init_event());
        call.hook.send().promise.await.unwrap();
    }
}

struct Server {
    process: Rc<Process>,
    fds: FdTable,
}

async fn answer(does: Does) -> Result<(), Error> {
    match does {
        Does::Works => Ok(()),
        Does::Fails(kind) => Err(Error::new(kind, "the fake does not do it").about("fake")),
        Does::Hangs => futures::future::pending().await,
    }
}

impl Server {
    fn take_serial(&self, host: host_setup::Reader<'_>) -> UnixStream {
        match host.get_serial().which().unwrap() {
            host_setup::serial::Stream(stream) => self.fds.take(stream.unwrap().get_number()).unwrap().into(),
            host_setup::serial::None(()) => panic!("the manager gives every component a serial stream"),
        }
    }
}

impl guest_lifecycle::Server for Server {
    fn create(
        self: Rc<Self>,
        params: guest_lifecycle::CreateParams,
        mut results: guest_lifecycle::CreateResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.process.clone();
        {
            let params = params.get().unwrap();
            let config = GuestConfig::decode(params.get_config().unwrap(), &self.fds).unwrap();
            let file = |file: &File| matches!(file, File::Fd(_) | File::None);
            assert!(
                file(&config.kernel) && file(&config.initrd),
                "a component gets descriptors only"
            );
            let host = params.get_host().unwrap();
            *process.serial.borrow_mut() = Some(self.take_serial(host));
            let take =
                |fd: sepal_schema::file_capnp::fd_ref::Reader<'_>| self.fds.take(fd.get_number()).unwrap().into();
            *process.consoles.borrow_mut() = host.get_consoles().unwrap().iter().map(take).collect();
            *process.events.borrow_mut() = Some(host.get_events().unwrap());
            *process.config.borrow_mut() = Some(config);
        }
        async move {
            process.state.change(|state| state.cancelled = false);
            let stopped = process
                .state
                .until(|state| state.cancelled.then(|| Err(Error::new(Kind::Cancelled, "stopped"))));
            let stopped = std::pin::pin!(stopped);
            let created = std::pin::pin!(answer(process.behaviour.create));
            let outcome = futures::future::select(created, stopped).await.factor_first().0;
            process.state.change(|state| state.created = outcome.is_ok());
            write_completion(&outcome, results.get());
            Ok(())
        }
    }

    fn bind(
        self: Rc<Self>,
        _: guest_lifecycle::BindParams,
        mut results: guest_lifecycle::BindResults,
    ) -> impl Future<Output = Reply> + 'static {
        results
            .get()
            .set_guest(guard::new_client(Machine(self.process.clone())));
        futures::future::ready(Ok(()))
    }

    fn run(
        self: Rc<Self>,
        _: guest_lifecycle::RunParams,
        mut results: guest_lifecycle::RunResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.process.clone();
        async move {
            process.state.until(|state| state.created.then_some(())).await;
            if let Err(error) = answer(process.behaviour.run).await {
                error.write(results.get().init_error());
                return Ok(());
            }
            process.state.change(|state| state.running = true);
            if process.behaviour.quick {
                process.end(Reason::Shutdown);
            } else {
                process.tell(|mut event| event.set_started(())).await;
            }
            let result = process.state.until(|state| state.result.take()).await;
            let registers = process.registers.borrow();
            write_vcpus(&registers, results.get().init_registers(registers.len() as u32));
            match result {
                Ok(report) => report.write(results.get().init_ended()),
                Err(error) => error.write(results.get().init_error()),
            }
            Ok(())
        }
    }

    fn stop(
        self: Rc<Self>,
        _: guest_lifecycle::StopParams,
        mut results: guest_lifecycle::StopResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.process.clone();
        process.state.change(|state| {
            state.stops += 1;
            state.cancelled = true;
        });
        async move {
            let outcome = answer(process.behaviour.stop).await;
            process.finish(Err(Error::new(Kind::ControllerForcedHalt, "stopped")));
            process.state.change(|state| state.stops = 0);
            write_completion(&outcome, results.get());
            Ok(())
        }
    }
}

impl component::Server for Server {
    fn layers(
        self: Rc<Self>,
        _: component::LayersParams,
        mut results: component::LayersResults,
    ) -> impl Future<Output = Reply> + 'static {
        let layer = |name: &str, state| LayerInfo {
            name: name.into(),
            state,
            detail: "as the fake says".into(),
        };
        let layers = [layer("seccomp", LayerState::Holds), layer("cgroup", LayerState::Waived)];
        write_layers(&layers, results.get().init_layers(2));
        futures::future::ready(Ok(()))
    }
}
