//! Boot: puts a kernel, its initramfs and its command line into guest memory and says how to enter it.
//!
//! ```text
//!  kernel file -- ELF ---------------------------.
//!             \-- bzImage -> decompress (stream) -+-> segments in guest memory -> initramfs above -> boot
//!                                                                                                structures
//! ```
//!
//! Everything read here is hostile: files are read with `pread` (so one that shrinks is an error, not a fault), and
//! an image is never held as a whole: it flows into guest memory through a window (`decompress` has the
//! bounds). Kernels run at the physical address that they are linked for, so nothing is relocated.

mod bzimage;
mod decompress;
mod elf;
mod error;
mod guest;
mod image;
mod initrd;
mod linux;
mod pvh;
mod registers;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use vm_memory::GuestMemoryMmap;

use crate::layout;
use crate::memory::MemoryMap;
pub use bzimage::BzImageError;
pub use decompress::Compression;
pub use elf::ElfError;
pub use error::{BootError, BootErrorClass, CommandLineError, InitrdError};
use image::{Image, InputFile};
pub use registers::apply;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Xen's PVH boot ABI: 32-bit protected mode without paging, EBX points to `hvm_start_info`.
    Pvh,
    /// The 64-bit entry of the Linux boot protocol: long mode, 4 GiB mapped one to one, RSI points to `boot_params`.
    Linux64,
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// An x86-64 ELF file or a bzImage.
    pub kernel: &'a File,
    /// An initramfs, handed over as it is.
    pub initrd: Option<&'a File>,
    /// The complete command line, at most [`layout::CMDLINE_MAX`] - 1 bytes.
    pub cmdline: &'a str,
    /// Address of the ACPI RSDP.
    pub rsdp: u64,
    /// The protocol to use, or what suits the image best: PVH for an ELF file that offers it, else the 64-bit entry.
    pub protocol: Option<Protocol>,
    /// Set by another thread to give up; looked at every MiB or more often.
    pub cancel: &'a AtomicBool,
}

/// How to start the first vCPU: see [`apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootEntry {
    /// The protocol in use.
    pub protocol: Protocol,
    /// First instruction, a guest physical address below 4 GiB.
    pub rip: u64,
    /// The structure that the protocol passes in a register: `hvm_start_info` or `boot_params`.
    pub boot_info: u64,
}

/// A kernel in guest memory.
#[derive(Debug)]
struct LoadedKernel {
    /// Where it is, its zeroed parts included; ascending, disjoint.
    spans: Vec<Range<u64>>,
    /// The entry that its ELF header names.
    entry: u64,
    /// The entry that its PVH note names.
    pvh_entry: Option<u64>,
    /// The bzImage's setup header, if it came in one.
    setup: Option<bzimage::SetupHeader>,
}

/// Where and how large the initramfs is in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LoadedInitrd {
    address: u64,
    size: u64,
}

/// Loads the kernel and all that goes with it into `ram`, whose map is `map`. The memory must be fresh: what the
/// kernel and the boot structures do not cover keeps its contents.
pub fn load(ram: &GuestMemoryMmap, map: &MemoryMap, request: &BootRequest<'_>) -> Result<BootEntry, BootError> {
    check_boot_area(map)?;
    check_command_line(request.cmdline)?;
    let kernel = load_kernel(ram, map, request)?;
    let protocol = choose(&kernel, request.protocol)?;
    let rip = match (protocol, kernel.pvh_entry) {
        (Protocol::Pvh, Some(entry)) => entry,
        _ => kernel.entry,
    };
    if rip >= layout::HOLE_END {
        return Err(ElfError::EntryTooHigh { entry: rip }.into());
    }
    if let Some(setup) = &kernel.setup {
        setup.check_command_line(request.cmdline)?;
    }
    let initrd = match request.initrd {
        Some(file) => Some(initrd::load(
            ram,
            map,
            &kernel,
            &InputFile::open(file, error::INITRAMFS, request.cancel)?,
        )?),
        None => None,
    };
    guest::write_command_line(ram, request.cmdline)?;
    registers::write_tables(ram, protocol)?;
    let boot_info = match protocol {
        Protocol::Pvh => pvh::write(ram, map, request, initrd)?,
        Protocol::Linux64 => linux::write(ram, map, request, kernel.setup.as_ref(), initrd)?,
    };
    Ok(BootEntry {
        protocol,
        rip,
        boot_info,
    })
}

fn load_kernel(ram: &GuestMemoryMmap, map: &MemoryMap, request: &BootRequest<'_>) -> Result<LoadedKernel, BootError> {
    let file = InputFile::open(request.kernel, "kernel", request.cancel)?;
    let mut image = Image::from_file(file);
    let head = image.peek(bzimage::HEAD)?;
    if elf::is_elf(head) {
        return elf::load(ram, map, &mut image);
    }
    if !bzimage::is_bzimage(head) {
        return Err(BootError::NotAKernel {
            seen: image::describe(head),
        });
    }
    let setup = bzimage::SetupHeader::parse(head, file.len())?;
    let mut payload = decompress::open(file, setup.payload())?;
    let mut kernel = elf::load(ram, map, &mut payload)?;
    kernel.setup = Some(setup);
    Ok(kernel)
}

/// The protocol that was asked for, or the best that the image offers.
fn choose(kernel: &LoadedKernel, wanted: Option<Protocol>) -> Result<Protocol, BootError> {
    match wanted {
        Some(Protocol::Pvh) if kernel.pvh_entry.is_none() => Err(BootError::NoPvhEntry),
        Some(protocol) => Ok(protocol),
        // A bzImage comes with a setup header, which only the Linux protocol can hand on.
        None if kernel.setup.is_some() || kernel.pvh_entry.is_none() => Ok(Protocol::Linux64),
        None => Ok(Protocol::Pvh),
    }
}

/// The boot structures lie in low memory, which a guest could only lack if a caller made its map by hand.
fn check_boot_area(map: &MemoryMap) -> Result<(), BootError> {
    if map.is_usable(&(0..layout::BOOT_AREA_END)) {
        Ok(())
    } else {
        Err(BootError::NoLowMemory)
    }
}

fn check_command_line(cmdline: &str) -> Result<(), CommandLineError> {
    let limit = layout::CMDLINE_MAX - 1;
    if cmdline.len() > limit {
        return Err(CommandLineError::TooLong {
            length: cmdline.len(),
            limit,
        });
    }
    match cmdline
        .bytes()
        .position(|byte| byte.is_ascii_control() && !byte.is_ascii_whitespace())
    {
        Some(offset) => Err(CommandLineError::Control {
            byte: cmdline.as_bytes()[offset],
            offset,
        }),
        None => Ok(()),
    }
}
