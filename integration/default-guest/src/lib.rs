//! The default guest: a small x86-64 kernel of this project's own, carried in the binary, for trying things out, for tests and for
//! benchmarks. It needs a serial port; everything else it finds or does without.
//!
//! [`IMAGE`] is an ELF64 file for two boot protocols: Xen's PVH (note 18, XEN_ELFNOTE_PHYS32_ENTRY; give it `hvm_start_info` with a
//! memory map) and Linux's 64-bit protocol (`e_entry`). It lies at 1 MiB, is smaller than 64 KiB, wants 128 KiB of memory there, and,
//! for `cpus`, the page at 0x90000.
//!
//! # On the serial console (16550 at port 0x3f8, GSI 4)
//!
//! The first letter of the banner leaves by the first instructions that run: its arrival is when the guest got control. The banner names
//! the guest and its version, the memory, the vCPUs (ACPI's MADT), the command line and the devices found; then comes the
//! prompt `sepal> `. `help` lists the commands:
//!
//! | command | what it does |
//! |---|---|
//! | `help`, `info`, `echo TEXT` | lists the commands; shows the banner's facts; prints |
//! | `time`, `uptime` | the real-time clock (UTC); KVM's clock, which counts from the machine's creation |
//! | `sleep N`, `sleep Nms` | waits in hlt by the local APIC's timer; ^C ends it |
//! | `mem [MIB]` | writes to that many MiB of free memory (all without a number), reads it back, says how long that took |
//! | `cpus` | starts the other vCPUs by INIT and start-up IPI, one after the other; each prints a line and halts |
//! | `pci` | lists bus 0 by ports 0xcf8 and 0xcfc |
//! | `shutdown` | ACPI S5: 0x34 to the sleep control register (FADT's, or port 0x600) |
//! | `reset [acpi\|i8042\|triple]` | ACPI's reset register (FADT's, or 1 to port 0x602), 0xfe to port 0x64, or a triple fault |
//! | `crash` | ends KVM_RUN with KVM_EXIT_INTERNAL_ERROR: it jumps to the IOAPIC's registers at CPL 0, code that KVM cannot fetch |
//! | `spin` | runs for ever, interrupts off, no exits: only the VMM can end it |
//!
//! The line can be edited: backspace, ^U erases it, ^C gives it up; CR, LF or CR LF end it; it holds 256 characters.
//!
//! The ACPI power button (GSI 9, status in port 0x604) prints `power button: shutting down` and does what `shutdown` does. An
//! exception prints its vector, error code, instruction pointer, CPL and CR2, then resets by ACPI.
//!
//! An idle guest waits in hlt: it makes no exits and no timer interrupts.
//!
//! # On the kernel command line
//!
//! - `run=COMMAND;COMMAND` runs commands after the banner as if they were typed, so that tests need not type:
//!   `run=shutdown`, or with quotes round blanks `run="mem 8;shutdown"`.
//! - `quiet` shortens the banner to its first line.
//! - `nobutton` makes the power button say that it is ignored, for trying deadlines.
//!
//! # How it is made
//!
//! `build.rs` compiles `guest/` with the rustc of this build, apart from the workspace's flags. On some hosts KVM emulates CPL 0
//! (every instruction costs, and SSE does not work) but runs CPL 3 natively. So the guest does little at CPL 0 (`guest/boot.s`) and
//! lives at CPL 3. The modules without hardware access are compiled into this crate's tests, too.

/// The guest, an ELF64 executable; see the crate's head for how to enter it.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/default-guest.elf"));

#[cfg(test)]
#[path = "../guest/acpi.rs"]
mod acpi;
#[cfg(test)]
#[path = "../guest/boot_info.rs"]
mod boot_info;
#[cfg(test)]
#[path = "../guest/clock.rs"]
mod clock;
#[cfg(test)]
#[path = "../guest/command.rs"]
mod command;
#[cfg(test)]
#[path = "../guest/line.rs"]
mod line;
#[cfg(test)]
mod tests;
