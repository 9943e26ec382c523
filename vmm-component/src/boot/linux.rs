//! The Linux boot protocol's zero page (`boot_params`).

use linux_loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::bzimage::SetupHeader;
use super::{BootError, BootRequest, LoadedInitrd};
use crate::layout;
use crate::memory::{MemoryMap, RangeKind};

/// `type_of_loader` of loaders without a number of their own.
const LOADER_OTHER: u8 = 0xff;

/// e820 types (ACPI 6.5, table 15.4).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes the zero page and returns its address.
pub(super) fn write(
    ram: &GuestMemoryMmap,
    map: &MemoryMap,
    request: &BootRequest<'_>,
    setup: Option<&SetupHeader>,
    initrd: Option<LoadedInitrd>,
) -> Result<u64, BootError> {
    let params = zero_page(map, request, setup.map(SetupHeader::header), initrd)?;
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    Ok(layout::ZERO_PAGE)
}

fn zero_page(
    map: &MemoryMap,
    request: &BootRequest<'_>,
    setup: Option<setup_header>,
    initrd: Option<LoadedInitrd>,
) -> Result<boot_params, BootError> {
    let ranges = map.ranges();
    if ranges.len() > E820_MAX_ENTRIES_ZEROPAGE {
        return Err(BootError::MapTooLong {
            count: ranges.len(),
            most: E820_MAX_ENTRIES_ZEROPAGE,
        });
    }
    let mut params = boot_params {
        hdr: setup.unwrap_or_else(elf_header),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    // No list of ours; what an image has there is not to be followed.
    params.hdr.setup_data = 0;
    // Placed below 4 GiB.
    let (address, size) = initrd.map_or((0, 0), |initrd| (initrd.address, initrd.size));
    params.hdr.ramdisk_image = address as u32;
    params.hdr.ramdisk_size = size as u32;
    params.acpi_rsdp_addr = request.rsdp;
    params.e820_entries = ranges.len() as u8;
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    for (entry, range) in table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry {
            addr: range.range.start,
            size: range.range.end - range.range.start,
            r#type: match range.kind {
                RangeKind::Usable => E820_RAM,
                RangeKind::Reserved => E820_RESERVED,
            },
        };
    }
    params.e820_table = table;
    Ok(params)
}

/// The setup header for a kernel that came without one: protocol 2.15, all that is not set unused.
fn elf_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: LOADED_HIGH,
        xloadflags: XLF_KERNEL_64,
        initrd_addr_max: (layout::HOLE_START - 1) as u32,
        cmdline_size: layout::CMDLINE_MAX as u32 - 1,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    }
}
