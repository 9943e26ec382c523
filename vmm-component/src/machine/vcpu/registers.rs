//! Reads a vCPU's registers, and the instruction that it is at, for a person to look at.

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::machine::event::RegisterDump;

/// The longest x86 instruction, in bytes.
const LONGEST_INSTRUCTION: usize = 15;

/// EFER.LMA.
const LONG_MODE_ACTIVE: u64 = 1 << 10;

const PAGE: u64 = 4096;

/// What can be read; what KVM refuses stays zero.
pub(super) fn dump(vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> RegisterDump {
    let regs = vcpu.get_regs().unwrap_or_default();
    let sregs = vcpu.get_sregs().unwrap_or_default();
    let long = sregs.efer & LONG_MODE_ACTIVE != 0 && sregs.cs.l != 0;
    let address = if long {
        regs.rip
    } else {
        sregs.cs.base.wrapping_add(regs.rip) & u64::from(u32::MAX)
    };
    RegisterDump {
        code: read_code(vcpu, memory, address),
        regs,
        sregs,
    }
}

/// The bytes at a linear address, as far as the guest's page tables and memory reach.
fn read_code(vcpu: &VcpuFd, memory: &GuestMemoryMmap, mut address: u64) -> Vec<u8> {
    let mut code = Vec::with_capacity(LONGEST_INSTRUCTION);
    // An instruction spans two pages at most.
    for _ in 0..2 {
        let room = usize::try_from(PAGE - address % PAGE).unwrap_or(LONGEST_INSTRUCTION);
        let mut part = [0; LONGEST_INSTRUCTION];
        let part = &mut part[..room.min(LONGEST_INSTRUCTION - code.len())];
        let physical = match vcpu.translate_gva(address) {
            Ok(translation) if translation.valid != 0 => translation.physical_address,
            _ => break,
        };
        if memory.read_slice(part, GuestAddress(physical)).is_err() {
            break;
        }
        code.extend_from_slice(part);
        if code.len() == LONGEST_INSTRUCTION {
            break;
        }
        address = address.wrapping_add(room as u64);
    }
    code
}
