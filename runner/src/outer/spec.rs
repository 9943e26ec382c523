//! What a caller asks for: the program, the handles it gets, and how its jail is to be.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::SpawnError;
use crate::cgroup::Limits;
use crate::layer::Layer;
use crate::startup::{HandleEntry, HandleKind, MAX_HANDLES, Rlimits};

/// The uids that components get when their starter is root, one for each live component.
///
/// A component's uid is `first + pid % count`. With a `count` of at least [`UidRange::PIDS`] no two live processes of a
/// process namespace can have the same; with less, each uid is locked while it is in use, within a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UidRange {
    /// The lowest uid (and gid) of the range.
    pub first: u32,
    /// How many there are, at least 1.
    pub count: u32,
}

impl UidRange {
    /// The most process ids that Linux can have (`PID_MAX_LIMIT` on 64-bit machines).
    pub const PIDS: u32 = 4 * 1024 * 1024;
}

/// How a component's jail is to be. The default requires every layer and limits nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JailSpec {
    /// Layers to do without. All others have to hold, or the start fails.
    pub waived: BTreeSet<Layer>,
    /// Limits of memory, processes and processor time; each one asked for has to be enforced, or the start fails.
    pub limits: Limits,
    /// Where uids come from when the starter is root. `None`: from a range that the starter chooses for its host or container.
    pub uids: Option<UidRange>,
    /// Resource limits that the component sets on itself.
    pub rlimits: Rlimits,
}

impl JailSpec {
    /// True if this layer was given up.
    #[must_use]
    pub fn waives(&self, layer: Layer) -> bool {
        self.waived.contains(&layer)
    }
}

/// The startup handles, in the order of their numbers.
#[derive(Debug, Default)]
pub struct Handles {
    pub(super) entries: Vec<HandleEntry>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Handles {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a handle under the next number.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Handle`]: the name is invalid or taken, the table is full, or the object is not of this kind.
    pub fn add(&mut self, name: &str, kind: HandleKind, fd: OwnedFd) -> Result<&mut Self, SpawnError> {
        let fault = |reason: String| SpawnError::Handle {
            name: name.to_owned(),
            reason,
        };
        if !HandleEntry::name_is_valid(name) {
            return Err(fault("a name is 1 to 32 characters of a-z, 0-9 and -".to_owned()));
        }
        if self.entries.iter().any(|entry| entry.name == name) {
            return Err(fault("this name is in the table already".to_owned()));
        }
        if self.entries.len() == MAX_HANDLES {
            return Err(fault(format!("the table is full ({MAX_HANDLES} handles)")));
        }
        kind.check(&fd).map_err(|reason| fault(reason.to_string()))?;
        self.entries.push(HandleEntry {
            name: name.to_owned(),
            kind,
        });
        self.fds.push(fd);
        Ok(self)
    }

    /// The table's lines and the descriptors, in the order of their numbers.
    #[must_use]
    pub fn into_parts(self) -> (Vec<HandleEntry>, Vec<OwnedFd>) {
        (self.entries, self.fds)
    }
}

/// The binary that a component runs, held open: what is executed is this file, whatever happens to its path.
#[derive(Debug)]
pub struct Program {
    pub(super) fd: OwnedFd,
    pub(super) label: PathBuf,
}

impl Program {
    /// Opens a binary by its path.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Program`], naming the path, if it cannot be opened or is no regular file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SpawnError> {
        let path = path.as_ref();
        let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            SpawnError::Program {
                path: path.to_owned(),
                reason: errno.to_string(),
            }
        })?;
        Self::from_fd(fd, path)
    }

    /// Takes a descriptor of a binary; `label` is what messages call it.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Program`] if it is no regular file.
    pub fn from_fd(fd: OwnedFd, label: impl Into<PathBuf>) -> Result<Self, SpawnError> {
        let label = label.into();
        if let Err(fault) = HandleKind::File.check(&fd) {
            return Err(SpawnError::Program {
                path: label,
                reason: fault.to_string(),
            });
        }
        Ok(Self { fd, label })
    }

    /// The descriptor and what messages call it.
    #[must_use]
    pub fn into_parts(self) -> (OwnedFd, PathBuf) {
        (self.fd, self.label)
    }
}

/// One component to start.
#[derive(Debug)]
pub struct ComponentSpec {
    /// The binary.
    pub program: Program,
    /// Its command line, the name (`argv[0]`) first.
    pub args: Vec<CString>,
    /// The handles it starts with.
    pub handles: Handles,
    /// Where its standard error goes; `/dev/null` if `None`.
    pub stderr: Option<OwnedFd>,
    /// Its jail.
    pub jail: JailSpec,
}

impl ComponentSpec {
    /// A component with this name, no handles, and the default jail.
    #[must_use]
    pub fn new(program: Program, name: CString) -> Self {
        Self {
            program,
            args: vec![name],
            handles: Handles::new(),
            stderr: None,
            jail: JailSpec::default(),
        }
    }
}
