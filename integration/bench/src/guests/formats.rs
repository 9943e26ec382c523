//! The formats in which VMMs take a kernel. Pure.
//!
//! - ELF64 with a PVH note, entered there in 32-bit mode or at `e_entry` in 64-bit mode;
//! - bzImage (`Documentation/arch/x86/boot.rst` of Linux), entered in real mode at its second sector, or in 32-bit mode at its payload, or in 64-bit
//!   mode 0x200 behind that;
//! - flat: real-mode code that is entered at its first byte.

use super::code::Code;

/// Where guests are loaded: not below where any VMM wants to have a kernel.
pub(super) const BASE: u64 = 0x20_0000;
/// Where the code begins in an ELF file.
const CODE_AT: usize = 0x1000;

const SECTOR: usize = 512;
/// Where a bzImage's setup header starts and ends; what is between is [`header`]'s.
const HEADER_AT: usize = 0x1f1;
const HEADER_END: usize = 0x268;
/// The 64-bit entry, behind the start of the payload.
pub(super) const ENTRY_64: usize = 0x200;

/// Some loaders read a page of the file as boot_params before they look at it.
const LEAST_PAYLOAD: usize = 4096;

/// An ELF64 file of one segment.
pub(super) fn elf(code: Code) -> Vec<u8> {
    let size = code.protected.len() as u64;
    let mut file = Vec::with_capacity(CODE_AT + code.protected.len());
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, EM_X86_64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, no section headers.
    for value in [BASE, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    // No flags; sizes of this header and of a program header; two of those; no sections.
    file.extend([0; 4]);
    for value in [64u16, 56, 2, 64, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    // PT_LOAD, everything allowed: offset, virtual and physical address, sizes in file and memory, alignment.
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for value in [CODE_AT as u64, BASE, BASE, size, size, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    // PT_NOTE, behind the program headers.
    let note = [
        &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0][..],
        b"Xen\0",
        &BASE.to_le_bytes(),
    ]
    .concat();
    file.extend([4, 0, 0, 0, 4, 0, 0, 0]);
    for value in [64 + 2 * 56, 0, 0, note.len() as u64, note.len() as u64, 4] {
        file.extend(value.to_le_bytes());
    }
    file.extend(note);
    file.resize(CODE_AT, 0);
    file.extend(code.protected);
    file
}

/// A bzImage.
pub(super) fn bzimage(code: Code) -> Vec<u8> {
    let mut payload = code.protected.to_vec();
    payload.resize(ENTRY_64, 0);
    payload.extend(code.protected);
    payload.resize(payload.len().max(LEAST_PAYLOAD), 0);
    bzimage_of(code.real, payload)
}

/// A bzImage with this real-mode code and this payload.
pub(super) fn bzimage_of(real: &[u8], mut payload: Vec<u8>) -> Vec<u8> {
    payload.resize(payload.len().next_multiple_of(16), 0);
    let sectors = (HEADER_END + real.len()).div_ceil(SECTOR) - 1;
    let mut file = vec![0; HEADER_AT];
    file.extend(header(sectors, payload.len()));
    file.resize(HEADER_END, 0);
    file.extend(real);
    file.resize((sectors + 1) * SECTOR, 0);
    file.extend(payload);
    file
}

/// The setup header, up to and without its end, for so many sectors behind the first, and a payload of so many bytes.
fn header(sectors: usize, payload: usize) -> Vec<u8> {
    // Saturated: what is here is small.
    let sectors = u8::try_from(sectors).unwrap_or(u8::MAX);
    let paragraphs = u32::try_from(payload.div_ceil(16)).unwrap_or(u32::MAX);
    let bytes = u32::try_from(payload).unwrap_or(u32::MAX);
    let mut header = Vec::new();
    // Setup sectors; root flags; size of the payload; ram_size, vid_mode, root_dev; signature.
    header.extend([sectors, 0, 0]);
    header.extend(paragraphs.to_le_bytes());
    header.extend([0; 6]);
    header.extend([0x55, 0xaa]);
    // A jump over the header, whose second byte says how long the header is.
    header.extend([0xeb, (HEADER_END - 0x202) as u8]);
    header.extend(b"HdrS");
    // Protocol 2.15; realmode_swtch, start_sys_seg, kernel_version; type_of_loader; LOADED_HIGH; setup_move_size.
    header.extend([0x0f, 0x02]);
    header.extend([0; 8]);
    header.extend([0, 1, 0, 0]);
    // code32_start; ramdisk_image, ramdisk_size, bootsect_kludge; heap_end_ptr; ext_loader; cmd_line_ptr; initrd_addr_max.
    header.extend(0x10_0000u32.to_le_bytes());
    header.extend([0; 12 + 2 + 2 + 4]);
    header.extend(0x7fff_ffffu32.to_le_bytes());
    // Alignment, relocatable, its least power of two; XLF_KERNEL_64; cmdline_size.
    header.extend(0x20_0000u32.to_le_bytes());
    header.extend([1, 21, 1, 0]);
    header.extend(2047u32.to_le_bytes());
    // hardware_subarch and its data, payload_offset and payload_length (nothing compressed), setup_data.
    header.extend([0; 4 + 8 + 8 + 8]);
    // pref_address, init_size; handover_offset and kernel_info_offset are none.
    header.extend(BASE.to_le_bytes());
    header.extend(bytes.to_le_bytes());
    header
}

/// Code alone.
pub(super) fn flat(code: Code) -> Vec<u8> {
    code.real.to_vec()
}

#[cfg(test)]
mod tests {
    use linux_loader::{
        bootparam::{LOADED_HIGH, XLF_KERNEL_64},
        loader::{BzImage, Elf, KernelLoader, elf::PvhBootCapability},
    };
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::{BASE, ENTRY_64, bzimage, elf, flat};
    use crate::guests::code::{Code, first_byte, idle};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
    }

    fn codes() -> [Code; 2] {
        [first_byte(), idle()]
    }

    fn assert_there(memory: &GuestMemoryMmap, at: u64, code: &[u8]) {
        let mut loaded = vec![0; code.len()];
        memory.read_slice(&mut loaded, GuestAddress(at)).unwrap();
        assert_eq!(loaded, code);
    }

    #[test]
    fn a_loader_of_elf_files_finds_both_entries() {
        for code in codes() {
            let memory = memory();
            let mut file = std::io::Cursor::new(elf(code));
            let loaded = Elf::load(&memory, None, &mut file, Some(GuestAddress(0x10_0000))).unwrap();
            assert_eq!(loaded.kernel_load, GuestAddress(BASE));
            assert_eq!(
                loaded.pvh_boot_cap,
                PvhBootCapability::PvhEntryPresent(GuestAddress(BASE))
            );
            assert_there(&memory, BASE, code.protected);
        }
    }

    #[test]
    fn a_loader_of_bzimages_finds_both_entries() {
        for code in codes() {
            let memory = memory();
            let mut file = std::io::Cursor::new(bzimage(code));
            let loaded = BzImage::load(&memory, None, &mut file, Some(GuestAddress(0x10_0000))).unwrap();
            let header = loaded.setup_header.unwrap();
            assert_eq!({ header.version }, 0x20f);
            assert_eq!(header.loadflags & LOADED_HIGH, LOADED_HIGH);
            assert_eq!(header.xloadflags & XLF_KERNEL_64, XLF_KERNEL_64);
            assert_eq!({ header.pref_address }, BASE);
            assert_eq!({ header.init_size } as usize, { header.syssize } as usize * 16);
            let base = loaded.kernel_load.0;
            assert_there(&memory, base, code.protected);
            assert_there(&memory, base + ENTRY_64 as u64, code.protected);
        }
    }

    #[test]
    fn a_boot_sector_jumps_over_its_header() {
        for code in codes() {
            let file = bzimage(code);
            assert_eq!(file[0x1fe..0x200], [0x55, 0xaa]);
            assert_eq!(file[0x200], 0xeb);
            let target = 0x202 + usize::from(file[0x201]);
            assert_eq!(&file[target..target + code.real.len()], code.real);
            assert_eq!(flat(code), code.real);
        }
    }
}
