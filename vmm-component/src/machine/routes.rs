//! KVM's interrupt routing table: which message each GSI stands for.
//!
//! The first GSIs are the IOAPIC's pins. Their messages are sent directly ([`KvmMsi`](super::vm::KvmMsi)); they are routed only while they are
//! level-triggered, which makes KVM tell us of their end-of-interrupt (KVM_EXIT_IOAPIC_EOI). The others are PCI functions' messages
//! ([`KvmVectors`](super::msi::KvmVectors)).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use sepal_devices::interrupt::Msi;
use sepal_devices::legacy::ioapic::{IoApic, RouteListener};

/// The table, as KVM has it.
pub(super) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<BTreeMap<u32, Msi>>,
    ioapic: Weak<IoApic>,
}

impl Routes {
    /// An empty table for `vm`, whose first GSIs follow the pins of `ioapic`.
    pub(super) fn new(vm: Arc<VmFd>, ioapic: &Arc<IoApic>) -> Self {
        Self {
            vm,
            table: Mutex::default(),
            ioapic: Arc::downgrade(ioapic),
        }
    }

    /// Gives GSIs beyond the IOAPIC's their messages, all by one system call.
    pub(super) fn set_messages(&self, messages: impl Iterator<Item = (u32, Msi)>) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.extend(messages);
        self.apply(&table);
    }

    fn apply(&self, table: &BTreeMap<u32, Msi>) {
        let entries: Vec<kvm_irq_routing_entry> = table.iter().map(|(gsi, msi)| entry(*gsi, *msi)).collect();
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| format!("{e:?}"))
            .and_then(|routing| self.vm.set_gsi_routing(&routing).map_err(|e| e.to_string()));
        // The guest's register keeps what it wrote; its interrupt is as broken as with a wrong entry on a real IOAPIC.
        if let Err(error) = result {
            tracing::warn!(error, "interrupt routes were refused");
        }
    }
}

impl RouteListener for Routes {
    fn route_changed(&self, pin: usize) {
        let (Some(ioapic), Ok(gsi)) = (self.ioapic.upgrade(), u32::try_from(pin)) else {
            return;
        };
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the table's lock: of two vCPUs that get here together, the second sets the newest.
        let before = match ioapic.redirection(pin).eoi_route() {
            Some(msi) => table.insert(gsi, msi),
            None => table.remove(&gsi),
        };
        if before != table.get(&gsi).copied() {
            self.apply(&table);
        }
    }
}

fn entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: msi.address as u32,
                address_hi: (msi.address >> 32) as u32,
                data: msi.data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
            },
        },
        ..Default::default()
    }
}
