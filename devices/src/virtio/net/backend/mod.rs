//! The host's side of a network device: where frames come from and go to.
//!
//! - [`tap`]: tap devices, one descriptor for each pair of queues. One system call a frame, straight from and to guest memory, with the header.
//! - [`stream`]: a stream socket with a length in front of each frame. Many frames a system call, by a copy, without offloads.
//!
//! None of them waits. A host that takes nothing says [`Sent::Full`], and whoever sends decides how long to keep trying.

use std::io;
use std::os::fd::OwnedFd;

use vm_memory::VolatileSlice;

use super::header::{HEADER_BYTES, Header};

#[cfg(any(test, feature = "testing"))]
pub(super) mod packets;
pub(super) mod stream;
pub(super) mod tap;

/// What became of a frame that was to be sent.
#[derive(Debug)]
pub(super) enum Sent {
    /// The host has it, or it is staged and goes out with the next [`Backend::flush`].
    Done,
    /// The host takes nothing now. Its descriptor becomes writable when it does.
    Full,
    /// The host does not take this frame; others it may.
    Refused(io::Error),
    /// The host's side is gone, and why.
    Lost(String),
}

/// What came when a frame was asked for.
#[derive(Debug)]
pub(super) enum Received {
    /// A frame of `len` bytes is in the room, its header is this.
    Frame {
        /// What the host says of it.
        header: Header,
        /// Its bytes, also those that found no room.
        len: usize,
    },
    /// Something that is no frame came, and was dropped.
    Bad,
    /// There is nothing now. The descriptor becomes readable when there is.
    Nothing,
    /// The host's side is gone, and why.
    Lost(String),
}

/// The host's side.
pub(super) trait Backend: Send {
    /// What to watch: a port for each pair of queues, or one for all.
    fn ports(&self) -> &[OwnedFd];

    /// Features that depend on what it is.
    fn features(&self) -> u64;

    /// The driver takes what the bits of its side in `features` say from now on.
    fn set_offloads(&mut self, features: u64) -> io::Result<()>;

    /// Takes the next frame that came at `port`.
    fn receive(&mut self, port: usize, room: &mut Room<'_, '_>) -> Received;

    /// Takes the next frame that came at `port` and drops it.
    fn discard(&mut self, port: usize) -> Received;

    /// Sends the frame that `slices` hold by `port`.
    fn send(&mut self, port: usize, header: &Header, slices: &[VolatileSlice<'_>]) -> Sent;

    /// Brings out what is staged for `port`.
    fn flush(&mut self, port: usize) -> Sent;
}

/// Where a frame goes: into guest memory behind room for its header, and what has no room there into `spill`.
pub(super) struct Room<'r, 'm> {
    /// Guest memory. The first [`HEADER_BYTES`] are the header's, which the device writes itself: what a backend leaves there is of no account.
    pub(super) slices: &'r [VolatileSlice<'m>],
    /// For the rest.
    pub(super) spill: &'r mut [u8],
}

impl Room<'_, '_> {
    /// Copies a frame in; its end is lost if it is longer than all of the room.
    fn put(&mut self, frame: &[u8]) {
        let rest = scatter(self.slices, HEADER_BYTES, frame);
        let len = rest.len().min(self.spill.len());
        self.spill[..len].copy_from_slice(&rest[..len]);
    }
}

/// Copies `bytes` into `slices` from their byte `skip` on; returns what had no room.
pub(super) fn scatter<'b>(slices: &[VolatileSlice<'_>], mut skip: usize, mut bytes: &'b [u8]) -> &'b [u8] {
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let (now, rest) = bytes.split_at(bytes.len().min(slice.len() - skip));
        if let Ok(place) = slice.offset(skip) {
            place.copy_from(now);
        }
        (bytes, skip) = (rest, 0);
        if bytes.is_empty() {
            break;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_are_scattered_in_order(
            lens in proptest::collection::vec(0usize..40, 0..8),
            skip in 0usize..50,
            bytes in proptest::collection::vec(1u8.., 0..200),
        ) {
            let mut memory: Vec<Vec<u8>> = lens.iter().map(|&len| vec![0; len]).collect();
            let room = lens.iter().sum::<usize>().saturating_sub(skip);
            let slices: Vec<_> = memory.iter_mut().map(|part| VolatileSlice::from(&mut part[..])).collect();
            let rest = scatter(&slices, skip, &bytes);
            drop(slices);
            prop_assert_eq!(rest, &bytes[bytes.len().min(room)..]);
            let all = memory.concat();
            let skip = skip.min(all.len());
            prop_assert!(all[..skip].iter().all(|&byte| byte == 0));
            prop_assert_eq!(&all[skip..][..bytes.len() - rest.len()], &bytes[..bytes.len() - rest.len()]);
        }
    }
}
