//! Why a virtual machine stopped, in Android's words.

use capnp::NotInSchema;
use sepal_schema::report::{Reason, StopReport};

/// `enum AVirtualMachineStopReason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum StopReason {
    Unrecognised = 0,
    ServiceDied = 1,
    InfrastructureError = 2,
    Killed = 3,
    Unknown = 4,
    Shutdown = 5,
    StartFailed = 6,
    Reboot = 7,
    Crash = 8,
    Hangup = 11,
}

/// The device by whose name the manager tells that the guest did not feed its watchdog.
const WATCHDOG: &str = "watchdog";

/// The reason that a report of the manager's stands for; `reason` as it came, since the report has none of those that this version does not know.
pub(crate) fn of_report(reason: Result<Reason, NotInSchema>, report: &StopReport) -> StopReason {
    match reason {
        Err(_) => StopReason::Unrecognised,
        Ok(Reason::Killed | Reason::Reset) if report.about == WATCHDOG => StopReason::Hangup,
        Ok(Reason::Unknown) => StopReason::Unknown,
        Ok(Reason::Shutdown) => StopReason::Shutdown,
        Ok(Reason::Reset) => StopReason::Reboot,
        Ok(Reason::Crash) => StopReason::Crash,
        Ok(Reason::Killed) => StopReason::Killed,
        Ok(Reason::StartFailed) => StopReason::StartFailed,
        Ok(Reason::Hangup) => StopReason::Hangup,
        Ok(Reason::VmmTerminated) => StopReason::Crash,
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::report::Rung;

    use super::*;

    fn of(reason: Reason, about: &str) -> StopReason {
        let report = StopReport {
            reason,
            detail: String::new(),
            error: None,
            uptime_ns: 0,
            time_ns: 0,
            about: about.into(),
            rung: Rung::None,
        };
        of_report(Ok(reason), &report)
    }

    #[test]
    fn every_reason_has_its_number() {
        let numbers = [
            (Reason::Unknown, 4),
            (Reason::Shutdown, 5),
            (Reason::Reset, 7),
            (Reason::Crash, 8),
            (Reason::Killed, 3),
            (Reason::StartFailed, 6),
            (Reason::Hangup, 11),
            (Reason::VmmTerminated, 8),
        ];
        for (reason, number) in numbers {
            assert_eq!(of(reason, "") as i32, number, "{reason:?}");
        }
    }

    #[test]
    fn a_guest_that_did_not_feed_its_watchdog_hung() {
        assert_eq!(of(Reason::Killed, "watchdog"), StopReason::Hangup);
        assert_eq!(of(Reason::Reset, "watchdog"), StopReason::Hangup);
        assert_eq!(of(Reason::Crash, "vcpu0"), StopReason::Crash);
    }
}
