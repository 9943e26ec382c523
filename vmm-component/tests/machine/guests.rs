//! Guests of a few instructions each, and the ELF file that makes a kernel of them.
//!
//! Each is entered in 64-bit mode at [`BASE`] with 4 GiB mapped one to one, interrupts off and no interrupt table. They are short because some hosts
//! emulate every instruction. They end by the i8042 reset unless they say otherwise.

/// Where guests are linked, and entered.
pub(crate) const BASE: u64 = 0x10_0000;

/// Makes the code between two labels a function that returns its bytes.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $start:literal, $end:literal, [$($line:literal),* $(,)?]) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guests, \"a\"",
            concat!($start, ":"),
            $($line,)*
            concat!($end, ":"),
            ".popsection",
            options(att_syntax),
        );
        $(#[$doc])*
        pub(crate) fn $name() -> Vec<u8> {
            unsafe extern "C" {
                #[link_name = $start]
                static START: u8;
                #[link_name = $end]
                static END: u8;
            }
            // SAFETY: both labels are in this program's read-only data, the second after the first, with the guest's bytes between.
            unsafe {
                let (start, end) = (&raw const START, &raw const END);
                std::slice::from_raw_parts(start, end.offset_from(start) as usize).to_vec()
            }
        }
    };
}

#[allow(unused_imports, reason = "for those who make guests of their own")]
pub(crate) use guest;

guest!(
    /// Writes one byte to the serial port, then resets.
    hello, "sepal_guest_hello", "sepal_guest_hello_end",
    ["mov $0x3f8, %edx", "mov $'S', %al", "out %al, (%dx)", "mov $0xfe, %al", "out %al, $0x64", "1: hlt", "jmp 1b"]
);

guest!(
    /// Shuts down through the ACPI sleep control register.
    acpi_off, "sepal_guest_acpi_off", "sepal_guest_acpi_off_end",
    ["mov $0x600, %edx", "mov $0x34, %al", "out %al, (%dx)", "1: hlt", "jmp 1b"]
);

guest!(
    /// Resets through the ACPI reset register.
    acpi_reset, "sepal_guest_acpi_reset", "sepal_guest_acpi_reset_end",
    ["mov $0x602, %edx", "mov $1, %al", "out %al, (%dx)", "1: hlt", "jmp 1b"]
);

guest!(
    /// Faults where no handler is.
    triple_fault, "sepal_guest_triple", "sepal_guest_triple_end",
    ["movabs $0x7000000000, %rax", "mov (%rax), %al", "1: hlt", "jmp 1b"]
);

guest!(
    /// Says that it is there, then counts in RBX for ever.
    count, "sepal_guest_count", "sepal_guest_count_end",
    ["mov $0x3f8, %edx", "mov $'c', %al", "out %al, (%dx)", "xor %ebx, %ebx", "1: inc %rbx", "jmp 1b"]
);

guest!(
    /// Says that it is there, then halts for ever.
    idle, "sepal_guest_idle", "sepal_guest_idle_end",
    ["mov $0x3f8, %edx", "mov $'i', %al", "out %al, (%dx)", "1: hlt", "jmp 1b"]
);

guest!(
    /// Writes 5000 bytes in one string instruction, from the page after the code, which counts up.
    string_out, "sepal_guest_string", "sepal_guest_string_end",
    [
        "mov $0x110000, %edi", "mov $5000, %ecx", "xor %eax, %eax",
        "1: mov %al, (%rdi)", "inc %eax", "inc %rdi", "dec %ecx", "jnz 1b",
        "mov $0x110000, %esi", "mov $5000, %ecx", "mov $0x3f8, %edx", "cld", "rep outsb",
        "mov $0xfe, %al", "out %al, $0x64", "2: hlt", "jmp 2b",
    ]
);

guest!(
    /// Reads a port that nobody answers with a string instruction of four-byte elements, and tells whether all bits were ones.
    string_in, "sepal_guest_string_in", "sepal_guest_string_in_end",
    [
        "mov $0x110000, %edi", "mov $600, %ecx", "mov $0x5550, %edx", "cld", "rep insl",
        "mov $0x110000, %esi", "mov $600, %ecx",
        "1: lodsl", "cmp $-1, %eax", "jne 2f", "dec %ecx", "jnz 1b",
        "mov $'1', %al", "jmp 3f", "2: mov $'0', %al",
        "3: mov $0x3f8, %edx", "out %al, (%dx)", "mov $0xfe, %al", "out %al, $0x64", "4: hlt", "jmp 4b",
    ]
);

