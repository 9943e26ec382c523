//! Firecracker without its jailer, configured by a file, with virtio over PCI; a disk by io_uring, whose flushes are obeyed.

use std::process::Stdio;

use serde_json::json;

use super::{Found, Machine, Peer, Started};

/// Firecracker.
pub(super) const FIRECRACKER: Peer = Peer {
    key: "firecracker",
    name: "Firecracker",
    program: "firecracker",
    version_argument: "--version",
    has: &[],
    options: |_| Vec::new(),
    start,
};

fn start(found: &Found, machine: &Machine<'_>) -> Started {
    let drives = match &machine.disk {
        None => json!([]),
        Some(disk) => json!([{
            "drive_id": "disk",
            "path_on_host": disk.path,
            "is_root_device": false,
            "is_read_only": false,
            "cache_type": "Writeback",
            "io_engine": "Async",
        }]),
    };
    let pci = machine.disk.is_some();
    let config = json!({
        "boot-source": {
            "kernel_image_path": machine.kernel.elf,
            "boot_args": machine.cmdline,
            "initrd_path": machine.initrd,
        },
        "machine-config": { "vcpu_count": machine.cpus, "mem_size_mib": machine.memory_mib },
        "drives": drives,
    });
    let file = tempfile::NamedTempFile::new()?;
    serde_json::to_writer(&file, &config)?;
    let mut command = found.command();
    // Its log goes to standard output, the guest's serial port, if it is not told where to go.
    command
        .args(["--no-api", "--level", "Error", "--log-path", "/dev/stderr"])
        .arg("--config-file")
        .arg(file.path());
    if pci {
        command.arg("--enable-pci");
    }
    found.spawn(command, Stdio::null(), machine, file)
}
