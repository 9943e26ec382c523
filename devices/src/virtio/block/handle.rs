//! A disk's host side: what the machine's owner sees of it and asks of it, from any thread and without waiting.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::BlockInfo;
use super::request::Operation;
use crate::interrupt::lock;

/// What a disk did since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards and zeroings that succeeded.
    pub discards: u64,
    /// Requests for the id.
    pub ids: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Requests that ended with an I/O error.
    pub errors: u64,
    /// Requests that the host is working on.
    pub in_flight: u64,
}

/// [`BlockStats`] while they are counted, by the device's thread alone.
#[derive(Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    ids: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
    in_flight: AtomicU64,
}

/// Adds to a counter that only one thread writes.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Counters {
    /// A request of `len` bytes of data succeeded.
    pub(super) fn succeeded(&self, operation: Operation, len: u64) {
        match operation {
            Operation::Read => {
                add(&self.reads, 1);
                add(&self.read_bytes, len);
            }
            Operation::Write => {
                add(&self.writes, 1);
                add(&self.written_bytes, len);
            }
            Operation::Flush => add(&self.flushes, 1),
            Operation::Discard | Operation::WriteZeroes { .. } => add(&self.discards, 1),
        }
    }

    pub(super) fn told_id(&self) {
        add(&self.ids, 1);
    }

    pub(super) fn failed(&self) {
        add(&self.errors, 1);
    }

    pub(super) fn in_flight(&self, n: usize) {
        self.in_flight.store(n as u64, Ordering::Relaxed);
    }
}

/// Why a disk does not get another size.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// Only the file of a raw disk that the guest may write can be made longer or shorter.
    #[error("{id:?}: {reason}")]
    NotSupported {
        /// The disk's id.
        id: String,
        /// Why not.
        reason: &'static str,
    },
    /// The size is 0 or has a part of a block at its end.
    #[error("{id:?}: {bytes} bytes are not a multiple of the block size {block_size} above 0")]
    Size {
        /// The disk's id.
        id: String,
        /// The size that was asked for, or that the image has.
        bytes: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The image would be cut, and nobody has said that it may be.
    #[error("{id:?}: the image has {there} bytes: what is behind {bytes} would be lost")]
    Cuts {
        /// The disk's id.
        id: String,
        /// The size that was asked for.
        bytes: u64,
        /// The size that the image has.
        there: u64,
    },
    /// The host refused.
    #[error("{id:?}: the image cannot be resized: {error}")]
    Host {
        /// The disk's id.
        id: String,
        /// What the host said.
        error: std::io::Error,
    },
    /// The device has ended.
    #[error("the disk is gone")]
    Gone,
}

/// Gets the new size in bytes, on the device's thread; must not block.
pub(super) type Resized = Box<dyn FnOnce(Result<u64, ResizeError>) + Send>;

/// A size that was asked for.
pub(super) struct Resize {
    pub(super) bytes: u64,
    /// Whether the image may be cut.
    pub(super) shrink: bool,
    pub(super) then: Resized,
}

#[derive(Default)]
struct Orders {
    resizes: VecDeque<Resize>,
    gone: bool,
}

/// What the device's thread and its handles share. Locks are held for copies only.
pub(super) struct Shared {
    info: Mutex<BlockInfo>,
    pub(super) counters: Counters,
    orders: Mutex<Orders>,
    ordered: EventFd,
}

impl Shared {
    pub(super) fn new(info: BlockInfo) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            info: Mutex::new(info),
            counters: Counters::default(),
            orders: Mutex::default(),
            ordered: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        }))
    }

    pub(super) fn change_info(&self, change: impl FnOnce(&mut BlockInfo)) {
        change(&mut lock(&self.info));
    }

    /// What was ordered since the last call.
    pub(super) fn take_orders(&self) -> VecDeque<Resize> {
        let _ = self.ordered.read();
        std::mem::take(&mut lock(&self.orders).resizes)
    }

    /// Refuses what was ordered and not done, and all that will be.
    pub(super) fn end(&self) {
        let mut orders = lock(&self.orders);
        orders.gone = true;
        let left = std::mem::take(&mut orders.resizes);
        drop(orders);
        for resize in left {
            (resize.then)(Err(ResizeError::Gone));
        }
    }
}

impl AsRawFd for Shared {
    /// Readable when something was ordered.
    fn as_raw_fd(&self) -> RawFd {
        self.ordered.as_raw_fd()
    }
}

/// The host side of a [`Block`](super::Block).
#[derive(Clone)]
pub struct BlockHandle(pub(super) Arc<Shared>);

impl BlockHandle {
    /// Asks for another size in bytes, a multiple of the block size; 0: the size that the image has by now. The file of a raw disk that the guest
    /// may write is made so long, or with `shrink` cut; other disks only take over the size of a raw image. `then` gets the new size on the device's
    /// thread once the driver is told, or why it has not changed; it must not block.
    pub fn resize(&self, bytes: u64, shrink: bool, then: impl FnOnce(Result<u64, ResizeError>) + Send + 'static) {
        let mut orders = lock(&self.0.orders);
        if orders.gone {
            drop(orders);
            return then(Err(ResizeError::Gone));
        }
        orders.resizes.push_back(Resize {
            bytes,
            shrink,
            then: Box::new(then),
        });
        drop(orders);
        // An eventfd that cannot take more is readable anyway.
        let _ = self.0.ordered.write(1);
    }

    /// What it did so far.
    pub fn stats(&self) -> BlockStats {
        let Counters {
            reads,
            writes,
            flushes,
            discards,
            ids,
            read_bytes,
            written_bytes,
            errors,
            in_flight,
        } = &self.0.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockStats {
            reads: get(reads),
            writes: get(writes),
            flushes: get(flushes),
            discards: get(discards),
            ids: get(ids),
            read_bytes: get(read_bytes),
            written_bytes: get(written_bytes),
            errors: get(errors),
            in_flight: get(in_flight),
        }
    }

    /// What it is like now.
    pub fn info(&self) -> BlockInfo {
        lock(&self.0.info).clone()
    }
}

impl std::fmt::Debug for BlockHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockHandle").field("info", &self.info()).finish()
    }
}
