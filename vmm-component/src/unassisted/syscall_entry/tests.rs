//! The trampoline in page tables of all sorts, and who may pass through it.

use super::*;
use crate::unassisted::paging::{Access, Fault};
use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

const ROOT: u64 = 0x1000;
const MEMORY: usize = 1 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn sregs(root: u64) -> kvm_sregs {
    let mut sregs = kvm_sregs {
        cr0: 0x8005_0033,
        cr3: root,
        cr4: 0x20,
        efer: 0xd01,
        ..Default::default()
    };
    sregs.cs.l = 1;
    sregs.cs.dpl = 3;
    sregs.cs.selector = 0x33;
    sregs.ss.dpl = 3;
    sregs.ss.selector = 0x2b;
    sregs
}

fn entry(memory: &GuestMemoryMmap, root: u64, slot: u64) -> u64 {
    memory.read_obj(GuestAddress(root + slot * 8)).unwrap()
}

fn set_entry(memory: &GuestMemoryMmap, root: u64, slot: u64, entry: u64) {
    memory.write_obj(entry, GuestAddress(root + slot * 8)).unwrap();
}

#[test]
fn the_trampoline_is_code_that_writes_to_the_doorbell() {
    let memory = memory();
    let sregs = sregs(ROOT);
    let space = AddressSpace::new(&memory, &sregs).unwrap();
    let at = install(&space).unwrap();
    assert_eq!(at, 0xffff_fd80_0000_0000);
    let mut code = [0; 9];
    assert_eq!(space.fetch(at, &mut code), Ok(9));
    let instruction = iced_x86::Decoder::with_ip(64, &code, at, 0).decode();
    assert_eq!(instruction.code(), iced_x86::Code::Mov_rm8_imm8);
    assert_eq!(instruction.len(), MOVB.len());
    let target = instruction.memory_displacement64();
    assert_eq!(space.translate(target, Access::Write), Ok(layout::SYSCALL_DOORBELL));
    let execute = space.translate(target, Access::Execute);
    assert!(matches!(execute, Err(Fault::Page { .. })), "the doorbell is not code");
    let write = space.translate(at, Access::Write);
    assert!(
        matches!(write, Err(Fault::Page { .. })),
        "the code can't be changed by who may execute it"
    );
}

#[test]
fn installing_again_changes_nothing() {
    let memory = memory();
    let sregs = sregs(ROOT);
    let space = AddressSpace::new(&memory, &sregs).unwrap();
    let at = install(&space).unwrap();
    let before: Vec<u64> = (0..512).map(|slot| entry(&memory, ROOT, slot)).collect();
    assert_eq!(before.iter().filter(|entry| **entry != 0).count(), 1);
    // The processor sets bits of its own.
    assert_eq!(install(&space), Ok(at));
    set_entry(&memory, ROOT, 507, before[507] | DIRTY);
    assert_eq!(install(&space), Ok(at));
    let after = (0..512).map(|slot| entry(&memory, ROOT, slot) & !DIRTY);
    assert!(after.eq(before));
}

#[test]
fn a_second_table_gets_its_own_entry() {
    let memory = memory();
    for root in [ROOT, 0x5000] {
        let sregs = sregs(root | 0x18);
        let space = AddressSpace::new(&memory, &sregs).unwrap();
        let at = install(&space).unwrap();
        assert_eq!(space.translate(at, Access::Execute), Ok(CODE));
    }
}

#[test]
fn occupied_slots_are_left_alone() {
    let memory = memory();
    let sregs = sregs(ROOT);
    let space = AddressSpace::new(&memory, &sregs).unwrap();
    set_entry(&memory, ROOT, 507, 0x9000 | PRESENT);
    assert_eq!(install(&space), Ok(0xffff_fd00_0000_0000));
    assert_eq!(entry(&memory, ROOT, 507), 0x9000 | PRESENT);
    for slot in SLOTS {
        set_entry(&memory, ROOT, slot, 0x9000 | PRESENT);
    }
    assert_eq!(install(&space), Err(InstallError::Occupied { root: ROOT }));
}

