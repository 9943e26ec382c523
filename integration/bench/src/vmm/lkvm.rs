//! kvmtool's lkvm with virtio over PCI and without all that it adds by itself.

use std::{
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Machine, Process, Running, StartError, Vmm, find, mac};

/// lkvm.
pub(crate) struct Lkvm {
    program: PathBuf,
}

impl Lkvm {
    /// Looks for it.
    pub(crate) fn find(named: Option<&Path>) -> Option<Self> {
        let program = find("lkvm", named)?;
        Some(Self { program })
    }
}

impl Vmm for Lkvm {
    fn name(&self) -> &'static str {
        "kvmtool"
    }

    fn version(&self) -> String {
        super::first_line_of(&self.program, &["version"])
    }

    fn start(&self, machine: &Machine<'_>) -> Result<Box<dyn Running>, StartError> {
        let kernel = machine.kernel.bzimage.or(machine.kernel.flat);
        let Some(kernel) = kernel else {
            return Err(StartError::Unsupported(
                "it boots bzImages alone, which this guest is not".into(),
            ));
        };
        // It keeps sockets in the home folder.
        let home = tempfile::tempdir()?;
        let mut command = Command::new(&self.program);
        command
            .env("HOME", home.path())
            .args(["run", "--nodefaults", "--loglevel", "error"])
            .args(["--console", "serial", "--virtio-transport", "pci", "--kernel"])
            .arg(kernel)
            .args(["--mem", &machine.memory_mib.to_string()])
            .args(["--cpus", &machine.cpus.to_string()]);
        // It has no ACPI, which would say where the configuration space is in memory: nowhere.
        let cmdline = format!("{} pci=ports", machine.cmdline);
        command.args(["--params", cmdline.trim_start()]);
        if let Some(initrd) = machine.initrd {
            command.arg("--initrd").arg(initrd);
        }
        if let Some(disk) = &machine.disk {
            let direct = if disk.direct { ",direct" } else { "" };
            command.args(["--disk", &format!("{}{direct}", disk.path.display())]);
        }
        let network = match &machine.tap {
            None => "mode=none".to_owned(),
            Some(tap) => {
                fcntl_setfd(tap.fd, FdFlags::empty())?;
                let (fd, mac) = (tap.fd.as_raw_fd(), mac(tap.mac));
                // What looks like a macvtap's path keeps it from making a device of the descriptor, which is one already.
                format!("mode=tap,tapif=/dev/net/tun,script=none,fd={fd},guest_mac={mac}")
            }
        };
        command.args(["--network", &network]);
        Process::spawn(self.name(), command, Stdio::null(), machine, home)
    }
}
