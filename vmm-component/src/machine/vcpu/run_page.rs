//! The page (with its data pages) that KVM shares with a vCPU's thread: why KVM_RUN returned, and the data of the access that it stands for.
//!
//! It is a mapping of our own rather than the one inside `VcpuFd`, for two reasons: a kicker on another thread needs one byte of it, which an
//! exclusive borrow of the whole would forbid, and the slices it hands out are checked against the mapping's real size.

use std::ffi::c_int;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO, kvm_run,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl;

use crate::machine::stats::ExitReason;

vmm_sys_util::ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);

/// The mapping, shared between a vCPU's thread and whoever may kick it.
#[derive(Debug)]
pub(in crate::machine) struct RunMapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: through a shared `RunMapping` only `immediate_exit` can be reached, and that as an atomic. Everything else goes through `RunPage`,
// of which there is one a mapping.
unsafe impl Send for RunMapping {}
// SAFETY: see above.
unsafe impl Sync for RunMapping {}

impl RunMapping {
    /// The byte that makes the next KVM_RUN return at once with EINTR while it isn't zero.
    pub(in crate::machine) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping is at least as large as `kvm_run` (checked in `RunPage::map`) and lives as long as `self`; nothing in this program
        // reads or writes this byte but through this reference, and an AtomicU8 has no alignment to keep.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Drop for RunMapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `RunPage::map`, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// Why KVM_RUN returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::machine) enum Exit {
    /// Access to a port; the data is got with [`RunPage::io_data`].
    Io(PortAccess),
    /// Access to memory that is not RAM; the data is got with [`RunPage::mmio_data`].
    Mmio { write: bool, address: u64, len: usize },
    /// The guest acknowledged this level-triggered vector.
    IoapicEoi(u8),
    /// The guest reads an MSR that was filtered, or that KVM does not know.
    ReadMsr(u32),
    /// The guest writes an MSR that was filtered, or that KVM does not know.
    WriteMsr { index: u32, value: u64 },
    /// `hlt` without a local APIC in the kernel.
    Halt,
    /// A triple fault.
    TripleFault,
    /// The guest asked KVM itself for a shutdown.
    SystemShutdown,
    /// The guest asked KVM itself for a reset.
    SystemReset,
    /// KVM can't go on: its suberror (KVM_INTERNAL_ERROR_*).
    InternalError(u32),
    /// The processor refused to enter the guest: its reason.
    FailEntry(u64),
    /// KVM could not reach the guest memory at this address.
    MemoryFault { address: u64, size: u64 },
    /// A signal, or a window that nobody asked for: run again.
    Again,
    /// A reason that this program does not know.
    Unknown(u32),
}

impl Exit {
    /// As what it is counted.
    pub(in crate::machine) fn reason(self) -> ExitReason {
        match self {
            Self::Io(_) => ExitReason::Pio,
            Self::Mmio { .. } => ExitReason::Mmio,
            Self::IoapicEoi(_) => ExitReason::IoapicEoi,
            Self::ReadMsr(_) => ExitReason::ReadMsr,
            Self::WriteMsr { .. } => ExitReason::WriteMsr,
            Self::Halt => ExitReason::Halt,
            Self::TripleFault => ExitReason::TripleFault,
            Self::SystemShutdown | Self::SystemReset => ExitReason::SystemEvent,
            Self::InternalError(_) => ExitReason::Assist,
            Self::FailEntry(_) => ExitReason::FailEntry,
            Self::MemoryFault { .. } => ExitReason::MemoryFault,
            Self::Again | Self::Unknown(_) => ExitReason::Other,
        }
    }
}

/// One port access, perhaps of a string instruction; every slice it names lies inside the mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::machine) struct PortAccess {
    /// Whether the guest writes.
    pub(in crate::machine) write: bool,
    /// The port.
    pub(in crate::machine) port: u16,
    /// Bytes of each element: 1, 2 or 4.
    pub(in crate::machine) width: usize,
    start: usize,
    len: usize,
}

