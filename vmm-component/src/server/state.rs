//! What is known about one guest, from its creation to its end, and who is told of it.

use std::{
    cell::RefCell,
    collections::HashSet,
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::channel::oneshot;
use sepal_devices::vhost_user::VhostUserHandle;
use sepal_schema::{
    config,
    crash::Registers,
    error::{Error, Kind},
    info::{GuestDescriptor, GuestInfo, GuestStatus, Upkeep},
    lifecycle_capnp::backends,
    news::DeviceNews,
    report::{Reason, Rung, StopReport, now_ns},
    transport::{FdTable, Handle},
};

use super::{
    controller::Ended,
    debug,
    devices::Handles,
    memory_news::MemoryNews,
    news::Pacer,
    teller::{Lent, Teller},
    vm::LastRegisters,
};
use crate::{
    lifecycle::{Ending, Generation},
    memory::MIB,
};

/// How often at most the same is told of a device.
const PACE: Duration = Duration::from_secs(1);

/// What is known about one guest. Outlives the machine for as long as somebody holds the guest.
pub(super) struct GuestState {
    generation: Generation,
    nature: Nature,
    teller: Rc<Teller>,
    spawner: Handle,
    memory_news: MemoryNews,
    inner: RefCell<Inner>,
}

/// What a guest is from its creation on.
pub(super) struct Nature {
    pub(super) descriptor: GuestDescriptor,
    /// What is done when a watchdog expires.
    pub(super) watchdog: &'static str,
    /// It may outlive its manager.
    pub(super) durable: bool,
}

#[derive(Default)]
struct Inner {
    run_called: bool,
    started: Option<Instant>,
    paused: bool,
    report: Option<StopReport>,
    /// Where its vCPUs were when one of them failed.
    registers: LastRegisters,
    /// Who waits for the end.
    waiting: Vec<oneshot::Sender<StopReport>>,
    /// Who waits for all vCPUs to have left the guest.
    pausing: Vec<oneshot::Sender<()>>,
    pacer: Pacer,
    /// Devices for which another process is awaited.
    reconnecting: HashSet<String>,
    /// Devices for which none was to be had.
    bereft: Vec<(String, VhostUserHandle)>,
}

impl GuestState {
    /// A guest that is being created.
    pub(super) fn new(generation: Generation, nature: Nature, host: Lent, spawner: Handle) -> Rc<Self> {
        Rc::new(Self {
            generation,
            teller: Teller::new(generation, host, nature.durable, spawner.clone()),
            nature,
            spawner,
            memory_news: MemoryNews::default(),
            inner: RefCell::default(),
        })
    }

    /// Which creation it came of.
    pub(super) fn generation(&self) -> Generation {
        self.generation
    }

    /// The control loop.
    pub(super) fn spawner(&self) -> &Handle {
        &self.spawner
    }

    /// The memory that it was configured with, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.nature.descriptor.memory_mib.saturating_mul(MIB)
    }

    /// When it was asked about its memory.
    pub(super) fn memory_news(&self) -> &MemoryNews {
        &self.memory_news
    }

    /// How the guest ended; none as long as it has not.
    pub(super) fn report(&self) -> Option<StopReport> {
        self.inner.borrow().report.clone()
    }

    /// The vCPUs run.
    pub(super) fn started(&self) {
        self.inner.borrow_mut().started = Some(Instant::now());
        self.teller.tell(|mut event| event.set_started(()));
    }

    /// The last vCPU has left the guest after a pause.
    pub(super) fn paused(&self) {
        let pausing = {
            let inner = &mut *self.inner.borrow_mut();
            inner.paused = true;
            std::mem::take(&mut inner.pausing)
        };
        for waiter in pausing {
            let _ = waiter.send(());
        }
        self.teller.tell(|mut event| event.set_paused(()));
    }

    /// The vCPUs go on after a pause.
    pub(super) fn resumed(&self) {
        {
            let inner = &mut *self.inner.borrow_mut();
            inner.paused = false;
            inner.pausing.clear();
        }
        self.teller.tell(|mut event| event.set_resumed(()));
    }

    /// A device reports: told at once, or kept for a second where it reports too often.
    pub(super) fn device_news(self: &Rc<Self>, mut news: DeviceNews) {
        if let DeviceNews::WatchdogExpired { action } = &mut news {
            *action = self.nature.watchdog.to_owned();
        }
        let Some((topic, news)) = self.inner.borrow_mut().pacer.report(news) else {
            return;
        };
        self.teller.tell(|event| news.write(event));
        let (state, handle) = (Rc::downgrade(self), self.spawner.clone());
        self.spawner.spawn(async move {
            loop {
                handle.sleep(PACE).await;
                let Some(state) = state.upgrade() else { return };
                let Some(news) = state.inner.borrow_mut().pacer.due(&topic) else {
                    return;
                };
                state.teller.tell(|event| news.write(event));
            }
        });
    }

    /// The process behind a device is gone: asks the guest manager for another, once at a time.
    pub(super) fn reconnect(self: &Rc<Self>, device: &str, devices: &Handles) {
        if let Some((name, handle)) = devices.vhost_user.iter().find(|(name, _)| name == device) {
            self.ask_for_backend(name.clone(), handle.clone());
        }
    }

    fn ask_for_backend(self: &Rc<Self>, name: String, handle: VhostUserHandle) {
        let Some((backends, fds)) = self.teller.backends() else {
            return;
        };
        if !self.inner.borrow_mut().reconnecting.insert(name.clone()) {
            return;
        }
        let mut request = backends.reconnect_request();
        request.get().set_device(&name);
        let state = Rc::downgrade(self);
        self.spawner.spawn(async move {
            let socket = backend(request.send().promise, &fds).await;
            let state = state.upgrade();
            if let Some(state) = &state {
                state.inner.borrow_mut().reconnecting.remove(&name);
            }
            match (socket, state) {
                (Ok(socket), _) => handle.reconnect(socket),
                (Err(error), state) => {
                    tracing::warn!("device {name} stays without its process: {error}");
                    if let Some(state) = state {
                        state.inner.borrow_mut().bereft.push((name, handle));
                    }
                }
            }
        });
    }

    /// Another manager takes the place of the one before: it is told what that may not have heard, and asked for what that did not
    /// give. Returns how many events were not kept.
    pub(super) fn attach(self: &Rc<Self>, host: Lent) -> u64 {
        let missed = self.teller.attach(host);
        let bereft = std::mem::take(&mut self.inner.borrow_mut().bereft);
        for (name, handle) in bereft {
            self.ask_for_backend(name, handle);
        }
        missed
    }

    /// Another manager may want to know how it ended.
    pub(super) fn outlives_itself(&self) -> bool {
        self.nature.durable && self.inner.borrow().run_called
    }

    /// `run` was called.
    pub(super) fn run_called(&self) {
        self.inner.borrow_mut().run_called = true;
    }

    /// Waits for what the call of `run` was answered, or will be.
    ///
    /// # Errors
    /// `NOT_CREATED`: it was not called.
    pub(super) fn ended(self: &Rc<Self>) -> Result<impl Future<Output = Option<Ended>> + use<>, Error> {
        if !self.inner.borrow().run_called {
            return Err(Error::new(Kind::NotCreated, "the guest was not started"));
        }
        let (state, over) = (self.clone(), self.wait());
        Ok(async move {
            let report = over.await?;
            Some(Ended {
                report: report.error.clone().map_or(Ok(report), Err),
                registers: state.registers(),
            })
        })
    }

    /// One of its vCPUs failed, and they were there.
    pub(super) fn keep_registers(&self, registers: LastRegisters) {
        self.inner.borrow_mut().registers = registers;
    }

    /// Where its vCPUs were when one of them failed; none where none did.
    pub(super) fn registers(&self) -> Vec<(u8, Registers)> {
        let inner = self.inner.borrow();
        let registers = inner.registers.iter();
        registers.map(|(vcpu, dump)| (*vcpu, debug::told(dump))).collect()
    }

    /// The guest is no more.
    pub(super) fn gone(&self, ending: &Result<Ending, Error>) {
        let (report, waiting) = {
            let inner = &mut *self.inner.borrow_mut();
            let uptime = inner.started.map_or(0, |started| nanoseconds(started.elapsed()));
            let report = report(ending, uptime);
            inner.report = Some(report.clone());
            inner.paused = false;
            inner.pausing.clear();
            (report, std::mem::take(&mut inner.waiting))
        };
        for waiter in waiting {
            let _ = waiter.send(report.clone());
        }
    }

    /// What the component knows of it; the guest manager adds the rest.
    pub(super) fn info(&self) -> GuestInfo {
        let inner = self.inner.borrow();
        let running = inner.report.is_none().then_some(inner.started).flatten();
        GuestInfo {
            name: String::new(),
            status: match (&inner.report, inner.started) {
                (Some(_), _) => GuestStatus::Stopped,
                (None, Some(_)) => GuestStatus::Running,
                (None, None) => GuestStatus::NotStarted,
            },
            generation: self.generation,
            uptime_ns: running.map_or(0, |started| nanoseconds(started.elapsed())),
            descriptor: Some(self.nature.descriptor.clone()),
            stop: inner.report.clone(),
            problems: Vec::new(),
            layers: Vec::new(),
            component_pid: 0,
            paused: inner.paused,
            detached: false,
            upkeep: Upkeep::default(),
        }
    }

    /// Waits until all vCPUs have left the guest. Fails if it ends first, or is resumed.
    pub(super) fn wait_until_paused(&self) -> impl Future<Output = Result<(), Error>> + use<> {
        let inner = &mut *self.inner.borrow_mut();
        let paused = inner.paused;
        let (sender, receiver) = oneshot::channel();
        if !paused {
            enlist(&mut inner.pausing, sender);
        }
        async move {
            match paused {
                true => Ok(()),
                false => receiver
                    .await
                    .map_err(|_| Error::new(Kind::NotRunning, "the guest went on or ended before it paused")),
            }
        }
    }

    /// How it ended, once it has; none if the component ends before.
    pub(super) fn wait(&self) -> impl Future<Output = Option<StopReport>> + use<> {
        let inner = &mut *self.inner.borrow_mut();
        let done = inner.report.clone();
        let (sender, receiver) = oneshot::channel();
        if done.is_none() {
            enlist(&mut inner.waiting, sender);
        }
        async move {
            match done {
                Some(report) => Some(report),
                None => receiver.await.ok(),
            }
        }
    }
}

