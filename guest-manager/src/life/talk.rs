//! What is said between a guest's task and its component, from the creation of the machine to its end.
//!
//! ```text
//!   begin:   ports, create, bind (and run, if that is wanted at once) --> created --> run -----------> how it ended
//!   resume:  ports as they were, attach ------------------------------> it runs ----> ended ---------> how it ended
//!                                    '--> it was created, and not run --> run ------> how it ended
//!                                    '--> there is none --> it is created anew
//! ```

use std::{
    future::Future,
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::{Rc, Weak},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{LocalBoxFuture, select_all},
};
use sepal_schema::{
    config::{GuestConfig, Handles},
    crash::{self, Registers},
    error::{Error, Kind, read_completion},
    guest_capnp::{GuestStatus, event_sink, observer},
    info::GuestInfo,
    lifecycle_capnp::{
        component::attach_result,
        guest_lifecycle::{self, run_result},
        host_setup,
    },
    news::{DeviceNews, Panic},
    report::StopReport,
    transport::guard,
};

use super::Held;
use crate::{
    backends::Reconnector,
    changed::Changed,
    component::Component,
    cpu,
    durable::Successor,
    guest::Guest,
    model::{EventKind, read_event},
    outcome::Outcome,
    power,
    resources::Listening,
    serial::{Port, Wire},
    statistics, vsock,
};

/// What the component said in the end.
pub(super) enum Said {
    Outcome(Outcome),
    /// What run returned, and the registers of the vCPUs when one of them failed.
    Ran(Result<StopReport, Error>, Vec<Registers>),
    /// Another creation has its component now.
    Superseded,
    /// There is no machine: it was being created when the manager before ended.
    Unborn,
    /// The connection broke, and how.
    Nothing(String),
}

impl Said {
    /// An exception of the RPC system: the connection broke, or the component has a bug; either way it cannot be relied on any more.
    fn of_exception(error: &capnp::Error) -> Self {
        Self::Nothing(error.to_string())
    }
}

type Promise<T> = capnp::capability::Promise<capnp::capability::Response<T>, capnp::Error>;

/// The ports of a guest, connected for a run.
pub(super) struct Sockets {
    /// The component's ends: the serial port's, then the console's.
    theirs: Vec<OwnedFd>,
    /// Copies of the manager's ends, of a guest that goes on without its manager.
    kept: Vec<OwnedFd>,
    /// The component's end of the socket by which the connection to the next manager comes.
    successors: Option<OwnedFd>,
}

impl Sockets {
    /// Connects the ports, and has what belongs to a guest that goes on without its manager kept beside its component.
    pub(super) async fn connect(guest: &Guest, component: &Component, wires: &mut Vec<Wire>) -> Result<Self, Error> {
        let failed = |error| Error::new(Kind::NoResources, format!("no socket for a port: {error}"));
        let mut sockets = Self {
            theirs: Vec::new(),
            kept: Vec::new(),
            successors: None,
        };
        let durable = guest.durable();
        for port in ports(guest) {
            let (ours, theirs) = UnixStream::pair().map_err(failed)?;
            if durable.is_some() {
                sockets.kept.push(ours.try_clone().map_err(failed)?.into());
            }
            wires.push(port.attach(&guest.manager.handle, ours).map_err(failed)?);
            sockets.theirs.push(theirs.into());
        }
        if let Some(durable) = durable {
            let (successors, theirs) = Successor::socket().map_err(failed)?;
            sockets.successors = Some(theirs);
            let ports = std::mem::take(&mut sockets.kept);
            durable.keep(guest, component, Successor { ports, successors }).await?;
        }
        Ok(sockets)
    }
}

/// The serial port, then those of the console.
pub(super) fn ports(guest: &Guest) -> impl Iterator<Item = &Rc<Port>> {
    std::iter::once(&guest.port).chain(&guest.consoles)
}

/// The questions that are open with the component.
pub(super) struct Talk {
    lifecycle: guest_lifecycle::Client,
    /// What the guest is made of.
    info: Promise<observer::info_result::Owned>,
    begun: Begun,
}

enum Begun {
    Create {
        create: Promise<sepal_schema::error_capnp::completion::Owned>,
        run: Option<Promise<run_result::Owned>>,
    },
    Attach(Promise<attach_result::Owned>),
}

