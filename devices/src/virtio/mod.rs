//! virtio devices (OASIS virtio 1.2, called "virtio" below), whatever the transport.
//!
//! ```text
//!   driver's rings in guest memory
//!        ^      |
//!        |      v
//!   queue::Virtqueue --pop--> chain::Chain --reader/writer--> device::VirtioDevice <--> host file, socket, handle of its owner
//!        ^                                                        |
//!        '------------------ push, interrupt ---- device::Context-'
//! ```
//!
//! - [`device::VirtioDevice`] is what each device implements. It runs on the thread of its own dispatch loop and knows nothing of PCI.
//! - [`queue`] and [`chain`] read the driver's rings and check every length, index and address before a device sees it.
//! - A driver that breaks the rules is a [`violation::Violation`]: the transport sets DEVICE_NEEDS_RESET and that device alone rests until the
//!   driver resets it.
//! - `testing` drives a device by rings written by hand, without a virtual machine.

mod access;
pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
mod link;
#[cfg(test)]
pub(crate) mod malformed;
pub mod memory;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod violation;
pub mod vsock;
pub mod worker;

/// Feature bits that belong to the transport and the rings (virtio 6), which no device offers by itself.
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC: a descriptor may refer to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX: each side says from which index on it wants to be told.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1: not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_RING_RESET: single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// What every device has through its transport.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// Bits of the device status register (virtio 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up; the device works.
    pub const DRIVER_OK: u8 = 4;
    /// The driver has accepted features, and the device agrees.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on until it is reset.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver has given up on the device.
    pub const FAILED: u8 = 128;
}
