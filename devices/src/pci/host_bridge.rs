//! The host bridge at 00:00.0: guests look for it to know that there is a bus. It has an identity and nothing else.

use std::sync::{Arc, Mutex};

use super::config_space::{ConfigSpace, Identity};
use super::function::{Bar, PciFunction};
use crate::interrupt::lock;

/// The id that Intel gave the host bridge of virtual machines: guests have no workarounds for real chips tied to it.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
    interrupt_pin: 0,
};

/// The bridge.
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// The bridge.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(ConfigSpace::new(&IDENTITY))))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn bar_moved(&self, _: u8, _: Option<u64>) {}

    fn read_bar(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}
}
