//! Counters of a running machine that anyone may read without stopping a vCPU.

use std::sync::atomic::{AtomicU64, Ordering};

/// The reasons for which a vCPU leaves the guest, as counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum ExitReason {
    /// Port read or write.
    Pio,
    /// Memory-mapped read or write.
    Mmio,
    /// A level-triggered interrupt was acknowledged.
    IoapicEoi,
    /// MSR access that the machine answers.
    Msr,
    /// An instruction that the host could not run, and that was finished here.
    Assist,
    /// A signal: a request of the owner's, or an early wake-up.
    Kick,
    /// `hlt` with no local APIC to wait on; none in a healthy machine.
    Halt,
    /// Anything else.
    Other,
}

impl ExitReason {
    /// All reasons, in the order of [`VcpuStats::exits`].
    pub const ALL: [Self; 8] = [
        Self::Pio,
        Self::Mmio,
        Self::IoapicEoi,
        Self::Msr,
        Self::Assist,
        Self::Kick,
        Self::Halt,
        Self::Other,
    ];

    /// The reason's name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pio => "pio",
            Self::Mmio => "mmio",
            Self::IoapicEoi => "ioapic-eoi",
            Self::Msr => "msr",
            Self::Assist => "assist",
            Self::Kick => "kick",
            Self::Halt => "halt",
            Self::Other => "other",
        }
    }
}

/// One vCPU's counters; written by its thread only.
#[derive(Debug, Default)]
pub(super) struct VcpuCounters {
    exits: [AtomicU64; ExitReason::ALL.len()],
}

impl VcpuCounters {
    /// Counts one exit. A plain load and store will do, since there is one writer.
    pub(super) fn count(&self, reason: ExitReason) {
        let counter = &self.exits[reason as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// The counters as they stand.
    pub(super) fn read(&self) -> VcpuStats {
        VcpuStats {
            exits: std::array::from_fn(|i| self.exits[i].load(Ordering::Relaxed)),
        }
    }
}

/// One vCPU's counters, read at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// Exits since the start, in the order of [`ExitReason::ALL`].
    pub exits: [u64; ExitReason::ALL.len()],
}

impl VcpuStats {
    /// Exits for one reason.
    pub fn exits_for(&self, reason: ExitReason) -> u64 {
        self.exits[reason as usize]
    }

    /// All exits.
    pub fn total(&self) -> u64 {
        self.exits.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }
}

/// A machine's counters, read at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineStats {
    /// By vCPU index.
    pub vcpus: Vec<VcpuStats>,
}
