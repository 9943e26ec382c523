//! A guest that never stops printing: numbers of eight hexadecimal digits, a line each, one after the other.

use std::arch::global_asm;

/// Where the guest is linked, and entered: in 64-bit mode, with a stack.
const BASE: u64 = 0x10_0000;
/// Bytes of the headers before the code.
const HEADERS: usize = 64 + 56;
/// Bytes of a line.
pub(crate) const LINE: usize = 9;

global_asm!(
    ".pushsection .rodata.printer, \"a\"",
    "sepal_tests_printer:",
    "xorl %ebx, %ebx",
    "2: movl $8, %ecx",
    "3: roll $4, %ebx",
    "movb %bl, %al",
    "andb $15, %al",
    "addb $48, %al",
    "cmpb $57, %al",
    "jbe 4f",
    "addb $39, %al",
    "4: call 6f",
    "decl %ecx",
    "jnz 3b",
    "movb $10, %al",
    "call 6f",
    "incl %ebx",
    // So that a test's worth of it is kept.
    "movl $100000, %ecx",
    "5: pause",
    "decl %ecx",
    "jnz 5b",
    "jmp 2b",
    // Sends AL when the port has room (16550A, line status register, bit 5).
    "6: movb %al, %ah",
    "movw $0x3fd, %dx",
    "7: inb %dx, %al",
    "testb $0x20, %al",
    "jz 7b",
    "movb %ah, %al",
    "movw $0x3f8, %dx",
    "outb %al, %dx",
    "ret",
    "sepal_tests_printer_end:",
    ".popsection",
    options(att_syntax),
);

fn code() -> &'static [u8] {
    unsafe extern "C" {
        #[link_name = "sepal_tests_printer"]
        static START: u8;
        #[link_name = "sepal_tests_printer_end"]
        static END: u8;
    }
    // SAFETY: both labels are in this program's read-only data, the second after the first, with the guest's bytes between.
    unsafe {
        let (start, end) = (&raw const START, &raw const END);
        std::slice::from_raw_parts(start, end.offset_from(start).unsigned_abs())
    }
}

/// The guest's kernel: an ELF file of one segment (System V ABI, "Object Files").
pub(crate) fn kernel() -> Vec<u8> {
    let (code, offset) = (code(), HEADERS as u64);
    let mut file = Vec::new();
    // 64 bits, little endian, version 1.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, EM_X86_64.
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    // Entry; program headers after this one; no section headers.
    file.extend([BASE, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    // PT_LOAD, readable and executable.
    file.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    let length = code.len() as u64;
    file.extend(
        [offset, BASE, BASE, length, length, 4096]
            .map(u64::to_le_bytes)
            .concat(),
    );
    file.extend(code);
    file
}

/// Checks that these are whole lines with numbers that follow each other, the first of them `from`; returns the number after the last.
#[track_caller]
pub(crate) fn check(text: &str, from: u32) -> u32 {
    let mut expected = from;
    for line in text.lines() {
        assert_eq!(line, format!("{expected:08x}"), "after {}", expected.wrapping_sub(1));
        expected += 1;
    }
    expected
}
