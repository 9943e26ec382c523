//! Tap devices (Linux, Documentation/networking/tuntap.rst): a descriptor for each pair of queues, frames with the header of virtio in front.
//!
//! Nothing here needs a privilege: who opened the device had it. `TUNSETOFFLOAD` follows the driver's features, and so runs on the device's thread
//! whenever they change.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, IntegerSetter, Opcode, Setter, ioctl, opcode};
use vm_memory::VolatileSlice;

use super::super::features;
use super::super::header::{HEADER_BYTES, Header};
use super::{Backend, Received, Room, Sent};

// Requests (linux/if_tun.h).
const TUNSETOFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);
const TUNGETIFF: Opcode = opcode::read::<u32>(b'T', 210);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<i32>(b'T', 216);

/// Most parts of a frame that the kernel takes in one call (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;

/// Why descriptors cannot serve as a network device's host side.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is no tap device.
    #[error("descriptor {index} of the tap is no tap device: {error}")]
    NoTap {
        /// Its place among the descriptors.
        index: usize,
        /// What the host said.
        error: io::Error,
    },
    /// It was opened with the wrong flags.
    #[error("descriptor {index} of the tap was opened {wrong}")]
    Flags {
        /// Its place among the descriptors.
        index: usize,
        /// What is wrong with the flags.
        wrong: &'static str,
    },
    /// They belong to different devices.
    #[error("descriptor {index} belongs to the tap {name}, and the first one to another")]
    Different {
        /// Its place among the descriptors.
        index: usize,
        /// The tap's name.
        name: String,
    },
}

/// See the module's head.
pub(in super::super) struct Tap {
    queues: Vec<OwnedFd>,
    features: u64,
    parts: Parts,
}

/// Room for the parts of a frame, used again for the next one.
#[derive(Default)]
struct Parts(Vec<libc::iovec>);

// SAFETY: what the parts point to is nobody's any more when the call that collected them returns: each call clears them first.
unsafe impl Send for Parts {}

impl Tap {
    /// The queues of one tap device, whose frames get a header of [`HEADER_BYTES`] from now on, and no offloads. With `offloads`, it offers
    /// those that the kernel has.
    pub(in super::super) fn new(queues: Vec<OwnedFd>, offloads: bool) -> Result<Self, TapError> {
        let mut first = None;
        for (index, queue) in queues.iter().enumerate() {
            let failed = |error: io::Error| TapError::NoTap { index, error };
            let (name, flags) = interface(queue.as_fd()).map_err(failed)?;
            if let Some(wrong) = wrong_flags(flags, queues.len()) {
                return Err(TapError::Flags { index, wrong });
            }
            if first.get_or_insert_with(|| name.clone()) != &name {
                return Err(TapError::Different { index, name });
            }
            set_header_bytes(queue.as_fd()).map_err(failed)?;
            rustix::io::ioctl_fionbio(queue, true).map_err(|error| failed(error.into()))?;
        }
        let mut tap = Self {
            queues,
            features: 0,
            parts: Parts::default(),
        };
        if offloads {
            // Kernels before 6.2 do not know segmentation of UDP.
            let with_udp = tap.set_offloads(features::GUEST_OFFLOADS).is_ok();
            tap.features = features::TAP_OFFLOADS | if with_udp { features::TAP_USO } else { 0 };
        }
        tap.set_offloads(0)
            .map_err(|error| TapError::NoTap { index: 0, error })?;
        Ok(tap)
    }
}

#[cfg(any(test, feature = "testing"))]
impl Tap {
    /// Descriptors that are no tap, but take and give one packet a call without waiting.
    pub(super) fn unchecked(queues: Vec<OwnedFd>) -> Self {
        Self {
            queues,
            features: 0,
            parts: Parts::default(),
        }
    }
}

/// Name and flags of the tap behind a descriptor.
fn interface(tap: BorrowedFd<'_>) -> io::Result<(String, i32)> {
    // SAFETY: TUNGETIFF fills a `struct ifreq`, whatever size its number encodes (linux/if_tun.h, drivers/net/tun.c), and every pattern of bits
    // is one.
    let request: libc::ifreq = unsafe { ioctl(tap, Getter::<TUNGETIFF, libc::ifreq>::new()) }?;
    let name: Vec<u8> = request.ifr_name.iter().map(|&byte| byte.cast_unsigned()).collect();
    let name = CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned());
    // SAFETY: of the union, TUNGETIFF filled the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name.unwrap_or_default(), i32::from(flags.cast_unsigned())))
}

/// What is wrong with the flags of a tap that has `queues` descriptors.
fn wrong_flags(flags: i32, queues: usize) -> Option<&'static str> {
    if flags & libc::IFF_TAP == 0 {
        Some("for IP packets (IFF_TUN), not for Ethernet frames (IFF_TAP)")
    } else if flags & libc::IFF_NO_PI == 0 {
        Some("without IFF_NO_PI")
    } else if flags & libc::IFF_VNET_HDR == 0 {
        Some("without IFF_VNET_HDR")
    } else if queues > 1 && flags & libc::IFF_MULTI_QUEUE == 0 {
        Some("without IFF_MULTI_QUEUE, which several queue pairs need")
    } else {
        None
    }
}

fn set_header_bytes(tap: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    unsafe { ioctl(tap, Setter::<TUNSETVNETHDRSZ, i32>::new(HEADER_BYTES as i32)) }?;
    Ok(())
}

/// Whether a system call failed because the tap is gone, and not for this frame only.
fn gone(error: Errno) -> bool {
    // EBADFD: the interface was deleted.
    matches!(error, Errno::BADFD | Errno::BADF | Errno::NODEV)
}

