//! What a guest is made of, as a Rust value.
//!
//! ```text
//!   config.capnp --decode--> GuestConfig --encode--> config.capnp
//! ```
//!
//! Decoding checks every limit and answers with an error that names the field; a field that is not built yet is refused, never ignored.
//! The descriptors of a message that is refused are closed with it at the latest.

mod decode;
mod decode_devices;
pub mod device;
mod duplicate;
mod encode;
mod encode_devices;
#[cfg(test)]
mod tests;
pub mod upkeep;

use std::{ops::Range, os::fd::OwnedFd};

use crate::{
    error::{Error, Kind},
    file_capnp,
    transport::{FdError, FdTable},
};

pub use crate::config_capnp::guest_config::{OnPanic, OnReset};
pub use decode::check_name;
pub use decode_devices::show_mac;
use device::{Balloon, Console, Disk, MemoryDevice, Network, Rng, Share, VhostUser, Vsock, WatchdogAction};
pub use upkeep::{Pin, Restart, RestartPolicy};
pub use uuid::Uuid;

/// Most vCPUs of a guest.
pub const MAX_CPUS: u8 = 64;
/// Guest memory where the configuration names none, in MiB.
pub const DEFAULT_MEMORY_MIB: u32 = 256;
/// Longest command line, its additions included, in bytes without the NUL (COMMAND_LINE_SIZE of x86 Linux is 2048).
pub const MAX_CMDLINE: usize = 2047;
/// Most additions to the command line.
pub const MAX_CMDLINE_ADDITIONS: u32 = 64;
/// Longest name of a guest, in characters.
pub const MAX_NAME: usize = 64;
/// Bytes of an instance id.
pub const INSTANCE_ID: usize = 64;
/// Most client-backed ranges of guest memory.
pub const MAX_CUSTOM_MEMORY: u32 = 16;
/// Guest physical addresses where devices are, and no memory can be.
pub const DEVICE_HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// No guest memory ends above this (4 TiB): within the physical addresses of every server CPU, and within one memslot of KVM's.
pub const MAX_GUEST_ADDRESS: u64 = 1 << 42;
/// Largest file that may be given as bytes inside a message.
pub const MAX_INLINE_FILE: usize = 64 * 1024;
/// Most devices on a guest's bus, of a kind and of all kinds together.
pub const MAX_DEVICES: u32 = 32;

/// How descriptors get into and out of messages; the transport's table implements it.
pub trait Handles {
    /// Queues a descriptor to travel with the next message and returns its number.
    fn send(&self, fd: OwnedFd) -> Result<u32, Error>;
    /// Takes the descriptor of that number, which arrived with the message that names it.
    fn take(&self, number: u32) -> Result<OwnedFd, Error>;
}

impl Handles for FdTable {
    fn send(&self, fd: OwnedFd) -> Result<u32, Error> {
        Self::send(self, fd).map_err(fd_error)
    }
    fn take(&self, number: u32) -> Result<OwnedFd, Error> {
        Self::take(self, number).map_err(fd_error)
    }
}

fn fd_error(error: FdError) -> Error {
    let kind = match error {
        FdError::NotCarried => Kind::NotSupported,
        FdError::Disconnected => Kind::InternalError,
        FdError::TooMany => Kind::NoResources,
        FdError::Missing(_) => Kind::BadConfig,
    };
    Error::new(kind, error.to_string())
}

/// A file that a guest shall use.
#[derive(Default)]
pub enum File {
    /// No file: the field's default applies.
    #[default]
    None,
    /// An open file.
    Fd(OwnedFd),
    /// The content.
    Bytes(Vec<u8>),
    /// Content that was streamed before.
    Upload(file_capnp::upload::Client),
    /// A path that the guest manager opens.
    Path(String),
}

impl File {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// A range of guest memory that is backed by a client's memfd.
#[derive(Debug)]
pub struct MemoryBacking {
    /// The memfd. If it is not sealed against shrinking, its owner can end the guest by that.
    pub memfd: OwnedFd,
    /// First guest physical address.
    pub start: u64,
    /// First address after the range.
    pub end: u64,
}

/// What the host lets a component use at most; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory of component and guest together, in MiB.
    pub memory_mib: u64,
    /// CPU time, in percent of one CPU.
    pub cpu_percent: u32,
    /// 1 to 10000, relative to others.
    pub cpu_weight: u32,
    /// Threads of the component.
    pub tasks: u32,
}

