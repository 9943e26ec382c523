//! The effects: what KVM's exits on such a host lead to. What is to be done is decided by the other modules.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_INTERNAL_ERROR_EMULATION, KVM_MSR_EXIT_REASON_FILTER, Msrs, kvm_enable_cap,
    kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::errno;

use super::decode::{MAX_LENGTH, decode};
use super::emulate::{Cpu, Exception, Outcome, execute, uses_xstate};
use super::paging::{AddressSpace, is_canonical};
use super::syscall_entry::{self, SyscallMsrs};
use super::xstate::{self, Kept, XState};

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;

const VECTOR_BREAKPOINT: u8 = 3;
const VECTOR_GENERAL_PROTECTION: u8 = 13;
const VECTOR_PAGE_FAULT: u8 = 14;

/// Why a machine can't be helped.
#[derive(Debug, thiserror::Error)]
pub enum AssistError {
    /// KVM_CAP_X86_USER_SPACE_MSR (Linux 5.10).
    #[error("let KVM hand over accesses to MSRs, which system calls need on this host: {0}")]
    UserSpaceMsr(errno::Error),
    /// KVM_X86_SET_MSR_FILTER.
    #[error("choose the MSRs that KVM hands over, which system calls need on this host: {0}")]
    MsrFilter(errno::Error),
}

/// One machine's help on a host without hardware virtualization, shared by its vCPUs.
///
/// Each method is called on the thread of the vCPU that it is given, after the exit that it is named for. What vCPUs share is behind
/// locks that are held for a look at a small map.
#[derive(Debug)]
pub struct Assist {
    ram: GuestMemoryMmap,
    /// By the vCPU's file descriptor, which stays what it is while the machine lives.
    msrs: Mutex<BTreeMap<RawFd, SyscallMsrs>>,
    kept: Mutex<Kept>,
}

