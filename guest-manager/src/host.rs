//! What the host is like: facts that a jailed component cannot find out, and that explain a guest's problems.

use std::fs::File;

use rustix::fs::{Mode, OFlags};
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
        Self {
            unassisted: sepal_runner::host::is_unassisted(),
        }
    }
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
    let opened = rustix::fs::open(KVM, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    opened.map(File::from).map_err(|errno| {
        let message = format!(
            "{KVM} cannot be opened ({errno}); {}",
            sepal_runner::host::kvm_remedy(errno)
        );
        Error::new(Kind::StartFailure, message).about(KVM)
    })
}

/// What KVM offers of this host's processor, `kvm_cpuid_entry2`s one after the other; empty where it cannot be asked: whoever starts a guest then hears why.
///
/// The answer takes long where the host is itself a guest, and does not change; so it is got once, and not by each component.
pub fn supported_cpuid() -> Vec<u8> {
    let supported = open_kvm()
        .ok()
        .and_then(|kvm| sepal_runner::host::supported_cpuid(kvm).ok());
    supported.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:       24684084 kB\nMemFree: 1 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(parse_available(meminfo), Some(2048));
        assert_eq!(parse_available("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_available("MemAvailable: many kB\n"), None);
    }
}
