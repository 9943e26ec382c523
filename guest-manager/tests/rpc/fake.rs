//! A component that does what a test wants, and the starter that "starts" it.

pub(crate) mod keeper;
mod machine;
mod server;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::Rc,
};

use futures::{channel::oneshot, future::LocalBoxFuture};
use sepal_guest_manager::{
    changed::Changed,
    component::{ComponentStarter, Exit, StartRequest, Started},
};
use sepal_schema::{
    config::{self, GuestConfig},
    crash::Registers,
    error::{Error, Kind},
    guest_capnp::event_sink,
    lifecycle_capnp::component,
    report::{Reason, Rung, StopReport},
    transport::{Connection, FdTable, Handle, Limits, guard, serve_with},
};

use self::{keeper::Keeper, machine::Machine, server::Server};
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
    /// What it does when the next manager comes.
    pub(crate) attach: Does,
    /// It does not go when it is killed, as one in the middle of a system call.
    pub(crate) lingers: bool,
}

/// Starts fake components, and remembers them.
pub(crate) struct Fake {
    handle: Handle,
    pub(crate) behaviour: Cell<Behaviour>,
    pub(crate) processes: RefCell<Vec<Rc<Process>>>,
    pub(crate) requests: RefCell<Vec<StartRequest>>,
    /// Limits that were changed, and of which process.
    pub(crate) limited: RefCell<Vec<(u32, config::Limits)>>,
    /// The parent of components that go on without their manager; none: there are none.
    keeper: Option<Rc<Keeper>>,
}

impl Fake {
    pub(crate) fn new(handle: &Handle) -> Rc<Self> {
        Rc::new(Self {
            handle: handle.clone(),
            behaviour: Cell::default(),
            processes: RefCell::default(),
            requests: RefCell::default(),
            limited: RefCell::default(),
            keeper: None,
        })
    }

    /// One whose components go on, with this keeper.
    pub(crate) fn kept(handle: &Handle, keeper: &Rc<Keeper>) -> Rc<Self> {
        let mut fake = Self::new(handle);
        let inner = Rc::get_mut(&mut fake).unwrap();
        inner.keeper = Some(keeper.clone());
        inner.processes.replace(keeper.processes());
        fake
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
                behaviour: Cell::new(behaviour),
                exit: RefCell::new(Some(exit)),
                ended: RefCell::default(),
                successors: RefCell::default(),
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
            process.serve(&fake.handle, theirs);
            let (stderr, mut words) = std::io::pipe().unwrap();
            words.write_all(behaviour.words.as_bytes()).unwrap();
            let pid = process.pid;
            let killed = Rc::downgrade(&process);
            let custody = fake.keeper.as_ref().map(|keeper| keeper.custody(&process));
            fake.processes.borrow_mut().push(process);
            Ok(Started {
                pid,
                socket: ours,
                stderr: Some(stderr.into()),
                kill: Box::new(move || {
                    if let Some(process) = killed.upgrade() {
                        process.is_killed();
                    }
                }),
                exit: Box::pin(async move { exited.await.unwrap_or(Exit::Unknown("the test is over".into())) }),
                custody,
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

    fn outlived(&self) -> Result<(), Error> {
        match &self.0.keeper {
            Some(_) => Ok(()),
            None => Err(Error::not_supported("durable", "the fake has no keeper")),
        }
    }

    fn keep_for_successor(&self, kept: BTreeMap<String, OwnedFd>) -> Result<(), Error> {
        self.outlived()?;
        self.0.keeper.as_ref().unwrap().keep_own(kept)
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
    /// Somebody wants its process to go.
    killed: bool,
    /// By a later manager.
    attached: bool,
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
    behaviour: Cell<Behaviour>,
    exit: RefCell<Option<oneshot::Sender<Exit>>>,
    ended: RefCell<Option<Exit>>,
    /// Its end of the socket by which the connection to the next manager comes.
    successors: RefCell<Option<OwnedFd>>,
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
        if told.is_some() {
            self.ended.replace(Some(exit.clone()));
        }
        drop(self.connection.borrow_mut().take());
        drop(self.serial.borrow_mut().take());
        self.consoles.borrow_mut().clear();
        drop(self.events.borrow_mut().take());
        if let Some(told) = told {
            let _ = told.send(exit);
        }
    }

    fn is_killed(&self) {
        self.state.change(|state| state.killed = true);
        if !self.behaviour.get().lingers {
            self.die(Exit::Signal(9));
        }
    }

    /// Serves a manager.
    fn serve(self: &Rc<Self>, handle: &Handle, socket: UnixStream) {
        let serve = |fds: FdTable| {
            let process = self.clone();
            process.sockets.set_fds(fds.clone());
            guard::new_client::<component::Client, _>(Server { process, fds }).client
        };
        let connection = serve_with(handle, socket, Limits::default(), serve).unwrap();
        *self.connection.borrow_mut() = Some(connection);
    }

    /// Behaves so from now on.
    pub(crate) fn behave(&self, behaviour: Behaviour) {
        self.behaviour.set(behaviour);
        self.state.change(|_| ());
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

    /// Waits until its manager has heard how the run ended.
    pub(crate) async fn told_of_its_end(&self) {
        let killed = |state: &mut State| state.killed.then_some(());
        self.state.until(killed).await;
    }

    /// Whether a manager has come that did not start it, and hears its events.
    pub(crate) fn is_attached(&self) -> bool {
        self.state.look(|state| state.attached)
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
        self.tell_numbered(0, fill).await;
    }

    /// The same, with the number of the event, which a component that goes on without its manager counts.
    pub(crate) async fn tell_numbered(
        &self,
        number: u64,
        fill: impl FnOnce(sepal_schema::guest_capnp::event::Builder<'_>),
    ) {
        let sink = self.events.borrow().clone().unwrap();
        let mut call = sink.event_request();
        let mut event = call.get().init_event();
        event.set_sequence(number);
        fill(event);
        call.hook.send().promise.await.unwrap();
    }

    /// Waits until its behaviour is so.
    async fn behaves(&self, ready: impl Fn(Behaviour) -> bool) {
        self.state.until(|_| ready(self.behaviour.get()).then_some(())).await;
    }
}
