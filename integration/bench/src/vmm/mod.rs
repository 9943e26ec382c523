//! The virtual machine monitors: what each is asked to run, in words that all of them know, and how a running guest is listened to.

mod alioth;
mod cloud_hypervisor;
mod crosvm;
mod firecracker;
mod lkvm;
mod peer;
mod process;
mod qemu;
mod qmp;
mod sepal;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::io::{FdFlags, fcntl_setfd};
use sepal_integration::{HarnessError, Report};

use peer::Peer;
use process::Process;

pub(crate) use peer::{Found, on_path};
pub(crate) use sepal::{Sepal, boot as sepal_boot};

/// Who Sepal is measured beside, as far as they are on the host.
pub(crate) const PEERS: [&Peer; 6] = [
    &qemu::QEMU,
    &firecracker::FIRECRACKER,
    &cloud_hypervisor::CLOUD_HYPERVISOR,
    &alioth::ALIOTH,
    &crosvm::CROSVM,
    &lkvm::LKVM,
];

/// A virtual machine monitor.
pub(crate) trait Vmm: Sync {
    /// Its name, for tables.
    fn name(&self) -> &'static str;

    /// Its version.
    fn version(&self) -> String;

    /// Starts a guest, whose serial port is then listened to.
    fn start(&self, machine: &Machine<'_>) -> Started;
}

/// What not every VMM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extra {
    /// A network device over a tap that is open already.
    Tap,
    /// Disks past the host's page cache.
    Direct,
    /// Disks in QEMU's format.
    Qcow2,
    /// A virtio memory balloon whose size can be asked for while the guest runs.
    Balloon,
}

impl Extra {
    /// What to say of who does not have it.
    fn lack(self) -> &'static str {
        match self {
            Self::Tap => "it takes no tap device that is open already",
            Self::Direct => "it has no disk past the page cache",
            Self::Qcow2 => "disks in qcow2",
            Self::Balloon => "balloons that can be asked for while it runs",
        }
    }
}

/// What to run.
#[derive(Clone, Copy)]
pub(crate) struct Machine<'a> {
    /// The kernel, in all formats that there are of it.
    pub(crate) kernel: Kernel<'a>,
    /// Its command line.
    pub(crate) cmdline: &'a str,
    /// Its initramfs.
    pub(crate) initrd: Option<&'a Path>,
    /// MiB of memory.
    pub(crate) memory_mib: u32,
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// A virtio disk.
    pub(crate) disk: Option<Disk<'a>>,
    /// A virtio network device.
    pub(crate) tap: Option<Tap<'a>>,
    /// A virtio memory balloon.
    pub(crate) balloon: bool,
    /// Has strace(1) write there all system calls of the VMM, a line each with the process in front; for peers, which are processes of their own.
    pub(crate) trace: Option<&'a Path>,
}

/// A kernel: the same in each format, of which a VMM takes the first that it can load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel<'a> {
    /// ELF64 with a PVH note and an entry by Linux's 64-bit protocol.
    pub(crate) elf: &'a Path,
    /// For VMMs that take nothing else: bzImage.
    pub(crate) bzimage: Option<&'a Path>,
    /// For VMMs that take nothing else: bytes that run wherever they are loaded.
    pub(crate) flat: Option<&'a Path>,
}

/// An image as a virtio disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disk<'a> {
    pub(crate) path: &'a Path,
    /// Past the host's page cache (O_DIRECT).
    pub(crate) direct: bool,
    /// QEMU's format instead of a raw image.
    pub(crate) qcow2: bool,
}

/// A tap device that is open: who wants to open it by its name cannot have it.
#[derive(Clone, Copy)]
pub(crate) struct Tap<'a> {
    pub(crate) fd: &'a OwnedFd,
    pub(crate) mac: [u8; 6],
}

impl<'a> Machine<'a> {
    /// One vCPU and 128 MiB, no devices.
    pub(crate) fn new(kernel: Kernel<'a>) -> Self {
        Self {
            kernel,
            cmdline: "",
            initrd: None,
            memory_mib: 128,
            cpus: 1,
            disk: None,
            tap: None,
            balloon: false,
            trace: None,
        }
    }

    /// What of it not every VMM has.
    fn extras(&self) -> impl Iterator<Item = Extra> {
        let disk = |wanted: fn(&Disk<'_>) -> bool| self.disk.as_ref().is_some_and(wanted);
        [
            (Extra::Tap, self.tap.is_some()),
            (Extra::Qcow2, disk(|disk| disk.qcow2)),
            (Extra::Direct, disk(|disk| disk.direct)),
            (Extra::Balloon, self.balloon),
        ]
        .into_iter()
        .filter_map(|(extra, wanted)| wanted.then_some(extra))
    }
}

impl Tap<'_> {
    /// Lets the program that is started next have it, under the number that is returned.
    fn inherited(&self) -> io::Result<RawFd> {
        fcntl_setfd(self.fd, FdFlags::empty())?;
        Ok(self.fd.as_raw_fd())
    }
}

/// A running guest; it ends when this is dropped.
pub(crate) trait Running {
    /// Waits for the first byte on the serial port.
    fn first_byte(&mut self) -> Result<(), HarnessError>;

    /// Waits for the guest to print this.
    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError>;

    /// Waits for the next report on a command (`sepal-driver-guest` says what those are).
    fn report(&mut self, command: &str) -> Result<Report, HarnessError>;

    /// Waits for the guest to end by itself.
    fn end(&mut self) -> Result<(), HarnessError>;

    /// The process that is the virtual machine.
    fn pid(&mut self) -> Result<u32, HarnessError>;

    /// Asks the guest for a balloon of so many pages of 4096 bytes, whose machine has one.
    fn request_balloon(&mut self, _pages: u32) -> Result<(), HarnessError> {
        Err(HarnessError::Failed("it has no balloon".into()))
    }
}

/// A running guest, or why there is none.
pub(crate) type Started = Result<Box<dyn Running>, StartError>;

/// Why a guest does not run.
#[derive(Debug)]
pub(crate) enum StartError {
    /// The VMM has no such thing.
    Unsupported(String),
    /// It should have worked.
    Failed(anyhow::Error),
}

impl std::fmt::Display for StartError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unsupported(what) => write!(formatter, "unsupported: {what}"),
            Self::Failed(error) => write!(formatter, "{error:#}"),
        }
    }
}

impl StartError {
    /// As an error like any other.
    pub(crate) fn into_error(self) -> anyhow::Error {
        match self {
            Self::Unsupported(_) => anyhow::anyhow!("{self}"),
            Self::Failed(error) => error,
        }
    }
}

// No `std::error::Error`, which would stand in the way of this.
impl<E: Into<anyhow::Error>> From<E> for StartError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// A MAC address, as command lines have it.
pub(crate) fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}
