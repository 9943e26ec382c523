//! One machine: KVM, memory, vCPUs, interrupts and devices, made and driven as one thing.
//!
//! ```text
//!   create ──▶ Made ── start ──▶ Started ── the guest ends, a vCPU fails, or kick ──▶ Over ── join ──▶ gone
//!     │ cancelled, or failed       pause, resume, power button, NMI, statistics
//!     ▼
//!   nothing is left
//! ```
//!
//! - [`Machine::create`] does what takes time (memory, kernel, the vCPUs' set-up, each on a thread of its own) and looks at its cancel flag as it goes. The vCPUs' threads
//!   are made by handshake, and park.
//! - [`Machine::start`] lets them run. Whatever kept one from being set up is start's own error.
//! - Nothing here blocks afterwards but [`Machine::wait_paused`] and [`Machine::join`], which have deadlines. News comes through
//!   [`Hooks::events`].
//! - A machine that is dropped without a join is torn down all the same.

mod boot_state;
mod config;
mod cpuid;
mod error;
mod event;
mod guards;
mod loader;
mod looking;
mod msi;
mod pause;
mod pci;
mod platform;
mod report;
mod routes;
mod stats;
#[cfg(test)]
mod tests;
mod threads;
mod vcpu;
mod vm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VmFd};

use self::loader::{Job, Loader};
use self::pause::PauseLedger;
use self::platform::{Platform, Wishes};
use self::report::Reporter;
use self::stats::VcpuCounters;
use self::threads::VcpuThreads;
use self::vcpu::mailbox::{MAX_INSPECTORS, Mailbox};
use self::vcpu::{Birth, Seed, Shared};
use crate::acpi::{self, AcpiConfig};
use crate::boot::BootEntry;
use crate::layout;
use crate::memory::{GuestRam, MemoryMap};
use crate::unassisted::{self, Assist};

pub use self::config::{DeviceSpec, EventSink, Guards, Hooks, HostKind, MachineConfig, ThreadRole, ThreadSetup};
pub use self::error::MachineError;
pub use self::event::{Happening, MachineEvent, RegisterDump, ResetCause};
pub use self::looking::{Answer, MAX_READ, Question};
pub use self::stats::{ExitReason, MachineStats, VcpuState, VcpuStats};
pub use crate::paging::Translation;
pub use crate::stack::{Frame, Stack};

/// How long a dropped machine waits for its threads.
const DROP_PATIENCE: Duration = Duration::from_secs(2);

/// A virtual machine; see the module's head.
pub struct Machine {
    vcpus: u8,
    /// What became of the vCPUs' set-up; none once the machine was started.
    set_up: Option<Result<(), MachineError>>,
    threads: VcpuThreads,
    platform: Arc<Platform>,
    shared: Arc<Shared>,
    /// Its threads have had all the time to end that its owner would give them.
    joined: bool,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus)
            .field("reporter", &self.shared.reporter)
            .finish_non_exhaustive()
    }
}

/// What became of a machine that was joined.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// Names of the threads that did not end in time. If there are any, what they use is not freed: only the end of the process does that.
    pub stuck: Vec<String>,
    /// The last counters.
    pub stats: MachineStats,
    /// Where the vCPUs were when one of them failed, in order: of those that have left and could still tell. Empty if none failed.
    pub registers: Vec<(u8, RegisterDump)>,
}

