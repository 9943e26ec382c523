//! Decodes the few instructions that KVM's emulator lacks and kernels use at CPL 0 in 64-bit mode.
//!
//! Pure, from at most 15 bytes to one of the rows of [`TABLE`]; everything else is `None`. Source: Intel SDM volume 2, chapter 2
//! "Instruction Format" and the pages of the instructions. The tests hold it against another decoder.

use kvm_bindings::kvm_regs;

/// Longest x86 instruction, in bytes.
pub(super) const MAX_LENGTH: usize = 15;

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Breakpoint: #BP with RIP past the instruction.
    Int3,
    /// Wait for pending floating-point exceptions.
    Fwait,
    /// Counts the operand's ones into the register.
    Popcnt,
    /// Loads MXCSR from memory.
    Ldmxcsr,
    /// Stores MXCSR to memory.
    Stmxcsr,
    /// Stores processor state to memory, in the standard form.
    Xsave,
    /// Loads processor state from memory, in the standard form.
    Xrstor,
}

/// One instruction, as far as carrying it out needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) operation: Operation,
    /// Bytes, 1 to 15.
    pub(super) length: u8,
    /// Bytes of the operands, where the operation has no size of its own: 2, 4 or 8.
    pub(super) size: u8,
    /// Number (0-15) of the register that ModRM's `reg` field and REX.R name.
    pub(super) register: u8,
    /// What ModRM's other fields name.
    pub(super) operand: Operand,
}

/// An operand in a register or in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operand {
    None,
    Register(u8),
    Memory(Address),
}

/// An address in an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    base: Base,
    /// Register and the logarithm of its factor.
    index: Option<(u8, u8)>,
    displacement: i32,
    segment: Option<Segment>,
    /// Computed in 32 bits (prefix 67).
    narrow: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    None,
    Register(u8),
    /// The address of the next instruction.
    Next,
}

/// The segments that have a base in 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Fs,
    Gs,
}

/// A row: opcode bytes with the prefix and ModRM form that they need.
struct Row {
    opcode: &'static [u8],
    /// The mandatory prefix.
    prefix: Prefix,
    modrm: Form,
    operation: Operation,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Prefix {
    /// Whatever there is has no meaning.
    Any,
    /// None of 66, F2, F3.
    None,
    /// F3; 66 gives the operand size.
    F3,
}

#[derive(Clone, Copy)]
enum Form {
    /// No ModRM byte.
    Absent,
    /// `reg` names a register, the operand may be either.
    Any,
    /// `reg` is part of the opcode, the operand is in memory.
    Memory(u8),
}

const TABLE: &[Row] = &[
    Row {
        opcode: &[0xcc],
        prefix: Prefix::Any,
        modrm: Form::Absent,
        operation: Operation::Int3,
    },
    Row {
        opcode: &[0x9b],
        prefix: Prefix::Any,
        modrm: Form::Absent,
        operation: Operation::Fwait,
    },
    Row {
        opcode: &[0x0f, 0xb8],
        prefix: Prefix::F3,
        modrm: Form::Any,
        operation: Operation::Popcnt,
    },
    Row {
        opcode: &[0x0f, 0xae],
        prefix: Prefix::None,
        modrm: Form::Memory(2),
        operation: Operation::Ldmxcsr,
    },
    Row {
        opcode: &[0x0f, 0xae],
        prefix: Prefix::None,
        modrm: Form::Memory(3),
        operation: Operation::Stmxcsr,
    },
    Row {
        opcode: &[0x0f, 0xae],
        prefix: Prefix::None,
        modrm: Form::Memory(4),
        operation: Operation::Xsave,
    },
    Row {
        opcode: &[0x0f, 0xae],
        prefix: Prefix::None,
        modrm: Form::Memory(5),
        operation: Operation::Xrstor,
    },
];

/// The prefixes before an opcode.
#[derive(Default)]
struct Prefixes {
    operand_size: bool,
    address_size: bool,
    lock: bool,
    /// The last of F2 and F3.
    repeat: Option<u8>,
    segment: Option<Segment>,
    /// The low four bits of REX.
    rex: u8,
}

const REX_B: u8 = 1;
const REX_X: u8 = 1 << 1;
const REX_R: u8 = 1 << 2;
const REX_W: u8 = 1 << 3;

/// Reads bytes one after another.
struct Bytes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn displacement8(&mut self) -> Option<i32> {
        self.next().map(|byte| i32::from(byte as i8))
    }

    fn displacement32(&mut self) -> Option<i32> {
        let bytes = self.bytes.get(self.at..)?.first_chunk()?;
        self.at += 4;
        Some(i32::from_le_bytes(*bytes))
    }
}

