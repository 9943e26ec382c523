//! Guest memory: one memfd, one reservation of address space, guard pages at both ends.
//!
//! Guest physical address `a` is at host address `base + a`, for every `a`: the hole below 4 GiB, and whatever is
//! backed by nothing, stays reserved without access, so an address that escapes the checks faults instead of
//! hitting something else.
//!
//! ```text
//!  guard | 0 .. HOLE_START | hole: no access | HOLE_END .. remainder | no access | a client's memfd | device region | guard
//!          \__ our memfd, offset 0 ___________/ and on: the remainder                              and on: the region
//! ```
//!
//! A client's memfd replaces, or adds to, what lies in its range ([`CustomRange`]). The device region is memory that a guest is not told of: a
//! memory device gives it out piece by piece.

mod discard;
mod error;
mod map;
mod mapping;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::layout;
pub use discard::Discard;
pub use error::{CustomRangeError, MemoryError};
pub use map::{MapRange, MemoryMap, RangeKind};
use mapping::Reservation;

/// Bytes in a mebibyte, the unit of a guest's memory size.
pub const MIB: u64 = 1 << 20;

/// Least memory of a guest, in bytes: the first MiB holds the boot structures and the ACPI tables, and a kernel
/// needs some beyond it, since [`layout::HIGH_MEMORY`] is where kernels are linked.
pub const MIN_SIZE: u64 = 2 * MIB;

/// Most client-supplied ranges (the protocol's limit).
pub const MAX_CUSTOM_RANGES: usize = 16;

const PAGE: u64 = 4096;

/// The device region starts at a multiple of this: the largest unit in which Linux adds memory.
const DEVICE_ALIGNMENT: u64 = 2 << 30;

/// A range of guest memory backed by a file of the client's.
#[derive(Debug)]
pub struct CustomRange {
    /// A memfd, or another file of shared memory, that covers the range from its offset 0. Loading a kernel may move the file's offset. Who
    /// shrinks it meanwhile, which the seal `F_SEAL_SHRINK` keeps everybody from, ends the vCPU that meets what is gone, or by SIGBUS the process.
    pub memfd: OwnedFd,
    /// First guest physical address, a multiple of 4096.
    pub start: u64,
    /// First address after the range, a multiple of 4096.
    pub end: u64,
}

/// What memory a guest gets.
#[derive(Debug)]
pub struct MemoryConfig {
    /// Bytes of RAM, a multiple of 1 MiB, at least [`MIN_SIZE`]. Custom ranges inside count as part of it, those
    /// above come on top.
    pub size_bytes: u64,
    /// At most [`MAX_CUSTOM_RANGES`], in any order, not overlapping.
    pub custom: Vec<CustomRange>,
    /// Ask the host for transparent huge pages. The host's policy decides (`shmem_enabled`); it is no error if it
    /// does not grant them.
    pub huge_pages: bool,
    /// Bytes of memory for a memory device, a multiple of 1 MiB; 0 for none. They cost nothing until they are used.
    pub device_bytes: u64,
}

impl MemoryConfig {
    /// Where the memory for a memory device will lie; empty if there is none.
    ///
    /// # Errors
    ///
    /// Sizes that are not multiples of 1 MiB, or more than a guest can address.
    pub fn device_region(&self) -> Result<Range<u64>, MemoryError> {
        let (size, device) = (self.size_bytes, self.device_bytes);
        for size in [size, device] {
            if !size.is_multiple_of(MIB) {
                return Err(MemoryError::NotMebibytes { size });
            }
        }
        let ram = layout::HOLE_END.saturating_add(size.saturating_sub(layout::HOLE_START));
        let custom = self.custom.iter().map(|range| range.end);
        let start = custom
            .fold(ram, u64::max)
            .checked_next_multiple_of(DEVICE_ALIGNMENT)
            .unwrap_or(u64::MAX);
        let end = start.saturating_add(device);
        if device > 0 && end > layout::MAX_GUEST_ADDRESS {
            let most = layout::MAX_GUEST_ADDRESS.saturating_sub(start);
            return Err(MemoryError::TooLarge { size: device, most });
        }
        Ok(start..end)
    }
}

