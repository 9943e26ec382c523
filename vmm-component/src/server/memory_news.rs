//! When a guest is asked how its memory fares: along with its figures, for whoever asks for them the next time, and only if it has run meanwhile,
//! so that one which is idle is not woken by those who watch it.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use sepal_devices::virtio::balloon::BalloonHandle;

/// Its vCPUs have run so long since it was asked last: a few microseconds of answering are nothing to that.
const RAN: Duration = Duration::from_millis(50);
/// It is asked at most so often.
const PACE: Duration = Duration::from_secs(1);
/// How long it may take to answer. Nobody waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// When the guest was asked last.
#[derive(Debug, Default)]
pub(super) struct MemoryNews {
    asked: Cell<Option<Asked>>,
}

/// A question.
#[derive(Debug, Clone, Copy)]
struct Asked {
    at: Instant,
    /// CPU time of the vCPUs by then.
    ran: Duration,
}

impl MemoryNews {
    /// The vCPUs have used `cpu_time_ns` so far: asks the guest if that is enough.
    pub(super) fn ask(&self, balloon: &BalloonHandle, cpu_time_ns: u64) {
        let now = Asked {
            at: Instant::now(),
            ran: Duration::from_nanos(cpu_time_ns),
        };
        if is_due(self.asked.get(), now) {
            self.asked.set(Some(now));
            // The device keeps what it is told.
            balloon.request_stats(PATIENCE, drop);
        }
    }
}

fn is_due(last: Option<Asked>, now: Asked) -> bool {
    match last {
        None => now.ran >= RAN,
        Some(last) => now.ran.saturating_sub(last.ran) >= RAN && now.at.saturating_duration_since(last.at) >= PACE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_asked_when_it_has_run_and_not_too_often() {
        let begin = Instant::now();
        let at = |seconds, milliseconds| Asked {
            at: begin + Duration::from_secs(seconds),
            ran: Duration::from_millis(milliseconds),
        };
        assert!(!is_due(None, at(0, 49)), "it has hardly begun");
        assert!(is_due(None, at(0, 50)));
        let last = Some(at(10, 1000));
        assert!(!is_due(last, at(3600, 1049)), "it is idle");
        assert!(!is_due(last, at(10, 9000)), "it was asked just now");
        assert!(is_due(last, at(11, 1050)));
        assert!(!is_due(last, at(0, 0)), "clocks of another machine");
    }
}
