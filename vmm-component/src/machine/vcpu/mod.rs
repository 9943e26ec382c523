//! One vCPU: its set-up, its thread, its exits. Its states are drawn in [`phase`], how it hears of orders is argued in [`mailbox`].
//!
//! The thread makes the vCPU itself, narrows itself, and waits for its machine, which may be made later. Then it sets the vCPU up, reports over a channel that
//! it is ready or why it is not, and parks; the first one waits before that for the kernel to be loaded. While it runs, the only things it waits for are
//! KVM_RUN and, parked, its event manager: device models answer from memory. An idle guest's vCPU sleeps in KVM_RUN, and nothing of ours wakes it.
//!
//! System calls of the thread once it is confined, beside those of the allocator and locks (`futex`, `mmap`, `munmap`, `madvise`, `mprotect`, `brk`):
//! `ioctl` with KVM_GET_TSC_KHZ, KVM_SET_CPUID2, KVM_SET_MSRS, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_SREGS and KVM_SET_REGS, and `epoll_create1`, for the
//! set-up; then with KVM_RUN, KVM_NMI, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_MP_STATE and KVM_TRANSLATE; for interrupts KVM_SIGNAL_MSI,
//! KVM_SET_GSI_ROUTING and KVM_IRQFD, for doorbells KVM_IOEVENTFD, for both `eventfd2`; on hosts without hardware virtualization KVM_SET_REGS, KVM_SET_SREGS, KVM_GET_FPU, KVM_SET_FPU, KVM_GET_VCPU_EVENTS,
//! KVM_SET_VCPU_EVENTS and KVM_SET_MSRS; `epoll_wait`, `read` and `write` on eventfds, `rt_sigreturn`; at its end `close`, `epoll_ctl`, `sigaltstack`,
//! `rt_sigprocmask` and `exit`. Whoever kicks it needs `tgkill`, `getpid` and `rt_sigprocmask`.

pub(super) mod mailbox;
mod phase;
mod registers;
pub(super) mod run_page;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuFd, VmFd};

use self::mailbox::{Mailbox, Orders};
use self::phase::Phase;
use self::run_page::{Exit, PortAccess, RunMapping, RunPage};
use super::boot_state;
use super::config::{Hooks, ThreadRole, ThreadSetup};
use super::cpuid;
use super::error::MachineError;
use super::event::{Happening, ResetCause};
use super::pause::PauseLedger;
use super::report::Reporter;
use super::stats::{ExitReason, VcpuCounters, VcpuState};
use crate::boot::BootEntry;
use crate::memory::GuestRam;
use crate::unassisted::{self, Assist};

/// What may be behind memory that is not there.
const CUT_SHORT: &str = ", as where the file behind it was cut short";

/// Exits that an instruction may go on for after a kick, which KVM heeds at its end: a string instruction has one for each element, and as many
/// elements as its guest likes. Then it is left in its middle, where it goes on with the next KVM_RUN.
const LONGEST_INSTRUCTION: u32 = 256;

/// Where a vCPU's accesses go. Must not block.
pub(super) trait GuestBus: Send + Sync {
    /// The guest reads a port.
    fn read_port(&self, port: u16, data: &mut [u8]);
    /// The guest writes a port.
    fn write_port(&self, port: u16, data: &[u8]);
    /// The guest reads memory that is not RAM.
    fn read_memory(&self, address: u64, data: &mut [u8]);
    /// The guest writes memory that is not RAM.
    fn write_memory(&self, address: u64, data: &[u8]);
    /// The guest acknowledged a level-triggered interrupt.
    fn end_of_interrupt(&self, vector: u8);
}

/// What all vCPUs of a machine share.
pub(super) struct Shared {
    pub(super) vm: Arc<VmFd>,
    /// What the vCPUs' CPUID have in common.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) bus: Arc<dyn GuestBus>,
    /// On hosts that need it.
    pub(super) assist: Option<Arc<Assist>>,
    pub(super) reporter: Arc<Reporter>,
    pub(super) ledger: PauseLedger,
    pub(super) hooks: Hooks,
    /// Last, and so dropped after everything that has the guest's memory in its hands.
    pub(super) ram: Arc<GuestRam>,
}

/// What a vCPU is made from; nothing of it is its machine's alone but the VM.
pub(super) struct Birth {
    pub(super) index: u8,
    pub(super) vm: Arc<VmFd>,
    pub(super) run_size: usize,
    pub(super) thread_setup: ThreadSetup,
}

