//! Carries out what the lifecycle decides, on the control loop. Nothing here waits but the start of a machine, for as long as the loops of its devices on
//! the bus take to set themselves up: well below a millisecond each. Its vCPUs have done so when it was made.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    rc::{Rc, Weak},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{
    StreamExt,
    channel::{mpsc, oneshot},
};
use sepal_devices::dispatch::DeviceEvent;
use sepal_schema::{
    crash::{Registers, write_vcpus},
    error::{Error, Kind},
    info::{GuestStatus, LayerInfo},
    lifecycle_capnp::guest_lifecycle::run_result,
    report::StopReport,
};

use sepal_schema::transport::Handle;

use super::{
    devices::Handles,
    jobs, news, settle,
    state::{GuestState, Nature},
    successors::Attendance,
    teller::Lent,
    vm::{Builder, LastRegisters, Vm, VmSpec},
};
use crate::{
    lifecycle::{Absence, Effect, Ending, Generation, Input, Lifecycle, Reply, Token},
    machine::{Happening, MachineEvent, ResetCause},
};

/// How long a guest that has ended without its manager is remembered for the next one.
const LINGER: Duration = Duration::from_secs(600);

/// What other threads tell the control loop.
pub(super) enum News {
    /// A build is done.
    Built(Generation, Result<Box<dyn Vm>, Error>),
    /// A machine is gone, and where its vCPUs were if one of them failed.
    TornDown(Generation, LastRegisters),
    /// A machine's thread reports.
    Machine(MachineEvent),
    /// No successor has come for a while.
    Lingered(Absence),
}

/// A create request, decoded.
pub(super) struct Creation {
    pub(super) spec: VmSpec,
    pub(super) nature: Nature,
    pub(super) host: Lent,
    /// Where managers to come arrive.
    pub(super) successors: Option<OwnedFd>,
}

/// What a manager finds that takes a guest over.
pub(super) struct Attached {
    pub(super) guest: Rc<GuestState>,
    pub(super) status: GuestStatus,
    /// Events that nobody will hear of.
    pub(super) missed: u64,
}

/// What came of a run.
pub(super) struct Ended {
    /// How the guest ended, or what made it.
    pub(super) report: Result<StopReport, Error>,
    /// Where its vCPUs were when one of them failed.
    pub(super) registers: Vec<(u8, Registers)>,
}

impl Ended {
    /// Nothing ran.
    fn without_guest(error: Error) -> Self {
        Self {
            report: Err(error),
            registers: Vec::new(),
        }
    }

    /// Writes it into an answer.
    pub(super) fn write(&self, mut to: run_result::Builder<'_>) {
        let registers = to
            .reborrow()
            .init_registers(u32::try_from(self.registers.len()).unwrap_or(0));
        write_vcpus(&self.registers, registers);
        match &self.report {
            Ok(report) => report.write(to.init_ended()),
            Err(error) => error.write(to.init_error()),
        }
    }
}

/// Owns the lifecycle and the machine. Lives on the control loop.
pub struct Controller {
    pub(super) inner: RefCell<Inner>,
    pub(super) spawner: Handle,
    builder: Builder,
    layers: Vec<LayerInfo>,
    news: mpsc::UnboundedSender<News>,
    me: Weak<Self>,
}

#[derive(Default)]
pub(super) struct Inner {
    pub(super) lifecycle: Lifecycle,
    last_token: Token,
    asked: HashMap<Token, oneshot::Sender<Reply>>,
    creations: HashMap<Token, Result<Creation, Error>>,
    /// The machine, from built until it is being torn down.
    vm: Option<Box<dyn Vm>>,
    /// The guest of the latest creation.
    pub(super) guest: Option<Rc<GuestState>>,
    /// The guest before it that ran to its end, for a manager that was not there then.
    pub(super) last: Option<Rc<GuestState>>,
    /// Who the manager is, and who may come after it.
    pub(super) attendance: Attendance,
    /// Interrupts the build that is under way.
    cancel: Arc<AtomicBool>,
    exit: Option<oneshot::Sender<()>>,
}

