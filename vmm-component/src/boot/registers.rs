//! The first vCPU's state at the kernel's entry, and the tables in guest memory that it refers to.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootEntry, BootError, Protocol};
use crate::layout;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Segment types (Intel SDM vol. 3, 3.4.5.1 and 3.5).
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Control register and EFER bits (Intel SDM vol. 3, 2.2.1 and 2.5).
const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Bit 1 of RFLAGS always reads 1; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Page table entry: present, writable; and in a page directory: 2 MiB page.
const PTE_PRESENT_WRITE: u64 = 0b11;
const PDE_LARGE: u64 = 1 << 7;

/// Puts the entry state into a vCPU's registers, on top of what KVM_GET_SREGS and KVM_GET_REGS said. What the
/// protocol leaves open keeps its reset value.
pub fn apply(entry: &BootEntry, sregs: &mut kvm_sregs, regs: &mut kvm_regs) {
    let long = entry.protocol == Protocol::Linux64;
    sregs.gdt = kvm_dtable {
        base: layout::GDT,
        limit: 5 * 8 - 1,
        ..Default::default()
    };
    // No handler exists yet: an exception here ends in a triple fault, which stops the guest.
    sregs.idt = kvm_dtable::default();
    sregs.cs = flat_segment(CODE_SELECTOR, TYPE_CODE, long);
    let data = flat_segment(DATA_SELECTOR, TYPE_DATA, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS_BUSY,
        present: 1,
        ..Default::default()
    };
    *regs = kvm_regs {
        rip: entry.rip,
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry.protocol {
        Protocol::Pvh => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            regs.rbx = entry.boot_info;
        }
        Protocol::Linux64 => {
            sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rsi = entry.boot_info;
            regs.rsp = layout::BOOT_STACK_TOP;
        }
    }
}

/// A segment over all addresses. `long` makes it a 64-bit code segment.
fn flat_segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor that gives `segment` when its selector is loaded (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let (base, limit) = (
        segment.base,
        u64::from(segment.limit) >> if segment.g == 1 { 12 } else { 0 },
    );
    let bits = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.avl) << 12
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff) | (base & 0xff_ffff) << 16 | bits << 40 | (limit & 0xf_0000) << 32 | (base & 0xff00_0000) << 32
}

/// Writes the GDT, and for the 64-bit entry the page tables: all below 4 GiB, one to one, in 2 MiB pages.
pub(super) fn write_tables(ram: &GuestMemoryMmap, protocol: Protocol) -> Result<(), BootError> {
    let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
    apply(
        &BootEntry {
            protocol,
            rip: 0,
            boot_info: 0,
        },
        &mut sregs,
        &mut regs,
    );
    let gdt = [
        0,
        0,
        descriptor(&sregs.cs),
        descriptor(&sregs.ds),
        descriptor(&sregs.tr),
    ];
    let gdt: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    ram.write_slice(&gdt, GuestAddress(layout::GDT))?;
    if protocol == Protocol::Linux64 {
        ram.write_slice(&page_tables(), GuestAddress(layout::PAGE_TABLES))?;
    }
    Ok(())
}

/// One PML4, one PDPT and four page directories, one after the other.
fn page_tables() -> Vec<u8> {
    const ENTRIES: usize = 512;
    const GIBS: usize = (layout::HOLE_END >> 30) as usize;
    let table = |index: usize| (layout::PAGE_TABLES + (index * 4096) as u64) | PTE_PRESENT_WRITE;
    let mut entries = vec![0_u64; (2 + GIBS) * ENTRIES];
    entries[0] = table(1);
    for gib in 0..GIBS {
        entries[ENTRIES + gib] = table(2 + gib);
    }
    for (page, entry) in entries[2 * ENTRIES..].iter_mut().enumerate() {
        *entry = (page as u64) << 21 | PDE_LARGE | PTE_PRESENT_WRITE;
    }
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(protocol: Protocol) -> (kvm_sregs, kvm_regs) {
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        apply(
            &BootEntry {
                protocol,
                rip: 0x100_0000,
                boot_info: 0x7000,
            },
            &mut sregs,
            &mut regs,
        );
        (sregs, regs)
    }

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        let (long, _) = state(Protocol::Linux64);
        assert_eq!(descriptor(&long.cs), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&long.ds), 0x00cf_9300_0000_ffff);
        let (protected, _) = state(Protocol::Pvh);
        assert_eq!(descriptor(&protected.cs), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&protected.tr), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn pvh_enters_protected_mode_without_paging() {
        let (sregs, regs) = state(Protocol::Pvh);
        assert_eq!(sregs.cr0 & (CR0_PE | CR0_PG), CR0_PE);
        assert_eq!((sregs.cr4, sregs.efer, sregs.cs.l, sregs.cs.db), (0, 0, 0, 1));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x7000, 2));
    }

    #[test]
    fn linux_enters_long_mode_with_four_gib_mapped() {
        let (sregs, regs) = state(Protocol::Linux64);
        assert_eq!(sregs.cr0 & (CR0_PE | CR0_PG), CR0_PE | CR0_PG);
        assert_eq!((sregs.efer, sregs.cs.l, sregs.cs.db), (0x500, 1, 0));
        assert_eq!((regs.rsi, regs.rsp), (0x7000, layout::BOOT_STACK_TOP));

        let tables = page_tables();
        assert!(layout::PAGE_TABLES + tables.len() as u64 <= layout::CMDLINE);
        let entry = |at: u64| {
            let at = (at - layout::PAGE_TABLES) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let walk = |address: u64| {
            let pdpt = entry(layout::PAGE_TABLES + (address >> 39) * 8) & !0xfff;
            let directory = entry(pdpt + (address >> 30 & 511) * 8) & !0xfff;
            (entry(directory + (address >> 21 & 511) * 8) & !0x1f_ffff) + (address & 0x1f_ffff)
        };
        for address in [
            0,
            0x20_0000,
            0x100_0000,
            0x3fff_ffff,
            0x4000_0000,
            0xfee0_0000,
            0xffff_ffff,
        ] {
            assert_eq!(walk(address), address);
        }
    }
}
