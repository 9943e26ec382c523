//! The DSDT: devices that a guest cannot find by itself, and the ways to stop and to be asked to.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt,
    Local, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use sepal_devices::legacy::acpi_pm;
use sepal_devices::{generation_id, pvpanic};

use super::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes, pci};
use crate::layout;

/// Bytes of a table's header.
const HEADER: u32 = 36;
/// From revision 2 on integers have 64 bits.
const REVISION: u8 = 2;

/// The notification for a press of the power button (ACPI 4.8.2.2.1.2).
const NOTIFY_PRESSED: u8 = 0x80;

/// The instance id's device: ours alone, since there is none of that kind elsewhere (docs/devices.md). SEPL0001 is the generation id.
const INSTANCE_HARDWARE_ID: &str = "SEPL0002";

/// Bytes of the event status port.
const GED_PORTS: u8 = 4;

/// The whole table.
pub(super) fn build(config: &AcpiConfig) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&bytes(&soft_off()));
    let devices = [
        serial(),
        clock(),
        power_button(),
        event_device(config.generation_id),
        processors(config.vcpus),
        pci::ecam(),
        pci::root(config),
    ];
    for device in devices {
        dsdt.append_slice(&device);
    }
    if config.panic_device {
        dsdt.append_slice(&panic_device());
    }
    if config.generation_id {
        dsdt.append_slice(&generation_id());
    }
    if let Some(id) = &config.instance_id {
        dsdt.append_slice(&instance_id(id));
    }
    dsdt
}

/// `\_S5`: what to write to the sleep control register to power off.
fn soft_off() -> Name {
    let sleep_type = acpi_pm::S5;
    Name::new(
        "\\_S5_".into(),
        &Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO]),
    )
}

/// A device below `\_SB`, from its name, its ids and what else it has.
pub(super) fn device(name: &str, hardware_id: &dyn Aml, unique_id: u8, others: &[&dyn Aml]) -> Vec<u8> {
    named(name, hardware_id, &unique_id, others)
}

/// The same, with a unique id of any type.
fn named(name: &str, hardware_id: &dyn Aml, unique_id: &dyn Aml, others: &[&dyn Aml]) -> Vec<u8> {
    let hardware_id = Name::new("_HID".into(), hardware_id);
    let unique_id = Name::new("_UID".into(), unique_id);
    let mut children: Vec<&dyn Aml> = vec![&hardware_id, &unique_id];
    children.extend(others);
    let device = Device::new(name.into(), children);
    bytes(&Scope::new("\\_SB_".into(), vec![&device]))
}

/// Current resources: ports, if any, and an interrupt that is edge-triggered, active high and not shared.
fn resources(ports: Option<(u16, u8)>, gsi: u32) -> Name {
    let ports = ports.map(|(base, count)| IO::new(base, base, 1, count));
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let mut children: Vec<&dyn Aml> = Vec::new();
    if let Some(ports) = &ports {
        children.push(ports);
    }
    children.push(&interrupt);
    Name::new("_CRS".into(), &ResourceTemplate::new(children))
}

fn serial() -> Vec<u8> {
    let name = Name::new("_DDN".into(), &"COM1");
    device(
        "COM1",
        &EISAName::new("PNP0501"),
        0,
        &[&name, &resources(Some((layout::SERIAL, 8)), layout::SERIAL_GSI)],
    )
}

fn clock() -> Vec<u8> {
    device(
        "RTC_",
        &EISAName::new("PNP0B00"),
        0,
        &[&resources(Some((layout::RTC, 2)), layout::RTC_GSI)],
    )
}

fn power_button() -> Vec<u8> {
    device("PWRB", &EISAName::new("PNP0C0C"), 0, &[])
}

/// The generic event device: its interrupt runs `_EVT`, which reads (and so clears) the status once and notifies
/// whatever has happened.
fn event_device(generation_id: bool) -> Vec<u8> {
    let port = layout::ACPI_GED;
    let region = OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &port, &GED_PORTS);
    let field = Field::new(
        "EREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESTS", usize::from(GED_PORTS) * 8)],
    );
    let (status, seen, pressed) = (Path::new("ESTS"), Local(0), Local(1));
    let read = Store::new(&seen, &status);
    let mask = And::new(&pressed, &seen, &acpi_pm::EVENT_POWER_BUTTON);
    let button = Path::new("\\_SB_.PWRB");
    let notify = Notify::new(&button, &NOTIFY_PRESSED);
    let if_pressed = If::new(&pressed, vec![&notify]);
    let changed = Local(2);
    let id_mask = And::new(&changed, &seen, &acpi_pm::EVENT_GENERATION_ID);
    let id = Path::new("\\_SB_.VGEN");
    let notify_id = Notify::new(&id, &generation_id::NOTIFY_CHANGED);
    let if_changed = If::new(&changed, vec![&notify_id]);
    let mut steps: Vec<&dyn Aml> = vec![&read, &mask, &if_pressed];
    if generation_id {
        steps.extend([&id_mask as &dyn Aml, &if_changed]);
    }
    let handler = Method::new("_EVT".into(), 1, true, steps);
    device(
        "GED_",
        &"ACPI0013",
        0,
        &[&resources(None, layout::GED_GSI), &region, &field, &handler],
    )
}

/// The port for panics; Linux looks at `_STA` before it uses it.
fn panic_device() -> Vec<u8> {
    let port = IO::new(pvpanic::PORT, pvpanic::PORT, 1, pvpanic::PORTS as u8);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port]));
    // Present, enabled, shown, working (ACPI 6.3.7).
    let status = Name::new("_STA".into(), &0x0f_u8);
    device("PEVT", &pvpanic::HARDWARE_ID, 0, &[&resources, &status])
}

/// The generation id: where it lies.
fn generation_id() -> Vec<u8> {
    let [first, second, third] = generation_id::COMPATIBLE_IDS;
    let compatible = Name::new("_CID".into(), &Package::new(vec![&first, &second, &third]));
    let name = Name::new("_DDN".into(), &generation_id::DOS_NAME);
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    let address = Name::new("ADDR".into(), &Package::new(vec![&low, &high]));
    device("VGEN", &generation_id::HARDWARE_ID, 0, &[&compatible, &name, &address])
}

/// The instance id: a device that has nothing but a unique id, of lower-case hexadecimal digits, which every operating system tells without a driver.
fn instance_id(id: &[u8; 64]) -> Vec<u8> {
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = Name::new("_DDN".into(), &"Instance id");
    named("INST", &INSTANCE_HARDWARE_ID, &digits, &[&name])
}

/// A device for each vCPU; `_UID` is the one in the MADT.
fn processors(vcpus: u8) -> Vec<u8> {
    (0..vcpus)
        .flat_map(|cpu| device(&format!("C{cpu:03X}"), &"ACPI0007", cpu, &[]))
        .collect()
}
