//! What drives a guest from its creation to its end: one task for each creation, the only one that talks to its component about its life.
//!
//! ```text
//!   files -> component -> create -----> wait for run ----> run --+--> outcome --> ending --> all gone --> ended
//!     |          |          |  (run asked for at once is         |
//!     |          |          |   sent together with create)       |
//!     '----------'----------'------------------------------------'  heard all the time:
//!         a stop by force: asks the component, and kills it when it does not answer
//!         the component's death
//! ```
//!
//! The conversation has effects; what its outcome means ([`Outcome::ending`]) is decided without any.

use std::{
    future::Future,
    os::unix::net::UnixStream,
    pin::pin,
    rc::{Rc, Weak},
};

use futures::{
    FutureExt,
    future::{Either, LocalBoxFuture, pending, select, select_all},
};
use sepal_schema::{
    config::{GuestConfig, Handles},
    error::{Error, Kind, read_completion},
    guest_capnp::{event_sink, guest as component_guest},
    info::GuestInfo,
    lifecycle_capnp::guest_lifecycle::{self, run_result},
    report::{Reason, StopReport},
    transport::guard,
};

use crate::{
    backends::Reconnector,
    changed::Changed,
    client::Client,
    component::{Component, Exit, StartRequest},
    guest::{Guest, StopCause},
    model::{Ending, EventKind, bounded_error, bounded_report, read_event},
    resources::{self, Listening, Resources},
    serial::{Port, Wire},
    slot::Slot,
};

/// What came of the conversation with the component.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// It never came to a component, or the component could not make the machine.
    NotCreated(Error),
    /// It was stopped before it ran.
    NotRun,
    /// `run` returned.
    Ran(Result<StopReport, Error>),
    /// The component's process ended.
    Exited {
        exit: Exit,
        last_line: Option<String>,
        /// Why we had killed it without anybody asking, if we had.
        broken: Option<String>,
    },
}

impl Outcome {
    /// How the guest ended: its reason, and its uptime as far as the component told.
    fn ending(self, cause: Option<&StopCause>, started: bool) -> (Ending, u64) {
        let halted = |error: &Error| matches!(error.kind, Kind::ControllerForcedHalt | Kind::Cancelled);
        let ending = match (self, cause) {
            (Self::Ran(Ok(report)), _) => {
                let StopReport {
                    reason,
                    detail,
                    error,
                    uptime_ns,
                    ..
                } = bounded_report(report);
                return (Ending { reason, detail, error }, uptime_ns);
            }
            (Self::NotCreated(error) | Self::Ran(Err(error)), Some(cause)) if halted(&error) => cause.ending(),
            (Self::NotRun | Self::Exited { broken: None, .. }, Some(cause)) => cause.ending(),
            (Self::NotRun, None) => Ending::new(Reason::Killed, "it was stopped before it ran"),
            (Self::NotCreated(error), _) => Ending::failed(Reason::StartFailed, bounded_error(error)),
            (Self::Ran(Err(error)), _) => {
                let error = bounded_error(error);
                let reason = match error.kind {
                    Kind::VcpuRuntimeFailure => Reason::Crash,
                    Kind::ControllerForcedHalt => Reason::Killed,
                    _ if started => Reason::Crash,
                    _ => Reason::StartFailed,
                };
                Ending::failed(reason, error)
            }
            (
                Self::Exited {
                    exit,
                    last_line,
                    broken,
                },
                _,
            ) => {
                let mut words = match broken {
                    Some(broken) => format!("the component broke off its connection ({broken}) and was killed"),
                    None => format!("the component's process ended: {exit}"),
                };
                if let Some(line) = last_line {
                    words = format!("{words}; its last words: {line}");
                }
                Ending::failed(
                    Reason::VmmTerminated,
                    bounded_error(Error::new(Kind::VmmTerminated, words)),
                )
            }
        };
        (ending, 0)
    }
}

/// What is held for a guest until it has ended and its component has let go of it.
#[derive(Default)]
struct Held {
    /// Of the serial port, then those of the console's ports.
    wires: Vec<Wire>,
    resources: Resources,
}

/// Drives `guest` until it has ended and nothing is left of it.
pub(crate) async fn live(guest: Rc<Guest>, slot: Rc<Slot>, config: GuestConfig, client: Client) {
    let mut held = Held::default();
    let outcome = conversation(&guest, &slot, config, &client, &mut held).await;
    let Some(outcome) = outcome else {
        // Another creation has its component now.
        guest.close_ports();
        return;
    };
    let (ending, uptime_ns) = outcome.ending(guest.stop_cause().as_ref(), guest.has_started());
    if !slot.keeps_component() {
        slot.end_component().await;
    }
    // After the end of whoever writes to it.
    held.wires.iter().for_each(Wire::finish);
    guest.close_ports();
    std::mem::take(&mut held.resources.networks).end().await;
    drop(held);
    let report = guest.set_ended(ending, uptime_ns);
    let (reason, detail) = (sepal_schema::report::reason_name(report.reason), &report.detail);
    tracing::info!(
        guest = &*guest.name,
        generation = guest.generation,
        reason,
        "ended: {detail}"
    );
}

