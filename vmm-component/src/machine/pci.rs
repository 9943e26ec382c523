//! The PCI bus of the machine and the virtio devices on it: who gets which place, which memory to start with, which interrupt.
//!
//! There is no firmware, so what firmware would do is done here: each function's memory lies in the window below 4 GiB from the start, in order of
//! place. A guest that does it all again, as Linux may, moves it as it likes.

use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use sepal_devices::bus::Bus;
use sepal_devices::dispatch::DeviceReporter;
use sepal_devices::legacy::ioapic::IoApic;
use sepal_devices::pci::access::{self, ConfigPorts, Ecam, MemoryWindow};
use sepal_devices::pci::{PciAddress, PciBus};
use sepal_devices::virtio::device::{DeviceKind, Reclaim};
use sepal_devices::virtio::transport::{self, BAR_BYTES, Wiring};
use sepal_devices::virtio::worker::VirtioWorker;
use sepal_devices::watchdog::Watchdog;
use vm_memory::GuestMemoryMmap;

use super::config::DeviceSpec;
use super::error::MachineError;
use super::guards::WATCHDOG;
use super::msi::{KvmDoorbells, KvmVectors};
use super::platform::{init, insert};
use super::routes::Routes;
use crate::layout;

/// What the bus is made from.
pub(super) struct Parts {
    pub(super) vm: Arc<VmFd>,
    pub(super) routes: Arc<Routes>,
    pub(super) ioapic: Arc<IoApic>,
    pub(super) memory: GuestMemoryMmap,
    pub(super) reclaim: Arc<dyn Reclaim>,
    /// The window above all memory, if there is one.
    pub(super) window_64: Option<Range<u64>>,
    pub(super) reporter: Arc<dyn DeviceReporter>,
}

/// A device whose loop has not been started.
pub(super) struct Pending {
    pub(super) name: String,
    pub(super) kind: DeviceKind,
    pub(super) worker: VirtioWorker,
}

/// The bus and what is on it.
pub(super) struct Pci {
    bus: Arc<PciBus>,
    /// Places of the devices, in the order of their specifications.
    pub(super) functions: Vec<PciAddress>,
    pub(super) pending: Vec<Pending>,
}

impl Pci {
    /// Makes the bus with `devices`, and after them the watchdog.
    pub(super) fn new(
        parts: Parts,
        devices: Vec<DeviceSpec>,
        watchdog: Option<&Arc<Watchdog>>,
    ) -> Result<Self, MachineError> {
        let windows = std::iter::once(layout::PCI_WINDOW).chain(parts.window_64).collect();
        let bus = PciBus::new(windows, parts.reporter);
        let vectors = Arc::new(KvmVectors::new(Arc::clone(&parts.vm), parts.routes));
        let doorbells = Arc::new(KvmDoorbells::new(parts.vm));
        let (virtio, count) = (devices.len(), devices.len() + usize::from(watchdog.is_some()));
        let place_of = |index| {
            PciAddress::spread(index, count).ok_or_else(|| MachineError::BadConfig {
                field: "devices",
                reason: format!("{count} devices do not fit on the bus"),
            })
        };
        let memory_of = |index| layout::PCI_WINDOW.start + BAR_BYTES * index as u64;
        let (mut functions, mut pending) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (index, DeviceSpec { name, device }) in devices.into_iter().enumerate() {
            let place = place_of(index)?;
            let wiring = Wiring {
                memory: parts.memory.clone(),
                reclaim: Arc::clone(&parts.reclaim),
                vectors: Arc::clone(&vectors) as _,
                doorbells: Arc::clone(&doorbells) as _,
                line: parts.ioapic.line(layout::pci_gsi(place) as usize),
            };
            let kind = device.kind();
            let failed = |reason: String| MachineError::DeviceInit {
                device: name.clone(),
                reason,
            };
            let (function, worker) =
                transport::connect(device, wiring, place.interrupt_pin()).map_err(|e| failed(e.to_string()))?;
            function.place(memory_of(index));
            bus.insert(place, name.clone(), function)
                .map_err(|e| failed(e.to_string()))?;
            functions.push(place);
            pending.push(Pending { name, kind, worker });
        }
        if let Some(watchdog) = watchdog {
            let place = place_of(virtio)?;
            // The window is below 4 GiB.
            watchdog.place(memory_of(virtio) as u32);
            bus.insert(place, WATCHDOG.to_owned(), Arc::clone(watchdog) as _)
                .map_err(|e| init(WATCHDOG)(e))?;
            functions.push(place);
        }
        Ok(Self {
            bus,
            functions,
            pending,
        })
    }

    /// Makes the bus reachable.
    pub(super) fn connect(&self, pio: &Bus, mmio: &Bus) -> Result<(), MachineError> {
        let bus = || Arc::clone(&self.bus);
        let ports = ConfigPorts::new(bus());
        insert(pio, layout::PCI_PORTS.into(), access::PORTS, "pci-ports", ports)?;
        insert(mmio, layout::ECAM, access::ECAM_BYTES, "pci-ecam", Ecam::new(bus()))?;
        for window in self.bus.windows() {
            let len = window.end - window.start;
            let memory = MemoryWindow::new(bus(), window.start);
            insert(mmio, window.start, len, "pci-memory", memory)?;
        }
        Ok(())
    }
}
