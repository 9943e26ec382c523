//! Guest page tables, walked in guest memory: from a linear address to a physical one, in all the ways that an x86-64 processor does it.
//!
//! ```text
//!   CR0.PG  EFER.LMA  CR4.PAE  CR4.LA57
//!     0                                   none: physical is linear, below 4 GiB
//!     1        0         0                2 levels of 1024 entries of 4 bytes; CR4.PSE: pages of 4 MiB
//!     1        0         1                4 entries of 1 GiB each, then 2 levels of 512 entries of 8 bytes; pages of 2 MiB
//!     1        1         1         0      4 levels; pages of 2 MiB and 1 GiB
//!     1        1         1         1      5 levels; the same
//! ```
//!
//! It only looks: accessed and dirty bits are left alone, and nothing is cached. Whatever the tables contain, a walk reads at most five entries, all of
//! them in guest memory. Reserved bits are not looked at. Source: Intel SDM volume 3, chapter "Paging".

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of the smallest page, and of a table.
pub(crate) const PAGE: u64 = 4096;

/// Bits of an entry.
pub(crate) const PRESENT: u64 = 1;
/// Writing is allowed.
pub(crate) const WRITABLE: u64 = 1 << 1;
/// CPL 3 is allowed.
pub(crate) const USER: u64 = 1 << 2;
/// What the entry leads to is a page, and not a table.
pub(crate) const LARGE: u64 = 1 << 7;
/// Fetching instructions is not allowed, if EFER.NXE is set.
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// Physical address bits of an entry of 8 bytes, and of CR3.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// CR0.PG.
pub(crate) const CR0_PAGING: u64 = 1 << 31;
const CR4_LARGE_PAGES: u64 = 1 << 4;
const CR4_PHYSICAL_EXTENSION: u64 = 1 << 5;
/// CR4.LA57.
pub(crate) const CR4_FIVE_LEVELS: u64 = 1 << 12;
/// EFER.LMA.
pub(crate) const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// EFER.NXE.
pub(crate) const EFER_NO_EXECUTE: u64 = 1 << 11;

/// How linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Not at all.
    Off,
    /// 32-bit paging, perhaps with pages of 4 MiB.
    Legacy { large: bool },
    /// 32-bit linear addresses, 52-bit physical ones.
    Extended,
    /// 64-bit addresses, by so many levels.
    Long { levels: u32 },
}

/// Where a linear address leads, and what may be done there. `writable` is what the tables say; with CR0.WP clear, CPL 0 may write all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address.
    pub physical: u64,
    /// Bytes of the page: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 0 where there are no pages.
    pub page_size: u64,
    /// Writing is allowed.
    pub writable: bool,
    /// CPL 3 is allowed.
    pub user: bool,
    /// Fetching instructions is allowed.
    pub executable: bool,
}

/// Why an address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Hole {
    /// It is none that the vCPU's mode has.
    #[error("is no address in the mode that the vCPU is in")]
    NotCanonical,
    /// An entry on the way is not present.
    #[error("is not mapped")]
    NotPresent,
    /// A table on the way lies outside guest memory.
    #[error("is not mapped: the table for it would be at {physical:#x}, where there is no memory")]
    Outside {
        /// Where the entry would be.
        physical: u64,
    },
    /// It leads to an address that is not memory.
    #[error("leads to {physical:#x}, which is not memory of this guest")]
    NoMemory {
        /// Where it leads.
        physical: u64,
    },
}

fn no_memory(linear: u64, physical: u64, there: usize) -> (u64, Hole) {
    let there = there as u64;
    let hole = Hole::NoMemory {
        physical: physical.saturating_add(there),
    };
    (linear.saturating_add(there), hole)
}

/// The page tables that a vCPU uses at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageTables<'a> {
    memory: &'a GuestMemoryMmap,
    cr3: u64,
    mode: Mode,
    no_execute: bool,
}

impl<'a> PageTables<'a> {
    /// Those that a vCPU with these registers uses.
    pub(crate) fn new(memory: &'a GuestMemoryMmap, sregs: &kvm_sregs) -> Self {
        let mode = if sregs.cr0 & CR0_PAGING == 0 {
            Mode::Off
        } else if sregs.efer & EFER_LONG_MODE_ACTIVE != 0 {
            Mode::Long {
                levels: if sregs.cr4 & CR4_FIVE_LEVELS == 0 { 4 } else { 5 },
            }
        } else if sregs.cr4 & CR4_PHYSICAL_EXTENSION != 0 {
            Mode::Extended
        } else {
            Mode::Legacy {
                large: sregs.cr4 & CR4_LARGE_PAGES != 0,
            }
        };
        Self {
            memory,
            cr3: sregs.cr3,
            mode,
            no_execute: sregs.efer & EFER_NO_EXECUTE != 0,
        }
    }

