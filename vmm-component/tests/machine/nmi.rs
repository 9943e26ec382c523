//! Non-maskable interrupts of real machines, wherever their vCPUs are.

use sepal_vmm_component::machine::Happening;

use crate::guests::{self, guest};
use crate::rig::{Rig, kvm};

guest!(
    /// Starts all other processors, which stay in real mode, and says 'r' when all are there. Then every processor halts, and writes 'N' to the serial
    /// port on an NMI. [`guests::with_number`] tells how many others there are.
    handlers, "sepal_guest_nmi", "sepal_guest_nmi_end",
    [
        "lidt 8f(%rip)", "mov $0x9ff0, %esp",
        "lea 5f(%rip), %rsi", "mov $0x20000, %edi", "mov $(6f - 5f), %ecx", "cld", "rep movsb",
        // Vector 2 of real mode.
        "movw $(4f - 5f), 0x8", "movw $0x2000, 0xa",
        "mov $0xfee00000, %ebx",
        "movl $0x1ff, 0xf0(%rbx)",
        "movl $0xc4500, 0x300(%rbx)",
        "movl $0xc4620, 0x300(%rbx)",
        "movl $0xc4620, 0x300(%rbx)",
        "1: pause", "mov 0x20000 + (7f - 5f), %al", "cmp %al, 0x120000", "jne 1b",
        "mov $0x3f8, %edx", "mov $'r', %al", "out %al, (%dx)",
        "2: hlt", "jmp 2b",
        "3: mov $0x3f8, %edx", "mov $'N', %al", "out %al, (%dx)", "iretq",
        ".code16",
        // A stack for each, since all are interrupted at once.
        "5: mov $0x3000, %ax", "mov %ax, %ss", "mov $0x100, %ax", "lock xadd %ax, %cs:(9f - 5b)", "mov %ax, %sp",
        "lock incb %cs:(7f - 5b)",
        "2: hlt", "jmp 2b",
        "4: mov $0x3f8, %dx", "mov $'N', %al", "out %al, (%dx)", "iret",
        "7: .byte 0",
        "9: .word 0x100",
        "6:",
        ".code64",
        "8: .word 3 * 16 - 1", ".quad 0x100000 + (9f - sepal_guest_nmi)",
        ".balign 16",
        "9: .quad 0, 0, 0, 0",
        // Vector 2: interrupt gate to 3 in the boot's code segment.
        ".word 3b - sepal_guest_nmi, 0x10, 0x8e00, 0x10", ".quad 0",
    ]
);

guest!(
    /// Says 'r', then spins; on an NMI writes 'N' to the serial port and resets.
    spins, "sepal_guest_nmi_spins", "sepal_guest_nmi_spins_end",
    [
        "lidt 8f(%rip)", "mov $0x9ff0, %esp",
        "mov $0x3f8, %edx", "mov $'r', %al", "out %al, (%dx)", "1: jmp 1b",
        "7: mov $0x3f8, %edx", "mov $'N', %al", "out %al, (%dx)", "mov $0xfe, %al", "out %al, $0x64", "2: hlt", "jmp 2b",
        "8: .word 3 * 16 - 1", ".quad 0x100000 + (9f - sepal_guest_nmi_spins)",
        ".balign 16",
        "9: .quad 0, 0, 0, 0",
        ".word 7b - sepal_guest_nmi_spins, 0x10, 0x8e00, 0x10", ".quad 0",
    ]
);

fn await_each(rig: &mut Rig, vcpus: u8) {
    for _ in 0..vcpus {
        rig.await_byte(b'N');
    }
}

#[test]
fn every_vcpu_that_halts_gets_it() {
    let Some(kvm) = kvm() else { return };
    for vcpus in [1, 3] {
        let mut rig = Rig::start(&kvm, &guests::with_number(handlers(), vcpus - 1), vcpus);
        rig.await_byte(b'r');
        for _ in 0..3 {
            rig.machine.nmi().expect("the machine runs");
            await_each(&mut rig, vcpus);
        }
        let (_, rest) = rig.stop();
        assert_eq!(rest, b"", "one for each, and no more");
    }
}

#[test]
fn a_paused_guest_gets_it_when_it_goes_on() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::with_number(handlers(), 1), 2);
    rig.await_byte(b'r');
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    rig.machine.nmi().expect("the machine runs");
    rig.machine.resume();
    await_each(&mut rig, 2);
    rig.stop();
}

#[test]
fn a_guest_that_never_waits_gets_it() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &spins(), 1);
    rig.await_byte(b'r');
    rig.machine.nmi().expect("the machine runs");
    assert_eq!(rig.finish().1, b"N");
}
