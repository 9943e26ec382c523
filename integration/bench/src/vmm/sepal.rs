//! Sepal: each guest through a guest manager of its own, in the jail, as a client sees it.

use std::time::Duration;

use sepal_integration::{Boot, Guest, HarnessError, Report, disk};
use sepal_schema::config::device::{Balloon, DiskFormat, DiskMode, Link, Network};

use super::{Machine, Running, StartError, Started, Vmm};
use crate::results::SEPAL;

/// The slowest guest is done by then.
const PATIENCE: Duration = Duration::from_secs(300);

/// Sepal.
pub(crate) struct Sepal;

/// What the protocol's configuration says of a machine.
pub(crate) fn boot(machine: &Machine<'_>) -> Result<Boot, StartError> {
    let mut boot = Boot::new()
        .kernel(machine.kernel.elf)
        .cmdline(machine.cmdline)
        .cpus(machine.cpus)
        .memory_mib(i32::try_from(machine.memory_mib)?);
    if let Some(initrd) = machine.initrd {
        boot = boot.initrd(initrd);
    }
    if let Some(of) = &machine.disk {
        let format = if of.qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
        let mut disk = disk(of.path, DiskMode::ReadWrite, format)?;
        disk.direct = of.direct;
        boot = boot.disk(disk);
    }
    if let Some(tap) = &machine.tap {
        let mut network = Network::new(Link::Tap(vec![tap.fd.try_clone()?]));
        network.mac = Some(tap.mac);
        boot = boot.network(network);
    }
    if machine.balloon {
        boot = boot.configure(|config| config.balloon = Some(Balloon::default()));
    }
    Ok(boot)
}

impl Vmm for Sepal {
    fn name(&self) -> &'static str {
        SEPAL
    }

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    fn start(&self, machine: &Machine<'_>) -> Started {
        if machine.trace.is_some() {
            return Err(StartError::Unsupported(
                "its guests are no processes of one's own to trace".into(),
            ));
        }
        Ok(Box::new(boot(machine)?.start()?))
    }
}

impl Running for Guest {
    fn first_byte(&mut self) -> Result<(), HarnessError> {
        Guest::wait_for(self, "", PATIENCE).map(drop)
    }

    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError> {
        Guest::wait_for(self, text, PATIENCE).map(drop)
    }

    fn report(&mut self, command: &str) -> Result<Report, HarnessError> {
        self.wait_for_report(command, PATIENCE)
    }

    fn end(&mut self) -> Result<(), HarnessError> {
        self.wait(PATIENCE).map(drop)
    }

    fn pid(&mut self) -> Result<u32, HarnessError> {
        Ok(self.info()?.component_pid)
    }

    fn request_balloon(&mut self, pages: u32) -> Result<(), HarnessError> {
        Guest::request_balloon(self, pages)
    }
}
