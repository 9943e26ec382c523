//! cloud-hypervisor, with its seccomp filters, as it starts by itself; a disk by io_uring, as it has it where the host allows that.

use std::process::Stdio;

use super::{Extra, Found, Machine, Peer, Started, mac};

/// cloud-hypervisor.
pub(super) const CLOUD_HYPERVISOR: Peer = Peer {
    key: "cloud-hypervisor",
    name: "cloud-hypervisor",
    program: "cloud-hypervisor",
    version_argument: "--version",
    has: &[Extra::Tap, Extra::Direct, Extra::Qcow2],
    options: |_| Vec::new(),
    start,
};

fn start(found: &Found, machine: &Machine<'_>) -> Started {
    let mut command = found.command();
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
        let net = format!("fd=[{}],mac={}", tap.inherited()?, mac(tap.mac));
        command.args(["--net", &net]);
    }
    found.spawn(command, Stdio::null(), machine, ())
}
