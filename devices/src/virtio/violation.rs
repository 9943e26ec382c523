//! How a driver can break the rules of a ring or of a device.

/// Something that a driver did and must not do. The sentence names the queue and what was wrong with it; it goes into the event that reports
/// the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A queue was enabled whose rings are not in guest memory, not aligned, or not of a legal size.
    #[error("queue {queue}: {reason}")]
    Setup {
        /// The queue's index.
        queue: u16,
        /// What is wrong with it.
        reason: String,
    },
    /// The available index ran ahead of what the ring can hold.
    #[error("queue {queue}: the available index {index} is {ahead} entries ahead in a ring of {size}")]
    AvailableIndex {
        /// The queue's index.
        queue: u16,
        /// What the driver wrote.
        index: u16,
        /// Its distance from the next entry to take.
        ahead: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor index points outside of its table.
    #[error("queue {queue}: descriptor {index} is outside of the table of {size}")]
    DescriptorIndex {
        /// The queue's index.
        queue: u16,
        /// The index.
        index: u32,
        /// Entries of the table.
        size: u32,
    },
    /// A chain has more descriptors than the queue has entries: it is a loop, or longer than the rules allow (virtio 2.7.5.3.1).
    #[error("queue {queue}: the chain at descriptor {head} is a loop, or longer than the {most} descriptors allowed")]
    ChainLength {
        /// The queue's index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
        /// The most that are allowed.
        most: u16,
    },
    /// A buffer does not lie in guest memory.
    #[error("queue {queue}: the buffer of {len:#x} bytes at {address:#x} is not in guest memory")]
    Address {
        /// The queue's index.
        queue: u16,
        /// First guest physical address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A buffer that the device is to read follows one that it is to write (virtio 2.7.4.2).
    #[error("queue {queue}: the chain at descriptor {head} has a readable buffer after a writable one")]
    Order {
        /// The queue's index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table is misused: nested, combined with a further descriptor, of an odd length, or without the feature.
    #[error("queue {queue}: the chain at descriptor {head} has an indirect table that {reason}")]
    Indirect {
        /// The queue's index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
        /// How.
        reason: &'static str,
    },
    /// A chain's buffers together have more than 2^32 - 1 bytes (virtio 2.7.5.2).
    #[error("queue {queue}: the chain at descriptor {head} has more bytes than a chain may have")]
    ChainBytes {
        /// The queue's index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A chain is too short, or too long, for what the device is to do with it.
    #[error("queue {queue}: {what}: {got} bytes, expected {expected}")]
    Length {
        /// The queue's index.
        queue: u16,
        /// Which part of the request.
        what: &'static str,
        /// Bytes that the driver gave.
        got: u64,
        /// What is required, in words.
        expected: &'static str,
    },
    /// A buffer goes the wrong way for this queue.
    #[error("queue {queue}: {what}")]
    Direction {
        /// The queue's index.
        queue: u16,
        /// What the device expected.
        what: &'static str,
    },
    /// A rule of the device's own.
    #[error("queue {queue}: {reason}")]
    Device {
        /// The queue's index.
        queue: u16,
        /// Which rule, and what the driver did.
        reason: String,
    },
}
