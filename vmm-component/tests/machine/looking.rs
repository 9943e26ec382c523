//! Looking into real machines: registers of vCPUs wherever they are, and memory.

use std::sync::mpsc::channel;

use sepal_schema::error::Kind;
use sepal_vmm_component::machine::{Answer, Happening, MachineError, Question, VcpuState};

use crate::guests::{self, guest};
use crate::registers;
use crate::rig::{PATIENCE, Rig, kvm};

guest!(
    /// Says 's', then writes 2^40 bytes to a port that nobody answers, by one instruction.
    endless_string, "sepal_guest_endless", "sepal_guest_endless_end",
    [
        "mov $0x3f8, %edx", "mov $'s', %al", "out %al, (%dx)",
        "mov $0x110000, %esi", "mov $1, %ecx", "shl $40, %rcx", "mov $0x5550, %edx", "cld", "rep outsb",
        "1: hlt", "jmp 1b",
    ]
);

#[test]
fn a_vcpu_that_halts_says_so_and_goes_on_halting() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::idle(), 2);
    rig.await_byte(b'i');
    // It writes before it halts.
    while !registers(&rig, 0).halted {}
    for _ in 0..10 {
        let dump = registers(&rig, 0);
        assert!(dump.halted, "{dump}");
        assert_eq!((dump.privilege(), dump.sregs.cs.selector), (0, 0x10), "{dump}");
        assert!(
            (guests::BASE..guests::BASE + guests::idle().len() as u64).contains(&dump.regs.rip),
            "{dump}"
        );
    }
    assert!(!registers(&rig, 1).halted, "it was never started");
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    assert!(registers(&rig, 0).halted);
    rig.stop();
}

#[test]
fn a_vcpu_that_runs_is_not_halted() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::count(), 1);
    rig.await_byte(b'c');
    let before = registers(&rig, 0);
    assert!(!before.halted);
    // The guest counts on; if it never does, the test's time limit ends it.
    while registers(&rig, 0).regs.rbx == before.regs.rbx {}
    rig.stop();
}

#[test]
fn a_guest_cannot_hide_in_one_instruction() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &endless_string(), 1);
    rig.await_byte(b's');
    // It is in the middle of its instruction.
    while !(2..1 << 40).contains(&registers(&rig, 0).regs.rcx) {}
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    rig.machine.wait_paused(PATIENCE).expect("nobody is inside");
    let paused = registers(&rig, 0).regs.rcx;
    assert_eq!(registers(&rig, 0).regs.rcx, paused);
    rig.machine.resume();
    // The instruction goes on where it was, and loses nothing.
    let next = loop {
        let next = registers(&rig, 0).regs.rcx;
        if next != paused {
            break next;
        }
    };
    assert!(next < paused, "{next} comes after {paused}");
    rig.stop();
}

#[test]
fn memory_is_read_as_the_guest_has_it() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::idle(), 1);
    rig.await_byte(b'i');
    let read = |address, length| rig.machine.read_memory(address, length);
    let code = guests::idle();
    assert_eq!(read(guests::BASE, code.len() as u32).expect("memory"), code);
    assert_eq!(read(guests::BASE, 65536).expect("memory").len(), 65536);
    let end = 16 << 20;
    assert_eq!(read(end - 2, 2).expect("memory"), [0, 0]);
    assert_eq!(read(u64::MAX, 0).expect("nothing"), b"");
    let refused = |address, length, about: &str, says: &str| {
        let error = read(address, length).expect_err("not memory").to_error();
        assert_eq!((error.kind, error.about.as_str()), (Kind::BadConfig, about));
        assert!(error.message.contains(says), "{}", error.message);
    };
    refused(guests::BASE, 65537, "length", "65536");
    refused(end - 2, 3, "address", "0x1000000 ");
    refused(end, 1, "address", "0x1000000 ");
    refused(0xfee0_0000, 4, "address", "0xfee00000 ");
    refused(u64::MAX, 2, "address", "0xffffffffffffffff ");
    rig.stop();
}

