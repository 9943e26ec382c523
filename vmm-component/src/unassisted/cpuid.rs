//! CPUID as the instruction emulator can honour it. Pure.
//!
//! What a guest is told does not bind such a host fully: most bits of leaf 1 are the processor's own whatever is set, and at CPL 3
//! CPUID answers natively. Only what is changed here was seen to take effect.

use kvm_bindings::CpuId;

/// Structured extended features: SMAP, SMEP, INVPCID, AVX2 and so on. An entry reads as the host's; a missing one as zero.
const EXTENDED_FEATURES: u32 = 7;

/// Leaf 1 ECX.
const CX16: u32 = 1 << 13;
const PCID: u32 = 1 << 17;
const X2APIC: u32 = 1 << 21;

/// Leaf 0x80000001, ECX and EDX.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
const RDTSCP: u32 = 1 << 27;

/// Leaf 0x80000008 EBX.
const CLZERO: u32 = 1;

/// KVM's feature leaf (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// The clock sources, and "no delay needed after port accesses". Everything else there ends in a hypercall, and VMCALL at CPL 0
/// never returns.
const KVM_FEATURES_KEPT: u32 = KVM_CLOCKSOURCE | KVM_NOP_IO_DELAY | KVM_CLOCKSOURCE2 | KVM_CLOCKSOURCE_STABLE;
const KVM_CLOCKSOURCE: u32 = 1;
const KVM_NOP_IO_DELAY: u32 = 1 << 1;
const KVM_CLOCKSOURCE2: u32 = 1 << 3;
const KVM_CLOCKSOURCE_STABLE: u32 = 1 << 24;

/// Takes out of a vCPU's CPUID what its kernel would use and KVM's emulator does not have.
///
/// The last step before KVM_SET_CPUID2: whatever else makes up the table comes first.
pub fn adjust_cpuid(cpuid: &mut CpuId) {
    cpuid.retain(|entry| entry.function != EXTENDED_FEATURES);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !(CX16 | PCID | X2APIC),
            0x8000_0001 => {
                entry.ecx &= !(TOPOLOGY_EXTENSIONS | PERFCTR_CORE | PERFCTR_NB);
                entry.edx &= !RDTSCP;
            }
            0x8000_0008 => entry.ebx &= !CLZERO,
            KVM_FEATURES => {
                entry.eax &= KVM_FEATURES_KEPT;
                entry.edx = 0;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn full(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn what_the_emulator_lacks_is_gone_and_the_rest_stays() {
        let entries = [
            full(0, 0),
            full(1, 0),
            full(7, 0),
            full(7, 1),
            full(0xb, 0),
            full(0xd, 0),
            full(0xd, 1),
            full(0xd, 9),
            full(0x4000_0001, 0),
            full(0x8000_0001, 0),
            full(0x8000_0008, 0),
        ];
        let mut cpuid = CpuId::from_entries(&entries).unwrap();
        adjust_cpuid(&mut cpuid);
        let leaves: Vec<u32> = cpuid.as_slice().iter().map(|entry| entry.function).collect();
        assert_eq!(
            leaves,
            [0, 1, 0xb, 0xd, 0xd, 0xd, 0x4000_0001, 0x8000_0001, 0x8000_0008]
        );
        let leaf = |function| *cpuid.as_slice().iter().find(|e| e.function == function).unwrap();
        assert_eq!(leaf(0), full(0, 0));
        assert_eq!(leaf(1).ecx, !(CX16 | PCID | X2APIC));
        assert_eq!(leaf(1).edx, u32::MAX);
        assert_eq!(leaf(0x4000_0001).eax, 0x0100_000b);
        assert_eq!(leaf(0x4000_0001).edx, 0);
        assert_eq!(leaf(0x8000_0001).ecx, !0x01c0_0000);
        assert_eq!(leaf(0x8000_0001).edx, !0x0800_0000);
        assert_eq!(leaf(0x8000_0008).ebx, !1);
    }

    #[test]
    fn an_adjusted_table_stays_as_it_is() {
        let mut once = CpuId::from_entries(&[full(1, 0), full(7, 0), full(0x4000_0001, 0)]).unwrap();
        adjust_cpuid(&mut once);
        let mut twice = once.clone();
        adjust_cpuid(&mut twice);
        assert_eq!(once.as_slice(), twice.as_slice());
    }
}
