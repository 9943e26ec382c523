//! What a disk is made of, why it cannot be made, and what its configuration space says.

use std::os::fd::OwnedFd;

use super::engine::EngineKind;
use super::poll::DEFAULT_POLL;
use super::request::{ID_BYTES, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS, SECTOR};
use crate::rate::RateLimit;
use crate::virtio::device::ConfigLayout;

/// VIRTIO_BLK_F_SEG_MAX.
pub(super) const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub(super) const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub(super) const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_MQ.
pub(super) const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub(super) const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// Entries of each queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// Most data segments of a request: a chain has at most as many descriptors as its queue, and two are for the header and the status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes that hosts read and write best: a page.
const PHYSICAL_BLOCK: u32 = 4096;

/// What a guest may do to the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskMode {
    /// Read and write it.
    #[default]
    ReadWrite,
    /// Read it; the driver is told so, and writes are refused.
    ReadOnly,
    /// Read and write; what is written is kept beside the image and gone with the device. The image stays as it is, byte for byte.
    Volatile,
}

/// What the image's file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// The disk's bytes.
    #[default]
    Raw,
    /// A QEMU image of version 2 or 3.
    Qcow2,
}

impl DiskFormat {
    /// As it is written in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A disk.
#[derive(Debug)]
pub struct BlockConfig {
    /// What the guest reads as the serial number: at most 20 bytes.
    pub id: String,
    /// The image: a regular file or a block device, open for reading, and for writing with [`DiskMode::ReadWrite`].
    pub image: OwnedFd,
    /// What the guest may do to it.
    pub mode: DiskMode,
    /// What it holds.
    pub format: DiskFormat,
    /// What lies below a qcow2 image, nearest first, open for reading. Names inside of images are never followed.
    pub backing: Vec<OwnedFd>,
    /// The image has to have been opened with O_DIRECT, and is used so.
    pub direct: bool,
    /// Logical block size in bytes: 512 or 4096. The image's size has to be a multiple of it.
    pub block_size: u32,
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// How much may pass.
    pub rate_limit: RateLimit,
    /// For [`DiskMode::Volatile`]: an empty file that keeps what is written, unlinked for example. `None`: memory.
    pub scratch: Option<OwnedFd>,
    /// Whether an io_uring may be tried. A thread whose system-call filter kills instead of refusing has to say no.
    pub io_uring: bool,
    /// The longest that the device's thread looks for the driver's next request before it sleeps, while requests come that close. Zero: it sleeps
    /// at once.
    pub poll: std::time::Duration,
}

impl BlockConfig {
    /// A raw disk of one queue and 512-byte blocks that the guest may write, without limits.
    pub fn new(id: impl Into<String>, image: OwnedFd) -> Self {
        Self {
            id: id.into(),
            image,
            mode: DiskMode::default(),
            format: DiskFormat::default(),
            backing: Vec::new(),
            direct: false,
            block_size: 512,
            queues: 1,
            rate_limit: RateLimit::default(),
            scratch: None,
            io_uring: true,
            poll: DEFAULT_POLL,
        }
    }
}

/// Why a disk cannot be made. The sentences are about the file that each names: the image, or one of its backing files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The id does not fit the field that guests read.
    #[error("the id {0:?} is longer than {ID_BYTES} bytes")]
    Id(String),
    /// Only some block sizes are of use.
    #[error("a block size of {0} bytes; it has to be 512 or 4096")]
    BlockSize(u32),
    /// Too few or too many.
    #[error("{0} queues; there have to be 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// A directory, a socket, ...
    #[error("{file} is neither a regular file nor a block device")]
    NotAFile {
        /// Which file.
        file: FileRole,
    },
    /// The descriptor cannot be read from.
    #[error("{file} is not open for reading")]
    NotReadable {
        /// Which file.
        file: FileRole,
    },
    /// The descriptor cannot be written to.
    #[error("{file} is not open for writing")]
    NotWritable {
        /// Which file.
        file: FileRole,
    },
    /// Direct transfers were asked for.
    #[error("{file} was not opened with O_DIRECT")]
    NotDirect {
        /// Which file.
        file: FileRole,
    },
    /// Storage with large blocks cannot be written directly in small ones.
    #[error("direct transfers need a block size of at least {needed} bytes here, which is not {block_size}")]
    DirectAlignment {
        /// What the image's storage needs.
        needed: u32,
        /// What the disk was to have.
        block_size: u32,
    },
    /// There is nothing in it.
    #[error("the disk has a size of 0")]
    Empty,
    /// There is a part of a block at the end.
    #[error("the disk has {size} bytes, which is not a multiple of the block size {block_size}")]
    Size {
        /// Bytes.
        size: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The image is not of its format, or damaged.
    #[error("{file}: not a usable qcow2 image: {reason}")]
    Qcow2 {
        /// Which file.
        file: FileRole,
        /// What is wrong with it.
        reason: String,
    },
    /// The image's contents are encrypted.
    #[error("{file} is encrypted")]
    Encrypted {
        /// Which file.
        file: FileRole,
    },
    /// The image's contents lie in another file.
    #[error("{file} keeps its data in a file of their own")]
    ExternalData {
        /// Which file.
        file: FileRole,
    },
    /// An image has a backing file, and it was not given.
    #[error("{file} needs the backing file {name:?}, which was not given")]
    BackingMissing {
        /// Which file needs it.
        file: FileRole,
        /// What the image calls it.
        name: String,
    },
    /// More backing files were given than the images need.
    #[error("{given} backing files were given, {used} are needed")]
    BackingUnused {
        /// How many were given.
        given: usize,
        /// How many are needed.
        used: usize,
    },
    /// A backing file of a format that is not known.
    #[error("{file} has a backing file of the format {format:?}, which is neither raw nor qcow2")]
    BackingFormat {
        /// Which file says so.
        file: FileRole,
        /// The format.
        format: String,
    },
    /// The host refused something.
    #[error("{file}: {operation}: {error}")]
    Host {
        /// Which file.
        file: FileRole,
        /// What was to be done.
        operation: &'static str,
        /// What the host said.
        error: std::io::Error,
    },
}

/// Which of a disk's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// The image itself.
    Image,
    /// The n-th backing file, from 0.
    Backing(usize),
    /// What keeps the writes of a volatile disk.
    Scratch,
}

