//! The ways in which a machine ends or stops getting anywhere, apart from the power-off after the last command.

use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess};

use crate::arguments::Arguments;
use crate::guest::{Failure, Guest, Outcome};
use crate::{bus, cpu, ensure, machine};

/// The watchdog, an Intel 6300ESB's (datasheet 300641): vendor and device, the lock register with its enabling bit, and in BAR 0 the
/// preloads of its two timers and the reload register, which takes two words before each write to a timer.
const WATCHDOG: (u16, u16) = (0x8086, 0x25ab);
const LOCK: u8 = 0x68;
const ENABLE: u32 = 1 << 1;
const RELOAD: u64 = 0xc;
const UNLOCK: [u32; 2] = [0x80, 0x86];
/// A tick of its timers is 2^15 periods of a clock of 33 1/3 MHz, in nanoseconds.
const TICK: u64 = 30 << 15;

/// `hang`: runs for ever.
pub(crate) fn hang(guest: &mut Guest, _: Arguments<'_>) -> Outcome {
    guest.say("waiting hang");
    cpu::spin()
}

/// `halt`: halts for ever.
pub(crate) fn halt(guest: &mut Guest, _: Arguments<'_>) -> Outcome {
    guest.say("waiting halt");
    cpu::halt()
}

/// `reset[:acpi|i8042|triple-fault]`: resets the machine.
pub(crate) fn reset(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    match arguments.text(0).unwrap_or("acpi") {
        "acpi" => machine::acpi_reset(guest.acpi.as_ref()),
        "i8042" => machine::i8042_reset(),
        "triple-fault" => cpu::triple_fault(),
        other => return Err(Failure(alloc::format!("there is no way {other:?}"))),
    }
    Err(Failure("the machine goes on".into()))
}

/// `crash`: executes what KVM cannot, so that the vCPU fails.
pub(crate) fn crash(_: &mut Guest, _: Arguments<'_>) -> Outcome {
    cpu::crash()
}

/// `watchdog[:MILLISECONDS]`: has the watchdog expire in so many, and does not feed it.
pub(crate) fn watchdog(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let milliseconds: u64 = arguments.number(0, 100)?;
    // Half of it by each of the two timers.
    let ticks = u32::try_from(milliseconds * 1_000_000 / 2 / TICK)?.max(1);
    let mut config = guest.config;
    let mut root = config.root();
    let found = root
        .enumerate_bus(0)
        .find(|(_, info)| (info.vendor_id, info.device_id) == WATCHDOG);
    let Some((function, _)) = found else {
        return Err(Failure("there is no watchdog".into()));
    };
    root.set_command(function, Command::MEMORY_SPACE);
    let bars = bus::bars(&mut root, function);
    let Some(bar) = bars.first() else {
        return Err(Failure("it has no BAR".into()));
    };
    let mapped = guest.mapper.map(bar.address >> 30, &guest.memory);
    ensure!(mapped, "its BAR at {:#x} cannot be mapped", bar.address);
    let write = |offset: u64, value: u32| {
        // SAFETY: a register in the device's BAR.
        unsafe { ((bar.address + offset) as *mut u32).write_volatile(value) }
    };
    for timer in [0, 4] {
        UNLOCK.map(|word| write(RELOAD, word));
        write(timer, ticks);
    }
    guest.say("waiting watchdog");
    config.write_word(function, LOCK, ENABLE);
    cpu::halt()
}
