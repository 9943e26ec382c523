//! What a running machine tells its owner.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use sepal_devices::dispatch::DeviceEvent;

/// Something that happened to a machine, with the generation it was created with, so that news of an older machine can be dropped.
#[derive(Debug)]
pub struct MachineEvent {
    /// [`MachineConfig::generation`](super::MachineConfig::generation) of the machine that it is about.
    pub generation: u64,
    /// What happened.
    pub what: Happening,
}

/// What happened. The first of the events that [end a machine](Happening::ends) is the only one of them that is reported.
#[derive(Debug)]
pub enum Happening {
    /// The guest turned itself off.
    Shutdown,
    /// The guest asked for a reset; nothing resets it: the owner makes a new machine if it wants one.
    Reset {
        /// By which way.
        how: ResetCause,
    },
    /// The guest did not feed its watchdog, whose action is to stop it.
    WatchdogStop,
    /// A vCPU can't go on.
    VcpuFailed {
        /// Its index.
        vcpu: u8,
        /// What KVM said.
        reason: String,
        /// Where it was.
        registers: Box<RegisterDump>,
    },
    /// A device's loop ended with an error; the guest and its other devices go on.
    DeviceFailed {
        /// Its name.
        device: String,
        /// Why.
        reason: String,
    },
    /// Other news of a device, which goes on, or will after its driver's reset.
    Device(DeviceEvent),
    /// Every vCPU has left the guest, after [`Machine::pause`](super::Machine::pause). A resume may have come since:
    /// [`Machine::is_paused`](super::Machine::is_paused) tells.
    Paused,
}

impl Happening {
    /// Whether the guest is over: nothing but [`Machine::join`](super::Machine::join) makes sense then.
    pub fn ends(&self) -> bool {
        matches!(
            self,
            Self::Shutdown | Self::Reset { .. } | Self::WatchdogStop | Self::VcpuFailed { .. }
        )
    }
}

/// The ways in which a guest can ask for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResetCause {
    /// The reset register that the FADT names.
    Acpi,
    /// The keyboard controller's reset line.
    I8042,
    /// A fault while the processor delivered a double fault.
    TripleFault,
    /// A system event of the hypervisor interface.
    Hypervisor,
    /// The guest did not feed its watchdog.
    Watchdog,
}

/// A vCPU's registers at one moment.
#[derive(Debug, Clone, Default)]
pub struct RegisterDump {
    /// General registers, RIP and RFLAGS.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables, EFER, APIC base.
    pub sregs: kvm_sregs,
    /// Up to 15 bytes (the longest instruction) at RIP; empty where the guest's page tables or memory don't reach them.
    pub code: Vec<u8>,
    /// It waits in `hlt` for an interrupt.
    pub halted: bool,
}

/// CR0.PE.
const PROTECTED: u64 = 1;
/// RFLAGS.VM.
const VIRTUAL_8086: u64 = 1 << 17;

impl RegisterDump {
    /// The current privilege level, 0 to 3: that of the stack segment, but for the modes that have none.
    pub fn privilege(&self) -> u8 {
        if self.sregs.cr0 & PROTECTED == 0 {
            0
        } else if self.regs.rflags & VIRTUAL_8086 != 0 {
            3
        } else {
            self.sregs.ss.dpl & 3
        }
    }
}

impl fmt::Display for RegisterDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.regs;
        let s = &self.sregs;
        writeln!(
            f,
            "rip={:016x} rflags={:08x} rsp={:016x} rbp={:016x}",
            r.rip, r.rflags, r.rsp, r.rbp
        )?;
        writeln!(
            f,
            "rax={:016x} rbx={:016x} rcx={:016x} rdx={:016x}",
            r.rax, r.rbx, r.rcx, r.rdx
        )?;
        writeln!(
            f,
            "rsi={:016x} rdi={:016x} r8 ={:016x} r9 ={:016x}",
            r.rsi, r.rdi, r.r8, r.r9
        )?;
        writeln!(
            f,
            "r10={:016x} r11={:016x} r12={:016x} r13={:016x}",
            r.r10, r.r11, r.r12, r.r13
        )?;
        writeln!(f, "r14={:016x} r15={:016x}", r.r14, r.r15)?;
        writeln!(
            f,
            "cr0={:08x} cr2={:016x} cr3={:016x} cr4={:08x} efer={:x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        )?;
        let segment = |f: &mut fmt::Formatter<'_>, name, seg: &kvm_segment| {
            writeln!(
                f,
                "{name}={:04x} base={:016x} limit={:08x} type={:x} dpl={} l={} db={}",
                seg.selector, seg.base, seg.limit, seg.type_, seg.dpl, seg.l, seg.db
            )
        };
        for (name, seg) in [
            ("cs", &s.cs),
            ("ss", &s.ss),
            ("ds", &s.ds),
            ("fs", &s.fs),
            ("gs", &s.gs),
            ("tr", &s.tr),
        ] {
            segment(f, name, seg)?;
        }
        writeln!(
            f,
            "gdt={:016x}/{:x} idt={:016x}/{:x}",
            s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
        )?;
        f.write_str("code:")?;
        for byte in &self.code {
            write!(f, " {byte:02x}")?;
        }
        Ok(())
    }
}
