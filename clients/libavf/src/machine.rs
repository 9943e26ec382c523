//! A virtual machine as the service's task carries it out: a name at the guest manager, and one run after the other.
//!
//! ```text
//!   Start: create -> bind -> streams -> events -> run --started--> (told) --end--> output written --> (told)
//!   Stop:  the lifecycle's stop, at any point of this
//! ```

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    os::unix::net::UnixStream,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use capnp::capability::FromClientHook;
use futures::{
    FutureExt, StreamExt,
    channel::oneshot,
    future::{Either, select},
    pin_mut,
};
use sepal_schema::{
    config::Handles,
    error::{Error, Outcome, read_completion},
    guest_capnp::{
        console, event, event_sink,
        observer::{self, subscribe_result, wait_result},
        serial::{self, open_result},
    },
    lifecycle_capnp::guest_lifecycle::{self, run_result},
    report::StopReport,
    transport::{FdTable, Handle, guard},
};

use crate::{
    config::RawConfig,
    life::Life,
    log,
    name::Name,
    reason::{self, StopReason},
    streams::{Ports, Relay},
    vm::{Command, Driven, Shared},
};

/// The console ports that go somewhere: Linux calls them hvc0 and hvc2.
const CONSOLE_PORT: u32 = 0;
const LOG_PORT: u32 = 2;
/// How long the end of a run waits for a reader of its output that stands still.
const GRACE: Duration = Duration::from_secs(1);

/// A machine at the guest manager.
pub(crate) struct Machine {
    pub(crate) handle: Handle,
    pub(crate) fds: FdTable,
    pub(crate) lifecycle: guest_lifecycle::Client,
    pub(crate) config: RawConfig,
    pub(crate) name: Name,
    /// The run is to end.
    pub(crate) stopped: Cell<bool>,
}

