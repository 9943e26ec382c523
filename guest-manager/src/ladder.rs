//! Stopping a guest: ask, wait, force.
//!
//! ```text
//!   stop --> press the power button --> half the time --> ask the agent --> deadline --+--> ended: report
//!    ^  |         | refused                 if it is there, and the guest has not ended |
//!    |  |         |                                                                     +--> force: stop the machine -> (5 s)
//!    |  |         |                                                                     |      -> kill the process -> report
//!    |  |         '-- ask the agent, if it is there; else, with force: at once;         '--> else TIMED_OUT, the guest goes on
//!    |  |             else the refusal
//!    |  '-- it is being created, or begins again: wait for it, until the deadline
//!    '----- it began again: ask that one, too
//!   kill --> stop the machine -> (5 s) -> kill the process -> report
//! ```
//!
//! The report says which rung it took: asked, forced or killed.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use futures::future::{Either, select};
use sepal_schema::{
    error::{Error, Kind},
    report::StopReport,
};

use crate::{
    access::holder::Holder,
    agent,
    guest::{Guest, StopCause},
    power,
};

/// Presses the power button.
///
/// # Errors
/// `NOT_RUNNING`, or the component's refusal.
pub(crate) async fn press(guest: &Guest) -> Result<(), Error> {
    power::forward(guest, |power| power.shutdown_request().send().promise).await?;
    guest.set_shutting_down();
    Ok(())
}

/// Asks, waits, and with `force` stops by force.
///
/// # Errors
/// `NOT_RUNNING` if the guest had ended before; without `force`, `TIMED_OUT` or the component's refusal.
pub(crate) async fn stop(holder: &Holder, timeout: Duration, force: bool) -> Result<StopReport, Error> {
    let guest = &holder.guest;
    guest.check_live()?;
    // A component that does not answer does not keep the deadline from passing.
    let cause = match guest.manager.handle.timeout(timeout, ask(holder, timeout / 2)).await {
        Ok(Ok(report)) => return Ok(report),
        Ok(Err(refusal)) if !force => return Err(refusal),
        Ok(Err(refusal)) => StopCause::Killed(format!(
            "it could not be asked to shut down ({}), and was stopped by force",
            refusal.message
        )),
        Err(_) if force => StopCause::Hangup(timeout),
        Err(_) => return Err(timed_out(guest, timeout)),
    };
    guest.want_stop(cause);
    Ok(guest.ended().await)
}

fn timed_out(guest: &Guest, timeout: Duration) -> Error {
    let (name, after) = (&guest.name, timeout.as_millis());
    let message = if guest.is_paused() {
        format!("guest \"{name}\" is paused, and cannot shut down. Resume it, or stop it by force.")
    } else if !guest.has_started() {
        format!("guest \"{name}\" was not created within {after} ms, and could not be asked to shut down; it goes on.")
    } else {
        format!("guest \"{name}\" was asked to shut down and has not within {after} ms; it goes on.")
    };
    Error::new(Kind::TimedOut, message)
}

/// Asks the guest to shut down, whichever run of it there is, by the agent if that has not helped after `patience`; returns when it has ended.
async fn ask(holder: &Holder, patience: Duration) -> Result<StopReport, Error> {
    let (guest, handle) = (&holder.guest, holder.handle());
    let half_time = Instant::now() + patience;
    loop {
        if guest.is_restarting() || guest.is_held() || guest.run_is_wanted() {
            // If it ends before, that is seen below.
            let _ = guest.started().await;
        }
        let generation = guest.generation();
        if let Err(refusal) = press(guest).await {
            if !guest.live() {
                return Ok(guest.ended().await);
            }
            if guest.generation() != generation || guest.is_restarting() {
                continue;
            }
            if !guest.agent_is_ready() || agent::power_off(holder).await.is_err() {
                return Err(refusal);
            }
            guest.set_shutting_down();
        }
        let agent = async {
            handle.sleep(half_time.saturating_duration_since(Instant::now())).await;
            guest.agent_ready().await;
            if let Err(error) = agent::power_off(holder).await {
                tracing::info!(guest = &*guest.name, "its agent cannot shut it down: {error}");
            }
        };
        let over = match select(pin!(guest.over(generation)), pin!(agent)).await {
            Either::Left((over, _)) => over,
            Either::Right(((), over)) => over.await,
        };
        if let Some(report) = over {
            return Ok(report);
        }
    }
}

/// Stops by force at once.
///
/// # Errors
/// `NOT_RUNNING` if the guest had ended before.
pub(crate) async fn kill(guest: &Guest, why: &str) -> Result<StopReport, Error> {
    guest.check_live()?;
    guest.want_stop(StopCause::Killed(why.to_owned()));
    Ok(guest.ended().await)
}
