//! What drives a guest from its creation to its end: one task, the only one that talks to its components about its life.
//!
//! ```text
//!   files --> furnish -> component -> create -----> wait for run ----> run --+--> outcome --> all gone --> ended
//!          ^     |          |          |  (run asked for at once is          |       |
//!          |     |          |          |   sent together with create)        |       |
//!          |     '----------'----------'-------------------------------------'       |
//!          |        heard all the time: a stop or a reset by force: asks the         |
//!          |        component, and kills it when it does not answer; its death       |
//!          '------------ wait, if it restarts too often <--- component gone <--------'  begins again
//! ```
//!
//! The conversation has effects; what its outcome means and what follows it (`outcome`) is decided without any. Each run has a component of its
//! own: whatever the guest made of the one before is gone with it.

use std::{
    cell::Cell,
    future::Future,
    os::unix::net::UnixStream,
    pin::pin,
    rc::{Rc, Weak},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{Either, LocalBoxFuture, pending, select, select_all},
};
use sepal_schema::{
    config::{GuestConfig, Handles},
    crash::{self, MAX_LAST_OUTPUT, Registers},
    error::{Error, Kind, read_completion},
    guest_capnp::{event_sink, observer},
    info::GuestInfo,
    lifecycle_capnp::guest_lifecycle::{self, run_result},
    news::{DeviceNews, Panic},
    report::{Rung, StopReport},
    transport::guard,
};

use crate::{
    backends::Reconnector,
    changed::Changed,
    client::Client,
    component::{Component, Exit, StartRequest},
    course::Course,
    cpu,
    guest::Guest,
    model::{EventKind, Trace, read_event},
    outcome::Outcome,
    power,
    resources::{Listening, Resources},
    serial::{Port, Wire},
    slot::Slot,
    statistics, vsock,
};

/// What is held for a run until its component has let go of it.
struct Held<'a> {
    /// Of the serial port, then those of the console's ports.
    wires: Vec<Wire>,
    resources: &'a mut Resources,
    /// What was done to make it end.
    made: Rung,
    component: Option<Rc<Component>>,
    /// Of the vCPUs when one of them failed.
    registers: Vec<Registers>,
}

/// Drives `guest` until it has ended and nothing is left of it.
pub(crate) async fn live(guest: Rc<Guest>, slot: Rc<Slot>, config: GuestConfig, client: Client) {
    let request = StartRequest::new(guest.name.clone(), &config);
    let mut course = Course::new(guest.clone(), &config);
    let mut resources = match course.prepare(config, &client).await {
        Ok(resources) => resources,
        Err(end) => return course.end(end),
    };
    let end = loop {
        let mut held = Held {
            wires: Vec::new(),
            resources: &mut resources,
            made: Rung::None,
            component: None,
            registers: Vec::new(),
        };
        let outcome = conversation(&guest, &slot, &request, &mut held).await;
        let Some(outcome) = outcome else {
            // Another creation has its component now.
            guest.close_ports();
            return;
        };
        let mut over = course.decide(outcome, held.made);
        if over.follows.is_some() || !slot.keeps_component() {
            slot.end_component().await;
        }
        // After the end of whoever writes to it.
        held.wires.iter().for_each(Wire::end_run);
        if over.end.ending.failed_run() {
            let last_lines = held.component.take().map(|component| component.last_lines());
            let output = guest.port.tail(MAX_LAST_OUTPUT);
            let trace = Trace::new(&last_lines.unwrap_or_default(), held.registers, &output);
            over.end.ending.trace = Some(Box::new(trace));
        }
        let follows = course.follow(&over);
        drop(held.wires);
        resources.end_run().await;
        if !follows {
            break over.end;
        }
        if let Err(end) = course.go_on(over).await {
            break end;
        }
    };
    drop(resources);
    course.end(end);
}