#[test]
fn a_table_outside_memory_is_an_error() {
    let memory = memory();
    let sregs = sregs(MEMORY as u64);
    let space = AddressSpace::new(&memory, &sregs).unwrap();
    let physical = MEMORY as u64 + 507 * 8;
    assert_eq!(install(&space), Err(InstallError::Outside { physical }));
    let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x9_0000)]).unwrap();
    let space = AddressSpace::new(&small, &sregs).unwrap();
    assert_eq!(install(&space), Err(InstallError::Outside { physical: PDPT }));
}

fn msrs() -> SyscallMsrs {
    SyscallMsrs {
        star: 0x0023_0010 << 32,
        lstar: 0xffff_ffff_8140_0040,
        fmask: 0x4_7fd5,
        trampoline: Some(0xffff_fd80_0000_0000),
    }
}

fn regs() -> kvm_regs {
    kvm_regs {
        rax: 39,
        rcx: 0x40_1234,
        rsp: 0x7fff_ffff_e000,
        r11: 0x246,
        rip: 0xffff_fd80_0000_0007,
        rflags: 0x1_0202,
        ..Default::default()
    }
}

#[test]
fn a_system_call_enters_the_kernel() {
    let (mut regs, mut sregs) = (regs(), sregs(ROOT));
    let before = regs;
    assert!(enter_kernel(&msrs(), &mut regs, &mut sregs));
    let expected = kvm_regs {
        rip: 0xffff_ffff_8140_0040,
        rflags: 2,
        ..before
    };
    assert_eq!(
        regs, expected,
        "the stack is still the user's, RCX and R11 are untouched"
    );
    assert_eq!((sregs.cs.selector, sregs.cs.dpl, sregs.cs.l), (0x10, 0, 1));
    assert_eq!((sregs.ss.selector, sregs.ss.dpl), (0x18, 0));
}

type Change = fn(&mut kvm_regs, &mut kvm_sregs, &mut SyscallMsrs);

#[test]
fn what_no_syscall_leaves_behind_is_refused() {
    let cases: [(&str, Change); 11] = [
        ("a write from elsewhere", |r, _, _| r.rip += 1),
        ("the kernel's own write", |_, s, _| s.ss.dpl = 0),
        ("32-bit code", |_, s, _| s.cs.l = 0),
        ("SYSCALL is off", |_, s, _| s.efer &= !1),
        ("no return address", |r, _, _| r.rcx = 1 << 47),
        ("interrupts off", |r, _, _| r.r11 &= !0x200),
        ("an impossible flag", |r, _, _| r.r11 &= !2),
        ("port privilege", |r, _, _| r.r11 |= 3 << 12),
        ("virtual 8086 mode", |r, _, _| r.r11 |= 1 << 17),
        ("virtual interrupts", |r, _, _| r.r11 |= 1 << 20),
        ("no trampoline", |_, _, m| m.trampoline = None),
    ];
    for (what, change) in cases {
        let (mut regs, mut sregs, mut msrs) = (regs(), sregs(ROOT), msrs());
        change(&mut regs, &mut sregs, &mut msrs);
        let before = (regs, sregs);
        assert!(!enter_kernel(&msrs, &mut regs, &mut sregs), "{what}");
        assert_eq!((regs, sregs), before, "{what}");
    }
}

proptest! {
    #[test]
    fn whoever_enters_has_no_more_than_syscall_gives(
        rcx in any::<u64>(), r11 in any::<u64>(), rflags in any::<u64>(), rip in any::<bool>(), dpl in 0u8..4, fmask in any::<u32>()
    ) {
        let (mut regs, mut sregs, mut msrs) = (regs(), sregs(ROOT), msrs());
        (regs.rcx, regs.r11, regs.rflags) = (rcx, r11, rflags);
        regs.rip += u64::from(!rip);
        sregs.ss.dpl = dpl;
        msrs.fmask = u64::from(fmask);
        if enter_kernel(&msrs, &mut regs, &mut sregs) {
            prop_assert!(rip && dpl == 3);
            prop_assert!(is_canonical(regs.rcx));
            prop_assert_eq!(regs.r11 & FLAG_IO_PRIVILEGE, 0);
            prop_assert_ne!(regs.r11 & FLAG_INTERRUPT, 0);
            prop_assert_eq!(regs.rflags & msrs.fmask & !FLAG_FIXED, 0);
            prop_assert_eq!(regs.rip, msrs.lstar);
        }
    }
}
