//! System calls where SYSCALL does not enter CPL 0.
//!
//! On a host without hardware virtualization, SYSCALL at CPL 3 does all that it should (RCX, R11, flags, RIP from LSTAR) but leave
//! CPL 3. So the LSTAR that the processor sees points to a trampoline, which user code can execute, and which tells us:
//!
//! ```text
//!   user                     trampoline (CPL 3)                   here                      kernel
//!   SYSCALL ───────────────▶ movb $1, doorbell(%rip) ── MMIO ──▶ plausible? ── yes ──────▶ LSTAR as the kernel wrote it, CPL 0
//!                            ud2 ◀──────────────────────────────── no
//! ```
//!
//! The trampoline needs one entry of the top-level page table, in the kernel's half. Kernels copy that half into each new process,
//! so the entry is put into the table that is in use when a vCPU's LSTAR is written, which is before the first process. The tables
//! below it and the code are in guest memory that the memory map leaves out.
//!
//! User code can jump to the trampoline instead of executing SYSCALL. It gains nothing: what SYSCALL would never leave behind in RCX
//! and R11 is refused, and then `ud2` ends the process as any wrong instruction does.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::paging::{
    ACCESSED, ADDRESS, AddressSpace, CACHE_DISABLE, DIRTY, NO_EXECUTE, PAGE, PRESENT, USER, WRITABLE, is_canonical,
};
use crate::layout;

/// Slots of the top-level table that may hold the trampoline, the first choice first: fffffc0000000000-fffffdffffffffff, which Linux
/// leaves unused (Documentation/x86/x86_64/mm.rst).
const SLOTS: [u64; 4] = [507, 506, 505, 504];

/// `movb $1, DOORBELL_PAGE - 7(%rip)`: the page after the code's, at its start.
const MOVB: [u8; 7] = [0xc6, 0x05, 0xf9, 0x0f, 0x00, 0x00, 0x01];
/// Reached only if we did not switch to the kernel.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// The trampoline's pages in guest memory, one after another.
const PDPT: u64 = layout::SYSCALL_TRAMPOLINE;
const DIRECTORY: u64 = PDPT + PAGE;
const TABLE: u64 = DIRECTORY + PAGE;
const CODE: u64 = TABLE + PAGE;
const END: u64 = CODE + PAGE;
const _: () = assert!(END - PDPT == layout::SYSCALL_TRAMPOLINE_SIZE);

const FLAG_FIXED: u64 = 1 << 1;
const FLAG_INTERRUPT: u64 = 1 << 9;
const FLAG_IO_PRIVILEGE: u64 = 3 << 12;
const FLAG_RESUME: u64 = 1 << 16;
const FLAG_VIRTUAL_8086: u64 = 1 << 17;
const FLAG_VIRTUAL_INTERRUPT: u64 = 3 << 19;

const EFER_SYSCALL_ENABLE: u64 = 1;

/// The MSRs that say what SYSCALL does, of one vCPU, as its guest wrote them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SyscallMsrs {
    /// Bits 32-47: the selector of CS; SS is the next.
    pub(super) star: u64,
    /// Where 64-bit code enters the kernel.
    pub(super) lstar: u64,
    /// Flags to clear.
    pub(super) fmask: u64,
    /// The LSTAR that the processor has: the trampoline, once it is installed.
    pub(super) trampoline: Option<u64>,
}

/// Why there can be no trampoline in a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InstallError {
    /// All of [`SLOTS`] are in use.
    #[error("the guest's page table at {root:#x} uses all slots that could hold the system-call trampoline")]
    Occupied { root: u64 },
    /// The table or the trampoline's own pages are not in guest memory.
    #[error("there is no guest memory at {physical:#x}, where the system-call trampoline needs it")]
    Outside { physical: u64 },
}

/// Puts the trampoline into the page table in use, unless it is there, and returns its linear address.
pub(super) fn install(space: &AddressSpace<'_>) -> Result<u64, InstallError> {
    let memory = space.memory();
    let outside = |physical| move |_| InstallError::Outside { physical };
    let up = PRESENT | WRITABLE | USER | ACCESSED;
    let no_execute = if space.no_execute() { NO_EXECUTE } else { 0 };
    // The guest can write these pages, and a kernel that starts another one may have: each installation makes them anew.
    for (page, entries) in [
        (PDPT, [DIRECTORY | up, 0]),
        (DIRECTORY, [TABLE | up, 0]),
        (
            TABLE,
            [
                CODE | PRESENT | USER | ACCESSED | DIRTY,
                layout::SYSCALL_DOORBELL | up | DIRTY | CACHE_DISABLE | no_execute,
            ],
        ),
    ] {
        let mut bytes = [0; PAGE as usize];
        for (slot, entry) in bytes.chunks_exact_mut(8).zip(entries) {
            slot.copy_from_slice(&entry.to_le_bytes());
        }
        memory.write_slice(&bytes, GuestAddress(page)).map_err(outside(page))?;
    }
    let code = [&MOVB[..], &UD2].concat();
    memory.write_slice(&code, GuestAddress(CODE)).map_err(outside(CODE))?;
    for slot in SLOTS {
        let physical = space.root() + slot * 8;
        let entry: u64 = memory
            .load(GuestAddress(physical), std::sync::atomic::Ordering::Acquire)
            .map_err(outside(physical))?;
        let ours = entry & (ADDRESS | PRESENT) == PDPT | PRESENT;
        if entry & PRESENT == 0 {
            // In one store, after what it points to: another vCPU may use the table at this moment.
            memory
                .store(PDPT | up, GuestAddress(physical), std::sync::atomic::Ordering::Release)
                .map_err(outside(physical))?;
        } else if !ours {
            continue;
        }
        return Ok((slot << 39) | 0xffff_0000_0000_0000);
    }
    Err(InstallError::Occupied { root: space.root() })
}

/// Whether a memory access at this physical address is the trampoline's.
pub(super) fn is_doorbell(address: u64) -> bool {
    address == layout::SYSCALL_DOORBELL
}

/// Finishes the SYSCALL of a vCPU whose trampoline has rung: changes its registers to those at the kernel's entry. False, with
/// nothing changed, if SYSCALL can't have led to this state.
pub(super) fn enter_kernel(msrs: &SyscallMsrs, regs: &mut kvm_regs, sregs: &mut kvm_sregs) -> bool {
    let after_movb = |trampoline: u64| trampoline.wrapping_add(MOVB.len() as u64);
    let user_flags = FLAG_INTERRUPT | FLAG_FIXED;
    let privileged_flags = FLAG_IO_PRIVILEGE | FLAG_VIRTUAL_8086 | FLAG_VIRTUAL_INTERRUPT;
    let plausible = msrs.trampoline.map(after_movb) == Some(regs.rip)
        && sregs.ss.dpl == 3
        && sregs.cs.l == 1
        && sregs.efer & EFER_SYSCALL_ENABLE != 0
        && is_canonical(regs.rcx)
        && regs.r11 & user_flags == user_flags
        && regs.r11 & privileged_flags == 0;
    if !plausible {
        return false;
    }
    let cs = (msrs.star >> 32) as u16 & 0xfffc;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: cs,
        type_: 0xb,
        l: 1,
        ..flat
    };
    sregs.ss = kvm_segment {
        selector: cs.wrapping_add(8),
        type_: 3,
        db: 1,
        ..flat
    };
    regs.rip = msrs.lstar;
    regs.rflags = regs.rflags & !(msrs.fmask | FLAG_RESUME) | FLAG_FIXED;
    true
}

#[cfg(test)]
mod tests;
