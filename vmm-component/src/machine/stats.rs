//! Counters of a running machine that anyone may read without stopping a vCPU.

use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};

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
    /// Reading an MSR that the machine answers.
    ReadMsr,
    /// Writing an MSR that the machine answers.
    WriteMsr,
    /// An instruction that the host could not run; it was finished here, or ended the guest.
    Assist,
    /// A signal: a request of the owner's, or an early wake-up.
    Kick,
    /// `hlt` with no local APIC to wait on; none in a healthy machine.
    Halt,
    /// A triple fault, which ends the guest.
    TripleFault,
    /// The guest asked KVM itself for its end.
    SystemEvent,
    /// The processor refused to enter the guest.
    FailEntry,
    /// KVM could not reach guest memory.
    MemoryFault,
    /// Anything else.
    Other,
}

impl ExitReason {
    /// All reasons, in the order of [`VcpuStats::exits`].
    pub const ALL: [Self; 13] = [
        Self::Pio,
        Self::Mmio,
        Self::IoapicEoi,
        Self::ReadMsr,
        Self::WriteMsr,
        Self::Assist,
        Self::Kick,
        Self::Halt,
        Self::TripleFault,
        Self::SystemEvent,
        Self::FailEntry,
        Self::MemoryFault,
        Self::Other,
    ];

    /// Its name, after KVM's (KVM_EXIT_IO: "io").
    pub fn name(self) -> &'static str {
        match self {
            Self::Pio => "io",
            Self::Mmio => "mmio",
            Self::IoapicEoi => "ioapic-eoi",
            Self::ReadMsr => "rdmsr",
            Self::WriteMsr => "wrmsr",
            Self::Assist => "internal-error",
            Self::Kick => "interrupted",
            Self::Halt => "hlt",
            Self::TripleFault => "shutdown",
            Self::SystemEvent => "system-event",
            Self::FailEntry => "fail-entry",
            Self::MemoryFault => "memory-fault",
            Self::Other => "other",
        }
    }
}

/// What a vCPU does, as far as its thread knows: in KVM_RUN that cannot tell whether the guest halted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum VcpuState {
    /// Not started, or over.
    #[default]
    Stopped,
    /// In the guest, or handling an exit.
    Running,
    /// Out of the guest until it may go on.
    Paused,
}

/// One vCPU's counters; written by its thread only.
#[derive(Debug, Default)]
pub(super) struct VcpuCounters {
    exits: [AtomicU64; ExitReason::ALL.len()],
    /// The clock of the thread's CPU time, while it lives; 0 (the real-time clock, which it never is) before and after.
    clock: AtomicI32,
    /// The thread's CPU time in nanoseconds, once it has ended.
    cpu_time_ns: AtomicU64,
    /// As [`VcpuState`].
    state: AtomicU8,
}

impl VcpuCounters {
    /// Counts one exit. A plain load and store will do, since there is one writer.
    pub(super) fn count(&self, reason: ExitReason) {
        let counter = &self.exits[reason as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// What the vCPU does from now on.
    pub(super) fn enters(&self, state: VcpuState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// The calling thread is the vCPU's from here on: its CPU time is what counts.
    pub(super) fn thread_begins(&self) {
        let mut clock = 0;
        // SAFETY: the calling thread exists, and `clock` is ours to write.
        if unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) } == 0 {
            self.clock.store(clock, Ordering::Relaxed);
        }
    }

    /// The calling thread, which is the vCPU's, is about to end: its clock ends with it.
    pub(super) fn thread_ends(&self) {
        if let Some(time) = cpu_time(self.clock.load(Ordering::Relaxed)) {
            self.cpu_time_ns.store(time, Ordering::Relaxed);
        }
        self.clock.store(0, Ordering::Relaxed);
        self.enters(VcpuState::Stopped);
    }

    /// The counters as they stand.
    pub(super) fn read(&self) -> VcpuStats {
        let clock = self.clock.load(Ordering::Relaxed);
        VcpuStats {
            exits: std::array::from_fn(|i| self.exits[i].load(Ordering::Relaxed)),
            cpu_time_ns: cpu_time(clock).unwrap_or_else(|| self.cpu_time_ns.load(Ordering::Relaxed)),
            state: [VcpuState::Stopped, VcpuState::Running, VcpuState::Paused]
                .into_iter()
                .find(|state| *state as u8 == self.state.load(Ordering::Relaxed))
                .unwrap_or_default(),
        }
    }
}

/// One vCPU's counters, read at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// Exits since the start, in the order of [`ExitReason::ALL`].
    pub exits: [u64; ExitReason::ALL.len()],
    /// CPU time of the vCPU's thread, in nanoseconds, guest and host together.
    pub cpu_time_ns: u64,
    /// What it does.
    pub state: VcpuState,
}

/// What a thread's clock says, in nanoseconds; none if the thread is gone.
fn cpu_time(clock: libc::clockid_t) -> Option<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is ours to write; a clock that is no more is an error, not undefined.
    if clock == 0 || unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return None;
    }
    let seconds = u64::try_from(time.tv_sec).ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(u64::try_from(time.tv_nsec).ok()?)
}

impl VcpuStats {
    /// Exits for one reason.
    pub fn exits_for(&self, reason: ExitReason) -> u64 {
        self.exits[reason as usize]
    }

    /// The reasons for which there were exits, with how many.
    pub fn reasons(&self) -> impl Iterator<Item = (ExitReason, u64)> {
        let all = ExitReason::ALL.into_iter().zip(self.exits);
        all.filter(|(_, count)| *count > 0)
    }

    /// All exits.
    pub fn total(&self) -> u64 {
        self.exits.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }
}

/// A machine's counters, read at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineStats {
    /// Bytes of serial output that were dropped because the host side did not take them.
    pub serial_dropped: u64,
    /// By vCPU index.
    pub vcpus: Vec<VcpuStats>,
}

impl MachineStats {
    /// CPU time of all vCPUs' threads, in nanoseconds.
    pub fn cpu_time_ns(&self) -> u64 {
        self.vcpus
            .iter()
            .fold(0, |sum, vcpu| sum.saturating_add(vcpu.cpu_time_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_told_by_reason_and_add_up() {
        let counters = VcpuCounters::default();
        for (reason, times) in ExitReason::ALL.into_iter().zip([3, 0, 2, 0, 1, 0, 4, 0, 1, 0, 0, 0, 5]) {
            (0..times).for_each(|_| counters.count(reason));
        }
        let stats = counters.read();
        let told: Vec<_> = stats.reasons().map(|(reason, count)| (reason.name(), count)).collect();
        assert_eq!(
            told,
            [
                ("io", 3),
                ("ioapic-eoi", 2),
                ("wrmsr", 1),
                ("interrupted", 4),
                ("shutdown", 1),
                ("other", 5)
            ]
        );
        assert_eq!(stats.total(), 16);
    }

    #[test]
    fn every_reason_has_a_place_and_a_name_of_its_own() {
        for (i, reason) in ExitReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i);
            let alike = ExitReason::ALL.iter().filter(|other| other.name() == reason.name());
            assert_eq!(alike.count(), 1, "{reason:?}");
        }
    }
}