impl std::fmt::Display for FileRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image => f.write_str("the image"),
            Self::Backing(n) => write!(f, "backing file {n}"),
            Self::Scratch => f.write_str("the scratch file"),
        }
    }
}

/// What a disk is like, once it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// What the guest reads as the serial number.
    pub id: String,
    /// What the guest may do to it.
    pub mode: DiskMode,
    /// What its image holds.
    pub format: DiskFormat,
    /// Whether it goes around the page cache.
    pub direct: bool,
    /// Bytes that the guest sees.
    pub bytes: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Number of queues.
    pub queues: u16,
    /// Who does the host's work; `None` before the device has started.
    pub engine: Option<EngineKind>,
}

/// The features that a disk offers.
pub(super) fn features(mode: DiskMode, queues: u16) -> u64 {
    let mut features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
    if queues > 1 {
        features |= F_MQ;
    }
    features
        | if mode == DiskMode::ReadOnly {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        }
}

/// `struct virtio_blk_config` (virtio 5.2.4), of which drivers write nothing: CONFIG_WCE is not offered.
pub(super) fn layout(bytes: u64, block_size: u32, queues: u16, mode: DiskMode) -> ConfigLayout {
    let mut config = vec![0; 60];
    let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
    put(0, &(bytes / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block_size.to_le_bytes());
    // Topology: logical blocks in a physical one as a power of two, offset of the first, best and least sizes of transfers in logical blocks.
    let per_physical = PHYSICAL_BLOCK.max(block_size) / block_size;
    put(24, &[per_physical.trailing_zeros() as u8, 0]);
    put(26, &(per_physical as u16).to_le_bytes());
    put(34, &queues.to_le_bytes());
    if mode != DiskMode::ReadOnly {
        let block_sectors = block_size / SECTOR as u32;
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(PHYSICAL_BLOCK / SECTOR as u32).max(block_sectors).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        // Zeroed ranges may be deallocated.
        put(56, &[1]);
    }
    ConfigLayout {
        bytes: config,
        writable: Vec::new(),
    }
}
