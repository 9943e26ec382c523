//! What the emulation does with guest memory by linear addresses; the walk through the page tables is [`paging`]'s.
//!
//! Long mode with four levels only, at CPL 0. Protection keys, SMEP and SMAP can't be on: the CPUID leaf that offers them is
//! hidden. Accessed and dirty bits are left alone; what is accessed here is kernel memory, whose entries have them set from the
//! start. Source: Intel SDM volume 3, "4-Level Paging".

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::paging::{self, CR0_PAGING, CR4_FIVE_LEVELS, EFER_LONG_MODE_ACTIVE, Hole, PageTables};
pub(super) use crate::paging::{ADDRESS, NO_EXECUTE, PAGE, PRESENT, USER, WRITABLE};

pub(super) const CACHE_DISABLE: u64 = 1 << 4;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;

const CR0_WRITE_PROTECT: u64 = 1 << 16;

/// What is done with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Execute,
}

/// Why an access can't be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// The guest's page tables forbid it: a page fault with this address and error code.
    #[error("the page tables forbid it at {address:#x} (error code {code:#x})")]
    Page { address: u64, code: u32 },
    /// Bits 63-47 of the address are not all alike: a general protection fault.
    #[error("its address is not canonical")]
    NotCanonical,
    /// The tables, or what they map, lie outside guest memory.
    #[error("there is no memory at {physical:#x}")]
    Outside { physical: u64 },
}

/// The guest's memory as its kernel sees it at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct AddressSpace<'a> {
    tables: PageTables<'a>,
    write_protect: bool,
}

impl<'a> AddressSpace<'a> {
    /// `None` unless the vCPU is in long mode with four levels of page tables.
    pub(super) fn new(memory: &'a GuestMemoryMmap, sregs: &kvm_sregs) -> Option<Self> {
        let long =
            sregs.cr0 & CR0_PAGING != 0 && sregs.efer & EFER_LONG_MODE_ACTIVE != 0 && sregs.cr4 & CR4_FIVE_LEVELS == 0;
        long.then_some(Self {
            tables: PageTables::new(memory, sregs),
            write_protect: sregs.cr0 & CR0_WRITE_PROTECT != 0,
        })
    }

    /// Physical address of the top-level table.
    pub(super) fn root(&self) -> u64 {
        self.tables.root()
    }

    /// The guest's memory.
    pub(super) fn memory(&self) -> &'a GuestMemoryMmap {
        self.tables.memory()
    }

    /// Whether bit 63 of an entry means "no execute" rather than being reserved.
    pub(super) fn no_execute(&self) -> bool {
        self.tables.no_execute()
    }

    /// The physical address behind a linear one. Reads at most four entries, whatever the tables contain.
    pub(super) fn translate(&self, address: u64, access: Access) -> Result<u64, Fault> {
        let fault = |present: bool| Fault::Page {
            address,
            code: u32::from(present)
                | u32::from(access == Access::Write) << 1
                | u32::from(access == Access::Execute && self.no_execute()) << 4,
        };
        let page = self.tables.translate(address).map_err(|hole| match hole {
            Hole::NotCanonical => Fault::NotCanonical,
            Hole::NotPresent => fault(false),
            Hole::Outside { physical } | Hole::NoMemory { physical } => Fault::Outside { physical },
        })?;
        let allowed = match access {
            Access::Read => true,
            Access::Write => page.writable || !self.write_protect,
            Access::Execute => page.executable,
        };
        if allowed { Ok(page.physical) } else { Err(fault(true)) }
    }

    /// Reads `data.len()` bytes of data, over page borders.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < data.len() {
            let (physical, len) = self.piece(address, done, data.len(), Access::Read)?;
            self.memory()
                .read_slice(&mut data[done..done + len], GuestAddress(physical))
                .map_err(|_| Fault::Outside { physical })?;
            done += len;
        }
        Ok(())
    }

    /// Writes `data`, over page borders; nothing is written if any of it can't be.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Fault> {
        for write in [false, true] {
            let mut done = 0;
            while done < data.len() {
                let (physical, len) = self.piece(address, done, data.len(), Access::Write)?;
                if write {
                    self.memory()
                        .write_slice(&data[done..done + len], GuestAddress(physical))
                        .map_err(|_| Fault::Outside { physical })?;
                } else if !self
                    .memory()
                    .check_range(GuestAddress(physical), len, Permissions::Write)
                {
                    return Err(Fault::Outside { physical });
                }
                done += len;
            }
        }
        Ok(())
    }

    /// Reads the instruction at `address`: up to `buffer.len()` bytes, fewer if the next page can't be executed. Returns how many.
    pub(super) fn fetch(&self, address: u64, buffer: &mut [u8]) -> Result<usize, Fault> {
        let mut done = 0;
        while done < buffer.len() {
            let piece = self
                .piece(address, done, buffer.len(), Access::Execute)
                .and_then(|(physical, len)| {
                    self.memory()
                        .read_slice(&mut buffer[done..done + len], GuestAddress(physical))
                        .map_err(|_| Fault::Outside { physical })?;
                    Ok(len)
                });
            match piece {
                Ok(len) => done += len,
                Err(fault) if done == 0 => return Err(fault),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Where the bytes from `done` on of `total` at `address` are, and how many of them are on that page.
    fn piece(&self, address: u64, done: usize, total: usize, access: Access) -> Result<(u64, usize), Fault> {
        let at = address.wrapping_add(done as u64);
        let physical = self.translate(at, access)?;
        let on_page = PAGE - at % PAGE;
        let len = on_page.min((total - done) as u64) as usize;
        Ok((physical, len))
    }
}

/// Whether bits 63-47 are all alike.
pub(super) fn is_canonical(address: u64) -> bool {
    paging::is_canonical(address, 48)
}

#[cfg(test)]
mod tests;
