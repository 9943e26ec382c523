//! The entry state, as a vCPU takes it: a guest that tells over a port what it found.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

use super::images::{KERNEL, Segment, elf, pvh_note};
use super::*;

/// How a guest left KVM_RUN.
#[derive(Debug, PartialEq)]
enum Exit {
    PortWrite(u16, Vec<u8>),
    MemoryWrite(u64),
}

/// Runs `code` at [`KERNEL`] until it writes to a port, or where there is no memory.
fn run(code: &[u8], protocol: Protocol) -> Option<Exit> {
    let Ok(kvm) = Kvm::new() else {
        println!("skipped: no /dev/kvm");
        return None;
    };
    let guest = Guest::new(32);
    let note = Segment::note(0x800, &pvh_note(KERNEL));
    let image = elf(KERNEL, &[note, Segment::load(0x1000, KERNEL, code, 4096)]);
    let entry = guest.load_with(&image, None, "console=ttyS0", Some(protocol)).unwrap();

    let vm = kvm.create_vm().unwrap();
    for (slot, memory) in guest.ram.slots().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: memory.guest_phys,
            memory_size: memory.size,
            userspace_addr: memory.host_addr,
            ..Default::default()
        };
        // SAFETY: the slot is a mapping that outlives the VM, which is gone when this function returns.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let (mut sregs, mut regs) = (vcpu.get_sregs().unwrap(), vcpu.get_regs().unwrap());
    apply(&entry, &mut sregs, &mut regs);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(port, bytes) => Some(Exit::PortWrite(port, bytes.to_vec())),
        VcpuExit::MmioWrite(address, _) => Some(Exit::MemoryWrite(address)),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn a_64_bit_kernel_reads_its_zero_page() {
    // mov eax, [rsi + 0x228]; mov eax, [rax]; out 0x10, eax
    let code = [0x8b, 0x86, 0x28, 0x02, 0, 0, 0x67, 0x8b, 0x00, 0xe7, 0x10];
    if let Some(exit) = run(&code, Protocol::Linux64) {
        assert_eq!(exit, Exit::PortWrite(0x10, b"cons".to_vec()));
    }
}

#[test]
fn a_64_bit_kernel_reaches_the_local_apic() {
    // mov eax, 0xfee00030; mov [rax], eax: a write to the local APIC's page, through the identity map
    let code = [0xb8, 0x30, 0x00, 0xe0, 0xfe, 0x89, 0x00];
    if let Some(exit) = run(&code, Protocol::Linux64) {
        assert_eq!(exit, Exit::MemoryWrite(0xfee0_0030));
    }
}

#[test]
fn a_pvh_kernel_reads_its_start_info() {
    // mov eax, [ebx]; out 0x10, eax
    if let Some(exit) = run(&[0x8b, 0x03, 0xe7, 0x10], Protocol::Pvh) {
        assert_eq!(exit, Exit::PortWrite(0x10, 0x336e_c578_u32.to_le_bytes().to_vec()));
    }
}