/// From the configuration to the outcome; none if another creation took the guest's place before it ran.
async fn conversation(
    guest: &Rc<Guest>,
    slot: &Rc<Slot>,
    config: GuestConfig,
    client: &Client,
    held: &mut Held,
) -> Option<Outcome> {
    let request = StartRequest {
        name: guest.name.clone(),
        limits: config.limits,
        waived_layers: config.waived_layers.clone(),
    };
    let prepared = resources::prepare(guest, config, client);
    let config = match select(pin!(prepared), pin!(guest.stop_wanted())).await {
        Either::Left((Ok((config, resources)), _)) => {
            held.resources = resources;
            let told = Rc::downgrade(guest);
            held.resources.networks.watch(move |news| {
                if let Some(guest) = told.upgrade() {
                    guest.happened(EventKind::Device(news));
                }
            });
            config
        }
        Either::Left((Err(error), _)) => return Some(Outcome::NotCreated(error)),
        Either::Right(_) => return Some(Outcome::NotRun),
    };
    // Not interrupted by a stop: a component that is half started would have to be waited for all the same.
    let component = match slot.component(request).await {
        Ok(component) => component,
        Err(error) => return Some(Outcome::NotCreated(error)),
    };
    if guest.stop_cause().is_some() {
        return Some(Outcome::NotRun);
    }
    let talk = match Talk::begin(guest, &component, config, held) {
        Ok(talk) => talk,
        Err(error) => return Some(Outcome::NotCreated(error)),
    };

    let stopped = Changed::new(false);
    let force = pin!(force(guest, &component, &stopped));
    let mut talk = pin!(talk.on(guest, &component, &stopped));
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
    match said {
        Said::Outcome(outcome) => Some(outcome),
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

/// Stops the guest by force when somebody wants that: asks the component, then kills it. Sets `stopped` when the component has answered.
async fn force(guest: &Guest, component: &Component, stopped: &Changed<bool>) -> std::convert::Infallible {
    guest.stop_wanted().await;
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
    component.kill();
    pending().await
}

/// What the component said in the end.
enum Said {
    Outcome(Outcome),
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
    remote: component_guest::Client,
    create: Promise<sepal_schema::error_capnp::completion::Owned>,
    run: Option<Promise<run_result::Owned>>,
    listening: Option<Listening>,
}

impl Talk {
    /// Sends create and bind, and run too if it is wanted already: one round trip.
    fn begin(guest: &Rc<Guest>, component: &Component, config: GuestConfig, held: &mut Held) -> Result<Self, Error> {
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
        let number = Handles::send(&fds, serial.into())?;
        host.reborrow().init_serial().init_stream().set_number(number);
        let mut list = host
            .reborrow()
            .init_consoles(u32::try_from(consoles.len()).unwrap_or(u32::MAX));
        for (i, console) in (0..).zip(consoles) {
            list.reborrow().get(i).set_number(Handles::send(&fds, console.into())?);
        }
        host.set_events(guard::new_client(Events(Rc::downgrade(guest))));
        host.set_backends(guard::new_client(Reconnector {
            handle: manager.handle.clone(),
            paths: held.resources.backends.clone(),
            fds: fds.clone(),
        }));
        let create = create.send().promise;
        let remote = lifecycle.bind_request().send().pipeline.get_guest();
        guest.set_remote(remote.clone(), fds);
        // Who listens is to be there before the guest runs.
        let listening = held.resources.listening.take();
        let at_once = guest.run_is_wanted() && listening.is_none();
        let run = at_once.then(|| lifecycle.run_request().send().promise);
        Ok(Self {
            lifecycle,
            remote,
            create,
            run,
            listening,
        })
    }

    async fn on(mut self, guest: &Rc<Guest>, component: &Component, stopped: &Changed<bool>) -> Said {
        let created = async { Ok(read_completion(self.create.await?.get()?)) };
        match created.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Said::Outcome(Outcome::NotCreated(error)),
            Err(error) => return Said::of_exception(&error),
        }
        if let Some(listening) = &mut self.listening
            && let Err(error) = listening.begin(guest).await
        {
            return Said::Outcome(Outcome::NotCreated(error));
        }
        guest.set_created();
        guest.manager.handle.spawn(describe(Rc::downgrade(guest), self.remote));
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
            Ok(match run.await?.get()?.which()? {
                run_result::Ended(report) => Ok(StopReport::read(report?)?),
                run_result::Error(error) => Err(Error::read(error?)?),
            })
        };
        match ran.await {
            Ok(result) => Said::Outcome(Outcome::Ran(result)),
            Err(error) => Said::of_exception(&error),
        }
    }
}