impl Assist {
    /// Prepares `vm`, before it has run: its guests' writes to the MSRs that steer SYSCALL, and their reads of LSTAR, come to
    /// [`wrmsr`](Self::wrmsr) and [`rdmsr`](Self::rdmsr) from now on. This is the machine's only MSR filter.
    ///
    /// # Errors
    ///
    /// The two things that it asks of KVM.
    pub fn new(vm: &VmFd, ram: GuestMemoryMmap) -> Result<Arc<Self>, AssistError> {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            tracing::debug!(
                "this host has no hardware virtualization: guests' kernels run in an instruction emulator, slowly"
            );
        });
        let mut capability = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        capability.args[0] = u64::from(KVM_MSR_EXIT_REASON_FILTER);
        vm.enable_cap(&capability).map_err(AssistError::UserSpaceMsr)?;
        // A cleared bit hands the access over. Four MSRs from STAR on; the third is CSTAR.
        let ranges = [
            MsrFilterRange {
                flags: MsrFilterRangeFlags::WRITE,
                base: MSR_STAR,
                msr_count: 4,
                bitmap: &[0b0100],
            },
            MsrFilterRange {
                flags: MsrFilterRangeFlags::READ,
                base: MSR_LSTAR,
                msr_count: 1,
                bitmap: &[0],
            },
        ];
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(AssistError::MsrFilter)?;
        Ok(Arc::new(Self {
            ram,
            msrs: Mutex::default(),
            kept: Mutex::default(),
        }))
    }

    /// Carries out the instruction at which KVM_EXIT_INTERNAL_ERROR stopped `vcpu`.
    ///
    /// # Errors
    ///
    /// Why it can't be; the vCPU can't go on then.
    pub fn internal_error(&self, vcpu: &mut VcpuFd) -> Result<(), String> {
        // SAFETY: the kernel fills in this member of the union for the exit that the caller handles, and any bits are valid in it.
        let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        if suberror != KVM_INTERNAL_ERROR_EMULATION {
            return Err(format!("KVM gave up with internal error {suberror}"));
        }
        let ioctl = |step: &'static str| move |e: errno::Error| format!("{step}: {e}");
        let mut cpu = Cpu {
            regs: vcpu.get_regs().map_err(ioctl("read its registers"))?,
            xstate: XState::default(),
        };
        let mut sregs = vcpu.get_sregs().map_err(ioctl("read its system registers"))?;
        let rip = cpu.regs.rip;
        if sregs.ss.dpl != 0 || sregs.cs.l != 1 {
            return Err(format!(
                "KVM can't emulate the instruction at RIP {rip:#x}, which is not 64-bit code at CPL 0"
            ));
        }
        let space = AddressSpace::new(&self.ram, &sregs)
            .ok_or_else(|| format!("KVM can't emulate the instruction at RIP {rip:#x}, outside 4-level paging"))?;
        let mut buffer = [0; MAX_LENGTH];
        let len = space.fetch(rip, &mut buffer).map_err(|fault| {
            format!("KVM can't emulate the instruction at RIP {rip:#x}, nor can it be read: {fault}")
        })?;
        let bytes = &buffer[..len];
        let instruction = decode(bytes)
            .ok_or_else(|| format!("KVM can't emulate the instruction at RIP {rip:#x}, bytes {bytes:02x?}"))?;
        tracing::debug!(operation = ?instruction.operation, rip, "instruction carried out for KVM");
        let (reads_xstate, changes_xstate) = uses_xstate(&instruction);
        let mut xsave = if reads_xstate { Some(get_xsave(vcpu)?) } else { None };
        if let Some(xsave) = &xsave {
            cpu.xstate = XState::from_words(&xsave.region);
        }
        let outcome = execute(&instruction, &mut cpu, &sregs, &space, &mut lock(&self.kept));
        let exception = match outcome {
            Outcome::Done => None,
            Outcome::Exception(exception) => Some(exception),
            Outcome::Outside { physical } => {
                return Err(format!(
                    "the instruction at RIP {rip:#x}, bytes {bytes:02x?}, works on address {physical:#x}, which is not memory"
                ));
            }
        };
        if changes_xstate && let Some(xsave) = &mut xsave {
            xsave.region = cpu.xstate.to_words();
            // SAFETY: this process enables no dynamically sized components, so the area that KVM reads is `kvm_xsave`'s 4096 bytes.
            unsafe { vcpu.set_xsave(xsave) }.map_err(ioctl("set its floating-point state"))?;
        }
        // This also takes back the #UD that KVM has queued for the instruction, so it goes before any exception of ours.
        vcpu.set_regs(&cpu.regs).map_err(ioctl("set its registers"))?;
        if let Some(exception) = exception {
            let (vector, code) = match exception {
                Exception::Breakpoint => (VECTOR_BREAKPOINT, None),
                Exception::GeneralProtection => (VECTOR_GENERAL_PROTECTION, Some(0)),
                Exception::Page { address, code } => {
                    sregs.cr2 = address;
                    vcpu.set_sregs(&sregs).map_err(ioctl("set its system registers"))?;
                    (VECTOR_PAGE_FAULT, Some(code))
                }
            };
            let mut events = vcpu.get_vcpu_events().map_err(ioctl("read its pending events"))?;
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = u8::from(code.is_some());
            events.exception.error_code = code.unwrap_or(0);
            vcpu.set_vcpu_events(&events).map_err(ioctl("give it an exception"))?;
        }
        Ok(())
    }

    /// Takes the guest's write to an MSR. False, and the guest gets a general protection fault, if the value is none for it, or
    /// the MSR is none of those that are handed over.
    pub fn wrmsr(&self, vcpu: &VcpuFd, index: u32, data: u64) -> bool {
        let mut msrs = self.msrs_of(vcpu);
        let host_value = match index {
            MSR_STAR => {
                msrs.star = data;
                data
            }
            MSR_FMASK => {
                msrs.fmask = data;
                data
            }
            MSR_LSTAR if is_canonical(data) => {
                msrs.lstar = data;
                msrs.trampoline = match self.install_trampoline(vcpu) {
                    Ok(trampoline) => Some(trampoline),
                    Err(reason) => {
                        tracing::warn!(reason, "the guest's 64-bit system calls will not work");
                        None
                    }
                };
                msrs.trampoline.unwrap_or(data)
            }
            _ => return false,
        };
        if !set_msr(vcpu, index, host_value) {
            return false;
        }
        lock(&self.msrs).insert(vcpu.as_raw_fd(), msrs);
        true
    }

    /// The value of an MSR as the guest wrote it, if it is one of those that are handed over.
    pub fn rdmsr(&self, vcpu: &VcpuFd, index: u32) -> Option<u64> {
        let msrs = self.msrs_of(vcpu);
        match index {
            MSR_STAR => Some(msrs.star),
            MSR_LSTAR => Some(msrs.lstar),
            MSR_FMASK => Some(msrs.fmask),
            _ => None,
        }
    }

    /// Takes a write to memory that is not RAM; false if it is a device's.
    pub fn mmio_write(&self, vcpu: &VcpuFd, address: u64, _data: &[u8]) -> bool {
        if !syscall_entry::is_doorbell(address) {
            return false;
        }
        // If any of this fails, or is refused, the guest's process meets the trampoline's next instruction, which is invalid.
        if let (Ok(mut regs), Ok(mut sregs)) = (vcpu.get_regs(), vcpu.get_sregs())
            && syscall_entry::enter_kernel(&self.msrs_of(vcpu), &mut regs, &mut sregs)
        {
            // In this order: with the system registers alone, user code would run at CPL 0.
            let entered = vcpu.set_regs(&regs).and_then(|()| vcpu.set_sregs(&sregs));
            if let Err(error) = entered {
                tracing::warn!(%error, "a system call of the guest's failed");
            }
        }
        true
    }

    fn install_trampoline(&self, vcpu: &VcpuFd) -> Result<u64, String> {
        let sregs = vcpu
            .get_sregs()
            .map_err(|e| format!("read the vCPU's system registers: {e}"))?;
        let space = AddressSpace::new(&self.ram, &sregs).ok_or("the vCPU is not in 64-bit mode with 4-level paging")?;
        syscall_entry::install(&space).map_err(|e| e.to_string())
    }

    fn msrs_of(&self, vcpu: &VcpuFd) -> SyscallMsrs {
        lock(&self.msrs).get(&vcpu.as_raw_fd()).copied().unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The vCPU's extended state, if it is of the kind that is handled here.
fn get_xsave(vcpu: &VcpuFd) -> Result<kvm_xsave, String> {
    let xcrs = vcpu.get_xcrs().map_err(|e| format!("read its XCR0: {e}"))?;
    let enabled = xcrs
        .xcrs
        .iter()
        .take(xcrs.nr_xcrs as usize)
        .find(|xcr| xcr.xcr == 0)
        .map_or(0, |xcr| xcr.value);
    if enabled & !xstate::COMPONENTS != 0 {
        return Err(format!(
            "its guest enabled state components {enabled:#x} in XCR0; on this host only {:#x} can be kept",
            xstate::COMPONENTS
        ));
    }
    vcpu.get_xsave()
        .map_err(|e| format!("read its floating-point state: {e}"))
}

/// Sets an MSR as the host may, past the filter.
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).is_ok_and(|msrs| vcpu.set_msrs(&msrs) == Ok(1))
}
