//! Each instruction on registers and on memory, and its faults.

use super::*;
use crate::unassisted::decode::decode;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const LARGE: u64 = 0x80;
const RIP: u64 = 0x5000;

/// Identity-maps the first 2 MiB, with only half of it there, and the second 2 MiB read-only onto the first.
fn memory() -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    for (at, entry) in [
        (0x1000, 0x2000 | PRESENT | WRITABLE),
        (0x2000, 0x3000 | PRESENT | WRITABLE),
        (0x3000, LARGE | PRESENT | WRITABLE),
        (0x3008, LARGE | PRESENT),
    ] {
        memory.write_obj::<u64>(entry, GuestAddress(at)).unwrap();
    }
    memory
}

fn sregs() -> kvm_sregs {
    let mut sregs = kvm_sregs {
        cr0: 0x8001_0001,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0x500,
        ..Default::default()
    };
    sregs.gs.base = 0x8000;
    sregs
}

fn run(bytes: &[u8], cpu: &mut Cpu, memory: &GuestMemoryMmap) -> Outcome {
    cpu.regs.rip = RIP;
    let sregs = sregs();
    let space = AddressSpace::new(memory, &sregs).unwrap();
    execute(&decode(bytes).unwrap(), cpu, &sregs, &space, &mut Kept::default())
}

fn cpu() -> Cpu {
    Cpu {
        regs: kvm_regs {
            rflags: 0x1_0ad7,
            ..Default::default()
        },
        xstate: XState::default(),
    }
}

#[test]
fn a_breakpoint_is_a_trap() {
    let mut cpu = cpu();
    assert_eq!(
        run(&[0xcc], &mut cpu, &memory()),
        Outcome::Exception(Exception::Breakpoint)
    );
    assert_eq!(cpu.regs.rip, RIP + 1);
}

#[test]
fn waiting_changes_nothing() {
    let mut cpu = cpu();
    let before = cpu.regs;
    assert_eq!(run(&[0x9b], &mut cpu, &memory()), Outcome::Done);
    assert_eq!(cpu.regs.rip, RIP + 1);
    assert_eq!(cpu.regs.rflags, before.rflags & !RESUME);
}

#[test]
fn mxcsr_goes_to_memory_and_back() {
    let memory = memory();
    let mut cpu = cpu();
    // stmxcsr %gs:0x10(%rax)
    cpu.regs.rax = 0x100;
    assert_eq!(run(&[0x65, 0x0f, 0xae, 0x58, 0x10], &mut cpu, &memory), Outcome::Done);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x8110)).unwrap(), 0x1f80);
    memory.write_obj::<u32>(0x9fc0, GuestAddress(0x8110)).unwrap();
    // ldmxcsr, the same address
    assert_eq!(run(&[0x65, 0x0f, 0xae, 0x50, 0x10], &mut cpu, &memory), Outcome::Done);
    assert_eq!(cpu.xstate.mxcsr(), 0x9fc0);
    assert_eq!(cpu.regs.rip, RIP + 5);
    memory.write_obj::<u32>(0x1_0000, GuestAddress(0x8110)).unwrap();
    assert_eq!(
        run(&[0x65, 0x0f, 0xae, 0x50, 0x10], &mut cpu, &memory),
        Outcome::Exception(Exception::GeneralProtection)
    );
    assert_eq!((cpu.xstate.mxcsr(), cpu.regs.rip), (0x9fc0, RIP));
}

#[test]
fn extended_state_goes_to_memory_and_back() {
    let memory = memory();
    let mut cpu = cpu();
    cpu.xstate.set_mxcsr(0x9fc0).unwrap();
    (cpu.regs.rcx, cpu.regs.rax, cpu.regs.rdx) = (0xa000, u64::from(u32::MAX), u64::from(u32::MAX));
    let saved = cpu.xstate.clone();
    // xsave64 (%rcx)
    assert_eq!(run(&[0x48, 0x0f, 0xae, 0x21], &mut cpu, &memory), Outcome::Done);
    assert_eq!(cpu.regs.rip, RIP + 4);
    cpu.xstate = XState::default();
    // xrstor64 (%rcx)
    assert_eq!(run(&[0x48, 0x0f, 0xae, 0x29], &mut cpu, &memory), Outcome::Done);
    assert_eq!(cpu.xstate, saved);
    cpu.regs.rcx += 8;
    for modrm in [0x21, 0x29] {
        let outcome = run(&[0x48, 0x0f, 0xae, modrm], &mut cpu, &memory);
        assert_eq!(outcome, Outcome::Exception(Exception::GeneralProtection));
    }
}

#[test]
fn faults_leave_everything_as_it_was() {
    let memory = memory();
    for (rax, outcome) in [
        (
            0x40_0000,
            Outcome::Exception(Exception::Page {
                address: 0x40_0000,
                code: 2,
            }),
        ),
        (
            0x20_0000,
            Outcome::Exception(Exception::Page {
                address: 0x20_0000,
                code: 3,
            }),
        ),
        (1 << 47, Outcome::Exception(Exception::GeneralProtection)),
        (0x1f_0000, Outcome::Outside { physical: 0x1f_0000 }),
    ] {
        let mut cpu = cpu();
        cpu.regs.rax = rax;
        // stmxcsr (%rax)
        assert_eq!(run(&[0x0f, 0xae, 0x18], &mut cpu, &memory), outcome);
        assert_eq!((cpu.regs.rip, cpu.regs.rax), (RIP, rax));
        assert_eq!(cpu.regs.rflags, 0x1_0ad7);
    }
}

proptest! {
    #[test]
    fn ones_are_counted_in_each_size(value in any::<u64>(), old in any::<u64>(), memory_operand in any::<bool>()) {
        let memory = memory();
        for (prefix, mask, keep) in [
            (&[0xf3u8][..], u64::from(u32::MAX), 0),
            (&[0xf3, 0x48][..], u64::MAX, 0),
            (&[0x66, 0xf3][..], 0xffff, !0xffff),
        ] {
            let mut cpu = cpu();
            cpu.regs.rax = old;
            cpu.regs.rdi = if memory_operand { 0x9ffc } else { value };
            memory.write_obj(value, GuestAddress(0x9ffc)).unwrap();
            // popcnt (%rdi),%rax or popcnt %rdi,%rax, in the prefix's size
            let modrm = if memory_operand { 0x07 } else { 0xc7 };
            let bytes = [prefix, &[0x0f, 0xb8, modrm]].concat();
            prop_assert_eq!(run(&bytes, &mut cpu, &memory), Outcome::Done);
            let ones = u64::from((value & mask).count_ones());
            prop_assert_eq!(cpu.regs.rax, old & keep | ones);
            let flags = cpu.regs.rflags & (CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW);
            prop_assert_eq!(flags, if ones == 0 { ZERO } else { 0 });
            prop_assert_eq!(cpu.regs.rflags & 0x202, 0x202);
            prop_assert_eq!(cpu.regs.rip, RIP + bytes.len() as u64);
        }
    }
}
