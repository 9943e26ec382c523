//! What the runner tells a component across `exec`: one environment variable that numbers the inherited handles and
//! says what the jail is to be.
//!
//! The component's descriptors after `exec`:
//!
//! ```text
//!   0           lifeline: a pipe whose other end only the starter holds; end of file = the starter is dead
//!   1           /dev/null
//!   2           where the caller wants the component's last words (default /dev/null)
//!   3 .. 3+n    the startup handles, in the order of the table
//! ```

use std::os::fd::{AsFd, RawFd};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use crate::layer::Layer;
use crate::outer::UidRange;

/// The environment variable that carries the [`Startup`] record as JSON.
pub const STARTUP_VARIABLE: &str = "SEPAL_STARTUP";

/// The descriptor of the startup handle with index 0.
pub const FIRST_HANDLE: RawFd = 3;

/// The most handles that one start can pass.
pub const MAX_HANDLES: usize = 64;

/// The longest handle name, in bytes.
pub const MAX_NAME: usize = 32;

/// The name of the component's socket to its manager, by convention the handle with index 0.
pub const CONTROL: &str = "control";

/// The name of the handle on `/dev/kvm`, by convention the handle with index 1.
pub const KVM: &str = "kvm";

/// What kind of object a handle has to be; checked on both sides of `exec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandleKind {
    /// A socket of any family.
    Socket,
    /// The KVM device node.
    Kvm,
    /// Any character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A regular file, memfds included.
    File,
    /// A pipe or FIFO.
    Pipe,
    /// An object without a file type: eventfd, timerfd, pidfd, epoll.
    Anonymous,
}

/// The device number of `/dev/kvm`: misc major 10, minor 232 (Linux `Documentation/admin-guide/devices.txt`).
const KVM_DEVICE: (u32, u32) = (10, 232);

/// Why a handle is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandleFault {
    /// The descriptor is not open.
    #[error("it is not open ({0})")]
    NotOpen(std::io::ErrorKind),
    /// The descriptor is something else.
    #[error("it has to be {expected:?}, but it is {found}")]
    WrongKind {
        /// What the table promises.
        expected: HandleKind,
        /// What it is.
        found: String,
    },
}

impl HandleKind {
    /// Checks that an open descriptor is of this kind.
    ///
    /// # Errors
    ///
    /// [`HandleFault`], when it is not.
    pub fn check(self, fd: impl AsFd) -> Result<(), HandleFault> {
        let stat = rustix::fs::fstat(fd).map_err(|errno| HandleFault::NotOpen(errno.kind()))?;
        let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let fits = match self {
            Self::Socket => file_type == FileType::Socket,
            Self::Kvm => file_type == FileType::CharacterDevice && device == KVM_DEVICE,
            Self::CharDevice => file_type == FileType::CharacterDevice,
            Self::BlockDevice => file_type == FileType::BlockDevice,
            Self::File => file_type == FileType::RegularFile,
            Self::Pipe => file_type == FileType::Fifo,
            Self::Anonymous => file_type == FileType::Unknown,
        };
        if fits {
            return Ok(());
        }
        let found = match file_type {
            FileType::CharacterDevice => format!("character device {}:{}", device.0, device.1),
            other => format!("{other:?}"),
        };
        Err(HandleFault::WrongKind { expected: self, found })
    }
}

/// One line of the handle table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleEntry {
    /// What the component calls it: 1 to [`MAX_NAME`] bytes of `a-z`, `0-9` and `-`.
    pub name: String,
    /// What it has to be.
    pub kind: HandleKind,
}

impl HandleEntry {
    /// True for a name that the table may carry.
    #[must_use]
    pub fn name_is_valid(name: &str) -> bool {
        (1..=MAX_NAME).contains(&name.len())
            && name
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    }
}

/// Resource limits that the component sets on itself; see `setrlimit(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimits {
    /// Open descriptors (`RLIMIT_NOFILE`).
    pub open_files: u64,
    /// Threads (`RLIMIT_NPROC`); in force where the component has a user namespace, which counts its own threads only.
    pub threads: u64,
    /// The size that a file may grow to, in bytes (`RLIMIT_FSIZE`), or no limit.
    pub file_size: Option<u64>,
}

impl Default for Rlimits {
    /// 4096 descriptors and 1024 threads: 64 vCPUs, and some hundred devices with their queues' eventfds.
    fn default() -> Self {
        Self {
            open_files: 4096,
            threads: 1024,
            file_size: None,
        }
    }
}

/// The record itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Startup {
    /// The handles, the first at [`FIRST_HANDLE`].
    pub handles: Vec<HandleEntry>,
    /// Layers that are not to be set up.
    pub waived: Vec<Layer>,
    /// The starter's own namespaces (layer, inode number), from which the component's have to differ.
    pub namespaces: Vec<(Layer, u64)>,
    /// True where the component has a host uid (and gid) of its own, out of `uids`; else it runs under its starter's.
    pub own_uid: bool,
    /// The range that such uids come from.
    pub uids: UidRange,
    /// Resource limits.
    pub rlimits: Rlimits,
    /// The cgroup limits in force, in words; `None` if none was asked for.
    pub cgroup: Option<String>,
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn kinds_tell_objects_apart() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let memfd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let objects = [
            (null.as_fd(), HandleKind::CharDevice),
            (pipe.as_fd(), HandleKind::Pipe),
            (socket.as_fd(), HandleKind::Socket),
            (event.as_fd(), HandleKind::Anonymous),
            (memfd.as_fd(), HandleKind::File),
        ];
        let kinds = [
            HandleKind::Socket,
            HandleKind::Kvm,
            HandleKind::CharDevice,
            HandleKind::BlockDevice,
            HandleKind::File,
            HandleKind::Pipe,
            HandleKind::Anonymous,
        ];
        for (object, is) in objects {
            for kind in kinds {
                assert_eq!(kind.check(object).is_ok(), kind == is, "{is:?} checked as {kind:?}");
            }
        }
        let fault = HandleKind::Kvm.check(&null).unwrap_err();
        assert_eq!(fault.to_string(), "it has to be Kvm, but it is character device 1:3");
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["control", "disk-0", "a"] {
            assert!(HandleEntry::name_is_valid(good), "{good}");
        }
        let long = "a".repeat(MAX_NAME + 1);
        for bad in ["", "Disk", "a b", "ä", long.as_str()] {
            assert!(!HandleEntry::name_is_valid(bad), "{bad}");
        }
    }
}
