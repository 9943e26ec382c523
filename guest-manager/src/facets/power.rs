//! Everything that changes whether a guest runs.

use std::{rc::Rc, time::Duration};

use sepal_schema::{
    error::{Error, write_completion},
    facet::Right,
    guest_capnp::power,
    report::StopReport,
};

use super::Reply;
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
    },
    ladder, power as runs,
};

const SHUTDOWN: Deed = Deed::new("Power.shutdown", &[Right::Shutdown]);
const STOP: Deed = Deed::new("Power.stop", &[Right::Shutdown]);
const STOP_BY_FORCE: Deed = Deed::new("Power.stop", &[Right::Shutdown, Right::Kill]);
const KILL: Deed = Deed::new("Power.kill", &[Right::Kill]);
const PAUSE: Deed = Deed::new("Power.pause", &[Right::Pause]);
const RESUME: Deed = Deed::new("Power.resume", &[Right::Pause]);
const RESET: Deed = Deed::new("Power.reset", &[Right::Reset]);
const NMI: Deed = Deed::new("Power.nmi", &[Right::Nmi]);

/// See `guest.capnp`.
pub(crate) struct PowerServer(pub(crate) Holder);

facets!(PowerServer { 0 });

fn write_stopped(outcome: Result<StopReport, Error>, to: power::stop_result::Builder<'_>) {
    match outcome {
        Ok(report) => report.write(to.init_report()),
        Err(error) => error.write(to.init_error()),
    }
}

impl power::Server for PowerServer {
    async fn shutdown(self: Rc<Self>, _: power::ShutdownParams, mut results: power::ShutdownResults) -> Reply {
        let outcome = self.0.perform(SHUTDOWN, "", ladder::press(&self.0.guest)).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn stop(self: Rc<Self>, params: power::StopParams, mut results: power::StopResults) -> Reply {
        let (timeout, force) = {
            let params = params.get()?;
            (params.get_timeout_ms(), params.get_force())
        };
        let timeout = match timeout {
            0 => self.0.guest.manager.settings.default_deadline,
            ms => Duration::from_millis(ms),
        };
        let (deed, way) = match force {
            true => (STOP_BY_FORCE, ", then by force"),
            false => (STOP, ""),
        };
        let detail = format!("within {} ms{way}", timeout.as_millis());
        let stop = ladder::stop(&self.0, timeout, force);
        write_stopped(self.0.perform(deed, detail, stop).await, results.get());
        Ok(())
    }

    async fn kill(self: Rc<Self>, _: power::KillParams, mut results: power::KillResults) -> Reply {
        let kill = ladder::kill(&self.0.guest, "it was stopped by force");
        write_stopped(self.0.perform(KILL, "", kill).await, results.get());
        Ok(())
    }

    async fn pause(self: Rc<Self>, _: power::PauseParams, mut results: power::PauseResults) -> Reply {
        let outcome = self.0.perform(PAUSE, "", runs::pause(&self.0.guest)).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn resume(self: Rc<Self>, _: power::ResumeParams, mut results: power::ResumeResults) -> Reply {
        let outcome = self.0.perform(RESUME, "", runs::resume(&self.0.guest)).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn reset(self: Rc<Self>, _: power::ResetParams, mut results: power::ResetResults) -> Reply {
        let outcome = self.0.perform(RESET, "", runs::reset(&self.0.guest)).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn nmi(self: Rc<Self>, _: power::NmiParams, mut results: power::NmiResults) -> Reply {
        let outcome = self.0.perform(NMI, "", runs::nmi(&self.0.guest)).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}
