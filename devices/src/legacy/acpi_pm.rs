//! Power management ports of hardware-reduced ACPI (ACPI specification 6.5, 4.8.3.7 "Sleep Control and Status Registers", 4.8.3.6 "Reset
//! Register", 5.6.9 "Interrupt-signaled ACPI events"), and the power button.
//!
//! | offset | bytes | register | access |
//! |---|---|---|---|
//! | 0 | 1 | sleep control: SLP_EN is bit 5, SLP_TYP bits 2-4 | writing SLP_EN with type 5 (S5): shutdown; reads 0 |
//! | 1 | 1 | sleep status: WAK_STS is bit 7 | never set, as there is no state to wake from |
//! | 2 | 1 | reset: writing 1 | reset; reads 0 |
//! | 4 | 4 | event status of the generic event device: bit 0 power button, bit 1 generation id | reading byte 0 clears; writes are ignored |
//!
//! The DSDT names offset 4 in the generic event device's `_EVT` method, which reads it to learn what happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::ByteDevice;
use crate::generation_id::GenerationSink;
use crate::interrupt::InterruptLine;

/// Ports of the device.
pub const PORTS: u64 = 8;

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Offset of the event status register, 4 bytes.
pub const EVENT_STATUS: u64 = 4;

/// What a write to the reset register has to be, for the FADT's RESET_VALUE.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (soft off), for the DSDT's `\_S5`.
pub const S5: u8 = 5;
/// Event status bit of the power button.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// Event status bit of a generation id that has changed.
pub const EVENT_GENERATION_ID: u8 = 1 << 1;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP_MASK: u8 = 7;

/// How the guest asks to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// Power off (S5).
    Shutdown,
    /// Reboot.
    Reset,
}

/// Takes the guest's requests to end.
pub trait PowerSink: Send + Sync {
    /// The guest asked for `event`. Called on a vCPU's thread, in the middle of its access: must not block, and so only notes the request.
    /// A guest may ask any number of times.
    fn request(&self, event: PowerEvent);
}

/// The ports (see the module's head): put it on the port bus, eight ports long.
pub struct AcpiPm {
    power: Arc<dyn PowerSink>,
    line: Arc<dyn InterruptLine>,
    events: AtomicU8,
}

impl AcpiPm {
    /// Ports that ask `power` for shutdown and reset; `line` is the generic event device's interrupt, edge-triggered.
    pub fn new(power: Arc<dyn PowerSink>, line: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self {
            power,
            line,
            events: AtomicU8::new(0),
        })
    }

    /// The button that belongs to these ports.
    pub fn power_button(self: &Arc<Self>) -> PowerButton {
        PowerButton(Arc::clone(self))
    }

    /// An event for the guest: each is an edge of its own, so one that got lost because the guest had the interrupt masked holds nothing up.
    fn tell(&self, event: u8) {
        self.events.fetch_or(event, Ordering::AcqRel);
        self.line.pulse();
    }
}

impl ByteDevice for AcpiPm {
    fn read_byte(&self, offset: u64) -> u8 {
        if offset == EVENT_STATUS {
            self.events.swap(0, Ordering::AcqRel)
        } else {
            0
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        match offset {
            // Other sleep types are not offered by the DSDT; a guest that writes one anyway just goes on.
            SLEEP_CONTROL if value & SLP_EN != 0 && value >> SLP_TYP_SHIFT & SLP_TYP_MASK == S5 => {
                self.power.request(PowerEvent::Shutdown);
            }
            RESET if value == RESET_VALUE => self.power.request(PowerEvent::Reset),
            _ => {}
        }
    }
}

/// The guest's power button.
#[derive(Clone)]
pub struct PowerButton(Arc<AcpiPm>);

impl PowerButton {
    /// Presses the button once. What comes of it is the guest's choice; without a driver for the generic event device, nothing.
    pub fn press(&self) {
        self.0.tell(EVENT_POWER_BUTTON);
    }
}

impl GenerationSink for AcpiPm {
    fn changed(&self) {
        self.tell(EVENT_GENERATION_ID);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::bus::BusDevice;
    use crate::interrupt::lock;

    #[derive(Default)]
    struct Recorder {
        requests: Mutex<Vec<PowerEvent>>,
        levels: Mutex<Vec<bool>>,
    }

    impl PowerSink for Recorder {
        fn request(&self, event: PowerEvent) {
            lock(&self.requests).push(event);
        }
    }

    impl InterruptLine for Recorder {
        fn set(&self, asserted: bool) {
            lock(&self.levels).push(asserted);
        }
    }

    fn device() -> (Arc<AcpiPm>, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (AcpiPm::new(recorder.clone(), recorder.clone()), recorder)
    }

    #[test]
    fn entering_s5_asks_for_shutdown() {
        let (pm, recorder) = device();
        pm.write(SLEEP_CONTROL, &[S5 << 2]);
        pm.write(SLEEP_CONTROL, &[SLP_EN | 3 << 2]);
        assert_eq!(*lock(&recorder.requests), []);
        pm.write(SLEEP_CONTROL, &[SLP_EN | S5 << 2]);
        assert_eq!(*lock(&recorder.requests), [PowerEvent::Shutdown]);
    }

    #[test]
    fn the_reset_value_asks_for_reset() {
        let (pm, recorder) = device();
        pm.write(RESET, &[0]);
        pm.write(RESET, &[RESET_VALUE]);
        assert_eq!(*lock(&recorder.requests), [PowerEvent::Reset]);
    }

    #[test]
    fn nothing_reports_a_wake_up() {
        let (pm, _) = device();
        pm.write(SLEEP_STATUS, &[0x80]);
        let mut data = [0xff; 4];
        pm.read(SLEEP_CONTROL, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn a_press_is_an_edge_and_a_status_bit_that_reading_clears() {
        let (pm, recorder) = device();
        pm.power_button().press();
        assert_eq!(*lock(&recorder.levels), [true, false]);
        let mut status = [0xff; 4];
        pm.read(EVENT_STATUS, &mut status);
        assert_eq!(status, [EVENT_POWER_BUTTON, 0, 0, 0]);
        pm.read(EVENT_STATUS, &mut status);
        assert_eq!(status, [0; 4]);
        pm.power_button().press();
        pm.changed();
        assert_eq!(lock(&recorder.levels).len(), 6);
        pm.read(EVENT_STATUS, &mut status);
        assert_eq!(status, [EVENT_POWER_BUTTON | EVENT_GENERATION_ID, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(offset in any::<u64>(), near in 0u64..10, mut data in prop::collection::vec(any::<u8>(), 1..=8)) {
            let (pm, recorder) = device();
            for offset in [offset, near] {
                pm.write(offset, &data);
                pm.read(offset, &mut data);
            }
            prop_assert!(lock(&recorder.requests).len() <= 4);
        }
    }
}
