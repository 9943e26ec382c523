//! The devices of a configuration, as Rust values; `config.capnp` tells what each field means.
//!
//! Zeroes are kept as they came, so that a configuration can be handed on as it is; the methods resolve them.

use std::os::fd::OwnedFd;

use super::File;
use crate::vsock_capnp::vsock_acceptor;

pub use crate::config_capnp::guest_config::{
    WatchdogAction,
    disk::{Format as DiskFormat, Mode as DiskMode},
};

/// Most files below a qcow2 image.
pub const MAX_BACKING: u32 = 8;
/// Longest id of a disk, in bytes (virtio 1.2, section 5.2.6: VIRTIO_BLK_ID_BYTES).
pub const MAX_DISK_ID: usize = 20;
/// Most request queues of a disk, or of a share.
pub const MAX_QUEUES: u16 = 16;
/// Most queue pairs of a network device.
pub const MAX_QUEUE_PAIRS: u16 = 8;
/// Longest name of a network interface, in bytes (IFNAMSIZ without the NUL).
pub const MAX_INTERFACE_NAME: usize = 15;
/// Smallest MTU that a network device can have, in bytes (what IPv4 needs, and virtio 1.2, section 5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// Largest MTU, in bytes: what fits into the 64 KiB of a segment with its headers.
pub const MAX_MTU: u16 = 65520;
/// The MTU where none is given, in bytes.
pub const DEFAULT_MTU: u16 = 1500;
/// Most ports of a console.
pub const MAX_CONSOLE_PORTS: u16 = 32;
/// Bytes a second of entropy where the configuration names no limit.
pub const DEFAULT_RNG_BYTES: u64 = 1 << 20;
/// The smallest context id that a guest can have (virtio 1.2, section 5.10.4).
pub const MIN_CID: u32 = 3;
/// Most ports on which somebody listens from the start.
pub const MAX_LISTENERS: u32 = 64;
/// Longest path at which vsock is offered as a Unix socket, in bytes: with a port after it, it still fits into `sun_path`.
pub const MAX_SOCKET_PATH: usize = 90;
/// Longest path of a Unix socket at which a back end serves, in bytes: what fits into `sun_path` with a NUL (unix(7)).
pub const MAX_BACKEND_PATH: usize = 107;
/// The vsock port of the guest on which an agent listens.
pub const AGENT_PORT: u32 = 1024;
/// Smallest block of a memory device, in bytes.
pub const MIN_MEMORY_BLOCK: u64 = 2 << 20;
/// Largest region of a memory device, in bytes.
pub const MAX_MEMORY_REGION: u64 = 1 << 40;
/// Largest alignment of a memory device's region, in bytes.
pub const MAX_MEMORY_ALIGNMENT: u64 = 1 << 30;
/// Most shares.
pub const MAX_SHARES: u32 = 16;
/// Longest tag of a share, in bytes (virtio 1.2, section 5.11.4).
pub const MAX_TAG: usize = 36;
/// Most devices that other processes serve, besides shares.
pub const MAX_VHOST_USER: u32 = 16;
/// Most queues of such a device.
pub const MAX_VHOST_USER_QUEUES: u16 = 64;
/// Most entries of each of its queues.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Entries of its queues where the configuration does not say.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;

/// A token bucket each for bytes and operations; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// Operations a second.
    pub operations_per_second: u64,
    /// Bytes that may pass at once after a rest; 0: what passes in a second.
    pub burst_bytes: u64,
    /// Operations that may pass at once after a rest; 0: what passes in a second.
    pub burst_operations: u64,
}

/// A block device.
pub struct Disk {
    /// What the guest reads as its serial number; empty for none.
    pub id: String,
    /// The image.
    pub image: File,
    /// What the guest may do.
    pub mode: DiskMode,
    /// What is in the image.
    pub format: DiskFormat,
    /// Go around the host's page cache.
    pub direct: bool,
    /// Logical block size in bytes, 0 for the default.
    pub block_size: u32,
    /// How much may pass.
    pub rate_limit: RateLimit,
    /// The files below a qcow2 image, nearest first.
    pub backing: Vec<Backing>,
    /// Request queues, 0 for the default.
    pub queues: u16,
    /// Where a volatile disk keeps what is written; none: the manager finds a place.
    pub scratch: File,
}

/// A file below a qcow2 image.
pub struct Backing {
    /// The file.
    pub file: File,
    /// What is in it.
    pub format: DiskFormat,
}

impl Disk {
    /// A disk with nothing but an image.
    pub fn new(image: File, mode: DiskMode) -> Self {
        Self {
            id: String::new(),
            image,
            mode,
            format: DiskFormat::Unspecified,
            direct: false,
            block_size: 0,
            rate_limit: RateLimit::default(),
            backing: Vec::new(),
            queues: 0,
            scratch: File::None,
        }
    }

    /// Logical block size in bytes with the default resolved.
    pub fn block_size(&self) -> u32 {
        if self.block_size == 0 { 512 } else { self.block_size }
    }

    /// Number of request queues with the default resolved.
    pub fn queues(&self) -> u16 {
        self.queues.max(1)
    }
}

/// What is at the other end of a network device.
pub enum Link {
    /// User-mode networking.
    User,
    /// A tap device, opened once for each queue pair.
    Tap(Vec<OwnedFd>),
    /// A tap device that the manager opens or makes; empty: of a name that it chooses.
    TapNamed(String),
    /// A tap device joined to this bridge.
    Bridge(String),
    /// A stream socket that carries frames, each after its length.
    Socket(OwnedFd),
}

