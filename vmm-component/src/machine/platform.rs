//! The machine's devices and the addresses at which its vCPUs reach them.

use sepal_devices::bus::Bus;

use super::vcpu::GuestBus;

/// The buses, as the vCPUs use them.
pub(super) struct Platform {
    pio: Bus,
    mmio: Bus,
}

impl Platform {
    /// Makes the devices.
    pub(super) fn new() -> Self {
        Self {
            pio: Bus::new(),
            mmio: Bus::new(),
        }
    }

    /// Presses the power button.
    pub(super) fn press_power_button(&self) {}
}

impl GuestBus for Platform {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    fn write_memory(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    fn end_of_interrupt(&self, _vector: u8) {}
}
