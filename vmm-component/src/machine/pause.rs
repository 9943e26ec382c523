//! Who is out of the guest: tells when the last vCPU has left it after a pause.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bit n stands for vCPU n, which is why there are 64 at most.
type Set = u64;

#[derive(Debug)]
struct State {
    wanted: bool,
    inside: Set,
}

/// The vCPUs that are in the guest, or on their way.
#[derive(Debug)]
pub(super) struct PauseLedger {
    state: Mutex<State>,
    all_out: Condvar,
}

impl PauseLedger {
    /// No vCPU is inside.
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                wanted: false,
                inside: 0,
            }),
            all_out: Condvar::new(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes whether the machine is to be paused. Returns true if that was news and every vCPU is out already.
    pub(super) fn want(&self, paused: bool) -> bool {
        let mut state = self.lock();
        let news = state.wanted != paused;
        state.wanted = paused;
        news && paused && state.inside == 0
    }

    /// Whether the machine is to be paused.
    pub(super) fn wanted(&self) -> bool {
        self.lock().wanted
    }

    /// A vCPU wants to enter the guest. False if a pause is wanted: its orders, taken before, are about to be replaced, and it stays out. So
    /// once a pause is wanted, nobody enters, and the last one out stays the last.
    #[must_use]
    pub(super) fn enter(&self, vcpu: u8) -> bool {
        let mut state = self.lock();
        if !state.wanted {
            state.inside |= 1 << (vcpu & 63);
        }
        !state.wanted
    }

    /// Whether a pause is wanted and every vCPU is out; it stays so until the pause is no longer wanted.
    pub(super) fn paused(&self) -> bool {
        let state = self.lock();
        state.wanted && state.inside == 0
    }

    /// A vCPU has left the guest, to park or for good. Returns true if it was the last and a pause is wanted.
    pub(super) fn leave(&self, vcpu: u8) -> bool {
        let mut state = self.lock();
        let before = state.inside;
        state.inside &= !(1 << (vcpu & 63));
        if state.inside != 0 {
            return false;
        }
        self.all_out.notify_all();
        state.wanted && before != 0
    }

    /// Waits until no vCPU is inside; returns those that still are when `patience` ran out.
    pub(super) fn wait_all_out(&self, patience: Duration) -> Result<(), Vec<u8>> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while state.inside != 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err((0..64).filter(|n| state.inside >> n & 1 == 1).collect());
            }
            state = self
                .all_out
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_one_out_is_told() {
        let ledger = PauseLedger::new();
        assert!(ledger.enter(0) && ledger.enter(63));
        assert!(!ledger.want(true));
        assert!(!ledger.leave(0));
        assert!(!ledger.paused());
        assert_eq!(ledger.wait_all_out(Duration::ZERO), Err(vec![63]));
        assert!(ledger.leave(63));
        assert!(!ledger.leave(63), "leaving twice is told once");
        assert!(ledger.paused());
        assert_eq!(ledger.wait_all_out(Duration::ZERO), Ok(()));
    }

    #[test]
    fn without_a_pause_nobody_is_told() {
        let ledger = PauseLedger::new();
        assert!(ledger.enter(5));
        assert!(!ledger.leave(5));
        assert!(!ledger.paused());
        assert!(ledger.want(true), "all are out already");
        assert!(!ledger.want(true), "which is told once");
    }

    #[test]
    fn nobody_enters_while_a_pause_is_wanted() {
        let ledger = PauseLedger::new();
        assert!(ledger.want(true), "all are out, and their owner is told so");
        assert!(!ledger.enter(0), "a vCPU with older orders does not make that untrue");
        assert!(ledger.paused());
        ledger.want(false);
        assert!(ledger.enter(0));
        assert!(!ledger.paused());
    }
}
