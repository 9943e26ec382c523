//! Taps that the manager makes, or opens if they are there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::interface::{self, Interfaces};
use super::{NetworkError, failed};

/// Names that the kernel completes with a number.
const PATTERN: &str = "sepal%d";
/// Where taps come from.
const TUN: &str = "/dev/net/tun";
/// What failed where the kernel takes no requests about interfaces.
const NO_SOCKET: &str = "no socket for the network's settings";
/// What a network device needs of its tap.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// The tap `name`, as it is if it is there, else made, with `mtu` and up. An empty name: one that is free.
pub(super) fn named(name: &str, queues: u16, mtu: u16) -> Result<Vec<OwnedFd>, NetworkError> {
    if name.is_empty() {
        return make(PATTERN, queues, mtu, None);
    }
    if !interface::is_name(name) {
        return Err(NetworkError::Name(name.to_owned()));
    }
    let interfaces = Interfaces::new().map_err(failed(NO_SOCKET))?;
    if interfaces.index(name).is_some() {
        adopt(name, queues)
    } else {
        make(name, queues, mtu, None)
    }
}

/// A new tap, joined to `bridge`.
pub(super) fn bridged(bridge: &str, queues: u16, mtu: u16) -> Result<Vec<OwnedFd>, NetworkError> {
    if !interface::is_name(bridge) {
        return Err(NetworkError::Name(bridge.to_owned()));
    }
    make(PATTERN, queues, mtu, Some(bridge))
}

/// Whether a tap of this name (empty: of one that is free) could be there, joined to `bridge`, as far as can be told without making one.
pub(super) fn check(name: &str, bridge: Option<&str>) -> Result<(), NetworkError> {
    for name in [name].into_iter().filter(|name| !name.is_empty()).chain(bridge) {
        if !interface::is_name(name) {
            return Err(NetworkError::Name(name.to_owned()));
        }
    }
    if !Path::new(TUN).exists() {
        return Err(NetworkError::NoTun);
    }
    let interfaces = Interfaces::new().map_err(failed(NO_SOCKET))?;
    match bridge {
        Some(bridge) if interfaces.index(bridge).is_none() => Err(NetworkError::NoBridge(bridge.to_owned())),
        _ => Ok(()),
    }
}

/// Opens a tap that is there. Its settings are its owner's.
fn adopt(name: &str, queues: u16) -> Result<Vec<OwnedFd>, NetworkError> {
    let several = queues > 1;
    let opened = match open(name, queues, several) {
        // It may have been made for several queues, of which one is enough.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && !several => open(name, queues, true),
        opened => opened,
    };
    opened
        .map(|(_, taps)| taps)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => NetworkError::NotOwner(name.to_owned()),
            Some(libc::EBUSY) => NetworkError::Busy(name.to_owned()),
            Some(libc::EINVAL) => NetworkError::NoTap {
                name: name.to_owned(),
                queues: if several { "several queues" } else { "Ethernet frames" },
            },
            _ => not_opened(error),
        })
}

fn make(name: &str, queues: u16, mtu: u16, bridge: Option<&str>) -> Result<Vec<OwnedFd>, NetworkError> {
    let interfaces = Interfaces::new().map_err(failed(NO_SOCKET))?;
    let missing = |bridge: &&str| interfaces.index(bridge).is_none();
    if let Some(bridge) = bridge.filter(missing) {
        return Err(NetworkError::NoBridge(bridge.to_owned()));
    }
    let (name, taps) = open(name, queues, queues > 1).map_err(not_opened)?;
    interfaces
        .set_mtu(&name, mtu)
        .map_err(failed(format!("give the tap {name} an MTU of {mtu} bytes")))?;
    if let Some(bridge) = bridge {
        let index = interfaces.index(&name).unwrap_or_default();
        interfaces
            .join(bridge, index)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EINVAL) => NetworkError::NotBridge(bridge.to_owned()),
                Some(libc::ENODEV) => NetworkError::NoBridge(bridge.to_owned()),
                _ => failed(format!("join the tap {name} to the bridge {bridge}"))(error),
            })?;
    }
    interfaces
        .set_up(&name)
        .map_err(failed(format!("bring the tap {name} up")))?;
    Ok(taps)
}

/// Why /dev/net/tun, or a new tap, was not to be had.
fn not_opened(error: io::Error) -> NetworkError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => NetworkError::NoTun,
        Some(libc::EACCES) => NetworkError::TunDenied(error),
        _ => failed("make a tap device")(error),
    }
}

/// Opens the tap `name`, once for each queue, and says how it is really called.
fn open(name: &str, queues: u16, several: bool) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut name = name.to_owned();
    let mut taps = Vec::new();
    for _ in 0..queues {
        let tun = OpenOptions::new().read(true).write(true).open(TUN)?;
        name = attach(&tun, &name, several)?;
        taps.push(tun.into());
    }
    Ok((name, taps))
}

/// Makes `tun` a queue of the tap `name`.
fn attach(tun: &File, name: &str, several: bool) -> io::Result<String> {
    let mut request = interface::request(name);
    let flags = FLAGS | if several { libc::IFF_MULTI_QUEUE } else { 0 };
    // All of the flags are in the low 16 bits.
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF reads and fills a `struct ifreq`.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done == 0 {
        Ok(interface::name(&request))
    } else {
        Err(io::Error::last_os_error())
    }
}
