//! The legacy devices behind their buses, the panic port and the watchdog: any sequence of register accesses, interrupts and power-button presses.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::{
    bus::Bus,
    dispatch::{DeviceEvent, DeviceReporter},
    interrupt::{InterruptLine, Msi, MsiSink},
    legacy::{
        acpi_pm::{self, AcpiPm, PowerEvent, PowerSink},
        i8042::{self, I8042},
        ioapic::{self, IoApic},
        rtc::{self, HostClock, MemorySizes, Rtc},
        serial::{self, Serial},
    },
    pci::PciFunction,
    pvpanic::{self, PvPanic},
    watchdog::{self, HostMonotonic, Watchdog, WatchdogAction, WatchdogSink},
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
    Watchdog {
        in_config: bool,
        offset: u8,
        width: u8,
        value: Option<u64>,
    },
    Feed,
    Pause(bool),
}

/// Takes whatever the devices signal.
struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _: Msi) {}
}
impl DeviceReporter for Nowhere {
    fn report(&self, _: DeviceEvent) {}
}
impl WatchdogSink for Nowhere {
    fn expired(&self, _: WatchdogAction) {}
}
impl PowerSink for Nowhere {
    fn request(&self, _: PowerEvent) {}
}

/// Ports at which there is something, and some next to them.
const PORTS: [u16; 7] = [
    0x60,
    layout::RTC,
    0x80,
    layout::SERIAL,
    layout::ACPI_SLEEP_CONTROL,
    pvpanic::PORT,
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

fn access_watchdog(watchdog: &Watchdog, in_config: bool, offset: u8, width: u8, value: Option<u64>) {
    let width = usize::from(width % 8) + 1;
    let mut data = value.unwrap_or_default().to_le_bytes();
    let data = &mut data[..width];
    match (in_config, value) {
        (true, Some(_)) => watchdog.write_config(offset.into(), data),
        (true, None) => watchdog.read_config(offset.into(), data),
        (false, Some(_)) => watchdog.write_bar(watchdog::BAR, offset.into(), data),
        (false, None) => watchdog.read_bar(watchdog::BAR, offset.into(), data),
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
        pio.insert(
            pvpanic::PORT.into(),
            pvpanic::PORTS,
            "panic",
            PvPanic::new("panic", Arc::new(Nowhere)),
        ),
        mmio.insert(layout::IOAPIC, ioapic::MMIO_LEN, "ioapic", ioapic.clone()),
    ];
    assert!(ranges.iter().all(Result::is_ok));
    let (watchdog, _) = Watchdog::new(
        WatchdogAction::Nothing,
        Arc::new(Nowhere),
        Arc::new(HostMonotonic),
        false,
    )
    .expect("an eventfd");

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
            Step::Watchdog {
                in_config,
                offset,
                width,
                value,
            } => access_watchdog(&watchdog, in_config, offset, width, value),
            Step::Feed => {
                for word in [0x80u16, 0x86, 0x100] {
                    watchdog.write_bar(watchdog::BAR, 0xc, &word.to_le_bytes());
                }
            }
            Step::Pause(true) => watchdog.pause(),
            Step::Pause(false) => watchdog.resume(),
        }
    }
});
