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

mod talk;

use std::{cell::Cell, os::unix::net::UnixStream, pin::pin, rc::Rc};

use futures::future::{Either, pending, select};
use sepal_schema::{
    config::GuestConfig,
    crash::{MAX_LAST_OUTPUT, Registers},
    error::{Error, Kind},
    report::Rung,
};

use self::talk::{Said, Sockets, Talk, ports};
use crate::{
    changed::Changed,
    client::Client,
    component::{Component, Exit, StartRequest, last_lines},
    course::{Course, Over},
    durable::{Bygone, Left, Owner},
    guest::Guest,
    model::Trace,
    outcome::Outcome,
    resources::{self, Resources},
    serial::Wire,
    slot::Slot,
};

/// What is held for a run until its component has let go of it.
struct Held<'a> {
    /// Of the serial port, then those of the console's ports.
    wires: Vec<Wire>,
    resources: &'a mut Resources,
    /// What was done to make it end.
    made: Rung,
    component: Option<Rc<Component>>,
    /// Of its log, where there is no component any more.
    last_lines: Vec<String>,
    /// Of the vCPUs when one of them failed.
    registers: Vec<Registers>,
}

/// Drives `guest` until it has ended and nothing is left of it.
pub(crate) async fn live(guest: Rc<Guest>, slot: Rc<Slot>, config: GuestConfig, client: Client) {
    let request = StartRequest::new(guest.name.clone(), &config);
    let mut course = Course::new(guest.clone(), &config);
    match course.prepare(config, &client).await {
        Ok(resources) => drive(&guest, &slot, &request, course, resources, None).await,
        Err(end) => course.end(end),
    }
}

/// Drives a guest from where the manager before left it.
pub(crate) async fn live_on(guest: Rc<Guest>, slot: Rc<Slot>, config: GuestConfig, owner: Owner, left: Left) {
    let request = StartRequest::new(guest.name.clone(), &config);
    let course = Course::resumed(guest.clone(), &config);
    let resumed = resources::resume(&guest, config, owner);
    let resources = match select(pin!(resumed), pin!(guest.stop_wanted())).await {
        Either::Left((resources, _)) => resources,
        Either::Right(_) => {
            // Whatever its files or back ends make this wait for: what is to be stopped is.
            left.end().await;
            return course.end_stopped();
        }
    };
    drive(&guest, &slot, &request, course, resources, Some(left)).await;
}

