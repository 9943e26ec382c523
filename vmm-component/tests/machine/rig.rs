//! A machine with a guest in it, its events and the host's end of its serial port.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvm_ioctls::Kvm;
use sepal_vmm_component::machine::{
    Guards, Happening, Hooks, HostKind, Machine, MachineConfig, MachineError, MachineEvent, Stopped, ThreadRole,
};
use sepal_vmm_component::memory::{MIB, MemoryConfig};

use crate::guests;

/// Far more than anything here takes; a test that gets there has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Generation of the machines here.
pub(crate) const GENERATION: u64 = 7;

/// KVM, or `None` with a word about it.
pub(crate) fn kvm() -> Option<Kvm> {
    if Path::new("/dev/kvm").exists() {
        return Some(Kvm::new().expect("/dev/kvm opens"));
    }
    println!("skipped: no /dev/kvm");
    None
}

/// How this host runs guests.
pub(crate) fn host() -> HostKind {
    if Path::new("/sys/module/kvm_pvm").exists() {
        HostKind::Unassisted
    } else {
        HostKind::Hardware
    }
}

/// A file in memory, so that it can be made in a jail, too.
pub(crate) fn file(bytes: &[u8]) -> File {
    let memory = rustix::fs::memfd_create(c"file", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.expect("a memfd"));
    file.write_all(bytes).expect("its contents");
    file
}

/// A configuration with 16 MiB and `vcpus` vCPUs that runs `code`.
pub(crate) fn config(code: &[u8], vcpus: u8, serial: Option<OwnedFd>) -> MachineConfig {
    MachineConfig {
        generation: GENERATION,
        memory: MemoryConfig {
            size_bytes: 16 * MIB,
            custom: Vec::new(),
            huge_pages: false,
            device_bytes: 0,
        },
        vcpus,
        kernel: file(&guests::elf(code)),
        initrd: None,
        cmdline: String::new(),
        serial,
        host: host(),
        cpuid: None,
        devices: Vec::new(),
        guards: Guards::default(),
    }
}

/// Hooks that confine nothing, and where the events come out.
pub(crate) fn hooks() -> (Hooks, Receiver<MachineEvent>) {
    hooks_with(|_| Ok(()))
}

/// Hooks with a thread set-up of the test's.
pub(crate) fn hooks_with(
    setup: impl Fn(ThreadRole) -> std::io::Result<()> + Send + Sync + 'static,
) -> (Hooks, Receiver<MachineEvent>) {
    let (sender, receiver) = channel();
    let hooks = Hooks {
        thread_setup: Arc::new(setup),
        events: Arc::new(move |event| {
            // A test that is over wants no more news.
            let _ = sender.send(event);
        }),
    };
    (hooks, receiver)
}

/// A machine, not yet started, and what belongs to it.
pub(crate) struct Rig {
    pub(crate) machine: Machine,
    pub(crate) events: Receiver<MachineEvent>,
    pub(crate) serial: UnixStream,
}

impl Rig {
    /// Makes a machine of what `adjust` makes of the usual configuration.
    pub(crate) fn make(
        kvm: &Kvm,
        code: &[u8],
        vcpus: u8,
        adjust: impl FnOnce(&mut MachineConfig),
    ) -> Result<Self, MachineError> {
        let (serial, guest_end) = UnixStream::pair().expect("a socket pair");
        serial.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
        let mut config = config(code, vcpus, Some(guest_end.into()));
        adjust(&mut config);
        let (hooks, events) = hooks();
        let machine = Machine::create(kvm, config, hooks, &Arc::default())?;
        Ok(Self {
            machine,
            events,
            serial,
        })
    }

    /// Makes a machine and starts it.
    pub(crate) fn start(kvm: &Kvm, code: &[u8], vcpus: u8) -> Self {
        let mut rig = Self::make(kvm, code, vcpus, |_| {}).expect("the machine is made");
        rig.machine.start().expect("the machine starts");
        rig
    }

    /// The next event.
    pub(crate) fn next(&self) -> Happening {
        let event = self.events.recv_timeout(PATIENCE).expect("an event");
        assert_eq!(event.generation, GENERATION);
        event.what
    }

    /// Waits for the guest's end, tears the machine down and returns how it ended with all of its serial output.
    pub(crate) fn finish(self) -> (Happening, Vec<u8>) {
        let ending = loop {
            let what = self.next();
            if what.ends() {
                break what;
            }
        };
        (ending, self.stop().1)
    }

    /// Ends the machine; all of its serial output comes with it.
    pub(crate) fn stop(mut self) -> (Stopped, Vec<u8>) {
        let stopped = self.machine.join(PATIENCE);
        assert_eq!(stopped.stuck, Vec::<String>::new());
        let mut output = Vec::new();
        self.serial.read_to_end(&mut output).expect("the serial port's output");
        (stopped, output)
    }

    /// Waits until the guest has written `byte`.
    pub(crate) fn await_byte(&mut self, byte: u8) {
        let mut seen = [0];
        self.serial.read_exact(&mut seen).expect("a byte of serial output");
        assert_eq!(seen[0], byte);
    }
}
