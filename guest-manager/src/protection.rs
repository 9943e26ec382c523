//! Guests whose memory is hidden from the host: whether this host could have any. Sepal makes none yet, and says which of the two is in the way.
//!
//! ```text
//!   /proc/cpuinfo, /sys/module/kvm_* --> Facts --> a sentence: what the host lacks, or that Sepal does
//! ```

use std::{fs, path::Path};

use sepal_runner::host::processor_flags;
use sepal_schema::error::Error;

/// How a processor hides a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Technique {
    name: &'static str,
    /// KVM's module, whose parameter says whether it is used (Documentation/virt/kvm/x86 of the kernel).
    module: &'static str,
    parameter: &'static str,
    /// The flag in /proc/cpuinfo.
    flag: &'static str,
}

const TECHNIQUES: [Technique; 2] = [
    Technique {
        name: "AMD SEV-SNP",
        module: "kvm_amd",
        parameter: "sev_snp",
        flag: "sev_snp",
    },
    Technique {
        name: "Intel TDX",
        module: "kvm_intel",
        parameter: "tdx",
        flag: "tdx_host_platform",
    },
];

/// What a host says about one technique.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Offer {
    /// KVM's module is loaded.
    module: bool,
    /// What its parameter says; none: it has none of that name.
    enabled: Option<bool>,
    /// The processor has it.
    processor: bool,
}

/// What a host says about all that is known, in the order of [`TECHNIQUES`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Facts {
    offers: [Offer; TECHNIQUES.len()],
}

impl Facts {
    /// Looks at the host whose root folder this is. Reads files of the kernel's that never block.
    fn of_host(root: &Path) -> Self {
        let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let offer = |technique: Technique| {
            let module = root.join("sys/module").join(technique.module);
            let value = fs::read_to_string(module.join("parameters").join(technique.parameter));
            Offer {
                module: module.exists(),
                // Parameters of truth values are "Y" or "N", of numbers "1" or "0".
                enabled: value.ok().map(|value| matches!(value.trim(), "Y" | "1")),
                processor: processor_flags(&cpuinfo).is_some_and(|mut flags| flags.any(|flag| flag == technique.flag)),
            }
        };
        Self {
            offers: TECHNIQUES.map(offer),
        }
    }

    /// Why there is no protected guest here, as the end of a sentence.
    fn why_not(&self) -> String {
        let known = || TECHNIQUES.into_iter().zip(self.offers);
        if let Some((technique, _)) = known().find(|(_, offer)| offer.module && offer.enabled == Some(true)) {
            return format!(
                "this host could have one by {}, but Sepal cannot make it yet",
                technique.name
            );
        }
        let lacks = match known().find(|(_, offer)| offer.module) {
            None => "KVM works without the modules that know of it (kvm_amd, kvm_intel)".to_owned(),
            Some((technique, offer)) => {
                let Technique {
                    name,
                    module,
                    parameter,
                    flag,
                } = technique;
                match (offer.processor, offer.enabled) {
                    (false, _) => format!("neither processor nor firmware offers {name} (/proc/cpuinfo has no {flag})"),
                    (true, None) => format!("its processor has {name}, but the kernel's {module} does not know it"),
                    (true, Some(_)) => format!("its processor has {name}, but it is off ({module}.{parameter} is N)"),
                }
            }
        };
        format!("this host can have none: {lacks}")
    }
}

/// The refusal of a protected guest, which says what this host or Sepal lacks.
pub(crate) fn refusal() -> Error {
    let why = Facts::of_host(Path::new("/")).why_not();
    Error::not_supported(
        "protectedVm",
        format!("a guest whose memory is hidden from the host was asked for; {why}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Offer = Offer {
        module: false,
        enabled: None,
        processor: false,
    };

    fn amd(enabled: Option<bool>, processor: bool) -> String {
        let offer = Offer {
            module: true,
            enabled,
            processor,
        };
        Facts { offers: [offer, NONE] }.why_not()
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        for (why, words) in [
            (
                Facts::default().why_not(),
                "can have none: KVM works without the modules",
            ),
            (
                amd(None, false),
                "can have none: neither processor nor firmware offers AMD SEV-SNP (/proc/cpuinfo has no sev_snp)",
            ),
            (amd(Some(false), false), "offers AMD SEV-SNP"),
            (amd(None, true), "the kernel's kvm_amd does not know it"),
            (amd(Some(false), true), "it is off (kvm_amd.sev_snp is N)"),
        ] {
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn a_host_that_could_is_not_blamed() {
        assert_eq!(
            amd(Some(true), true),
            "this host could have one by AMD SEV-SNP, but Sepal cannot make it yet"
        );
        let intel = Offer {
            module: true,
            enabled: Some(true),
            processor: true,
        };
        let why = Facts { offers: [NONE, intel] }.why_not();
        assert!(why.contains("could have one by Intel TDX"), "{why}");
        // A processor without the module that would use it can do nothing.
        let idle = Offer { module: false, ..intel };
        assert!(Facts { offers: [NONE, idle] }.why_not().contains("can have none"));
    }

    #[test]
    fn a_host_is_read() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        assert_eq!(Facts::of_host(root.path()), Facts::default());
        write(
            "proc/cpuinfo",
            "processor\t: 0\nflags\t\t: fpu svm sev sev_snp\n\nflags\t: none\n",
        );
        write("sys/module/kvm_amd/parameters/sev_snp", "Y\n");
        write("sys/module/kvm_intel/parameters/other", "Y\n");
        let (amd, intel) = (
            Offer {
                module: true,
                enabled: Some(true),
                processor: true,
            },
            Offer { module: true, ..NONE },
        );
        assert_eq!(Facts::of_host(root.path()), Facts { offers: [amd, intel] });
        for (value, enabled) in [("N\n", false), ("1", true), ("0\n", false)] {
            write("sys/module/kvm_intel/parameters/tdx", value);
            assert_eq!(Facts::of_host(root.path()).offers[1].enabled, Some(enabled));
        }
    }

    #[test]
    fn the_refusal_names_the_field() {
        let error = refusal();
        assert_eq!((error.kind_name(), &error.about[..]), ("NOT_SUPPORTED", "protectedVm"));
        assert!(error.message.contains("this host c"), "{error}");
    }
}
