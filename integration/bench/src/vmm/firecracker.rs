//! Firecracker without its jailer, configured by a file, with virtio over PCI; a disk by io_uring, whose flushes are obeyed.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::json;

use super::{Machine, Process, Running, StartError, Vmm, find};

/// Firecracker.
pub(crate) struct Firecracker {
    program: PathBuf,
}

impl Firecracker {
    /// Looks for it.
    pub(crate) fn find(named: Option<&Path>) -> Option<Self> {
        let program = find("firecracker", named)?;
        Some(Self { program })
    }
}

impl Vmm for Firecracker {
    fn name(&self) -> &'static str {
        "Firecracker"
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
        let drives = match &machine.disk {
            None => json!([]),
            Some(disk) if disk.direct => {
                return Err(StartError::Unsupported("it has no disk past the page cache".into()));
            }
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
        let mut command = Command::new(&self.program);
        // Its log goes to standard output, the guest's serial port, if it is not told where to go.
        command
            .args(["--no-api", "--level", "Error", "--log-path", "/dev/stderr"])
            .arg("--config-file")
            .arg(file.path());
        if pci {
            command.arg("--enable-pci");
        }
        Process::spawn(self.name(), command, Stdio::null(), machine, file)
    }
}
