//! cloud-hypervisor, with its seccomp filters, as it starts by itself; a disk by io_uring, as it has it where the host allows that.

use std::{
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Extra, Machine, Process, Running, StartError, Vmm, find, mac};

/// cloud-hypervisor.
pub(crate) struct CloudHypervisor {
    program: PathBuf,
}

impl CloudHypervisor {
    /// Looks for it.
    pub(crate) fn find(named: Option<&Path>) -> Option<Self> {
        let program = find("cloud-hypervisor", named)?;
        Some(Self { program })
    }
}

impl Vmm for CloudHypervisor {
    fn name(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn version(&self) -> String {
        super::first_line_of(&self.program, &["--version"])
    }

    fn has(&self, extra: Extra) -> bool {
        match extra {
            Extra::Qcow2 => true,
            Extra::Balloon => false,
        }
    }

    fn start(&self, machine: &Machine<'_>) -> Result<Box<dyn Running>, StartError> {
        let mut command = Command::new(&self.program);
        command
            .arg("--kernel")
            .arg(machine.kernel.elf)
            .args(["--cmdline", machine.cmdline])
            // Devices lie below the top of the address space: where a guest with four levels of page tables reaches.
            .args(["--cpus", &format!("boot={},max_phys_bits=39", machine.cpus)])
            .args(["--memory", &format!("size={}M", machine.memory_mib)])
            .args(["--serial", "tty", "--console", "off"]);
        if let Some(initrd) = machine.initrd {
            command.arg("--initramfs").arg(initrd);
        }
        if let Some(disk) = &machine.disk {
            let direct = if disk.direct { "on" } else { "off" };
            let format = if disk.qcow2 { "qcow2" } else { "raw" };
            let disk = format!("path={},direct={direct},image_type={format}", disk.path.display());
            command.args(["--disk", &disk]);
        }
        if let Some(tap) = &machine.tap {
            fcntl_setfd(tap.fd, FdFlags::empty())?;
            let net = format!("fd=[{}],mac={}", tap.fd.as_raw_fd(), mac(tap.mac));
            command.args(["--net", &net]);
        }
        Process::spawn(self.name(), command, Stdio::null(), machine, ())
    }
}
