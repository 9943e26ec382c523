//! The few devices of a PC that a guest without firmware still expects at fixed addresses.
//!
//! | ports or address | device | why it is here |
//! |---|---|---|
//! | 0x60-0x64 | [`i8042`] | reset by command 0xfe; port 0x61 must not report an NMI cause; quickly found to have no keyboard |
//! | 0x70-0x71 | [`rtc`] | wall clock at boot, alarm |
//! | 0x3f8-0x3ff | [`serial`] | first console, and last words |
//! | 0x600-0x607 | [`acpi_pm`] | shutdown, reset, power button (hardware-reduced ACPI) |
//! | 0xfec00000 | [`ioapic`] | wired interrupts |
//!
//! What is left out on purpose, and what a guest makes of the all-ones that the bus then answers (Linux's behaviour, from its source):
//!
//! - 8259 interrupt controllers (0x20, 0x21, 0xa0, 0xa1): hardware-reduced ACPI makes Linux use none. Without ACPI its probe writes a mask
//!   and reads back 0xff, which it takes as "no PIC".
//! - 8254 timer (0x40-0x43): without a PIC Linux does not calibrate against it; the time base is the hypervisor's clock and the local APIC.
//!   Its gate and output in port 0x61 are answered (as "expired"), since a wait for them would never end.
//! - DMA controllers (0x00-0x0f, 0x80-0x8f, 0xc0-0xdf) and the POST port 0x80: written to at most.
//! - PM timer and PM1 registers: hardware-reduced ACPI has none.

pub mod acpi_pm;
pub mod i8042;
pub mod ioapic;
pub mod rtc;
pub mod serial;

mod uart;
