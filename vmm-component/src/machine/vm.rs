//! The KVM side of a machine: the VM itself, its memslots and the way for messages to its local APICs.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use sepal_devices::interrupt::{Msi, MsiSink};

use super::error::MachineError;
use crate::layout;
use crate::memory::GuestRam;

/// Creates a VM with a split interrupt controller: local APICs in the kernel, the IOAPIC here.
///
/// The interrupt controller comes before any memslot: a memslot change after it is what some hosts make slow, but a split one costs nothing, and KVM
/// wants it before the first vCPU.
pub(super) fn create(kvm: &Kvm) -> Result<VmFd, MachineError> {
    for (cap, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(MachineError::MissingCapability(name));
        }
    }
    let vm = loop {
        match kvm.create_vm() {
            // A signal to this thread while the kernel allocated.
            Err(error) if error.errno() == libc::EINTR => {}
            result => break result.map_err(MachineError::kvm("create the virtual machine"))?,
        }
    };
    // Intel processors without "unrestricted guest" run real-mode code with the help of these four pages; others ignore them.
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(MachineError::kvm("set the identity map's address"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(MachineError::kvm("set the task state segment's address"))?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = layout::IOAPIC_PINS as u64;
    vm.enable_cap(&split)
        .map_err(MachineError::kvm("split the interrupt controller"))?;
    Ok(vm)
}

/// Gives `ram` to the guest.
pub(super) fn set_memory(vm: &VmFd, ram: &GuestRam) -> Result<(), MachineError> {
    for (number, slot) in ram.slots().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: number as u32,
            flags: 0,
            guest_phys_addr: slot.guest_phys,
            memory_size: slot.size,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the slot is a range that `ram` has mapped; the machine keeps `ram` until the VM is closed, and whoever else holds the VM (the
        // vCPUs' threads) holds `ram` too.
        unsafe { vm.set_user_memory_region(region) }.map_err(MachineError::kvm("set a memory slot"))?;
    }
    Ok(())
}

/// Passes messages to the local APICs.
#[derive(Debug)]
pub(super) struct KvmMsi {
    vm: Arc<VmFd>,
}

impl KvmMsi {
    /// Messages to the local APICs of `vm`.
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl MsiSink for KvmMsi {
    fn signal(&self, msi: Msi) {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0 tells that the guest blocked it, an error that the guest made it up wrong: lost, as on real hardware.
        if let Err(error) = self.vm.signal_msi(message) {
            tracing::debug!(%error, ?msi, "message-signalled interrupt was refused");
        }
    }
}
