//! pvpanic: the port through which a guest's kernel says that it panicked (QEMU, `docs/specs/pvpanic.rst`; Linux, `drivers/misc/pvpanic`).
//!
//! One port, [`PORT`] by custom, that the DSDT describes as a device `_HID` [`HARDWARE_ID`] with that port in its `_CRS`.
//!
//! | bit | read | written |
//! |---|---|---|
//! | 0 | 1: supported | the kernel panicked, and nobody in the guest is going to do anything about it |
//! | 1 | 1: supported | the kernel panicked, and is going to start a crash kernel |
//! | 2-7 | 0 | ignored |
//!
//! Each of the two is reported once in the life of a machine: a guest that writes forever floods nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::ByteDevice;
use crate::dispatch::{DeviceEvent, DeviceReporter};

/// Where guests of other hypervisors find it, too.
pub const PORT: u16 = 0x505;
/// Ports of the device.
pub const PORTS: u64 = 1;
/// `_HID` of the device in the DSDT.
pub const HARDWARE_ID: &str = "QEMU0001";

/// PVPANIC_PANICKED.
const PANICKED: u8 = 1 << 0;
/// PVPANIC_CRASH_LOADED.
const CRASH_LOADED: u8 = 1 << 1;

/// The port (see the module's head): put it on the port bus, [`PORTS`] long.
pub struct PvPanic {
    name: String,
    reporter: Arc<dyn DeviceReporter>,
    reported: AtomicU8,
}

impl PvPanic {
    /// A port that tells `reporter` of panics, under the device's `name`.
    pub fn new(name: impl Into<String>, reporter: Arc<dyn DeviceReporter>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            reporter,
            reported: AtomicU8::new(0),
        })
    }
}

impl ByteDevice for PvPanic {
    fn read_byte(&self, _: u64) -> u8 {
        PANICKED | CRASH_LOADED
    }

    fn write_byte(&self, _: u64, value: u8) {
        let said = value & (PANICKED | CRASH_LOADED);
        let news = said & !self.reported.fetch_or(said, Ordering::AcqRel);
        for bit in [CRASH_LOADED, PANICKED] {
            if news & bit != 0 {
                self.reporter.report(DeviceEvent::GuestPanicked {
                    device: self.name.clone(),
                    crash_loaded: bit == CRASH_LOADED,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use crate::dispatch::stepper::Reports;

    fn device() -> (Arc<PvPanic>, Arc<Reports>) {
        let reports = Arc::new(Reports::default());
        (PvPanic::new("panic", reports.clone()), reports)
    }

    fn panicked(crash_loaded: bool) -> DeviceEvent {
        DeviceEvent::GuestPanicked {
            device: "panic".into(),
            crash_loaded,
        }
    }

    #[test]
    fn a_driver_finds_both_events_supported() {
        let (device, reports) = device();
        let mut byte = [0xff];
        device.read(0, &mut byte);
        assert_eq!(byte, [3]);
        assert_eq!(reports.take(), []);
    }

    #[test]
    fn a_panic_is_reported_once() {
        let (device, reports) = device();
        for _ in 0..1000 {
            device.write(0, &[1]);
        }
        assert_eq!(reports.take(), [panicked(false)]);
    }

    #[test]
    fn a_crash_kernel_that_panics_itself_is_reported_as_well() {
        let (device, reports) = device();
        device.write(0, &[2]);
        assert_eq!(reports.take(), [panicked(true)]);
        device.write(0, &[1]);
        assert_eq!(reports.take(), [panicked(false)]);
    }

    #[test]
    fn bits_without_a_meaning_say_nothing() {
        let (device, reports) = device();
        device.write(0, &[0xfc]);
        assert_eq!(reports.take(), []);
        device.write(0, &[0xff]);
        assert_eq!(reports.take(), [panicked(true), panicked(false)]);
    }
}
