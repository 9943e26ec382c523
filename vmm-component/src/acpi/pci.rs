//! PCI in the DSDT: the root bridge with its windows and interrupts, and the claim on the ECAM window without which Linux does not use it
//! (PCI Firmware specification 3.0, 4.1.2).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, EISAName, IO, Memory32Fixed, Name, Package, ResourceTemplate, ZERO,
};

use super::AcpiConfig;
use super::dsdt::device;
use crate::layout;

/// The ECAM window belongs to the machine.
pub(super) fn ecam() -> Vec<u8> {
    // Both are below 4 GiB.
    let window = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window]));
    device("ECAM", &EISAName::new("PNP0C02"), 0, &[&resources])
}

/// The root bridge: PCI Express, of which only memory-mapped configuration is used, compatible with PCI.
pub(super) fn root(config: &AcpiConfig) -> Vec<u8> {
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &ZERO);
    let bus = Name::new("_BBN".into(), &ZERO);
    let resources = resources(config);
    let routing = routing(config);
    let parts: [&dyn Aml; 5] = [&compatible, &segment, &bus, &resources, &routing];
    device("PCI0", &EISAName::new("PNP0A08"), 0, &parts)
}

fn resources(config: &AcpiConfig) -> Name {
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let ports = IO::new(layout::PCI_PORTS, layout::PCI_PORTS, 1, 8);
    let below = layout::PCI_WINDOW;
    // Below 4 GiB.
    let low = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        below.start as u32,
        (below.end - 1) as u32,
        None,
    );
    let high = config.pci_window_64.as_ref().map(|window| {
        let last = window.end - 1;
        AddressSpace::<u64>::new_memory(AddressSpaceCacheable::NotCacheable, true, window.start, last, None)
    });
    let mut children: Vec<&dyn Aml> = vec![&buses, &ports, &low];
    if let Some(high) = &high {
        children.push(high);
    }
    Name::new("_CRS".into(), &ResourceTemplate::new(children))
}

/// `_PRT` (ACPI 6.2.13): for each function's pin the slot, the pin from 0 on, and the GSI, which needs no link device.
fn routing(config: &AcpiConfig) -> Name {
    let mut pins: Vec<(u32, u8, u32)> = config
        .pci_functions
        .iter()
        .map(|function| {
            let slot = u32::from(function.slot()) << 16 | 0xffff;
            (slot, function.interrupt_pin() - 1, layout::pci_gsi(*function))
        })
        .collect();
    pins.sort_unstable();
    pins.dedup();
    let entries: Vec<Package> = pins
        .iter()
        .map(|(slot, pin, gsi)| Package::new(vec![slot, pin, &ZERO, gsi]))
        .collect();
    Name::new(
        "_PRT".into(),
        &Package::new(entries.iter().map(|entry| entry as &dyn Aml).collect()),
    )
}
