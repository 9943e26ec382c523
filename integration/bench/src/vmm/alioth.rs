//! alioth, entered by PVH; a disk on its default loop, which beats its io_uring with the requests that are measured here.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
    ptr,
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Found, Machine, Peer, Started};

/// alioth.
pub(super) const ALIOTH: Peer = Peer {
    key: "alioth",
    name: "alioth",
    program: "alioth",
    version_argument: "--version",
    has: &[],
    options: |_| Vec::new(),
    start,
};

fn start(found: &Found, machine: &Machine<'_>) -> Started {
    let mut command = found.command();
    command
        .args(["-l", "error", "boot", "--pvh"])
        .arg(machine.kernel.elf)
        .args(["--memory", &format!("size={}M", machine.memory_mib)])
        .args(["--cpu", &format!("count={}", machine.cpus)]);
    if !machine.cmdline.is_empty() {
        command.args(["--cmdline", machine.cmdline]);
    }
    if let Some(initrd) = machine.initrd {
        command.arg("--initramfs").arg(initrd);
    }
    if let Some(disk) = &machine.disk {
        command.args(["--blk", &format!("file,path={}", disk.path.display())]);
    }
    // Nobody types, and nobody hangs up.
    let (ours, its) = terminal()?;
    found.spawn(command, its.into(), machine, ours)
}

/// A terminal's two ends, the user's and the program's: it wants its standard input to be one.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let (mut ours, mut its) = (-1, -1);
    // SAFETY: both numbers are written, nothing else is touched: name, attributes and size may be null.
    let result = unsafe { libc::openpty(&raw mut ours, &raw mut its, ptr::null_mut(), ptr::null(), ptr::null()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are open, and nobody else's.
    let ends = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(its)) };
    for end in [&ends.0, &ends.1] {
        fcntl_setfd(end, FdFlags::CLOEXEC)?;
    }
    Ok(ends)
}
