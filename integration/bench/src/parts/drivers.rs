//! The driver guest, which measures devices from inside: the same image for every VMM.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use crate::{
    bench::Bench,
    vmm::{Kernel, Machine},
};

/// The driver guest's image as a file.
pub(super) struct Drivers {
    image: PathBuf,
}

impl Drivers {
    /// Writes it to the run's folder.
    pub(super) fn new(bench: &Bench) -> Result<Self> {
        let image = bench.scratch.join("driver-guest");
        fs::write(&image, sepal_driver_guest::IMAGE).context("writing the driver guest")?;
        Ok(Self { image })
    }

    /// A machine that runs the commands which `cmdline` names (`run=COMMAND,COMMAND,...`).
    pub(super) fn machine<'a>(&'a self, cmdline: &'a str) -> Machine<'a> {
        let mut machine = Machine::new(Kernel {
            elf: &self.image,
            bzimage: None,
            flat: None,
        });
        machine.cmdline = cmdline;
        machine
    }
}
