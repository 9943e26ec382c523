//! Carries out a decoded instruction on a copy of the vCPU's registers. Pure but for the guest's memory.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::decode::{Address, Instruction, Operand, Operation, Segment, register, register_mut};
use super::paging::{AddressSpace, Fault};
use super::xstate::{self, Invalid, Kept, XState};

const CARRY: u64 = 1;
const PARITY: u64 = 1 << 2;
const ADJUST: u64 = 1 << 4;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const OVERFLOW: u64 = 1 << 11;
const RESUME: u64 = 1 << 16;

/// The state that instructions work on.
#[derive(Clone, Debug)]
pub(super) struct Cpu {
    pub(super) regs: kvm_regs,
    /// Extended state, where [`uses_xstate`] says that it is used.
    pub(super) xstate: XState,
}

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exception {
    /// #BP: a trap, RIP is past the instruction.
    Breakpoint,
    /// #GP(0).
    GeneralProtection,
    /// #PF with the address for CR2.
    Page { address: u64, code: u32 },
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Done; RIP is past it.
    Done,
    /// With an exception. But for a trap, the registers are as they were.
    Exception(Exception),
    /// Its operand lies outside guest memory: in a device, or where there is nothing.
    Outside { physical: u64 },
}

/// Whether an instruction reads [`Cpu::xstate`], which is costly to get, and whether it changes it.
pub(super) fn uses_xstate(instruction: &Instruction) -> (bool, bool) {
    match instruction.operation {
        Operation::Int3 | Operation::Fwait | Operation::Popcnt => (false, false),
        Operation::Stmxcsr | Operation::Xsave => (true, false),
        Operation::Ldmxcsr | Operation::Xrstor => (true, true),
    }
}

/// Carries out `instruction`, which is at `cpu.regs.rip`.
pub(super) fn execute(
    instruction: &Instruction,
    cpu: &mut Cpu,
    sregs: &kvm_sregs,
    space: &AddressSpace<'_>,
    kept: &mut Kept,
) -> Outcome {
    match try_execute(instruction, cpu, sregs, space, kept) {
        Ok(exception) => {
            cpu.regs.rip = cpu.regs.rip.wrapping_add(u64::from(instruction.length));
            cpu.regs.rflags &= !RESUME;
            exception.map_or(Outcome::Done, Outcome::Exception)
        }
        Err(Stop::Exception(exception)) => Outcome::Exception(exception),
        Err(Stop::Outside { physical }) => Outcome::Outside { physical },
    }
}

/// Why an instruction was not carried out.
enum Stop {
    Exception(Exception),
    Outside { physical: u64 },
}

impl From<Invalid> for Stop {
    fn from(_: Invalid) -> Self {
        Stop::Exception(Exception::GeneralProtection)
    }
}

impl From<xstate::Error> for Stop {
    fn from(error: xstate::Error) -> Self {
        match error {
            xstate::Error::Invalid(invalid) => invalid.into(),
            xstate::Error::Memory(fault) => fault.into(),
        }
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Page { address, code } => Stop::Exception(Exception::Page { address, code }),
            Fault::NotCanonical => Stop::Exception(Exception::GeneralProtection),
            Fault::Outside { physical } => Stop::Outside { physical },
        }
    }
}

/// Everything but RIP; a trap is returned, a fault is the error.
fn try_execute(
    instruction: &Instruction,
    cpu: &mut Cpu,
    sregs: &kvm_sregs,
    space: &AddressSpace<'_>,
    kept: &mut Kept,
) -> Result<Option<Exception>, Stop> {
    let linear = |address: Address, cpu: &Cpu| {
        let next = cpu.regs.rip.wrapping_add(u64::from(instruction.length));
        address.linear(&cpu.regs, next, |segment| match segment {
            Segment::Fs => sregs.fs.base,
            Segment::Gs => sregs.gs.base,
        })
    };
    match instruction.operation {
        Operation::Int3 => return Ok(Some(Exception::Breakpoint)),
        // The emulator raises pending exceptions itself when it meets a floating-point instruction.
        Operation::Fwait => {}
        Operation::Popcnt => {
            let size = usize::from(instruction.size).min(8);
            let mut bytes = [0; 8];
            match instruction.operand {
                Operand::Memory(address) => space.read(linear(address, cpu), &mut bytes[..size])?,
                Operand::Register(number) => {
                    bytes[..size].copy_from_slice(&register(&cpu.regs, number).to_le_bytes()[..size]);
                }
                Operand::None => {}
            }
            let count = u64::from(u64::from_le_bytes(bytes).count_ones());
            let target = register_mut(&mut cpu.regs, instruction.register);
            // Writing 16 bits keeps the others, writing 32 clears the upper half.
            *target = if size == 2 { *target & !0xffff | count } else { count };
            cpu.regs.rflags &= !(CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW);
            if count == 0 {
                cpu.regs.rflags |= ZERO;
            }
        }
        Operation::Ldmxcsr => {
            if let Operand::Memory(address) = instruction.operand {
                let mut bytes = [0; 4];
                space.read(linear(address, cpu), &mut bytes)?;
                cpu.xstate.set_mxcsr(u32::from_le_bytes(bytes))?;
            }
        }
        Operation::Stmxcsr => {
            if let Operand::Memory(address) = instruction.operand {
                space.write(linear(address, cpu), &cpu.xstate.mxcsr().to_le_bytes())?;
            }
        }
        Operation::Xsave | Operation::Xrstor => {
            if let Operand::Memory(address) = instruction.operand {
                let at = linear(address, cpu);
                let wanted = cpu.regs.rdx << 32 | u64::from(cpu.regs.rax as u32);
                if instruction.operation == Operation::Xsave {
                    xstate::save(&cpu.xstate, wanted, at, space, kept)?;
                } else {
                    cpu.xstate = xstate::restore(&cpu.xstate, wanted, at, space, kept)?;
                }
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
