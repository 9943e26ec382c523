//! QEMU's microvm with virtio over PCI; a disk on an I/O thread with io_uring, as its users are told to for speed.

use std::{
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Extra, Machine, Process, Running, StartError, Vmm, find, mac, qmp::Monitor};

/// QEMU.
pub(crate) struct Qemu {
    program: PathBuf,
}

impl Qemu {
    /// Looks for it.
    pub(crate) fn find(named: Option<&Path>) -> Option<Self> {
        let program = find("qemu-system-x86_64", named)?;
        Some(Self { program })
    }
}

impl Vmm for Qemu {
    fn name(&self) -> &'static str {
        "QEMU microvm"
    }

    fn version(&self) -> String {
        super::first_line_of(&self.program, &["--version"])
    }

    fn has(&self, extra: Extra) -> bool {
        match extra {
            Extra::Qcow2 | Extra::Balloon => true,
        }
    }

    fn start(&self, machine: &Machine<'_>) -> Result<Box<dyn Running>, StartError> {
        // Its copy of the host's processor fails on a host without hardware virtualization.
        let processor = if Path::new("/sys/module/kvm_pvm").exists() {
            "qemu64"
        } else {
            "host"
        };
        let devices = machine.disk.is_some() || machine.tap.is_some() || machine.balloon;
        let pcie = if devices { "on" } else { "off" };
        let mut command = Command::new(&self.program);
        command
            .args([
                "-M",
                &format!("microvm,pcie={pcie},pit=off,pic=off,rtc=off,x-option-roms=off"),
            ])
            .args([
                "-accel",
                "kvm",
                "-cpu",
                processor,
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
            ])
            // Its other firmware takes many times as long.
            .args([
                "-bios",
                "qboot.rom",
                "-display",
                "none",
                "-monitor",
                "none",
                "-serial",
                "stdio",
            ])
            .args(["-m", &machine.memory_mib.to_string(), "-smp", &machine.cpus.to_string()])
            .arg("-kernel")
            .arg(machine.kernel.elf)
            .args(["-append", machine.cmdline]);
        if let Some(initrd) = machine.initrd {
            command.arg("-initrd").arg(initrd);
        }
        if let Some(disk) = &machine.disk {
            let cache = if disk.direct { "on" } else { "off" };
            let format = if disk.qcow2 { "qcow2" } else { "raw" };
            let drive = format!(
                "if=none,id=disk,file={},format={format},aio=io_uring,cache.direct={cache}",
                disk.path.display()
            );
            command
                .args(["-object", "iothread,id=loop", "-drive", &drive])
                .args(["-device", "virtio-blk-pci,drive=disk,iothread=loop,disable-legacy=on"]);
        }
        if let Some(tap) = &machine.tap {
            fcntl_setfd(tap.fd, FdFlags::empty())?;
            command
                .args(["-netdev", &format!("tap,id=net,fd={},vhost=off", tap.fd.as_raw_fd())])
                .args([
                    "-device",
                    &format!("virtio-net-pci,netdev=net,disable-legacy=on,mac={}", mac(tap.mac)),
                ]);
        }
        let monitor = machine.balloon.then(Monitor::new).transpose()?;
        if let Some(monitor) = &monitor {
            command
                .args(["-device", "virtio-balloon-pci,disable-legacy=on"])
                .args(monitor.arguments());
        }
        let running = Process::spawn(self.name(), command, Stdio::null(), machine, ())?;
        Ok(match monitor {
            Some(monitor) => Box::new(monitor.of(running, machine.memory_mib)),
            None => running,
        })
    }
}
