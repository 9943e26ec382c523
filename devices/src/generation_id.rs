//! Virtual machine generation id (Microsoft, "Virtual Machine Generation ID", 2018): 16 bytes in guest memory that are different whenever the
//! guest may have been duplicated or taken back in time, so that it renews its random numbers and whatever else has to be unique.
//!
//! ```text
//!   GenerationId::set --writes--> 16 bytes in reserved guest memory <--reads-- driver of the device in the DSDT
//!          '--tells--> GenerationSink: Notify(device, 0x80) through the generic event device --interrupt--'
//! ```
//!
//! The bytes have to lie in memory that the guest's memory map reserves, at a multiple of 8, in a page that is not mapped as uncached for
//! anything else. The DSDT's device has [`HARDWARE_ID`], [`COMPATIBLE_IDS`] and `ADDR`, a package of the address's low and high 32 bits.
//! There is no register: what a driver does with the number cannot be seen from outside.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::interrupt::lock;

/// Bytes of the id.
pub const BYTES: u64 = 16;
/// `_HID` in the DSDT: of the form that ACPI 6.1.5 wants, and nobody else's; drivers go by [`COMPATIBLE_IDS`].
pub const HARDWARE_ID: &str = "SEPL0001";
/// `_CID` in the DSDT: the specification's, and the spellings that Linux looks for.
pub const COMPATIBLE_IDS: [&str; 3] = ["VM_Gen_Counter", "VM_GEN_COUNTER", "VMGENCTR"];
/// `_DDN` in the DSDT.
pub const DOS_NAME: &str = "VM_Gen_Counter";
/// What the device is notified with when the id has changed.
pub const NOTIFY_CHANGED: u8 = 0x80;

/// Tells the guest that the id is another now.
pub trait GenerationSink: Send + Sync {
    /// The id has changed: the device in the DSDT is to be notified with [`NOTIFY_CHANGED`]. Must not block.
    fn changed(&self);
}

/// Why there is no id where it was wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenerationError {
    /// The place is not in guest memory, or not aligned to 8 bytes.
    #[error("generation id: {address:#x} is not a multiple of 8 with {BYTES} bytes of guest memory")]
    Place {
        /// Guest physical address.
        address: u64,
    },
}

/// The id of one machine.
pub struct GenerationId {
    memory: GuestMemoryMmap,
    address: u64,
    sink: Arc<dyn GenerationSink>,
    /// Held while the bytes are written, so that two setters do not mix theirs.
    current: Mutex<[u8; BYTES as usize]>,
}

impl GenerationId {
    /// Writes `id` at guest physical address `address` of `memory`; the guest is not told yet, as it has not looked yet.
    ///
    /// `id` should be random (122 bits of a version 4 UUID at least), and the same again only for the same execution of the guest.
    ///
    /// # Errors
    ///
    /// [`GenerationError::Place`].
    pub fn new(
        memory: GuestMemoryMmap,
        address: u64,
        id: [u8; BYTES as usize],
        sink: Arc<dyn GenerationSink>,
    ) -> Result<Self, GenerationError> {
        let place = GuestAddress(address);
        if !address.is_multiple_of(8) || !memory.check_range(place, BYTES as usize) {
            return Err(GenerationError::Place { address });
        }
        memory
            .write_slice(&id, place)
            .map_err(|_| GenerationError::Place { address })?;
        Ok(Self {
            memory,
            address,
            sink,
            current: Mutex::new(id),
        })
    }

    /// Guest physical address of the id, for `ADDR`.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The id that the machine has.
    pub fn get(&self) -> [u8; BYTES as usize] {
        *lock(&self.current)
    }

    /// Gives the machine another id and tells the guest. Nothing happens if it is the one that it has.
    pub fn set(&self, id: [u8; BYTES as usize]) {
        let mut current = lock(&self.current);
        if *current == id {
            return;
        }
        *current = id;
        // Was in guest memory when the device was made, and guest memory never shrinks.
        let _ = self.memory.write_slice(&id, GuestAddress(self.address));
        drop(current);
        self.sink.changed();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const ADDRESS: u64 = 0xf028;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl GenerationSink for Count {
        fn changed(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    fn in_memory(memory: &GuestMemoryMmap) -> [u8; 16] {
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(ADDRESS)).unwrap();
        bytes
    }

    #[test]
    fn the_guest_finds_the_id_and_is_told_when_it_changes() {
        let (memory, count) = (memory(), Arc::new(Count::default()));
        let id = GenerationId::new(memory.clone(), ADDRESS, [7; 16], count.clone()).unwrap();
        assert_eq!((in_memory(&memory), id.address()), ([7; 16], ADDRESS));
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        id.set([8; 16]);
        assert_eq!((in_memory(&memory), id.get()), ([8; 16], [8; 16]));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_same_id_again_is_no_change() {
        let count = Arc::new(Count::default());
        let id = GenerationId::new(memory(), ADDRESS, [7; 16], count.clone()).unwrap();
        id.set([7; 16]);
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_place_that_a_driver_could_not_read_is_refused() {
        for address in [0xf024, 0xfff8, 0x1_0000, !7] {
            let refused = GenerationId::new(memory(), address, [7; 16], Arc::new(Count::default())).err();
            assert_eq!(refused, Some(GenerationError::Place { address }));
        }
    }
}
