//! Guest memory and what lies in it at the start: the image, ACPI tables, and the two boot protocols' structures; and the
//! registers that each protocol promises.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::{Options, guest};

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
const ACPI: u64 = 0xe_0000;
const LOW_END: u64 = 0x9_fc00;
const HIGH: u64 = 0x10_0000;
const HOLE: u64 = 0xc000_0000;
const GIB_4: u64 = 1 << 32;

/// How the guest is entered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Pvh,
    Linux64,
}

/// Memory of `mib` MiB, round the hole below 4 GiB.
pub(super) fn memory(mib: u64) -> GuestMemoryMmap {
    let bytes = mib << 20;
    let mut ranges = vec![(guest(0), bytes.min(HOLE) as usize)];
    if bytes > HOLE {
        ranges.push((guest(GIB_4), (bytes - HOLE) as usize));
    }
    GuestMemoryMmap::from_ranges(&ranges).expect("guest memory")
}

fn read<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    image[at..at + N].try_into().expect("a slice of N bytes")
}

fn program_headers(image: &[u8]) -> impl Iterator<Item = &[u8]> {
    assert_eq!(image[..6], *b"\x7fELF\x02\x01", "ELF64, little-endian");
    let start = u64::from_le_bytes(read(image, 32)) as usize;
    let count = u16::from_le_bytes(read(image, 56));
    (0..usize::from(count)).map(move |index| &image[start + 56 * index..start + 56 * (index + 1)])
}

/// Copies the loadable segments to their physical addresses.
pub(super) fn image(memory: &GuestMemoryMmap, image: &[u8]) {
    for header in program_headers(image).filter(|header| header[0] == 1) {
        let field = |at| u64::from_le_bytes(read(header, at));
        let (offset, address, size) = (field(8) as usize, field(24), field(32) as usize);
        memory
            .write_slice(&image[offset..offset + size], guest(address))
            .expect("the image fits");
    }
}

