//! The machine's devices, and the addresses at which its vCPUs reach them.
//!
//! ```text
//!   vCPU ── ports ──▶ bus ──▶ serial, real-time clock, i8042, ACPI power management
//!        ── memory ─▶ bus ──▶ IOAPIC ── message ──▶ KVM's local APICs
//!                             PCI ──▶ virtio devices ── irqfd ──▶ KVM's local APICs
//!        ◀─────────── interrupts ──────────────────────────┘
//! ```

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sepal_devices::bus::{Bus, BusDevice, BusError};
use sepal_devices::dispatch::{
    DeviceEvent, DeviceReporter, DispatchDevice, DispatchLoop, StartError, StartingLoop, StopError,
};
use sepal_devices::legacy::acpi_pm::{self, AcpiPm, PowerButton, PowerEvent, PowerSink};
use sepal_devices::legacy::i8042::{self, I8042};
use sepal_devices::legacy::ioapic::{self, IoApic};
use sepal_devices::legacy::rtc::{self, HostClock, MemorySizes, Rtc, RtcLoop};
use sepal_devices::legacy::serial::{self, Serial, SerialLoop};
use sepal_devices::pci::PciAddress;
use sepal_devices::watchdog::WatchdogLoop;

use super::config::{DeviceSpec, Guards, Hooks, ThreadRole};
use super::error::MachineError;
use super::event::{Happening, ResetCause};
use super::guards;
use super::pci::{Parts, Pci, Pending};
use super::report::Reporter;
use super::routes::Routes;
use super::vcpu::GuestBus;
use super::vm::KvmMsi;
use crate::layout;
use crate::memory::{GuestRam, MemorySlot};

/// Names of the devices with loops, also of their threads.
const SERIAL: &str = "serial";
const RTC: &str = "rtc";

/// The buses as the vCPUs use them, and what the owner does with devices.
pub(super) struct Platform {
    pio: Bus,
    mmio: Bus,
    ioapic: Arc<IoApic>,
    power_button: PowerButton,
    port: Arc<Serial>,
    pci_functions: Vec<PciAddress>,
    guards: guards::Made,
    loops: Mutex<Loops>,
}

/// What its configuration asks of the platform.
pub(super) struct Wishes {
    /// Where the serial port leads.
    pub(super) serial: Option<OwnedFd>,
    /// What is on the PCI bus.
    pub(super) devices: Vec<DeviceSpec>,
    pub(super) guards: Guards,
    /// The PCI window above all memory, if there is one.
    pub(super) window_64: Option<Range<u64>>,
}

/// The devices' loops.
#[derive(Default)]
struct Loops {
    /// Not yet started.
    serial: Option<SerialLoop>,
    /// Not yet started.
    rtc: Option<RtcLoop>,
    /// Not yet started.
    virtio: Vec<Pending>,
    /// Not yet started.
    watchdog: Option<WatchdogLoop>,
    /// Perhaps not yet ready.
    starting: Vec<(String, StartingLoop)>,
    running: Vec<DispatchLoop>,
    /// Those that did not end when they were told to.
    stuck: Vec<String>,
}

impl Loops {
    /// Starts the thread of a device, and does not wait for it: all get ready at the same time.
    fn begin(
        &mut self,
        name: &str,
        role: ThreadRole,
        device: impl DispatchDevice + 'static,
        reporter: &Arc<Reporter>,
        hooks: &Hooks,
    ) -> Result<(), MachineError> {
        let setup = Arc::clone(&hooks.thread_setup);
        let starting = DispatchLoop::begin(name, move || setup(role), device, Arc::clone(reporter) as _);
        self.starting
            .push((name.to_owned(), starting.map_err(start_error(name))?));
        Ok(())
    }
}

