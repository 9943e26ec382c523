//! The component's side of a guest: how it is reached, and what is said when it cannot be.

use std::{future::Future, pin::pin, time::Duration};

use futures::future::select;
use sepal_schema::{
    error::{Error, Kind},
    guest_capnp::{guest as component_guest, power},
    report::{Reason, StopReport},
    transport::{FdTable, Handle},
};

use super::Guest;

/// How long a component may take for an answer. Nothing that it is asked takes so long unless it stands still.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a component answers, which may be stopped, or do something else than answer.
///
/// # Errors
/// `TIMED_OUT`.
pub(crate) async fn within<F: Future>(handle: &Handle, patience: Duration, answer: F) -> Result<F::Output, Error> {
    handle.timeout(patience, answer).await.map_err(|_| {
        let message = format!("the guest's component has not answered within {patience:?}");
        Error::new(Kind::TimedOut, message)
    })
}

/// The component's side of a guest.
#[derive(Clone)]
pub(super) struct Remote {
    guest: component_guest::Client,
    fds: FdTable,
}

impl Guest {
    /// The component's side of it.
    ///
    /// # Errors
    /// `NOT_CREATED` while it is being created, `NOT_RUNNING` when it has ended.
    pub fn remote(&self) -> Result<component_guest::Client, Error> {
        Ok(self.connected()?.guest)
    }

    /// The descriptors that travel with its component's messages.
    ///
    /// # Errors
    /// As [`Guest::remote`].
    pub fn component_fds(&self) -> Result<FdTable, Error> {
        Ok(self.connected()?.fds)
    }

    fn connected(&self) -> Result<Remote, Error> {
        self.check_live()?;
        self.remote.look(Clone::clone).ok_or_else(|| {
            Error::new(
                Kind::NotCreated,
                format!("guest \"{}\" is still being created", self.name),
            )
        })
    }

    /// Its component has been given the task of creating it.
    pub(crate) fn set_remote(&self, guest: component_guest::Client, fds: FdTable) {
        let before = self.remote.change(|remote| remote.replace(Remote { guest, fds }));
        drop(before);
    }

    /// The run is over, and its component with it.
    pub(super) fn forget_remote(&self) {
        let before = self.remote.change(Option::take);
        drop(before);
    }

    /// Waits until its component can be asked. That is at once, unless the guest is being taken over; not waited for is a guest without a machine.
    pub(crate) async fn reached(&self) {
        if self.is_created() {
            let reached = pin!(self.remote.until(|remote| remote.as_ref().map(drop)));
            select(reached, pin!(self.over(self.generation()))).await;
        }
    }

    /// Its component does not answer, or does again.
    pub(crate) fn set_silent(&self, silent: bool) {
        self.silent.set(silent);
    }

    /// Whether its component does not answer, as far as anybody has asked it.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.get() || self.figures.waited_for() > self.manager.settings.force_after
    }

    /// Its power button and brakes.
    ///
    /// # Errors
    /// As [`Guest::remote`].
    pub fn power(&self) -> Result<power::Client, Error> {
        Ok(self.remote()?.power_request().send().pipeline.get_power())
    }

    /// Whether it can still be asked for something.
    ///
    /// # Errors
    /// `NOT_RUNNING`, saying how it ended.
    pub fn check_live(&self) -> Result<(), Error> {
        let ended = self
            .state
            .look(|state| state.ended.as_ref().map(|ended| ended.report.clone()));
        ended.map_or(Ok(()), |report| Err(self.not_running(&report)))
    }

    /// The answer of its component to `call`; when there is none, because the guest ended meanwhile, how it ended.
    ///
    /// # Errors
    /// `VMM_TERMINATED`, `NOT_RUNNING` (also of a guest that has begun again meanwhile), `TIMED_OUT` of a component that stands still, or what else kept it
    /// from answering.
    pub async fn answer<T>(&self, call: impl Future<Output = Result<T, capnp::Error>>) -> Result<T, Error> {
        let generation = self.generation();
        let broken = match within(&self.manager.handle, PATIENCE, call).await? {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if broken.kind != capnp::ErrorKind::Disconnected {
            self.check_live()?;
            return Err(broken.into());
        }
        // The connection has ended, and with it the run, as soon as that is noticed.
        let Some(report) = self.over(generation).await else {
            let message = format!("guest \"{}\" began again before it could answer", self.name);
            return Err(Error::new(Kind::NotRunning, message));
        };
        Err(match report.reason {
            Reason::VmmTerminated => Error::new(Kind::VmmTerminated, report.detail),
            _ => self.not_running(&report),
        })
    }

    fn not_running(&self, report: &StopReport) -> Error {
        let message = format!("guest \"{}\" has ended: {}", self.name, report.detail);
        Error::new(Kind::NotRunning, message)
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::transport::Reactor;

    use super::*;

    #[test]
    fn a_component_that_does_not_answer_is_not_waited_for() {
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        let never = within(&handle, Duration::from_millis(1), futures::future::pending::<()>());
        let error = reactor.run_until(never).unwrap().unwrap_err();
        assert_eq!(error.kind, Kind::TimedOut);
        let at_once = within(&handle, PATIENCE, async { 7 });
        assert_eq!(reactor.run_until(at_once).unwrap(), Ok(7));
    }
}
