//! How a guest ended, as a Rust value.

use crate::{
    error::{Error, cut},
    guest_capnp,
};

use guest_capnp::stop_report::component;
pub use guest_capnp::stop_report::{Reason, Rung};

/// How a guest ended; the fields are documented in `guest.capnp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopReport {
    /// What to match on.
    pub reason: Reason,
    /// A sentence for a person, of at most [`MAX_MESSAGE`](crate::error::MAX_MESSAGE) bytes where it travels.
    pub detail: String,
    /// The typed error behind it; none for a shutdown or reset.
    pub error: Option<Error>,
    /// Nanoseconds from the start of the vCPUs to the end; 0 if they never ran.
    pub uptime_ns: u64,
    /// When it ended, in nanoseconds since 1970-01-01 UTC.
    pub time_ns: u64,
    /// The vCPU or device that it ended by; empty where there is none.
    pub about: String,
    /// Which rung of the ladder ended it.
    pub rung: Rung,
    /// How its component's process ended, where the guest ended with that and it is known.
    pub component: Option<ComponentEnd>,
}

/// How a component's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComponentEnd {
    /// It exited with this status.
    Exited(u8),
    /// This signal killed it.
    Killed(u8),
}

impl StopReport {
    /// Writes the report into a message.
    pub fn write(&self, mut to: guest_capnp::stop_report::Builder<'_>) {
        to.set_reason(self.reason);
        to.set_detail(cut(&self.detail));
        if let Some(error) = &self.error {
            error.write(to.reborrow().init_error());
        }
        to.set_uptime_ns(self.uptime_ns);
        to.set_time_ns(self.time_ns);
        to.set_about(cut(&self.about));
        to.set_rung(self.rung);
        let mut component = to.init_component();
        match self.component {
            None => component.set_unknown(()),
            Some(ComponentEnd::Exited(status)) => component.set_exited(status),
            Some(ComponentEnd::Killed(signal)) => component.set_killed(signal),
        }
    }

    /// Reads what [`guest_capnp::observer`] answers to those who wait.
    ///
    /// # Errors
    /// What kept the observer from answering.
    pub fn read_result(from: guest_capnp::observer::wait_result::Reader<'_>) -> Result<Self, Error> {
        use guest_capnp::observer::wait_result::Which;
        match from.which().map_err(capnp::Error::from)? {
            Which::Report(report) => Ok(Self::read(report?)?),
            Which::Error(error) => Err(Error::read(error?)?),
        }
    }

    /// Reads a report out of a message. A reason that this version does not know reads as [`Reason::Unknown`], with the text kept.
    pub fn read(from: guest_capnp::stop_report::Reader<'_>) -> Result<Self, capnp::Error> {
        Ok(Self {
            reason: from.get_reason().unwrap_or(Reason::Unknown),
            detail: cut(from.get_detail()?.to_str()?).to_owned(),
            error: if from.has_error() {
                Some(Error::read(from.get_error()?)?)
            } else {
                None
            },
            uptime_ns: from.get_uptime_ns(),
            time_ns: from.get_time_ns(),
            about: cut(from.get_about()?.to_str()?).to_owned(),
            rung: from.get_rung().unwrap_or(Rung::None),
            component: match from.get_component().which() {
                Ok(component::Exited(status)) => Some(ComponentEnd::Exited(status)),
                Ok(component::Killed(signal)) => Some(ComponentEnd::Killed(signal)),
                Ok(component::Unknown(())) | Err(_) => None,
            },
        })
    }
}

/// The reason as it is written on command lines and in JSON: `start-failed`.
pub fn reason_name(reason: Reason) -> &'static str {
    match reason {
        Reason::Unknown => "unknown",
        Reason::Shutdown => "shutdown",
        Reason::Reset => "reset",
        Reason::Crash => "crash",
        Reason::Killed => "killed",
        Reason::StartFailed => "start-failed",
        Reason::Hangup => "hangup",
        Reason::VmmTerminated => "vmm-terminated",
    }
}

/// The rung as it is written on command lines and in JSON: `asked`.
pub fn rung_name(rung: Rung) -> &'static str {
    match rung {
        Rung::None => "none",
        Rung::Asked => "asked",
        Rung::Forced => "forced",
        Rung::Killed => "killed",
    }
}

/// Now, in nanoseconds since 1970-01-01 UTC, as the protocol counts time; 0 on a host whose clock is before that.
pub fn now_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_long_detail_is_cut_on_either_side() {
        let long = "x".repeat(crate::error::MAX_MESSAGE + 1);
        let mut message = capnp::message::Builder::new_default();
        message
            .init_root::<guest_capnp::stop_report::Builder<'_>>()
            .set_detail(&long);
        let mut report = StopReport::read(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(report.detail, long[1..]);
        report.detail = long;
        let mut message = capnp::message::Builder::new_default();
        report.write(message.init_root());
        let sent = message
            .get_root_as_reader::<guest_capnp::stop_report::Reader<'_>>()
            .unwrap();
        assert_eq!(sent.get_detail().unwrap().len(), report.detail.len() - 1);
    }

    #[test]
    fn a_report_survives_the_wire() {
        let error = Error::new(Kind::VcpuRuntimeFailure, "vCPU 1: emulation failure");
        for (error, component) in [
            (None, None),
            (Some(error), Some(ComponentEnd::Exited(101))),
            (None, Some(ComponentEnd::Killed(9))),
        ] {
            let report = StopReport {
                reason: Reason::Crash,
                detail: "vCPU 1".into(),
                error,
                uptime_ns: 5,
                time_ns: now_ns(),
                about: "vcpu1".into(),
                rung: Rung::Forced,
                component,
            };
            let mut message = capnp::message::Builder::new_default();
            report.write(message.init_root());
            assert_eq!(StopReport::read(message.get_root_as_reader().unwrap()).unwrap(), report);
        }
    }
}
