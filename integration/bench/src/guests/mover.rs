//! What makes a bzImage of an ELF kernel that is linked for one place: code that moves it there, however the VMM enters, and wherever it has loaded it.
//!
//! ```text
//!   real mode, kvmtool:  memory map by int 0x15 -> boot_params of its own -> 64-bit mode -> move -> the kernel's 64-bit entry
//!   64-bit mode, crosvm:                                                                    move -> the kernel's 64-bit entry
//! ```

use super::{code::code, formats};

/// Where the image lies in the payload.
const IMAGE_AT: usize = 0x1000;
/// Where loaders by the real-mode protocol put a payload.
const REAL_PAYLOAD: u64 = 0x10_0000;
/// Bytes of what the code below is told at its end: where to, from where, how many times 8 bytes, the entry.
const PARAMETERS: usize = 32;

code!(
    /// Entered at the second sector, in segment 0x1000, which the first is loaded to. Writes boot_params at 0x18000, behind a stack below 0x20000, and page
    /// tables at 0x30000.
    from_real_mode, "sepal_bench_mover_real", "sepal_bench_mover_real_end", ".code16",
    [
        "10: cli", "cld", "mov %cs, %ax", "mov %ax, %ds", "mov $0x1800, %ax", "mov %ax, %es",
        // cmd_line_ptr, then the memory map to e820_table, and how many ranges it has.
        "mov 0x228, %eax", "mov %eax, %es:0x228",
        // Firmware may want the stack in the segment of its answers. It then ends below kvmtool's command line.
        "mov %es, %dx", "mov %dx, %ds", "mov %dx, %ss", "mov $0x8000, %sp",
        "xor %ebx, %ebx", "xor %esi, %esi", "mov $0x2d0, %edi",
        "11: mov $0xe820, %eax", "mov $20, %ecx", "mov $0x534d4150, %edx", "int $0x15", "jc 12f",
        "cmp $0x534d4150, %eax", "jne 12f", "add $20, %di", "inc %si", "test %ebx, %ebx", "jnz 11b",
        "12: mov %si, %ax", "mov %al, %es:0x1e8",
        // 32 MiB, one to one.
        "mov $0x3000, %ax", "mov %ax, %es", "movl $0x31003, %es:0", "movl $0x32003, %es:0x1000", "mov $0x2000, %di", "mov $0x83, %eax",
        "13: mov %eax, %es:(%di)", "add $8, %di", "add $0x200000, %eax", "cmp $0x2080, %di", "jne 13b",
        "lgdtl %cs:(0x268 + 15f - 10b)", "mov $0x20, %eax", "mov %eax, %cr4", "mov $0x30000, %eax", "mov %eax, %cr3",
        "mov $0xc0000080, %ecx", "mov $0x100, %eax", "xor %edx, %edx", "wrmsr", "mov $0x80000011, %eax", "mov %eax, %cr0",
        "ljmpl $0x10, $(0x10268 + 14f - 10b)",
        ".code64",
        "14: mov 17f(%rip), %rdi", "mov 17f + 8(%rip), %rsi", "mov 17f + 16(%rip), %rcx", "rep movsq",
        // What the image has moved away from is part of what it wants to be zero.
        "mov $0x200, %ecx", "xor %eax, %eax", "rep stosq",
        "mov $0x18000, %esi", "jmp *17f + 24(%rip)",
        "15: .word 31", ".long 0x10268 + 16f - 10b",
        "16: .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
        "17: .quad 0, 0, 0, 0",
    ]
);

code!(
    /// Entered 0x200 behind the start of the payload, with boot_params at RSI; where the image lies is told from there.
    from_64_bit_mode, "sepal_bench_mover_64", "sepal_bench_mover_64_end", ".code64",
    [
        "10: cld", "mov %rsi, %rbx", "lea 10b(%rip), %rsi", "add 17f + 8(%rip), %rsi",
        "mov 17f(%rip), %rdi", "mov 17f + 16(%rip), %rcx", "rep movsq", "mov %rbx, %rsi", "jmp *17f + 24(%rip)",
        "17: .quad 0, 0, 0, 0",
    ]
);