    /// The memory that they are in.
    pub(crate) fn memory(&self) -> &'a GuestMemoryMmap {
        self.memory
    }

    /// Physical address of the top-level table, in a mode that has 64-bit addresses.
    pub(crate) fn root(&self) -> u64 {
        self.cr3 & ADDRESS
    }

    /// Whether bit 63 of an entry means "no execute" rather than being reserved.
    pub(crate) fn no_execute(&self) -> bool {
        self.no_execute
    }

    /// Where a linear address leads.
    pub(crate) fn translate(&self, address: u64) -> Result<Translation, Hole> {
        match self.mode {
            Mode::Long { levels } => {
                if !is_canonical(address, 12 + 9 * levels) {
                    return Err(Hole::NotCanonical);
                }
                self.walk(self.root(), levels, address, Permitted::all())
            }
            _ if address > u64::from(u32::MAX) => Err(Hole::NotCanonical),
            Mode::Off => Ok(Translation {
                physical: address,
                page_size: 0,
                writable: true,
                user: true,
                executable: true,
            }),
            Mode::Extended => {
                // The processor keeps these four entries since CR3 was loaded; memory may say something else by now.
                let entry = self.entry((self.cr3 & 0xffff_ffe0) + (address >> 30) * 8)?;
                if entry & PRESENT == 0 {
                    return Err(Hole::NotPresent);
                }
                self.walk(entry & ADDRESS, 2, address, Permitted::all())
            }
            Mode::Legacy { large } => self.walk_legacy(large, address),
        }
    }

    /// Fills `to` from a linear address on.
    ///
    /// # Errors
    /// The first address that leads nowhere, and why; [`Hole::NoMemory`] where it leads to no memory.
    pub(crate) fn read(&self, address: u64, to: &mut [u8]) -> Result<(), (u64, Hole)> {
        let mut done = 0;
        while done < to.len() {
            let at = address.wrapping_add(done as u64);
            if at < address {
                return Err((at, Hole::NotCanonical));
            }
            let physical = self.translate(at).map_err(|hole| (at, hole))?.physical;
            // No page is smaller, or begins elsewhere.
            let rest = to.len() - done;
            let here = usize::try_from(PAGE - at % PAGE).map_or(rest, |left| left.min(rest));
            let part = &mut to[done..done + here];
            let read = self.memory.read(part, GuestAddress(physical));
            match read {
                Ok(count) if count == part.len() => done += here,
                // It ends within the page.
                Ok(count) => return Err(no_memory(at, physical, count)),
                Err(_) => return Err(no_memory(at, physical, 0)),
            }
        }
        Ok(())
    }

    /// Goes on from a table of 512 entries of 8 bytes, `levels` above the page.
    fn walk(&self, table: u64, levels: u32, address: u64, mut permitted: Permitted) -> Result<Translation, Hole> {
        let mut table = table;
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = self.entry(table + (address >> shift & 511) * 8)?;
            permitted.meet(entry, self.no_execute)?;
            // Pages are of 4 KiB, 2 MiB or 1 GiB.
            if level == 0 || (entry & LARGE != 0 && level <= 2) {
                return Ok(permitted.page(entry & ADDRESS, address, 1 << shift));
            }
            table = entry & ADDRESS;
        }
        // The last level has returned.
        Err(Hole::NotPresent)
    }

    fn walk_legacy(&self, large: bool, address: u64) -> Result<Translation, Hole> {
        let mut permitted = Permitted::all();
        let directory = self.entry_legacy((self.cr3 & 0xffff_f000) + (address >> 22) * 4)?;
        permitted.meet(directory, false)?;
        if large && directory & LARGE != 0 {
            // Bits 20-13 are bits 39-32 of the address (PSE-36).
            let page = directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32;
            return Ok(permitted.page(page, address, 4 << 20));
        }
        let entry = self.entry_legacy((directory & 0xffff_f000) + (address >> 12 & 1023) * 4)?;
        permitted.meet(entry, false)?;
        Ok(permitted.page(entry & 0xffff_f000, address, PAGE))
    }

    fn entry(&self, physical: u64) -> Result<u64, Hole> {
        let entry: Result<[u8; 8], _> = self.memory.read_obj(GuestAddress(physical));
        entry.map(u64::from_le_bytes).map_err(|_| Hole::Outside { physical })
    }

    fn entry_legacy(&self, physical: u64) -> Result<u64, Hole> {
        let entry: Result<[u8; 4], _> = self.memory.read_obj(GuestAddress(physical));
        let entry = entry.map(u32::from_le_bytes).map_err(|_| Hole::Outside { physical })?;
        Ok(entry.into())
    }
}

/// What the entries so far allow.
struct Permitted {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Permitted {
    fn all() -> Self {
        Self {
            writable: true,
            user: true,
            executable: true,
        }
    }

    fn meet(&mut self, entry: u64, no_execute: bool) -> Result<(), Hole> {
        if entry & PRESENT == 0 {
            return Err(Hole::NotPresent);
        }
        self.writable &= entry & WRITABLE != 0;
        self.user &= entry & USER != 0;
        self.executable &= entry & NO_EXECUTE == 0 || !no_execute;
        Ok(())
    }

    fn page(&self, page: u64, address: u64, size: u64) -> Translation {
        Translation {
            physical: page & !(size - 1) | address & (size - 1),
            page_size: size,
            writable: self.writable,
            user: self.user,
            executable: self.executable,
        }
    }
}

/// Whether all bits of the address from its highest one on are alike, if it has so many: 48 or 57.
pub(crate) fn is_canonical(address: u64, bits: u32) -> bool {
    let top = address as i64 >> (bits - 1);
    top == 0 || top == -1
}

#[cfg(test)]
mod tests;
