//! The driver guest, which measures devices from inside: the same image for every VMM.

use anyhow::{Context, Result};

use crate::{bench::Bench, guests::Image, vmm::Machine};

/// The driver guest's image as a file.
pub(super) struct Drivers {
    image: Image,
}

impl Drivers {
    /// Writes it to the run's folder.
    pub(super) fn new(bench: &Bench) -> Result<Self> {
        let image = Image::drivers(&bench.scratch).context("writing the driver guest")?;
        Ok(Self { image })
    }

    /// A machine that runs the commands which `cmdline` names (`run=COMMAND,COMMAND,...`).
    pub(super) fn machine<'a>(&'a self, cmdline: &'a str) -> Machine<'a> {
        let mut machine = Machine::new(self.image.kernel());
        machine.cmdline = cmdline;
        machine
    }
}