/// The exclusive side of a [`RunMapping`]: the vCPU thread's.
#[derive(Debug)]
pub(in crate::machine) struct RunPage {
    mapping: Arc<RunMapping>,
}

impl RunPage {
    /// Maps `vcpu`'s page. `size` is KVM_GET_VCPU_MMAP_SIZE.
    pub(in crate::machine) fn map(vcpu: &VcpuFd, size: usize) -> Result<Self, errno::Error> {
        if size < size_of::<kvm_run>() {
            return Err(errno::Error::new(libc::EINVAL));
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(errno::Error::last());
        }
        let start = NonNull::new(start.cast()).ok_or(errno::Error::new(libc::ENOMEM))?;
        Ok(Self {
            mapping: Arc::new(RunMapping { start, size }),
        })
    }

    /// The part that a kicker may hold.
    pub(in crate::machine) fn mapping(&self) -> &Arc<RunMapping> {
        &self.mapping
    }

    /// Runs the guest until it needs us. EINTR is a kick, EAGAIN a vCPU that has not been started yet.
    pub(in crate::machine) fn run(&mut self, vcpu: &VcpuFd) -> Result<Exit, errno::Error> {
        // SAFETY: KVM_RUN on a vCPU's fd takes no argument; it writes the shared pages, to which nobody holds a reference now.
        let result: c_int = unsafe { ioctl(vcpu, KVM_RUN()) };
        if result == 0 {
            return Ok(self.exit());
        }
        let error = errno::Error::last();
        // KVM_EXIT_MEMORY_FAULT is the one reason that comes with an error.
        let faulted = matches!(error.errno(), libc::EFAULT | libc::EHWPOISON);
        match self.exit() {
            fault @ Exit::MemoryFault { .. } if faulted => Ok(fault),
            _ => Err(error),
        }
    }

    /// Pointer to the shared structure.
    fn kvm_run(&self) -> *mut kvm_run {
        self.mapping.start.as_ptr().cast()
    }

    fn exit(&self) -> Exit {
        let run = self.kvm_run();
        // SAFETY: `run` points to a mapped `kvm_run`, page-aligned; the kernel writes it only inside KVM_RUN, which this thread isn't in. Which
        // member of the union is valid follows from the reason, and any bits are valid for each of them.
        unsafe {
            let detail = &raw const (*run).__bindgen_anon_1;
            match (*run).exit_reason {
                KVM_EXIT_IO => {
                    let io = (*detail).io;
                    match PortAccess::checked(
                        u32::from(io.direction) == KVM_EXIT_IO_OUT,
                        io.port,
                        io.size,
                        io.count,
                        io.data_offset,
                        self.mapping.size,
                    ) {
                        Some(access) => Exit::Io(access),
                        None => Exit::Unknown(KVM_EXIT_IO),
                    }
                }
                KVM_EXIT_MMIO => {
                    let mmio = (*detail).mmio;
                    Exit::Mmio {
                        write: mmio.is_write != 0,
                        address: mmio.phys_addr,
                        len: (mmio.len as usize).min(mmio.data.len()),
                    }
                }
                KVM_EXIT_IOAPIC_EOI => Exit::IoapicEoi((*detail).eoi.vector),
                KVM_EXIT_X86_RDMSR => Exit::ReadMsr((*detail).msr.index),
                KVM_EXIT_X86_WRMSR => {
                    let msr = (*detail).msr;
                    Exit::WriteMsr {
                        index: msr.index,
                        value: msr.data,
                    }
                }
                KVM_EXIT_HLT => Exit::Halt,
                KVM_EXIT_SHUTDOWN => Exit::TripleFault,
                KVM_EXIT_SYSTEM_EVENT => match (*detail).system_event.type_ {
                    KVM_SYSTEM_EVENT_SHUTDOWN => Exit::SystemShutdown,
                    KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => Exit::SystemReset,
                    _ => Exit::Unknown(KVM_EXIT_SYSTEM_EVENT),
                },
                KVM_EXIT_INTERNAL_ERROR => Exit::InternalError((*detail).internal.suberror),
                KVM_EXIT_FAIL_ENTRY => Exit::FailEntry((*detail).fail_entry.hardware_entry_failure_reason),
                KVM_EXIT_MEMORY_FAULT => {
                    let fault = (*detail).memory_fault;
                    Exit::MemoryFault {
                        address: fault.gpa,
                        size: fault.size,
                    }
                }
                KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Again,
                reason => Exit::Unknown(reason),
            }
        }
    }

