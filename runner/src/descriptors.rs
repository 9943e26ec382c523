//! How many descriptors the process may have, and room for them in its table, made while that costs nothing.
//!
//! The kernel begins with 64 places and doubles them as descriptors come. In a process of several threads each time waits until no processor reads
//! the old table any more (`expand_fdtable` in the kernel's fs/file.c, which calls `synchronize_rcu`): 5 to 20 ms, in the middle of whatever
//! needed the descriptor. With one thread it does not wait.

use std::{io, os::fd::RawFd};

use rustix::{
    io::{Errno, fcntl_dupfd_cloexec},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// Allows this process as many descriptors as the system lets it have.
pub fn raise_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Fails only if what was read is not true any more; what there is has to do then.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// Makes room for `count` descriptors, or as many as the process may have (`RLIMIT_NOFILE`). To be called before the first thread is made.
///
/// # Errors
///
/// There is no memory for the table.
pub fn reserve(count: u32) -> io::Result<()> {
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let last = u64::from(count).min(allowed).saturating_sub(1);
    let last = RawFd::try_from(last).unwrap_or(RawFd::MAX);
    // Whatever can be duplicated will do: only the number matters, and it is closed at once.
    let (reader, _writer) = io::pipe()?;
    match fcntl_dupfd_cloexec(&reader, last) {
        // There are more descriptors than that already.
        Ok(_) | Err(Errno::MFILE | Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says that the table has room for.
    fn size() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        line.trim().parse().unwrap()
    }

    #[test]
    fn there_is_room_afterwards() {
        let soft = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let count = size() * 2;
        if count <= soft {
            reserve(u32::try_from(count).unwrap()).unwrap();
            assert!(size() >= count);
        }
        // More than anybody may have is no error.
        reserve(u32::MAX).unwrap();
    }

    #[test]
    fn all_that_may_be_had_is_allowed() {
        raise_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
