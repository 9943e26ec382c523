//! The guests' machine code: a few instructions each, since some hosts emulate every one of them.
//!
//! Every guest is assembled twice: once in instructions whose bytes mean the same in 32-bit and in 64-bit mode, so that one entry serves PVH and
//! Linux's boot protocols, and once for real mode. Both run wherever they are loaded. No entry promises a stack or an interrupt table, and none is
//! used, but by the last way to end: a triple fault.

/// A guest's code for each way of being entered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Code {
    /// In 32-bit protected mode without paging, or in 64-bit mode with the first GiB mapped one to one.
    pub(super) protected: &'static [u8],
    /// In real mode.
    pub(super) real: &'static [u8],
}

/// Makes the code between two labels a function that returns its bytes.
macro_rules! code {
    ($(#[$doc:meta])* $name:ident, $start:literal, $end:literal, $mode:literal, [$($line:literal),* $(,)?]) => {
        std::arch::global_asm!(
            ".pushsection .rodata.bench_guests, \"a\"",
            // An optimized build puts this and the function into different objects.
            concat!(".globl ", $start, ", ", $end),
            concat!(".hidden ", $start, ", ", $end),
            concat!($start, ":"),
            $mode,
            $($line,)*
            ".code64",
            concat!($end, ":"),
            ".popsection",
            options(att_syntax),
        );
        $(#[$doc])*
        pub(super) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $start]
                static START: u8;
                #[link_name = $end]
                static END: u8;
            }
            // SAFETY: both labels are in this program's read-only data, the second after the first, with the guest's bytes between.
            unsafe {
                let (start, end) = (&raw const START, &raw const END);
                std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
            }
        }
    };
}

pub(super) use code;

code!(
    /// Ends by whatever the VMM knows: ACPI's S5 through port 0x600 (where those that have no PC's chipset agree to have it), the i8042's reset,
    /// a triple fault, which an empty interrupt table makes of the invalid instruction.
    first_byte_protected, "sepal_bench_first_byte", "sepal_bench_first_byte_end", ".code32",
    [
        "mov $0x3f8, %edx", "mov $'S', %al", "out %al, (%dx)",
        "mov $0x600, %edx", "mov $0x34, %al", "out %al, (%dx)",
        "mov $0xfe, %al", "out %al, $0x64",
        // Where this is: nothing promises a stack, but this is conventional memory.
        "mov $0x8000, %esp", "call 1f", "1: pop %eax", "add $(2f - 1b), %eax", "lidt (%eax)", "ud2",
        "2: .fill 10, 1, 0",
    ]
);

code!(
    first_byte_real,
    "sepal_bench_first_byte_real",
    "sepal_bench_first_byte_real_end",
    ".code16",
    [
        "mov $0x3f8, %dx",
        "mov $'S', %al",
        "out %al, (%dx)",
        "mov $0xfe, %al",
        "out %al, $0x64",
        "1: hlt",
        "jmp 1b",
    ]
);

code!(
    /// No interrupt is enabled and no timer is set: nothing wakes it.
    idle_protected, "sepal_bench_idle", "sepal_bench_idle_end", ".code32",
    ["mov $0x3f8, %edx", "mov $'S', %al", "out %al, (%dx)", "1: hlt", "jmp 1b"]
);

code!(
    idle_real,
    "sepal_bench_idle_real",
    "sepal_bench_idle_real_end",
    ".code16",
    [
        "cli",
        "mov $0x3f8, %dx",
        "mov $'S', %al",
        "out %al, (%dx)",
        "1: hlt",
        "jmp 1b"
    ]
);

/// Writes one byte to the serial port, then ends.
pub(super) fn first_byte() -> Code {
    Code {
        protected: first_byte_protected(),
        real: first_byte_real(),
    }
}

/// Writes one byte to the serial port, then waits for ever.
pub(super) fn idle() -> Code {
    Code {
        protected: idle_protected(),
        real: idle_real(),
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::{first_byte, idle};

    /// What a processor in this mode would carry out.
    fn decoded(bits: u32, code: &[u8]) -> Vec<Mnemonic> {
        let mut mnemonics = Vec::new();
        for instruction in Decoder::new(bits, code, DecoderOptions::NONE) {
            mnemonics.push(instruction.mnemonic());
            if matches!(instruction.mnemonic(), Mnemonic::Ud2 | Mnemonic::Jmp) {
                break;
            }
        }
        mnemonics
    }

    #[test]
    fn one_code_means_the_same_in_32_and_64_bit_mode() {
        for code in [first_byte(), idle()] {
            let instructions = decoded(64, code.protected);
            assert_eq!(instructions, decoded(32, code.protected));
            assert!(!instructions.contains(&Mnemonic::INVALID), "{instructions:?}");
            assert_eq!(instructions[..3], [Mnemonic::Mov, Mnemonic::Mov, Mnemonic::Out]);
        }
    }

    #[test]
    fn the_first_byte_is_the_same_in_every_mode() {
        for code in [first_byte(), idle()] {
            // mov $'S', %al; out %al, (%dx)
            let writes = |code: &[u8]| code.windows(3).any(|bytes| bytes == [0xb0, b'S', 0xee]);
            assert!(writes(code.protected) && writes(code.real));
            assert!(!decoded(16, code.real).contains(&Mnemonic::INVALID));
        }
    }

    #[test]
    fn nothing_wakes_an_idle_guest() {
        for (bits, code) in [(64, idle().protected), (16, idle().real)] {
            let instructions = decoded(bits, code);
            assert!(!instructions.contains(&Mnemonic::Sti));
            assert_eq!(instructions[instructions.len() - 2..], [Mnemonic::Hlt, Mnemonic::Jmp]);
        }
    }
}