impl Platform {
    /// Makes the devices of `vm`.
    pub(super) fn new(
        vm: &Arc<kvm_ioctls::VmFd>,
        ram: &GuestRam,
        wishes: Wishes,
        reporter: &Arc<Reporter>,
    ) -> Result<Self, MachineError> {
        let device_reporter: Arc<dyn DeviceReporter> = Arc::clone(reporter) as _;
        let pio = Bus::with_reporter(Arc::clone(&device_reporter));
        let mmio = Bus::with_reporter(Arc::clone(&device_reporter));

        let ioapic = IoApic::new(Arc::new(KvmMsi::new(Arc::clone(vm))));
        let routes = Arc::new(Routes::new(Arc::clone(vm), &ioapic));
        ioapic.set_route_listener(Arc::clone(&routes) as _);
        insert(
            &mmio,
            layout::IOAPIC,
            ioapic::MMIO_LEN,
            "ioapic",
            Arc::clone(&ioapic) as _,
        )?;

        let line = |gsi: u32| ioapic.line(gsi as usize);
        let power = |cause| {
            Arc::new(Power {
                reporter: Arc::clone(reporter),
                cause,
            })
        };

        let port = Serial::new(line(layout::SERIAL_GSI), serial::DEFAULT_OUTPUT_CAPACITY).map_err(init(SERIAL))?;
        let serial_loop = wishes
            .serial
            .map(|host| port.host_loop(host))
            .transpose()
            .map_err(init(SERIAL))?;
        insert(
            &pio,
            layout::SERIAL.into(),
            serial::PORTS,
            SERIAL,
            Arc::clone(&port) as _,
        )?;

        let (clock, clock_loop) =
            Rtc::with_interrupt(Arc::new(HostClock), memory_sizes(ram), line(layout::RTC_GSI)).map_err(init(RTC))?;
        insert(&pio, layout::RTC.into(), rtc::PORTS, RTC, clock)?;

        let i8042 = I8042::new(power(ResetCause::I8042));
        insert(&pio, layout::I8042_DATA.into(), i8042::PORTS, "i8042", i8042)?;

        let acpi = AcpiPm::new(power(ResetCause::Acpi), line(layout::GED_GSI));
        let power_button = acpi.power_button();
        insert(
            &pio,
            layout::ACPI_PM.into(),
            acpi_pm::PORTS,
            "acpi-pm",
            Arc::clone(&acpi) as _,
        )?;

        let (guards, watchdog_loop) = guards::make(&wishes.guards, &pio, ram.memory(), acpi, reporter)?;

        let parts = Parts {
            vm: Arc::clone(vm),
            routes,
            ioapic: Arc::clone(&ioapic),
            memory: ram.memory().clone(),
            reclaim: Arc::new(ram.discard()),
            window_64: wishes.window_64,
            reporter: device_reporter,
        };
        let pci = Pci::new(parts, wishes.devices, guards.watchdog.as_ref())?;
        pci.connect(&pio, &mmio)?;

        check_memory(&mmio, ram)?;
        Ok(Self {
            pci_functions: pci.functions,
            pio,
            mmio,
            ioapic,
            power_button,
            port,
            guards,
            loops: Mutex::new(Loops {
                serial: serial_loop,
                rtc: Some(clock_loop),
                virtio: pci.pending,
                watchdog: watchdog_loop,
                starting: Vec::new(),
                running: Vec::new(),
                stuck: Vec::new(),
            }),
        })
    }

    /// Bytes of serial output that the host side did not take.
    pub(super) fn serial_dropped(&self) -> u64 {
        self.port.dropped()
    }

    /// Begins to start the loops of the devices that every machine has.
    pub(super) fn begin(&self, reporter: &Arc<Reporter>, hooks: &Hooks) -> Result<(), MachineError> {
        let mut loops = self.loops();
        if let Some(device) = loops.serial.take() {
            loops.begin(SERIAL, ThreadRole::Device(SERIAL), device, reporter, hooks)?;
        }
        if let Some(device) = loops.rtc.take() {
            loops.begin(RTC, ThreadRole::Device(RTC), device, reporter, hooks)?;
        }
        Ok(())
    }

    /// Starts all other loops, and waits until every one is ready.
    pub(super) fn start(&self, reporter: &Arc<Reporter>, hooks: &Hooks) -> Result<(), MachineError> {
        let mut loops = self.loops();
        if let Some(device) = loops.watchdog.take() {
            let role = ThreadRole::Device(guards::WATCHDOG);
            loops.begin(guards::WATCHDOG, role, device, reporter, hooks)?;
        }
        for Pending { name, kind, worker } in std::mem::take(&mut loops.virtio) {
            loops.begin(&name, ThreadRole::Virtio(kind), worker, reporter, hooks)?;
        }
        let mut starting = std::mem::take(&mut loops.starting).into_iter();
        while let Some((name, device)) = starting.next() {
            match device.wait() {
                Ok(running) => loops.running.push(running),
                Err(error) => {
                    // The others are ended together.
                    loops.starting.extend(starting);
                    return Err(start_error(&name)(error));
                }
            }
        }
        Ok(())
    }

    /// Ends the devices' loops, which bring out what must not be lost until `deadline`; returns the names of those that don't end, now or when
    /// this was called before.
    pub(super) fn stop(&self, deadline: Instant) -> Vec<String> {
        let mut loops = self.loops();
        let Loops {
            running,
            starting,
            stuck,
            ..
        } = std::mem::take(&mut *loops);
        drop(loops);
        // Those of the rest never ran, and have nothing to bring out.
        let starting = starting.into_iter().map(|(_, device)| device);
        let deadline = deadline.max(Instant::now() + LEAST_PATIENCE);
        let hung = DispatchLoop::stop_all(running, starting, deadline)
            .into_iter()
            .filter_map(|error| match error {
                StopError::Hung { device } => Some(device),
                // It was reported when it happened.
                StopError::Failed { .. } => None,
            });
        let stuck: Vec<_> = stuck.into_iter().chain(hung).collect();
        self.loops().stuck.clone_from(&stuck);
        stuck
    }

