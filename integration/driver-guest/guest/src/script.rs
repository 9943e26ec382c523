//! Where commands come from besides the command line: the initial RAM file system, which is then no file system but text.

use alloc::string::{String, ToString};

use crate::boot_info::{BootInfo, long, word};
use crate::machine::{LowMemory, Mapper};

/// Most bytes of a script.
const LONGEST: u64 = 64 << 10;
/// `hvm_start_info` (Xen's PVH boot ABI): number of modules and the list's address, whose entries begin with address and size.
const PVH_MODULES: u64 = 12;
const PVH_MODULE_LIST: u64 = 16;
/// Linux's `boot_params` (Documentation/arch/x86/zero-page.rst): address and size, 32 bits each, and the upper halves of both.
const RAMDISK: u64 = 0x218;
const RAMDISK_HIGH: u64 = 0xc0;

/// Where the initial RAM file system is: its address and its bytes.
pub(crate) fn place(pvh: bool, address: u64) -> Option<(u64, u64)> {
    let memory = &LowMemory;
    let (start, size) = if pvh {
        if word(memory, address + PVH_MODULES)? == 0 {
            return None;
        }
        let list = long(memory, address + PVH_MODULE_LIST)?;
        (long(memory, list)?, long(memory, list.checked_add(8)?)?)
    } else {
        let part = |offset: u64| {
            let (low, high) = (
                word(memory, address + offset),
                word(memory, address + offset - RAMDISK + RAMDISK_HIGH),
            );
            Some(u64::from(low?) | u64::from(high?) << 32)
        };
        (part(RAMDISK)?, part(RAMDISK + 4)?)
    };
    (start != 0 && size != 0).then_some((start, size))
}

/// The text at `place`, with control characters as blanks; none if it is no memory, too long or no ASCII.
pub(crate) fn read(place: (u64, u64), mapper: &mut Mapper, memory: &BootInfo) -> Option<String> {
    let (start, size) = place;
    let end = start.checked_add(size)?;
    let gibs = (start >> 30)..=(end.checked_sub(1)? >> 30);
    if size > LONGEST || !memory.is_usable(start, end) || !gibs.into_iter().all(|gib| mapper.map(gib, memory)) {
        return None;
    }
    let text: Option<String> = (start..end)
        .map(|address| {
            // SAFETY: usable memory, mapped just now; it is nobody's object.
            let byte = unsafe { (address as *const u8).read_volatile() };
            let byte = if byte.is_ascii_control() { b' ' } else { byte };
            byte.is_ascii().then_some(char::from(byte))
        })
        .collect();
    text.map(|text| text.trim().to_string())
}
