//! How far a guest is, and what is wanted of it: asked for by clients, told, and waited for.

use sepal_schema::{
    error::{Error, Kind},
    report::{Reason, StopReport},
};

use super::{Again, Guest, State, StopCause};

impl Guest {
    /// Whether it has not ended.
    pub fn live(&self) -> bool {
        self.state.look(|state| state.ended.is_none())
    }

    /// Waits until it is created, or known not to be.
    ///
    /// # Errors
    /// What kept it from being created.
    pub async fn created(&self) -> Result<(), Error> {
        self.state.until(|state| state.created.clone()).await
    }

    /// Whether its vCPUs run, or ran in this generation.
    pub fn has_started(&self) -> bool {
        self.state.look(|state| state.run.started)
    }

    /// Whether this generation was created.
    pub fn is_created(&self) -> bool {
        self.state.look(|state| state.run.created)
    }

    /// Whether it waits, or will, paused before its first instruction.
    pub fn is_held(&self) -> bool {
        self.state.look(|state| state.run.held)
    }

    /// Whether it was asked to shut down in this generation.
    pub fn was_asked(&self) -> bool {
        self.state.look(|state| state.run.asked)
    }

    /// Whether the generation has ended, and another is to follow.
    pub fn is_restarting(&self) -> bool {
        self.state.look(|state| state.run.over && state.ended.is_none())
    }

    /// Waits until its vCPUs run.
    ///
    /// # Errors
    /// What kept them from running.
    pub async fn started(&self) -> Result<(), Error> {
        self.started_since(0).await
    }

    /// Waits until the vCPUs of this generation, or a later one, run.
    ///
    /// # Errors
    /// As [`Guest::started`].
    pub async fn started_since(&self, generation: u64) -> Result<(), Error> {
        let started = |state: &mut State| {
            if state.run.started && state.run.generation >= generation {
                return Some(Ok(()));
            }
            let report = &state.ended.as_ref()?.report;
            if matches!(report.reason, Reason::Shutdown | Reason::Reset) {
                return Some(Ok(()));
            }
            Some(Err(report.error.clone().unwrap_or_else(|| {
                Error::new(Kind::StartFailure, report.detail.clone())
            })))
        };
        self.state.until(started).await
    }

    /// Waits until it has ended, and all that belonged to it is gone.
    pub async fn ended(&self) -> StopReport {
        let report = |state: &mut State| Some(state.ended.as_ref()?.report.clone());
        self.state.until(report).await
    }

    /// Waits until the generation is over: none if another is to follow, or how the guest ended.
    pub async fn over(&self, generation: u64) -> Option<StopReport> {
        let over = |state: &mut State| match &state.ended {
            Some(ended) => Some(Some(ended.report.clone())),
            None => (state.run.generation > generation || state.run.over).then_some(None),
        };
        self.state.until(over).await
    }

    /// Asks for its vCPUs to be started as soon as it is created, also where it was to be held.
    pub fn want_run(&self) {
        self.state.change(|state| {
            state.run.wanted = true;
            state.run.held = false;
        });
    }

    /// Whether its vCPUs are to be started.
    pub fn run_is_wanted(&self) -> bool {
        self.state.look(|state| state.run.wanted)
    }

    /// Waits until its vCPUs are to be started.
    pub async fn run_wanted(&self) {
        self.state.until(|state| state.run.wanted.then_some(())).await;
    }

    /// Has the generation end, and the next one begin. The first cause counts. Nothing comes of it before the vCPUs run.
    pub fn want_again(&self, again: Again) {
        self.state.change(|state| {
            if state.run.started {
                state.run.again_wanted.get_or_insert(again);
            }
        });
        self.save();
    }

    /// Why the generation is to give way to the next one, if it is.
    pub fn again_cause(&self) -> Option<Again> {
        self.state.look(|state| state.run.again_wanted)
    }

    /// Waits until the generation is to end: for good, or for the next one.
    pub async fn end_wanted(&self) {
        let wanted = |state: &mut State| {
            let wanted = state.stop_wanted.is_some() || state.run.again_wanted.is_some();
            wanted.then_some(())
        };
        self.state.until(wanted).await;
    }

    /// Stops it by force. The first cause counts. [`Guest::ended`] tells when it is done.
    pub fn want_stop(&self, cause: StopCause) {
        if !self.live() {
            return;
        }
        let generation = self.generation();
        self.manager
            .registry(|registry, now| registry.stopping(self.id, generation, now));
        self.state
            .change(|state| state.stop_wanted.get_or_insert(cause).clone());
        // Nothing keeps a stop from completing, not even the end of this manager.
        self.save();
    }

    /// Why it is stopped by force, if it is.
    pub fn stop_cause(&self) -> Option<StopCause> {
        self.state.look(|state| state.stop_wanted.clone())
    }

    /// Waits until it is to be stopped by force.
    pub async fn stop_wanted(&self) {
        self.state
            .until(|state| state.stop_wanted.is_some().then_some(()))
            .await;
    }
}
