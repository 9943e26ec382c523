//! Devices' messages and doorbells through KVM: an eventfd and a GSI (irqfd) for each message, an eventfd (ioeventfd) for each queue.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use sepal_devices::interrupt::Msi;
use sepal_devices::pci::function::{Doorbells, MsiVector, MsiVectors};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::routes::Routes;
use crate::layout;

/// The GSIs that are messages.
pub(super) struct KvmVectors {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    pool: Arc<Pool>,
}

/// Which of them are taken.
struct Pool {
    taken: Mutex<BTreeSet<u32>>,
    end: u32,
}

impl KvmVectors {
    /// All GSIs from [`layout::FIRST_MSI_GSI`] on that the routing table of `vm` can hold, whose messages go into `routes`.
    pub(super) fn new(vm: Arc<VmFd>, routes: Arc<Routes>) -> Self {
        let end = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let taken = Mutex::default();
        let pool = Arc::new(Pool { taken, end });
        Self { vm, routes, pool }
    }
}

impl MsiVectors for KvmVectors {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = self.pool.take().ok_or_else(|| {
            let end = self.pool.end;
            io::Error::other(format!(
                "all interrupts from {} to {end} are taken",
                layout::FIRST_MSI_GSI
            ))
        })?;
        // Gives the number back if the next step fails.
        let vector = KvmVector {
            vm: Arc::clone(&self.vm),
            bell,
            gsi,
            pool: Arc::clone(&self.pool),
        };
        self.vm.register_irqfd(&vector.bell, gsi).map_err(io::Error::from)?;
        Ok(Arc::new(vector))
    }

    fn route(&self, routes: &[(Arc<dyn MsiVector>, Msi)]) {
        self.routes
            .set_messages(routes.iter().map(|(vector, msi)| (vector.gsi(), *msi)));
    }
}

impl Pool {
    fn taken(&self) -> std::sync::MutexGuard<'_, BTreeSet<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lowest that is free.
    fn take(&self) -> Option<u32> {
        let mut taken = self.taken();
        let free = (layout::FIRST_MSI_GSI..self.end).find(|gsi| !taken.contains(gsi))?;
        taken.insert(free);
        Some(free)
    }
}

/// One of them. KVM lets go of the eventfd by itself when it is closed, and the route that is left leads from nowhere; so dropping one needs no
/// system call that a device's thread may not make.
struct KvmVector {
    vm: Arc<VmFd>,
    bell: EventFd,
    gsi: u32,
    pool: Arc<Pool>,
}

impl MsiVector for KvmVector {
    fn trigger(&self) {
        // Fails only when the counter is full; then KVM is about to send the message.
        let _ = self.bell.write(1);
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(&self.bell)
    }

    /// KVM looks at an eventfd that it is given, so what was written before is not lost.
    fn hold(&self, held: bool) {
        let result = if held {
            self.vm.unregister_irqfd(&self.bell, self.gsi)
        } else {
            self.vm.register_irqfd(&self.bell, self.gsi)
        };
        if let Err(error) = result {
            tracing::warn!(%error, gsi = self.gsi, held, "a message's eventfd could not be held back or let go");
        }
    }

    fn take_held(&self) -> bool {
        self.bell.read().is_ok()
    }

    fn gsi(&self) -> u32 {
        self.gsi
    }
}

impl Drop for KvmVector {
    fn drop(&mut self) {
        self.pool.taken().remove(&self.gsi);
    }
}

/// Doorbells that ring without leaving the kernel.
pub(super) struct KvmDoorbells {
    vm: Arc<VmFd>,
}

impl KvmDoorbells {
    /// Doorbells of `vm`.
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl Doorbells for KvmDoorbells {
    /// Of any length and value: on hosts whose KVM does not know that (before Linux 4.4) it is refused, and the write takes the long way.
    fn attach(&self, address: u64, bell: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.vm.register_ioevent(bell, &address, NoDatamatch)?)
    }

    fn detach(&self, address: u64, bell: &EventFd) {
        let result = self
            .vm
            .unregister_ioevent(bell, &IoEventAddress::Mmio(address), NoDatamatch);
        if let Err(error) = result {
            tracing::warn!(%error, address, "a doorbell could not be taken away");
        }
    }
}

#[cfg(test)]
mod tests;
