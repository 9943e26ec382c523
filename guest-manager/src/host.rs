//! What the host is like: facts that a jailed component cannot find out, and that explain a guest's problems.

use std::fs::File;

use rustix::fs::{Mode, OFlags};
use sepal_schema::error::{Error, Kind};

use crate::node;

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
    Some(available_bytes()? >> 20)
}

/// Memory that the host can give away without swapping, in bytes; none where it does not say.
pub fn available_bytes() -> Option<u64> {
    node::memory_line(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// Opens the KVM device for a component.
///
/// # Errors
/// `START_FAILURE`, saying what the host or the user lacks.
pub fn open_kvm() -> Result<File, Error> {
    try_open_kvm().map_err(|(why, remedy)| Error::new(Kind::StartFailure, format!("{why}; {remedy}")).about(KVM))
}

/// Opens the KVM device.
///
/// # Errors
/// Why it does not open, and how to get it.
pub(crate) fn try_open_kvm() -> Result<File, (String, String)> {
    let opened = rustix::fs::open(KVM, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    opened.map(File::from).map_err(|errno| {
        let remedy = sepal_runner::host::kvm_remedy(errno);
        (format!("{KVM} cannot be opened ({errno})"), remedy.to_owned())
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
