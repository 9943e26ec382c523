//! What this host offers for a jail and for guests, with words on how to get what is missing.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::cgroup::{Controller, Hierarchies};
use crate::layer::Layer;
use crate::outer;

/// One thing that a host can offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is about.
    pub subject: Subject,
    /// True if it is there and this process may use it.
    pub available: bool,
    /// What was found, for a person.
    pub detail: String,
    /// How to get it, if it is missing.
    pub remedy: Option<String>,
}

/// What a [`Finding`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A layer of the jail.
    Layer(Layer),
    /// Access to `/dev/kvm`.
    Kvm,
    /// io_uring, which disks use where it is allowed.
    IoUring,
}

/// Looks at everything. Makes short-lived child processes to try the namespaces.
#[must_use]
pub fn examine() -> Vec<Finding> {
    let mut findings: Vec<Finding> = Layer::NAMESPACES
        .into_iter()
        .map(|(layer, flag, _)| namespace(layer, libc::CLONE_NEWUSER | flag))
        .collect();
    findings.extend([host_uid(), landlock(), seccomp(), cgroups(), kvm(), io_uring()]);
    findings
}

fn finding(subject: Subject, result: Result<String, String>, remedy: &str) -> Finding {
    match result {
        Ok(detail) => Finding {
            subject,
            available: true,
            detail,
            remedy: None,
        },
        Err(detail) => Finding {
            subject,
            available: false,
            detail,
            remedy: Some(remedy.to_owned()),
        },
    }
}

fn of_layer(layer: Layer, result: Result<String, String>) -> Finding {
    finding(Subject::Layer(layer), result, layer.remedy())
}

fn namespace(layer: Layer, flags: libc::c_int) -> Finding {
    let made = outer::probe(flags);
    of_layer(
        layer,
        made.map(|()| "can be made".to_owned())
            .map_err(|error| error.to_string()),
    )
}

fn host_uid() -> Finding {
    let result = if rustix::process::geteuid().is_root() {
        Ok("each component gets a uid of its own".to_owned())
    } else {
        Err("components run under this user's uid".to_owned())
    };
    finding(Subject::Layer(Layer::HostUid), result, "start the manager as root")
}

fn landlock() -> Finding {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no structure and returns the ABI's number (landlock_create_ruleset(2)).
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            VERSION,
        )
    };
    let result = if abi > 0 {
        Ok(format!("ABI {abi}"))
    } else {
        Err(io::Error::last_os_error().to_string())
    };
    of_layer(Layer::Landlock, result)
}

fn seccomp() -> Finding {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads the four bytes of `action` (seccomp(2), SECCOMP_GET_ACTION_AVAIL).
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    let result = if result == 0 {
        Ok("filters can kill".to_owned())
    } else {
        Err(io::Error::last_os_error().to_string())
    };
    of_layer(Layer::Seccomp, result)
}

fn cgroups() -> Finding {
    let result = Hierarchies::discover()
        .map_err(|error| error.to_string())
        .and_then(|found| {
            let parts: Vec<String> = Controller::ALL
                .into_iter()
                .filter_map(|controller| Some((controller, found.version_of(controller)?)))
                .map(|(controller, version)| format!("{} by v{version}", controller.name()))
                .collect();
            if parts.len() < Controller::ALL.len() {
                return Err(if parts.is_empty() {
                    "no controllers".to_owned()
                } else {
                    format!("only {}", parts.join(", "))
                });
            }
            match found.writable() {
                true => Ok(parts.join(", ")),
                false => Err(format!("{}, but this user may make no groups", parts.join(", "))),
            }
        });
    of_layer(Layer::Cgroup, result)
}

/// Whether KVM works without hardware virtualization on this host, so that guests need help. Only asked where `/dev/kvm` opens.
pub fn is_unassisted() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    lacks_virtualization(&cpuinfo, fs::exists("/sys/module/kvm_pvm").unwrap_or(false))
}

/// Whether a host that offers `/dev/kvm` does so without hardware virtualization.
///
/// `cpuinfo` is the text of `/proc/cpuinfo`, `kvm_pvm_loaded` tells whether `/sys/module/kvm_pvm` exists. Without flags in
/// `cpuinfo`, only the module counts.
fn lacks_virtualization(cpuinfo: &str, kvm_pvm_loaded: bool) -> bool {
    let has_virtualization =
        processor_flags(cpuinfo).is_none_or(|mut flags| flags.any(|flag| flag == "vmx" || flag == "svm"));
    kvm_pvm_loaded || !has_virtualization
}

/// What the first processor can do, by the text of `/proc/cpuinfo`; none where that does not say.
pub fn processor_flags(cpuinfo: &str) -> Option<impl Iterator<Item = &str>> {
    let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let (_, flags) = fields.find(|(key, _)| key.trim_end() == "flags")?;
    Some(flags.split_ascii_whitespace())
}

fn kvm() -> Finding {
    let opened = rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let remedy = opened.as_ref().map_or_else(|errno| kvm_remedy(*errno), |_| "");
    let kind = match fs::exists("/sys/module/kvm_pvm") {
        Ok(true) => "opens; without hardware virtualization (kvm_pvm)",
        _ => "opens",
    };
    finding(
        Subject::Kvm,
        opened.map(|_| kind.to_owned()).map_err(|errno| errno.to_string()),
        remedy,
    )
}

