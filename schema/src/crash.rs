//! What is known about a run of a guest that failed, as Rust values.
//!
//! What a component tells of it is bounded here: whoever reads one, and whoever writes one, has no more of it than `guest.capnp` allows.

use crate::{
    config::MAX_CPUS,
    debug_capnp, guest_capnp,
    lifecycle_capnp::{guest_lifecycle::run_result, vcpu_registers},
    report::StopReport,
};

/// Most crashes that are told of a guest.
pub const MAX_CRASHES: usize = 4;
/// Most lines that are kept of a component's log.
pub const MAX_LAST_LINES: usize = 20;
/// Longest of these lines, in bytes.
pub const MAX_LAST_LINE: usize = 256;
/// How much is kept of the end of what the guest had printed, in bytes.
pub const MAX_LAST_OUTPUT: usize = 2048;

/// What is known about a run that failed; see `guest.capnp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrashReport {
    /// How it ended.
    pub report: StopReport,
    /// Which creation under its name.
    pub generation: u64,
    /// The last lines of the component's log, oldest first: at most [`MAX_LAST_LINES`].
    pub last_lines: Vec<String>,
    /// Of the vCPUs in order; all zero where one could not tell.
    pub registers: Vec<Registers>,
    /// The end of what the guest had printed on its serial port.
    pub output: String,
}

impl CrashReport {
    /// Writes the report into a message; what is too long of it is left out.
    pub fn write(&self, mut to: guest_capnp::crash_report::Builder<'_>) {
        self.report.write(to.reborrow().init_report());
        to.set_generation(self.generation);
        let lines = last(&self.last_lines, MAX_LAST_LINES);
        let mut list = to.reborrow().init_last_lines(length(lines.len()));
        for (i, line) in lines.iter().enumerate() {
            list.set(length(i), &line[..line.floor_char_boundary(MAX_LAST_LINE)]);
        }
        let registers = &self.registers[..self.registers.len().min(MAX_CPUS.into())];
        let mut list = to.reborrow().init_registers(length(registers.len()));
        for (i, registers) in registers.iter().enumerate() {
            registers.write(list.reborrow().get(length(i)));
        }
        to.set_output(tail(&self.output));
    }

    /// Reads a report out of a message, as much of it as there may be.
    ///
    /// # Errors
    /// The message is not well-formed.
    pub fn read(from: guest_capnp::crash_report::Reader<'_>) -> Result<Self, capnp::Error> {
        let lines = from.get_last_lines()?;
        let line = |line: Result<capnp::text::Reader<'_>, capnp::Error>| {
            let line = line?.to_str()?;
            Ok(line[..line.floor_char_boundary(MAX_LAST_LINE)].to_owned())
        };
        let registers = from.get_registers()?.iter().take(MAX_CPUS.into());
        Ok(Self {
            report: StopReport::read(from.get_report()?)?,
            generation: from.get_generation(),
            last_lines: lines
                .iter()
                .take(MAX_LAST_LINES)
                .map(line)
                .collect::<Result<_, capnp::Error>>()?,
            registers: registers.map(Registers::read).collect(),
            output: tail(from.get_output()?.to_str()?).to_owned(),
        })
    }
}

/// The end of a text, of at most [`MAX_LAST_OUTPUT`] bytes.
fn tail(text: &str) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(MAX_LAST_OUTPUT))..]
}

fn last<T>(list: &[T], most: usize) -> &[T] {
    &list[list.len().saturating_sub(most)..]
}

/// Lists here are bounded far below 2^32 entries.
fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

/// What a component tells of its vCPUs beside the end of a run, by their numbers; all zero for those that it tells nothing of. At most as many as a guest can
/// have, whatever it says.
///
/// # Errors
/// The message is not well-formed.
pub fn read_vcpus(from: run_result::Reader<'_>) -> Result<Vec<Registers>, capnp::Error> {
    let mut all = Vec::new();
    for entry in from.get_registers()?.iter().take(MAX_CPUS.into()) {
        let vcpu = usize::from(entry.get_vcpu());
        if vcpu >= MAX_CPUS.into() {
            continue;
        }
        if all.len() <= vcpu {
            all.resize(vcpu + 1, Registers::default());
        }
        all[vcpu] = Registers::read(entry.get_registers()?);
    }
    Ok(all)
}

/// Writes what [`read_vcpus`] reads: some of the vCPUs, by their numbers.
pub fn write_vcpus(vcpus: &[(u8, Registers)], mut to: capnp::struct_list::Builder<'_, vcpu_registers::Owned>) {
    for (i, (vcpu, registers)) in vcpus.iter().enumerate() {
        let mut to = to.reborrow().get(length(i));
        to.set_vcpu(*vcpu);
        registers.write(to.init_registers());
    }
}

/// A structure with a field for each register, and how it is read and written.
macro_rules! registers {
    ($($field:ident: $type:ty, $get:ident, $set:ident, $doc:literal;)*) => {
        /// The registers of a vCPU; see `debug.capnp`.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Registers {
            $(#[doc = $doc] pub $field: $type,)*
        }

        impl Registers {
            /// Writes the registers into a message.
            pub fn write(&self, mut to: debug_capnp::registers::Builder<'_>) {
                $(to.$set(self.$field);)*
            }

            /// Reads the registers out of a message.
            pub fn read(from: debug_capnp::registers::Reader<'_>) -> Self {
                Self { $($field: from.$get(),)* }
            }
        }
    };
}