/// A bzImage that does what this ELF file of one segment does. `None` if it is no such file.
pub(super) fn bzimage(elf: &[u8]) -> Option<Vec<u8>> {
    let kernel = Kernel::read(elf)?;
    let eights = kernel.image.len().div_ceil(8) as u64;
    let parameters = |from: u64| [kernel.address, from, eights, kernel.entry];
    let real = with(from_real_mode(), parameters(REAL_PAYLOAD + IMAGE_AT as u64));
    let long = with(from_64_bit_mode(), parameters((IMAGE_AT - formats::ENTRY_64) as u64));
    let mut payload = vec![0; formats::ENTRY_64];
    payload.extend(long);
    payload.resize(IMAGE_AT, 0);
    payload.extend(kernel.image);
    Some(formats::bzimage_of(&real, payload))
}

/// Code with the parameters at its end.
fn with(code: &[u8], parameters: [u64; PARAMETERS / 8]) -> Vec<u8> {
    let mut code = code.to_vec();
    code.truncate(code.len() - PARAMETERS);
    code.extend(parameters.iter().flat_map(|parameter| parameter.to_le_bytes()));
    code
}

/// What an ELF64 file of one segment says.
struct Kernel<'a> {
    entry: u64,
    address: u64,
    image: &'a [u8],
}

impl<'a> Kernel<'a> {
    fn read(file: &'a [u8]) -> Option<Self> {
        const PT_LOAD: u32 = 1;
        let half = |at: usize| Some(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_le_bytes(file.get(at..at + 8)?.try_into().ok()?));
        file.starts_with(b"\x7fELF\x02\x01").then_some(())?;
        let (headers, size, count) = (usize::try_from(long(32)?).ok()?, half(54)?, half(56)?);
        let mut segments = (0..usize::from(count))
            .map(|index| headers + index * usize::from(size))
            .filter(|&at| word(at) == Some(PT_LOAD));
        let at = segments.next()?;
        if segments.next().is_some() {
            return None;
        }
        let offset = usize::try_from(long(at + 8)?).ok()?;
        let length = usize::try_from(long(at + 32)?).ok()?;
        Some(Self {
            entry: long(24)?,
            address: long(at + 24)?,
            image: file.get(offset..offset.checked_add(length)?)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};
    use linux_loader::loader::{BzImage, KernelLoader};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::{IMAGE_AT, Kernel, PARAMETERS, bzimage, from_64_bit_mode, from_real_mode};
    use crate::guests::formats::ENTRY_64;

    #[test]
    fn the_image_is_where_the_code_moves_it_from() {
        let elf = sepal_driver_guest::IMAGE;
        let kernel = Kernel::read(elf).unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let mut file = std::io::Cursor::new(bzimage(elf).unwrap());
        let loaded = BzImage::load(&memory, None, &mut file, None).unwrap();
        let mut parameters = [0; PARAMETERS];
        let entry = loaded.kernel_load.0 + ENTRY_64 as u64;
        let end = entry + from_64_bit_mode().len() as u64;
        memory
            .read_slice(&mut parameters, GuestAddress(end - PARAMETERS as u64))
            .unwrap();
        let parameters: Vec<u64> = parameters
            .chunks(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!((parameters[0], parameters[3]), (kernel.address, kernel.entry));
        let mut image = vec![0; kernel.image.len()];
        memory
            .read_slice(&mut image, GuestAddress(entry + parameters[1]))
            .unwrap();
        assert_eq!(image, kernel.image);
        assert_eq!(parameters[2], kernel.image.len().div_ceil(8) as u64);
    }

    #[test]
    fn what_it_moves_away_from_is_not_overwritten_before() {
        let kernel = Kernel::read(sepal_driver_guest::IMAGE).unwrap();
        // Forward, and to below where it was; for crosvm, which loads to 2 MiB, to well below that.
        assert!(kernel.address <= super::REAL_PAYLOAD);
        assert!(kernel.address + (kernel.image.len() as u64) < 0x20_0000);
        assert!(IMAGE_AT >= ENTRY_64 + from_64_bit_mode().len());
    }

    #[test]
    fn the_way_from_real_mode_ends_in_the_kernel() {
        let code = from_real_mode();
        let real: Vec<Mnemonic> = Decoder::new(16, code, DecoderOptions::NONE)
            .iter()
            .map(|instruction| instruction.mnemonic())
            .take_while(|&mnemonic| mnemonic != Mnemonic::Jmp)
            .collect();
        assert!(!real.contains(&Mnemonic::INVALID));
        assert_eq!(real.iter().filter(|&&mnemonic| mnemonic == Mnemonic::Int).count(), 1);
        assert_eq!(real.last(), Some(&Mnemonic::Mov));
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert_eq!(bzimage(b"MZ"), None);
        assert_eq!(bzimage(b"\x7fELF\x02\x01"), None);
    }
}