/// From what the guest was prepared to the outcome of one run; none if another creation took the guest's place before it ran.
async fn conversation(
    guest: &Rc<Guest>,
    slot: &Rc<Slot>,
    request: &StartRequest,
    held: &mut Held<'_>,
) -> Option<Outcome> {
    let furnished = held.resources.furnish(guest);
    let config = match select(pin!(furnished), pin!(guest.stop_wanted())).await {
        Either::Left((Ok(config), _)) => config,
        Either::Left((Err(error), _)) => return Some(Outcome::NotCreated(error)),
        Either::Right(_) => return Some(Outcome::NotRun),
    };
    let told = Rc::downgrade(guest);
    held.resources.watch(move |news| {
        if let Some(guest) = told.upgrade() {
            guest.happened(EventKind::Device(news));
        }
    });
    // Not interrupted by a stop: a component that is half started would have to be waited for all the same.
    let request = StartRequest {
        limits: guest.cpus.limits(request.limits),
        ..request.clone()
    };
    let component = match slot.component(request).await {
        Ok(component) => component,
        Err(error) => return Some(Outcome::NotCreated(error)),
    };
    held.component = Some(component.clone());
    if guest.stop_cause().is_some() {
        return Some(Outcome::NotRun);
    }
    let talk = match Talk::begin(guest, &component, config, held) {
        Ok(talk) => talk,
        Err(error) => return Some(Outcome::NotCreated(error)),
    };

    let (stopped, made) = (Changed::new(false), Cell::new(Rung::None));
    let force = pin!(force(guest, &component, &stopped, &made));
    let listening = held.resources.listening.as_mut();
    let mut talk = pin!(talk.on(guest, &component, &stopped, listening));
    let died = pin!(component.exited());
    // In this order, so that an answer counts more than the death that follows it.
    let first = match select(select(talk.as_mut(), died), force).await {
        Either::Left((Either::Left((said, _)), _)) => Ok(said),
        Either::Left((Either::Right((exit, _)), _)) => Err(exit),
        Either::Right((never, _)) => match never {},
    };
    let (handle, patience) = (&guest.manager.handle, guest.manager.settings.force_after);
    let said = match first {
        Ok(said) => said,
        Err(_) => {
            // What the component said before it died is still in the socket.
            let rest = handle.timeout(patience, talk).await;
            rest.unwrap_or_else(|_| Said::Nothing("its process ended".to_owned()))
        }
    };
    held.made = made.get();
    match said {
        Said::Outcome(outcome) => Some(outcome),
        Said::Ran(result, registers) => {
            held.registers = registers;
            Some(Outcome::Ran(result))
        }
        Said::Superseded => None,
        Said::Nothing(why) => {
            let created = guest.is_created();
            // The connection is gone: so is the process, or it is useless.
            let mut broken = None;
            if handle.timeout(patience, component.exited()).await.is_err() {
                broken = Some(why);
                component.kill();
            }
            let exit = component.exited().await;
            if let (Exit::Code(_), false, None) = (&exit, created, &broken) {
                // It ended by itself: it could not close its jail, as a rule, and says why.
                let words = component.last_line().unwrap_or_else(|| exit.to_string());
                let message = format!("the component could not be started: {words}");
                return Some(Outcome::NotCreated(Error::new(Kind::StartFailure, message)));
            }
            if guest.stop_cause().is_none() {
                tracing::error!(guest = &*guest.name, pid = component.pid, "the component died: {exit}");
            }
            Some(Outcome::Exited {
                exit,
                last_line: component.last_line(),
                broken,
            })
        }
    }
}

/// Ends the run by force when somebody wants that: asks the component, then kills it. Sets `stopped` when the component has answered, and
/// `made` to what was done.
async fn force(
    guest: &Guest,
    component: &Component,
    stopped: &Changed<bool>,
    made: &Cell<Rung>,
) -> std::convert::Infallible {
    guest.end_wanted().await;
    made.set(Rung::Forced);
    let (handle, patience) = (&guest.manager.handle, guest.manager.settings.force_after);
    let stop = component.lifecycle().stop_request().send().promise;
    match handle.timeout(patience, stop).await {
        Ok(Ok(_)) => {
            stopped.change(|stopped| *stopped = true);
            handle.sleep(patience).await;
            tracing::warn!(
                guest = &*guest.name,
                "the component stopped its machine but run does not return; killing it"
            );
        }
        Ok(Err(error)) => tracing::warn!(guest = &*guest.name, "the component cannot stop its machine: {error}"),
        Err(_) => tracing::warn!(
            guest = &*guest.name,
            "the component does not answer to stop; killing it"
        ),
    }
    made.set(Rung::Killed);
    component.kill();
    pending().await
}

