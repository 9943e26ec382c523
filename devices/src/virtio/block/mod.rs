//! virtio block device (virtio 5.2): a disk of the guest's, behind it an image that was opened by somebody else.
//!
//! ```text
//!   chain --request::parse--> Job --run_at_once: page cache--------------------------------> status, used ring, interrupt
//!     ^                        |                                                                    ^
//!     | rate limit             '--would wait for storage--> engine: io_uring, or threads --Done-----'
//!   available ring                                              |
//!                                                    backend: raw file | qcow2 image | overlay on either
//! ```
//!
//! - [`BlockConfig`] names the open files; [`Block::new`] checks them. No path is ever opened.
//! - What the page cache can serve is done at once by the device's own thread, without a switch of threads; only what would wait for storage goes to
//!   an engine. Data goes between the kernel and guest memory without a copy, but for a direct disk's unaligned buffers and compressed clusters.
//! - [`BlockHandle`] is for the machine's owner.

mod backend;
mod buffers;
mod config;
mod device;
mod engine;
mod handle;
mod image;
mod overlay;
mod poll;
mod qcow2;
mod raw;
mod request;

pub use config::{BlockConfig, BlockError, BlockInfo, DiskFormat, DiskMode, FileRole, MAX_QUEUES};
pub use device::Block;
pub use engine::EngineKind;
pub use handle::{BlockHandle, BlockStats, ResizeError};
pub use poll::DEFAULT_POLL;

#[cfg(test)]
mod tests;
