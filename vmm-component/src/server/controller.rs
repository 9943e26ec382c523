//! Carries out what the lifecycle decides, on the control loop. Nothing here waits but the start of a machine, for as long as the loops of its devices on
//! the bus take to set themselves up: well below a millisecond each. Its vCPUs have done so when it was made.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::{
    StreamExt,
    channel::{mpsc, oneshot},
};
use sepal_devices::dispatch::DeviceEvent;
use sepal_schema::{
    crash::{Registers, write_vcpus},
    error::{Error, Kind},
    info::GuestDescriptor,
    lifecycle_capnp::guest_lifecycle::run_result,
    report::StopReport,
};

use sepal_schema::transport::Handle;

use super::{
    devices::Handles,
    jobs, news, settle,
    state::{GuestState, Lent},
    vm::{Builder, LastRegisters, Vm, VmSpec},
};
use crate::{
    lifecycle::{Effect, Ending, Generation, Input, Lifecycle, Reply, Token},
    machine::{Happening, MachineEvent, ResetCause},
};

/// What other threads tell the control loop.
pub(super) enum News {
    /// A build is done.
    Built(Generation, Result<Box<dyn Vm>, Error>),
    /// A machine is gone, and where its vCPUs were if one of them failed.
    TornDown(Generation, LastRegisters),
    /// A machine's thread reports.
    Machine(MachineEvent),
}

/// A create request, decoded.
pub(super) struct Creation {
    pub(super) spec: VmSpec,
    pub(super) descriptor: GuestDescriptor,
    pub(super) host: Lent,
}

/// What came of a run.
pub(super) struct Ended {
    /// How the guest ended, or what made it.
    pub(super) report: Result<StopReport, Error>,
    /// Where its vCPUs were when one of them failed.
    pub(super) registers: Vec<(u8, Registers)>,
}

impl Ended {
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
    inner: RefCell<Inner>,
    builder: Builder,
    news: mpsc::UnboundedSender<News>,
    spawner: Handle,
}

#[derive(Default)]
struct Inner {
    lifecycle: Lifecycle,
    last_token: Token,
    asked: HashMap<Token, oneshot::Sender<Reply>>,
    creations: HashMap<Token, Result<Creation, Error>>,
    /// The machine, from built until it is being torn down.
    vm: Option<Box<dyn Vm>>,
    /// The guest of the latest creation.
    guest: Option<Rc<GuestState>>,
    /// Interrupts the build that is under way.
    cancel: Arc<AtomicBool>,
    exit: Option<oneshot::Sender<()>>,
}

impl Controller {
    /// A controller on the loop of `spawner`, whose machines `builder` makes; and what resolves when the process should exit, which follows
    /// [`disconnected`](Self::disconnected).
    pub fn new(spawner: &Handle, builder: Builder) -> (Rc<Self>, oneshot::Receiver<()>) {
        let (news, mut arrivals) = mpsc::unbounded();
        let (exit, exited) = oneshot::channel();
        let inner = Inner {
            exit: Some(exit),
            ..Inner::default()
        };
        let controller = Rc::new(Self {
            inner: RefCell::new(inner),
            builder,
            news,
            spawner: spawner.clone(),
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

    /// Nobody is left who could ask for anything: everything ends, then the process should exit.
    pub fn disconnected(&self) {
        self.feed(Input::Disconnected);
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
    fn feed(&self, input: Input) {
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
                let creation = inner.creations.remove(&request).unwrap_or_else(|| Err(lost()));
                let spec = creation.map(|Creation { spec, descriptor, host }| {
                    inner.guest = Some(GuestState::new(generation, descriptor, host, self.spawner.clone()));
                    spec
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
            Effect::Start(generation) => match inner.vm.as_mut().map_or_else(|| Err(lost()), |vm| vm.start()) {
                Ok(()) => {
                    if let Some(guest) = &inner.guest {
                        guest.started();
                    }
                    self.spawner.spawn(settle::after_start(self.spawner.clone()));
                }
                Err(error) => return Some(Input::StartFailed(generation, error)),
            },
            Effect::TearDown(generation) => {
                if let Some(vm) = inner.vm.take() {
                    jobs::tear_down(generation, vm, self.news.clone());
                }
            }
            Effect::Gone(generation, ending) => {
                if let Some(guest) = inner.guest.take_if(|guest| guest.generation() == generation) {
                    guest.gone(&ending);
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