impl Talk {
    /// Sends create and bind, and run too if it is wanted already: one round trip.
    pub(super) fn begin(
        guest: &Rc<Guest>,
        component: &Component,
        config: GuestConfig,
        sockets: Sockets,
        held: &Held<'_>,
    ) -> Result<Self, Error> {
        let manager = &guest.manager;
        let lifecycle = component.lifecycle();
        let fds = component.fds();
        let mut create = lifecycle.create_request();
        config.encode(create.get().init_config(), &fds)?;
        let mut host = create.get().init_host();
        host.set_unassisted(manager.settings.host.unassisted);
        host.set_cpuid(&manager.settings.cpuid);
        let mut theirs = sockets.theirs.into_iter();
        if let Some(serial) = theirs.next() {
            let number = Handles::send(&fds, serial)?;
            host.reborrow().init_serial().init_stream().set_number(number);
        }
        let mut list = host
            .reborrow()
            .init_consoles(u32::try_from(theirs.len()).unwrap_or(u32::MAX));
        for (i, console) in (0..).zip(theirs) {
            list.reborrow().get(i).set_number(Handles::send(&fds, console)?);
        }
        if let Some(successors) = sockets.successors {
            host.set_durable(true);
            let number = Handles::send(&fds, successors)?;
            host.reborrow().init_successors().set_number(number);
        }
        lend(guest, component, held, host);
        let create = create.send().promise;
        let remote = lifecycle.bind_request().send().pipeline.get_guest();
        let info = learn(guest, component, remote);
        // Who listens is to be there before the guest runs, and its vCPUs where they belong.
        let nobody_listens = held.resources.listening.is_none() && guest.listeners.is_empty();
        let at_once = guest.run_is_wanted() && nobody_listens && !guest.cpus.has_pins();
        let run = at_once.then(|| lifecycle.run_request().send().promise);
        Ok(Self {
            lifecycle,
            info,
            begun: Begun::Create { create, run },
        })
    }

    /// Asks for the guest that there is.
    pub(super) fn resume(guest: &Rc<Guest>, component: &Component, held: &Held<'_>) -> Self {
        let mut attach = component.client().attach_request();
        lend(guest, component, held, attach.get().init_host());
        let attach = attach.send();
        let info = learn(guest, component, attach.pipeline.get_guest());
        Self {
            lifecycle: component.lifecycle(),
            info,
            begun: Begun::Attach(attach.promise),
        }
    }

    pub(super) async fn on(
        self,
        guest: &Rc<Guest>,
        component: &Component,
        stopped: &Changed<bool>,
        listening: Option<&mut Listening>,
    ) -> Said {
        let (run, runs) = match self.begun {
            Begun::Create { create, run } => {
                let created = async { Ok(read_completion(create.await?.get()?)) };
                match created.await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return Said::Outcome(Outcome::NotCreated(error)),
                    Err(error) => return Said::of_exception(&error),
                }
                (run, false)
            }
            Begun::Attach(attach) => match attached(guest, attach).await {
                Ok(Some(runs)) => (None, runs),
                Ok(None) => return Said::Unborn,
                Err(error) => return Said::of_exception(&error),
            },
        };
        let listen = async {
            vsock::listen_again(guest).await?;
            match listening {
                Some(listening) => listening.begin(guest).await,
                None => Ok(()),
            }
        };
        let ready = match listen.await {
            Ok(()) => cpu::pin_all(guest).await,
            Err(error) => Err(error),
        };
        match ready {
            // It has run without, and may go on.
            Err(error) if runs => tracing::error!(guest = &*guest.name, "not as it was: {error}"),
            Err(error) => return Said::Outcome(Outcome::NotCreated(error)),
            Ok(()) => {}
        }
        guest.set_created();
        guest.manager.handle.spawn(describe(Rc::downgrade(guest), self.info));
        let run = match run {
            Some(run) => run,
            None if runs => component.client().ended_request().send().promise,
            None => {
                let wanted: LocalBoxFuture<'_, Option<Said>> = Box::pin(guest.run_wanted().map(|()| None));
                let stopped = stopped.until(|stopped| stopped.then_some(()));
                let stopped = Box::pin(stopped.map(|()| Some(Said::Outcome(Outcome::NotRun))));
                let superseded = Box::pin(guest.ended().map(|_| Some(Said::Superseded)));
                let broken = Box::pin(component.disconnected().map(|why| Some(Said::Nothing(why))));
                match select_all([wanted, stopped, superseded, broken]).await.0 {
                    None => self.lifecycle.run_request().send().promise,
                    Some(said) => return said,
                }
            }
        };
        let ran = async {
            let run = run.await?;
            let run = run.get()?;
            let registers = crash::read_vcpus(run)?;
            let result = match run.which()? {
                run_result::Ended(report) => Ok(StopReport::read(report?)?),
                run_result::Error(error) => Err(Error::read(error?)?),
            };
            Ok((result, registers))
        };
        match ran.await {
            Ok((result, registers)) => Said::Ran(result, registers),
            Err(error) => Said::of_exception(&error),
        }
    }
}

