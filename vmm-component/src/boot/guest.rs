//! Writing to guest memory: from files, zeros, and small structures.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::BootError;
use crate::layout;

/// Reads up to `count` bytes of `file` at `offset` into guest memory at `address`; fewer at the end of the file or of
/// a region. 0 means the end of the file.
pub(super) fn read_from_file(
    ram: &GuestMemoryMmap,
    address: GuestAddress,
    count: usize,
    file: &File,
    offset: u64,
) -> io::Result<usize> {
    let (region, at) = ram
        .to_region_addr(address)
        .ok_or_else(|| io::Error::other("not guest memory"))?;
    let count = (region.len() - at.0).min(count as u64) as usize;
    let slice = region.get_slice(at, count).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let target = slice.ptr_guard_mut();
    loop {
        // SAFETY: the slice vouches for `count` writable bytes that stay mapped while it is borrowed. They are guest
        // memory, to which no Rust reference exists.
        let done = unsafe { libc::pread(file.as_raw_fd(), target.as_ptr().cast(), target.len(), offset) };
        if let Ok(done) = usize::try_from(done) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes `count` bytes at `address` zero. What the backing file has never stored is zero already and is left alone,
/// so that a kernel's zeroed data costs neither time nor memory on a fresh guest.
pub(super) fn zero(ram: &GuestMemoryMmap, address: u64, count: u64, cancel: &AtomicBool) -> Result<(), BootError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    const PAGE: u64 = 4096;
    let end = address + count;
    let mut at = address;
    while at < end {
        if cancel.load(Ordering::Relaxed) {
            return Err(BootError::Cancelled);
        }
        if at.is_multiple_of(PAGE) {
            let skip = unstored(ram, at).min(end - at);
            if skip > 0 {
                at += skip;
                continue;
            }
        }
        // To the next page first, from where whole pages may turn out to be unstored.
        let step = if at.is_multiple_of(PAGE) {
            ZEROS.len() as u64
        } else {
            PAGE - at % PAGE
        };
        let step = step.min(end - at);
        ram.write_slice(&ZEROS[..step as usize], GuestAddress(at))?;
        at += step;
    }
    Ok(())
}

/// Bytes from `address` on, up to the end of its region, that the backing file does not store.
fn unstored(ram: &GuestMemoryMmap, address: u64) -> u64 {
    let Some((region, MemoryRegionAddress(at))) = ram.to_region_addr(GuestAddress(address)) else {
        return 0;
    };
    let Some(file) = region.file_offset() else { return 0 };
    let start = file.start() + at;
    let left = region.len() - at;
    match rustix::fs::seek(file.file(), rustix::fs::SeekFrom::Data(start)) {
        Ok(data) => data.saturating_sub(start).min(left),
        Err(rustix::io::Errno::NXIO) => left,
        Err(_) => 0,
    }
}

/// Writes the command line with its NUL.
pub(super) fn write_command_line(ram: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    Ok(ram.write_slice(&bytes, GuestAddress(layout::CMDLINE))?)
}
