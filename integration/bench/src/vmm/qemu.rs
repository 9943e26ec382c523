//! QEMU's microvm with virtio over PCI; a disk on an I/O thread with io_uring, as its users are told to for speed.

use std::{path::Path, process::Stdio};

use super::{Extra, Found, Machine, Peer, Started, mac, qmp::Monitor};

/// QEMU.
pub(super) const QEMU: Peer = Peer {
    key: "qemu",
    name: "QEMU microvm",
    program: "qemu-system-x86_64",
    version_argument: "--version",
    has: &[Extra::Tap, Extra::Direct, Extra::Qcow2, Extra::Balloon],
    options: |_| Vec::new(),
    start,
};

fn start(found: &Found, machine: &Machine<'_>) -> Started {
    // Its copy of the host's processor fails on a host without hardware virtualization.
    let processor = if Path::new("/sys/module/kvm_pvm").exists() {
        "qemu64"
    } else {
        "host"
    };
    let devices = machine.disk.is_some() || machine.tap.is_some() || machine.balloon;
    let pcie = if devices { "on" } else { "off" };
    let mut command = found.command();
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
        command
            .args(["-netdev", &format!("tap,id=net,fd={},vhost=off", tap.inherited()?)])
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
    let running = found.spawn(command, Stdio::null(), machine, ())?;
    Ok(match monitor {
        Some(monitor) => Box::new(monitor.of(running, machine.memory_mib)),
        None => running,
    })
}
