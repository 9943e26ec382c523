//! The machine as the controller sees it: what it is made from, and what can be done with it.
//!
//! [`build`] makes the real one. Tests of the server make their own.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::mpsc,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    thread,
    time::Duration,
};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Kvm;
use sepal_devices::virtio::device::DeviceKind;
use sepal_schema::{config::MemoryBacking, error::Error};

use sepal_runner::inner;

use super::devices::{Handles, Place, Requests};
use crate::{
    lifecycle::Generation,
    machine::{
        Answer, Hooks, HostKind, Machine, MachineConfig, MachineError, MachineEvent, MachineStats, Question,
        RegisterDump, Spare, ThreadRole, ThreadSetup,
    },
    memory::{CustomRange, MIB, MemoryConfig},
};

/// Everything that a machine is made from.
pub struct VmSpec {
    /// Number of vCPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Back memory with transparent huge pages.
    pub huge_pages: bool,
    /// Client-backed ranges of memory.
    pub custom_memory: Vec<MemoryBacking>,
    /// The complete command line.
    pub cmdline: String,
    /// The kernel.
    pub kernel: OwnedFd,
    /// Initial RAM file system.
    pub initrd: Option<OwnedFd>,
    /// The host's KVM works without hardware virtualization.
    pub unassisted: bool,
    /// What KVM offers of the host's processor, if that was told.
    pub cpuid: Option<Vec<kvm_cpuid_entry2>>,
    /// Stream socket of the serial port.
    pub serial: Option<OwnedFd>,
    /// Devices on the bus.
    pub devices: Requests,
}

/// Where a machine's threads tell what happened; never blocks.
pub type Events = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// Makes machines; runs in a thread of its own and ends soon once the flag is set.
pub type Builder =
    Arc<dyn Fn(Generation, VmSpec, Events, &Arc<AtomicBool>) -> Result<Box<dyn Vm>, Error> + Send + Sync>;

/// Is told the registers of a vCPU, or why they cannot be read.
pub type ShowRegisters = Box<dyn FnOnce(Result<RegisterDump, MachineError>) + Send>;

/// Is told what was asked of a vCPU, or why it cannot be known.
pub type ShowAnswer = Box<dyn FnOnce(Result<Answer, MachineError>) + Send>;

/// Registers of vCPUs, with their numbers.
pub type LastRegisters = Vec<(u8, RegisterDump)>;

/// A machine that was built.
pub trait Vm: Send {
    /// Starts vCPUs and dispatch loops; they run when it returns.
    fn start(&mut self) -> Result<(), Error>;
    /// Asks all vCPUs to leave the guest. `Happening::Paused` follows when the last one has.
    fn pause(&mut self);
    /// Whether all vCPUs are out of the guest until they are told to go on.
    fn is_paused(&self) -> bool;
    /// Lets all vCPUs go on.
    fn resume(&mut self);
    /// Presses the power button.
    fn press_power_button(&mut self) -> Result<(), Error>;
    /// A non-maskable interrupt for every vCPU.
    fn nmi(&mut self) -> Result<(), Error>;
    /// Calls `show` with the registers of a vCPU, on another thread; drops it uncalled if the machine ends before.
    fn registers(&self, vcpu: u8, show: ShowRegisters) -> Result<(), Error>;
    /// Calls `show` with the answer to a question about memory as a vCPU sees it, as `registers` does.
    fn look(&self, vcpu: u8, question: Question, show: ShowAnswer) -> Result<(), Error>;
    /// Guest memory by physical address, at most 64 KiB of it.
    fn read_memory(&self, address: u64, length: u32) -> Result<Vec<u8>, Error>;
    /// Counters, taken without waking a vCPU.
    fn stats(&self) -> MachineStats;
    /// The host's side of its devices.
    fn devices(&self) -> Handles;
    /// Ends all threads, flushes what the guest printed last, and gives the memory back. Tells where the vCPUs were if one of them failed. Fails with the
    /// names of threads that did not end.
    fn tear_down(self: Box<Self>) -> Result<LastRegisters, String>;
}