/// Asks a vCPU, and waits for the answer.
fn look(rig: &Rig, vcpu: u8, question: Question) -> Result<Answer, MachineError> {
    let (sender, receiver) = channel();
    rig.machine.look(vcpu, question, move |answer| {
        sender.send(answer).expect("the test waits");
    })?;
    receiver.recv_timeout(PATIENCE).expect("an answer")
}

#[test]
fn memory_is_read_as_the_vcpu_sees_it() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::idle(), 1);
    rig.await_byte(b'i');
    let code = guests::idle();
    let read = |address, length| match look(&rig, 0, Question::Memory { address, length })? {
        Answer::Memory(bytes) => Ok(bytes),
        other => panic!("{other:?}"),
    };
    assert_eq!(read(guests::BASE, code.len() as u32).expect("memory"), code);
    assert_eq!(read(guests::BASE - 1, 65536).expect("memory")[1..=code.len()], code);
    assert_eq!(read(u64::MAX, 0).expect("nothing"), b"");
    let refused = |error: MachineError, about: &str, says: &str| {
        let error = error.to_error();
        assert_eq!((error.kind, error.about.as_str()), (Kind::BadConfig, about));
        assert!(error.message.contains(says), "{}", error.message);
    };
    refused(read(guests::BASE, 65537).expect_err("too much"), "length", "65536");
    // The guest has 16 MiB, and maps 4 GiB.
    let says = "0x1000000 leads to 0x1000000, which is not memory";
    refused(read((16 << 20) - 2, 3).expect_err("too far"), "address", says);
    refused(
        read(1 << 32, 1).expect_err("too far"),
        "address",
        "0x100000000 is not mapped",
    );
    refused(read(1 << 63, 1).expect_err("nowhere"), "address", "is no address");
    let address = guests::BASE + 5;
    match look(&rig, 0, Question::Translation { address }).expect("it is mapped") {
        Answer::Translation(found) => {
            assert_eq!(found.physical, address);
            assert!(found.executable && found.page_size >= 4096, "{found:?}");
        }
        other => panic!("{other:?}"),
    }
    match look(&rig, 0, Question::Stack { most: 64 }).expect("it has one") {
        Answer::Stack(stack) => {
            let range = guests::BASE..guests::BASE + code.len() as u64;
            assert!(range.contains(&stack.frames[0].address), "{stack:?}");
        }
        other => panic!("{other:?}"),
    }
    let error = look(&rig, 1, Question::Stack { most: 1 }).expect_err("there is one");
    assert!(
        matches!(error, MachineError::BadConfig { field: "vcpu", .. }),
        "{error}"
    );
    rig.stop();
}

#[test]
fn what_vcpus_do_is_told_without_asking_them() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::idle(), 2);
    rig.await_byte(b'i');
    let states = |rig: &Rig| {
        rig.machine
            .stats()
            .vcpus
            .iter()
            .map(|vcpu| vcpu.state)
            .collect::<Vec<_>>()
    };
    // The second one may be on its way still.
    while states(&rig) != [VcpuState::Running; 2] {}
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    assert_eq!(states(&rig), [VcpuState::Paused; 2]);
    rig.machine.resume();
    while states(&rig) != [VcpuState::Running; 2] {}
    let stopped = rig.machine.join(PATIENCE);
    assert!(stopped.stats.vcpus.iter().all(|vcpu| vcpu.state == VcpuState::Stopped));
}

#[test]
fn a_vcpu_that_is_not_there_shows_nothing() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::start(&kvm, &guests::idle(), 2);
    let error = rig.machine.registers(2, |_| {}).expect_err("there are two");
    assert!(
        matches!(error, MachineError::BadConfig { field: "vcpu", .. }),
        "{error}"
    );
    assert!(error.to_string().contains("0 to 1"), "{error}");
    rig.stop();
}
