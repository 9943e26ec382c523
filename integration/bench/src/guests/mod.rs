//! Guests that every VMM can load, as files: the same code as ELF, as bzImage, and flat.
//!
//! - `code`: what they do; `formats`: the files; `mover`: what makes a bzImage of a kernel that has but one place.

mod code;
mod formats;
mod mover;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::vmm::Kernel;

/// What the guests here, and those of the project, write first to the serial port.
pub(crate) const FIRST_BYTE: u8 = b'S';

/// A guest as files; they are gone when their folder is.
pub(crate) struct Image {
    elf: PathBuf,
    bzimage: PathBuf,
    flat: Option<PathBuf>,
}

impl Image {
    /// Writes one byte to the serial port by its first instructions, then ends by ACPI's S5, the i8042's reset, or a triple fault.
    ///
    /// # Errors
    /// When it cannot be written to the folder.
    pub(crate) fn first_byte(folder: &Path) -> io::Result<Self> {
        Self::of(folder, "first-byte", code::first_byte())
    }

    /// Writes one byte to the serial port by its first instructions, then waits in hlt for ever, interrupts off and no timer set.
    ///
    /// # Errors
    /// As [`first_byte`](Self::first_byte).
    pub(crate) fn idle(folder: &Path) -> io::Result<Self> {
        Self::of(folder, "idle", code::idle())
    }

    /// Drives virtio devices; `sepal-driver-guest` says what it can be asked for on its command line.
    ///
    /// # Errors
    /// As [`first_byte`](Self::first_byte).
    pub(crate) fn drivers(folder: &Path) -> io::Result<Self> {
        let elf = sepal_driver_guest::IMAGE;
        let bzimage =
            mover::bzimage(elf).ok_or_else(|| io::Error::other("the driver guest has more than one segment"))?;
        Ok(Self {
            elf: write(folder, "drivers.elf", elf)?,
            bzimage: write(folder, "drivers.bzimage", &bzimage)?,
            flat: None,
        })
    }

    fn of(folder: &Path, name: &str, code: code::Code) -> io::Result<Self> {
        Ok(Self {
            elf: write(folder, &format!("{name}.elf"), &formats::elf(code))?,
            bzimage: write(folder, &format!("{name}.bzimage"), &formats::bzimage(code))?,
            flat: Some(write(folder, &format!("{name}.flat"), &formats::flat(code))?),
        })
    }

    /// The files, as a machine takes them.
    pub(crate) fn kernel(&self) -> Kernel<'_> {
        Kernel {
            elf: &self.elf,
            bzimage: Some(&self.bzimage),
            flat: self.flat.as_deref(),
        }
    }
}

fn write(folder: &Path, name: &str, content: &[u8]) -> io::Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, content)?;
    Ok(path)
}