/// How long the threads of a machine may take to end once they are told to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes real machines with this handle on `/dev/kvm`, each of whose threads narrows its own system-call filter first.
///
/// What all machines have in common is made ahead for the first one, on a thread of its own, while the component gets ready to be asked. That thread
/// loads the first machine's kernel, too.
pub fn builder(kvm: Kvm) -> Builder {
    let kvm = Arc::new(kvm);
    let for_spare = Arc::clone(&kvm);
    let (made, spare) = mpsc::channel();
    // Without the thread nothing is made ahead: its end of the channel is dropped.
    let _ = thread::Builder::new().name("loader".into()).spawn(move || {
        let setup: ThreadSetup = Arc::new(narrow);
        Spare::serve(&for_spare, &setup, |spare| drop(made.send(spare)));
    });
    let spare = Mutex::new(Some(spare));
    Arc::new(move |generation, spec, events, cancel| {
        let memory = MemoryConfig {
            size_bytes: u64::from(spec.memory_mib) * MIB,
            custom: spec.custom_memory.into_iter().map(custom_range).collect(),
            huge_pages: spec.huge_pages,
            device_bytes: spec.devices.device_bytes(),
        };
        let region = memory
            .device_region()
            .map_err(|error| MachineError::from(error).to_error())?;
        let place = Place {
            ram: memory.size_bytes,
            device_region: region,
        };
        let guards = spec.devices.guards();
        let (specs, devices) = spec.devices.make(&place)?;
        let config = MachineConfig {
            generation,
            memory,
            vcpus: spec.cpus,
            kernel: File::from(spec.kernel),
            initrd: spec.initrd.map(File::from),
            cmdline: spec.cmdline,
            serial: spec.serial,
            host: if spec.unassisted {
                HostKind::Unassisted
            } else {
                HostKind::Hardware
            },
            cpuid: spec.cpuid,
            devices: specs,
            guards,
        };
        let hooks = Hooks {
            thread_setup: Arc::new(narrow),
            events,
        };
        let ahead = spare.lock().unwrap_or_else(PoisonError::into_inner).take();
        // One that failed is made again, now that there is somebody to tell why.
        let machine = match ahead.and_then(|ahead| ahead.recv().ok()?.ok()) {
            Some(spare) => Machine::create_from(&kvm, spare, config, hooks, cancel),
            None => Machine::create(&kvm, config, hooks, cancel),
        };
        let machine = machine.map_err(|error| error.to_error())?;
        Ok(Box::new(RealVm { machine, devices }) as Box<dyn Vm>)
    })
}

fn custom_range(backing: MemoryBacking) -> CustomRange {
    CustomRange {
        memfd: backing.memfd,
        start: backing.start,
        end: backing.end,
    }
}

fn narrow(role: ThreadRole) -> io::Result<()> {
    let role = match role {
        ThreadRole::Vcpu(_) => inner::ThreadRole::Vcpu,
        ThreadRole::Device(_) => inner::ThreadRole::DeviceLoop,
        ThreadRole::Virtio(kind) => match kind {
            DeviceKind::Block => inner::ThreadRole::Disk,
            DeviceKind::Net => inner::ThreadRole::Network,
            DeviceKind::Vsock => inner::ThreadRole::Vsock,
            DeviceKind::Balloon | DeviceKind::Memory => inner::ThreadRole::Memory,
            _ => inner::ThreadRole::DeviceLoop,
        },
        ThreadRole::Loader => inner::ThreadRole::Helper,
    };
    inner::narrow(role).map_err(io::Error::other)
}

/// A machine and its devices.
struct RealVm {
    machine: Machine,
    devices: Handles,
}

impl Vm for RealVm {
    fn start(&mut self) -> Result<(), Error> {
        self.machine.start().map_err(|error| error.to_error())
    }

    fn pause(&mut self) {
        self.machine.pause();
    }

    fn is_paused(&self) -> bool {
        self.machine.is_paused()
    }

    fn resume(&mut self) {
        self.machine.resume();
    }

    fn press_power_button(&mut self) -> Result<(), Error> {
        self.machine.press_power_button().map_err(|error| error.to_error())
    }

    fn nmi(&mut self) -> Result<(), Error> {
        self.machine.nmi().map_err(|error| error.to_error())
    }

    fn registers(&self, vcpu: u8, show: ShowRegisters) -> Result<(), Error> {
        self.machine.registers(vcpu, show).map_err(|error| error.to_error())
    }

    fn look(&self, vcpu: u8, question: Question, show: ShowAnswer) -> Result<(), Error> {
        let asked = self.machine.look(vcpu, question, show);
        asked.map_err(|error| error.to_error())
    }

    fn read_memory(&self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.machine
            .read_memory(address, length)
            .map_err(|error| error.to_error())
    }

    fn stats(&self) -> MachineStats {
        self.machine.stats()
    }

    fn devices(&self) -> Handles {
        self.devices.clone()
    }

    fn tear_down(self: Box<Self>) -> Result<LastRegisters, String> {
        let stopped = self.machine.join(PATIENCE);
        if stopped.stuck.is_empty() {
            Ok(stopped.registers)
        } else {
            Err(stopped.stuck.join(", "))
        }
    }
}
