//! kvmtool's lkvm with virtio over PCI and without all that it adds by itself.

use std::process::Stdio;

use super::{Extra, Found, Machine, Peer, StartError, Started, mac};

/// lkvm.
pub(super) const LKVM: Peer = Peer {
    key: "lkvm",
    name: "kvmtool",
    program: "lkvm",
    version_argument: "version",
    has: &[Extra::Tap, Extra::Direct],
    options: |_| Vec::new(),
    start,
};

fn start(found: &Found, machine: &Machine<'_>) -> Started {
    let kernel = machine.kernel.bzimage.or(machine.kernel.flat);
    let Some(kernel) = kernel else {
        return Err(StartError::Unsupported(
            "it boots bzImages alone, which this guest is not".into(),
        ));
    };
    // It keeps sockets in the home folder.
    let home = tempfile::tempdir()?;
    let mut command = found.command();
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
            let (fd, mac) = (tap.inherited()?, mac(tap.mac));
            // What looks like a macvtap's path keeps it from making a device of the descriptor, which is one already.
            format!("mode=tap,tapif=/dev/net/tun,script=none,fd={fd},guest_mac={mac}")
        }
    };
    command.args(["--network", &network]);
    found.spawn(command, Stdio::null(), machine, home)
}
