//! What a function on the bus is, and what it needs of the machine.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::Msi;

/// A memory range that a function wants to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its base address register.
    pub index: u8,
    /// First guest physical address.
    pub address: u64,
    /// Bytes, a power of two.
    pub size: u64,
}

/// A function on the bus. Its methods run on vCPUs' threads and must not block; a panic quarantines the function.
pub trait PciFunction: Send + Sync {
    /// Fills `data` (1 to 8 bytes) with configuration space from `offset` on; the access lies inside of the 4096 bytes.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Takes a write to configuration space.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// The memory that it wants to answer as its registers are now, whatever others want.
    fn bars(&self) -> Vec<Bar>;

    /// A BAR now answers at `address`, or nowhere. The calls for one function never overlap, and come in the order of the changes.
    fn bar_moved(&self, index: u8, address: Option<u64>);

    /// Fills `data` (1 to 8 bytes) with a BAR's memory from `offset` on; the access lies inside of the BAR.
    fn read_bar(&self, index: u8, offset: u64, data: &mut [u8]);

    /// Takes a write to a BAR's memory.
    fn write_bar(&self, index: u8, offset: u64, data: &[u8]);
}

/// One way for messages into the guest: implemented by the machine, for example by an irqfd. Dropped, it is free for others.
pub trait MsiVector: Send + Sync {
    /// Sends the message that it was last given. One system call at most.
    fn trigger(&self);

    /// What somebody else (a device in another process) can write to instead, if there is such a thing.
    fn event_fd(&self) -> Option<&EventFd>;

    /// What somebody else writes stays where it is from now on, or goes out again; what was written meanwhile goes out, too, as one message. On
    /// vCPUs' threads only.
    fn hold(&self, held: bool);

    /// Whether somebody else wrote while it was held. Forgets that.
    fn take_held(&self) -> bool;

    /// Its number among the machine's interrupts (GSI).
    fn gsi(&self) -> u32;
}

/// Where messages get their way into the guest: implemented by the machine.
pub trait MsiVectors: Send + Sync {
    /// A new way, which leads nowhere yet.
    ///
    /// # Errors
    ///
    /// The machine has no more, or the host has no more descriptors.
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>>;

    /// Gives each vector its message; takes effect before it returns.
    fn route(&self, routes: &[(Arc<dyn MsiVector>, Msi)]);
}

/// Where guests ring for a queue: implemented by the machine, for example by an ioeventfd. A write of any width at the address is the ring.
pub trait Doorbells: Send + Sync {
    /// From now on a guest's write at `address` makes `bell` ready without anybody's help.
    ///
    /// # Errors
    ///
    /// The machine has no more, or the address is taken. The write then comes to the function as any other.
    fn attach(&self, address: u64, bell: &EventFd) -> io::Result<()>;

    /// Ends that.
    fn detach(&self, address: u64, bell: &EventFd);
}
