//! A bus: which device answers which address.
//!
//! The machine has two, one for port I/O and one for memory-mapped I/O. A vCPU's exit looks its address up by binary search over disjoint
//! ranges and calls the device with the offset from the range's base. Devices can come and go while vCPUs run (hot-plug, a moved PCI
//! window); the lookup's lock is released before the device is called, so a slow device stops nobody but the vCPU that asked it.
//!
//! ```text
//!   vCPU exit (address, data) -> Bus: which range? -> BusDevice::read/write(offset, data)
//!                                  `- nobody, or the access crosses the range's end: refused, reads are all ones
//! ```
//!
//! A device that panics while it answers is quarantined: it is reported once, and from then on its addresses are answered as if nobody
//! were there. The vCPU and all other devices go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::dispatch::{DeviceEvent, DeviceReporter, panic_message};

/// A device that answers accesses to a range of ports or of physical addresses.
///
/// The offset is relative to the range's base, `data` holds 1 to 8 bytes in little-endian order, and the whole access lies inside the
/// range. Both methods run on a vCPU's thread: they must not block.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what a read at `offset` gives.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a write of `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A device whose registers are single bytes. Wide accesses are split into bytes at consecutive offsets, as an ISA bus does.
pub(crate) trait ByteDevice: Send + Sync {
    /// What a read of the byte at `offset` gives.
    fn read_byte(&self, offset: u64) -> u8;

    /// Takes a write of `value` at `offset`.
    fn write_byte(&self, offset: u64, value: u8);
}

impl<T: ByteDevice> BusDevice for T {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (n, byte) in (0..).zip(data) {
            *byte = self.read_byte(offset.saturating_add(n));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (n, byte) in (0..).zip(data) {
            self.write_byte(offset.saturating_add(n), *byte);
        }
    }
}

/// Why a device could not be put on a bus, or taken off it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range has no addresses.
    #[error("{name}: a range of length 0 at {base:#x} can answer nothing")]
    Empty {
        /// The device that was to be inserted.
        name: &'static str,
        /// First address of the range.
        base: u64,
    },
    /// The range goes past the last address.
    #[error("{name}: the range of {len:#x} addresses from {base:#x} goes past the end of the address space")]
    PastEnd {
        /// The device that was to be inserted.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Number of addresses.
        len: u64,
    },
    /// The range shares an address with a device that is already there.
    #[error("{name}: {base:#x}+{len:#x} overlaps {other} at {other_base:#x}+{other_len:#x}")]
    Overlap {
        /// The device that was to be inserted.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Number of addresses.
        len: u64,
        /// The device that is already there.
        other: &'static str,
        /// First address of its range.
        other_base: u64,
        /// Number of its addresses.
        other_len: u64,
    },
    /// No range starts at the address.
    #[error("no device is at {base:#x}")]
    NotThere {
        /// The address asked for.
        base: u64,
    },
}

/// A range of a bus and who answers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusRange {
    /// First address.
    pub base: u64,
    /// Number of addresses, at least 1.
    pub len: u64,
    /// The device's name, for messages.
    pub name: &'static str,
}

/// One device on the bus.
struct Slot {
    range: BusRange,
    device: Arc<dyn BusDevice>,
    /// Set for good when the device panicked.
    quarantined: AtomicBool,
}

/// A set of disjoint ranges, each with its device (see the module's head).
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, disjoint.
    slots: RwLock<Vec<Arc<Slot>>>,
    reporter: Option<Arc<dyn DeviceReporter>>,
}

impl Bus {
    /// An empty bus that tells nobody about a device that panics (it is logged).
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty bus that reports a device that panics to `reporter`, as [`DeviceEvent::Failed`].
    pub fn with_reporter(reporter: Arc<dyn DeviceReporter>) -> Self {
        Self {
            slots: RwLock::default(),
            reporter: Some(reporter),
        }
    }