registers! {
    rax: u64, get_rax, set_rax, "RAX.";
    rbx: u64, get_rbx, set_rbx, "RBX.";
    rcx: u64, get_rcx, set_rcx, "RCX.";
    rdx: u64, get_rdx, set_rdx, "RDX.";
    rsi: u64, get_rsi, set_rsi, "RSI.";
    rdi: u64, get_rdi, set_rdi, "RDI.";
    rsp: u64, get_rsp, set_rsp, "The stack pointer.";
    rbp: u64, get_rbp, set_rbp, "The frame pointer, where it is used as one.";
    r8: u64, get_r8, set_r8, "R8.";
    r9: u64, get_r9, set_r9, "R9.";
    r10: u64, get_r10, set_r10, "R10.";
    r11: u64, get_r11, set_r11, "R11.";
    r12: u64, get_r12, set_r12, "R12.";
    r13: u64, get_r13, set_r13, "R13.";
    r14: u64, get_r14, set_r14, "R14.";
    r15: u64, get_r15, set_r15, "R15.";
    rip: u64, get_rip, set_rip, "The instruction that comes next.";
    rflags: u64, get_rflags, set_rflags, "Flags.";
    cr0: u64, get_cr0, set_cr0, "Control register 0.";
    cr2: u64, get_cr2, set_cr2, "The address of the last page fault.";
    cr3: u64, get_cr3, set_cr3, "Where the page tables begin.";
    cr4: u64, get_cr4, set_cr4, "Control register 4.";
    cr8: u64, get_cr8, set_cr8, "The priority below which interrupts wait.";
    efer: u64, get_efer, set_efer, "Extended features.";
    cs: u16, get_cs, set_cs, "Code segment.";
    ds: u16, get_ds, set_ds, "Data segment.";
    es: u16, get_es, set_es, "Extra segment.";
    fs: u16, get_fs, set_fs, "FS.";
    gs: u16, get_gs, set_gs, "GS.";
    ss: u16, get_ss, set_ss, "Stack segment.";
    fs_base: u64, get_fs_base, set_fs_base, "Where FS begins.";
    gs_base: u64, get_gs_base, set_gs_base, "Where GS begins.";
    cpl: u8, get_cpl, set_cpl, "Current privilege level, 0 to 3.";
    halted: bool, get_halted, set_halted, "It waits for an interrupt.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{Error, Kind},
        report::{ComponentEnd, Reason, Rung},
    };

    fn report(text: &str) -> StopReport {
        StopReport {
            reason: Reason::Crash,
            detail: text.to_owned(),
            error: Some(Error::new(Kind::VcpuRuntimeFailure, text).about(text)),
            uptime_ns: 1,
            time_ns: 2,
            about: text.to_owned(),
            rung: Rung::None,
            component: Some(ComponentEnd::Killed(9)),
        }
    }

    fn registers(of: u64) -> Registers {
        Registers {
            rip: of,
            cr2: of + 1,
            gs_base: of + 2,
            ss: 0x18,
            cpl: 3,
            halted: true,
            ..Registers::default()
        }
    }

    fn wire(crash: &CrashReport) -> CrashReport {
        let mut message = capnp::message::Builder::new_default();
        crash.write(message.init_root());
        CrashReport::read(message.get_root_as_reader().unwrap()).unwrap()
    }

    #[test]
    fn a_crash_survives_the_wire() {
        let crash = CrashReport {
            report: report("vCPU 1 failed"),
            generation: 3,
            last_lines: vec!["one".into(), "two".into()],
            registers: vec![registers(7), registers(9)],
            output: "Kernel panic\n".into(),
        };
        assert_eq!(wire(&crash), crash);
    }

    #[test]
    fn what_is_too_much_is_left_out_and_the_most_fits_into_a_message() {
        let crash = CrashReport {
            report: report(&"x".repeat(1024)),
            generation: 3,
            last_lines: (0..100).map(|i| format!("{i}{}", "é".repeat(1000))).collect(),
            registers: vec![registers(7); 300],
            output: format!("begin{}end", "é".repeat(5000)),
        };
        let read = wire(&crash);
        assert!(read.last_lines.len() == MAX_LAST_LINES && read.last_lines[0].starts_with("80é"));
        assert!(read.last_lines.iter().all(|line| line.len() <= MAX_LAST_LINE));
        assert_eq!(read.registers.len(), usize::from(MAX_CPUS));
        assert!(read.output.len() <= MAX_LAST_OUTPUT && read.output.ends_with("éend"));
        let mut message = capnp::message::Builder::new_default();
        let mut list = message
            .init_root::<guest_capnp::observer::crashes_result::Builder<'_>>()
            .init_crashes(length(MAX_CRASHES));
        for i in 0..MAX_CRASHES {
            crash.write(list.reborrow().get(length(i)));
        }
        assert!(
            message.size_in_words() * 8 < 120 << 10,
            "{}",
            message.size_in_words() * 8
        );
    }

    #[test]
    fn what_a_component_tells_of_vcpus_is_put_in_order_and_bounded() {
        let mut message = capnp::message::Builder::new_default();
        let result = message.init_root::<run_result::Builder<'_>>();
        let told = [(2, registers(2)), (0, registers(0)), (200, registers(200))];
        write_vcpus(&told, result.init_registers(3));
        let read = read_vcpus(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(read, [registers(0), Registers::default(), registers(2)]);
        let mut message = capnp::message::Builder::new_default();
        message.init_root::<run_result::Builder<'_>>();
        assert!(read_vcpus(message.get_root_as_reader().unwrap()).unwrap().is_empty());
    }
}