impl Machine {
    /// Makes a machine up to the first instruction of its kernel; nothing of it runs yet.
    ///
    /// Blocks while it reads the kernel; another thread that sets `cancel` makes it return [`MachineError::Cancelled`] soon.
    ///
    /// # Errors
    ///
    /// Whatever [`MachineError`] says of creation; nothing is left then.
    pub fn create(
        kvm: &Kvm,
        config: MachineConfig,
        hooks: Hooks,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Self, MachineError> {
        check_vcpus(config.vcpus, usize::MAX)?;
        go_on(cancel)?;
        Self::create_from(kvm, Spare::new(kvm)?, config, hooks, cancel)
    }

    /// [`create`](Self::create) with the part that was done ahead of time.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn create_from(
        kvm: &Kvm,
        spare: Spare,
        config: MachineConfig,
        hooks: Hooks,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Self, MachineError> {
        check_vcpus(config.vcpus, spare.max_vcpus)?;
        go_on(cancel)?;
        let supported = match config.cpuid {
            Some(supported) => supported,
            None => supported_cpuid(kvm)?,
        };
        let loader = match spare.loader {
            Some(loader) => loader,
            None => Loader::spawn(Arc::clone(&hooks.thread_setup))?,
        };
        let vm = spare.vm;
        let ram = Arc::new(GuestRam::new(config.memory, cancel)?);
        let cmdline = match config.host {
            HostKind::Hardware => config.cmdline,
            HostKind::Unassisted => unassisted_cmdline(&config.cmdline)?,
        };
        // From here on the kernel is loaded while KVM is asked for the rest. On every way out the loader is waited for, which holds the memory.
        let loading = loader.begin(Job {
            memory: ram.memory().clone(),
            map: MemoryMap::new(ram.ranges()),
            kernel: config.kernel,
            initrd: config.initrd,
            cmdline,
            rsdp: layout::ACPI,
            cancel: Arc::clone(cancel),
        });
        let reporter = Arc::new(Reporter::new(config.generation, Arc::clone(&hooks.events)));
        let window = layout::pci_window_64(ram.end(), cpuid::physical_bits(&supported));
        let guards = config.guards.clone();
        let wishes = Wishes {
            serial: config.serial,
            devices: config.devices,
            guards: config.guards,
            window_64: window.clone(),
        };
        let platform = Arc::new(Platform::new(&vm, &ram, wishes, &reporter)?);
        let assist = match config.host {
            HostKind::Hardware => None,
            HostKind::Unassisted => {
                let assist = Assist::new(&vm, ram.memory().clone());
                Some(assist.map_err(|e| MachineError::Unassisted(e.to_string()))?)
            }
        };
        let mut machine = Self {
            vcpus: config.vcpus,
            set_up: None,
            threads: spare.threads,
            joined: false,
            platform: Arc::clone(&platform),
            shared: Arc::new(Shared {
                vm,
                ram: Arc::clone(&ram),
                cpuid: cpuid::common(&supported, config.vcpus),
                bus: Arc::clone(&platform) as _,
                assist,
                reporter,
                ledger: PauseLedger::new(),
                hooks,
            }),
        };
        let begun = machine.begin_threads(spare.run_size);
        // After the vCPUs' threads were begun: KVM waits for its own readers here, and they need no memory before the kernel is there. Before those
        // of the devices: what KVM waits for is done on this processor, and would wait for them.
        vm::set_memory(&machine.shared.vm, &ram)?;
        let begun = begun.and_then(|first| {
            platform.begin(&machine.shared.reporter, &machine.shared.hooks)?;
            Ok(first)
        });
        go_on(cancel)?;
        let tables = AcpiConfig {
            vcpus: config.vcpus,
            pci_window_64: window,
            pci_functions: platform.pci_functions().to_vec(),
            panic_device: guards.panic_device,
            generation_id: guards.generation_id.is_some(),
            instance_id: guards.instance_id,
        };
        acpi::write(ram.memory(), &tables)?;
        let entry = loading.wait()?;
        go_on(cancel)?;
        machine.set_up = Some(begun.and_then(|first| {
            // A vCPU that is not there (any more) says why in its handshake.
            let _ = first.send(entry);
            machine.threads.wait_ready()
        }));
        Ok(machine)
    }

    /// Starts the vCPUs' threads, which set themselves up and park; the first one waits for what is returned to tell where the kernel begins.
    fn begin_threads(&mut self, run_size: usize) -> Result<Sender<BootEntry>, MachineError> {
        vcpu::mailbox::install_kick_handler().map_err(MachineError::host("set the kick signal's handler"))?;
        let (first, entry) = channel();
        let mut entry = Some(entry);
        for index in 0..self.vcpus {
            let failed = |reason: String| MachineError::VcpuStart { vcpu: index, reason };
            let birth = Birth {
                index,
                vm: Arc::clone(&self.shared.vm),
                run_size,
                thread_setup: Arc::clone(&self.shared.hooks.thread_setup),
            };
            let seed = Seed {
                index,
                entry: entry.take(),
                mailbox: Arc::new(Mailbox::new().map_err(|e| failed(format!("make its mailbox: {e}")))?),
                counters: Arc::new(VcpuCounters::default()),
                shared: Arc::clone(&self.shared),
            };
            self.threads.spawn(birth, seed)?;
        }
        Ok(first)
    }

    /// Starts the devices' loops, and lets the guest run unless [`pause`](Self::pause) came before.
    ///
    /// # Errors
    ///
    /// The first thread that can't start is the error; all others have been stopped then, and the machine is of no more use.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let set_up = self.set_up.take();
        let Some(set_up) = set_up.filter(|_| !self.shared.reporter.is_over()) else {
            return Err(MachineError::AlreadyStarted);
        };
        let result = set_up.and_then(|()| self.platform.start(&self.shared.reporter, &self.shared.hooks));
        if result.is_err() {
            self.shut(Instant::now() + DROP_PATIENCE);
        } else if !self.shared.ledger.wanted() {
            self.threads.order_parked(|orders| orders.pause = false);
        }
        result
    }

