//! The one reservation of address space that all guest memory lies in, and what is mapped into it.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestRegionMmap, MmapRegion};

use super::{CustomRangeError, MemoryError, Owner, PAGE, Piece};

/// Transparent huge pages need guest and host addresses that agree in their low 21 bits.
const HUGE_PAGE: u64 = 2 << 20;

/// `f_type` of a memfd on huge pages (`linux/magic.h`); its `f_bsize` is their size.
const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// Address space for guest physical addresses from 0 on, without access where nothing is mapped, and at least a
/// page of it on either side.
#[derive(Debug)]
pub(super) struct Reservation {
    start: *mut u8,
    len: usize,
    /// Host address of guest physical address 0.
    base: *mut u8,
    size: u64,
    regions: Vec<Arc<MmapRegion>>,
}

// SAFETY: the pointers are addresses of a mapping that lives as long as the value; nothing is read or written
// through them here.
unsafe impl Send for Reservation {}
// SAFETY: as above; the shared methods only compute with the addresses.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `size` bytes of guest physical addresses (at most `layout::MAX_GUEST_ADDRESS`).
    pub(super) fn new(size: u64) -> Result<Reservation, MemoryError> {
        let host = |source| MemoryError::Host {
            what: "reserve address space",
            source,
        };
        let len = usize::try_from(size + HUGE_PAGE + 2 * PAGE)
            .map_err(|_| host(io::Error::from(io::ErrorKind::OutOfMemory)))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|errno| host(errno.into()))?
        .cast::<u8>();
        let lowest = start.wrapping_add(PAGE as usize);
        let base = lowest.wrapping_add(lowest.align_offset(HUGE_PAGE as usize));
        Ok(Reservation {
            start,
            len,
            base,
            size,
            regions: Vec::new(),
        })
    }

    /// The host address of a guest physical address.
    pub(super) fn host_address(&self, guest_phys: u64) -> u64 {
        self.base as u64 + guest_phys
    }

    /// Maps `piece` at its place. Pieces must not overlap.
    pub(super) fn map(&mut self, piece: &Piece, huge_pages: bool) -> Result<GuestRegionMmap, MemoryError> {
        assert!(
            piece.guest.start < piece.guest.end && piece.guest.end <= self.size,
            "piece outside the reservation"
        );
        let (address, len) = (self.base.wrapping_add(piece.guest.start as usize), piece.len() as usize);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let mut flags = MapFlags::SHARED | MapFlags::FIXED;
        if piece.is_own() {
            // A client's file is mapped with a reservation: if it is on huge pages, that makes sure that they are there.
            flags |= MapFlags::NORESERVE;
        }
        let fail = |what, errno: rustix::io::Errno| match piece.owner {
            Owner::Component | Owner::Device => MemoryError::Host {
                what,
                source: errno.into(),
            },
            Owner::Client(index) => MemoryError::Custom {
                index,
                reason: CustomRangeError::Host {
                    what,
                    source: errno.into(),
                },
            },
        };
        // SAFETY: the range lies inside this reservation (asserted above), which nobody else maps into, and
        // no region exists there yet since pieces do not overlap.
        unsafe { rustix::mm::mmap(address.cast(), len, protection, flags, &piece.file, piece.offset) }
            .map_err(|errno| fail("map the memory", errno))?;
        if huge_pages {
            // Whether the host grants it is its own affair, so an error here (a kernel without them) means nothing.
            // SAFETY: the advice changes no contents and covers just what was mapped above.
            let _ = unsafe { rustix::mm::madvise(address.cast(), len, Advice::LinuxHugepage) };
        }
        let builder = MmapRegionBuilder::new(len)
            .with_mmap_prot(protection.bits() as i32)
            .with_mmap_flags(flags.bits() as i32)
            .with_file_offset(piece.file_offset());
        // SAFETY: the mapping made above is valid for `len` bytes, and stays so while the region lives: see `drop`.
        let region = unsafe { builder.with_raw_mmap_pointer(address) }
            .build()
            .map_err(|error| MemoryError::Host {
                what: "describe the mapping",
                source: io::Error::other(error),
            })?;
        let region = Arc::new(region);
        self.regions.push(Arc::clone(&region));
        piece.region(region).ok_or(MemoryError::Host {
            what: "describe the region",
            source: io::ErrorKind::InvalidInput.into(),
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Where a count is 1 nobody else has the region, so nobody can clone it either.
        if self.regions.iter().any(|region| Arc::strong_count(region) > 1) {
            tracing::warn!("guest memory is still in use: its mapping stays until the process ends");
            return;
        }
        // SAFETY: the mapping is this value's own, and no region points into it any more.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.start.cast(), self.len) } {
            tracing::error!(%errno, "could not unmap guest memory");
        }
    }
}

/// Checks that a client's file can back `range` bytes, as it is now.
pub(super) fn check_memfd(memfd: &OwnedFd, range: &Range<u64>) -> Result<(), CustomRangeError> {
    let Range { start, end } = *range;
    // Answered by what lives in memory alone. That it carries no seal is its owner's own risk.
    rustix::fs::fcntl_get_seals(memfd).map_err(|errno| CustomRangeError::NotMemfd { source: errno.into() })?;
    let stat = rustix::fs::fstat(memfd).map_err(|errno| CustomRangeError::Host {
        what: "read the memfd's size",
        source: errno.into(),
    })?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size < end - start {
        return Err(CustomRangeError::TooShort {
            size,
            range: end - start,
        });
    }
    let stat = rustix::fs::fstatfs(memfd).map_err(|errno| CustomRangeError::Host {
        what: "read the memfd's page size",
        source: errno.into(),
    })?;
    let alignment = match (stat.f_type, u64::try_from(stat.f_bsize)) {
        (HUGETLBFS_MAGIC, Ok(size)) => size,
        _ => PAGE,
    };
    if start.checked_rem(alignment) != Some(0) || end.checked_rem(alignment) != Some(0) {
        return Err(CustomRangeError::Alignment { start, end, alignment });
    }
    Ok(())
}