impl Inner {
    /// The guest, or the one that was there last.
    fn known(&self) -> Option<&Rc<GuestState>> {
        self.guest.as_ref().or(self.last.as_ref())
    }
}

impl Controller {
    /// A controller on the loop of `spawner`, whose machines `builder` makes; and what resolves when the process should exit, which is when
    /// the manager that is [served](Self::serve) has gone and nobody can come after it. `layers` are those of the process's jail.
    pub fn new(spawner: &Handle, layers: Vec<LayerInfo>, builder: Builder) -> (Rc<Self>, oneshot::Receiver<()>) {
        let (news, mut arrivals) = mpsc::unbounded();
        let (exit, exited) = oneshot::channel();
        let inner = Inner {
            exit: Some(exit),
            ..Inner::default()
        };
        let controller = Rc::new_cyclic(|me| Self {
            inner: RefCell::new(inner),
            spawner: spawner.clone(),
            builder,
            layers,
            news,
            me: me.clone(),
        });
        // Keeps the controller until everything has ended, also when nobody else does any more.
        let carrier = controller.clone();
        spawner.spawn(async move {
            while carrier.inner.borrow().exit.is_some() {
                match arrivals.next().await {
                    Some(news) => carrier.learn(news),
                    None => break,
                }
            }
        });
        (controller, exited)
    }

