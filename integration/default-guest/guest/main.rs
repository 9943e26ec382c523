//! The default guest: a kernel of its own that shows what the machine has and obeys a prompt on the serial port.
//!
//! What a user sees is described at the head of the crate `sepal-default-guest`. How it is made: `boot.s` runs at CPL 0, in as
//! few instructions as it can; everything else is Rust at CPL 3, on a user-accessible identity map, with interrupts off: they
//! arrive only inside the idle service. So this code runs at native speed also where KVM emulates CPL 0.
//!
//! Cargo's lints do not reach this program, except its pure modules; `clippy-driver` with build.rs's arguments does.

#![no_std]
#![no_main]

mod acpi;
mod boot_info;
mod clock;
mod command;
mod console;
mod cpu;
mod line;
mod machine;
mod memory_functions;
mod shell;

use core::arch::global_asm;
use core::fmt::Write;
use core::panic::PanicInfo;

use console::Console;

global_asm!(include_str!("boot.s"), options(att_syntax, raw));

/// How the VMM entered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Xen's PVH: the address is `hvm_start_info`'s.
    Pvh,
    /// Linux's 64-bit protocol: the address is `boot_params`'s.
    Linux,
}

/// First code at CPL 3, entered once from boot.s.
#[unsafe(no_mangle)]
extern "C" fn start(protocol: u32, address: u32) -> ! {
    let protocol = if protocol == 0 { Protocol::Pvh } else { Protocol::Linux };
    shell::Shell::new(protocol, address.into()).run()
}

/// Entered from boot.s after the first exception, on a stack of its own: says what it was and resets.
#[unsafe(no_mangle)]
extern "C" fn fault_report() -> ! {
    unsafe extern "C" {
        static fault_vector: u64;
        static fault_error: u64;
        static fault_rip: u64;
        static fault_cs: u64;
        static fault_cr2: u64;
    }
    // SAFETY: boot.s reserves these words and has filled them; nothing writes them any more.
    let (vector, error, rip, cs, address) = unsafe { (fault_vector, fault_error, fault_rip, fault_cs, fault_cr2) };
    let mut console = Console::new();
    _ = writeln!(
        console,
        "\nexception {vector}, error code {error:#x}, at {rip:#x}, CPL {}, CR2 {address:#x}: resetting",
        cs & 3
    );
    give_up(console)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut console = Console::new();
    _ = writeln!(console, "\n{info}: resetting");
    give_up(console)
}

fn give_up(mut console: Console) -> ! {
    console.flush();
    machine::acpi_reset(None);
    machine::i8042_reset();
    cpu::triple_fault()
}
