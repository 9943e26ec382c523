//! What a peer may make us hold, and why a connection ended.

use std::{fmt, io};

/// Limits of one connection, for what the peer sends and makes us keep. The defaults leave room for every use of the
/// protocol; they bound a hostile peer to some tens of MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of a received message in words of 8 bytes, without its segment table. Default 16 Ki (128 KiB).
    pub message_words: usize,
    /// Segments of a received message. Default 512, the most that the capnp library reads.
    pub segments: usize,
    /// Words that may be read from one message, counting repeated reads: bounds what overlapping pointers can amplify.
    /// Default 512 Ki (4 MiB).
    pub traversal_words: usize,
    /// Capabilities in one received message. Default 256.
    pub message_capabilities: usize,
    /// Calls of the peer in flight. A call counts until its return has been written to the socket. Default 1024.
    pub calls: usize,
    /// Answers with capabilities that the peer has not finished with. Default 4096.
    pub answers: usize,
    /// Distinct capabilities that the peer holds here. Default 8192.
    pub exports: usize,
    /// Bytes of received messages that are still in use, with 1 KiB for each capability in them, and of results that the peer
    /// can still refer to. Default 16 MiB.
    pub held_bytes: usize,
    /// Bytes waiting to be written to a peer that does not read, calls of ours included: use streaming calls, which
    /// wait in time, for much data. Default 4 MiB.
    pub unsent_bytes: usize,
    /// Received file descriptors that nobody has taken yet. Default 200: a guest of many devices comes with its
    /// disks, taps and consoles in one message. With 0 none is ever taken from the kernel: one that is sent ends the connection.
    pub unclaimed_fds: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_words: 16 * 1024,
            segments: 512,
            traversal_words: 512 * 1024,
            message_capabilities: 256,
            calls: 1024,
            answers: 4096,
            exports: 8192,
            held_bytes: 16 << 20,
            unsent_bytes: 4 << 20,
            unclaimed_fds: 200,
        }
    }
}

/// A limit that a peer went past: see the field of [`Limits`] with the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// [`Limits::message_words`]
    MessageWords,
    /// [`Limits::segments`]
    Segments,
    /// [`Limits::message_capabilities`]
    MessageCapabilities,
    /// [`Limits::calls`]
    Calls,
    /// [`Limits::answers`]
    Answers,
    /// [`Limits::exports`]
    Exports,
    /// [`Limits::held_bytes`]
    HeldBytes,
    /// [`Limits::unsent_bytes`]
    UnsentBytes,
    /// [`Limits::unclaimed_fds`]
    UnclaimedFds,
}

impl Limit {
    /// How much `limits` allows.
    pub fn allowed(self, limits: &Limits) -> usize {
        match self {
            Self::MessageWords => limits.message_words,
            Self::Segments => limits.segments,
            Self::MessageCapabilities => limits.message_capabilities,
            Self::Calls => limits.calls,
            Self::Answers => limits.answers,
            Self::Exports => limits.exports,
            Self::HeldBytes => limits.held_bytes,
            Self::UnsentBytes => limits.unsent_bytes,
            Self::UnclaimedFds => limits.unclaimed_fds,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MessageWords => "words in a message",
            Self::Segments => "segments in a message",
            Self::MessageCapabilities => "capabilities in a message",
            Self::Calls => "calls in flight",
            Self::Answers => "unfinished answers",
            Self::Exports => "capabilities held by the peer",
            Self::HeldBytes => "bytes of messages in use",
            Self::UnsentBytes => "bytes waiting for the peer to read",
            Self::UnclaimedFds => "unclaimed file descriptors",
        })
    }
}

/// Why a connection ended. Every capability that led through it fails with this sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// The peer closed its side, or its process ended.
    #[error("the peer closed the connection")]
    ClosedByPeer,
    /// This side asked for the end, or dropped its [`Connection`](super::Connection).
    #[error("the connection was closed on this side")]
    ClosedHere,
    /// The peer gave up and said why.
    #[error("the other side ended the connection, saying: {0}")]
    Aborted(String),
    /// The peer went past a limit.
    #[error("the peer went past the limit of {allowed} {which}")]
    LimitExceeded {
        /// The limit.
        which: Limit,
        /// Its value.
        allowed: usize,
    },
    /// The peer sent what is no valid message.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// Reading or writing failed.
    #[error("the connection failed: {1}")]
    Io(io::ErrorKind, String),
    /// A bug on this side; the details are in the log.
    #[error("internal error in the connection")]
    Internal,
}

impl EndReason {
    /// Whether the peer learns something from being told, beyond that the connection ends.
    pub(super) fn is_worth_telling(&self) -> bool {
        matches!(self, Self::LimitExceeded { .. } | Self::Protocol(_) | Self::Internal)
    }
}

impl From<io::Error> for EndReason {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // What a Unix socket says when the peer has closed it with bytes of ours unread.
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::ClosedByPeer,
            kind => Self::Io(kind, error.to_string()),
        }
    }
}
