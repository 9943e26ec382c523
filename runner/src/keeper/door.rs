//! Where a successor comes in: a listening socket, and a key that it has to know. Candidates are heard at the same time, so that who says nothing keeps
//! nobody out.
//!
//! ```text
//!   accept ──> candidate (at most 16) ── the key, in time ──> the manager; all others are hung up on
//!                  │
//!                  └── another uid, a wrong key, nothing within 5 s, or the oldest of too many ── hang up
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, SocketType};
use rustix::process::Uid;

use super::{KEY_BYTES, Key, say};

/// How long a candidate may take to say the key.
const PATIENCE: Duration = Duration::from_secs(5);

/// Candidates at a time. More make the one that has been silent for longest go.
const MOST: usize = 16;

/// The version of what keeper and successor say to each other.
pub(super) const VERSION: u32 = 1;

/// A successor's first message: its version, then the key.
pub(super) const PROOF_BYTES: usize = 4 + KEY_BYTES;

/// The message that proves that its sender knows the key.
pub(super) fn proof(key: &Key) -> [u8; PROOF_BYTES] {
    let mut proof = [0; PROOF_BYTES];
    let (version, rest) = proof.split_at_mut(4);
    version.copy_from_slice(&VERSION.to_le_bytes());
    rest.copy_from_slice(key);
    proof
}

/// True if this is the message of somebody who knows the key, of whatever version. Takes as long for any wrong key.
pub(super) fn proves(message: &[u8], key: &Key) -> bool {
    let Some((_version, said)) = message.split_first_chunk::<4>() else {
        return false;
    };
    let differences = said
        .iter()
        .zip(key)
        .fold(0, |differences, (said, true_one)| differences | (said ^ true_one));
    said.len() == key.len() && std::hint::black_box(differences) == 0
}

/// True for peers with whom guests may be shared: root, and whom this process runs as.
pub(super) fn is_trusted(uid: Uid) -> bool {
    uid.is_root() || uid == rustix::process::geteuid()
}

/// The way in.
#[derive(Debug)]
pub(super) struct Door {
    listener: OwnedFd,
    key: Key,
    /// Who has not said anything yet, and until when each may think; the oldest first.
    candidates: VecDeque<(OwnedFd, Instant)>,
}

impl Door {
    /// Takes a socket that listens for packets.
    ///
    /// # Errors
    /// A sentence: it is none, or the key has not the right length.
    pub(super) fn new(listener: OwnedFd, key: &[u8]) -> Result<Self, String> {
        let key = key
            .try_into()
            .map_err(|_| format!("a key has {KEY_BYTES} bytes, not {}", key.len()))?;
        let is_fit = rustix::net::sockopt::socket_type(&listener) == Ok(SocketType::SEQPACKET)
            && rustix::net::sockopt::socket_acceptconn(&listener) == Ok(true);
        if !is_fit {
            return Err("the descriptor is no listening socket of type SOCK_SEQPACKET".to_owned());
        }
        rustix::io::ioctl_fionbio(&listener, true).map_err(|errno| errno.to_string())?;
        Ok(Self {
            listener,
            key,
            candidates: VecDeque::new(),
        })
    }

    /// To be watched for input: whoever comes, and whoever is expected to say something.
    pub(super) fn watched(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let candidates = self.candidates.iter().map(|(candidate, _)| candidate.as_fd());
        std::iter::once(self.listener.as_fd()).chain(candidates)
    }

    /// When the next candidate is sent away.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.candidates.front().map(|(_, deadline)| *deadline)
    }

    /// Looks who is there. Returns the connection of one that has proved itself: then nobody else is a candidate any more.
    pub(super) fn look(&mut self, now: Instant) -> Option<OwnedFd> {
        // Whoever has said nothing by the time others come has had the time to.
        for (candidate, deadline) in std::mem::take(&mut self.candidates) {
            if let Some(proven) = self.hear(candidate, deadline, now) {
                return Some(proven);
            }
        }
        // Bounded: others go on being accepted in the next turn.
        for _ in 0..MOST {
            let Some(arrived) = self.accept() else { break };
            // As a rule it has said the key already.
            if let Some(proven) = arrived.and_then(|arrived| self.hear(arrived, now + PATIENCE, now)) {
                return Some(proven);
            }
            if self.candidates.len() > MOST {
                self.candidates.pop_front();
            }
        }
        None
    }

    /// Hears a candidate, which is returned if it proves itself, and stays if it may go on thinking.
    fn hear(&mut self, candidate: OwnedFd, deadline: Instant, now: Instant) -> Option<OwnedFd> {
        let mut said = [0; PROOF_BYTES + 1];
        match rustix::net::recv(&candidate, &mut said, RecvFlags::DONTWAIT) {
            Ok((_, length)) if said.get(..length).is_some_and(|said| proves(said, &self.key)) => {
                self.candidates.clear();
                return Some(candidate);
            }
            Err(Errno::AGAIN | Errno::INTR) if now < deadline => self.candidates.push_back((candidate, deadline)),
            _ => {}
        }
        None
    }

    /// The next one, if somebody has come; none inside: one that is not to be trusted, or has gone already.
    fn accept(&self) -> Option<Option<OwnedFd>> {
        let arrived = match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(arrived) => arrived,
            Err(Errno::AGAIN) => return None,
            Err(Errno::INTR | Errno::CONNABORTED) => return Some(None),
            Err(errno) => {
                // No descriptor or no memory is left: whoever waits stays, and it is tried again, but not at once.
                say(format_args!("accepting a successor: {}", io::Error::from(errno)));
                std::thread::sleep(Duration::from_millis(100));
                return None;
            }
        };
        let credentials = rustix::net::sockopt::socket_peercred(&arrived).ok();
        Some(credentials.filter(|peer| is_trusted(peer.uid)).map(|_| arrived))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_the_key_proves(key: Key, other: Key, bit in 0..KEY_BYTES * 8, noise in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(proves(&proof(&key), &key));
            prop_assert_eq!(proves(&proof(&other), &key), other == key);
            let mut near = key;
            near[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!proves(&proof(&near), &key));
            prop_assert_eq!(proves(&noise, &key), noise.len() == PROOF_BYTES && noise[4..] == key);
            prop_assert!(!proves(&proof(&key)[..PROOF_BYTES - 1], &key));
            prop_assert!(!proves(&[&proof(&key)[..], &[0]].concat(), &key));
        }
    }

    #[test]
    fn what_is_no_listener_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(
            Door::new(null.into(), &[0; KEY_BYTES])
                .unwrap_err()
                .contains("SOCK_SEQPACKET")
        );
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(
            Door::new(null.into(), &[0; 31])
                .unwrap_err()
                .contains("32 bytes, not 31")
        );
    }
}
