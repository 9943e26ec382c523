//! What the owner of a network device holds: its link, its counters, and what it is. Nothing here waits for the device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What is behind a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetBackendKind {
    /// A tap device.
    Tap,
    /// A stream socket.
    Stream,
}

/// What a network device is, and how it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetInfo {
    /// Its MAC address; the driver may have changed it.
    pub mac: [u8; 6],
    /// Bytes of a frame without its Ethernet header.
    pub mtu: u16,
    /// Pairs of queues.
    pub queue_pairs: u16,
    /// Whether frames pass.
    pub link_up: bool,
    /// What is behind it.
    pub backend: NetBackendKind,
}

/// Counters of one direction since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Frames that passed.
    pub frames: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Good frames that were dropped: the link was down, the other side took none, or there was no room.
    pub dropped: u64,
    /// Frames that were dropped because something was wrong with them.
    pub errors: u64,
}

/// Counters of a network device, as the guest sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// What the guest received.
    pub received: NetCounters,
    /// What the guest sent.
    pub sent: NetCounters,
}

/// [`NetCounters`] that the device's thread writes.
#[derive(Default)]
pub(super) struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    pub(super) fn passed(&self, bytes: usize) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    fn snapshot(&self) -> NetCounters {
        NetCounters {
            frames: self.frames.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}

/// What device and handles share.
pub(super) struct Shared {
    pub(super) received: Counters,
    pub(super) sent: Counters,
    /// What the owner wants.
    link_wanted: AtomicBool,
    /// The host's side is gone.
    lost: AtomicBool,
    mac: AtomicU64,
    fixed: NetInfo,
    /// Wakes the device's loop: the link changed, or the device has more to do.
    pub(super) wake: EventFd,
}

impl Shared {
    /// As `info` says.
    pub(super) fn new(info: NetInfo) -> io::Result<Self> {
        let shared = Self {
            received: Counters::default(),
            sent: Counters::default(),
            link_wanted: AtomicBool::new(info.link_up),
            lost: AtomicBool::new(false),
            mac: AtomicU64::new(0),
            fixed: info,
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        shared.set_mac(info.mac);
        Ok(shared)
    }

    /// Whether frames are to pass.
    pub(super) fn link_up(&self) -> bool {
        self.link_wanted.load(Ordering::Acquire) && !self.lost.load(Ordering::Acquire)
    }

    pub(super) fn set_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        let [a, b, c, d, e, f] = mac;
        self.mac
            .store(u64::from_be_bytes([0, 0, a, b, c, d, e, f]), Ordering::Relaxed);
    }

    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the loop is awake.
        let _ = self.wake.write(1);
    }
}

/// The owner's side of a network device.
#[derive(Clone)]
pub struct NetHandle {
    pub(super) shared: Arc<Shared>,
}

impl NetHandle {
    /// Plugs the cable in or out. While it is out, frames of both directions are dropped and counted. The link of a device whose host side is gone
    /// stays down.
    pub fn set_link(&self, up: bool) {
        self.shared.link_wanted.store(up, Ordering::Release);
        self.shared.wake();
    }

    /// What has passed so far.
    pub fn stats(&self) -> NetStats {
        NetStats {
            received: self.shared.received.snapshot(),
            sent: self.shared.sent.snapshot(),
        }
    }

    /// What the device is, and how it is now.
    pub fn info(&self) -> NetInfo {
        let [_, _, mac @ ..] = self.shared.mac.load(Ordering::Relaxed).to_be_bytes();
        NetInfo {
            mac,
            link_up: self.shared.link_up(),
            ..self.shared.fixed
        }
    }
}
