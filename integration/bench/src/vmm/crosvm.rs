//! crosvm without its sandbox, so that no minijail has to be set up on the host; nothing but what the machine asks for.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use super::{Extra, Found, Machine, Peer, Started, mac};

/// crosvm.
pub(super) const CROSVM: Peer = Peer {
    key: "crosvm",
    name: "crosvm",
    program: "crosvm",
    version_argument: "version",
    has: &[Extra::Tap, Extra::Direct, Extra::Qcow2],
    options: without,
    start,
};

/// Options that leave out devices nobody asked for; a build without such a device does not know the option.
fn without(program: &Path) -> Vec<&'static str> {
    let help = Command::new(program).args(["run", "--help"]).output();
    let help = help.map(|output| output.stdout).unwrap_or_default();
    let help = String::from_utf8_lossy(&help);
    let mut without = vec!["--no-balloon", "--no-rng", "--no-usb"];
    without.retain(|option| help.contains(option));
    without
}

fn start(found: &Found, machine: &Machine<'_>) -> Started {
    let mut command = found.command();
    command
        .args(["--log-level", "error", "run", "--disable-sandbox"])
        .args(&found.options)
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
        let net = format!("tap-fd={},mac=\"{}\"", tap.inherited()?, mac(tap.mac));
        command.args(["--net", &net]);
    }
    // It wants kernels at 2 MiB or above; one that lies lower has to move itself.
    let kernel = machine.kernel.bzimage.unwrap_or(machine.kernel.elf);
    command.arg(kernel);
    found.spawn(command, Stdio::null(), machine, ())
}
