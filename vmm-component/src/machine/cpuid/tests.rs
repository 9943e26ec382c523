//! Properties of the tables for every number of vCPUs, on made-up hosts and, where there is one, on this host's.

use proptest::prelude::*;

use super::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// A host that offers everything that a leaf could hold.
fn generous() -> Vec<kvm_cpuid_entry2> {
    let all = [u32::MAX; 4];
    let mut table = vec![entry(0, 0, [0x1f, 1, 2, 3])];
    for function in (1..0x20).chain(0x8000_0001..0x8000_0027) {
        table.push(entry(function, 0, all));
    }
    for (index, level) in [(0u32, 1u32), (1, 1), (2, 2), (3, 3)] {
        table.push(entry(4, index, [level << 5 | 1, 0, 0, 0]));
        table.push(entry(0x8000_001d, index, [level << 5 | 1, 0, 0, 0]));
    }
    table.push(entry(KVM_SIGNATURE, 0, [0x4000_0001, 1, 2, 3]));
    table
}

fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> &kvm_cpuid_entry2 {
    table
        .iter()
        .find(|e| e.function == function && e.index == index)
        .unwrap()
}

proptest! {
    #[test]
    fn topology_is_consistent_for_every_size(vcpus in 1u8..=64, tsc_khz in proptest::option::of(1u32..10_000_000)) {
        let common = common(&generous(), vcpus);
        let mut ids = std::collections::HashSet::new();
        for vcpu in 0..vcpus {
            let table = for_vcpu(&common, vcpu, tsc_khz);
            let one = find(&table, 1, 0);
            let id = one.ebx >> 24;
            prop_assert!(ids.insert(id));
            prop_assert_eq!(id, u32::from(vcpu));
            prop_assert_eq!(find(&table, 0xb, 0).edx, id);
            prop_assert_eq!(find(&table, 0xb, 1).edx, id);
            prop_assert_eq!(find(&table, 0x1f, 1).edx, id);
            prop_assert_eq!(find(&table, 0x8000_001e, 0).eax, id);
            // Every id fits the width that the leaves give, in one package.
            let shift = find(&table, 0xb, 1).eax;
            prop_assert_eq!(id >> shift, 0);
            prop_assert_eq!(find(&table, 0xb, 1).ebx, u32::from(vcpus));
            prop_assert_eq!(find(&table, 0xb, 0).eax, 0);
            prop_assert_eq!(find(&table, 0xb, 2).ebx, 0);
            let eight = find(&table, 0x8000_0008, 0).ecx;
            prop_assert_eq!(eight & 0xff, u32::from(vcpus) - 1);
            prop_assert_eq!(eight >> 12 & 0xf, shift);
            prop_assert_eq!(one.ebx >> 16 & 0xff, 1 << shift);
            prop_assert_eq!(one.edx & leaf1::EDX_HTT != 0, vcpus > 1);
        }
        // What a last-level cache is shared by covers the package; a first-level cache belongs to one core.
        for function in [4, 0x8000_001d] {
            prop_assert_eq!(find(&common, function, 3).eax >> 14 & 0xfff, u32::from(vcpus).next_power_of_two() - 1);
            prop_assert_eq!(find(&common, function, 1).eax >> 14 & 0xfff, 0);
        }
    }

    #[test]
    fn any_host_yields_a_table_that_kvm_takes(
        host in proptest::collection::vec((any::<u32>(), 0u32..4, any::<[u32; 4]>()), 0..200), vcpus in 1u8..=64
    ) {
        let host: Vec<_> = host.into_iter().map(|(function, index, regs)| entry(function % 0x30, index, regs)).collect();
        let table = for_vcpu(&common(&host, vcpus), vcpus - 1, Some(1));
        prop_assert!(to_kvm(&table).is_some());
    }
}

#[test]
fn what_the_guest_does_not_get_is_not_shown() {
    let table = for_vcpu(&common(&generous(), 2), 0, None);
    assert_eq!(
        find(&table, 1, 0).ecx & (leaf1::ECX_VMX | leaf1::ECX_MONITOR | leaf1::ECX_OSXSAVE),
        0
    );
    assert_eq!(find(&table, 0x8000_0001, 0).ecx & amd1::ECX_SVM, 0);
    assert_eq!(find(&table, 7, 0).ebx & leaf7::EBX_SGX, 0);
    assert!(!table.iter().any(|e| HIDDEN.contains(&e.function)));
    assert!(!table.iter().any(|e| e.function == KVM_TIMING));
}

#[test]
fn the_guest_sees_a_hypervisor_with_a_deadline_timer_and_the_frequency() {
    let table = for_vcpu(&common(&generous(), 1), 0, Some(2_600_000));
    let ecx = find(&table, 1, 0).ecx;
    assert_ne!(ecx & leaf1::ECX_HYPERVISOR, 0);
    assert_ne!(ecx & leaf1::ECX_TSC_DEADLINE, 0);
    assert_eq!(find(&table, KVM_TIMING, 0).eax, 2_600_000);
    assert_eq!(find(&table, KVM_SIGNATURE, 0).eax, KVM_TIMING);
}

#[test]
fn a_frequency_that_may_change_is_not_told() {
    let mut host = generous();
    host.retain(|e| e.function != 0x8000_0007);
    let table = for_vcpu(&common(&host, 1), 0, Some(2_600_000));
    assert!(!table.iter().any(|e| e.function == KVM_TIMING));
}