    /// Puts `device` at the addresses `base..base + len`.
    ///
    /// # Errors
    ///
    /// [`BusError::Empty`], [`BusError::PastEnd`], or [`BusError::Overlap`], which names both devices; the bus is unchanged then.
    pub fn insert(&self, base: u64, len: u64, name: &'static str, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        if len == 0 {
            return Err(BusError::Empty { name, base });
        }
        let Some(last) = base.checked_add(len - 1) else {
            return Err(BusError::PastEnd { name, base, len });
        };
        let mut slots = self.slots_mut();
        // Only the first range that ends at or after `base` can overlap: ranges are sorted and disjoint.
        let at = slots.partition_point(|slot| slot.range.base + (slot.range.len - 1) < base);
        if let Some(BusRange {
            base: other_base,
            len: other_len,
            name: other,
        }) = slots.get(at).map(|slot| slot.range)
            && other_base <= last
        {
            return Err(BusError::Overlap {
                name,
                base,
                len,
                other,
                other_base,
                other_len,
            });
        }
        let range = BusRange { base, len, name };
        slots.insert(
            at,
            Arc::new(Slot {
                range,
                device,
                quarantined: AtomicBool::new(false),
            }),
        );
        Ok(())
    }

    /// Takes the device whose range starts at `base` off the bus. An access that is under way ends normally.
    ///
    /// # Errors
    ///
    /// [`BusError::NotThere`] if no range starts there.
    pub fn remove(&self, base: u64) -> Result<(), BusError> {
        let mut slots = self.slots_mut();
        let at = slots
            .binary_search_by_key(&base, |slot| slot.range.base)
            .map_err(|_| BusError::NotThere { base })?;
        slots.remove(at);
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`. False: nobody answered, and `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let answered = match self.find(address, data.len()) {
            Some((slot, offset)) => self.guarded(&slot, || slot.device.read(offset, data)),
            None => false,
        };
        if !answered {
            data.fill(0xff);
        }
        answered
    }

    /// Writes `data` at `address`. False: nobody was there to take it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((slot, offset)) => self.guarded(&slot, || slot.device.write(offset, data)),
            None => false,
        }
    }

    /// The ranges in ascending order, as they are now.
    pub fn ranges(&self) -> impl Iterator<Item = BusRange> {
        let ranges: Vec<_> = self.slots().iter().map(|slot| slot.range).collect();
        ranges.into_iter()
    }

    /// The slot that holds the whole access, with the offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(Arc<Slot>, u64)> {
        if !(1..=8).contains(&len) {
            return None;
        }
        let slots = self.slots();
        let slot = slots.get(
            slots
                .partition_point(|slot| slot.range.base <= address)
                .checked_sub(1)?,
        )?;
        let offset = address - slot.range.base;
        let room = slot.range.len.checked_sub(offset)?;
        (len as u64 <= room).then(|| (Arc::clone(slot), offset))
    }

    /// Calls the device unless it is quarantined, and quarantines it if it panics. Whether it answered.
    fn guarded(&self, slot: &Slot, call: impl FnOnce()) -> bool {
        if slot.quarantined.load(Ordering::Relaxed) {
            return false;
        }
        // A broken invariant inside the device can't be seen from outside: it is never called again.
        let Err(panic) = catch_unwind(AssertUnwindSafe(call)) else {
            return true;
        };
        if !slot.quarantined.swap(true, Ordering::Relaxed) {
            let reason = panic_message(&*panic);
            match &self.reporter {
                Some(reporter) => reporter.report(DeviceEvent::Failed {
                    device: slot.range.name.into(),
                    reason,
                }),
                None => tracing::error!(
                    device = slot.range.name,
                    reason,
                    "device panicked on a bus access; its addresses are dead from now on"
                ),
            }
        }
        false
    }

    fn slots(&self) -> RwLockReadGuard<'_, Vec<Arc<Slot>>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> RwLockWriteGuard<'_, Vec<Arc<Slot>>> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
