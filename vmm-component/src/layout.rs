//! The guest's physical address map: every fixed address, port and interrupt number of the machine in one place.
//!
//! ```text
//!  0x0000_0500  boot GDT                    0x0000_6000  PVH start info
//!  0x0000_7000  Linux zero page             0x0000_9000  boot page tables (6 pages)
//!  0x0002_0000  command line                0x0009_fc00  end of low memory
//!  0x000e_0000  ACPI tables (128 KiB)       0x0010_0000  high memory: kernel, initramfs at its end
//!  0xc000_0000  MMIO hole: PCI window       0xe000_0000  ECAM
//!  0xfec0_0000  IOAPIC                      0xfee0_0000  local APIC
//!  0x1_0000_0000  the memory that did not fit below the hole, memory for a memory device, PCI window of 64 bits
//! ```

use std::ops::Range;

use sepal_devices::legacy::{acpi_pm, ioapic};
use sepal_devices::pci::{PciAddress, access};
use sepal_schema::config::DEVICE_HOLE;

pub use sepal_schema::config::MAX_GUEST_ADDRESS;

/// Boot GDT, five 8-byte entries.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` and its memory map and module list (Xen PVH boot ABI), at most one page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux `boot_params` ("zero page"), one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack that a 64-bit entry may use for its first pushes.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// Identity-mapping page tables for the 64-bit entry: PML4, PDPT and four page directories for 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line with its NUL: Linux's COMMAND_LINE_SIZE on x86 is 2048; PVH guests may read more.
pub const CMDLINE_MAX: usize = 2048;
/// First address after the boot structures: kernels and initramfs keep above it.
pub const BOOT_AREA_END: u64 = 0x2_1000;
/// End of usable memory below the legacy hole (start of the EBDA on a PC).
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Page tables and code of [`crate::unassisted`]'s system-call trampoline: in the legacy hole, so in RAM but not in the memory map.
/// Used on hosts without hardware virtualization only.
pub const SYSCALL_TRAMPOLINE: u64 = 0xa_0000;
/// Bytes of [`SYSCALL_TRAMPOLINE`].
pub const SYSCALL_TRAMPOLINE_SIZE: u64 = 0x4000;
/// ACPI tables with the RSDP first, reserved in the memory map.
pub const ACPI: u64 = 0xe_0000;
/// Bytes reserved for the ACPI tables.
pub const ACPI_SIZE: u64 = 0x2_0000;
/// The generation id, 16 bytes in a page of its own at the end of what is reserved for the ACPI tables.
pub const GENERATION_ID: u64 = ACPI + ACPI_SIZE - 0x1000;
/// Start of memory above 1 MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Start of the hole below 4 GiB; memory that does not fit below it continues at [`HOLE_END`].
pub const HOLE_START: u64 = DEVICE_HOLE.start;
/// First byte after the hole.
pub const HOLE_END: u64 = DEVICE_HOLE.end;
/// Where functions' memory may lie below 4 GiB, and where it lies when a guest starts.
pub const PCI_WINDOW: Range<u64> = HOLE_START..ECAM;
/// PCI enhanced configuration access (MCFG), segment 0. Only bus 0 exists; room for all 256 is reserved.
pub const ECAM: u64 = 0xe000_0000;
/// Bytes of [`ECAM`].
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// Bytes of the PCI window above all memory.
pub const PCI_WINDOW_64_SIZE: u64 = 16 << 30;
/// The PCI window above all memory starts at a multiple of this.
const PCI_WINDOW_64_ALIGNMENT: u64 = 1 << 30;
/// IOAPIC registers, one page.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Where the system-call trampoline writes to; one page. See [`SYSCALL_TRAMPOLINE`].
pub const SYSCALL_DOORBELL: u64 = 0xfed8_0000;
/// Local APIC registers, one page.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Three pages that Intel hosts need for real-mode emulation (KVM_SET_TSS_ADDR), inside the hole.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page that Intel hosts need (KVM_SET_IDENTITY_MAP_ADDR), inside the hole.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Configuration ports of PCI, eight.
pub const PCI_PORTS: u16 = access::PORTS_BASE;
/// First port of the keyboard controller.
pub const I8042_DATA: u16 = 0x60;
/// CMOS real-time clock: index and data ports.
pub const RTC: u16 = 0x70;
/// First serial port (16550), eight ports.
pub const SERIAL: u16 = 0x3f8;
/// Power management ports of hardware-reduced ACPI; [`acpi_pm`] says what is where.
pub const ACPI_PM: u16 = 0x600;
/// ACPI sleep control register, one byte.
pub const ACPI_SLEEP_CONTROL: u16 = ACPI_PM + acpi_pm::SLEEP_CONTROL as u16;
/// ACPI sleep status register, one byte.
pub const ACPI_SLEEP_STATUS: u16 = ACPI_PM + acpi_pm::SLEEP_STATUS as u16;
/// ACPI reset register, one byte.
pub const ACPI_RESET: u16 = ACPI_PM + acpi_pm::RESET as u16;
/// Event status of the generic event device, four bytes.
pub const ACPI_GED: u16 = ACPI_PM + acpi_pm::EVENT_STATUS as u16;

/// Interrupt (GSI) of the serial port, edge-triggered, active high (ISA).
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the real-time clock, edge-triggered, active high (ISA).
pub const RTC_GSI: u32 = 8;
/// Interrupt of the generic event device, edge-triggered, active high.
pub const GED_GSI: u32 = 9;
/// First of the interrupts that PCI functions share, level-triggered.
pub const PCI_GSI: u32 = 16;
/// Number of interrupts that PCI functions share.
pub const PCI_GSIS: u32 = 8;
/// First interrupt that is a message: the GSIs below are the IOAPIC's pins.
pub const FIRST_MSI_GSI: u32 = ioapic::PINS as u32;
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: usize = ioapic::PINS;
/// Most vCPUs of a guest.
pub const MAX_VCPUS: u8 = 64;

/// The PCI window above the memory of a guest whose last byte is before `memory_end`; `None` if the guest's processors, with physical addresses
/// of `physical_bits` bits, cannot reach it.
pub fn pci_window_64(memory_end: u64, physical_bits: u8) -> Option<Range<u64>> {
    let start = memory_end
        .max(HOLE_END)
        .checked_next_multiple_of(PCI_WINDOW_64_ALIGNMENT)?;
    let end = start.checked_add(PCI_WINDOW_64_SIZE)?;
    (end <= 1_u64.checked_shl(physical_bits.into()).unwrap_or(u64::MAX)).then_some(start..end)
}

/// The interrupt of a PCI function's pin (INTA# to INTD# as 1 to 4): neighbours get different ones.
pub fn pci_gsi(address: PciAddress) -> u32 {
    PCI_GSI + (u32::from(address.slot()) + u32::from(address.interrupt_pin()) - 1) % PCI_GSIS
}
