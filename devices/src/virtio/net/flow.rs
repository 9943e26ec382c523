//! What becomes of a driver's frames while the host's side takes none: they wait for a while, then they are dropped until it takes some again.
//! Pure: time comes from outside.
//!
//! ```text
//!            full                        no room for PATIENCE
//!   Open -----------> Waiting(until) ------------------------> Dropping
//!     ^                    |                                       |
//!     '------- room -------'--------------- room ------------------'
//! ```

use std::time::{Duration, Instant};

/// How long frames wait for a host that takes none: longer than a busy host needs, shorter than the 5 s after which Linux takes a network card
/// for dead.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Flow {
    /// The host takes frames.
    #[default]
    Open,
    /// It does not, since a short time; the driver's frames stay in their ring until then.
    Waiting(Instant),
    /// It does not since long; the driver's frames are dropped.
    Dropping,
}

impl Flow {
    /// The host took no frame at `now`.
    pub(super) fn full(&mut self, now: Instant) {
        if *self == Self::Open {
            *self = Self::Waiting(now + PATIENCE);
        }
    }

    /// The host has room again.
    pub(super) fn room(&mut self) {
        *self = Self::Open;
    }

    /// Time passes. True: frames that waited are to be dropped now.
    pub(super) fn pass(&mut self, now: Instant) -> bool {
        let over = matches!(self, Self::Waiting(until) if *until <= now);
        if over {
            *self = Self::Dropping;
        }
        over
    }

    /// When [`pass`](Self::pass) is to be called at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Waiting(until) => Some(*until),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_wait_for_a_while_only() {
        let start = Instant::now();
        let mut flow = Flow::default();
        assert!(!flow.pass(start + PATIENCE) && flow.deadline().is_none());
        flow.full(start);
        flow.full(start + PATIENCE / 2);
        assert_eq!(flow.deadline(), Some(start + PATIENCE), "the first time counts");
        assert!(!flow.pass(start + PATIENCE / 2));
        assert!(flow.pass(start + PATIENCE));
        assert_eq!(flow, Flow::Dropping);
        flow.full(start + 2 * PATIENCE);
        assert_eq!(flow, Flow::Dropping, "still no room");
        flow.room();
        assert_eq!(flow, Flow::Open);
    }
}
