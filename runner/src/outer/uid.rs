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

/// The range that systemd's list of uids (systemd.io/UIDS-GIDS) gives as unused, above all container ranges and below 2^31, is
/// taken in blocks of [`UidRange::PIDS`] from here: the first for the host's initial process namespace, others by the
/// namespace. Containers that have the host's uids have process ids of their own, which say nothing about each other.
const FIRST: u32 = 0x7000_0000;
const BLOCKS_OF_CONTAINERS: u32 = 31;

/// The inode number of the initial process namespace (linux/proc_ns.h, `PROC_PID_INIT_INO`).
const INITIAL_PIDS: u64 = 0xefff_fffc;

/// Unused by that list as well, for containers that map no more than the usual 65536 uids. Few, so each is locked.
const SMALL: UidRange = UidRange {
    first: 60_706,
    count: 478,
};

/// True if a map (`user_namespaces(7)`: inside, outside, count) has the whole range in one piece.
fn maps(map: &str, range: UidRange) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        u64::from(range.first) >= inside
            && u64::from(range.first) + u64::from(range.count) <= inside.saturating_add(count)
    })
}

/// How many uids of a small range are tried before it counts as used up.
const TRIES: u32 = 1024;

impl UidRange {
    /// The range for starters in the process namespace with this inode number.
    ///
    /// # Errors
    ///
    /// If the own id maps cannot be read.
    pub(super) fn of_this_host(pid_namespace: u64) -> io::Result<Self> {
        Ok(Self::choose(
            &fs::read_to_string("/proc/self/uid_map")?,
            &fs::read_to_string("/proc/self/gid_map")?,
            pid_namespace,
        ))
    }

    fn choose(uid_map: &str, gid_map: &str, pid_namespace: u64) -> Self {
        let block = match pid_namespace {
            INITIAL_PIDS => 0,
            // Less than 32, so the sum stays below 2^31.
            other => 1 + (other % u64::from(BLOCKS_OF_CONTAINERS)) as u32,
        };
        let large = Self {
            first: FIRST + block * Self::PIDS,
            count: Self::PIDS,
        };
        let mapped = |range| maps(uid_map, range) && maps(gid_map, range);
        // Where neither is mapped, the start says so.
        if !mapped(large) && mapped(SMALL) { SMALL } else { large }
    }

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
    fn each_host_and_container_has_uids_that_it_maps() {
        let all = "         0          0 4294967295\n";
        let usual = "0 100000 65536\n";
        let host = UidRange::choose(all, all, INITIAL_PIDS);
        assert_eq!((host.first, host.count), (0x7000_0000, UidRange::PIDS));
        for inode in 4_026_531_836 - 100..4_026_531_836_u64 {
            let container = UidRange::choose(all, all, inode);
            assert!(container.first >= host.first + host.count && container.is_exclusive_by_pid());
            assert!(container.first + container.count <= 0x7800_0000);
        }
        assert_eq!(UidRange::choose(usual, usual, 7), SMALL);
        // Only its own uid, or uids without gids: none to give.
        for (uids, gids) in [("0 1000 1\n", "0 1000 1\n"), (usual, "0 1000 1\n"), ("", "x y z")] {
            assert!(UidRange::choose(uids, gids, 7).is_exclusive_by_pid(), "{uids} {gids}");
        }
        // In pieces.
        assert!(!maps("0 0 60900\n60900 60900 5000\n", SMALL));
        assert!(maps("0 0 1\n60000 60000 5000\n", SMALL));
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