/// Asks the component what the guest is made of.
async fn describe(guest: Weak<Guest>, remote: component_guest::Client) {
    let observer = remote.observer_request().send().pipeline.get_observer();
    let info = observer.info_request().send().promise;
    let info = async { GuestInfo::read_result(info.await?.get()?) };
    let descriptor = info.await.ok().and_then(|info| info.descriptor);
    if let (Some(descriptor), Some(guest)) = (descriptor, guest.upgrade()) {
        guest.describe(&descriptor);
    }
}

/// Hears from the component what happens in the machine.
struct Events(Weak<Guest>);

impl event_sink::Server for Events {
    fn event(
        self: Rc<Self>,
        params: event_sink::EventParams,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let heard = params.get().and_then(|params| read_event(params.get_event()?));
        let result = heard.map(|kind| {
            if let (Some(kind), Some(guest)) = (kind, self.0.upgrade()) {
                guest.happened(kind);
            }
        });
        futures::future::ready(result)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn error(kind: Kind) -> Error {
        Error::new(kind, "it went wrong")
    }

    fn reason(outcome: Outcome, cause: Option<&StopCause>, started: bool) -> Reason {
        outcome.ending(cause, started).0.reason
    }

    #[test]
    fn a_guest_that_ends_by_itself_ends_so_whatever_was_wanted() {
        let report = StopReport {
            reason: Reason::Shutdown,
            detail: "ACPI".into(),
            error: None,
            uptime_ns: 5,
            time_ns: 0,
            about: String::new(),
            rung: sepal_schema::report::Rung::None,
        };
        let cause = StopCause::Killed("by hand".into());
        for cause in [None, Some(&cause)] {
            let (ending, uptime) = Outcome::Ran(Ok(report.clone())).ending(cause, true);
            assert_eq!((ending.reason, ending.error, uptime), (Reason::Shutdown, None, 5));
        }
    }

    #[test]
    fn what_was_stopped_by_force_says_why() {
        let killed = StopCause::Killed("its lease was dropped".into());
        let hangup = StopCause::Hangup(Duration::from_millis(50));
        let exited = || Outcome::Exited {
            exit: Exit::Signal(9),
            last_line: None,
            broken: None,
        };
        let outcomes = [
            Outcome::NotRun,
            Outcome::NotCreated(error(Kind::Cancelled)),
            Outcome::Ran(Err(error(Kind::ControllerForcedHalt))),
            exited(),
        ];
        for outcome in outcomes {
            let (ending, _) = outcome.clone().ending(Some(&killed), true);
            assert_eq!(
                (ending.reason, &ending.detail[..]),
                (Reason::Killed, "its lease was dropped")
            );
            assert_eq!(ending.error.unwrap().kind, Kind::ControllerForcedHalt);
            assert_eq!(reason(outcome, Some(&hangup), true), Reason::Hangup);
        }
    }

    #[test]
    fn a_component_that_dies_says_how() {
        let last_line = Some("out of luck".to_owned());
        let exited = Outcome::Exited {
            exit: Exit::Signal(11),
            last_line,
            broken: None,
        };
        let (ending, _) = exited.ending(None, true);
        assert_eq!(ending.reason, Reason::VmmTerminated);
        assert!(
            ending.detail.contains("SIGSEGV") && ending.detail.contains("out of luck"),
            "{}",
            ending.detail
        );
        assert_eq!(ending.error.unwrap().kind, Kind::VmmTerminated);
        let broken = Outcome::Exited {
            exit: Exit::Signal(9),
            last_line: None,
            broken: Some("protocol".into()),
        };
        assert!(broken.ending(None, true).0.detail.contains("protocol"));
    }

    #[test]
    fn failures_before_and_after_the_start_are_told_apart() {
        assert_eq!(
            reason(Outcome::NotCreated(error(Kind::KernelLoadFailure)), None, false),
            Reason::StartFailed
        );
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::VcpuStartFailure))), None, false),
            Reason::StartFailed
        );
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::VcpuRuntimeFailure))), None, false),
            Reason::Crash
        );
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::InternalError))), None, true),
            Reason::Crash
        );
        // A stop that comes together with another failure does not hide it.
        let cause = StopCause::Killed("by hand".into());
        assert_eq!(
            reason(Outcome::Ran(Err(error(Kind::VcpuRuntimeFailure))), Some(&cause), true),
            Reason::Crash
        );
    }
}