/// A guest's configuration with every default still unresolved; see `config.capnp` for the meaning of each field.
#[derive(Default)]
pub struct GuestConfig {
    /// Name, empty for one of the manager's choice.
    pub name: String,
    /// What tells the guest across restarts which one it is.
    pub instance_id: Option<[u8; INSTANCE_ID]>,
    /// The kernel, none for the embedded guest.
    pub kernel: File,
    /// Initial RAM file system.
    pub initrd: File,
    /// Kernel command line, additions not included.
    pub cmdline: String,
    /// Additions to the command line.
    pub cmdline_add: Vec<String>,
    /// Number of vCPUs, 0 for the default.
    pub cpus: u8,
    /// Guest memory in MiB, 0 or less for the default.
    pub memory_mib: i32,
    /// Back memory with transparent huge pages.
    pub huge_pages: bool,
    /// The memory is hidden from the host. Refused by whoever makes the guest, who can tell what the host lacks.
    pub protected_vm: bool,
    /// Client-backed ranges of memory.
    pub custom_memory: Vec<MemoryBacking>,
    /// Limits of the component.
    pub limits: Limits,
    /// Layers of the jail that may be missing.
    pub waived_layers: Vec<String>,
    /// Block devices.
    pub disks: Vec<Disk>,
    /// Network devices, the default one included.
    pub networks: Vec<Network>,
    /// The virtio console.
    pub console: Option<Console>,
    /// The entropy source.
    pub rng: Option<Rng>,
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// The socket device.
    pub vsock: Option<Vsock>,
    /// The memory device.
    pub memory_device: Option<MemoryDevice>,
    /// Host folders.
    pub shares: Vec<Share>,
    /// Devices that other processes serve.
    pub vhost_user: Vec<VhostUser>,
    /// What the watchdog does when it expires; none: there is no watchdog.
    pub watchdog: Option<WatchdogAction>,
    /// Whether there is a VM generation id.
    pub generation_id: bool,
    /// Whether there is a pvpanic device.
    pub panic_device: bool,
    /// Whether the agent in the guest is talked to; only with a socket device.
    pub agent: bool,
    /// What happens when the guest resets itself. The guest manager's to carry out: a component reports the reset, and is done.
    pub on_reset: OnReset,
    /// What happens when the guest's kernel has panicked; more than `Leave` only with a pvpanic device. The guest manager's to carry out, too.
    pub on_panic: OnPanic,
    /// Tells it from all other guests of its manager; none for one of the manager's choice. Never nil.
    pub uuid: Option<Uuid>,
    /// What follows when it ends by itself.
    pub restart: Restart,
    /// It goes on without its manager.
    pub durable: bool,
    /// Where its vCPUs may run; those that are not in the list: wherever the component may.
    pub pins: Vec<Pin>,
}

#[expect(clippy::derivable_impls, reason = "the enumeration is generated")]
impl Default for OnReset {
    fn default() -> Self {
        Self::Stop
    }
}

#[expect(clippy::derivable_impls, reason = "the enumeration is generated")]
impl Default for OnPanic {
    fn default() -> Self {
        Self::Leave
    }
}

impl GuestConfig {
    /// Number of devices on the guest's bus.
    pub fn bus_devices(&self) -> usize {
        let single = [
            self.console.is_some(),
            self.rng.is_some(),
            self.balloon.is_some(),
            self.vsock.is_some(),
            self.memory_device.is_some(),
        ];
        let single = single.into_iter().filter(|there| *there).count();
        self.disks.len() + self.networks.len() + self.shares.len() + self.vhost_user.len() + single
    }

    /// The least limit of memory that a component of such a guest starts and boots under, in MiB: what its threads, its vCPUs and its own tables take, nothing
    /// that the guest itself uses. Measured with 1 to 64 vCPUs, rounded up.
    pub(crate) fn least_memory_mib(&self) -> u64 {
        3 + self.loops().div_ceil(4)
    }

    /// The least limit of threads that a component of such a guest works under: those of vCPUs and devices, of the serial port and the clock, its control thread,
    /// and two that create the guest and load its kernel, in whose place KVM has one by the time the guest runs (`kvm-nx-lpage-recovery`).
    pub fn least_tasks(&self) -> u64 {
        5 + self.loops()
    }

    /// The vCPUs, and the devices that are not in every guest, which have a thread each.
    fn loops(&self) -> u64 {
        u64::from(self.cpus()) + self.bus_devices() as u64 + u64::from(self.watchdog.is_some())
    }

    /// Number of vCPUs with the default resolved.
    pub fn cpus(&self) -> u8 {
        self.cpus.max(1)
    }

    /// Guest memory in MiB with the default resolved.
    pub fn memory_mib(&self) -> u32 {
        u32::try_from(self.memory_mib)
            .ok()
            .filter(|&mib| mib > 0)
            .unwrap_or(DEFAULT_MEMORY_MIB)
    }

    /// The command line with its additions.
    pub fn full_cmdline(&self) -> String {
        let parts = std::iter::once(&self.cmdline).chain(&self.cmdline_add);
        parts
            .filter(|part| !part.is_empty())
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(" ")
    }
}
