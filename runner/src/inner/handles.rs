//! Takes over the handles that the runner laid out, and makes sure that there are no others.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use super::SealSpec;
use crate::startup::{FIRST_HANDLE, HandleEntry, HandleFault, HandleKind, MAX_HANDLES, STARTUP_VARIABLE, Startup};

/// Why the startup handles cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// There is no record: the process was not started by the runner, or the handles were taken before.
    #[error("{STARTUP_VARIABLE} is not set: a component is started by the guest manager, not by hand")]
    NotStarted,
    /// The record does not parse or breaks a limit.
    #[error("{STARTUP_VARIABLE}: {0}")]
    Record(String),
    /// A handle is not what the table says.
    #[error("startup handle {name:?} (descriptor {number}): {fault}")]
    Handle {
        /// Its name.
        name: String,
        /// Its descriptor.
        number: RawFd,
        /// What is wrong.
        fault: HandleFault,
    },
    /// A descriptor is open that the table does not list.
    #[error("descriptor {0} is open but not in the handle table")]
    Stray(RawFd),
    /// No handle has this name, or it was taken before.
    #[error("there is no startup handle {0:?} (any more)")]
    Missing(String),
    /// The process has more than one thread.
    #[error("the process has {0} threads already; handles are taken and the jail sealed by the first one")]
    Threads(u64),
    /// `/proc/self` cannot be read.
    #[error("reading /proc/self: {0}")]
    Proc(io::Error),
}

/// The handles that this component was started with. Those not taken out are closed with it.
#[derive(Debug)]
pub struct StartupHandles {
    entries: Vec<(HandleEntry, Option<OwnedFd>)>,
    seal: SealSpec,
}

impl StartupHandles {
    /// Reads the table, checks every descriptor of the process against it, and clears the environment.
    ///
    /// Call it once, first thing in `main`.
    ///
    /// # Errors
    ///
    /// [`HandleError`]; the component should end then.
    pub fn take() -> Result<Self, HandleError> {
        let record = std::env::var(STARTUP_VARIABLE).map_err(|_| HandleError::NotStarted)?;
        // Two directory links, and one for each thread.
        let threads = fs::metadata("/proc/self/task")
            .map_err(HandleError::Proc)?
            .nlink()
            .saturating_sub(2);
        if threads != 1 {
            return Err(HandleError::Threads(threads));
        }
        for (name, _) in std::env::vars_os() {
            // SAFETY: no other thread exists that could read the environment.
            unsafe { std::env::remove_var(name) }
        }
        let startup: Startup = serde_json::from_str(&record).map_err(|error| HandleError::Record(error.to_string()))?;
        if startup.handles.len() > MAX_HANDLES {
            return Err(HandleError::Record(format!("more than {MAX_HANDLES} handles")));
        }

        check_descriptor(0, "lifeline", HandleKind::Pipe)?;
        let mut entries = Vec::with_capacity(startup.handles.len());
        for (number, entry) in (FIRST_HANDLE..).zip(&startup.handles) {
            check_descriptor(number, &entry.name, entry.kind)?;
            // SAFETY: it is open, and nothing owns it: the runner made it for this table, which is read once (its
            // variable is gone now).
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            entries.push((entry.clone(), Some(fd)));
        }
        no_strays(FIRST_HANDLE + entries.len() as RawFd)?;
        Ok(Self {
            entries,
            seal: SealSpec { startup },
        })
    }

    /// Takes a handle out by its name.
    ///
    /// # Errors
    ///
    /// [`HandleError::Missing`].
    pub fn remove(&mut self, name: &str) -> Result<OwnedFd, HandleError> {
        self.entries
            .iter_mut()
            .find(|(entry, _)| entry.name == name)
            .and_then(|(_, fd)| fd.take())
            .ok_or_else(|| HandleError::Missing(name.to_owned()))
    }

    /// How this component's jail is to be, for [`super::seal`].
    #[must_use]
    pub fn seal_spec(&self) -> &SealSpec {
        &self.seal
    }
}

fn check_descriptor(number: RawFd, name: &str, kind: HandleKind) -> Result<(), HandleError> {
    // SAFETY: borrowed for one fstat, which answers EBADF if the number is not open.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    kind.check(fd).map_err(|fault| HandleError::Handle {
        name: name.to_owned(),
        number,
        fault,
    })
}

/// Fails if any descriptor from `end` on is open.
fn no_strays(end: RawFd) -> Result<(), HandleError> {
    let numbers: Vec<RawFd> = fs::read_dir("/proc/self/fd")
        .map_err(HandleError::Proc)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|number| *number >= end)
        .collect();
    for number in numbers {
        // The listing itself had a descriptor; it is closed by now.
        // SAFETY: borrowed for one fcntl, which answers EBADF if the number is not open.
        if rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) }).is_ok() {
            return Err(HandleError::Stray(number));
        }
    }
    Ok(())
}
