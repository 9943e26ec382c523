//! Why guest memory could not be made.

use std::io;

use vm_memory::GuestRegionCollectionError;

use super::MIB;

/// Why guest memory could not be made. Sizes are in bytes; the messages round them to MiB.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not a multiple of 1 MiB.
    #[error("memory: {size} bytes is not a multiple of 1 MiB")]
    NotMebibytes {
        /// What was asked for.
        size: u64,
    },
    /// Less than a guest can start with.
    #[error("memory: {} MiB is too little, a guest needs at least {} MiB", size / MIB, least / MIB)]
    TooSmall {
        /// What was asked for.
        size: u64,
        /// The least possible.
        least: u64,
    },
    /// More than the machine can address.
    #[error("memory: {} MiB is too much, a guest can address at most {} MiB", size / MIB, most / MIB)]
    TooLarge {
        /// What was asked for.
        size: u64,
        /// The most possible.
        most: u64,
    },
    /// More than the host has, whatever else it does.
    #[error("memory: {} MiB is more than the host has: {} MiB in all, {} MiB of them unused now", size / MIB, total / MIB, free / MIB)]
    MoreThanHost {
        /// What was asked for.
        size: u64,
        /// The host's RAM.
        total: u64,
        /// The part of it that is used for nothing, not even as page cache.
        free: u64,
    },
    /// Too many custom ranges.
    #[error("custom memory: {count} ranges, at most {most} are possible")]
    TooManyRanges {
        /// What was asked for.
        count: usize,
        /// The most possible.
        most: usize,
    },
    /// A custom range cannot be used.
    #[error("custom memory range {index}: {reason}")]
    Custom {
        /// Its place in the configuration, from 0.
        index: usize,
        /// What is wrong with it.
        reason: CustomRangeError,
    },
    /// The host refused a step.
    #[error("guest memory: could not {what}: {source}")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The regions contradict each other, which the checks before exclude.
    #[error("guest memory: {source}")]
    Regions {
        /// What the memory model says.
        source: GuestRegionCollectionError,
    },
    /// The creation was interrupted.
    #[error("guest memory: cancelled")]
    Cancelled,
}

/// What is wrong with a custom range.
#[derive(Debug, thiserror::Error)]
pub enum CustomRangeError {
    /// It ends where it starts, or before.
    #[error("it is empty: start {start:#x}, end {end:#x}")]
    Empty {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// An address is not a multiple of the page size.
    #[error("{start:#x}..{end:#x} is not aligned to {alignment:#x}, the backing file's page size")]
    Alignment {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
        /// What both must be multiples of.
        alignment: u64,
    },
    /// It meets the hole below 4 GiB, where devices are.
    #[error(
        "{start:#x}..{end:#x} meets the device hole {:#x}..{:#x}",
        crate::layout::HOLE_START,
        crate::layout::HOLE_END
    )]
    Hole {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// It ends above what the machine can address.
    #[error("it ends at {end:#x}, beyond the last address {most:#x}")]
    Beyond {
        /// First address after it.
        end: u64,
        /// The highest possible end.
        most: u64,
    },
    /// It shares addresses with another custom range.
    #[error("it overlaps custom memory range {other}")]
    Overlap {
        /// The other's place in the configuration.
        other: usize,
    },
    /// The file does not live in memory.
    #[error("the file is no memfd: {source}")]
    NotMemfd {
        /// What asking for its seals gave.
        source: io::Error,
    },
    /// The file is smaller than the range.
    #[error("the memfd has {size:#x} bytes, the range has {range:#x}")]
    TooShort {
        /// Bytes of the file.
        size: u64,
        /// Bytes of the range.
        range: u64,
    },
    /// The host refused a step.
    #[error("could not {what}: {source}")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl MemoryError {
    /// True if the configuration is at fault, false if the host could not do it or the creation was cancelled.
    pub fn is_bad_config(&self) -> bool {
        match self {
            Self::NotMebibytes { .. } | Self::TooSmall { .. } | Self::TooLarge { .. } | Self::TooManyRanges { .. } => {
                true
            }
            Self::Custom { .. } => true,
            Self::MoreThanHost { .. } | Self::Host { .. } | Self::Regions { .. } | Self::Cancelled => false,
        }
    }
}
