//! A network namespace with tap devices: nothing in it can disturb the host's network or another test, and the kernel removes all of it when
//! the last descriptor is closed, however the test ends.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::run;
use crate::HarnessError;

/// Bytes of an interface's name with its NUL (IFNAMSIZ).
const NAME_SIZE: usize = 16;
/// Flags of TUNSETIFF (include/uapi/linux/if_tun.h of Linux).
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// `_IOW('T', 202, int)`, whose argument is a `struct ifreq`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    flags: u16,
    padding: [u8; 22],
}

/// A network namespace of one's own. Needs root.
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// A new one, whose loopback device is up.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new() -> Result<Self, HarnessError> {
        let made = thread::spawn(|| {
            // SAFETY: the flag leaves the descriptor table shared; only this short-lived thread's network changes.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = joined(made)?.map_err(HarnessError::io("making a network namespace"))?;
        let namespace = Self { fd: file.into() };
        namespace.command("ip", &["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Runs `work` on a thread inside the namespace; sockets that it makes stay there.
    ///
    /// # Errors
    /// When the thread cannot go there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, HarnessError> {
        let done = thread::scope(|scope| {
            let worker = scope.spawn(|| {
                move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok::<T, io::Error>(work())
            });
            worker.join()
        });
        match done {
            Ok(result) => result.map_err(HarnessError::io("entering a network namespace")),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs `work` on this thread, inside the namespace meanwhile: sockets that it makes and programs that it starts stay there.
    ///
    /// # Errors
    /// When the thread cannot go there, or not back.
    pub fn here<T>(&self, work: impl FnOnce() -> T) -> Result<T, HarnessError> {
        let go = |to: &OwnedFd| {
            let gone = move_into_link_name_space(to.as_fd(), Some(LinkNameSpaceType::Network));
            gone.map_err(io::Error::from)
                .map_err(HarnessError::io("entering a network namespace"))
        };
        let own = File::open("/proc/thread-self/ns/net").map_err(HarnessError::io("opening a network namespace"))?;
        go(&self.fd)?;
        let result = work();
        go(&own.into())?;
        Ok(result)
    }

    /// Runs a program inside the namespace; what it printed, in bytes.
    ///
    /// # Errors
    /// [`HarnessError::Command`].
    pub fn command(&self, program: &str, arguments: &[&str]) -> Result<Vec<u8>, HarnessError> {
        self.enter(|| run(program, arguments))?
    }

    /// A tap device with this address ("10.0.0.1/24") at the host's end, and a descriptor for the guest's.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn tap(&self, name: &str, address: &str) -> Result<OwnedFd, HarnessError> {
        let fd = self
            .enter(|| open_tap(name))?
            .map_err(HarnessError::io("making a tap device"))?;
        self.command("ip", &["addr", "add", address, "dev", name])?;
        self.command("ip", &["link", "set", name, "up"])?;
        Ok(fd)
    }
}

fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let mut request = InterfaceRequest {
        name: [0; NAME_SIZE],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        padding: [0; 22],
    };
    if name.len() >= NAME_SIZE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name of a tap device is too long",
        ));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` has the layout and size of.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun.into())
}

fn joined<T>(thread: thread::JoinHandle<T>) -> Result<T, HarnessError> {
    match thread.join() {
        Ok(result) => Ok(result),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
