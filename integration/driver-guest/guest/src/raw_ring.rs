//! A split ring written by hand, so that it can be wrong.

use alloc::vec::Vec;

use virtio_drivers::PAGE_SIZE;
use virtio_drivers::transport::Transport;

use crate::heap;
use crate::port::Port;

/// Entries of the ring.
pub(crate) const ENTRIES: u16 = 16;
/// Descriptor flags (virtio 2.7.5).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Shorthand.
pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// Descriptor table, available ring and used ring, a page each.
pub(crate) struct RawRing {
    pages: *mut u8,
}

impl RawRing {
    /// An empty ring; its pages are used by the next one, since the device was reset by then.
    pub(crate) fn new(pages: *mut u8) -> Self {
        // SAFETY: three pages, which no device uses any more.
        unsafe { pages.write_bytes(0, 3 * PAGE_SIZE) };
        Self { pages }
    }

    /// Pages for [`new`](Self::new).
    pub(crate) fn pages() -> *mut u8 {
        heap::leak_pages(3)
    }

    /// Makes it a queue of the device.
    pub(crate) fn set(&self, port: &mut Port, queue: u16) {
        let at = self.pages as u64;
        let page = PAGE_SIZE as u64;
        port.queue_set(queue, ENTRIES.into(), at, at + page, at + 2 * page);
    }

    /// Writes descriptors from the first on.
    pub(crate) fn describe(&self, descriptors: &[Descriptor]) {
        for (index, &descriptor) in descriptors.iter().enumerate().take(usize::from(ENTRIES)) {
            // SAFETY: inside the first page.
            unsafe { self.pages.cast::<Descriptor>().add(index).write_volatile(descriptor) };
        }
    }

    /// Writes heads to the available ring and sets its index.
    pub(crate) fn offer(&self, heads: &[u16], index: u16) {
        // SAFETY: inside the second page: flags, index, then the entries.
        unsafe {
            let available = self.pages.add(PAGE_SIZE).cast::<u16>();
            for (slot, &head) in heads.iter().enumerate().take(usize::from(ENTRIES)) {
                available.add(2 + slot).write_volatile(head);
            }
            core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
            available.add(1).write_volatile(index);
        }
    }

    /// How many chains the device has given back.
    pub(crate) fn used(&self) -> u16 {
        // SAFETY: inside the third page.
        unsafe { self.pages.add(2 * PAGE_SIZE).cast::<u16>().add(1).read_volatile() }
    }
}

/// An indirect table in memory of its own.
pub(crate) fn table(descriptors: Vec<Descriptor>) -> u64 {
    let page = heap::leak_pages(1);
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        // SAFETY: a table of a few descriptors fits into the page.
        unsafe { page.cast::<Descriptor>().add(index).write_volatile(descriptor) };
    }
    page as u64
}
