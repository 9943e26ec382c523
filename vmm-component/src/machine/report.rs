//! How the machine's threads tell the owner what happened, and each other that it is over.

use std::sync::atomic::{AtomicBool, Ordering};

use super::config::EventSink;
use super::event::{Happening, MachineEvent};

/// Shared by all threads of one machine.
pub(super) struct Reporter {
    generation: u64,
    events: EventSink,
    over: AtomicBool,
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
        }
    }

    /// Passes an event on. Of those that end the machine only the first is, and none once the owner has said that it is [over](Self::end).
    pub(super) fn report(&self, what: Happening) {
        if what.ends() && self.over.swap(true, Ordering::SeqCst) {
            return;
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

    /// Whether no vCPU should go on.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}
