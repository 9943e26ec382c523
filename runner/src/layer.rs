//! The jail's layers: their names, what becomes of each in a start, and how to get one that a host lacks.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One protection of the jail. Each is set up, checked, reported and waived on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Layer {
    /// A user namespace of the component's own; without it the other namespaces need root.
    UserNamespace,
    /// A process namespace: the component sees no process but itself.
    PidNamespace,
    /// A mount namespace whose root is an empty read-only tmpfs.
    Root,
    /// A network namespace without interfaces that are up.
    NetworkNamespace,
    /// A namespace for System V IPC and POSIX message queues.
    IpcNamespace,
    /// A namespace for the host name.
    UtsNamespace,
    /// A cgroup namespace: the component cannot see where it stands in the hierarchy.
    CgroupNamespace,
    /// A host uid and gid shared with no other process (only where the starter is root).
    HostUid,
    /// No capability in any set, bounding and ambient included.
    Capabilities,
    /// `no_new_privs`: no exec can gain privileges.
    NoNewPrivs,
    /// Not dumpable: no core, and only a privileged process can attach.
    NotDumpable,
    /// Resource limits: no core file, bounded descriptors and threads.
    Rlimits,
    /// Landlock: every file system and network access that it knows is denied.
    Landlock,
    /// The system-call filter, a tighter one for each thread role.
    Seccomp,
    /// Limits of memory, processes and processor time. A limit, not a protection: nothing is set up unless asked for.
    Cgroup,
}

impl Layer {
    /// Every layer, in the order in which a start sets them up.
    pub const ALL: [Self; 15] = [
        Self::UserNamespace,
        Self::PidNamespace,
        Self::Root,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::HostUid,
        Self::Cgroup,
        Self::Rlimits,
        Self::NoNewPrivs,
        Self::Landlock,
        Self::Capabilities,
        Self::NotDumpable,
        Self::Seccomp,
    ];

    /// The layers that are namespaces, with the flag of `clone3` and the name under `/proc/self/ns`.
    pub const NAMESPACES: [(Self, libc::c_int, &'static str); 7] = [
        (Self::UserNamespace, libc::CLONE_NEWUSER, "user"),
        (Self::PidNamespace, libc::CLONE_NEWPID, "pid"),
        (Self::Root, libc::CLONE_NEWNS, "mnt"),
        (Self::NetworkNamespace, libc::CLONE_NEWNET, "net"),
        (Self::IpcNamespace, libc::CLONE_NEWIPC, "ipc"),
        (Self::UtsNamespace, libc::CLONE_NEWUTS, "uts"),
        (Self::CgroupNamespace, libc::CLONE_NEWCGROUP, "cgroup"),
    ];

    /// The layer's name as users write it (to waive it, for example).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::UserNamespace => "user-namespace",
            Self::PidNamespace => "pid-namespace",
            Self::Root => "root",
            Self::NetworkNamespace => "network-namespace",
            Self::IpcNamespace => "ipc-namespace",
            Self::UtsNamespace => "uts-namespace",
            Self::CgroupNamespace => "cgroup-namespace",
            Self::HostUid => "host-uid",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivs => "no-new-privs",
            Self::NotDumpable => "not-dumpable",
            Self::Rlimits => "rlimits",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::Cgroup => "cgroup",
        }
    }

    /// What the host's administrator can do to make this layer available, as a clause.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::UserNamespace => {
                "raise user.max_user_namespaces, set kernel.unprivileged_userns_clone=1 and \
                 kernel.apparmor_restrict_unprivileged_userns=0 where they exist, or start the manager as root"
            }
            Self::PidNamespace => "raise user.max_pid_namespaces",
            Self::Root => {
                "raise user.max_mnt_namespaces, and let user namespaces mount \
                 (kernel.apparmor_restrict_unprivileged_userns=0 where it exists)"
            }
            Self::NetworkNamespace => "raise user.max_net_namespaces",
            Self::IpcNamespace => "raise user.max_ipc_namespaces",
            Self::UtsNamespace => "raise user.max_uts_namespaces",
            Self::CgroupNamespace => "raise user.max_cgroup_namespaces",
            Self::HostUid => {
                "give the manager CAP_SETUID and CAP_SETGID, and a user namespace that maps at least the uids and gids 0 to 65535"
            }
            Self::Capabilities => "let the component keep CAP_SETPCAP in its user namespace until it seals",
            Self::NoNewPrivs | Self::NotDumpable => "use a kernel of 5.13 or newer",
            Self::Rlimits => "raise the manager's own hard limits (ulimit -H)",
            Self::Landlock => {
                "use a kernel of 5.13 or newer with CONFIG_SECURITY_LANDLOCK, and landlock in its lsm= list"
            }
            Self::Seccomp => "use a kernel with CONFIG_SECCOMP_FILTER",
            Self::Cgroup => {
                "delegate the memory, pids and cpu controllers (for a user: systemd-run --user --scope -p Delegate=yes), \
                 or ask for no limit"
            }
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name is of no layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no jail layer is called {0:?}")]
pub struct UnknownLayer(String);

impl std::str::FromStr for Layer {
    type Err = UnknownLayer;

    fn from_str(name: &str) -> Result<Self, UnknownLayer> {
        Self::ALL
            .into_iter()
            .find(|layer| layer.name() == name)
            .ok_or_else(|| UnknownLayer(name.to_owned()))
    }
}

/// What became of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerState {
    /// It is in force, and was checked.
    Holds,
    /// The caller gave it up.
    Waived,
    /// It does not apply to this start (limits that nobody asked for; a uid of its own under an ordinary user).
    NotRequested,
}

/// One line of the report that a sealed component gives about its jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStatus {
    /// The layer.
    pub layer: Layer,
    /// What became of it.
    pub state: LayerState,
    /// Particulars for a person: the uid, the Landlock ABI, the limits.
    pub detail: String,
}

impl LayerStatus {
    pub(crate) fn holds(layer: Layer, detail: impl Into<String>) -> Self {
        Self {
            layer,
            state: LayerState::Holds,
            detail: detail.into(),
        }
    }

    pub(crate) fn waived(layer: Layer) -> Self {
        Self {
            layer,
            state: LayerState::Waived,
            detail: "waived by the caller".to_owned(),
        }
    }

    pub(crate) fn not_requested(layer: Layer, detail: impl Into<String>) -> Self {
        Self {
            layer,
            state: LayerState::NotRequested,
            detail: detail.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_match_their_serialized_form() {
        for layer in Layer::ALL {
            assert_eq!(layer.name().parse(), Ok(layer));
            assert_eq!(serde_json::to_string(&layer).unwrap(), format!("\"{layer}\""));
        }
        assert!("roots".parse::<Layer>().is_err());
    }
}
