//! What a machine is made from, and what its owner lends it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use sepal_devices::virtio::device::{DeviceKind, VirtioDevice};
use sepal_devices::watchdog::WatchdogAction;

use super::event::MachineEvent;
use crate::memory::MemoryConfig;

/// How the host runs guests. The manager detects it, since `/sys` is out of sight in the jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostKind {
    /// The processor's own virtualization (VMX or SVM).
    Hardware,
    /// None: the guest's kernel code is emulated, and needs [`crate::unassisted`].
    Unassisted,
}

/// What a machine is made from. Files are read by the creation only; the serial socket is kept.
#[derive(Debug)]
pub struct MachineConfig {
    /// Given to every event of this machine.
    pub generation: u64,
    /// Size and backing of the guest's memory.
    pub memory: MemoryConfig,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`](crate::layout::MAX_VCPUS).
    pub vcpus: u8,
    /// ELF image or bzImage.
    pub kernel: File,
    /// Initial file system.
    pub initrd: Option<File>,
    /// The kernel's command line, without a NUL.
    pub cmdline: String,
    /// A stream socket: what the guest writes to its serial port comes out, what is written to it goes in. Without it, output is dropped.
    pub serial: Option<OwnedFd>,
    /// How this host runs guests.
    pub host: HostKind,
    /// What KVM_GET_SUPPORTED_CPUID says; `None`: it is asked.
    pub cpuid: Option<Vec<kvm_cpuid_entry2>>,
    /// Devices on the PCI bus, in the order in which the guest finds them.
    pub devices: Vec<DeviceSpec>,
    /// Which of the devices it has that watch over a guest.
    pub guards: Guards,
}

/// Devices by which a guest tells how it is, and is told who it is.
#[derive(Debug, Clone, Default)]
pub struct Guards {
    /// A port for its kernel's panics (pvpanic).
    pub panic_device: bool,
    /// The number that is different for each machine that is made from the same state (VM generation id).
    pub generation_id: Option<[u8; 16]>,
    /// What tells the guest across restarts which one it is.
    pub instance_id: Option<[u8; 64]>,
    /// A watchdog, and what it does when it expires.
    pub watchdog: Option<WatchdogAction>,
}

/// A device on the PCI bus.
pub struct DeviceSpec {
    /// What it is called in events, and its thread (of whose name Linux shows 15 bytes).
    pub name: String,
    /// The device.
    pub device: Box<dyn VirtioDevice>,
}

impl std::fmt::Debug for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceSpec")
            .field("name", &self.name)
            .field("kind", &self.device.kind())
            .finish_non_exhaustive()
    }
}

/// What a thread of the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadRole {
    /// Runs the vCPU of this index.
    Vcpu(u8),
    /// Runs the loop of the device of this name.
    Device(&'static str),
    /// Runs the loop of a virtio device of this kind.
    Virtio(DeviceKind),
    /// Creates the machine, from where it first looks at the kernel.
    Loader,
}

/// Narrows what the calling thread may do; see [`Hooks::thread_setup`].
pub type ThreadSetup = Arc<dyn Fn(ThreadRole) -> io::Result<()> + Send + Sync>;

/// Takes the machine's news; see [`Hooks::events`].
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// What the owner lends to a machine.
#[derive(Clone)]
pub struct Hooks {
    /// Called first thing on each thread after its set-up and before it touches anything that the guest wrote: the place to narrow the thread's
    /// system-call filter. An error keeps the machine from starting.
    pub thread_setup: ThreadSetup,
    /// Called from any of the machine's threads; must not block, nor call the machine.
    pub events: EventSink,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}
