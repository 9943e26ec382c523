//! Why a guest could not be made ready to boot.

use std::io;

use vm_memory::GuestMemoryError;

use super::{BzImageError, Compression, ElfError};

/// Why a guest could not be made ready to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line cannot be used.
    #[error("command line: {0}")]
    CommandLine(#[from] CommandLineError),
    /// The file is neither ELF nor bzImage.
    #[error("kernel: neither an x86-64 ELF file nor a bzImage, but {seen}")]
    NotAKernel {
        /// What its first bytes look like.
        seen: String,
    },
    /// The ELF file, or the one inside the bzImage, cannot be loaded.
    #[error("kernel: {0}")]
    Elf(#[from] ElfError),
    /// The bzImage's header rules it out.
    #[error("kernel: bzImage: {0}")]
    BzImage(#[from] BzImageError),
    /// The bzImage's payload does not decompress.
    #[error("kernel: the {format} payload is damaged after {offset} decompressed bytes: {source}")]
    Decompress {
        /// How it is compressed.
        format: Compression,
        /// Bytes that came out before.
        offset: u64,
        /// What the decoder says.
        source: io::Error,
    },
    /// PVH was asked for and the kernel does not offer it.
    #[error("kernel: PVH entry was asked for, but the kernel has no XEN_ELFNOTE_PHYS32_ENTRY note")]
    NoPvhEntry,
    /// The initramfs cannot be used.
    #[error("initramfs: {0}")]
    Initrd(#[from] InitrdError),
    /// A file is not a regular one, so it has no size and cannot be read at an offset.
    #[error("{what}: not a regular file")]
    NotRegular {
        /// Which file.
        what: &'static str,
    },
    /// A file could not be read.
    #[error("{what}: could not read at offset {offset:#x}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Where.
        offset: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// A file ended before what its headers, or its size when it was opened, promise.
    #[error("{what}: ends at offset {end:#x}, {missing} bytes too early")]
    Truncated {
        /// Which file, or `kernel payload` for what comes out of a bzImage.
        what: &'static str,
        /// Where it ends.
        end: u64,
        /// Bytes that are not there.
        missing: u64,
    },
    /// The guest has no RAM where the boot structures go.
    #[error(
        "the guest has no memory below {:#x}, where the boot structures go",
        crate::layout::BOOT_AREA_END
    )]
    NoLowMemory,
    /// The memory map has more ranges than the boot protocol can pass on.
    #[error("the memory map has {count} ranges, the boot protocol can pass on {most}")]
    MapTooLong {
        /// How many there are.
        count: usize,
        /// How many fit.
        most: usize,
    },
    /// Guest memory could not be written, though all addresses were checked.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The cancel flag was set.
    #[error("loading the kernel was cancelled")]
    Cancelled,
}

/// What is wrong with a command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// Longer than the guest reads.
    #[error("{length} bytes are too long, the limit is {limit}")]
    TooLong {
        /// Its bytes, without NUL.
        length: usize,
        /// The most possible.
        limit: usize,
    },
    /// A NUL or another control character, except white space.
    #[error("control character {byte:#04x} at offset {offset}")]
    Control {
        /// The character.
        byte: u8,
        /// Where, in bytes.
        offset: usize,
    },
}

/// What is wrong with an initramfs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitrdError {
    /// The file is empty.
    #[error("the file is empty")]
    Empty,
    /// No free stretch of memory is large enough.
    #[error(
        "{size} bytes do not fit: below {limit:#x} and beside the kernel, the largest free stretch of guest memory \
         has {free} bytes"
    )]
    NoRoom {
        /// Its bytes.
        size: u64,
        /// Its end must not be above this.
        limit: u64,
        /// Bytes of the largest stretch.
        free: u64,
    },
}

/// What kind of fault an error is, as the protocol's error kinds have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootErrorClass {
    /// The kernel, or what goes with it, could not be loaded.
    KernelLoad,
    /// A field of the configuration is out of range, or contradicts another.
    BadConfig,
}

/// What the initramfs is called in errors.
pub(super) const INITRAMFS: &str = "initramfs";

impl BootError {
    /// The field of a guest's configuration that is at fault.
    pub fn field(&self) -> &'static str {
        match self {
            Self::CommandLine(_) => "cmdline",
            Self::Initrd(_) => "initrd",
            Self::NotRegular { what } | Self::Read { what, .. } | Self::Truncated { what, .. }
                if *what == INITRAMFS =>
            {
                "initrd"
            }
            Self::NoLowMemory | Self::MapTooLong { .. } | Self::Memory(_) => "memory",
            _ => "kernel",
        }
    }

    /// The class of the fault.
    pub fn class(&self) -> BootErrorClass {
        match self {
            Self::CommandLine(_) | Self::NoPvhEntry | Self::Initrd(_) | Self::NotRegular { .. } => {
                BootErrorClass::BadConfig
            }
            _ => BootErrorClass::KernelLoad,
        }
    }
}