/// A network device.
pub struct Network {
    /// Its address; none for one that is derived.
    pub mac: Option<[u8; 6]>,
    /// What is at the other end.
    pub link: Link,
    /// Bytes, 0 for the default.
    pub mtu: u16,
    /// How much may pass in each direction.
    pub rate_limit: RateLimit,
    /// Queue pairs, 0 for the default.
    pub queue_pairs: u16,
    /// Whether checksums and segmentation are left to the host; none: where the other side can take them.
    pub offloads: Option<bool>,
    /// The link is down at first.
    pub link_down: bool,
}

impl Network {
    /// A network device with nothing but its other end.
    pub fn new(link: Link) -> Self {
        Self {
            mac: None,
            link,
            mtu: 0,
            rate_limit: RateLimit::default(),
            queue_pairs: 0,
            offloads: None,
            link_down: false,
        }
    }

    /// The MTU in bytes with the default resolved.
    pub fn mtu(&self) -> u16 {
        if self.mtu == 0 { DEFAULT_MTU } else { self.mtu }
    }

    /// Number of queue pairs with the default resolved.
    pub fn queue_pairs(&self) -> u16 {
        match &self.link {
            Link::Tap(queues) if self.queue_pairs == 0 => u16::try_from(queues.len()).unwrap_or(u16::MAX),
            _ => self.queue_pairs.max(1),
        }
    }
}

/// A virtio console.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Console {
    /// Number of ports, 0 for the default.
    pub ports: u16,
    /// How many of them, from the first, are consoles; 0 for the default.
    pub console_ports: u16,
}

impl Console {
    /// Number of ports with the default resolved.
    pub fn ports(&self) -> u16 {
        self.ports.max(1)
    }

    /// How many of them are consoles, with the default resolved.
    pub fn console_ports(&self) -> u16 {
        self.console_ports.max(1)
    }
}

/// An entropy source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rng {
    /// How much may pass; all zero for the default.
    pub rate_limit: RateLimit,
}

impl Rng {
    /// How much may pass, with the default resolved.
    pub fn rate_limit(&self) -> RateLimit {
        if self.rate_limit.bytes_per_second != 0 {
            return self.rate_limit;
        }
        RateLimit {
            bytes_per_second: DEFAULT_RNG_BYTES,
            ..self.rate_limit
        }
    }
}

/// A balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Balloon {
    /// The guest may take memory back by itself before it runs out.
    pub deflate_on_oom: bool,
    /// The guest tells which memory it does not use.
    pub free_page_reporting: bool,
}

/// A socket device.
#[derive(Default)]
pub struct Vsock {
    /// The guest's context id, 0 for one of the manager's choice.
    pub cid: u32,
    /// Who listens from the start.
    pub listeners: Vec<Listener>,
    /// Where to offer it as a Unix socket; empty: nowhere.
    pub socket_path: String,
}

/// Who listens on a port of the host.
pub struct Listener {
    /// The port.
    pub port: u32,
    /// Is told of every connection.
    pub acceptor: vsock_acceptor::Client,
}

/// Memory that can be plugged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryDevice {
    /// Bytes, 0 for the default.
    pub block_size: u64,
    /// Bytes that can be plugged at most.
    pub region_size: u64,
    /// Bytes, 0 for the block size.
    pub region_alignment: u64,
    /// Bytes to be plugged at start.
    pub requested: u64,
}

impl MemoryDevice {
    /// The block size in bytes with the default resolved.
    pub fn block_size(&self) -> u64 {
        if self.block_size == 0 {
            MIN_MEMORY_BLOCK
        } else {
            self.block_size
        }
    }

    /// The alignment of the region in bytes with the default resolved.
    pub fn region_alignment(&self) -> u64 {
        if self.region_alignment == 0 {
            self.block_size()
        } else {
            self.region_alignment
        }
    }
}

/// The process that serves a vhost-user device.
#[derive(Debug)]
pub enum Backend {
    /// A connected socket.
    Socket(OwnedFd),
    /// The path of a socket that the manager connects to.
    Path(String),
}

/// A host folder that the guest can mount.
#[derive(Debug)]
pub struct Share {
    /// What the guest mounts it by.
    pub tag: String,
    /// Who serves it.
    pub backend: Backend,
    /// Request queues, 0 for the default.
    pub queues: u16,
}

impl Share {
    /// Number of request queues with the default resolved.
    pub fn queues(&self) -> u16 {
        self.queues.max(1)
    }
}

/// A device that another process serves.
#[derive(Debug)]
pub struct VhostUser {
    /// The virtio device type.
    pub device_type: u16,
    /// Who serves it.
    pub backend: Backend,
    /// Queues, 0 for the default.
    pub queues: u16,
    /// Entries of each queue, 0 for the default.
    pub queue_size: u16,
}

impl VhostUser {
    /// Number of queues with the default resolved.
    pub fn queues(&self) -> u16 {
        self.queues.max(1)
    }

    /// Entries of each queue with the default resolved.
    pub fn queue_size(&self) -> u16 {
        if self.queue_size == 0 {
            DEFAULT_QUEUE_SIZE
        } else {
            self.queue_size
        }
    }
}
