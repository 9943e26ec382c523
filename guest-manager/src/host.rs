//! What the host is like: facts that a jailed component cannot find out, and that explain a guest's problems.

use std::{
    fs::{File, OpenOptions},
    io,
    path::Path,
};

use sepal_schema::error::{Error, Kind};

/// The device through which virtual machines are made.
const KVM: &str = "/dev/kvm";

/// The host's kind, found out once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Host {
    /// KVM works without hardware virtualization here, so that guests need help and kernels run slowly.
    pub unassisted: bool,
}

impl Host {
    /// Looks at the host.
    pub fn detect() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let pvm = Path::new("/sys/module/kvm_pvm").exists();
        Self {
            unassisted: unassisted(pvm, &cpuinfo),
        }
    }
}

/// KVM on top of page tables alone (`kvm_pvm`) is loaded, or the CPU shows neither VMX nor SVM. Only asked where `/dev/kvm` opens.
fn unassisted(pvm_module: bool, cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "flags").then_some(value)
    });
    let assisted = flags
        .next()
        .is_none_or(|flags| flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm")));
    pvm_module || !assisted
}

/// Memory that the host can give away without swapping, in MiB; none where it does not say.
pub fn available_mib() -> Option<u64> {
    parse_available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// The `MemAvailable` line of `/proc/meminfo` (proc_meminfo(5)), in MiB.
fn parse_available(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// Opens the KVM device for a component.
///
/// # Errors
/// `START_FAILURE`, saying what the host or the user lacks.
pub fn open_kvm() -> Result<File, Error> {
    OpenOptions::new().read(true).write(true).open(KVM).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "the host offers no virtualization: load a kvm module",
            io::ErrorKind::PermissionDenied => "the manager's user may not use it: add the user to the group kvm",
            _ => "no guest can be made",
        };
        Error::new(Kind::StartFailure, format!("{KVM} cannot be opened ({error}); {hint}")).about(KVM)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_vmx_or_svm_is_unassisted() {
        let flags =
            |flags: &str| format!("processor\t: 0\nmodel name\t: a cpu with svm\nflags\t\t: {flags}\nbugs\t: x\n");
        assert!(!unassisted(false, &flags("fpu vmx sse")));
        assert!(!unassisted(false, &flags("fpu svm")));
        assert!(unassisted(false, &flags("fpu svmx")));
        assert!(unassisted(true, &flags("fpu vmx")));
        assert!(
            !unassisted(false, ""),
            "a host that tells nothing is taken for an ordinary one"
        );
    }

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:       24684084 kB\nMemFree: 1 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(parse_available(meminfo), Some(2048));
        assert_eq!(parse_available("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_available("MemAvailable: many kB\n"), None);
    }
}
