//! The ways from a vCPU to the bus: two ports (PCI 3.2.2.3.2), the ECAM window (PCI Express 7.2.2), and windows of memory for BARs.

use std::sync::{Arc, Mutex};

use super::address::PciAddress;
use super::bus::PciBus;
use crate::bus::BusDevice;
use crate::interrupt::lock;

/// First of the ports: the address register.
pub const PORTS_BASE: u16 = 0xcf8;
/// Number of ports: address and data, 4 bytes each.
pub const PORTS: u64 = 8;
/// Bytes of the ECAM window: one bus of 256 functions with 4096 bytes each.
pub const ECAM_BYTES: u64 = 1 << 20;

/// Offset of the data register.
const DATA: u64 = 4;
/// Address register: the data register leads to configuration space.
const ENABLE: u32 = 1 << 31;
/// What the address register keeps: enable, the register's high bits (as AMD's processors have them, and Linux uses there), bus, device and
/// function, register.
const ADDRESS_MASK: u32 = 0x8fff_fffc;

/// Ports 0xcf8 to 0xcff: an address, then data. As on a PC, a guest must not use them on two processors at once.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// Ports that lead to `bus`.
    pub fn new(bus: Arc<PciBus>) -> Arc<Self> {
        Arc::new(Self {
            bus,
            address: Mutex::new(0),
        })
    }

    /// The function and register that the data register's byte `offset` leads to; there is only bus 0.
    fn target(&self, offset: u64) -> Option<(PciAddress, u16)> {
        let address = *lock(&self.address);
        let on_bus_0 = address & ENABLE != 0 && address & 0xff_0000 == 0;
        // An offset inside of the data register has two bits.
        let register = (address >> 16 & 0xf00) as u16 | (address & 0xfc) as u16 | (offset & 3) as u16;
        on_bus_0.then_some((PciAddress::from_devfn((address >> 8) as u8), register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            return data.copy_from_slice(&lock(&self.address).to_le_bytes());
        }
        data.fill(0xff);
        if let Some(within) = offset.checked_sub(DATA)
            && let Some((function, register)) = self.target(within)
        {
            self.bus.read_config(function, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The address register takes whole writes only; narrower ones are for other devices of a PC at the same ports.
        if let (0, &[a, b, c, d]) = (offset, data) {
            *lock(&self.address) = u32::from_le_bytes([a, b, c, d]) & ADDRESS_MASK;
        } else if let Some(within) = offset.checked_sub(DATA)
            && let Some((function, register)) = self.target(within)
        {
            self.bus.write_config(function, register, data);
        }
    }
}

/// The ECAM window: every register has an address of its own.
pub struct Ecam(Arc<PciBus>);

impl Ecam {
    /// A window that leads to `bus`.
    pub fn new(bus: Arc<PciBus>) -> Arc<Self> {
        Arc::new(Self(bus))
    }

    fn target(offset: u64) -> Option<(PciAddress, u16)> {
        let devfn = u8::try_from(offset >> 12).ok()?;
        Some((PciAddress::from_devfn(devfn), (offset & 0xfff) as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((function, register)) => self.0.read_config(function, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = Self::target(offset) {
            self.0.write_config(function, register, data);
        }
    }
}

/// A window of memory in which functions' BARs lie.
pub struct MemoryWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl MemoryWindow {
    /// The window that starts at `base`.
    pub fn new(bus: Arc<PciBus>, base: u64) -> Arc<Self> {
        Arc::new(Self { bus, base })
    }
}

impl BusDevice for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.bus.read_memory(self.base + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bus.write_memory(self.base + offset, data);
    }
}

#[cfg(test)]
mod tests;