    /// The layers of the process's jail.
    pub(super) fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }

    /// The guest that there is, or was, for another manager.
    ///
    /// # Errors
    /// `NOT_CREATED`.
    pub(super) fn attach(&self, host: Lent) -> Result<Attached, Error> {
        let (guest, is_stopping) = {
            let inner = self.inner.borrow();
            (inner.known().cloned(), inner.lifecycle.is_stopping())
        };
        let guest = guest.ok_or_else(|| Error::new(Kind::NotCreated, "there is no guest"))?;
        let missed = guest.attach(host);
        let status = match guest.info().status {
            GuestStatus::Running if is_stopping => GuestStatus::Stopping,
            status => status,
        };
        Ok(Attached { guest, status, missed })
    }

    /// What the call of run was answered, or will be.
    pub(super) fn ended(&self) -> impl Future<Output = Ended> + use<> {
        let none = || Error::new(Kind::NotCreated, "there is no guest");
        let guest = self.inner.borrow().known().cloned();
        let ended = guest.ok_or_else(none).and_then(|guest| guest.ended());
        async move {
            match ended {
                Ok(ended) => ended.await.unwrap_or_else(|| Ended::without_guest(lost())),
                Err(error) => Ended::without_guest(error),
            }
        }
    }

    /// Asks for a machine. `creation` is an error if the request could not even be read; that counts as a create that failed.
    pub(super) fn create(&self, creation: Result<Creation, Error>) -> impl Future<Output = Result<(), Error>> + use<> {
        let reply = self.ask(|inner, token| {
            inner.creations.insert(token, creation);
            Input::Create(token)
        });
        completion(reply)
    }

    /// The guest, once it has been created.
    pub(super) fn bind(&self) -> impl Future<Output = Result<Rc<GuestState>, Error>> + use<> {
        let reply = self.ask(|_, token| Input::Bind(token));
        let guest = self.inner.borrow().guest.clone();
        async move {
            match (reply.await, guest) {
                (Ok(Reply::Bound(Ok(generation))), Some(guest)) if guest.generation() == generation => Ok(guest),
                (Ok(Reply::Bound(Err(error))), _) => Err(error),
                _ => Err(lost()),
            }
        }
    }

    /// Runs the guest to its end, which must be one of its own.
    pub(super) fn run(&self) -> impl Future<Output = Ended> + use<> {
        let reply = self.ask(|_, token| Input::Run(token));
        let guest = self.inner.borrow().guest.clone();
        async move {
            let reply = reply.await;
            let registers = guest.as_ref().map(|guest| guest.registers());
            let report = match reply {
                Ok(Reply::Ended(Ok(_))) => guest.and_then(|guest| guest.report()).ok_or_else(lost),
                Ok(Reply::Ended(Err(error))) => Err(error),
                _ => Err(lost()),
            };
            Ended {
                report,
                registers: registers.unwrap_or_default(),
            }
        }
    }

    /// Ends the guest by force.
    pub(super) fn stop(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        completion(self.ask(|_, token| Input::Stop(token)))
    }

    /// Uses the machine of `generation` while it runs.
    ///
    /// # Errors
    /// `NOT_RUNNING` if it does not, and whatever `act` says.
    pub(super) fn with_running<T>(
        &self,
        generation: Generation,
        act: impl FnOnce(&mut dyn Vm) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let inner = &mut *self.inner.borrow_mut();
        match &mut inner.vm {
            Some(vm) if inner.lifecycle.running() == Some(generation) => act(vm.as_mut()),
            _ => Err(Error::new(Kind::NotRunning, "the guest does not run")),
        }
    }

    /// The devices of the machine of `generation`, from its creation to its end.
    ///
    /// # Errors
    /// `NOT_RUNNING` if it is no more.
    pub(super) fn devices(&self, generation: Generation) -> Result<Handles, Error> {
        let inner = self.inner.borrow();
        match (&inner.vm, &inner.guest) {
            (Some(vm), Some(guest)) if guest.generation() == generation => Ok(vm.devices()),
            _ => Err(Error::new(Kind::NotRunning, "the guest has ended")),
        }
    }

    fn ask(&self, request: impl FnOnce(&mut Inner, Token) -> Input) -> oneshot::Receiver<Reply> {
        let (sender, receiver) = oneshot::channel();
        let input = {
            let inner = &mut *self.inner.borrow_mut();
            inner.last_token += 1;
            let token = inner.last_token;
            inner.asked.insert(token, sender);
            request(inner, token)
        };
        self.feed(input);
        receiver
    }

    fn learn(&self, news: News) {
        match news {
            News::Built(generation, Ok(vm)) => {
                self.inner.borrow_mut().vm = Some(vm);
                self.feed(Input::Built(generation, Ok(())));
            }
            News::Built(generation, Err(error)) => self.feed(Input::Built(generation, Err(error))),
            News::TornDown(generation, registers) => {
                if let Some(guest) = self.guest(generation) {
                    guest.keep_registers(registers);
                }
                self.feed(Input::TornDown(generation));
            }
            News::Machine(event) => self.machine_reports(event),
            News::Lingered(absence) => self.feed(Input::Lingered(absence)),
        }
    }

    fn machine_reports(&self, event: MachineEvent) {
        let generation = event.generation;
        let ending = match event.what {
            Happening::Shutdown => Ok(Ending::Shutdown),
            Happening::Reset { how } => Ok(Ending::Reset {
                detail: reset_in_words(how).into(),
                about: if how == ResetCause::Watchdog { "watchdog" } else { "" }.into(),
            }),
            Happening::WatchdogStop => Err(Error::new(
                Kind::ControllerForcedHalt,
                "the guest did not feed its watchdog, which stops it",
            )
            .about("watchdog")),
            Happening::VcpuFailed {
                vcpu,
                reason,
                registers,
            } => {
                tracing::error!("vCPU {vcpu} failed: {reason}");
                for line in registers.to_string().lines() {
                    tracing::error!("{line}");
                }
                let message = format!("vCPU {vcpu} failed: {reason}");
                Err(Error::new(Kind::VcpuRuntimeFailure, message).about(format!("vcpu{vcpu}")))
            }
            Happening::DeviceFailed { device, reason } => {
                tracing::error!("device {device} failed and is quarantined: {reason}");
                self.device_reports(generation, DeviceEvent::Failed { device, reason });
                return;
            }
            Happening::Device(event) => {
                self.device_reports(generation, event);
                return;
            }
            Happening::Paused => {
                // A resume may have overtaken the news.
                let is_paused = self.with_running(generation, |vm| Ok(vm.is_paused()));
                if is_paused.unwrap_or(false)
                    && let Some(guest) = self.guest(generation)
                {
                    guest.paused();
                }
                return;
            }
        };
        self.feed(Input::Ended(generation, ending));
    }

    fn device_reports(&self, generation: Generation, event: DeviceEvent) {
        let Some(guest) = self.guest(generation) else { return };
        if let DeviceEvent::BackendLost { device, .. } = &event
            && let Ok(devices) = self.devices(generation)
        {
            guest.reconnect(device, &devices);
        }
        if let Some(news) = news::translate(event) {
            guest.device_news(news);
        }
    }

    fn guest(&self, generation: Generation) -> Option<Rc<GuestState>> {
        self.inner
            .borrow()
            .guest
            .clone()
            .filter(|guest| guest.generation() == generation)
    }

    /// Feeds the lifecycle, and what its effects lead to, until there is nothing left to do.
    pub(super) fn feed(&self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let effects = self.inner.borrow_mut().lifecycle.handle(input);
            for effect in effects {
                inputs.extend(self.carry_out(effect));
            }
        }
    }

    fn carry_out(&self, effect: Effect) -> Option<Input> {
        let inner = &mut *self.inner.borrow_mut();
        match effect {
            Effect::Build {
                generation, request, ..
            } => {
                let replaced = inner.vm.take();
                inner.last = None;
                let creation = inner.creations.remove(&request).unwrap_or_else(|| Err(lost()));
                let spec = creation.and_then(|creation| {
                    inner.attendance.expect(creation.successors, &self.me, &self.spawner)?;
                    let guest = GuestState::new(generation, creation.nature, creation.host, self.spawner.clone());
                    inner.guest = Some(guest);
                    Ok(creation.spec)
                });
                inner.cancel = Arc::default();
                let cancel = inner.cancel.clone();
                jobs::build(
                    generation,
                    spec,
                    replaced,
                    self.builder.clone(),
                    cancel,
                    self.news.clone(),
                );
            }
            Effect::CancelBuild(_) => inner.cancel.store(true, Ordering::SeqCst),
            Effect::Start(generation) => {
                if let Some(guest) = &inner.guest {
                    guest.run_called();
                }
                let started = inner.vm.as_mut().map_or_else(|| Err(lost()), |vm| vm.start());
                if let Err(error) = started {
                    return Some(Input::StartFailed(generation, error));
                }
                if let Some(guest) = &inner.guest {
                    guest.started();
                }
                self.spawner.spawn(settle::after_start(self.spawner.clone()));
            }
            Effect::TearDown(generation) => {
                if let Some(vm) = inner.vm.take() {
                    jobs::tear_down(generation, vm, self.news.clone());
                }
            }
            Effect::Gone(generation, ending) => {
                if let Some(guest) = inner.guest.take_if(|guest| guest.generation() == generation) {
                    guest.gone(&ending);
                    inner.last = guest.outlives_itself().then_some(guest);
                }
            }
            Effect::Reply(token, reply) => {
                // A create that was refused leaves its files unused.
                inner.creations.remove(&token);
                if let Some(asker) = inner.asked.remove(&token) {
                    // Nobody listens any more if the call was dropped.
                    let _ = asker.send(reply);
                }
            }
            Effect::Linger(absence) => {
                let (news, time) = (self.news.clone(), self.spawner.sleep(LINGER));
                self.spawner.spawn(async move {
                    time.await;
                    let _ = news.unbounded_send(News::Lingered(absence));
                });
            }
            Effect::Exit => {
                if let Some(exit) = inner.exit.take() {
                    let _ = exit.send(());
                }
            }
        }
        None
    }
}

async fn completion(reply: oneshot::Receiver<Reply>) -> Result<(), Error> {
    match reply.await {
        Ok(Reply::Completed(outcome)) => outcome,
        _ => Err(lost()),
    }
}

fn reset_in_words(how: ResetCause) -> &'static str {
    match how {
        ResetCause::Acpi => "the guest reset itself through ACPI",
        ResetCause::I8042 => "the guest reset itself through the keyboard controller",
        ResetCause::Hypervisor => "the guest was reset by KVM",
        ResetCause::Watchdog => "the guest did not feed its watchdog, which reset it",
        ResetCause::TripleFault => "the guest reset itself by a triple fault",
    }
}

fn lost() -> Error {
    Error::new(Kind::InternalError, "the component is ending")
}