guest!(
    /// Starts all other processors by INIT and start-up messages to "all but self"; each writes 'a' to the serial port, then counts itself. When the
    /// number in the byte at 0x120000 (which [`smp`] sets) is there, resets.
    smp_code, "sepal_guest_smp", "sepal_guest_smp_end",
    [
        // The processors start in real mode at 0x20000: copy them there.
        "lea 5f(%rip), %rsi", "mov $0x20000, %edi", "mov $(6f - 5f), %ecx", "cld", "rep movsb",
        "mov $0xfee00000, %ebx",
        "movl $0x1ff, 0xf0(%rbx)",
        "movl $0xc4500, 0x300(%rbx)",
        "movl $0xc4620, 0x300(%rbx)",
        "movl $0xc4620, 0x300(%rbx)",
        "1: pause", "mov 0x20000 + (7f - 5f), %al", "cmp %al, 0x120000", "jne 1b",
        "mov $0xfe, %al", "out %al, $0x64", "2: hlt", "jmp 2b",
        ".code16",
        "5: mov $0x3f8, %dx", "mov $'a', %al", "out %al, (%dx)",
        "lock incb %cs:(7f - 5b)",
        "3: hlt", "jmp 3b",
        "7: .byte 0",
        "6:",
        ".code64",
    ]
);

guest!(
    /// Jumps to where no memory is.
    jump_to_nowhere, "sepal_guest_nowhere", "sepal_guest_nowhere_end",
    ["mov $0xd0000000, %eax", "jmp *%rax"]
);

guest!(
    /// Waits for the power button: IOAPIC pin 9 to vector 0x30, whose handler reads the event register and shuts down. Says 'r' when it is ready.
    power_button, "sepal_guest_button", "sepal_guest_button_end",
    [
        "lidt 8f(%rip)",
        "mov $0xfee00000, %ebx", "movl $0x1ff, 0xf0(%rbx)",
        "mov $0xfec00000, %ebx",
        "movl $0x23, (%rbx)", "movl $0, 0x10(%rbx)",
        "movl $0x22, (%rbx)", "movl $0x30, 0x10(%rbx)",
        "mov $0x3f8, %edx", "mov $'r', %al", "out %al, (%dx)",
        "sti", "1: hlt", "jmp 1b",
        "7: mov $0x604, %edx", "in (%dx), %eax", "test $1, %al", "jz 2f",
        "mov $0x600, %edx", "mov $0x34, %al", "out %al, (%dx)", "2: hlt", "jmp 2b",
        "8: .word 0x31 * 16 - 1", ".quad 0x100000 + (9f - sepal_guest_button)",
        ".balign 16",
        "9: .skip 0x30 * 16",
        ".word 7b - sepal_guest_button, 0x10, 0x8e00, 0x10", ".quad 0",
    ]
);

guest!(
    /// Serves a level-triggered interrupt, IOAPIC pin 10 to vector 0x31: its handler writes to port 0x5000 and ends the interrupt. After three of them it
    /// shuts down. Says 'r' when it is ready.
    level_triggered,
    "sepal_guest_level",
    "sepal_guest_level_end",
    [
        "lidt 8f(%rip)",
        "xor %ebp, %ebp",
        "mov $0xfee00000, %ebx",
        "movl $0x1ff, 0xf0(%rbx)",
        "mov $0xfec00000, %edi",
        "movl $0x25, (%rdi)",
        "movl $0, 0x10(%rdi)",
        "movl $0x24, (%rdi)",
        "movl $0x8031, 0x10(%rdi)",
        "mov $0x3f8, %edx",
        "mov $'r', %al",
        "out %al, (%dx)",
        "1: cli",
        "cmp $3, %ebp",
        "jae 3f",
        "sti",
        "hlt",
        "jmp 1b",
        "3: mov $0x600, %edx",
        "mov $0x34, %al",
        "out %al, (%dx)",
        "2: hlt",
        "jmp 2b",
        "7: inc %ebp",
        "mov $0x5000, %edx",
        "out %al, (%dx)",
        "movl $0, 0xb0(%rbx)",
        "iretq",
        "8: .word 0x32 * 16 - 1",
        ".quad 0x100000 + (9f - sepal_guest_level)",
        ".balign 16",
        "9: .skip 0x31 * 16",
        ".word 7b - sepal_guest_level, 0x10, 0x8e00, 0x10",
        ".quad 0",
    ]
);

