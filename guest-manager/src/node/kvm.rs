//! What the host's KVM offers, as it says itself (linux/Documentation/virt/kvm/api.rst).

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings as kvm;
use kvm_ioctls::Kvm;

use crate::host;

/// The version of KVM's interface that has been there since Linux 2.6.22, and that programs are to refuse any other than (KVM_GET_API_VERSION).
pub(super) const API_VERSION: u32 = 12;

/// KVM as this manager sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Why it cannot be used, and what to do about it; none if it can.
    pub refused: Option<(String, String)>,
    /// The version of its interface.
    pub api_version: u32,
    /// Most vCPUs of a guest.
    pub max_vcpus: u32,
    /// What it was asked for.
    pub capabilities: Vec<Capability>,
}

/// One of KVM's capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its name in linux/kvm.h.
    pub name: &'static str,
    /// What KVM_CHECK_EXTENSION returns for it; 0: it is not there.
    pub value: i32,
    /// Sepal does not work without it.
    pub needed: bool,
}

/// Names of capabilities with their numbers, and whether they are needed.
macro_rules! capabilities {
    ($($needed:literal: $($name:ident)*;)*) => {
        &[$($((stringify!($name), kvm::$name, $needed),)*)*]
    };
}

/// What is asked for: what components need (`vmm-component/src/machine/vm.rs` refuses to start without), and what explains how a guest runs.
const ASKED: &[(&str, u32, bool)] = capabilities! {
    true: KVM_CAP_USER_MEMORY KVM_CAP_SPLIT_IRQCHIP KVM_CAP_SIGNAL_MSI KVM_CAP_IMMEDIATE_EXIT KVM_CAP_TSC_DEADLINE_TIMER KVM_CAP_IOEVENTFD
        KVM_CAP_IRQFD;
    false: KVM_CAP_IRQ_ROUTING KVM_CAP_NR_MEMSLOTS KVM_CAP_NR_VCPUS KVM_CAP_MAX_VCPUS KVM_CAP_MAX_VCPU_ID KVM_CAP_EXT_CPUID KVM_CAP_X2APIC_API KVM_CAP_TSC_CONTROL
        KVM_CAP_XSAVE2 KVM_CAP_READONLY_MEM KVM_CAP_SYNC_MMU KVM_CAP_X86_USER_SPACE_MSR KVM_CAP_X86_MSR_FILTER KVM_CAP_HYPERV_CPUID
        KVM_CAP_DIRTY_LOG_RING KVM_CAP_GUEST_MEMFD KVM_CAP_MEMORY_ATTRIBUTES KVM_CAP_VM_TYPES;
};

/// Asks KVM. May block for as long as opening a device may.
pub(super) fn ask() -> Found {
    match host::try_open_kvm() {
        Ok(device) => ask_device(device.into()),
        Err(refusal) => Found {
            refused: Some(refusal),
            ..Found::default()
        },
    }
}

fn ask_device(device: OwnedFd) -> Found {
    // SAFETY: the number is that of an open /dev/kvm, which nothing else owns any more.
    let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    let capabilities = ASKED.iter().map(|&(name, number, needed)| Capability {
        name,
        // An error means the same as 0: it is not there.
        value: kvm.check_extension_raw(number.into()).max(0),
        needed,
    });
    Found {
        refused: None,
        api_version: u32::try_from(kvm.get_api_version()).unwrap_or(0),
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        capabilities: capabilities.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_offers_is_enough_or_said_to_be_missing() {
        let found = ask();
        if let Some((why, remedy)) = &found.refused {
            assert!(!why.is_empty() && !remedy.is_empty());
            println!("skipped: no /dev/kvm");
            return;
        }
        assert_eq!(found.api_version, API_VERSION);
        assert!(found.max_vcpus >= 1);
        let missing: Vec<_> = found.capabilities.iter().filter(|c| c.needed && c.value == 0).collect();
        assert!(missing.is_empty(), "guests run here all the same: {missing:?}");
    }
}
