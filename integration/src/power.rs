//! What a client does to whether a guest runs.

use std::{future::Future, time::Duration};

use capnp::capability::{Promise, Response};
use sepal_schema::{
    error::{Error, read_completion},
    error_capnp::completion,
    guest_capnp::power,
    report::StopReport,
};

use crate::{HarnessError, boot::Guest, manager::PATIENCE};

type Answer = Promise<Response<completion::Owned>, capnp::Error>;

impl Guest {
    fn power(&self) -> power::Client {
        self.guest.power_request().send().pipeline.get_power()
    }

    fn within<T>(
        &mut self,
        what: &str,
        question: impl Future<Output = Result<T, capnp::Error>>,
    ) -> Result<T, HarnessError> {
        let answer = self.manager.within(PATIENCE, question)?;
        Ok(answer.ok_or_else(|| self.timed_out(what, PATIENCE))??)
    }

    fn complete(&mut self, what: &str, question: Answer) -> Result<(), HarnessError> {
        Ok(read_completion(self.within(what, question)?.get()?)?)
    }

    /// Begins the guest again; returns when its vCPUs run.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn reset(&mut self) -> Result<(), HarnessError> {
        let question = self.power().reset_request().send().promise;
        self.complete("resetting the guest", question)
    }

    /// Holds the vCPUs.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn pause(&mut self) -> Result<(), HarnessError> {
        let question = self.power().pause_request().send().promise;
        self.complete("pausing the guest", question)
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn resume(&mut self) -> Result<(), HarnessError> {
        let question = self.power().resume_request().send().promise;
        self.complete("resuming the guest", question)
    }

    /// Sends every vCPU a non-maskable interrupt.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn nmi(&mut self) -> Result<(), HarnessError> {
        let question = self.power().nmi_request().send().promise;
        self.complete("sending an NMI", question)
    }

    /// Asks the guest to shut down, and with `force` stops it if it has not after `deadline`.
    ///
    /// # Errors
    /// What the guest manager answered, `TIMED_OUT` for one.
    pub fn stop(&mut self, deadline: Duration, force: bool) -> Result<StopReport, HarnessError> {
        use power::stop_result::Which;
        let mut request = self.power().stop_request();
        request
            .get()
            .set_timeout_ms(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        request.get().set_force(force);
        let answer = self.within("stopping the guest", request.send().promise)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Report(report) => Ok(StopReport::read(report?)?),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }
}