/// What the component said in the end.
enum Said {
    Outcome(Outcome),
    /// What run returned, and the registers of the vCPUs when one of them failed.
    Ran(Result<StopReport, Error>, Vec<Registers>),
    Superseded,
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

/// The questions that are open with the component.
struct Talk {
    lifecycle: guest_lifecycle::Client,
    /// What the guest is made of.
    info: Promise<observer::info_result::Owned>,
    create: Promise<sepal_schema::error_capnp::completion::Owned>,
    run: Option<Promise<run_result::Owned>>,
}

impl Talk {
    /// Sends create and bind, and run too if it is wanted already: one round trip.
    fn begin(
        guest: &Rc<Guest>,
        component: &Component,
        config: GuestConfig,
        held: &mut Held<'_>,
    ) -> Result<Self, Error> {
        let manager = &guest.manager;
        let mut wire = |port: &Rc<Port>| {
            let attached = UnixStream::pair().and_then(|(ours, theirs)| {
                held.wires.push(port.attach(&manager.handle, ours)?);
                Ok(theirs)
            });
            attached.map_err(|error| Error::new(Kind::NoResources, format!("no socket for a port: {error}")))
        };
        let serial = wire(&guest.port)?;
        let consoles = guest.consoles.iter().map(&mut wire).collect::<Result<Vec<_>, _>>()?;

        let lifecycle = component.lifecycle();
        let fds = component.fds();
        let mut create = lifecycle.create_request();
        config.encode(create.get().init_config(), &fds)?;
        let mut host = create.get().init_host();
        host.set_unassisted(manager.settings.host.unassisted);
        host.set_cpuid(&manager.settings.cpuid);
        let number = Handles::send(&fds, serial.into())?;
        host.reborrow().init_serial().init_stream().set_number(number);
        let mut list = host
            .reborrow()
            .init_consoles(u32::try_from(consoles.len()).unwrap_or(u32::MAX));
        for (i, console) in (0..).zip(consoles) {
            list.reborrow().get(i).set_number(Handles::send(&fds, console.into())?);
        }
        host.set_events(guard::new_client(Events {
            guest: Rc::downgrade(guest),
            generation: guest.generation(),
        }));
        host.set_backends(guard::new_client(Reconnector {
            handle: manager.handle.clone(),
            paths: held.resources.backends.clone(),
            fds: fds.clone(),
        }));
        let create = create.send().promise;
        let remote = lifecycle.bind_request().send().pipeline.get_guest();
        // Asked before the guest runs: who is told that it does finds this answered.
        let observer = remote.observer_request().send().pipeline.get_observer();
        let info = observer.info_request().send().promise;
        guest.set_remote(remote, fds);
        // Who listens is to be there before the guest runs, and its vCPUs where they belong.
        let nobody_listens = held.resources.listening.is_none() && guest.listeners.is_empty();
        let at_once = guest.run_is_wanted() && nobody_listens && !guest.cpus.has_pins();
        let run = at_once.then(|| lifecycle.run_request().send().promise);
        Ok(Self {
            lifecycle,
            info,
            create,
            run,
        })
    }

    async fn on(
        self,
        guest: &Rc<Guest>,
        component: &Component,
        stopped: &Changed<bool>,
        listening: Option<&mut Listening>,
    ) -> Said {
        let created = async { Ok(read_completion(self.create.await?.get()?)) };
        match created.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Said::Outcome(Outcome::NotCreated(error)),
            Err(error) => return Said::of_exception(&error),
        }
        let listen = async {
            vsock::listen_again(guest).await?;
            match listening {
                Some(listening) => listening.begin(guest).await,
                None => Ok(()),
            }
        };
        if let Err(error) = listen.await {
            return Said::Outcome(Outcome::NotCreated(error));
        }
        if let Err(error) = cpu::pin_all(guest).await {
            return Said::Outcome(Outcome::NotCreated(error));
        }
        guest.set_created();
        guest.manager.handle.spawn(describe(Rc::downgrade(guest), self.info));
        let run = match self.run {
            Some(run) => run,
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
        let heard = params.get().and_then(|params| read_event(params.get_event()?));
        let result = heard.map(|kind| {
            // What comes late of a run that is over is of no interest any more.
            let current = |guest: &Rc<Guest>| guest.generation() == self.generation && !guest.is_restarting();
            if let (Some(kind), Some(guest)) = (kind, self.guest.upgrade().filter(current)) {
                let panicked = kind == EventKind::Device(DeviceNews::GuestPanicked(Panic::Panicked));
                let started = kind == EventKind::Started;
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
            }
        });
        futures::future::ready(result)
    }
}