/// How to get access to `/dev/kvm` where opening it fails like this.
pub fn kvm_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS => "add this user to the group that owns /dev/kvm (usermod -aG kvm USER, then log in again)",
        // The device controller of a control group, whoever asks.
        Errno::PERM => "let this container or service use the device (--device /dev/kvm, or DeviceAllow=/dev/kvm rw)",
        _ => {
            "enable virtualization in the firmware and load kvm_intel or kvm_amd (or kvm_pvm, where neither works); \
             in a container, hand it in (--device /dev/kvm)"
        }
    }
}

/// What KVM_GET_SUPPORTED_CPUID says (linux/kvm.h): `kvm_cpuid_entry2`s, 40 bytes each, one after the other.
///
/// # Errors
///
/// `kvm` is not `/dev/kvm`, or it has more entries than any processor known.
pub fn supported_cpuid(kvm: impl AsFd) -> io::Result<Vec<u8>> {
    /// `KVM_GET_SUPPORTED_CPUID`: `_IOWR(0xae, 0x05, struct kvm_cpuid2)`, whose fixed part has 8 bytes.
    const REQUEST: libc::Ioctl = 0xc008_ae05;
    /// The most entries that KVM takes and gives (arch/x86/include/asm/kvm_host.h, `KVM_MAX_CPUID_ENTRIES`).
    const MOST: usize = 256;
    const ENTRY: usize = 40;
    // Words, since the kernel reads and writes numbers of 4 bytes there.
    let mut table = vec![0_u32; (8 + MOST * ENTRY) / 4];
    table[0] = MOST as u32;
    // SAFETY: the table has room for as many entries as its first word says, and lives until the call returns.
    let status = unsafe { libc::ioctl(kvm.as_fd().as_raw_fd(), REQUEST, table.as_mut_ptr()) };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = (table[0] as usize).min(MOST);
    let entries = table.iter().skip(2).take(count * ENTRY / 4);
    Ok(entries.flat_map(|word| word.to_ne_bytes()).collect())
}

fn io_uring() -> Finding {
    let setting = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let result = match setting.as_deref().map(str::trim) {
        Ok("0") => Ok("allowed".to_owned()),
        Ok(value) => Err(format!("kernel.io_uring_disabled is {value}")),
        // The setting is newer (Linux 6.6) than io_uring.
        Err(_) => Ok("not restricted".to_owned()),
    };
    finding(
        Subject::IoUring,
        result,
        "set kernel.io_uring_disabled=0; disks work without it, slower",
    )
}

/// True if this process may write here.
pub(crate) fn may_write(path: &std::path::Path) -> bool {
    rustix::fs::access(path, Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_with_virtualization_need_no_help() {
        let intel = "processor\t: 0\nflags\t\t: fpu vme vmx sse\n";
        let amd = "processor\t: 0\nflags\t\t: fpu svm sse\n";
        assert!(!lacks_virtualization(intel, false));
        assert!(!lacks_virtualization(amd, false));
        assert!(
            lacks_virtualization(intel, true),
            "the module decides: its virtual machines are not the processor's"
        );
    }

    #[test]
    fn processors_without_virtualization_need_help() {
        assert!(lacks_virtualization(
            "flags\t\t: fpu vme svm_lock avmx\nvmx flags\t: vnmi\n",
            false
        ));
        assert!(lacks_virtualization("flags :", false));
    }

    #[test]
    fn unreadable_facts_leave_it_to_the_module() {
        assert!(!lacks_virtualization("", false));
        assert!(!lacks_virtualization("flags", false));
        assert!(lacks_virtualization("", true));
    }

    #[test]
    fn the_model_name_is_no_flag() {
        let flags =
            |flags: &str| format!("processor\t: 0\nmodel name\t: a cpu with svm\nflags\t\t: {flags}\nbugs\t: x\n");
        assert!(!lacks_virtualization(&flags("fpu vmx sse"), false));
        assert!(!lacks_virtualization(&flags("fpu svm"), false));
        assert!(lacks_virtualization(&flags("fpu svmx"), false));
        assert!(lacks_virtualization(&flags("fpu vmx"), true));
    }

    #[test]
    fn whoever_may_not_use_kvm_is_told_what_to_do() {
        for (errno, remedy) in [
            (Errno::ACCESS, "usermod -aG kvm"),
            (Errno::PERM, "--device /dev/kvm"),
            (Errno::NOENT, "load kvm_intel or kvm_amd"),
        ] {
            assert!(kvm_remedy(errno).contains(remedy), "{errno}");
        }
    }

    #[test]
    fn what_is_missing_comes_with_a_remedy() {
        let findings = examine();
        assert_eq!(findings.len(), Layer::NAMESPACES.len() + 6);
        for finding in findings {
            assert_eq!(finding.available, finding.remedy.is_none(), "{finding:?}");
            assert!(!finding.detail.is_empty());
        }
    }
}