    /// Asks all vCPUs to leave the guest; [`Happening::Paused`] tells when the last one has. Time goes on for the guest.
    pub fn pause(&self) {
        self.platform.pause();
        let all_out = self.shared.ledger.want(true);
        self.threads.order_all(|orders| orders.pause = true);
        if all_out && !self.shared.reporter.is_over() {
            self.shared.reporter.report(Happening::Paused);
        }
    }

    /// Whether every vCPU is out of the guest and stays there until [`resume`](Self::resume): what [`Happening::Paused`] said, unless that was
    /// overtaken by a resume.
    pub fn is_paused(&self) -> bool {
        self.shared.ledger.paused()
    }

    /// Waits until no vCPU is in the guest; meant to follow [`pause`](Self::pause).
    ///
    /// # Errors
    ///
    /// [`MachineError::PauseTimeout`] names the vCPUs that are still inside after `patience`.
    pub fn wait_paused(&self, patience: Duration) -> Result<(), MachineError> {
        self.shared
            .ledger
            .wait_all_out(patience)
            .map_err(|vcpus| MachineError::PauseTimeout {
                vcpus,
                waited: patience,
            })
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) {
        self.platform.resume();
        self.shared.ledger.want(false);
        if self.started() {
            self.threads.order_parked(|orders| orders.pause = false);
        }
    }

    /// Tells the guest that its power button was pressed; what it makes of that is its own affair.
    ///
    /// # Errors
    ///
    /// [`MachineError::NotRunning`].
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        self.check_running()?;
        self.platform.press_power_button();
        Ok(())
    }

    /// Gives every vCPU a non-maskable interrupt, as the button on a server does.
    ///
    /// # Errors
    ///
    /// [`MachineError::NotRunning`].
    pub fn nmi(&self) -> Result<(), MachineError> {
        self.check_running()?;
        self.threads.order_all(|orders| orders.nmi = true);
        Ok(())
    }

    /// Calls `show` with a vCPU's registers, or with [`MachineError::Registers`], on the vCPU's thread. If the machine ends before, `show` is dropped
    /// uncalled.
    ///
    /// # Errors
    ///
    /// [`MachineError::BadConfig`] if there is no such vCPU, [`MachineError::NotRunning`], [`MachineError::Busy`].
    pub fn registers(
        &self,
        vcpu: u8,
        show: impl FnOnce(Result<RegisterDump, MachineError>) + Send + 'static,
    ) -> Result<(), MachineError> {
        self.check_running()?;
        let accepted = self.threads.order(vcpu, |orders| {
            let room = orders.inspectors.len() < MAX_INSPECTORS;
            if room {
                orders.inspectors.push(Box::new(show));
            }
            room
        });
        match accepted {
            Some(true) => Ok(()),
            Some(false) => Err(MachineError::Busy { vcpu }),
            None => Err(MachineError::BadConfig {
                field: "vcpu",
                reason: format!("the machine's vCPUs are 0 to {}", self.vcpus - 1),
            }),
        }
    }

    /// Counters, read without disturbing a vCPU.
    pub fn stats(&self) -> MachineStats {
        MachineStats {
            serial_dropped: self.platform.serial_dropped(),
            vcpus: self.threads.stats(),
        }
    }

    /// Asks all threads to end, and returns at once. From now on nothing that ends the guest is reported.
    pub fn kick(&self) {
        self.shared.reporter.end();
        self.threads.order_all(|orders| orders.stop = true);
    }

    /// Ends the machine within about `patience`: kicks its threads, joins them, brings out the serial port's last bytes and frees everything.
    pub fn join(mut self, patience: Duration) -> Stopped {
        let stuck = self.shut(Instant::now() + patience);
        self.joined = true;
        Stopped {
            stuck,
            stats: self.stats(),
            registers: self.shared.reporter.take_last(),
        }
    }

    fn started(&self) -> bool {
        self.set_up.is_none()
    }

    fn check_running(&self) -> Result<(), MachineError> {
        if !self.started() || self.shared.reporter.is_over() {
            Err(MachineError::NotRunning)
        } else {
            Ok(())
        }
    }

    /// Ends all threads by `deadline`; returns the names of those that didn't.
    fn shut(&mut self, deadline: Instant) -> Vec<String> {
        self.kick();
        let mut stuck = self.threads.join(deadline);
        // After the vCPUs: what they wrote last comes out, too.
        stuck.extend(self.platform.stop(deadline));
        stuck
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.joined {
            return;
        }
        let stuck = self.shut(Instant::now() + DROP_PATIENCE);
        if !stuck.is_empty() {
            tracing::error!(?stuck, "threads of a machine did not end");
        }
    }
}

