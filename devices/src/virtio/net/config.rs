//! How a network device is made, and why it cannot be.

use std::io;
use std::os::fd::OwnedFd;

use super::backend::stream::StreamError;
use super::backend::tap::TapError;
use super::{MAX_MTU, MAX_QUEUE_PAIRS, MIN_MTU};
use crate::rate::RateLimit;

/// What is behind a network device.
#[derive(Debug)]
pub enum NetBackend {
    /// A tap device, opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`: a descriptor for each pair of queues, 1 to [`MAX_QUEUE_PAIRS`], of
    /// which several need `IFF_MULTI_QUEUE`.
    Tap(Vec<OwnedFd>),
    /// A connected Unix stream socket that carries Ethernet frames, each behind its length as 4 bytes, big-endian.
    Stream(OwnedFd),
    /// As a tap, but sockets that keep packets apart and do not block: for tests.
    #[cfg(any(test, feature = "testing"))]
    Packets(Vec<OwnedFd>),
}

/// How a network device is made.
#[derive(Debug)]
pub struct NetConfig {
    /// Its address: unicast, not all zero.
    pub mac: [u8; 6],
    /// The longest frame that is one segment, in bytes without its Ethernet header: [`MIN_MTU`] to [`MAX_MTU`].
    pub mtu: u16,
    /// What is behind it.
    pub backend: NetBackend,
    /// Leave checksums and segmentation to the host, where it can.
    pub offloads: bool,
    /// Whether frames pass from the start.
    pub link_up: bool,
    /// Limits what the guest receives.
    pub receive_limit: RateLimit,
    /// Limits what the guest sends.
    pub send_limit: RateLimit,
}

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The MAC address is none of a single device.
    #[error("the MAC address is a group's or all zero")]
    Mac,
    /// The MTU is out of range.
    #[error("an MTU of {0} bytes: it has to be {MIN_MTU} to {MAX_MTU}")]
    Mtu(u16),
    /// There are no descriptors, or too many.
    #[error("{0} descriptors for the tap: there have to be 1 to {MAX_QUEUE_PAIRS}")]
    Queues(usize),
    /// The descriptors are no tap that serves.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The descriptor is no socket that serves.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The host gives no eventfd or timerfd.
    #[error("no resources for a network device: {0}")]
    Resources(io::Error),
}
