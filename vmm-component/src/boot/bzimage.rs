//! bzImage: the setup header of the Linux boot protocol (`Documentation/arch/x86/boot.rst`). Pure.

use std::ops::Range;

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::ByteValued;

use super::{CommandLineError, Compression};

/// Bytes of a file that hold the setup header.
pub(super) const HEAD: usize = HEADER_START + HEADER_MOST;

/// Where the setup header starts.
const HEADER_START: usize = 0x1f1;
/// Bytes between there and the next field of the zero page, the most that a header can have.
const HEADER_MOST: usize = 0x290 - HEADER_START;
/// "HdrS" and where it stands.
const MAGIC: &[u8; 4] = b"HdrS";
const MAGIC_AT: usize = 0x202;
/// The header ends at 0x202 plus the byte here.
const LENGTH_AT: usize = 0x201;
const BOOT_FLAG: u16 = 0xaa55;
/// The first version with `xloadflags`.
const LEAST_VERSION: u16 = 0x20c;
const SECTOR: u64 = 512;

/// What is wrong with a bzImage's setup header.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// The file ends within the header.
    #[error("the file has {0} bytes and ends within the setup header")]
    Short(u64),
    /// "HdrS" is there, the signature of a boot sector is not.
    #[error("boot_flag is {0:#06x}, it should be {BOOT_FLAG:#06x}: the header is damaged")]
    BootFlag(u16),
    /// Older than the 64-bit entry.
    #[error("boot protocol {}.{:02} is too old, 2.12 is the least", .0 >> 8, .0 & 0xff)]
    Version(u16),
    /// A 32-bit kernel, or one without the 64-bit entry.
    #[error("xloadflags {0:#x} lacks XLF_KERNEL_64: it is no 64-bit kernel")]
    Not64Bit(u16),
    /// A zImage.
    #[error("loadflags {0:#x} lacks LOADED_HIGH: it is a zImage")]
    NotHigh(u8),
    /// The header's length byte ends it before its fields.
    #[error("the setup header has {length:#x} bytes, {least:#x} are needed")]
    HeaderLength {
        /// Its bytes.
        length: usize,
        /// The least possible.
        least: usize,
    },
    /// The payload does not lie in the file.
    #[error("the payload at {start:#x}..{end:#x} is not in the file, which has {file:#x} bytes")]
    PayloadOutside {
        /// First byte.
        start: u64,
        /// First byte after it.
        end: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// The payload's format is known and not supported.
    #[error("the payload is compressed with {0}, which is not supported (gzip, xz, zstd, lz4 and none are)")]
    Unsupported(&'static str),
    /// The payload's format is unknown.
    #[error("the payload is of an unknown format, it starts with {0:02x?}")]
    UnknownPayload(Vec<u8>),
}

/// A checked setup header.
#[derive(Clone, Debug)]
pub(super) struct SetupHeader {
    header: setup_header,
    payload: Range<u64>,
}

/// True if a file that starts with `head` claims to be a bzImage.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC_AT..MAGIC_AT + 4) == Some(MAGIC)
}

impl SetupHeader {
    /// Reads the header of a file of `file` bytes that starts with `head`.
    pub(super) fn parse(head: &[u8], file: u64) -> Result<SetupHeader, BzImageError> {
        // A shorter header leaves the fields that it has not at 0.
        let end = MAGIC_AT + usize::from(*head.get(LENGTH_AT).ok_or(BzImageError::Short(file))?);
        let length = end - HEADER_START;
        let mut header = setup_header::default();
        // Up to and with init_size, the last field that is used here.
        let least = size_of::<setup_header>() - 8;
        if length < least {
            return Err(BzImageError::HeaderLength { length, least });
        }
        let known = length.min(size_of::<setup_header>());
        let bytes = head
            .get(HEADER_START..HEADER_START + known)
            .ok_or(BzImageError::Short(file))?;
        header.as_mut_slice()[..known].copy_from_slice(bytes);

        let version = header.version;
        let boot_flag = header.boot_flag;
        if boot_flag != BOOT_FLAG {
            return Err(BzImageError::BootFlag(boot_flag));
        }
        if version < LEAST_VERSION {
            return Err(BzImageError::Version(version));
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BzImageError::Not64Bit(header.xloadflags));
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(BzImageError::NotHigh(header.loadflags));
        }
        // 0 stands for 4, for the sake of very old kernels.
        let sectors = if header.setup_sects == 0 {
            4
        } else {
            u64::from(header.setup_sects)
        };
        let start = (sectors + 1) * SECTOR + u64::from(header.payload_offset);
        let end = start + u64::from(header.payload_length);
        if start == end || end > file {
            return Err(BzImageError::PayloadOutside { start, end, file });
        }
        Ok(SetupHeader {
            header,
            payload: start..end,
        })
    }

    /// Where the compressed kernel is in the file.
    pub(super) fn payload(&self) -> Range<u64> {
        self.payload.clone()
    }

    /// The header, to be handed on in the zero page.
    pub(super) fn header(&self) -> setup_header {
        self.header
    }

    /// First address that the initramfs may not reach.
    pub(super) fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// What the kernel uses before it knows its memory: it asks for this much from where it starts.
    pub(super) fn init_area(&self, start: u64) -> Range<u64> {
        start..start.saturating_add(self.header.init_size.into())
    }

    /// Checks the command line against the kernel's own limit.
    pub(super) fn check_command_line(&self, cmdline: &str) -> Result<(), CommandLineError> {
        let limit = self.header.cmdline_size as usize;
        if cmdline.len() > limit {
            Err(CommandLineError::TooLong {
                length: cmdline.len(),
                limit,
            })
        } else {
            Ok(())
        }
    }
}

/// How a payload that starts with `head` is compressed.
pub(super) fn compression(head: &[u8]) -> Result<Compression, BzImageError> {
    const SUPPORTED: &[(&[u8], Compression)] = &[
        (b"\x7fELF", Compression::None),
        (b"\x1f\x8b", Compression::Gzip),
        (b"\xfd7zXZ\0", Compression::Xz),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x02\x21\x4c\x18", Compression::Lz4),
    ];
    const UNSUPPORTED: &[(&[u8], &str)] = &[(b"\x5d\0\0", "lzma"), (b"\x89LZO", "lzo"), (b"BZh", "bzip2")];
    if let Some((_, compression)) = SUPPORTED.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Ok(*compression);
    }
    if let Some((_, name)) = UNSUPPORTED.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(BzImageError::Unsupported(name));
    }
    Err(BzImageError::UnknownPayload(head.to_vec()))
}
