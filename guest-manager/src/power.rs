//! What changes whether a guest runs, short of its end (which is in `ladder`).
//!
//! ```text
//!   reset --> the run ends by force --> the next one begins      a guest that begins anyway is waited for
//!   pause, resume --> the component                              a guest that is held before its first instruction is not with a component
//!   the guest's kernel panicked --> nothing | stop | reset | pause, as its configuration says
//! ```

use std::rc::Rc;

use capnp::capability::{Promise, Response};
use sepal_schema::{
    config::OnPanic,
    error::{Error, Kind, read_completion},
    error_capnp::completion,
    guest_capnp::power,
};

use crate::{
    guest::{Again, Guest, StopCause},
    model::bounded_error,
};

type Answer = Promise<Response<completion::Owned>, capnp::Error>;

/// Passes a question on to the component.
///
/// # Errors
/// `NOT_RUNNING`, or the component's refusal.
pub(crate) async fn forward(guest: &Guest, ask: impl FnOnce(&power::Client) -> Answer) -> Result<(), Error> {
    // Held until the answer is there: dropping what a question is sent to takes it back.
    let power = guest.power()?;
    let answer = guest.answer(ask(&power)).await?;
    read_completion(answer.get()?).map_err(bounded_error)
}

/// Holds the vCPUs; returns when they are out of the guest.
///
/// # Errors
/// As [`forward`].
pub(crate) async fn pause(guest: &Guest) -> Result<(), Error> {
    guest.check_live()?;
    if guest.is_held() {
        return Ok(());
    }
    forward(guest, |power| power.pause_request().send().promise).await?;
    guest.set_paused(true);
    Ok(())
}

/// Lets the vCPUs go on, or begin if they were held before their first instruction.
///
/// # Errors
/// As [`forward`].
pub(crate) async fn resume(guest: &Guest) -> Result<(), Error> {
    guest.check_live()?;
    if guest.is_held() {
        return release(guest).await;
    }
    forward(guest, |power| power.resume_request().send().promise).await?;
    guest.set_paused(false);
    Ok(())
}

/// Runs what is held before its first instruction.
async fn release(guest: &Guest) -> Result<(), Error> {
    let generation = guest.generation();
    guest.want_run();
    guest.set_paused(false);
    guest.started_since(generation).await
}

/// Sends every vCPU a non-maskable interrupt.
///
/// # Errors
/// As [`forward`].
pub(crate) async fn nmi(guest: &Guest) -> Result<(), Error> {
    forward(guest, |power| power.nmi_request().send().promise).await
}

/// Begins the guest again; returns when its vCPUs run.
///
/// # Errors
/// `NOT_RUNNING` for a guest that has ended, is being stopped, or was never run; `NOT_SUPPORTED` for one that was given something which serves
/// one run only; what keeps it from being created again, which ends it.
pub(crate) async fn reset(guest: &Guest) -> Result<(), Error> {
    guest.check_live()?;
    if let Some(error) = guest.only_once() {
        return Err(error);
    }
    let not_running = |what: &str| {
        let message = format!("guest \"{}\" {what}", guest.name);
        Err(Error::new(Kind::NotRunning, message))
    };
    if guest.stop_cause().is_some() {
        return not_running("is being stopped");
    }
    let generation = guest.generation();
    if guest.is_held() {
        return release(guest).await;
    }
    let awaited = if guest.is_restarting() {
        // At once, however long it was to wait.
        guest.want_run();
        generation + 1
    } else if guest.has_started() {
        guest.want_again(Again::Asked);
        generation + 1
    } else if guest.run_is_wanted() {
        generation
    } else {
        return not_running("has not been run");
    };
    guest.started_since(awaited).await?;
    if guest.generation() < awaited {
        // It turned itself off just then.
        guest.check_live()?;
    }
    Ok(())
}

/// The guest's kernel has panicked: does what its configuration says.
pub(crate) fn panicked(guest: &Rc<Guest>) {
    match guest.on_panic {
        OnPanic::Leave => {}
        OnPanic::Stop => guest.want_stop(StopCause::Panicked),
        OnPanic::Restart => guest.want_again(Again::Panicked),
        OnPanic::Pause => {
            let guest = guest.clone();
            guest.manager.handle.clone().spawn(async move {
                if let Err(error) = pause(&guest).await {
                    tracing::warn!(guest = &*guest.name, "it panicked, and cannot be paused: {error}");
                }
            });
        }
    }
}
