//! Gives pages of guest memory back to the host.

use std::io;
use std::ops::Range;

use sepal_devices::virtio::device::Reclaim;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::PAGE;

/// Discards what lies in the component's own memory; a client's files stay as they are.
#[derive(Debug)]
pub struct Discard {
    memory: GuestMemoryMmap,
    /// What the component's memfd backs, ascending.
    own: Vec<Range<u64>>,
}

impl Discard {
    pub(super) fn new(memory: GuestMemoryMmap, own: Vec<Range<u64>>) -> Self {
        Self { memory, own }
    }
}

impl Reclaim for Discard {
    fn discard(&self, start: u64, len: u64) -> io::Result<()> {
        let refused = |reason: &str| {
            let message = format!("{len:#x} bytes of guest memory at {start:#x}: {reason}");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        };
        if !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(refused("not whole pages"));
        }
        let size = usize::try_from(len).map_err(|_| refused("too many"))?;
        let end = start.checked_add(len).ok_or_else(|| refused("past the end"))?;
        if size > 0 && !self.memory.check_range(GuestAddress(start), size) {
            return Err(refused("not all of it is memory"));
        }
        for own in &self.own {
            let (from, to) = (own.start.max(start), own.end.min(end));
            if from >= to {
                continue;
            }
            let address = self
                .memory
                .get_host_address(GuestAddress(from))
                .map_err(io::Error::other)?;
            // SAFETY: the range lies in one stretch of the component's memfd, mapped for as long as `memory` is here. Guest memory is read and
            // written by others at any time and nobody holds references into it, so that it turns to zeroes breaks nothing.
            let result = unsafe { libc::madvise(address.cast(), (to - from) as usize, libc::MADV_REMOVE) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
