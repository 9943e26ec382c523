//! What the processor says of itself to the guest: KVM's supported set, narrowed to what this machine stands for, with the topology of its vCPUs.
//!
//! Pure: one table in, one table a vCPU out. All vCPUs are cores of one package, one thread each; the APIC id is the vCPU's index.
//! Sources: Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E, Linux Documentation/virt/kvm/x86/cpuid.rst and api.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Local APIC bus frequency that KVM emulates, in kHz (APIC_BUS_CYCLE_NS = 1).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Leaves about things that the guest doesn't get, so they read as zero: MONITOR/MWAIT (5), performance counters (0xa, 0x80000022),
/// resource control (0xf, 0x10), SGX (0x12), processor trace (0x14), LBR (0x1c), nested SVM (0x8000000a), memory encryption (0x8000001f), and
/// the AMD topology leaf 0x80000026, which the older ones stand for.
const HIDDEN: [u32; 11] = [
    0x5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1c,
    0x8000_000a,
    0x8000_001f,
    0x8000_0022,
    0x8000_0026,
];

/// Leaves that this module writes anew.
const REWRITTEN: [u32; 3] = [0xb, 0x1f, KVM_TIMING];

const KVM_SIGNATURE: u32 = 0x4000_0000;
/// Timing leaf that VMware defined and other hypervisors share: kHz of the TSC and of the APIC bus.
const KVM_TIMING: u32 = 0x4000_0010;

mod leaf1 {
    pub(super) const ECX_DTES64: u32 = 1 << 2;
    pub(super) const ECX_MONITOR: u32 = 1 << 3;
    pub(super) const ECX_DS_CPL: u32 = 1 << 4;
    pub(super) const ECX_VMX: u32 = 1 << 5;
    pub(super) const ECX_SMX: u32 = 1 << 6;
    pub(super) const ECX_PDCM: u32 = 1 << 15;
    pub(super) const ECX_TSC_DEADLINE: u32 = 1 << 24;
    /// Mirrors CR4.OSXSAVE; KVM keeps it.
    pub(super) const ECX_OSXSAVE: u32 = 1 << 27;
    pub(super) const ECX_HYPERVISOR: u32 = 1 << 31;
    pub(super) const EDX_DS: u32 = 1 << 21;
    pub(super) const EDX_HTT: u32 = 1 << 28;
}

mod leaf7 {
    pub(super) const EBX_SGX: u32 = 1 << 2;
    pub(super) const EBX_RDT_M: u32 = 1 << 12;
    pub(super) const EBX_RDT_A: u32 = 1 << 15;
    pub(super) const EBX_PROCESSOR_TRACE: u32 = 1 << 25;
    pub(super) const ECX_SGX_LC: u32 = 1 << 30;
    pub(super) const EDX_ARCH_LBR: u32 = 1 << 19;
}

mod amd1 {
    pub(super) const ECX_CMP_LEGACY: u32 = 1 << 1;
    pub(super) const ECX_SVM: u32 = 1 << 2;
    pub(super) const ECX_PERFCTR_CORE: u32 = 1 << 23;
    pub(super) const ECX_PERFCTR_NB: u32 = 1 << 24;
    pub(super) const ECX_MWAITX: u32 = 1 << 29;
}

/// How many bits the guest's physical addresses have: 36, what every 64-bit processor can do, where the host does not say.
pub(super) fn physical_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    let leaf = supported.iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(36, |entry| entry.eax as u8)
}

/// The part of the table that all vCPUs of a machine with `vcpus` of them share. `supported` is KVM_GET_SUPPORTED_CPUID's.
pub(super) fn common(supported: &[kvm_cpuid_entry2], vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let cores = u32::from(vcpus.max(1));
    let max_leaf = supported.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    let mut table: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|e| !HIDDEN.contains(&e.function) && !REWRITTEN.contains(&e.function))
        .copied()
        .collect();
    for e in &mut table {
        narrow(e, cores);
    }
    for function in [0xb, 0x1f] {
        if max_leaf >= function {
            table.extend(topology(function, cores));
        }
    }
    table
}

/// `common` with what tells vCPU number `vcpu` from the others, and the frequency of its TSC in kHz, if that is known.
pub(super) fn for_vcpu(common: &[kvm_cpuid_entry2], vcpu: u8, tsc_khz: Option<u32>) -> Vec<kvm_cpuid_entry2> {
    let id = u32::from(vcpu);
    let mut table = common.to_vec();
    for e in &mut table {
        match e.function {
            1 => e.ebx = e.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => e.edx = id,
            0x8000_001e => {
                e.eax = id;
                // One thread a core (bits 8-15 zero), core number in bits 0-7, one node.
                e.ebx = id;
                e.ecx = 0;
            }
            _ => {}
        }
    }
    if constant_tsc(common) {
        add_timing(&mut table, tsc_khz);
    }
    table
}

