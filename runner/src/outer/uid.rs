//! The component's host uid: chosen from its pid, made exclusive, and mapped to 0 of its user namespace.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::UidRange;

/// A uid that only one component has, for as long as this value lives.
#[derive(Debug)]
pub(super) struct HostUid {
    pub(super) uid: u32,
    /// Holds the name that stands for the uid, where the range is too small to be free of collisions by itself.
    _lock: Option<OwnedFd>,
}

/// Why no uid could be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum UidError {
    #[error("the uid range {}+{} is empty or goes past 2^32 - 2", .0.first, .0.count)]
    Range(UidRange),
    #[error("process {pid} runs under uid {uid}, which lies in the range kept for components")]
    Foreign { pid: u32, uid: u32 },
    #[error("all {} uids from {} on are in use", .0.count, .0.first)]
    Exhausted(UidRange),
    #[error("cannot look for processes under the range's uids: {0}")]
    Scan(io::Error),
}

/// How many uids of a small range are tried before it counts as used up.
const TRIES: u32 = 1024;

impl UidRange {
    /// The uid for this pid, `attempt` places on (0 first). `None` if the range is malformed.
    fn candidate(self, pid: u32, attempt: u32) -> Option<u32> {
        // 2^32 - 1 is "no uid" to every system call.
        let last = self.first.checked_add(self.count.checked_sub(1)?)?;
        if last == u32::MAX || self.first == 0 {
            return None;
        }
        let offset = (u64::from(pid) + u64::from(attempt)) % u64::from(self.count);
        Some(self.first + u32::try_from(offset).ok()?)
    }

    fn contains(self, uid: u32) -> bool {
        uid >= self.first && uid - self.first < self.count
    }

    /// True if pids alone keep the uids of live components apart.
    pub(super) fn is_exclusive_by_pid(self) -> bool {
        self.count >= Self::PIDS
    }

    /// Checks once that nothing but components runs under these uids: there a process's uid and pid fit together.
    pub(super) fn check_foreign(self) -> Result<(), UidError> {
        if self.candidate(0, 0).is_none() {
            return Err(UidError::Range(self));
        }
        if !self.is_exclusive_by_pid() {
            return Ok(());
        }
        for (pid, uid) in processes().map_err(UidError::Scan)? {
            if self.contains(uid) && self.candidate(pid, 0) != Some(uid) {
                return Err(UidError::Foreign { pid, uid });
            }
        }
        Ok(())
    }

    /// Takes a uid for the live process `pid`.
    pub(super) fn take(self, pid: u32) -> Result<HostUid, UidError> {
        if self.is_exclusive_by_pid() {
            let uid = self.candidate(pid, 0).ok_or(UidError::Range(self))?;
            return Ok(HostUid { uid, _lock: None });
        }
        for attempt in 0..self.count.min(TRIES) {
            let uid = self.candidate(pid, attempt).ok_or(UidError::Range(self))?;
            let Some(lock) = lock(uid).map_err(UidError::Scan)? else {
                continue;
            };
            if processes().map_err(UidError::Scan)?.any(|(_, used)| used == uid) {
                continue;
            }
            return Ok(HostUid { uid, _lock: Some(lock) });
        }
        if self.count == 0 {
            Err(UidError::Range(self))
        } else {
            Err(UidError::Exhausted(self))
        }
    }
}

/// Takes the abstract socket name that stands for a uid: the kernel gives it to one holder and takes it back at its death.
fn lock(uid: u32) -> io::Result<Option<OwnedFd>> {
    let name = format!("sepal/uid/{uid}");
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => Ok(Some(socket)),
        Err(rustix::io::Errno::ADDRINUSE) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Every process that can be seen, with the uid that owns its directory in `/proc`. Processes that end meanwhile are left out.
fn processes() -> io::Result<impl Iterator<Item = (u32, u32)>> {
    Ok(fs::read_dir("/proc")?.filter_map(|entry| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, entry.metadata().ok()?.uid()))
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn candidates_stay_in_range_and_apart(
            first in 1_u32..0xf000_0000,
            count in 1_u32..=UidRange::PIDS * 2,
            pid in 1_u32..UidRange::PIDS,
            other in 1_u32..UidRange::PIDS,
            attempt in 0_u32..TRIES,
        ) {
            let range = UidRange { first, count };
            let uid = range.candidate(pid, attempt).unwrap();
            prop_assert!(range.contains(uid));
            if range.is_exclusive_by_pid() && pid != other {
                prop_assert_ne!(range.candidate(pid, 0), range.candidate(other, 0));
            }
        }
    }

    #[test]
    fn malformed_ranges_are_refused() {
        for range in [
            UidRange { first: 0, count: 1 },
            UidRange { first: 5, count: 0 },
            UidRange {
                first: u32::MAX,
                count: 1,
            },
            UidRange {
                first: u32::MAX - 9,
                count: 11,
            },
        ] {
            assert!(matches!(range.check_foreign(), Err(UidError::Range(_))), "{range:?}");
            assert!(range.take(7).is_err(), "{range:?}");
        }
    }

    #[test]
    fn a_small_range_gives_each_uid_once() {
        let range = UidRange {
            first: 0x6fff_f000 + std::process::id() % 2048,
            count: 2,
        };
        let a = range.take(1).unwrap();
        let b = range.take(1).unwrap();
        assert_ne!(a.uid, b.uid);
        assert!(matches!(range.take(1), Err(UidError::Exhausted(_))));
        drop(a);
        assert!(range.take(1).is_ok());
    }
}
