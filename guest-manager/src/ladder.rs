//! Stopping a guest: ask, wait, force.
//!
//! ```text
//!   stop --> press the power button --> wait for the deadline --+--> ended: report
//!                  | refused                                    |
//!                  |                                            +--> force: stop the machine -> (5 s) -> kill the process -> report
//!                  '-- force: at once; else the refusal         +--> else TIMED_OUT, the guest goes on
//!   kill --> stop the machine -> (5 s) -> kill the process -> report
//! ```

use std::time::Duration;

use sepal_schema::{
    error::{Error, Kind, read_completion},
    report::StopReport,
};

use crate::{
    guest::{Guest, StopCause},
    model::bounded_error,
};

/// Presses the power button.
///
/// # Errors
/// `NOT_RUNNING`, or the component's refusal.
pub(crate) async fn press(guest: &Guest) -> Result<(), Error> {
    let power = guest.power()?;
    let answer = guest.answer(power.shutdown_request().send().promise).await?;
    read_completion(answer.get()?).map_err(bounded_error)?;
    guest.set_shutting_down();
    Ok(())
}

/// Asks, waits, and with `force` stops by force.
///
/// # Errors
/// `NOT_RUNNING` if the guest had ended before; without `force`, `TIMED_OUT` or the component's refusal.
pub(crate) async fn stop(guest: &Guest, timeout: Duration, force: bool) -> Result<StopReport, Error> {
    guest.check_live()?;
    let ask = async {
        // A component that does not answer does not keep the deadline from passing.
        match press(guest).await {
            Ok(()) => Ok(guest.ended().await),
            Err(_) if !guest.live() => Ok(guest.ended().await),
            Err(refusal) => Err(refusal),
        }
    };
    let cause = match guest.manager.handle.timeout(timeout, ask).await {
        Ok(Ok(report)) => return Ok(report),
        Ok(Err(refusal)) if !force => return Err(refusal),
        Ok(Err(refusal)) => StopCause::Killed(format!(
            "it could not be asked to shut down ({}), and was stopped by force",
            refusal.message
        )),
        Err(_) if force => StopCause::Hangup(timeout),
        Err(_) => {
            let (name, after) = (&guest.name, timeout.as_millis());
            let message = format!(
                "guest \"{name}\" was asked to shut down and has not within {after} ms; it goes on. Wait longer, or stop it by force."
            );
            return Err(Error::new(Kind::TimedOut, message));
        }
    };
    guest.want_stop(cause);
    Ok(guest.ended().await)
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