    /// The data of a port access that the last [`run`](Self::run) returned: as many elements of `width` bytes as the instruction asked for.
    pub(in crate::machine) fn io_data(&mut self, access: &PortAccess) -> &mut [u8] {
        // SAFETY: `PortAccess::checked` made sure that the range lies inside the mapping and past `kvm_run`, so the slice overlaps neither
        // `immediate_exit` nor anything else that is referenced; it borrows `self` exclusively, so KVM_RUN can't be entered while it lives.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.as_ptr().add(access.start), access.len) }
    }

    /// The data of a memory-mapped access of `len` bytes (at most 8 are handed out).
    pub(in crate::machine) fn mmio_data(&mut self, len: usize) -> &mut [u8] {
        // SAFETY: `data` is inside the mapped `kvm_run`, and apart from `immediate_exit`; the borrow of `self` is exclusive.
        let data: &mut [u8; 8] = unsafe { &mut (*self.kvm_run()).__bindgen_anon_1.mmio.data };
        let len = len.min(data.len());
        &mut data[..len]
    }

    /// Answers an MSR access: `Some` is what a read returns, `None` makes it fault in the guest.
    pub(in crate::machine) fn answer_msr(&mut self, value: Option<u64>) {
        // SAFETY: `msr` is inside the mapped `kvm_run`, and apart from `immediate_exit`; the borrow of `self` is exclusive.
        let msr = unsafe { &mut (*self.kvm_run()).__bindgen_anon_1.msr };
        match value {
            Some(value) => {
                msr.data = value;
                msr.error = 0;
            }
            None => msr.error = 1,
        }
    }

    /// Whether a kick has come since the last was taken back.
    pub(in crate::machine) fn is_kicked(&self) -> bool {
        self.mapping.immediate_exit().load(Ordering::Relaxed) != 0
    }

    /// Takes back a kick; see [`mailbox`](super::mailbox).
    pub(in crate::machine) fn clear_immediate_exit(&self) {
        self.mapping.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl PortAccess {
    /// A port access whose data lies inside a mapping of `size` bytes, after `kvm_run`; `None` if it does not.
    fn checked(write: bool, port: u16, width: u8, count: u32, offset: u64, size: usize) -> Option<Self> {
        let start = usize::try_from(offset).ok()?;
        let width = usize::from(width);
        let len = usize::try_from(count).ok()?.checked_mul(width)?;
        let fits = start >= size_of::<kvm_run>() && start.checked_add(len)? <= size;
        (matches!(width, 1 | 2 | 4) && fits).then_some(Self {
            write,
            port,
            width,
            start,
            len,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_port_access_never_reaches_past_the_mapping(
            width in any::<u8>(), count in any::<u32>(), offset in any::<u64>(), small in any::<bool>()
        ) {
            let size = 3 * 4096;
            let (count, offset) = if small { (count % 5000, offset % 20_000) } else { (count, offset) };
            if let Some(access) = PortAccess::checked(true, 1, width, count, offset, size) {
                prop_assert!(access.start >= size_of::<kvm_run>());
                prop_assert!(access.start + access.len <= size);
                prop_assert_eq!(access.len, count as usize * usize::from(width));
            }
        }
    }

    #[test]
    fn the_offset_that_kvm_uses_is_accepted() {
        assert!(PortAccess::checked(false, 0x3f8, 4, 1024, 4096, 3 * 4096).is_some());
        assert!(PortAccess::checked(false, 0x3f8, 4, 1024, 4096, 4096).is_none());
    }
}
