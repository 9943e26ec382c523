//! Keeps a context id from guests of other monitors of this host, whose sockets the host's kernel serves (vhost-vsock).
//!
//! Guests of ours never meet the kernel's table of context ids, so a number can be in both, and a person would take one guest for the other.
//! Where the kernel serves such guests at all, the number is taken there, too, for as long as the guest has it. A host where nobody has used
//! vhost-vsock so far, or where this user may not, is left as it is: then nothing is known of other monitors' numbers.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::ioctl::{Setter, opcode};

/// The kernel's module; opening the device would load it.
const MODULE: &str = "/sys/module/vhost_vsock";
/// The kernel's device.
const DEVICE: &str = "/dev/vhost-vsock";
/// VHOST_VSOCK_SET_GUEST_CID, `_IOW(0xaf, 0x60, __u64)` (linux/vhost.h).
const SET_GUEST_CID: rustix::ioctl::Opcode = opcode::write::<u64>(0xaf, 0x60);

/// A guest that the kernel serves has the context id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a guest of another monitor has the context id {0}")]
pub(crate) struct InUse(u32);

/// A context id that the kernel gives to nobody else until what is in here is closed.
#[derive(Debug)]
pub(crate) struct Reservation {
    device: Option<OwnedFd>,
}

impl Reservation {
    /// What holds it, if anything has to.
    pub(crate) fn into_fd(self) -> Option<OwnedFd> {
        self.device
    }
}

/// Reserves `cid` with the kernel, as far as that has such guests and lets this user ask.
///
/// # Errors
/// Somebody else's guest has it.
pub(crate) fn reserve(cid: u32) -> Result<Reservation, InUse> {
    if !Path::new(MODULE).exists() {
        return Ok(Reservation { device: None });
    }
    reserve_at(Path::new(DEVICE), cid)
}

fn reserve_at(device: &Path, cid: u32) -> Result<Reservation, InUse> {
    let unknown = |error: io::Error| {
        tracing::debug!("{}: {error}; other monitors' context ids are unknown", device.display());
        Ok(Reservation { device: None })
    };
    let device: OwnedFd = match OpenOptions::new().read(true).write(true).open(device) {
        Ok(device) => device.into(),
        Err(error) => return unknown(error),
    };
    match set_cid(device.as_fd(), cid) {
        Ok(()) => Ok(Reservation { device: Some(device) }),
        Err(rustix::io::Errno::ADDRINUSE) => Err(InUse(cid)),
        Err(error) => unknown(error.into()),
    }
}

fn set_cid(device: impl AsFd, cid: u32) -> rustix::io::Result<()> {
    // SAFETY: the request takes a pointer to a u64 that it reads, which is what `Setter` passes.
    let request = unsafe { Setter::<SET_GUEST_CID, u64>::new(cid.into()) };
    // SAFETY: the request changes nothing but the device's own number.
    unsafe { rustix::ioctl::ioctl(device, request) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_number_that_the_kernel_knows() {
        assert_eq!(SET_GUEST_CID, 0x4008_af60);
    }

    #[test]
    fn a_host_without_thedevice_keeps_nobody_from_a_number() {
        let folder = tempfile::tempdir().unwrap();
        let none = reserve_at(&folder.path().join("vhost-vsock"), 3).unwrap();
        assert!(none.device.is_none());
        // Something else than the device knows no such request.
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(reserve_at(&file, 3).unwrap().device.is_none());
    }

    #[test]
    fn a_number_is_given_once_where_the_kernel_has_such_guests() {
        // Far from what anybody chooses.
        let cid = 0x7000_0000 + std::process::id();
        let first = reserve(cid).unwrap();
        if first.device.is_none() {
            println!("skipped: no vhost-vsock");
            return;
        }
        assert_eq!(reserve(cid).unwrap_err(), InUse(cid));
        drop(first);
        reserve(cid).unwrap();
    }
}
