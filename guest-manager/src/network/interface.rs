//! Network interfaces by name: what netdevice(7) and the bridge's ioctls offer. Each needs CAP_NET_ADMIN, but for asking.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

/// Joins an interface to a bridge (linux/sockios.h).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// A `struct ifreq` about the interface `name`, which has been checked.
pub(super) fn request(name: &str) -> libc::ifreq {
    // SAFETY: the structure has integers and a union of integers and pointers only; zeroes are a value of all of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays 0.
    let room = request.ifr_name.len() - 1;
    for (place, byte) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    request
}

/// The name in a request that the kernel filled in.
pub(super) fn name(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|byte| byte.cast_unsigned());
    String::from_utf8_lossy(&bytes.take_while(|&byte| byte != 0).collect::<Vec<u8>>()).into_owned()
}

/// Whether an interface can have this name (the kernel's `dev_valid_name`; '%' would make it a pattern).
pub(super) fn is_name(name: &str) -> bool {
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
    (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != ".." && !name.contains(bad)
}

/// Any socket, through which the kernel takes requests about interfaces.
pub(super) struct Interfaces(OwnedFd);

impl Interfaces {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?))
    }

    /// The interface's index, if there is one.
    pub(super) fn index(&self, name: &str) -> Option<u32> {
        netdevice::name_to_index(&self.0, name).ok()
    }

    pub(super) fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.call(libc::SIOCSIFMTU, &mut request)
    }

    pub(super) fn set_up(&self, name: &str) -> io::Result<()> {
        let mut request = request(name);
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS filled this part of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
        self.call(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Joins the interface of index `port` to the bridge `bridge`.
    pub(super) fn join(&self, bridge: &str, port: u32) -> io::Result<()> {
        let mut request = request(bridge);
        request.ifr_ifru.ifru_ifindex = port.cast_signed();
        self.call(SIOCBRADDIF, &mut request)
    }

    fn call(&self, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: all requests above read, and some fill, a `struct ifreq`.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), what, request) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "tap0", "sepal-tap.15byt", "..."] {
            assert!(is_name(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "a:1",
            "tap%d",
            "sixteen-bytes-xx",
            "a\n",
            "a\0",
        ] {
            assert!(!is_name(bad), "{bad}");
        }
        assert_eq!(name(&request("tap0")), "tap0");
    }
}