/// The address in Xen's note 18; the image holds just that note.
pub(crate) fn pvh_entry(image: &[u8]) -> u64 {
    let note = program_headers(image)
        .find(|header| header[0] == 4)
        .expect("a note segment");
    let note = &image[u64::from_le_bytes(read(note, 8)) as usize..];
    assert_eq!(note[..16], *b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0");
    u64::from_le_bytes(read(note, 16))
}

fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut table = signature.to_vec();
    table.extend(((36 + body.len()) as u32).to_le_bytes());
    table.extend([6, 0]);
    table.extend(b"SEPAL SEPALVM \x01\0\0\0SPL \x01\0\0\0");
    table.extend(body);
    table[9] = checksum(&table);
    table
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

fn acpi_tables(memory: &GuestMemoryMmap, vcpus: u8) {
    let (xsdt, madt, fadt) = (ACPI + 0x40, ACPI + 0x100, ACPI + 0x800);
    let mut rsdp = b"RSD PTR \0SEPAL \x02\0\0\0\0\x24\0\0\0".to_vec();
    rsdp.extend(xsdt.to_le_bytes());
    rsdp.extend([0; 4]);
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    let mut body = 0xfee0_0000u32.to_le_bytes().to_vec();
    body.extend([0; 4]);
    for id in 0..vcpus {
        body.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    let mut fields = vec![0u8; 276 - 36];
    fields[116 - 36..131 - 36].copy_from_slice(&[1, 8, 0, 1, 2, 6, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
    fields[244 - 36..252 - 36].copy_from_slice(&[1, 8, 0, 1, 0, 6, 0, 0]);
    fields[256 - 36..264 - 36].copy_from_slice(&[1, 8, 0, 1, 1, 6, 0, 0]);
    let pointers = [madt.to_le_bytes(), fadt.to_le_bytes()].concat();
    let tables = [
        (ACPI, rsdp),
        (xsdt, table(b"XSDT", &pointers)),
        (madt, table(b"APIC", &body)),
        (fadt, table(b"FACP", &fields)),
    ];
    for (address, bytes) in tables {
        memory.write_slice(&bytes, guest(address)).expect("ACPI tables");
    }
}

/// `(address, bytes, type)` as e820 and PVH number types: 1 is usable, 2 reserved.
fn memory_map(options: &Options) -> Vec<(u64, u64, u32)> {
    let bytes = options.memory_mib << 20;
    let mut map = vec![(0, LOW_END, 1), (ACPI, 0x2_0000, 2), (HIGH, bytes.min(HOLE) - HIGH, 1)];
    if bytes > HOLE {
        map.push((GIB_4, bytes - HOLE, 1));
    }
    map
}

/// Writes tables and the protocol's structures, and sets the boot processor's registers.
pub(super) fn boot(memory: &GuestMemoryMmap, vcpu: &VcpuFd, options: &Options) {
    if options.acpi {
        acpi_tables(memory, options.vcpus);
    }
    let mut command_line = options.command_line.clone().into_bytes();
    command_line.push(0);
    memory
        .write_slice(&command_line, guest(COMMAND_LINE))
        .expect("command line");
    match options.protocol {
        Protocol::Pvh => pvh(memory, vcpu, options),
        Protocol::Linux64 => linux64(memory, vcpu, options),
    }
}

fn pvh(memory: &GuestMemoryMmap, vcpu: &VcpuFd, options: &Options) {
    let map = memory_map(options);
    let rsdp = if options.acpi { ACPI } else { 0 };
    let mut info = Vec::new();
    for word in [0x336e_c578, 1, 0, 0] {
        info.extend(u32::to_le_bytes(word));
    }
    for word in [0, COMMAND_LINE, rsdp, MEMORY_MAP, map.len() as u64] {
        info.extend(word.to_le_bytes());
    }
    memory.write_slice(&info, guest(START_INFO)).expect("start info");
    for (index, (address, bytes, kind)) in map.into_iter().enumerate() {
        let entry = [address, bytes, u64::from(kind)].map(u64::to_le_bytes).concat();
        memory
            .write_slice(&entry, guest(MEMORY_MAP + 24 * index as u64))
            .expect("memory map");
    }
    let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
    let code = segment(0x10, 11, true, false);
    let data = segment(0x18, 3, true, false);
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = 0x11;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
    let rip = pvh_entry(sepal_default_guest::IMAGE);
    vcpu.set_regs(&kvm_regs {
        rip,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    })
    .expect("KVM_SET_REGS");
}

fn linux64(memory: &GuestMemoryMmap, vcpu: &VcpuFd, options: &Options) {
    let map = memory_map(options);
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, guest(ZERO_PAGE + at)).expect("zero page");
    put(0x70, &if options.acpi { ACPI } else { 0 }.to_le_bytes());
    put(0x1e8, &[map.len() as u8]);
    put(0x228, &(COMMAND_LINE as u32).to_le_bytes());
    for (index, (address, bytes, kind)) in map.into_iter().enumerate() {
        let entry = [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &kind.to_le_bytes()].concat();
        put(0x2d0 + 20 * index as u64, &entry);
    }
    let put = |at: u64, entry: u64| memory.write_obj(entry, guest(PAGE_TABLES + at)).expect("page tables");
    put(0, PAGE_TABLES + 0x1003);
    put(0x1000, PAGE_TABLES + 0x2003);
    (0..512).for_each(|page| put(0x2000 + 8 * page, page << 21 | 0x83));
    let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
    sregs.cs = segment(0x10, 11, false, true);
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = segment(0x18, 3, true, false);
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;
    sregs.cr0 = 0x8000_0011;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
    let rip = u64::from_le_bytes(read(sepal_default_guest::IMAGE, 24));
    let regs = kvm_regs {
        rip,
        rsi: ZERO_PAGE,
        rsp: 0x8ff0,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).expect("KVM_SET_REGS");
}

fn segment(selector: u16, type_: u8, db: bool, l: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        db: db.into(),
        l: l.into(),
        g: 1,
        ..Default::default()
    }
}
