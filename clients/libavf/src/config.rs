//! A raw configuration: what a program has set so far.

use std::{
    ffi::c_int,
    os::fd::{FromRawFd, OwnedFd},
};

/// Bytes of an instance id.
pub(crate) const INSTANCE_ID: usize = 64;

/// A disk.
pub(crate) struct Disk {
    pub(crate) image: OwnedFd,
    pub(crate) writable: bool,
}

/// A range of guest memory that a memfd backs.
pub(crate) struct Memory {
    pub(crate) memfd: OwnedFd,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// What is behind a handle `AVirtualMachineRawConfig`.
#[derive(Default)]
pub struct RawConfig {
    pub(crate) name: Option<String>,
    pub(crate) instance_id: Option<[u8; INSTANCE_ID]>,
    pub(crate) kernel: Option<OwnedFd>,
    pub(crate) initrd: Option<OwnedFd>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) memory_mib: i32,
    pub(crate) protected_vm: bool,
    pub(crate) balloon: bool,
    pub(crate) memory: Vec<Memory>,
}

/// Takes over the descriptor with this number; none if there is none.
///
/// # Safety
/// If it is open, it is the caller's to give away.
pub(crate) unsafe fn take_fd(number: c_int) -> Option<OwnedFd> {
    // SAFETY: only asks about the number. What is taken is not for the programs that this process may start.
    if number < 0 || unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return None;
    }
    // SAFETY: it is open, and the caller gives it away.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}