/// A stretch of guest memory that is contiguous in guest physical and host addresses: one KVM memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// First guest physical address, page-aligned.
    pub guest_phys: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
    /// Address in this process.
    pub host_addr: u64,
}

/// The memory of one guest. Dropping it unmaps the memory, unless a clone of [`memory`](Self::memory) is still
/// alive somewhere (a device thread that hangs, say): then the mapping stays until the process ends, rather than
/// being pulled from under that clone.
#[derive(Debug)]
pub struct GuestRam {
    // Dropped before the reservation, which looks for clones.
    memory: GuestMemoryMmap,
    reservation: Reservation,
    ranges: Vec<Range<u64>>,
    /// All of it, RAM and the device region.
    mapped: Vec<Range<u64>>,
    /// What is backed by the component's own memfd.
    own: Vec<Range<u64>>,
}

/// A stretch of guest memory with one backing file.
#[derive(Debug)]
struct Piece {
    guest: Range<u64>,
    file: Arc<File>,
    offset: u64,
    owner: Owner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Component,
    /// The component, for a memory device.
    Device,
    /// Index of the client's range.
    Client(usize),
}

impl GuestRam {
    /// Makes the memory that `config` asks for. Nothing of it is populated yet. `cancel` is looked at between the
    /// steps, of which each is a few system calls.
    pub fn new(config: MemoryConfig, cancel: &AtomicBool) -> Result<GuestRam, MemoryError> {
        check_size(config.size_bytes)?;
        let device = config.device_region()?;
        let MemoryConfig {
            size_bytes,
            custom,
            huge_pages,
            device_bytes: _,
        } = config;
        let pieces = plan(size_bytes, custom, device)?;
        let end = pieces.last().map_or(size_bytes, |piece| piece.guest.end);
        let mut reservation = Reservation::new(end)?;
        let mut regions = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            if cancel.load(Ordering::Relaxed) {
                return Err(MemoryError::Cancelled);
            }
            regions.push(reservation.map(piece, huge_pages && piece.is_own())?);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|source| MemoryError::Regions { source })?;
        Ok(GuestRam {
            memory,
            reservation,
            ranges: merge(ranges_of(&pieces, |piece| piece.owner != Owner::Device)),
            mapped: merge(ranges_of(&pieces, |_| true)),
            own: ranges_of(&pieces, Piece::is_own).collect(),
        })
    }

    /// The view of guest memory that devices and loaders work on. Its regions point into the one mapping; a region
    /// ends where the backing file changes, and names its file, for vhost-user.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The memslots to set, each as large as can be, in ascending order: the first is the one that a guest starts
    /// in.
    pub fn slots(&self) -> impl Iterator<Item = MemorySlot> + '_ {
        self.mapped.iter().map(|range| MemorySlot {
            guest_phys: range.start,
            size: range.end - range.start,
            host_addr: self.reservation.host_address(range.start),
        })
    }

    /// First address after all memory.
    pub fn end(&self) -> u64 {
        self.mapped.last().map_or(0, |range| range.end)
    }

    /// The first of the `length` addresses from `address` on that is not memory, if there is one.
    pub fn first_gap(&self, address: u64, length: u64) -> Option<u64> {
        map::first_gap(&self.mapped, address, length)
    }

    /// What gives pages back to the host, for a device.
    pub fn discard(&self) -> Discard {
        Discard::new(self.memory.clone(), self.own.clone())
    }

    /// What is RAM: ascending, disjoint, not adjacent. [`MemoryMap::new`] makes of it what the guest is told.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }
}