/// The part of a machine that is the same for all: an empty VM, and perhaps its first vCPU and somebody who waits to load a kernel. Making it ahead of time takes it out of
/// the time that a creation needs.
pub struct Spare {
    vm: Arc<VmFd>,
    run_size: usize,
    max_vcpus: usize,
    threads: VcpuThreads,
    loader: Option<Loader>,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl Spare {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// [`MachineError::Kvm`] and [`MachineError::MissingCapability`].
    pub fn new(kvm: &Kvm) -> Result<Self, MachineError> {
        Ok(Self {
            vm: Arc::new(vm::create(kvm)?),
            run_size: kvm
                .get_vcpu_mmap_size()
                .map_err(MachineError::kvm("size the vCPUs' shared pages"))?,
            max_vcpus: kvm.get_max_vcpus(),
            threads: VcpuThreads::new(),
            loader: None,
        })
    }

    /// Makes one with its first vCPU, hands it to `take`, and then loads the kernel of the machine that is made from it, on the calling thread: narrowed by `setup` first of
    /// all. Returns when that is done, or the spare dropped.
    pub fn serve(kvm: &Kvm, setup: &ThreadSetup, take: impl FnOnce(Result<Self, MachineError>)) {
        let (loader, desk) = loader::loader();
        take(Self::new(kvm).and_then(|mut spare| {
            spare.threads.make_ahead(Birth {
                index: 0,
                vm: Arc::clone(&spare.vm),
                run_size: spare.run_size,
                thread_setup: Arc::clone(setup),
            })?;
            spare.loader = Some(loader);
            Ok(spare)
        }));
        desk.serve(setup);
    }
}

/// What KVM offers of the host's processor.
///
/// # Errors
///
/// [`MachineError::Kvm`].
pub fn supported_cpuid(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, MachineError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let supported = supported.map_err(MachineError::kvm("read the supported CPUID"))?;
    Ok(supported.as_slice().to_vec())
}

/// The user's command line with what a host without hardware virtualization needs before it, so that the user's words win.
///
/// # Errors
///
/// [`MachineError::BadConfig`]: both together are too long.
pub(crate) fn unassisted_cmdline(cmdline: &str) -> Result<String, MachineError> {
    let needed = unassisted::CMDLINE;
    let most = layout::CMDLINE_MAX - 1 - (needed.len() + 1);
    if cmdline.len() > most {
        return Err(MachineError::BadConfig {
            field: "cmdline",
            reason: format!(
                "{} bytes are too long: on this host, which adds words of its own, the limit is {most}",
                cmdline.len()
            ),
        });
    }
    Ok(format!("{needed} {cmdline}").trim_end().to_owned())
}

fn go_on(cancel: &AtomicBool) -> Result<(), MachineError> {
    if cancel.load(Ordering::Relaxed) {
        Err(MachineError::Cancelled)
    } else {
        Ok(())
    }
}

fn check_vcpus(wanted: u8, host: usize) -> Result<(), MachineError> {
    let most = usize::from(layout::MAX_VCPUS).min(host);
    if (1..=most).contains(&usize::from(wanted)) {
        return Ok(());
    }
    Err(MachineError::BadConfig {
        field: "cpus",
        reason: format!("{wanted} vCPUs are not possible on this host, 1 to {most} are"),
    })
}
