//! Memory: the program's heap, and the same memory as the drivers' DMA memory. Everything is identity-mapped, so an address is the
//! address that a device uses.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Sizes are powers of two from 16 bytes (class 4) up.
const CLASSES: usize = 40;
const SMALLEST: u32 = 4;

/// Free blocks by size, and the memory that was never used. Blocks are aligned to their size.
struct Pool {
    free: [*mut u8; CLASSES],
    next: usize,
    end: usize,
}

/// The heap.
pub(crate) struct Heap(UnsafeCell<Pool>);

// SAFETY: one CPU runs this program, and interrupt handlers allocate nothing.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(Pool {
    free: [ptr::null_mut(); CLASSES],
    next: 0,
    end: 0,
}));

/// Gives the heap its memory.
///
/// # Safety
///
/// Once, before the first allocation; the range is mapped and nothing else uses it.
pub(crate) unsafe fn start(start: usize, end: usize) {
    // SAFETY: nothing else borrows the pool: this is the first use.
    let pool = unsafe { &mut *HEAP.0.get() };
    (pool.next, pool.end) = (start, end);
}

fn class(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(1).next_power_of_two();
    size.trailing_zeros().max(SMALLEST) as usize
}

// SAFETY: blocks are at least as large and as aligned as asked for, and never handed out twice.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = class(layout);
        // SAFETY: one CPU, no reentrance.
        let pool = unsafe { &mut *self.0.get() };
        let Some(head) = pool.free.get_mut(class) else {
            return ptr::null_mut();
        };
        if !head.is_null() {
            let block = *head;
            // SAFETY: a free block begins with the address of the next one.
            *head = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let start = pool.next.next_multiple_of(1 << class);
        match start.checked_add(1 << class) {
            Some(end) if end <= pool.end => {
                pool.next = end;
                start as *mut u8
            }
            _ => ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: one CPU, no reentrance.
        let pool = unsafe { &mut *self.0.get() };
        if let Some(head) = pool.free.get_mut(class(layout)) {
            // SAFETY: the caller gives the block up; it has room for an address.
            unsafe { block.cast::<*mut u8>().write(*head) };
            *head = block;
        }
    }
}

fn pages(count: usize) -> Layout {
    // A count of pages whose size overflows is no allocation that could succeed: an empty layout makes it fail in `dma_alloc`.
    Layout::from_size_align(count.saturating_mul(PAGE_SIZE), PAGE_SIZE).unwrap_or(Layout::new::<()>())
}

/// Zeroed pages that devices may use, never given back.
pub(crate) fn leak_pages(count: usize) -> *mut u8 {
    // SAFETY: the layout is not empty.
    let block = unsafe { alloc::alloc::alloc_zeroed(pages(count.max(1))) };
    assert!(!block.is_null(), "out of memory");
    block
}

/// The platform as `virtio-drivers` sees it.
pub(crate) struct Identity;

// SAFETY: pages come from the heap, zeroed and page-aligned; addresses are physical ones and mapped one to one.
unsafe impl Hal for Identity {
    fn dma_alloc(count: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: drivers ask for at least one page.
        let block = unsafe { alloc::alloc::alloc_zeroed(pages(count)) };
        NonNull::new(block).map_or((0, NonNull::dangling()), |block| (block.as_ptr() as PhysAddr, block))
    }

    unsafe fn dma_dealloc(_paddr: PhysAddr, block: NonNull<u8>, count: usize) -> i32 {
        // SAFETY: the caller gives back what `dma_alloc` gave it.
        unsafe { alloc::alloc::dealloc(block.as_ptr(), pages(count)) };
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(paddr as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
