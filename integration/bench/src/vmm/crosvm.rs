//! crosvm without its sandbox, so that no minijail has to be set up on the host; nothing but what the machine asks for.

use std::{
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Extra, Machine, Process, Running, StartError, Vmm, find, mac};

/// crosvm.
pub(crate) struct Crosvm {
    program: PathBuf,
    /// Options that leave out devices nobody asked for; a build without such a device does not know the option.
    without: Vec<&'static str>,
}

impl Crosvm {
    /// Looks for it.
    pub(crate) fn find(named: Option<&Path>) -> Option<Self> {
        let program = find("crosvm", named)?;
        let help = Command::new(&program).args(["run", "--help"]).output().ok()?.stdout;
        let help = String::from_utf8_lossy(&help).into_owned();
        let mut without = vec!["--no-balloon", "--no-rng", "--no-usb"];
        without.retain(|option| help.contains(option));
        Some(Self { program, without })
    }
}

impl Vmm for Crosvm {
    fn name(&self) -> &'static str {
        "crosvm"
    }

    fn version(&self) -> String {
        super::first_line_of(&self.program, &["version"])
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
            .args(["--log-level", "error", "run", "--disable-sandbox"])
            .args(&self.without)
            .args(["--serial", "type=stdout,hardware=serial,num=1,console=true"])
            .args(["--mem", &format!("size={}", machine.memory_mib)])
            .args(["--cpus", &format!("num-cores={}", machine.cpus)]);
        if !machine.cmdline.is_empty() {
            command.args(["--params", machine.cmdline]);
        }
        if let Some(initrd) = machine.initrd {
            command.arg("--initrd").arg(initrd);
        }
        if let Some(disk) = &machine.disk {
            command.args([
                "--block",
                &format!("path={},direct={}", disk.path.display(), disk.direct),
            ]);
        }
        if let Some(tap) = &machine.tap {
            fcntl_setfd(tap.fd, FdFlags::empty())?;
            let net = format!("tap-fd={},mac=\"{}\"", tap.fd.as_raw_fd(), mac(tap.mac));
            command.args(["--net", &net]);
        }
        // It wants kernels at 2 MiB or above; one that lies lower has to move itself.
        let kernel = machine.kernel.bzimage.unwrap_or(machine.kernel.elf);
        command.arg(kernel);
        Process::spawn(self.name(), command, Stdio::null(), machine, ())
    }
}
