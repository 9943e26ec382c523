//! Keyboard controller (i8042) without keyboard or mouse: the old way to reset a PC, and port 0x61.
//!
//! | offset | port | what it does |
//! |---|---|---|
//! | 0 | 0x60 data | reads 0xff; writes are ignored |
//! | 1 | 0x61 NMI status and speaker | bits 0-1 as written, bit 4 toggles with each read, bit 5 set, bits 6-7 clear |
//! | 4 | 0x64 command, status | command 0xfe: reset; status as below |
//!
//! Absent for whoever probes it, quickly. A driver empties the output buffer first and gives up if it does not get empty: so status says
//! "output full" (bit 0) while 32 bytes of 0xff are read, which is more than Linux's `i8042_flush` tries (16) and yet an end for
//! software that drains without counting. A command makes as many stale bytes again, so whoever asks for a self-test gets a wrong answer
//! at once, not a timeout of half a second. Status never says "input full" (bit 1): a reboot waits for that bit to clear
//! (`kb_wait`: 65,536 tries, which all ones would make it spend) before it sends command 0xfe. The FADT says that there is no controller
//! (IAPC_BOOT_ARCH bit 1 clear), so a guest with ACPI does not even probe.
//!
//! Port 0x61 has to be answered: after an NMI software reads its causes from bits 6-7, and the all ones of an empty bus would say
//! "memory parity error". Bit 5 (timer 2 has expired) is set, so a wait for the timer that is not there ends; bit 4 is the refresh clock that
//! old delay loops count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::acpi_pm::{PowerEvent, PowerSink};
use crate::bus::ByteDevice;

/// Ports from 0x60 on.
pub const PORTS: u64 = 5;

/// Offset of the data port.
pub const DATA: u64 = 0;
/// Offset of the NMI status port.
pub const NMI_STATUS: u64 = 1;
/// Offset of the command and status port.
pub const COMMAND: u64 = 4;

/// Command: pulse the reset line.
const PULSE_RESET: u8 = 0xfe;
/// Status: a byte waits in the output buffer.
const OUTPUT_FULL: u8 = 1 << 0;
/// Bytes to be read before the output buffer is empty.
const STALE: u8 = 32;

const SPEAKER_BITS: u8 = 0x03;
const REFRESH: u8 = 1 << 4;
const TIMER2_OUT: u8 = 1 << 5;

/// The controller (see the module's head): put it on the port bus at 0x60, five ports long.
pub struct I8042 {
    power: Arc<dyn PowerSink>,
    /// Bytes left in the output buffer.
    stale: AtomicU8,
    /// Speaker bits and refresh bit of port 0x61.
    nmi_status: AtomicU8,
}

impl I8042 {
    /// A controller that asks `power` for a reset.
    pub fn new(power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self {
            power,
            stale: AtomicU8::new(STALE),
            nmi_status: AtomicU8::new(0),
        })
    }
}

impl ByteDevice for I8042 {
    fn read_byte(&self, offset: u64) -> u8 {
        match offset {
            DATA => {
                let _ = self
                    .stale
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                0xff
            }
            NMI_STATUS => self.nmi_status.fetch_xor(REFRESH, Ordering::Relaxed) | TIMER2_OUT,
            COMMAND => {
                if self.stale.load(Ordering::Relaxed) > 0 {
                    OUTPUT_FULL
                } else {
                    0
                }
            }
            _ => 0xff,
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        match offset {
            NMI_STATUS => self.nmi_status.store(value & SPEAKER_BITS, Ordering::Relaxed),
            COMMAND if value == PULSE_RESET => self.power.request(PowerEvent::Reset),
            DATA | COMMAND => self.stale.store(STALE, Ordering::Relaxed),
            _ => {}
        }
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
    struct Requests(Mutex<Vec<PowerEvent>>);

    impl PowerSink for Requests {
        fn request(&self, event: PowerEvent) {
            lock(&self.0).push(event);
        }
    }

    fn device() -> (Arc<I8042>, Arc<Requests>) {
        let requests = Arc::new(Requests::default());
        (I8042::new(requests.clone()), requests)
    }

    fn get(device: &I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_reboot_finds_the_input_buffer_empty_and_resets() {
        let (i8042, requests) = device();
        assert_eq!(get(&i8042, COMMAND) & 0x02, 0);
        i8042.write(COMMAND, &[0xfe]);
        assert_eq!(*lock(&requests.0), [PowerEvent::Reset]);
    }

    #[test]
    fn a_probe_that_counts_gives_up_and_one_that_does_not_comes_to_an_end() {
        let (i8042, requests) = device();
        let drain = |limit: usize| {
            let mut count = 0;
            while count < limit && get(&i8042, COMMAND) & OUTPUT_FULL != 0 {
                assert_eq!(get(&i8042, DATA), 0xff);
                count += 1;
            }
            count
        };
        assert_eq!(drain(17), 17, "Linux calls the controller absent after 16");
        assert!(drain(usize::MAX) < usize::MAX);
        // A self-test is answered at once, with the wrong value.
        i8042.write(COMMAND, &[0xaa]);
        assert_eq!(get(&i8042, COMMAND) & OUTPUT_FULL, OUTPUT_FULL);
        assert_ne!(get(&i8042, DATA), 0x55);
        assert_eq!(*lock(&requests.0), []);
    }

    #[test]
    fn port_0x61_reports_no_nmi_cause_and_ends_waits() {
        let (i8042, _) = device();
        i8042.write(NMI_STATUS, &[0xff]);
        let (first, second) = (get(&i8042, NMI_STATUS), get(&i8042, NMI_STATUS));
        assert_eq!(first & 0xc0, 0, "no parity or channel error");
        assert_eq!(first & 0x23, 0x23);
        assert_eq!((first ^ second), REFRESH);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(offset in any::<u64>(), near in 0u64..8, mut data in prop::collection::vec(any::<u8>(), 1..=8)) {
            let (i8042, _) = device();
            for offset in [offset, near] {
                i8042.write(offset, &data);
                i8042.read(offset, &mut data);
            }
        }
    }
}
