//! The guest as its commands see it: output, time, memory, and the devices that were found.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;

use crate::acpi::Acpi;
use crate::boot_info::BootInfo;
use crate::bus::{self, Found};
use crate::console::Console;
use crate::machine::{LowMemory, Mapper, MonotonicClock};
use crate::{cpu, heap, machine, script};

/// Why a command failed, in words.
pub(crate) struct Failure(pub(crate) String);

impl<E: core::fmt::Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// What a command reports: what follows its name on the line, or why it failed.
pub(crate) type Outcome = Result<String, Failure>;

/// Returns early with a formatted [`Failure`] unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::guest::Failure(alloc::format!($($message)+)));
        }
    };
}

/// Most bytes of the first GiB that the heap takes.
const HEAP_END: u64 = 1 << 30;
/// Left behind the image for page directories, one page for each GiB that is mapped later.
const DIRECTORIES: u64 = 64 << 10;

/// The machine and what it has.
pub(crate) struct Guest {
    pub(crate) memory: BootInfo,
    pub(crate) mapper: Mapper,
    pub(crate) acpi: Option<Acpi>,
    pub(crate) config: bus::Access,
    pub(crate) devices: Vec<Found>,
    /// The text that came as initial RAM file system.
    pub(crate) script: String,
    clock: MonotonicClock,
    console: Console,
}

impl Guest {
    /// Reads what the VMM tells, starts the heap and looks for devices.
    pub(crate) fn new(pvh: bool, address: u64) -> Self {
        let memory = if pvh {
            BootInfo::from_pvh(&LowMemory, address)
        } else {
            BootInfo::from_zero_page(&LowMemory, address)
        };
        let mut mapper = Mapper::new();
        let start = mapper.free_memory() + DIRECTORIES;
        let usable = memory
            .ranges()
            .iter()
            .find(|range| range.usable() && range.start <= start && start < range.end);
        let end = usable.map_or(start, |range| range.end.min(HEAP_END));
        // An initial RAM file system lies at the end of the memory: the heap ends before it.
        let place = script::place(pvh, address);
        let end = place.map_or(end, |(script, _)| end.min(script.max(start)));
        // SAFETY: usable memory behind the image and its page directories, mapped by boot.s; nothing was allocated yet.
        unsafe { heap::start(start as usize, end as usize) };
        let script = place.and_then(|place| script::read(place, &mut mapper, &memory));
        let acpi = Acpi::read(&LowMemory, memory.rsdp);
        let config = bus::Access::choose(word(memory.command_line(), "pci="), acpi.as_ref());
        let devices = bus::scan(config);
        // A PC's interrupt controllers, where there are any, come up unmasked and with vectors of exceptions.
        cpu::outb(0x21, 0xff);
        cpu::outb(0xa1, 0xff);
        machine::enable_interrupts();
        Self {
            memory,
            mapper,
            acpi,
            config,
            devices,
            script: script.unwrap_or_default(),
            clock: MonotonicClock::new(),
            console: Console::new(),
        }
    }

    /// Prints a line.
    pub(crate) fn say(&mut self, line: &str) {
        _ = writeln!(self.console, "{line}");
        self.console.flush();
    }

    /// The value of `key` on the command line.
    pub(crate) fn option(&self, key: &str) -> Option<String> {
        word(self.memory.command_line(), key).map(ToString::to_string)
    }

    /// Nanoseconds of a clock that only rises: KVM's, or the time-stamp counter as if it ran at 2 GHz.
    pub(crate) fn now(&mut self) -> u64 {
        self.clock.now().unwrap_or_else(|| cpu::tsc() / 2)
    }

    /// Whether `condition` became true within so many milliseconds.
    pub(crate) fn within(&mut self, milliseconds: u64, mut condition: impl FnMut() -> bool) -> bool {
        let end = self.now() + milliseconds * 1_000_000;
        loop {
            if condition() {
                return true;
            }
            if self.now() > end {
                return false;
            }
            core::hint::spin_loop();
        }
    }

    /// Ends the machine: ACPI S5, or whatever else ends it.
    pub(crate) fn power_off(&mut self) -> ! {
        self.console.flush();
        machine::soft_off(self.acpi.as_ref());
        machine::acpi_reset(self.acpi.as_ref());
        machine::i8042_reset();
        cpu::triple_fault()
    }
}

/// The rest of the word of `line` that begins with `key`; the last of several wins.
fn word<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split(' ').filter_map(|word| word.strip_prefix(key)).next_back()
}
