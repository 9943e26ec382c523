//! The legacy devices behind their buses: any sequence of register accesses, interrupts and power-button presses.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::{
    bus::Bus,
    interrupt::{InterruptLine, Msi, MsiSink},
    legacy::{
        acpi_pm::{self, AcpiPm, PowerEvent, PowerSink},
        i8042::{self, I8042},
        ioapic::{self, IoApic},
        rtc::{self, HostClock, MemorySizes, Rtc},
        serial::{self, Serial},
    },
};
use sepal_vmm_component::layout;

#[derive(Arbitrary, Debug)]
enum Step {
    Pio {
        port: u8,
        width: u8,
        value: Option<u64>,
    },
    Far {
        address: u64,
        width: u8,
        value: Option<u64>,
    },
    Ioapic {
        offset: u16,
        width: u8,
        value: Option<u64>,
    },
    Line {
        pin: u8,
        asserted: bool,
    },
    Eoi(u8),
    Press,
}

/// Takes whatever the devices signal.
struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _: Msi) {}
}
impl PowerSink for Nowhere {
    fn request(&self, _: PowerEvent) {}
}

/// Ports at which there is something, and some next to them.
const PORTS: [u16; 6] = [
    0x60,
    layout::RTC,
    0x80,
    layout::SERIAL,
    layout::ACPI_SLEEP_CONTROL,
    0xffff,
];

fn access(bus: &Bus, address: u64, width: u8, value: Option<u64>) {
    let width = usize::from(width % 8) + 1;
    match value {
        Some(value) => drop(bus.write(address, &value.to_le_bytes()[..width])),
        None => {
            let mut data = [0; 8];
            bus.read(address, &mut data[..width]);
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let ioapic = IoApic::new(Arc::new(Nowhere));
    let lines: Vec<Arc<dyn InterruptLine>> = (0..layout::IOAPIC_PINS).map(|pin| ioapic.line(pin)).collect();
    let line = |gsi: u32| lines[gsi as usize].clone();
    let (pio, mmio) = (Bus::new(), Bus::new());
    let memory = MemorySizes {
        below_4g: 64 << 20,
        above_4g: 0,
    };
    let acpi = AcpiPm::new(Arc::new(Nowhere), line(layout::GED_GSI));
    let button = acpi.power_button();
    let serial = Serial::new(line(layout::SERIAL_GSI), 256).expect("an eventfd");
    let ranges = [
        pio.insert(layout::SERIAL.into(), serial::PORTS, "serial", serial),
        pio.insert(
            layout::RTC.into(),
            rtc::PORTS,
            "rtc",
            Rtc::new(Arc::new(HostClock), memory),
        ),
        pio.insert(
            layout::I8042_DATA.into(),
            i8042::PORTS,
            "i8042",
            I8042::new(Arc::new(Nowhere)),
        ),
        pio.insert(layout::ACPI_SLEEP_CONTROL.into(), acpi_pm::PORTS, "acpi-pm", acpi),
        mmio.insert(layout::IOAPIC, ioapic::MMIO_LEN, "ioapic", ioapic.clone()),
    ];
    assert!(ranges.iter().all(Result::is_ok));

    for step in steps.into_iter().take(1000) {
        match step {
            Step::Pio { port, width, value } => {
                let base = PORTS[usize::from(port >> 4) % PORTS.len()];
                access(&pio, u64::from(base) + u64::from(port & 15), width, value);
            }
            Step::Far { address, width, value } => {
                access(&pio, address, width, value);
                access(&mmio, address, width, value);
            }
            Step::Ioapic { offset, width, value } => {
                access(&mmio, layout::IOAPIC + u64::from(offset), width, value);
            }
            Step::Line { pin, asserted } => lines[usize::from(pin) % lines.len()].set(asserted),
            Step::Eoi(vector) => ioapic.eoi(vector),
            Step::Press => button.press(),
        }
    }
});
