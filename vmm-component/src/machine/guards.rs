//! The devices by which a guest tells how it is (panic port, watchdog) and is told who it is (generation id).

use std::sync::Arc;

use sepal_devices::bus::Bus;
use sepal_devices::generation_id::GenerationId;
use sepal_devices::legacy::acpi_pm::AcpiPm;
use sepal_devices::pvpanic::{self, PvPanic};
use sepal_devices::watchdog::{HostMonotonic, Watchdog, WatchdogAction, WatchdogLoop, WatchdogSink};
use vm_memory::GuestMemoryMmap;

use super::config::Guards;
use super::error::MachineError;
use super::event::{Happening, ResetCause};
use super::platform::{init, insert};
use super::report::Reporter;
use crate::layout;

/// Names of the devices, in events and of threads.
pub(super) const WATCHDOG: &str = "watchdog";
const PANIC: &str = "pvpanic";
const GENERATION: &str = "generation-id";

/// Those that somebody deals with later.
pub(super) struct Made {
    pub(super) watchdog: Option<Arc<Watchdog>>,
}

/// Makes what `wanted` says. The watchdog still has to get its place on the PCI bus, and its loop a thread.
pub(super) fn make(
    wanted: &Guards,
    pio: &Bus,
    memory: &GuestMemoryMmap,
    acpi: Arc<AcpiPm>,
    reporter: &Arc<Reporter>,
) -> Result<(Made, Option<WatchdogLoop>), MachineError> {
    if wanted.panic_device {
        let port = PvPanic::new(PANIC, Arc::clone(reporter) as _);
        insert(pio, pvpanic::PORT.into(), pvpanic::PORTS, PANIC, port)?;
    }
    if let Some(id) = wanted.generation_id {
        GenerationId::new(memory.clone(), layout::GENERATION_ID, id, acpi).map_err(init(GENERATION))?;
    }
    let watchdog = wanted.watchdog.map(|action| {
        let sink = Arc::new(Expired(Arc::clone(reporter)));
        Watchdog::new(action, sink, Arc::new(HostMonotonic), false).map_err(init(WATCHDOG))
    });
    let (watchdog, timer) = watchdog.transpose()?.unzip();
    Ok((Made { watchdog }, timer))
}

/// Ends a machine whose guest did not feed its watchdog.
struct Expired(Arc<Reporter>);

impl WatchdogSink for Expired {
    fn expired(&self, action: WatchdogAction) {
        self.0.report(match action {
            WatchdogAction::Reset => Happening::Reset {
                how: ResetCause::Watchdog,
            },
            WatchdogAction::Stop => Happening::WatchdogStop,
            WatchdogAction::Nothing => return,
        });
    }
}