/// What the component is lent by the manager that it has now.
fn lend(guest: &Rc<Guest>, component: &Component, held: &Held<'_>, mut host: host_setup::Builder<'_>) {
    host.set_events(guard::new_client(Events {
        guest: Rc::downgrade(guest),
        generation: guest.generation(),
    }));
    host.set_backends(guard::new_client(Reconnector {
        handle: guest.manager.handle.clone(),
        paths: held.resources.backends.clone(),
        fds: component.fds(),
    }));
}

/// The component's side of the guest is this; asks what the guest is made of, before it runs: who is told that it does finds this answered.
fn learn(
    guest: &Guest,
    component: &Component,
    remote: sepal_schema::guest_capnp::guest::Client,
) -> Promise<observer::info_result::Owned> {
    let observer = remote.observer_request().send().pipeline.get_observer();
    let info = observer.info_request().send().promise;
    guest.set_remote(remote, component.fds());
    info
}

/// Whether the guest that there is was run already; none: there is none.
async fn attached(guest: &Rc<Guest>, attach: Promise<attach_result::Owned>) -> Result<Option<bool>, capnp::Error> {
    let mut attach = attach;
    let patience = guest.manager.settings.force_after;
    let attach = match guest.manager.handle.timeout(patience, &mut attach).await {
        Ok(attach) => attach?,
        // Nothing is lost by beginning anew.
        Err(_) if !guest.is_created() => return Ok(None),
        Err(_) => {
            tracing::warn!(
                guest = &*guest.name,
                "its component does not answer to this manager; the guest is taken over when it does"
            );
            guest.set_silent(true);
            let attach = attach.await;
            guest.set_silent(false);
            attach?
        }
    };
    let attach = attach.get()?;
    if attach.has_error() {
        let error = Error::read(attach.get_error()?)?;
        tracing::info!(guest = &*guest.name, "created anew: {}", error.message);
        return Ok(None);
    }
    let runs = !matches!(attach.get_status(), Ok(GuestStatus::NotStarted));
    let missed = attach.get_missed_events();
    if missed > 0 {
        tracing::warn!(
            guest = &*guest.name,
            missed,
            "events of the time without a manager are lost"
        );
    }
    // What the manager before had no time to note.
    if runs && !guest.has_started() {
        guest.want_run();
        guest.happened(EventKind::Started);
    }
    if runs {
        guest.set_paused(attach.get_paused());
    }
    if runs {
        // Whoever asks the new manager for figures gets some. Nobody waits for the answer here.
        let _ = statistics::ask(guest);
    }
    tracing::info!(guest = &*guest.name, generation = guest.generation(), "taken over");
    Ok(Some(runs))
}

/// Notes what the component says that the guest is made of.
async fn describe(guest: Weak<Guest>, info: Promise<observer::info_result::Owned>) {
    let info = async { GuestInfo::read_result(info.await?.get()?) };
    let descriptor = info.await.ok().and_then(|info| info.descriptor);
    if let (Some(descriptor), Some(guest)) = (descriptor, guest.upgrade()) {
        guest.describe(&descriptor);
    }
}

/// How long after its start a guest's figures are asked for the first time.
const FIRST_FIGURES: Duration = Duration::from_millis(20);

/// Hears from a generation's component what happens in the machine.
struct Events {
    guest: Weak<Guest>,
    generation: u64,
}

impl event_sink::Server for Events {
    fn event(
        self: Rc<Self>,
        params: event_sink::EventParams,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let heard = params.get().and_then(|params| {
            let event = params.get_event()?;
            Ok((event.get_sequence(), read_event(event)?))
        });
        let result = heard.map(|(number, kind)| {
            // What comes late of a run that is over is of no interest any more.
            let current = |guest: &Rc<Guest>| guest.generation() == self.generation && !guest.is_restarting();
            if let (Some(kind), Some(guest)) = (kind, self.guest.upgrade().filter(current)) {
                let panicked = kind == EventKind::Device(DeviceNews::GuestPanicked(Panic::Panicked));
                let started = kind == EventKind::Started;
                if number != 0 && number <= guest.heard() {
                    // A manager that was killed has told it on, and had no time to say so.
                    return;
                }
                guest.happened(kind);
                if started {
                    // Not at once: who launched it waits for what it does, and nobody for its figures.
                    let later = Rc::downgrade(&guest);
                    let handle = guest.manager.handle.clone();
                    guest.manager.handle.spawn(async move {
                        handle.sleep(FIRST_FIGURES).await;
                        if let Some(guest) = later.upgrade() {
                            // Nobody waits for the answer.
                            let _ = statistics::ask(&guest);
                        }
                    });
                }
                if panicked {
                    power::panicked(&guest);
                }
                guest.set_heard(number);
            }
        });
        futures::future::ready(result)
    }
}