/// RAM of `size` bytes as it lies around the hole.
fn ram_ranges(size: u64) -> Vec<Range<u64>> {
    let low = size.min(layout::HOLE_START);
    let high = layout::HOLE_END..layout::HOLE_END + (size - low);
    [0..low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

fn check_size(size: u64) -> Result<(), MemoryError> {
    if !size.is_multiple_of(MIB) {
        return Err(MemoryError::NotMebibytes { size });
    }
    if size < MIN_SIZE {
        return Err(MemoryError::TooSmall { size, least: MIN_SIZE });
    }
    let most = layout::MAX_GUEST_ADDRESS - (layout::HOLE_END - layout::HOLE_START);
    if size > most {
        return Err(MemoryError::TooLarge { size, most });
    }
    let host = rustix::system::sysinfo();
    let unit = u64::from(host.mem_unit).max(1);
    check_host(
        size,
        host.totalram.saturating_mul(unit),
        host.freeram.saturating_mul(unit),
    )
}

/// Refuses what could never fit. Free memory alone would be the wrong measure: it leaves out the page cache, which
/// the host gives up when asked, and guests share the host on the understanding that not all use all of theirs.
fn check_host(size: u64, total: u64, free: u64) -> Result<(), MemoryError> {
    if size > total {
        Err(MemoryError::MoreThanHost { size, total, free })
    } else {
        Ok(())
    }
}

/// Checks the client's ranges and lays out every piece, ascending; `device` is the device region, above all others.
fn plan(size: u64, custom: Vec<CustomRange>, device: Range<u64>) -> Result<Vec<Piece>, MemoryError> {
    if custom.len() > MAX_CUSTOM_RANGES {
        return Err(MemoryError::TooManyRanges {
            count: custom.len(),
            most: MAX_CUSTOM_RANGES,
        });
    }
    for (index, range) in custom.iter().enumerate() {
        let fail = |reason| MemoryError::Custom { index, reason };
        map::check_custom(range.start..range.end).map_err(fail)?;
        if let Some(other) = custom[..index]
            .iter()
            .position(|o| o.start < range.end && range.start < o.end)
        {
            return Err(fail(CustomRangeError::Overlap { other }));
        }
        mapping::check_memfd(&range.memfd, &(range.start..range.end)).map_err(fail)?;
    }

    let own = Arc::new(create_memfd(size + (device.end - device.start))?);
    let client: Vec<Range<u64>> = custom.iter().map(|range| range.start..range.end).collect();
    let mut offset = 0;
    let mut pieces = Vec::new();
    for ram in ram_ranges(size) {
        for guest in map::subtract(&ram, &client) {
            let at = offset + (guest.start - ram.start);
            pieces.push(Piece {
                guest,
                file: Arc::clone(&own),
                offset: at,
                owner: Owner::Component,
            });
        }
        offset += ram.end - ram.start;
    }
    if !device.is_empty() {
        pieces.push(Piece {
            guest: device,
            file: own,
            offset,
            owner: Owner::Device,
        });
    }
    for (index, range) in custom.into_iter().enumerate() {
        pieces.push(Piece {
            guest: range.start..range.end,
            file: Arc::new(File::from(range.memfd)),
            offset: 0,
            owner: Owner::Client(index),
        });
    }
    pieces.sort_by_key(|piece| piece.guest.start);
    Ok(pieces)
}

/// A memfd whose size nobody can change: a shrunk one would fault everyone who has it mapped.
fn create_memfd(size: u64) -> Result<File, MemoryError> {
    let host = |what| {
        move |errno: rustix::io::Errno| MemoryError::Host {
            what,
            source: errno.into(),
        }
    };
    let fd = rustix::fs::memfd_create(c"guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(host("create the memfd"))?;
    rustix::fs::ftruncate(&fd, size).map_err(host("size the memfd"))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(host("seal the memfd"))?;
    Ok(File::from(fd))
}

/// The ranges of those pieces that `wanted` picks.
fn ranges_of(pieces: &[Piece], wanted: impl Fn(&Piece) -> bool) -> impl Iterator<Item = Range<u64>> {
    pieces
        .iter()
        .filter(move |piece| wanted(piece))
        .map(|piece| piece.guest.clone())
}

/// Joins adjacent ranges of an ascending sequence.
fn merge(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => merged.push(range),
        }
    }
    merged
}

impl Piece {
    /// Whether the component's own memfd backs it.
    fn is_own(&self) -> bool {
        matches!(self.owner, Owner::Component | Owner::Device)
    }

    fn len(&self) -> u64 {
        self.guest.end - self.guest.start
    }

    fn file_offset(&self) -> FileOffset {
        FileOffset::from_arc(Arc::clone(&self.file), self.offset)
    }

    fn region(&self, mapping: Arc<vm_memory::MmapRegion>) -> Option<GuestRegionMmap> {
        GuestRegionMmap::with_arc(mapping, GuestAddress(self.guest.start))
    }
}