/// Decodes the instruction at the start of `bytes`, of which no more than [`MAX_LENGTH`] count.
pub(super) fn decode(bytes: &[u8]) -> Option<Instruction> {
    let mut bytes = Bytes {
        bytes: &bytes[..bytes.len().min(MAX_LENGTH)],
        at: 0,
    };
    let (prefixes, opcode) = prefixes(&mut bytes)?;
    let rows = rows(&mut bytes, opcode)?;
    // All rows of an opcode agree on whether there is a ModRM byte.
    let row = |form_fits: &dyn Fn(Form) -> bool| {
        TABLE
            .iter()
            .filter(|row| row.opcode == rows && prefixes.fit(row.prefix))
            .find(|row| form_fits(row.modrm))
            // None of the rows allows it.
            .filter(|_| !prefixes.lock)
    };
    let size = match (prefixes.rex & REX_W != 0, prefixes.operand_size) {
        (true, _) => 8,
        (false, true) => 2,
        (false, false) => 4,
    };
    let (row, register, operand) = match row(&|form| matches!(form, Form::Absent)) {
        Some(row) => (row, 0, Operand::None),
        None => {
            let modrm = bytes.next()?;
            let field = modrm >> 3 & 7;
            let row = row(&|form| match form {
                Form::Absent => false,
                Form::Any => true,
                Form::Memory(extension) => extension == field && modrm >> 6 != 3,
            })?;
            let register = field | if prefixes.rex & REX_R != 0 { 8 } else { 0 };
            (row, register, operand(&mut bytes, modrm, &prefixes)?)
        }
    };
    Some(Instruction {
        operation: row.operation,
        length: bytes.at as u8,
        size,
        register,
        operand,
    })
}

/// Everything up to the first opcode byte, and that byte.
fn prefixes(bytes: &mut Bytes<'_>) -> Option<(Prefixes, u8)> {
    let mut prefixes = Prefixes::default();
    loop {
        let byte = bytes.next()?;
        match byte {
            0x66 => prefixes.operand_size = true,
            0x67 => prefixes.address_size = true,
            0xf0 => prefixes.lock = true,
            0xf2 | 0xf3 => prefixes.repeat = Some(byte),
            0x64 => prefixes.segment = Some(Segment::Fs),
            0x65 => prefixes.segment = Some(Segment::Gs),
            // CS, DS, ES and SS: their bases are zero, and in 64-bit mode they don't undo FS or GS.
            0x26 | 0x2e | 0x36 | 0x3e => {}
            // Counts only right before the opcode.
            0x40..=0x4f => {
                let next = bytes.next()?;
                if !is_prefix(next) {
                    prefixes.rex = byte & 0xf;
                    return Some((prefixes, next));
                }
                bytes.at -= 1;
            }
            opcode => return Some((prefixes, opcode)),
        }
    }
}

fn is_prefix(byte: u8) -> bool {
    matches!(
        byte,
        0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
    )
}

/// The opcode's bytes, if the table has them.
fn rows(bytes: &mut Bytes<'_>, first: u8) -> Option<&'static [u8]> {
    let second = if first == 0x0f { Some(bytes.next()?) } else { None };
    TABLE.iter().map(|row| row.opcode).find(|opcode| match second {
        Some(second) => **opcode == [first, second],
        None => **opcode == [first],
    })
}

impl Prefixes {
    fn fit(&self, needed: Prefix) -> bool {
        match needed {
            Prefix::Any => true,
            Prefix::None => !self.operand_size && self.repeat.is_none(),
            Prefix::F3 => self.repeat == Some(0xf3),
        }
    }
}

/// What the ModRM byte and what follows it name.
fn operand(bytes: &mut Bytes<'_>, modrm: u8, prefixes: &Prefixes) -> Option<Operand> {
    let high = |bit: u8| if prefixes.rex & bit != 0 { 8 } else { 0 };
    let (mode, low) = (modrm >> 6, modrm & 7);
    if mode == 3 {
        return Some(Operand::Register(low | high(REX_B)));
    }
    let mut index = None;
    let base = match low {
        4 => {
            let sib = bytes.next()?;
            let number = sib >> 3 & 7 | high(REX_X);
            // 4 means "no index", but 12 is a register.
            index = (number != 4).then_some((number, sib >> 6));
            if sib & 7 == 5 && mode == 0 {
                Base::None
            } else {
                Base::Register(sib & 7 | high(REX_B))
            }
        }
        5 if mode == 0 => Base::Next,
        _ => Base::Register(low | high(REX_B)),
    };
    let displacement = match (mode, base) {
        (1, _) => bytes.displacement8()?,
        (2, _) | (0, Base::None | Base::Next) => bytes.displacement32()?,
        _ => 0,
    };
    Some(Operand::Memory(Address {
        base,
        index,
        displacement,
        segment: prefixes.segment,
        narrow: prefixes.address_size,
    }))
}

impl Address {
    /// The linear address. `next` is the address of the next instruction; `segment_base` gives the bases of FS and GS.
    pub(super) fn linear(&self, regs: &kvm_regs, next: u64, segment_base: impl Fn(Segment) -> u64) -> u64 {
        let base = match self.base {
            Base::None => 0,
            Base::Register(number) => register(regs, number),
            Base::Next => next,
        };
        let index = self.index.map_or(0, |(number, scale)| register(regs, number) << scale);
        let offset = base.wrapping_add(index).wrapping_add(self.displacement as i64 as u64);
        let offset = if self.narrow { u64::from(offset as u32) } else { offset };
        offset.wrapping_add(self.segment.map_or(0, segment_base))
    }
}

/// The general register of that number, 0-15, in the instruction set's order.
pub(super) fn register(regs: &kvm_regs, number: u8) -> u64 {
    // All are of one type, so a copy serves as the place.
    *register_mut(&mut regs.clone(), number)
}

/// See [`register`].
pub(super) fn register_mut(regs: &mut kvm_regs, number: u8) -> &mut u64 {
    match number & 15 {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

#[cfg(test)]
mod tests;