guest!(
    /// Echoes one byte that comes in on the serial port, polling, then resets. Says 'r' when it is ready, and that it is there (DTR, RTS).
    echo, "sepal_guest_echo", "sepal_guest_echo_end",
    [
        "mov $0x3fc, %edx", "mov $3, %al", "out %al, (%dx)",
        "mov $0x3f8, %edx", "mov $'r', %al", "out %al, (%dx)",
        "1: mov $0x3fd, %edx", "in (%dx), %al", "test $1, %al", "jz 1b",
        "mov $0x3f8, %edx", "in (%dx), %al", "out %al, (%dx)",
        "mov $0xfe, %al", "out %al, $0x64", "2: hlt", "jmp 2b",
    ]
);

guest!(
    /// Maps the first page above 4 GiB, writes and reads there and at the end of the memory below the hole, and reads inside the hole. Writes 'H' if
    /// memory kept what was written and the hole had only ones.
    above_the_hole, "sepal_guest_hole", "sepal_guest_hole_end",
    [
        // PML4[0] -> PDPT; PDPT[4] -> a page directory of ours at 2 MiB, whose first entry is the 2 MiB at 4 GiB.
        "mov %cr3, %rax", "mov (%rax), %rax", "and $-4096, %rax",
        "movq $0x200003, 32(%rax)",
        "mov $0x200000, %ebx", "movabs $0x100000083, %rcx", "mov %rcx, (%rbx)",
        "mov %cr3, %rax", "mov %rax, %cr3",
        "movabs $0x100000000, %rbx", "movabs $0x1122334455667788, %rcx", "mov %rcx, (%rbx)", "mov %rcx, 0x1ffff8(%rbx)",
        "mov $0xbffffff8, %esi", "mov %rcx, (%rsi)",
        "mov $'X', %al",
        "cmp %rcx, (%rbx)", "jne 1f", "cmp %rcx, 0x1ffff8(%rbx)", "jne 1f", "cmp %rcx, (%rsi)", "jne 1f",
        "mov $0xc8000000, %edi", "movl $0, (%rdi)", "cmpl $-1, (%rdi)", "jne 1f",
        "mov $'H', %al",
        "1: mov $0x3f8, %edx", "out %al, (%dx)", "mov $0xfe, %al", "out %al, $0x64", "2: hlt", "jmp 2b",
    ]
);

/// A guest that starts `others` more processors.
pub(crate) fn smp(others: u8) -> Vec<u8> {
    with_number(smp_code(), others)
}

/// `code`, and `others` in the byte at 0x120000.
pub(crate) fn with_number(code: Vec<u8>, others: u8) -> Vec<u8> {
    let mut image = code;
    image.resize(0x2_0000, 0);
    image.push(others);
    image
}

/// An ELF file of one segment, `code`, entered at its start.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let half = |file: &mut Vec<u8>, v: u16| file.extend(v.to_le_bytes());
    let word = |file: &mut Vec<u8>, v: u32| file.extend(v.to_le_bytes());
    let long = |file: &mut Vec<u8>, v: u64| file.extend(v.to_le_bytes());
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    half(&mut file, 2); // ET_EXEC
    half(&mut file, 62); // EM_X86_64
    word(&mut file, 1);
    long(&mut file, BASE);
    long(&mut file, 64); // Program headers follow.
    long(&mut file, 0);
    word(&mut file, 0);
    for size in [64, 56, 1, 0, 0, 0] {
        half(&mut file, size);
    }
    word(&mut file, 1); // PT_LOAD
    word(&mut file, 7);
    for value in [0x1000, BASE, BASE, code.len() as u64, code.len() as u64, 0x1000] {
        long(&mut file, value);
    }
    file.resize(0x1000, 0);
    file.extend(code);
    file
}
