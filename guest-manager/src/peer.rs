//! Who connects to a Unix socket, supplementary groups included, as the kernel noted it when the connection was made.

use std::{
    io, mem,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use sepal_schema::transport::PeerCredentials;

use crate::{client::Who, roles};

/// Most supplementary groups of a process (`NGROUPS_MAX`, linux/limits.h).
const MAX_GROUPS: usize = 65536;
/// What nearly everybody's groups fit into.
const FEW_GROUPS: usize = 32;

/// Somebody who has connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// User, group and process.
    pub who: Who,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Asks the kernel who is at the other end.
    ///
    /// # Errors
    /// Those of `getsockopt`.
    pub fn of(socket: &UnixStream) -> io::Result<Self> {
        let PeerCredentials { pid, uid, gid } = PeerCredentials::of(socket)?;
        let share = None;
        Ok(Self {
            who: Who { uid, gid, pid, share },
            groups: groups_of(socket)?,
        })
    }

    /// As roles are given by it.
    pub fn as_role_peer(&self) -> roles::Peer<'_> {
        roles::Peer {
            uid: self.who.uid,
            gid: self.who.gid,
            groups: &self.groups,
        }
    }
}

/// `SO_PEERGROUPS` (socket(7)): where there is too little room, the kernel says `ERANGE` and how much it takes.
fn groups_of(socket: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; FEW_GROUPS];
    loop {
        let bytes = mem::size_of_val(groups.as_slice());
        let mut length = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: the pointer and length describe the vector's numbers, which the kernel fills, and both live through the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / mem::size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > MAX_GROUPS {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_end_of_a_pair_is_this_process() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        assert_eq!((peer.who.uid, peer.who.gid), (uid, gid));
        assert_eq!(peer.who.pid, Some(std::process::id()));
        let mut own: Vec<_> = rustix::process::getgroups()
            .unwrap()
            .into_iter()
            .map(|gid| gid.as_raw())
            .collect();
        let mut seen = peer.groups;
        own.sort_unstable();
        seen.sort_unstable();
        assert_eq!(seen, own);
    }
}
