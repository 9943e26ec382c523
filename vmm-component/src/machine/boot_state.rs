//! What a vCPU's registers hold before its first instruction: those that don't depend on the kernel that is booted.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::boot::{self, BootEntry};

/// Sets the registers of the vCPU that starts first.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: &BootEntry) -> Result<(), errno::Error> {
    let (mut sregs, mut regs) = (vcpu.get_sregs()?, vcpu.get_regs()?);
    boot::apply(entry, &mut sregs, &mut regs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}

/// IA32_MISC_ENABLE and its bit for fast string operations, which firmware sets (Intel SDM volume 4, table 2-2).
const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs on (bit 11), no fixed ranges, everything write-back (6) (Intel SDM volume 3, section 13.11.2.1).
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Local vector table entries of a local APIC (Intel SDM volume 3, table 12-1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVERY_MASK: u32 = 7 << 8;
const MASKED: u32 = 1 << 16;

/// Sets the MSRs that firmware would have set.
pub(super) fn set_msrs(vcpu: &VcpuFd) -> Result<(), String> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let wanted = [
        entry(IA32_MISC_ENABLE, FAST_STRINGS),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
    ];
    let list = Msrs::from_entries(&wanted).map_err(|e| format!("list its MSRs: {e:?}"))?;
    let done = vcpu.set_msrs(&list).map_err(|e| format!("set its MSRs: {e}"))?;
    match wanted.get(done) {
        Some(refused) => Err(format!("set its MSR {:#x}: refused", refused.index)),
        None => Ok(()),
    }
}

/// Connects the local interrupt pins as firmware leaves them: LINT0 to the legacy controller, of which there is none, so it is masked; LINT1 to
/// the NMI line.
pub(super) fn connect_local_pins(lapic: &mut kvm_lapic_state) {
    let lint0 = register(lapic, LVT_LINT0);
    set_register(lapic, LVT_LINT0, lint0 & !DELIVERY_MASK | DELIVER_EXTINT | MASKED);
    let lint1 = register(lapic, LVT_LINT1);
    set_register(lapic, LVT_LINT1, lint1 & !(DELIVERY_MASK | MASKED) | DELIVER_NMI);
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[offset + i] as u8))
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + i] = byte as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_pins_are_connected_whatever_they_were() {
        for before in [0, u32::MAX] {
            let mut lapic = kvm_lapic_state::default();
            set_register(&mut lapic, LVT_LINT0, before);
            set_register(&mut lapic, LVT_LINT1, before);
            connect_local_pins(&mut lapic);
            assert_eq!(
                register(&lapic, LVT_LINT0) & (DELIVERY_MASK | MASKED),
                DELIVER_EXTINT | MASKED
            );
            assert_eq!(register(&lapic, LVT_LINT1) & (DELIVERY_MASK | MASKED), DELIVER_NMI);
        }
    }
}