/// Adds one who waits, in the place of those whose calls were dropped: no more are kept than calls may be in flight.
fn enlist<T>(list: &mut Vec<oneshot::Sender<T>>, sender: oneshot::Sender<T>) {
    list.retain(|waiter| !waiter.is_canceled());
    list.push(sender);
}

/// The socket that the guest manager answers with.
async fn backend(answer: impl Future<Output = Reconnected>, fds: &FdTable) -> Result<OwnedFd, Error> {
    use backends::reconnect_result::Which;
    let answer = answer.await?;
    match answer.get()?.which().map_err(capnp::Error::from)? {
        Which::Fd(fd) => config::Handles::take(fds, fd?.get_number()),
        Which::Error(error) => Err(Error::read(error?)?),
    }
}

type Reconnected = Result<capnp::capability::Response<backends::reconnect_result::Owned>, capnp::Error>;

/// How the guest ended, from what ended it.
fn report(ending: &Result<Ending, Error>, uptime_ns: u64) -> StopReport {
    let (reason, detail) = match ending {
        Ok(Ending::Shutdown) => (Reason::Shutdown, "the guest shut down".to_owned()),
        Ok(Ending::Reset { detail, .. }) => (Reason::Reset, detail.clone()),
        Err(error) => {
            let reason = match error.kind {
                Kind::ControllerForcedHalt | Kind::Cancelled => Reason::Killed,
                Kind::VcpuRuntimeFailure => Reason::Crash,
                _ => Reason::StartFailed,
            };
            (reason, error.message.clone())
        }
    };
    StopReport {
        reason,
        detail,
        error: ending.clone().err(),
        uptime_ns,
        time_ns: now_ns(),
        about: about(ending).to_owned(),
        rung: Rung::None,
        component: None,
    }
}

/// The vCPU or device that ended the guest. What else an error is about, such as a field of the configuration, is in the error.
fn about(ending: &Result<Ending, Error>) -> &str {
    match ending {
        Ok(Ending::Shutdown) => "",
        Ok(Ending::Reset { about, .. }) => about,
        Err(error) => match error.kind {
            Kind::VcpuStartFailure
            | Kind::VcpuRuntimeFailure
            | Kind::DeviceStartFailure
            // By the watchdog; otherwise it is about nothing.
            | Kind::ControllerForcedHalt => &error.about,
            _ => "",
        },
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_were_dropped_are_not_kept() {
        let (kept, mut answer) = oneshot::channel();
        let mut list = Vec::new();
        enlist(&mut list, kept);
        for _ in 0..100 {
            let (dropped, _) = oneshot::channel();
            enlist(&mut list, dropped);
        }
        assert_eq!(list.len(), 2, "the one who waits, and the last who went");
        for waiter in list {
            let _ = waiter.send(7);
        }
        assert_eq!(answer.try_recv(), Ok(Some(7)));
    }
}
