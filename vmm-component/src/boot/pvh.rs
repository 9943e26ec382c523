//! PVH's `hvm_start_info`, version 1, with its module list and memory map (Xen, `public/arch-x86/hvm/start_info.h`).

use linux_loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, BootRequest, LoadedInitrd};
use crate::layout;
use crate::memory::{MemoryMap, RangeKind};

const MODULES: u64 = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
const MEMORY_MAP: u64 = MODULES + size_of::<hvm_modlist_entry>() as u64;
/// What fits into the rest of the page.
const MAX_RANGES: usize = ((layout::ZERO_PAGE - MEMORY_MAP) / size_of::<hvm_memmap_table_entry>() as u64) as usize;

/// Writes the start info and returns its address.
pub(super) fn write(
    ram: &GuestMemoryMmap,
    map: &MemoryMap,
    request: &BootRequest<'_>,
    initrd: Option<LoadedInitrd>,
) -> Result<u64, BootError> {
    let ranges = map.ranges();
    if ranges.len() > MAX_RANGES {
        return Err(BootError::MapTooLong {
            count: ranges.len(),
            most: MAX_RANGES,
        });
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: request.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(layout::PVH_START_INFO))?;
    if let Some(LoadedInitrd { address, size }) = initrd {
        let module = hvm_modlist_entry {
            paddr: address,
            size,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(MODULES))?;
    }
    for (index, range) in ranges.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: range.range.start,
            size: range.range.end - range.range.start,
            type_: match range.kind {
                RangeKind::Usable => XEN_HVM_MEMMAP_TYPE_RAM,
                RangeKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
            },
            ..Default::default()
        };
        let address = MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        ram.write_obj(entry, GuestAddress(address))?;
    }
    Ok(layout::PVH_START_INFO)
}
