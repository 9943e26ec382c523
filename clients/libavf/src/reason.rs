//! Why a virtual machine stopped, in Android's words.

use capnp::NotInSchema;
use sepal_schema::report::{ComponentEnd, Reason, StopReport};

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
        Ok(Reason::VmmTerminated) if was_killed(report) => StopReason::Killed,
        Ok(Reason::VmmTerminated) => StopReason::Crash,
    }
}

/// Whether somebody ended the component's process, by the signals that are sent for that; others come of what a process does.
fn was_killed(report: &StopReport) -> bool {
    let Some(ComponentEnd::Killed(signal)) = report.component else {
        return false;
    };
    matches!(i32::from(signal), libc::SIGKILL | libc::SIGTERM)
}

#[cfg(test)]
mod tests {
    use sepal_schema::report::Rung;

    use super::*;

    fn of(reason: Reason, about: &str) -> StopReason {
        of_report(Ok(reason), &report(reason, about, None))
    }

    fn report(reason: Reason, about: &str, component: Option<ComponentEnd>) -> StopReport {
        StopReport {
            reason,
            detail: String::new(),
            error: None,
            uptime_ns: 0,
            time_ns: 0,
            about: about.into(),
            rung: Rung::None,
            component,
        }
    }

    #[test]
    fn a_component_was_killed_or_crashed() {
        let of = |end| of_report(Ok(Reason::VmmTerminated), &report(Reason::VmmTerminated, "", end));
        let killed = |signal: i32| Some(ComponentEnd::Killed(u8::try_from(signal).unwrap()));
        assert_eq!(of(killed(libc::SIGKILL)), StopReason::Killed);
        assert_eq!(of(killed(libc::SIGTERM)), StopReason::Killed);
        for end in [
            None,
            killed(libc::SIGSEGV),
            killed(libc::SIGSYS),
            Some(ComponentEnd::Exited(1)),
        ] {
            assert_eq!(of(end), StopReason::Crash, "{end:?}");
        }
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
