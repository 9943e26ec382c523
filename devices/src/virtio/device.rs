//! What a virtio device implements, and what it gets to work with.
//!
//! ```text
//!            start (once, on the device's thread)
//!               |
//!               v        driver ready        doorbell: notify(queue)
//!           [resting] ----activate----> [active] <--' host file ready: ready(token)
//!            ^     ^                      |  |        configuration written: config_written
//!            |     '------ reset ---------'  '-- Fault::Violation: the transport calls reset, sets DEVICE_NEEDS_RESET and reports
//!            |                            '-- Fault::Host, panic: quarantine, for good
//!          stop (from either)
//! ```
//!
//! All methods run on the thread of the device's dispatch loop and never on a vCPU's, so they may make system calls; while they do, nothing
//! but this device waits. Between `reset` and the next `activate` a device has no queues and does not touch guest memory.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use event_manager::EventSet;
use vm_memory::GuestMemoryMmap;

use super::feature;
use super::queue::Virtqueue;
use super::violation::Violation;
use crate::dispatch::{DeviceError, DeviceEvent};

/// Tokens from this one on are the transport's; a device's own are below.
pub const FIRST_TRANSPORT_TOKEN: u32 = 1 << 31;

/// What a device is: its number in virtio 5 and how PCI classifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// Network card.
    Net,
    /// Block device.
    Block,
    /// Console.
    Console,
    /// Entropy source.
    Rng,
    /// Traditional memory balloon.
    Balloon,
    /// Socket device.
    Vsock,
    /// Memory device.
    Memory,
    /// File system.
    FileSystem,
    /// A device of this number that another process serves.
    Other(u16),
}

impl DeviceKind {
    /// The device's number (virtio 5).
    pub fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Memory => 24,
            Self::FileSystem => 26,
            Self::Other(id) => id,
        }
    }

    /// PCI class code: base class, subclass and interface from high to low (PCI Code and ID Assignment Specification).
    pub fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block => 0x01_80_00,
            Self::Console => 0x07_80_00,
            Self::FileSystem => 0x01_80_00,
            Self::Memory => 0x05_00_00,
            // "Other" of the base class that fits no other.
            Self::Rng | Self::Balloon | Self::Vsock | Self::Other(_) => 0xff_00_00,
        }
    }

    /// A short name for people and for threads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Memory => "memory",
            Self::FileSystem => "fs",
            Self::Other(_) => "vhost-user",
        }
    }
}

/// A device's configuration space as it is when the device is made (virtio 2.5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigLayout {
    /// Its bytes, little-endian fields.
    pub bytes: Vec<u8>,
    /// What the driver may write; writes elsewhere are dropped.
    pub writable: Vec<Range<usize>>,
}

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The driver broke a rule: the device rests until the driver resets it.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The host failed the device in a way that a reset cannot mend: it is quarantined.
    #[error("{0}")]
    Host(DeviceError),
}

/// A virtio device (see the module's head).
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Features of its own kind that it offers; the transport adds [`transport_features`](Self::transport_features).
    fn features(&self) -> u64;

    /// Features of rings and transport that it offers: all of [`feature::TRANSPORT`], or those of them that its rings can be
    /// used with, where it does not use them by [`Virtqueue`] alone. [`feature::VERSION_1`] has to be among them.
    fn transport_features(&self) -> u64 {
        feature::TRANSPORT
    }

    /// The largest size of each of its queues, powers of two up to [`MAX_SIZE`](super::queue::MAX_SIZE). Their number is fixed.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Its configuration space at the start; afterwards [`Context::update_config`] changes it.
    fn config(&self) -> ConfigLayout {
        ConfigLayout::default()
    }

    /// Watches the host's side. Runs once, before anything else.
    ///
    /// # Errors
    ///
    /// Whatever keeps the device from working: the machine does not start.
    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        let _ = context;
        Ok(())
    }

    /// The driver is ready: [`Context::features`] and [`Context::queue`] are set. Chains may be there already; a `notify` follows for each
    /// queue that is enabled.
    ///
    /// # Errors
    ///
    /// A [`Fault`].
    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let _ = context;
        Ok(())
    }

    /// The driver rang the doorbell of `queue`, which is enabled. It may have rung for nothing.
    ///
    /// # Errors
    ///
    /// A [`Fault`].
    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault>;

    /// There are `events` on what was watched with `token`. Also comes while the device rests.
    ///
    /// # Errors
    ///
    /// A [`Fault`].
    fn ready(&mut self, token: u32, events: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        let _ = (token, events, context);
        Ok(())
    }

    /// The driver wrote to the writable part of the configuration space, which [`Context::read_config`] reads.
    ///
    /// # Errors
    ///
    /// A [`Fault`].
    fn config_written(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let _ = context;
        Ok(())
    }

    /// The driver resets one queue: gives up its chains. When this returns, nothing may touch the queue or its buffers any more; the queue is
    /// gone from the context afterwards, and may come back later with a `notify`.
    fn reset_queue(&mut self, queue: u16, context: &mut Context<'_>) {
        let _ = (queue, context);
    }

    /// The device rests from now on: gives up all chains and what the driver had negotiated. When this returns, nothing may touch guest memory
    /// any more, so it waits for what the host is still doing there.
    fn reset(&mut self, context: &mut Context<'_>);

    /// The machine ends: brings out what must not be lost, at the latest by `deadline`. Nothing is called afterwards.
    fn stop(&mut self, deadline: Instant) {
        let _ = deadline;
    }
}