fn part(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast(),
        iov_len: len,
    }
}

/// The parts of `slices` from their byte `skip` on.
fn parts(parts: &mut Vec<libc::iovec>, slices: &[VolatileSlice<'_>], mut skip: usize) {
    for slice in slices {
        let len = slice.len();
        if skip < len {
            // `skip` is inside of the slice.
            parts.push(part(slice.ptr_guard_mut().as_ptr().wrapping_add(skip), len - skip));
        }
        skip = skip.saturating_sub(len);
    }
    parts.truncate(MAX_PARTS - 1);
}

impl Backend for Tap {
    fn ports(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        let flags = features::tun_offloads(features) as usize;
        // The offloads are the interface's, whichever of its queues is asked.
        if let Some(queue) = self.queues.first() {
            // SAFETY: TUNSETOFFLOAD takes its flags by value.
            unsafe { ioctl(queue, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }?;
        }
        Ok(())
    }

    fn receive(&mut self, port: usize, room: &mut Room<'_, '_>) -> Received {
        let mut header = Header::default();
        let into = &mut self.parts.0;
        into.clear();
        // Where there is room the header goes in front of its frame, since each part costs the kernel more than the bytes of a header.
        let in_front = room.slices.first().filter(|first| first.len() >= HEADER_BYTES);
        if in_front.is_some() {
            parts(into, room.slices, 0);
        } else {
            into.push(part(header.0.as_mut_ptr(), HEADER_BYTES));
            parts(into, room.slices, HEADER_BYTES);
        }
        into.push(part(room.spill.as_mut_ptr(), room.spill.len()));
        loop {
            // SAFETY: each part is the header, a stretch of guest memory that its slice keeps mapped, or the spill, which is borrowed mutably. Nobody
            // but the kernel writes to the first and the last meanwhile; guest memory changes at any time, and is only ever seen as volatile.
            let got = unsafe { libc::readv(self.queues[port].as_raw_fd(), into.as_ptr(), into.len() as i32) };
            if got == 0 {
                return Received::Lost("the tap was closed".into());
            }
            if let Ok(got) = usize::try_from(got) {
                if let Some(first) = in_front {
                    // A guest that changes it meanwhile is told of another frame than came, and harms nobody else.
                    first.copy_to(&mut header.0);
                }
                return match got.checked_sub(HEADER_BYTES) {
                    Some(len) => Received::Frame { header, len },
                    None => Received::Bad,
                };
            }
            match last_error() {
                Errno::INTR => {}
                Errno::AGAIN => return Received::Nothing,
                // The frame is gone all the same.
                Errno::FAULT | Errno::INVAL | Errno::NOMEM => return Received::Bad,
                error => return Received::Lost(format!("the tap cannot be read: {error}")),
            }
        }
    }

    fn discard(&mut self, port: usize) -> Received {
        // The kernel cuts off what has no room.
        self.receive(
            port,
            &mut Room {
                slices: &[],
                spill: &mut [0; 64],
            },
        )
    }

    fn send(&mut self, port: usize, header: &Header, slices: &[VolatileSlice<'_>]) -> Sent {
        let mut header = *header;
        let from = &mut self.parts.0;
        from.clear();
        from.push(part(header.0.as_mut_ptr(), HEADER_BYTES));
        parts(from, slices, 0);
        loop {
            // SAFETY: each part is the header or a stretch of guest memory that its slice keeps mapped; the kernel only reads them, and copes with
            // bytes that change meanwhile.
            let sent = unsafe { libc::writev(self.queues[port].as_raw_fd(), from.as_ptr(), from.len() as i32) };
            if sent >= 0 {
                return Sent::Done;
            }
            match last_error() {
                Errno::INTR => {}
                Errno::AGAIN => return Sent::Full,
                error if gone(error) => return Sent::Lost(format!("the tap cannot be written: {error}")),
                error => return Sent::Refused(error.into()),
            }
        }
    }

    fn flush(&mut self, _: usize) -> Sent {
        Sent::Done
    }
}

/// Why the C library's last call on this thread failed.
fn last_error() -> Errno {
    io::Error::last_os_error()
        .raw_os_error()
        .map_or(Errno::IO, Errno::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_those_of_the_kernel_headers() {
        assert_eq!(TUNSETOFFLOAD, 0x4004_54d0);
        assert_eq!(TUNGETIFF, 0x8004_54d2);
        assert_eq!(TUNSETVNETHDRSZ, 0x4004_54d8);
    }

    #[test]
    fn flags_of_a_tap_are_checked() {
        let good = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        assert_eq!(wrong_flags(good, 1), None);
        assert_eq!(wrong_flags(good | libc::IFF_MULTI_QUEUE, 8), None);
        assert!(wrong_flags(good, 2).unwrap().contains("IFF_MULTI_QUEUE"));
        assert!(
            wrong_flags(good & !libc::IFF_VNET_HDR, 1)
                .unwrap()
                .contains("IFF_VNET_HDR")
        );
        assert!(wrong_flags(good & !libc::IFF_NO_PI, 1).unwrap().contains("IFF_NO_PI"));
        assert!(wrong_flags(libc::IFF_TUN, 1).unwrap().contains("IFF_TUN"));
    }

    #[test]
    fn other_files_are_no_taps() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Tap::new(vec![file.into()], true).err().unwrap();
        assert!(
            error.to_string().contains("descriptor 0 of the tap is no tap device"),
            "{error}"
        );
    }
}
