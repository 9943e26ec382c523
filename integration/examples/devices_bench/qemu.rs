//! The peer: QEMU's microvm with virtio over PCI, the disk on an I/O thread with io_uring.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Write as _},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use rustix::io::{FdFlags, fcntl_setfd};
use sepal_integration::{HarnessError, Report};
use tempfile::NamedTempFile;

use crate::{Device, Failure, GUEST_MAC, Run};

/// A guest under QEMU, which ends with this.
struct Qemu {
    child: Child,
    output: BufReader<ChildStdout>,
    /// What it printed so far, for errors.
    printed: String,
    _kernel: NamedTempFile,
    _tap: Option<OwnedFd>,
}

/// Starts the driver guest.
pub(crate) fn start(commands: &str, device: Device<'_>) -> Result<Box<dyn Run>, Failure> {
    let mut kernel = NamedTempFile::new()?;
    kernel.write_all(sepal_driver_guest::IMAGE)?;
    // QEMU's copy of the host's processor fails on a host without hardware virtualization.
    let processor = if Path::new("/sys/module/kvm_pvm").exists() {
        "qemu64"
    } else {
        "host"
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,pcie=on,pit=off,pic=off",
            "-accel",
            "kvm",
            "-cpu",
            processor,
            "-m",
            "128",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-serial",
            "stdio",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel.path())
        .args(["-append", &format!("run={commands}")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut tap = None;
    match device {
        Device::Disk(path) => {
            let drive = format!("if=none,id=disk,file={},format=raw,aio=io_uring", path.display());
            command
                .args(["-object", "iothread,id=loop", "-drive", &drive])
                .args(["-device", "virtio-blk-pci,drive=disk,iothread=loop,disable-legacy=on"]);
        }
        Device::Tap(fd) => {
            fcntl_setfd(&fd, FdFlags::empty())?;
            let mut mac = String::new();
            for byte in GUEST_MAC {
                write!(mac, ":{byte:02x}")?;
            }
            command
                .args(["-netdev", &format!("tap,id=net,fd={},vhost=off", fd.as_raw_fd())])
                .args([
                    "-device",
                    &format!("virtio-net-pci,netdev=net,disable-legacy=on,mac={}", &mac[1..]),
                ]);
            tap = Some(fd);
        }
    }
    let mut child = command.spawn()?;
    let output = child.stdout.take().ok_or("QEMU has no output")?;
    Ok(Box::new(Qemu {
        child,
        output: BufReader::new(output),
        printed: String::new(),
        _kernel: kernel,
        _tap: tap,
    }))
}

impl Qemu {
    fn line(&mut self, what: &str) -> Result<String, HarnessError> {
        let mut line = Vec::new();
        let count = self.output.read_until(b'\n', &mut line).unwrap_or(0);
        if count == 0 {
            return Err(HarnessError::Failed(format!(
                "QEMU ended before {what}:\n{}",
                self.printed
            )));
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        self.printed.push_str(&line);
        Ok(line)
    }
}

impl Run for Qemu {
    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError> {
        while !self.line(text)?.contains(text) {}
        Ok(())
    }

    fn report(&mut self, command: &str) -> Result<Report, HarnessError> {
        loop {
            let line = self.line(command)?;
            if Report::is_about(command, line.as_bytes()) {
                return Report::parse(&line);
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
