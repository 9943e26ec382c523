//! Reads a vCPU's registers, and the instruction that it is at, for a person to look at.

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::errno;

use crate::machine::event::RegisterDump;

/// The longest x86 instruction, in bytes.
const LONGEST_INSTRUCTION: usize = 15;

/// EFER.LMA.
const LONG_MODE_ACTIVE: u64 = 1 << 10;

const PAGE: u64 = 4096;

/// The registers as they are now. Of a vCPU that is between two exits of one instruction they are those of its beginning or its middle.
pub(super) fn read(vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> Result<RegisterDump, errno::Error> {
    let regs = vcpu.get_regs()?;
    let sregs = vcpu.get_sregs()?;
    // A kick does not change it: a vCPU that was in `hlt` goes back there.
    let halted = vcpu.get_mp_state()?.mp_state == KVM_MP_STATE_HALTED;
    let long = sregs.efer & LONG_MODE_ACTIVE != 0 && sregs.cs.l != 0;
    let address = if long {
        regs.rip
    } else {
        sregs.cs.base.wrapping_add(regs.rip) & u64::from(u32::MAX)
    };
    Ok(RegisterDump {
        code: read_code(vcpu, memory, address),
        regs,
        sregs,
        halted,
    })
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
