//! alioth, entered by PVH; a disk on its default loop, which beats its io_uring with the requests that are measured here.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    ptr,
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Machine, Process, Running, StartError, Vmm, find};

/// alioth.
pub(crate) struct Alioth {
    program: PathBuf,
}

impl Alioth {
    /// Looks for it.
    pub(crate) fn find(named: Option<&Path>) -> Option<Self> {
        let program = find("alioth", named)?;
        Some(Self { program })
    }
}

impl Vmm for Alioth {
    fn name(&self) -> &'static str {
        "alioth"
    }

    fn version(&self) -> String {
        super::first_line_of(&self.program, &["--version"])
    }

    fn start(&self, machine: &Machine<'_>) -> Result<Box<dyn Running>, StartError> {
        if machine.tap.is_some() {
            return Err(StartError::Unsupported(
                "it takes no tap device that is open already".into(),
            ));
        }
        let mut command = Command::new(&self.program);
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
        match &machine.disk {
            None => {}
            Some(disk) if disk.direct => {
                return Err(StartError::Unsupported("it has no disk past the page cache".into()));
            }
            Some(disk) => {
                command.args(["--blk", &format!("file,path={}", disk.path.display())]);
            }
        }
        // Nobody types, and nobody hangs up.
        let (ours, its) = terminal()?;
        Process::spawn(self.name(), command, its.into(), machine, ours)
    }
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