/// What sets a vCPU up for its machine.
pub(super) struct Seed {
    pub(super) index: u8,
    /// Will tell where the first instruction is, once the kernel is loaded; `None` waits for another vCPU's start-up message.
    pub(super) entry: Option<Receiver<BootEntry>>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) counters: Arc<VcpuCounters>,
    pub(super) shared: Arc<Shared>,
}

/// What a thread says of its start: how to kick it, or what failed.
pub(super) type Handshake = Result<Arc<RunMapping>, String>;

/// The body of a vCPU's thread. It ends without a word if there will be no `seed`.
pub(super) fn thread(birth: Birth, seed: &Receiver<Seed>, handshake: &Sender<(u8, Handshake)>) {
    let index = birth.index;
    let set_up = catch_unwind(AssertUnwindSafe(|| {
        let blank = Blank::make(birth);
        let Ok(mut seed) = seed.recv() else { return Ok(None) };
        let entry = seed.entry.take();
        let vcpu = blank?.set_up(seed)?;
        if let Some(entry) = entry {
            // Everything else is done while the kernel is still being loaded.
            let entry = entry
                .recv()
                .map_err(|_| "there is no kernel to begin with".to_owned())?;
            boot_state::set_entry(&vcpu.fd, &entry).map_err(|e| format!("set its registers: {e}"))?;
        }
        Ok::<_, String>(Some(vcpu))
    }))
    .unwrap_or_else(|_| Err("its set-up panicked".to_owned()));
    // A receiver that has gone has given up the start; its orders are to stop.
    match set_up {
        Err(reason) => {
            let _ = handshake.send((index, Err(reason)));
        }
        Ok(None) => {}
        Ok(Some(mut vcpu)) => {
            let _ = handshake.send((index, Ok(Arc::clone(vcpu.page.mapping()))));
            vcpu.counters.thread_begins();
            if catch_unwind(AssertUnwindSafe(|| vcpu.live())).is_err() {
                vcpu.fail("its thread panicked".to_owned());
            }
            vcpu.leave_guest();
            if vcpu.shared.reporter.has_failed()
                && let Ok(registers) = registers::read(&vcpu.fd, vcpu.shared.ram.memory())
            {
                vcpu.shared.reporter.leave(index, registers);
            }
            vcpu.counters.thread_ends();
        }
    }
}

/// A vCPU as it was made, on a thread that has only its role's system calls any more.
struct Blank {
    index: u8,
    fd: VcpuFd,
    page: RunPage,
}

impl Blank {
    fn make(birth: Birth) -> Result<Self, String> {
        let index = birth.index;
        let kvm = |step: &'static str| move |e: vmm_sys_util::errno::Error| format!("{step}: {e}");
        mailbox::unblock_kick().map_err(|e| format!("let the kick signal through: {e}"))?;
        let fd = birth.vm.create_vcpu(u64::from(index)).map_err(kvm("create it"))?;
        let page = RunPage::map(&fd, birth.run_size).map_err(kvm("map its shared page"))?;
        // What comes after this needs fewer system calls.
        (birth.thread_setup)(ThreadRole::Vcpu(index)).map_err(|e| format!("its thread could not be confined: {e}"))?;
        Ok(Self { index, fd, page })
    }

    fn set_up(self, seed: Seed) -> Result<Vcpu, String> {
        let Self { index, fd, page } = self;
        let shared = seed.shared;
        let kvm = |step: &'static str| move |e: vmm_sys_util::errno::Error| format!("{step}: {e}");
        // Fails where the host's TSC is unstable; then there is no frequency to tell.
        let table = cpuid::for_vcpu(&shared.cpuid, index, fd.get_tsc_khz().ok());
        let mut table = cpuid::to_kvm(&table).ok_or("its CPUID table is too long")?;
        if shared.assist.is_some() {
            unassisted::adjust_cpuid(&mut table);
        }
        fd.set_cpuid2(&table).map_err(kvm("set its CPUID"))?;
        boot_state::set_msrs(&fd)?;
        let mut lapic = fd.get_lapic().map_err(kvm("read its local APIC"))?;
        boot_state::connect_local_pins(&mut lapic);
        fd.set_lapic(&lapic).map_err(kvm("set its local APIC"))?;
        let mut events = EventManager::new_with_capacity(2).map_err(|e| format!("make its event manager: {e}"))?;
        let bell = events.add_subscriber(Bell {
            mailbox: seed.mailbox,
            watched: true,
            orders: None,
        });
        if !events.subscriber_mut(bell).is_ok_and(|bell| bell.watched) {
            return Err("watch its orders".to_owned());
        }
        Ok(Vcpu {
            index,
            fd,
            page,
            phase: Phase::Parked,
            ran: false,
            events,
            bell,
            counters: seed.counters,
            shared,
        })
    }
}