/// Gives memory back to the host.
pub trait Reclaim: Send + Sync {
    /// Drops what the `len` bytes of guest memory at `start` hold: the host takes the pages back, and the guest reads zeroes or what it writes
    /// next. Whole pages of 4096 bytes only. Ranges that belong to a client of the machine are left as they are.
    ///
    /// # Errors
    ///
    /// The range is not guest memory or not page-aligned, or the host refused.
    fn discard(&self, start: u64, len: u64) -> io::Result<()>;
}

/// What a device's transport does for it. All of these return at once.
pub trait Transport {
    /// Interrupts the driver for `queue`.
    fn interrupt(&self, queue: u16);

    /// Changes the configuration space and tells the driver, unless nothing is different.
    fn update_config(&self, offset: usize, bytes: &[u8]);

    /// Changes the configuration space without telling the driver, for fields that it looks at by itself.
    fn set_config(&self, offset: usize, bytes: &[u8]);

    /// Copies from the configuration space; bytes beyond its end are 0.
    fn read_config(&self, offset: usize, bytes: &mut [u8]);

    /// Rings the doorbell of `queue` as the driver would.
    fn ring(&self, queue: u16);

    /// The eventfds of `queue` for a process that serves it: the driver's doorbell, and one that interrupts the driver. `None` where the
    /// transport has none to give away (a masked or missing vector): the device then interrupts by [`Context::interrupt_now`].
    fn queue_fds(&self, queue: u16) -> (Option<RawFd>, Option<RawFd>);
}

/// Descriptors that a device's loop watches.
pub trait WatchList {
    /// Starts to watch.
    ///
    /// # Errors
    ///
    /// It is watched already, or cannot be.
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError>;
    /// Changes what is watched for.
    ///
    /// # Errors
    ///
    /// It is not watched.
    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError>;
    /// Ends watching.
    ///
    /// # Errors
    ///
    /// It is not watched.
    fn remove(&mut self, fd: RawFd) -> Result<(), DeviceError>;
    /// The device's name.
    fn device(&self) -> &str;
    /// Tells the device's owner.
    fn report(&self, event: DeviceEvent);
}

/// What a device's handlers get: its queues, guest memory, the way to the driver and to its owner.
pub struct Context<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemoryMmap,
    /// Gives pages back to the host.
    pub reclaim: &'a dyn Reclaim,
    /// One entry a queue; those that the driver has not enabled are `None`, and so are all while the device rests.
    pub queues: &'a mut [Option<Virtqueue>],
    /// What the driver accepted; 0 while the device rests.
    pub features: u64,
    /// Through which it is connected.
    pub transport: &'a dyn Transport,
    /// What its loop watches.
    pub watches: &'a mut dyn WatchList,
}

impl Context<'_> {
    /// The queue of index `index`, if the driver has enabled it.
    pub fn queue(&mut self, index: u16) -> Option<&mut Virtqueue> {
        self.queues.get_mut(usize::from(index))?.as_mut()
    }

    /// Whether the driver accepted all of `features`.
    pub fn accepted(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Whether the driver is ready and no fault stopped the device.
    pub fn active(&self) -> bool {
        self.features != 0
    }

    /// Interrupts the driver if chains of `queue` were given back that it wants to be told of.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the rings are not where they were.
    pub fn interrupt(&mut self, queue: u16) -> Result<(), Violation> {
        if let Some(Some(ring)) = self.queues.get_mut(usize::from(queue))
            && ring.needs_interrupt()?
        {
            self.transport.interrupt(queue);
        }
        Ok(())
    }

    /// Interrupts the driver for `queue`, whatever its rings say.
    pub fn interrupt_now(&self, queue: u16) {
        self.transport.interrupt(queue);
    }

    /// Has `notify` called again for `queue` after other events had their turn: for a device that has done its share for now.
    pub fn ring(&self, queue: u16) {
        self.transport.ring(queue);
    }

    /// Changes the configuration space from `offset` on and tells the driver, unless nothing is different. What goes past the end is dropped.
    pub fn update_config(&self, offset: usize, bytes: &[u8]) {
        self.transport.update_config(offset, bytes);
    }

    /// Changes the configuration space from `offset` on without telling the driver: for fields that it looks at by itself. What goes past the
    /// end is dropped.
    pub fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.transport.set_config(offset, bytes);
    }

    /// Copies from the configuration space, also what the driver wrote.
    pub fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        self.transport.read_config(offset, bytes);
    }

    /// Watches `fd` (level-triggered unless `events` says otherwise); [`VirtioDevice::ready`] gets `token`, which has to be below
    /// [`FIRST_TRANSPORT_TOKEN`].
    ///
    /// # Errors
    ///
    /// The descriptor is watched already, cannot be watched (a regular file), or the token is the transport's.
    pub fn watch(&mut self, fd: &impl AsRawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        if token >= FIRST_TRANSPORT_TOKEN {
            return Err(format!("the token {token:#x} belongs to the transport").into());
        }
        self.watches.add(fd.as_raw_fd(), token, events)
    }

    /// Changes the events watched on `fd`.
    ///
    /// # Errors
    ///
    /// The descriptor is not watched.
    pub fn rewatch(&mut self, fd: &impl AsRawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        self.watches.modify(fd.as_raw_fd(), token, events)
    }

    /// Ends watching `fd`; must come before it is closed.
    ///
    /// # Errors
    ///
    /// The descriptor is not watched.
    pub fn unwatch(&mut self, fd: &impl AsRawFd) -> Result<(), DeviceError> {
        self.watches.remove(fd.as_raw_fd())
    }

    /// The device's name, for its events.
    pub fn name(&self) -> &str {
        self.watches.device()
    }

    /// Tells the device's owner. A fault needs no report of its own.
    pub fn report(&self, event: DeviceEvent) {
        self.watches.report(event);
    }
}
