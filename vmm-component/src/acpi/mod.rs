//! ACPI tables: what the guest learns about its CPUs, interrupts, legacy devices and power (ACPI 6.5).
//!
//! ```text
//!  RSDP (at layout::ACPI) -> XSDT -> FADT, hardware-reduced -> DSDT
//!                                 -> MADT
//!                                 -> MCFG: where ECAM is
//! ```
//!
//! The machine is hardware-reduced: no PIC, no PIT, no SCI, no PM1 registers. Power off is the sleep control register,
//! reset the reset register, and the power button arrives through the generic event device.

mod dsdt;
mod pci;
#[cfg(test)]
mod tests;

use std::ops::Range;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use sepal_devices::legacy::acpi_pm;
use sepal_devices::pci::PciAddress;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

const OEM_ID: [u8; 6] = *b"SEPAL ";
const OEM_TABLE_ID: [u8; 8] = *b"SEPALVM ";
const OEM_REVISION: u32 = 1;

/// Tables start at multiples of this; only the RSDP must (ACPI 5.2.5.1).
const ALIGNMENT: u64 = 16;

/// IAPC_BOOT_ARCH (ACPI table 5.11). Left clear: 8042 (the controller can reset and nothing else, so no driver
/// should probe it), MSI not supported, CMOS RTC not present.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_VGA_NOT_PRESENT: u16 = 1 << 2;
const BOOT_ARCH_NO_PCIE_ASPM: u16 = 1 << 4;

/// Bytes of the MADT before its structures: header, local APIC address, flags (ACPI 5.2.12).
const MADT_HEADER: u32 = 44;
const MADT_REVISION: u8 = 5;
const MADT_LOCAL_APIC_ADDRESS: usize = 36;

/// Interrupt source override (ACPI 5.2.12.5).
const MADT_OVERRIDE: u8 = 2;
const MADT_OVERRIDE_LENGTH: u8 = 10;
/// MPS INTI flags (ACPI table 5.26): active high, edge-triggered.
const EDGE_HIGH: u16 = 0b01 | 0b01 << 2;

/// Bytes for all tables: up to the generation id.
const TABLES_SIZE: u64 = layout::GENERATION_ID - layout::ACPI;

/// What the tables describe.
#[derive(Clone, Debug, Default)]
pub struct AcpiConfig {
    /// vCPUs, 1 to [`layout::MAX_VCPUS`]; their APIC ids count from 0.
    pub vcpus: u8,
    /// The PCI window above all memory, if there is one.
    pub pci_window_64: Option<Range<u64>>,
    /// The PCI functions, whose interrupt pins lead to [`layout::pci_gsi`].
    pub pci_functions: Vec<PciAddress>,
    /// There is a port for panics (pvpanic).
    pub panic_device: bool,
    /// There is a generation id at [`layout::GENERATION_ID`].
    pub generation_id: bool,
    /// What the guest reads as its instance id, if it has one.
    pub instance_id: Option<[u8; 64]>,
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// The number of vCPUs is out of range.
    #[error("ACPI tables: {0} vCPUs, 1 to {most} are possible", most = layout::MAX_VCPUS)]
    Vcpus(u8),
    /// The tables need more than the place that is reserved for them.
    #[error("ACPI tables: {size} bytes, {most} are reserved", most = TABLES_SIZE)]
    TooLarge {
        /// Bytes of all tables.
        size: u64,
    },
    /// The guest has no RAM at [`layout::ACPI`].
    #[error("ACPI tables: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Writes all tables into `ram` at [`layout::ACPI`] and returns the address of the RSDP.
pub fn write(ram: &GuestMemoryMmap, config: &AcpiConfig) -> Result<u64, AcpiError> {
    let tables = build(config)?;
    ram.write_slice(&tables, GuestAddress(layout::ACPI))?;
    Ok(layout::ACPI)
}

/// All tables as they lie in memory from [`layout::ACPI`] on.
fn build(config: &AcpiConfig) -> Result<Vec<u8>, AcpiError> {
    if !(1..=layout::MAX_VCPUS).contains(&config.vcpus) {
        return Err(AcpiError::Vcpus(config.vcpus));
    }
    let mut tables = Tables {
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = tables.add(&dsdt::build(config));
    let fadt = tables.add(&fadt(dsdt).finalize());
    let madt = tables.add(&madt(config.vcpus));
    let mcfg = tables.add(&mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    xsdt.add_entry(mcfg);
    let xsdt = tables.add(&xsdt);
    tables.bytes[..Rsdp::len()].copy_from_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)));
    let size = tables.bytes.len() as u64;
    if size > TABLES_SIZE {
        Err(AcpiError::TooLarge { size })
    } else {
        Ok(tables.bytes)
    }
}

/// Tables one after the other.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let start = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(start as usize, 0);
        table.to_aml_bytes(&mut self.bytes);
        layout::ACPI + start
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    // The button flags say that there are no fixed-hardware buttons; FIX_RTC that the clock has no fixed wake status.
    let mut fadt = [
        Flags::Wbinvd,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::ResetRegSup,
        Flags::Headless,
        Flags::HwReducedAcpi,
    ]
    .into_iter()
    .fold(FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION), FADTBuilder::flag)
    .preferred_pm_profile(PmProfile::EnterpriseServer)
    .dsdt_64(dsdt);
    fadt.iapc_boot_arch = (BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_VGA_NOT_PRESENT | BOOT_ARCH_NO_PCIE_ASPM).into();
    fadt.reset_reg = port(layout::ACPI_RESET);
    fadt.reset_value = acpi_pm::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::ACPI_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt
}

/// The MADT. `acpi_tables` has no interrupt source override, so the table is put together from parts.
fn madt(vcpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", MADT_HEADER, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // The flags after it stay 0: no PIC (PCAT_COMPAT).
    madt.write_u32(MADT_LOCAL_APIC_ADDRESS, layout::LOCAL_APIC as u32);
    let mut structures = Vec::new();
    for cpu in 0..vcpus {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut structures);
    }
    // The id need only differ from those of other IOAPICs.
    IoApic::new(0, layout::IOAPIC as u32, 0).to_aml_bytes(&mut structures);
    for gsi in [layout::SERIAL_GSI, layout::RTC_GSI, layout::GED_GSI] {
        structures.vec(&[MADT_OVERRIDE, MADT_OVERRIDE_LENGTH, 0, gsi as u8]);
        structures.dword(gsi);
        structures.word(EDGE_HIGH);
    }
    madt.append_slice(&structures);
    madt
}

/// Segment 0, bus 0.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}
