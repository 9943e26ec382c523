//! One guest, from its creation to its end: what is known about it, and its facets for whoever bound it.

use std::{
    cell::RefCell,
    collections::HashSet,
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use capnp::capability::Rc as ServerRc;
use futures::channel::oneshot;
use sepal_schema::{
    config,
    error::{Error, Kind, write_completion},
    facet_capnp::facet,
    guest_capnp::{event, event_sink, guest, observer, power, stats},
    info::{GuestDescriptor, GuestInfo, GuestStatus},
    lifecycle_capnp::backends,
    news::DeviceNews,
    report::{Reason, Rung, StopReport, now_ns},
    transport::{FdTable, Handle, guard},
};

use super::{
    controller::Controller,
    devices::Handles,
    facets::{self, ConsoleServer},
    news::Pacer,
    vm::Vm,
};
use crate::{
    lifecycle::{Ending, Generation},
    machine::{ExitReason, MachineStats},
};

/// How often at most the same is told of a device.
const PACE: Duration = Duration::from_secs(1);

/// What is known about one guest. Outlives the machine for as long as somebody holds the guest.
pub(super) struct GuestState {
    generation: Generation,
    descriptor: GuestDescriptor,
    host: Lent,
    spawner: Handle,
    inner: RefCell<Inner>,
}

/// What the guest manager lends to a guest.
pub(super) struct Lent {
    /// Told what happens.
    pub(super) events: Option<event_sink::Client>,
    /// Asked for other processes behind vhost-user devices.
    pub(super) backends: Option<backends::Client>,
    /// The descriptors that travel with the messages.
    pub(super) fds: FdTable,
    /// What is done when a watchdog expires.
    pub(super) watchdog: &'static str,
}

#[derive(Default)]
struct Inner {
    started: Option<Instant>,
    paused: bool,
    report: Option<StopReport>,
    /// Who waits for the end.
    waiting: Vec<oneshot::Sender<StopReport>>,
    /// Who waits for all vCPUs to have left the guest.
    pausing: Vec<oneshot::Sender<()>>,
    pacer: Pacer,
    /// Devices for which another process is awaited.
    reconnecting: HashSet<String>,
}

impl GuestState {
    /// A guest that is being created.
    pub(super) fn new(generation: Generation, descriptor: GuestDescriptor, host: Lent, spawner: Handle) -> Rc<Self> {
        Rc::new(Self {
            generation,
            descriptor,
            host,
            spawner,
            inner: RefCell::default(),
        })
    }

    pub(super) fn generation(&self) -> Generation {
        self.generation
    }

    /// How the guest ended; none as long as it has not.
    pub(super) fn report(&self) -> Option<StopReport> {
        self.inner.borrow().report.clone()
    }

    /// The vCPUs run.
    pub(super) fn started(&self) {
        self.inner.borrow_mut().started = Some(Instant::now());
        self.emit(|mut event| event.set_started(()));
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
        self.emit(|mut event| event.set_paused(()));
    }

    fn resumed(&self) {
        {
            let inner = &mut *self.inner.borrow_mut();
            inner.paused = false;
            inner.pausing.clear();
        }
        self.emit(|mut event| event.set_resumed(()));
    }

    /// A device reports: told at once, or kept for a second where it reports too often.
    pub(super) fn device_news(self: &Rc<Self>, mut news: DeviceNews) {
        if let DeviceNews::WatchdogExpired { action } = &mut news {
            *action = self.host.watchdog.to_owned();
        }
        let Some((topic, news)) = self.inner.borrow_mut().pacer.report(news) else {
            return;
        };
        self.emit(|event| news.write(event));
        let (state, handle) = (Rc::downgrade(self), self.spawner.clone());
        self.spawner.spawn(async move {
            loop {
                handle.sleep(PACE).await;
                let Some(state) = state.upgrade() else { return };
                let Some(news) = state.inner.borrow_mut().pacer.due(&topic) else {
                    return;
                };
                state.emit(|event| news.write(event));
            }
        });
    }

    /// The process behind a device is gone: asks the guest manager for another, once at a time.
    pub(super) fn reconnect(self: &Rc<Self>, device: &str, devices: &Handles) {
        let found = devices.vhost_user.iter().find(|(name, _)| name == device);
        let (Some(backends), Some((name, handle))) = (&self.host.backends, found) else {
            return;
        };
        if !self.inner.borrow_mut().reconnecting.insert(name.clone()) {
            return;
        }
        let mut request = backends.reconnect_request();
        request.get().set_device(name);
        let (name, handle, fds) = (name.clone(), handle.clone(), self.host.fds.clone());
        let state = Rc::downgrade(self);
        self.spawner.spawn(async move {
            let socket = backend(request.send().promise, &fds).await;
            if let Some(state) = state.upgrade() {
                state.inner.borrow_mut().reconnecting.remove(&name);
            }
            match socket {
                Ok(socket) => handle.reconnect(socket),
                Err(error) => tracing::warn!("device {name} stays without its process: {error}"),
            }
        });
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

    fn emit(&self, fill: impl FnOnce(event::Builder<'_>)) {
        let Some(sink) = &self.host.events else { return };
        let mut request = sink.event_request();
        let mut event = request.get().init_event();
        event.set_time_ns(now_ns());
        event.set_generation(self.generation);
        fill(event);
        let sent = request.send();
        self.spawner.spawn(async move {
            // Events are few, and the manager that cannot be reached any more is about to end this process.
            let _ = sent.await;
        });
    }

    fn info(&self) -> GuestInfo {
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
            descriptor: Some(self.descriptor.clone()),
            stop: inner.report.clone(),
            problems: Vec::new(),
            layers: Vec::new(),
            component_pid: 0,
            paused: inner.paused,
            detached: false,
        }
    }

    /// Waits until all vCPUs have left the guest. Fails if it ends first, or is resumed.
    fn wait_until_paused(&self) -> impl Future<Output = Result<(), Error>> + use<> {
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

    fn wait(&self) -> impl Future<Output = Option<StopReport>> + use<> {
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
        Ok(Ending::Reset(how)) => (Reason::Reset, how.clone()),
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
        about: String::new(),
        rung: Rung::None,
    }
}

fn nanoseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Serves [`Guest`](guest) and all its facets: they differ in what their holder may call, not in what they know.
pub(super) struct GuestServer {
    state: Rc<GuestState>,
    controller: Rc<Controller>,
    /// The descriptors that travel with the messages of whoever holds it.
    pub(super) fds: FdTable,
}

/// A capability for the guest.
pub(super) fn client(state: Rc<GuestState>, controller: Rc<Controller>, fds: FdTable) -> guest::Client {
    guard::new_client(GuestServer { state, controller, fds })
}

impl GuestServer {
    fn facet(&self) -> Self {
        Self {
            state: self.state.clone(),
            controller: self.controller.clone(),
            fds: self.fds.clone(),
        }
    }

    /// The guest's devices.
    ///
    /// # Errors
    /// `NOT_RUNNING`: it has ended.
    pub(super) fn devices(&self) -> Result<Handles, Error> {
        self.controller.devices(self.state.generation)
    }

    /// The control loop.
    pub(super) fn spawner(&self) -> &Handle {
        &self.state.spawner
    }

    /// A facet for a device that has to be there.
    fn device_facet(&self, device: &str, there: impl FnOnce(&Handles) -> bool) -> Result<Self, Error> {
        match there(&self.devices()?) {
            true => Ok(self.facet()),
            false => {
                let message = format!("the guest has no {device}: its configuration left it out");
                Err(Error::new(Kind::DeviceNotPresent, message).about(device))
            }
        }
    }
}

/// Narrowing and sharing are policy, and the guest manager's.
impl facet::Server for GuestServer {}

impl guest::Server for GuestServer {
    async fn power(
        self: ServerRc<Self>,
        _: guest::PowerParams,
        mut results: guest::PowerResults,
    ) -> Result<(), capnp::Error> {
        results.get().set_power(guard::new_client(self.facet()));
        Ok(())
    }

    async fn observer(
        self: ServerRc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> Result<(), capnp::Error> {
        results.get().set_observer(guard::new_client(self.facet()));
        Ok(())
    }

    async fn console(
        self: ServerRc<Self>,
        params: guest::ConsoleParams,
        mut results: guest::ConsoleResults,
    ) -> Result<(), capnp::Error> {
        // A port number that does not fit is one that is not there.
        let port = usize::try_from(params.get()?.get_port()).unwrap_or(usize::MAX);
        let has_port = |devices: &Handles| devices.console.as_ref().is_some_and(|console| port < console.ports());
        match self.device_facet("console", has_port) {
            Ok(guest) => results
                .get()
                .set_console(guard::new_client(ConsoleServer { guest, port })),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn balloon_controller(
        self: ServerRc<Self>,
        _: guest::BalloonControllerParams,
        mut results: guest::BalloonControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("balloon", |devices| devices.balloon.is_some()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn mem_controller(
        self: ServerRc<Self>,
        _: guest::MemControllerParams,
        mut results: guest::MemControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("memory device", |devices| devices.memory.is_some()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn disk_controller(
        self: ServerRc<Self>,
        _: guest::DiskControllerParams,
        mut results: guest::DiskControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("disk", |devices| !devices.disks.is_empty()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn net_controller(
        self: ServerRc<Self>,
        _: guest::NetControllerParams,
        mut results: guest::NetControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("network device", |devices| !devices.networks.is_empty()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn host_vsock_endpoint(
        self: ServerRc<Self>,
        _: guest::HostVsockEndpointParams,
        mut results: guest::HostVsockEndpointResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("vsock device", |devices| devices.vsock.is_some()) {
            Ok(facet) => results.get().set_endpoint(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

impl power::Server for GuestServer {
    async fn shutdown(
        self: ServerRc<Self>,
        _: power::ShutdownParams,
        mut results: power::ShutdownResults,
    ) -> Result<(), capnp::Error> {
        let outcome = self
            .controller
            .with_running(self.state.generation, |vm| vm.press_power_button());
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn kill(
        self: ServerRc<Self>,
        _: power::KillParams,
        mut results: power::KillResults,
    ) -> Result<(), capnp::Error> {
        // A newer guest is not this capability's to stop.
        let outcome = match self.state.report() {
            Some(report) => Ok(report),
            None => match self.controller.stop().await {
                Ok(()) => self
                    .state
                    .report()
                    .ok_or_else(|| Error::new(Kind::InternalError, "the guest left no report")),
                Err(error) => Err(error),
            },
        };
        match outcome {
            Ok(report) => report.write(results.get().init_report()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn stop(
        self: ServerRc<Self>,
        _: power::StopParams,
        mut results: power::StopResults,
    ) -> Result<(), capnp::Error> {
        let error = Error::not_supported(
            "stop",
            "the guest manager waits and decides; a component only presses the button or kills",
        );
        error.write(results.get().init_error());
        Ok(())
    }

    async fn pause(
        self: ServerRc<Self>,
        _: power::PauseParams,
        mut results: power::PauseResults,
    ) -> Result<(), capnp::Error> {
        let asked = self.controller.with_running(self.state.generation, |vm| {
            vm.pause();
            Ok(())
        });
        let outcome = match asked {
            Ok(()) => self.state.wait_until_paused().await,
            Err(error) => Err(error),
        };
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn resume(
        self: ServerRc<Self>,
        _: power::ResumeParams,
        mut results: power::ResumeResults,
    ) -> Result<(), capnp::Error> {
        let outcome = self.controller.with_running(self.state.generation, |vm| {
            vm.resume();
            Ok(())
        });
        if outcome.is_ok() {
            self.state.resumed();
        }
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn reset(
        self: ServerRc<Self>,
        _: power::ResetParams,
        mut results: power::ResetResults,
    ) -> Result<(), capnp::Error> {
        let error = Error::not_supported(
            "reset",
            "resetting a guest from outside is not supported by this version",
        );
        write_completion(&Err(error), results.get());
        Ok(())
    }

    async fn nmi(
        self: ServerRc<Self>,
        _: power::NmiParams,
        mut results: power::NmiResults,
    ) -> Result<(), capnp::Error> {
        let outcome = self.controller.with_running(self.state.generation, |vm| vm.nmi());
        write_completion(&outcome, results.get());
        Ok(())
    }
}

impl observer::Server for GuestServer {
    async fn info(
        self: ServerRc<Self>,
        _: observer::InfoParams,
        mut results: observer::InfoResults,
    ) -> Result<(), capnp::Error> {
        self.state.info().write(results.get().init_info());
        Ok(())
    }

    async fn wait(
        self: ServerRc<Self>,
        _: observer::WaitParams,
        mut results: observer::WaitResults,
    ) -> Result<(), capnp::Error> {
        let report = self.state.wait().await;
        report
            .ok_or_else(|| capnp::Error::disconnected("the component is ending".into()))?
            .write(results.get().init_report());
        Ok(())
    }

    async fn stats(
        self: ServerRc<Self>,
        _: observer::StatsParams,
        mut results: observer::StatsResults,
    ) -> Result<(), capnp::Error> {
        let ask = |vm: &mut dyn Vm| Ok((vm.stats(), vm.devices()));
        match self.controller.with_running(self.state.generation, ask) {
            Ok((stats, devices)) => {
                let mut to = results.get().init_stats();
                write_stats(&stats, to.reborrow());
                facets::write_stats(&devices, to.init_devices());
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

fn write_stats(stats: &MachineStats, mut to: stats::Builder<'_>) {
    to.set_serial_dropped(stats.serial_dropped);
    // A guest has 64 vCPUs at most.
    let mut list = to.init_vcpus(stats.vcpus.len() as u32);
    for (i, vcpu) in stats.vcpus.iter().enumerate() {
        let mut to = list.reborrow().get(i as u32);
        let (io, mmio, assists) = (
            vcpu.exits_for(ExitReason::Pio),
            vcpu.exits_for(ExitReason::Mmio),
            vcpu.exits_for(ExitReason::Assist),
        );
        to.set_index(i as u8);
        to.set_cpu_time_ns(vcpu.cpu_time_ns);
        to.set_exits(vcpu.total());
        to.set_io_exits(io);
        to.set_mmio_exits(mmio);
        to.set_assists(assists);
        to.set_other_exits(
            vcpu.total()
                .saturating_sub(io)
                .saturating_sub(mmio)
                .saturating_sub(assists),
        );
    }
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