    /// Places of the devices on the PCI bus.
    pub(super) fn pci_functions(&self) -> &[PciAddress] {
        &self.pci_functions
    }

    /// Time stands still for the guest.
    pub(super) fn pause(&self) {
        if let Some(watchdog) = &self.guards.watchdog {
            watchdog.pause();
        }
    }

    /// Time goes on for the guest.
    pub(super) fn resume(&self) {
        if let Some(watchdog) = &self.guards.watchdog {
            watchdog.resume();
        }
    }

    /// Presses the power button.
    pub(super) fn press_power_button(&self) {
        self.power_button.press();
    }

    /// The IOAPIC, for tests with devices of their own.
    #[cfg(test)]
    pub(super) fn ioapic(&self) -> &Arc<IoApic> {
        &self.ioapic
    }

    /// The ports, for tests with devices of their own.
    #[cfg(test)]
    pub(super) fn pio(&self) -> &Bus {
        &self.pio
    }

    fn loops(&self) -> std::sync::MutexGuard<'_, Loops> {
        self.loops.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the devices' loops get to end even after the deadline.
const LEAST_PATIENCE: Duration = Duration::from_millis(10);

impl GuestBus for Platform {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    fn write_memory(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.eoi(vector);
    }
}

/// Turns a guest's request to end into the machine's end.
struct Power {
    reporter: Arc<Reporter>,
    /// What a reset that comes this way is called.
    cause: ResetCause,
}

impl PowerSink for Power {
    fn request(&self, event: PowerEvent) {
        self.reporter.report(match event {
            PowerEvent::Shutdown => Happening::Shutdown,
            PowerEvent::Reset => Happening::Reset { how: self.cause },
        });
    }
}

impl DeviceReporter for Reporter {
    fn report(&self, event: DeviceEvent) {
        match event {
            DeviceEvent::Failed { device, reason } => Self::report(self, Happening::DeviceFailed { device, reason }),
            DeviceEvent::HostClosed { device } => {
                tracing::info!("device {device}: the host's end was closed; output is discarded from now on")
            }
            event => Self::report(self, Happening::Device(event)),
        }
    }
}

fn start_error(device: &str) -> impl FnOnce(StartError) -> MachineError {
    move |error| MachineError::DeviceStart {
        device: device.to_owned(),
        reason: error.to_string(),
    }
}

fn memory_sizes(ram: &GuestRam) -> MemorySizes {
    let total = |high: bool| {
        ram.ranges()
            .iter()
            .filter(|r| (r.start >= layout::HOLE_END) == high)
            .map(|r| r.end - r.start)
            .sum()
    };
    MemorySizes {
        below_4g: total(false),
        above_4g: total(true),
    }
}

pub(super) fn init<E: std::fmt::Display>(device: &'static str) -> impl FnOnce(E) -> MachineError {
    move |error| MachineError::DeviceInit {
        device: device.to_owned(),
        reason: error.to_string(),
    }
}

/// Puts a device on a bus.
pub(super) fn insert(
    bus: &Bus,
    base: u64,
    len: u64,
    name: &'static str,
    device: Arc<dyn BusDevice>,
) -> Result<(), MachineError> {
    bus.insert(base, len, name, device).map_err(|error| match error {
        BusError::Overlap { .. } => MachineError::DeviceOverlap {
            device: name.to_owned(),
            reason: error.to_string(),
        },
        error => init(name)(error),
    })
}

/// Devices and memory must not claim the same addresses: memory would win, and the device be dead without a word.
fn check_memory(mmio: &Bus, ram: &GuestRam) -> Result<(), MachineError> {
    for device in mmio.ranges() {
        let end = device.base + (device.len - 1);
        let hit = |slot: &MemorySlot| slot.guest_phys <= end && device.base < slot.guest_phys + slot.size;
        if let Some(slot) = ram.slots().find(hit) {
            let (start, size) = (slot.guest_phys, slot.size);
            return Err(MachineError::DeviceOverlap {
                device: device.name.to_owned(),
                reason: format!(
                    "{:#x}..={end:#x} overlaps the {size:#x} bytes of memory at {start:#x}",
                    device.base
                ),
            });
        }
    }
    Ok(())
}