/// The table in the form that KVM takes, `None` if it is too long for KVM.
pub(super) fn to_kvm(table: &[kvm_cpuid_entry2]) -> Option<CpuId> {
    CpuId::from_entries(table).ok()
}

/// Whether the TSC runs at one rate in all power states: leaf 0x80000007 EDX, bit 8.
fn constant_tsc(table: &[kvm_cpuid_entry2]) -> bool {
    table.iter().any(|e| e.function == 0x8000_0007 && e.edx & 1 << 8 != 0)
}

fn narrow(e: &mut kvm_cpuid_entry2, cores: u32) {
    // Ids are padded to a power of two, and so are the counts that say how many ids share something.
    let ids = cores.next_power_of_two();
    match e.function {
        1 => {
            e.ecx &= !(leaf1::ECX_DTES64
                | leaf1::ECX_MONITOR
                | leaf1::ECX_DS_CPL
                | leaf1::ECX_VMX
                | leaf1::ECX_SMX
                | leaf1::ECX_PDCM
                | leaf1::ECX_OSXSAVE);
            // KVM offers the deadline timer as a capability of its in-kernel APIC and leaves the bit to us.
            e.ecx |= leaf1::ECX_HYPERVISOR | leaf1::ECX_TSC_DEADLINE;
            e.edx &= !(leaf1::EDX_DS | leaf1::EDX_HTT);
            if cores > 1 {
                e.edx |= leaf1::EDX_HTT;
            }
            e.ebx = e.ebx & 0xff00_ffff | ids << 16;
        }
        // Deterministic caches: Intel in leaf 4, AMD in leaf 0x8000001d. The last level is shared by the package, the others belong to one core.
        4 | 0x8000_001d if e.eax & 0x1f != 0 => {
            let level = e.eax >> 5 & 7;
            let sharing = if level >= 3 { ids - 1 } else { 0 };
            e.eax = e.eax & 0x3fff | sharing << 14;
            if e.function == 4 {
                e.eax |= (ids - 1).min(63) << 26;
            }
        }
        // Of power management, only that the APIC timer never stops.
        6 => {
            e.eax &= 1 << 2;
            (e.ebx, e.ecx, e.edx) = (0, 0, 0);
        }
        7 if e.index == 0 => {
            e.ebx &= !(leaf7::EBX_SGX | leaf7::EBX_RDT_M | leaf7::EBX_RDT_A | leaf7::EBX_PROCESSOR_TRACE);
            e.ecx &= !leaf7::ECX_SGX_LC;
            e.edx &= !leaf7::EDX_ARCH_LBR;
        }
        0x8000_0001 => {
            // Virtualization inside the guest is not offered: it is the host kernel's largest attack surface here.
            e.ecx &= !(amd1::ECX_SVM
                | amd1::ECX_PERFCTR_CORE
                | amd1::ECX_PERFCTR_NB
                | amd1::ECX_MWAITX
                | amd1::ECX_CMP_LEGACY);
            // Only AMD defines the bit: "several cores, no hyper-threading". Intel reads it as reserved; setting HTT alone serves there.
            if cores > 1 && e.ecx & TOPOLOGY_EXTENSIONS != 0 {
                e.ecx |= amd1::ECX_CMP_LEGACY;
            }
        }
        // Number of cores less one, and the bits of an APIC id that number cores.
        0x8000_0008 => e.ecx = (cores - 1) | ids.trailing_zeros() << 12,
        _ => {}
    }
}

/// 0x80000001 ECX, AMD only: leaves 0x8000001d and 0x8000001e are there.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Extended topology: level 0 threads of a core, level 1 cores of the package, and the end. EDX, the APIC id, is the vCPU's.
fn topology(function: u32, cores: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let level = |index: u32, eax, ebx, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        ..Default::default()
    };
    [
        level(0, 0, 1, THREADS),
        level(1, cores.next_power_of_two().trailing_zeros(), cores, CORES),
        level(2, 0, 0, 0),
    ]
}

/// Tells the TSC's frequency, so that a guest without a PIT needs no calibration, if KVM's signature leaf is there to announce it.
fn add_timing(table: &mut Vec<kvm_cpuid_entry2>, tsc_khz: Option<u32>) {
    let Some(tsc_khz) = tsc_khz.filter(|khz| *khz != 0) else {
        return;
    };
    let Some(signature) = table.iter_mut().find(|e| e.function == KVM_SIGNATURE) else {
        return;
    };
    signature.eax = signature.eax.max(KVM_TIMING);
    table.push(kvm_cpuid_entry2 {
        function: KVM_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
}

#[cfg(test)]
mod tests;