/// Drives `guest` from run to run; `left` is what the manager before left of the first one.
async fn drive(
    guest: &Rc<Guest>,
    slot: &Rc<Slot>,
    request: &StartRequest,
    mut course: Course,
    mut resources: Resources,
    mut left: Option<Left>,
) {
    let end = loop {
        let mut held = Held {
            wires: Vec::new(),
            resources: &mut resources,
            made: Rung::None,
            component: None,
            last_lines: Vec::new(),
            registers: Vec::new(),
        };
        let outcome = match left.take() {
            Some(Left::Over(past)) => Ended::Before(past),
            Some(left) => continuation(guest, slot, request, &mut held, left).await.into(),
            None => conversation(guest, slot, request, &mut held).await.into(),
        };
        let (mut over, told) = match outcome {
            Ended::Now(outcome) => {
                let over = course.decide(outcome, held.made);
                guest.note_over(&over);
                (over, false)
            }
            Ended::Before(past) => past.settle(guest, &mut held).await,
            Ended::Superseded => {
                guest.close_ports();
                return;
            }
        };
        if over.follows.is_some() || !slot.keeps_component() {
            slot.end_component().await;
        }
        // After the end of whoever writes to it.
        held.wires.iter().for_each(Wire::end_run);
        if over.end.ending.failed_run() && !told {
            if let Some(component) = held.component.take() {
                held.last_lines = component.last_lines();
            }
            let output = guest.port.tail(MAX_LAST_OUTPUT);
            let trace = Trace::new(&held.last_lines, held.registers, &output);
            over.end.ending.trace = Some(Box::new(trace));
        }
        let follows = told || course.follow(&over);
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

/// How the talk about a run came to its end.
enum Ended {
    Now(Outcome),
    /// Under the manager before.
    Before(Box<Bygone>),
    /// Another creation has its component now.
    Superseded,
}

impl From<Option<Outcome>> for Ended {
    fn from(outcome: Option<Outcome>) -> Self {
        outcome.map_or(Self::Superseded, Self::Now)
    }
}

impl Bygone {
    /// Waits for the component's end, and takes what the guest printed last; how the run ended, and whether that has been told.
    async fn settle(self: Box<Self>, guest: &Guest, held: &mut Held<'_>) -> (Over, bool) {
        if let Some(exit) = self.exit {
            exit.await;
        }
        held.last_lines = self.log.map(last_lines).unwrap_or_default();
        attach(guest, self.sockets, held);
        (self.over, self.told)
    }
}

/// Has the manager's ends of the ports' sockets read on.
fn attach(guest: &Guest, sockets: Vec<UnixStream>, held: &mut Held<'_>) {
    for (port, socket) in ports(guest).zip(sockets) {
        match port.attach(&guest.manager.handle, socket) {
            Ok(wire) => held.wires.push(wire),
            Err(error) => tracing::error!(guest = &*guest.name, "a port is not read any more: {error}"),
        }
    }
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
    let sockets = match Sockets::connect(guest, &component, &mut held.wires).await {
        Ok(sockets) => sockets,
        Err(error) => return Some(Outcome::NotCreated(error)),
    };
    match Talk::begin(guest, &component, config, sockets, held) {
        Ok(talk) => listen(guest, &component, held, talk).await.unwrap_or(None),
        Err(error) => Some(Outcome::NotCreated(error)),
    }
}

/// From what the manager before left to the outcome of the run; none as for [`conversation`].
async fn continuation(
    guest: &Rc<Guest>,
    slot: &Rc<Slot>,
    request: &StartRequest,
    held: &mut Held<'_>,
    left: Left,
) -> Option<Outcome> {
    match left {
        Left::Over(_) | Left::Creating => {}
        Left::Died { exit, log, sockets } => {
            // What it printed last is still in there.
            attach(guest, sockets, held);
            tracing::error!(
                guest = &*guest.name,
                "the component died while there was no manager: {exit}"
            );
            held.last_lines = log.map(last_lines).unwrap_or_default();
            return Some(Outcome::Exited {
                exit,
                last_line: held.last_lines.last().cloned(),
                broken: None,
            });
        }
        Left::Lives { started, sockets } => {
            let component = match slot.adopt(request.clone(), started) {
                Ok(component) => component,
                Err(error) => return Some(Outcome::NotCreated(error)),
            };
            held.component = Some(component.clone());
            attach(guest, sockets, held);
            let talk = Talk::resume(guest, &component, held);
            match listen(guest, &component, held, talk).await {
                Ok(outcome) => return outcome,
                Err(Unborn) => slot.end_component().await,
            }
            held.wires.clear();
            held.component = None;
        }
    }
    conversation(guest, slot, request, held).await
}

/// There is no machine yet that could be taken over.
struct Unborn;

/// Hears the component until the run is over; none as for [`conversation`].
async fn listen(
    guest: &Rc<Guest>,
    component: &Rc<Component>,
    held: &mut Held<'_>,
    talk: Talk,
) -> Result<Option<Outcome>, Unborn> {
    let (stopped, made) = (Changed::new(false), Cell::new(Rung::None));
    let force = pin!(force(guest, component, &stopped, &made));
    let listening = held.resources.listening.as_mut();
    let mut talk = pin!(talk.on(guest, component, &stopped, listening));
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
    Ok(match said {
        Said::Unborn => return Err(Unborn),
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
                return Ok(Some(Outcome::NotCreated(Error::new(Kind::StartFailure, message))));
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
    })
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