/// A vCPU that is ready to run, owned by its thread.
struct Vcpu {
    index: u8,
    fd: VcpuFd,
    page: RunPage,
    phase: Phase,
    /// Whether it has run since it was made or last parked; then the guest is told of the pause.
    ran: bool,
    events: EventManager<Bell>,
    bell: SubscriberId,
    counters: Arc<VcpuCounters>,
    shared: Arc<Shared>,
}

impl Vcpu {
    /// Until the owner or the guest ends it.
    fn live(&mut self) {
        loop {
            match self.phase {
                Phase::Parked => self.listen(-1),
                Phase::Running => self.run_guest(),
                Phase::Stopped => return,
            }
        }
    }

    /// Runs the guest until a kick, or its end.
    fn run_guest(&mut self) {
        self.ran = true;
        let mut since_kick = 0;
        while !self.shared.reporter.is_over() {
            match self.page.run(&self.fd) {
                Ok(exit) => {
                    if let Err(happening) = self.handle(exit) {
                        self.shared.reporter.report(happening);
                        break;
                    }
                    since_kick = if self.page.is_kicked() { since_kick + 1 } else { 0 };
                    if since_kick > LONGEST_INSTRUCTION {
                        since_kick = 0;
                        self.follow_kick();
                        if self.phase != Phase::Running {
                            return;
                        }
                    }
                }
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.follow_kick();
                        if self.phase != Phase::Running {
                            return;
                        }
                    }
                    // A vCPU that waits for its start-up message got one.
                    libc::EAGAIN => {}
                    libc::EFAULT => {
                        self.fail(format!("KVM could not reach guest memory{CUT_SHORT}"));
                        break;
                    }
                    _ => {
                        self.fail(format!("KVM_RUN: {error}"));
                        break;
                    }
                },
            }
        }
        self.enter(Phase::Stopped);
    }

    /// Steps (a) to (c) of [`mailbox`].
    fn follow_kick(&mut self) {
        self.counters.count(ExitReason::Kick);
        self.page.clear_immediate_exit();
        self.listen(0);
    }

    /// Waits up to `milliseconds` (-1: for ever) for the bell, and follows the orders if it rang.
    fn listen(&mut self, milliseconds: i32) {
        let orders = match self.events.run_with_timeout(milliseconds) {
            Ok(_) => self
                .events
                .subscriber_mut(self.bell)
                .ok()
                .and_then(|bell| bell.orders.take()),
            Err(error) => {
                self.fail(format!("its event manager: {error}"));
                return self.enter(Phase::Stopped);
            }
        };
        let Some(Orders {
            pause,
            stop,
            nmi,
            inspectors,
        }) = orders
        else {
            return;
        };
        for inspector in inspectors {
            let registers = registers::read(&self.fd, self.shared.ram.memory());
            inspector(registers.map_err(|source| MachineError::Registers {
                vcpu: self.index,
                source,
            }));
        }
        if nmi && let Err(error) = self.fd.nmi() {
            tracing::warn!(vcpu = self.index, %error, "NMI was refused");
        }
        self.enter(self.phase.next(pause, stop, self.shared.reporter.is_over()));
    }

    /// Changes the phase, and the ledger of who is in the guest.
    fn enter(&mut self, next: Phase) {
        let leaves = self.phase == Phase::Running && next != Phase::Running;
        if (self.phase, next) == (Phase::Parked, Phase::Running) {
            if !self.shared.ledger.enter(self.index) {
                // The order to pause is on its way; the one to go on rings again.
                return;
            }
            if self.ran {
                // Keeps the guest's watchdogs quiet about the time that passed. A guest without kvmclock makes it fail, and needs none.
                let _ = self.fd.kvmclock_ctrl();
            }
        }
        self.phase = next;
        self.counters.enters(match next {
            Phase::Parked => VcpuState::Paused,
            Phase::Running => VcpuState::Running,
            Phase::Stopped => VcpuState::Stopped,
        });
        if leaves {
            self.leave_guest();
        }
    }

    fn leave_guest(&self) {
        if self.shared.ledger.leave(self.index) && !self.shared.reporter.is_over() {
            self.shared.reporter.report(Happening::Paused);
        }
    }

    /// Reports that the vCPU can't go on.
    fn fail(&self, reason: String) {
        self.shared.reporter.report(self.failure(reason));
    }

    fn failure(&self, reason: String) -> Happening {
        // What KVM refuses to show stays zero.
        let registers = Box::new(registers::read(&self.fd, self.shared.ram.memory()).unwrap_or_default());
        Happening::VcpuFailed {
            vcpu: self.index,
            reason,
            registers,
        }
    }

    /// Answers one exit; an error is the guest's end.
    fn handle(&mut self, exit: Exit) -> Result<(), Happening> {
        self.counters.count(exit.reason());
        match exit {
            Exit::Io(access) => self.port_access(&access),
            Exit::Mmio { write, address, len } => self.memory_access(write, address, len),
            Exit::IoapicEoi(vector) => self.shared.bus.end_of_interrupt(vector),
            // Without an assist no MSR is filtered, and what KVM doesn't know faults.
            Exit::ReadMsr(index) => {
                let value = self
                    .shared
                    .assist
                    .as_deref()
                    .and_then(|assist| assist.rdmsr(&self.fd, index));
                self.page.answer_msr(value);
            }
            Exit::WriteMsr { index, value } => {
                let taken = self
                    .shared
                    .assist
                    .as_deref()
                    .is_some_and(|assist| assist.wrmsr(&self.fd, index, value));
                self.page.answer_msr(taken.then_some(value));
            }
            Exit::InternalError(suberror) => {
                let Some(assist) = self.shared.assist.as_deref() else {
                    return Err(self.failure(internal_error(suberror)));
                };
                if let Err(reason) = assist.internal_error(&mut self.fd) {
                    return Err(self.failure(reason));
                }
            }
            Exit::Again => {}
            Exit::TripleFault => {
                return Err(Happening::Reset {
                    how: ResetCause::TripleFault,
                });
            }
            Exit::SystemShutdown => return Err(Happening::Shutdown),
            Exit::SystemReset => {
                return Err(Happening::Reset {
                    how: ResetCause::Hypervisor,
                });
            }
            Exit::Halt => return Err(self.failure("it halted, though its local APIC is KVM's".to_owned())),
            Exit::FailEntry(reason) => {
                return Err(self.failure(format!("the processor refused to enter the guest: {reason:#x}")));
            }
            Exit::MemoryFault { address, size } => {
                return Err(self.failure(format!(
                    "KVM could not reach {size} bytes of guest memory at {address:#x}{CUT_SHORT}"
                )));
            }
            Exit::Unknown(reason) => {
                return Err(self.failure(format!("KVM left the guest for the unknown reason {reason}")));
            }
        }
        Ok(())
    }

    fn port_access(&mut self, access: &PortAccess) {
        let bus = &*self.shared.bus;
        for element in self.page.io_data(access).chunks_exact_mut(access.width) {
            if access.write {
                bus.write_port(access.port, element);
            } else {
                bus.read_port(access.port, element);
            }
        }
    }

    fn memory_access(&mut self, write: bool, address: u64, len: usize) {
        let data = self.page.mmio_data(len);
        if !write {
            return self.shared.bus.read_memory(address, data);
        }
        if let Some(assist) = self.shared.assist.as_deref()
            && assist.mmio_write(&self.fd, address, data)
        {
            return;
        }
        self.shared.bus.write_memory(address, data);
    }
}

/// KVM's suberrors in words (KVM_INTERNAL_ERROR_*).
fn internal_error(suberror: u32) -> String {
    match suberror {
        1 => "the host can't emulate the instruction".to_owned(),
        2 => "two exceptions at once".to_owned(),
        3 => "an exit while an event was being delivered".to_owned(),
        4 => "an exit for a reason that this host's KVM doesn't expect".to_owned(),
        other => format!("KVM internal error {other}"),
    }
}

/// The vCPU's side of its mailbox, in its event manager.
struct Bell {
    mailbox: Arc<Mailbox>,
    watched: bool,
    orders: Option<Orders>,
}

impl MutEventSubscriber for Bell {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.orders = Some(self.mailbox.take());
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watched = ops.add(Events::new(&*self.mailbox, EventSet::IN)).is_ok();
    }
}
