//! What a vCPU's thread does next, as a function of where it is and of its orders.
//!
//! ```text
//!             set-up failed
//!   Starting ───────────────▶ (reported by start; no thread is left)
//!      │ set up
//!      ▼       resume                     the guest ends, or fails
//!   Parked ◀───────────▶ Running ─────────────────────────────────┐
//!      │       pause        │                                     │
//!      │ stop               │ stop                                ▼
//!      └────────────────────┴───────────────────────────────▶ Stopped
//! ```
//!
//! Parked waits in the thread's event manager, Running in KVM_RUN; Stopped is the thread's end, and nothing leads out of it.

/// Where a vCPU that was set up is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::machine) enum Phase {
    /// Out of the guest, waiting for orders.
    Parked,
    /// In the guest, or handling an exit.
    Running,
    /// Done.
    Stopped,
}

impl Phase {
    /// The next phase. `over` tells that the guest has ended, on this vCPU or on another.
    pub(in crate::machine) fn next(self, pause: bool, stop: bool, over: bool) -> Self {
        match self {
            Self::Stopped => Self::Stopped,
            _ if stop || over => Self::Stopped,
            _ if pause => Self::Parked,
            _ => Self::Running,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_last_order_decides_unless_stopped(orders in proptest::collection::vec(any::<(bool, bool, bool)>(), 1..40)) {
            let mut phase = Phase::Parked;
            let mut ended = false;
            for (pause, stop, over) in orders {
                phase = phase.next(pause, stop, over);
                ended |= stop || over;
                let expected = if ended { Phase::Stopped } else if pause { Phase::Parked } else { Phase::Running };
                prop_assert_eq!(phase, expected);
            }
        }
    }
}
