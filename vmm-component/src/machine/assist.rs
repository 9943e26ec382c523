//! Where a host without hardware virtualization needs help; no other host comes here.

use kvm_ioctls::VcpuFd;

/// What became of an instruction that KVM gave up on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AssistOutcome {
    /// The vCPU can go on.
    Handled,
    /// It can't, and why.
    Unhandled(String),
}

/// What became of an MSR access that was filtered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MsrOutcome {
    /// Done; the value is what a read returns.
    Done(u64),
    /// The guest gets a general protection fault.
    Fault,
}

/// One machine's help, shared by its vCPUs.
pub(super) trait Assist: Send + Sync {
    /// Finishes the instruction at which KVM_EXIT_INTERNAL_ERROR stopped `vcpu`.
    fn internal_error(&self, vcpu: &mut VcpuFd) -> AssistOutcome;
    /// Reads an MSR for the guest.
    fn rdmsr(&self, vcpu: &mut VcpuFd, index: u32) -> MsrOutcome;
    /// Writes an MSR for the guest.
    fn wrmsr(&self, vcpu: &mut VcpuFd, index: u32, value: u64) -> MsrOutcome;
    /// Takes a write to memory that is not RAM; false if it is not for the assist.
    fn mmio_write(&self, vcpu: &mut VcpuFd, address: u64, data: &[u8]) -> bool;
}
