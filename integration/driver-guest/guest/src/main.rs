//! The driver guest: drives virtio devices by an independent implementation, the crate `virtio-drivers`, and says how each test went.
//!
//! What it can be asked to do is described at the head of the crate `sepal-driver-guest`. It is made as the default guest is, and shares
//! that one's entry, services and parsers: `boot.s` runs at CPL 0, everything here at CPL 3 with interrupts off, so it runs at
//! native speed also where KVM emulates CPL 0. Drivers poll; where a test wants interrupts, they set bits while the idle service waits.

#![no_std]
#![no_main]

extern crate alloc;

// Shared with the default guest, which uses more of them.
#[allow(dead_code)]
#[path = "../../../default-guest/guest/acpi.rs"]
mod acpi;
#[allow(dead_code)]
#[path = "../../../default-guest/guest/boot_info.rs"]
mod boot_info;
#[allow(dead_code)]
#[path = "../../../default-guest/guest/clock.rs"]
mod clock;
#[path = "../../../default-guest/guest/console.rs"]
mod console;
#[allow(dead_code)]
#[path = "../../../default-guest/guest/cpu.rs"]
mod cpu;
#[allow(dead_code)]
#[path = "../../../default-guest/guest/machine.rs"]
mod machine;
#[path = "../../../default-guest/guest/memory_functions.rs"]
mod memory_functions;

mod arguments;
mod balloon;
mod block;
mod bus;
mod byte_stream;
mod commands;
mod endings;
mod guest;
mod heap;
mod hostile;
mod interrupts;
mod memory;
mod multiport;
mod network;
mod physical;
mod port;
mod raw_ring;
mod round_trips;
mod script;
mod vsock;

use alloc::format;
use core::arch::global_asm;
use core::fmt::Write;
use core::panic::PanicInfo;

use console::Console;
use guest::Guest;

global_asm!(
    include_str!("../../../default-guest/guest/boot.s"),
    options(att_syntax, raw)
);

// boot.s enters `start` on a stack of 32 KiB, too little for drivers that carry their queues by value.
global_asm!(
    ".section .bss.stack, \"aw\", @nobits",
    ".balign 16",
    ".skip 0x80000",
    "large_stack_top:",
    ".text",
    ".globl start",
    "start:",
    "lea rsp, [large_stack_top]",
    "call enter",
    "ud2",
);

/// First Rust code, at CPL 3: runs the commands and ends.
#[unsafe(no_mangle)]
extern "C" fn enter(protocol: u32, address: u32) -> ! {
    let mut guest = Guest::new(protocol == 0, address.into());
    guest.say(&format!("DRIVERS {} devices", guest.devices.len()));
    commands::run_all(&mut guest);
    guest.say("DONE");
    guest.power_off()
}

/// Entered from boot.s after the first exception, on a stack of its own: says what it was and resets.
#[unsafe(no_mangle)]
extern "C" fn fault_report() -> ! {
    unsafe extern "C" {
        static fault_vector: u64;
        static fault_error: u64;
        static fault_rip: u64;
        static fault_cr2: u64;
    }
    // SAFETY: boot.s reserves these words and has filled them; nothing writes them any more.
    let (vector, error, rip, address) = unsafe { (fault_vector, fault_error, fault_rip, fault_cr2) };
    let mut console = Console::new();
    _ = writeln!(
        console,
        "\nfail guest exception {vector}, error code {error:#x}, at {rip:#x}, CR2 {address:#x}"
    );
    give_up(console)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut console = Console::new();
    _ = writeln!(console, "\nfail guest {info}");
    give_up(console)
}

/// `alloc` is compiled for unwinding, and names this; with aborting panics nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    cpu::triple_fault()
}

fn give_up(mut console: Console) -> ! {
    console.flush();
    machine::acpi_reset(None);
    machine::i8042_reset();
    cpu::triple_fault()
}
