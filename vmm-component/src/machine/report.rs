//! How the machine's threads tell the owner what happened, and each other that it is over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::config::EventSink;
use super::event::{Happening, MachineEvent, RegisterDump};

/// Shared by all threads of one machine.
pub(super) struct Reporter {
    generation: u64,
    events: EventSink,
    over: AtomicBool,
    failed: AtomicBool,
    /// Where the vCPUs were when one of them failed.
    last: Mutex<Vec<(u8, RegisterDump)>>,
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reporter")
            .field("generation", &self.generation)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

impl Reporter {
    /// A reporter of the machine of this generation.
    pub(super) fn new(generation: u64, events: EventSink) -> Self {
        Self {
            generation,
            events,
            over: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            last: Mutex::default(),
        }
    }

    /// Passes an event on. Of those that end the machine only the first is, and none once the owner has said that it is [over](Self::end).
    pub(super) fn report(&self, what: Happening) {
        if what.ends() && self.over.swap(true, Ordering::SeqCst) {
            return;
        }
        if matches!(what, Happening::VcpuFailed { .. }) {
            self.failed.store(true, Ordering::SeqCst);
        }
        (self.events)(MachineEvent {
            generation: self.generation,
            what,
        });
    }

    /// Ends the machine without an event.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// Whether the machine is over because a vCPU failed: then each says where it was when it leaves.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// A vCPU leaves, and was there.
    pub(super) fn leave(&self, vcpu: u8, registers: RegisterDump) {
        self.lasts().push((vcpu, registers));
    }

    /// Where the vCPUs were that have left after one of them failed, in order.
    pub(super) fn take_last(&self) -> Vec<(u8, RegisterDump)> {
        let mut last = std::mem::take(&mut *self.lasts());
        last.sort_by_key(|(vcpu, _)| *vcpu);
        last
    }

    fn lasts(&self) -> std::sync::MutexGuard<'_, Vec<(u8, RegisterDump)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no vCPU should go on.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}