/// Why a run could not begin.
#[derive(Debug, thiserror::Error)]
enum NotRun {
    #[error("{words}", words = log::words(.0))]
    Refused(#[from] Error),
    #[error("{0}")]
    Broken(#[from] capnp::Error),
    #[error("{0}")]
    Unknown(#[from] capnp::NotInSchema),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Machine {
    /// Does what the program asks, until its handle or the connection (`ended`) is gone.
    pub(crate) async fn drive(self, mut driven: Driven, ended: impl Future<Output = ()>) {
        // Dropped before `driven`, by which whoever destroys the machine learns that nothing of it is left.
        let machine = self;
        let ended = ended.fuse();
        pin_mut!(ended);
        loop {
            let command = select(driven.commands.next(), &mut ended).await;
            match command {
                Either::Left((Some(Command::Start), _)) => {}
                // One that crossed the end of the run that it was for.
                Either::Left((Some(Command::Stop), _)) => continue,
                Either::Left((None, _)) | Either::Right(_) => return,
            }
            machine.stopped.set(false);
            let reason = {
                let run = machine.run(&driven.shared).fuse();
                pin_mut!(run);
                loop {
                    match select(&mut run, driven.commands.next()).await {
                        Either::Left((reason, _)) => break reason,
                        Either::Right((Some(Command::Stop), _)) => machine.stop(),
                        // Its life permits no start while it runs.
                        Either::Right((Some(Command::Start), _)) => {}
                        Either::Right((None, _)) => break run.await,
                    }
                }
            };
            match reason {
                Some(reason) => driven.shared.change(|life| life.ended(reason)),
                None => return,
            }
        }
    }

    /// Asks the manager to end the run. That it has comes from the run itself.
    fn stop(&self) {
        self.stopped.set(true);
        let stopping = self.lifecycle.stop_request().send().promise;
        self.handle.spawn(stopping.map(drop));
    }

    /// Waits until nothing of a guest is left; false if the service has ended.
    async fn unmake(&self) -> bool {
        let stopped = self.lifecycle.stop_request().send().promise.await;
        !stopped.is_err_and(|error| is_disconnected(&error))
    }

    /// A run from its beginning to its end; no reason if the service has ended.
    async fn run(&self, shared: &Arc<Shared>) -> Option<StopReason> {
        match self.begin(shared).await {
            Ok((mut relay, observer)) => {
                let ended = self.end(shared, &observer).await;
                if self.handle.timeout(GRACE, relay.done()).await.is_err() {
                    // A reader that stands still loses the rest. A terminal that does may even keep the thread, which then ends by itself.
                    relay.end();
                    let _ = self.handle.timeout(GRACE, relay.done()).await;
                }
                ended
            }
            Err(NotRun::Broken(error)) if is_disconnected(&error) => None,
            Err(error) => {
                // It may have been made, and then it has memory, and keeps the next from being made.
                if !self.unmake().await {
                    return None;
                }
                if self.stopped.get() {
                    return Some(StopReason::Killed);
                }
                shared.say(&format!("not started: {error}"));
                Some(StopReason::StartFailed)
            }
        }
    }

    /// Makes the guest, and connects what it prints and reads.
    async fn begin(&self, shared: &Arc<Shared>) -> Result<(Relay, observer::Client), NotRun> {
        let mut request = self.lifecycle.create_request();
        self.config
            .write(self.name.as_str(), request.get().init_config(), &self.fds)?;
        let response = request.send().promise.await?;
        read_completion(response.get()?)?;
        let guest = self.lifecycle.bind_request().send().pipeline.get_guest();
        let serial = guest.serial_request().send().pipeline.get_serial();
        let observer = guest.observer_request().send().pipeline.get_observer();
        let port = |number| {
            let mut request = guest.console_request();
            request.get().set_port(number);
            request.send().promise
        };
        let (console, log) = (port(CONSOLE_PORT).await?, port(LOG_PORT).await?);
        let ports = Ports {
            serial: self.open(&serial).await?,
            console: self.open(&typed(console.get()?.outcome()?.get_console()?)).await?,
            log: self.open(&typed(log.get()?.outcome()?.get_console()?)).await?,
        };
        Ok((Relay::start(ports, shared.ends.clone())?, observer))
    }

    /// A port of the guest as a stream socket, from its first byte on.
    async fn open(&self, port: &serial::Client) -> Result<UnixStream, NotRun> {
        let response = port.open_request().send().promise.await?;
        match response.get()?.which()? {
            open_result::Fd(fd) => Ok(UnixStream::from(Handles::take(&self.fds, fd?.get_number())?)),
            open_result::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// Has the guest run until it ends, and tells when its processors do; no reason if the service has ended.
    async fn end(&self, shared: &Shared, observer: &observer::Client) -> Option<StopReason> {
        let (started, sink) = Started::sink();
        let ended = self.report(observer, sink).fuse();
        pin_mut!(ended);
        let outcome = match select(started, &mut ended).await {
            Either::Left((Ok(()), _)) => {
                shared.change(Life::started);
                ended.await
            }
            Either::Left((Err(_), _)) => ended.await,
            Either::Right((outcome, _)) => {
                // It may have ended so soon that the event came too late.
                if matches!(&outcome, Ok((_, report)) if report.uptime_ns > 0) {
                    shared.change(Life::started);
                }
                outcome
            }
        };
        match outcome {
            Ok((reason, report)) => {
                if !matches!(reason, StopReason::Shutdown | StopReason::Reboot | StopReason::Killed) {
                    shared.say(&report.detail);
                }
                Some(reason)
            }
            Err(NotRun::Broken(error)) if is_disconnected(&error) => None,
            Err(error) => {
                if !self.unmake().await {
                    return None;
                }
                shared.say(&format!("nobody knows how it ended: {error}"));
                Some(StopReason::InfrastructureError)
            }
        }
    }

    /// Has the guest run, and returns how it ended.
    async fn report(
        &self,
        observer: &observer::Client,
        sink: event_sink::Client,
    ) -> Result<(StopReason, StopReport), NotRun> {
        let mut request = observer.subscribe_request();
        request.get().set_sink(sink);
        let response = request.send().promise.await?;
        let _subscription = match response.get()?.which()? {
            subscribe_result::Subscription(subscription) => subscription?,
            subscribe_result::Error(error) => return Err(Error::read(error?)?.into()),
        };
        let run = self.lifecycle.run_request().send().promise;
        let wait = observer.wait_request().send().promise;
        let response = match select(run, wait).await {
            Either::Left((run, wait)) => {
                if let run_result::Error(_) = run?.get()?.which()? {
                    // Most errors are ends. After the others it would be there for ever.
                    self.stop();
                }
                wait.await?
            }
            Either::Right((wait, _)) => wait?,
        };
        match response.get()?.which()? {
            wait_result::Report(report) => {
                let from = report?;
                let report = StopReport::read(from)?;
                Ok((reason::of_report(from.get_reason(), &report), report))
            }
            wait_result::Error(error) => Err(Error::read(error?)?.into()),
        }
    }
}

/// A console's typing and printing.
fn typed(console: console::Client) -> serial::Client {
    console.cast_to()
}

fn is_disconnected(error: &capnp::Error) -> bool {
    error.kind == capnp::ErrorKind::Disconnected
}

/// Is told of what happens to a guest, and waits for its processors to run.
struct Started(RefCell<Option<oneshot::Sender<()>>>);

impl Started {
    fn sink() -> (oneshot::Receiver<()>, event_sink::Client) {
        let (sender, receiver) = oneshot::channel();
        (receiver, guard::new_client(Self(RefCell::new(Some(sender)))))
    }
}

impl event_sink::Server for Started {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        if let Ok(event::Started(())) = params.get()?.get_event()?.which()
            && let Some(sender) = self.0.take()
        {
            // Nobody waits any more after the end.
            let _ = sender.send(());
        }
        Ok(())
    }
}
