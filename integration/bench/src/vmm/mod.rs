//! The virtual machine monitors: what each is asked to run, in words that all of them know, and how a running guest is listened to.

mod alioth;
mod cloud_hypervisor;
mod crosvm;
mod firecracker;
mod lkvm;
mod process;
mod qemu;
mod qmp;
mod sepal;

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use sepal_integration::{HarnessError, Report};

pub(crate) use process::Process;
pub(crate) use sepal::{Sepal, boot as sepal_boot};

/// What peers are called on the command line.
pub(crate) const PEERS: [&str; 6] = ["qemu", "firecracker", "cloud-hypervisor", "alioth", "crosvm", "lkvm"];

/// A virtual machine monitor.
pub(crate) trait Vmm: Sync {
    /// Its name, for tables.
    fn name(&self) -> &'static str;

    /// Its version.
    fn version(&self) -> String;

    /// Whether it can do something that not all of them can: a machine is asked for it only then.
    fn has(&self, _extra: Extra) -> bool {
        false
    }

    /// Starts a guest, whose serial port is then listened to.
    fn start(&self, machine: &Machine<'_>) -> Result<Box<dyn Running>, StartError>;
}

/// What not every VMM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extra {
    /// Disks in QEMU's format.
    Qcow2,
    /// A virtio memory balloon.
    Balloon,
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
    /// A virtio memory balloon; of who has [`Extra::Balloon`].
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
    /// QEMU's format instead of a raw image; of who has [`Extra::Qcow2`].
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

    /// Asks the guest for a balloon of so many pages of 4096 bytes; of who has [`Extra::Balloon`].
    fn request_balloon(&mut self, _pages: u32) -> Result<(), HarnessError> {
        Err(HarnessError::Failed("it has no balloon".into()))
    }
}

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

/// Those peers that are here, and the names of those that are not; `named` says where one is that is not on PATH.
pub(crate) fn find_peers<'a>(named: impl Fn(&str) -> Option<&'a Path>) -> (Vec<Box<dyn Vmm>>, Vec<String>) {
    fn boxed<V: Vmm + 'static>(found: Option<V>) -> Option<Box<dyn Vmm>> {
        found.map(|vmm| Box::new(vmm) as Box<dyn Vmm>)
    }
    let (mut peers, mut not_found) = (Vec::new(), Vec::new());
    for name in PEERS {
        let path = named(name);
        let found = match name {
            "qemu" => boxed(qemu::Qemu::find(path)),
            "firecracker" => boxed(firecracker::Firecracker::find(path)),
            "cloud-hypervisor" => boxed(cloud_hypervisor::CloudHypervisor::find(path)),
            "alioth" => boxed(alioth::Alioth::find(path)),
            "crosvm" => boxed(crosvm::Crosvm::find(path)),
            _ => boxed(lkvm::Lkvm::find(path)),
        };
        match found {
            Some(peer) => peers.push(peer),
            None => not_found.push(name.to_owned()),
        }
    }
    (peers, not_found)
}

/// A MAC address, as command lines have it.
fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

/// A program on PATH, or where an option says it is.
pub(crate) fn find(name: &str, named: Option<&Path>) -> Option<PathBuf> {
    match named {
        Some(path) => Some(path.to_owned()),
        None => {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path)
                .map(|folder| folder.join(name))
                .find(|path| path.is_file())
        }
    }
}

/// The first line that a program prints, for its version.
pub(crate) fn first_line_of(program: &Path, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    let printed = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    printed
        .ok()
        .and_then(|text| text.lines().next().map(str::to_owned))
        .unwrap_or_default()
}
