//! What the user sees: banner, prompt, commands, the power button.

use core::fmt::Write;

use crate::acpi::Acpi;
use crate::boot_info::BootInfo;
use crate::command::{self, Command, Options, ResetWay};
use crate::console::Console;
use crate::line::{Event, LineEditor};
use crate::machine::{self, Greeting, LowMemory, Mapper, MonotonicClock};
use crate::{Protocol, cpu};

const PROMPT: &str = "sepal> ";
const NS_PER_MS: u64 = 1_000_000;
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// How long a started CPU may take to say hello.
const HELLO_MS: u64 = 5_000;

/// Prints; the console never fails.
macro_rules! say {
    ($shell:expr, $($text:tt)*) => { _ = write!($shell.console, $($text)*) };
}

/// Everything the shell holds.
pub(crate) struct Shell {
    console: Console,
    editor: LineEditor,
    memory: BootInfo,
    acpi: Option<Acpi>,
    mapper: Mapper,
    clock: MonotonicClock,
    serial: bool,
    /// Bytes that came while a command ran and wait for the prompt: `keys[taken..received]`.
    keys: [u8; 256],
    taken: usize,
    received: usize,
}

/// Why a wait ended.
#[derive(PartialEq, Eq)]
enum Woken {
    /// The time is over.
    Timeout,
    /// ^C was typed.
    Interrupted,
    /// One of the events waited for.
    Event,
}

impl Shell {
    /// Reads what the VMM told. Boot.s has sent the banner's first letter.
    pub(crate) fn new(protocol: Protocol, address: u64) -> Self {
        let mut console = Console::new();
        _ = writeln!(console, "epal default guest {}", env!("CARGO_PKG_VERSION"));
        console.flush();
        let memory = match protocol {
            Protocol::Pvh => BootInfo::from_pvh(&LowMemory, address),
            Protocol::Linux => BootInfo::from_zero_page(&LowMemory, address),
        };
        Self {
            console,
            editor: LineEditor::new(),
            acpi: Acpi::read(&LowMemory, memory.rsdp),
            memory,
            mapper: Mapper::new(),
            clock: MonotonicClock::new(),
            serial: machine::serial_present(),
            keys: [0; 256],
            taken: 0,
            received: 0,
        }
    }

    /// Shows the banner, runs the command line's commands, then the user's, for ever.
    pub(crate) fn run(mut self) -> ! {
        // A copy, so that the commands can use the shell while they are read.
        let mut copy = [0; crate::boot_info::MAX_COMMAND_LINE];
        let mut length = 0;
        for (to, from) in copy.iter_mut().zip(self.memory.command_line().bytes()) {
            *to = from;
            length += 1;
        }
        let options = Options::parse(str::from_utf8(copy.get(..length).unwrap_or_default()).unwrap_or_default());
        if !options.quiet {
            self.info();
            say!(self, "Type help for the commands.\n");
        }
        machine::enable_interrupts();
        // A press before the interrupt was routed made no interrupt.
        self.look_at_power_button(&options);
        for command in options
            .run
            .split(';')
            .filter(|command| !command.trim_matches(' ').is_empty())
        {
            say!(self, "{PROMPT}{command}\n");
            self.execute(command, &options);
        }
        say!(self, "{PROMPT}");
        loop {
            match self.next_key() {
                Some(key) => match self.editor.feed(key, &mut self.console) {
                    Some(Event::Line) => {
                        // Taken out for the while, so that the command can use the shell.
                        let editor = core::mem::replace(&mut self.editor, LineEditor::new());
                        self.execute(editor.line(), &options);
                        self.editor = editor;
                        say!(self, "{PROMPT}");
                    }
                    Some(Event::Cancelled) => say!(self, "{PROMPT}"),
                    None => {}
                },
                None => {
                    if self.wait(&options) & cpu::GED != 0 {
                        say!(self, "{PROMPT}{}", self.editor.line());
                    }
                }
            }
        }
    }

    fn next_key(&mut self) -> Option<u8> {
        if self.taken == self.received {
            self.receive();
        }
        let key = self.keys.get(..self.received)?.get(self.taken)?;
        self.taken += 1;
        Some(*key)
    }

    /// Flushes and waits for events; the power button is dealt with here.
    fn wait(&mut self, options: &Options<'_>) -> u32 {
        self.console.flush();
        let events = loop {
            match cpu::take_pending() {
                0 => cpu::idle(),
                events => break events,
            }
        };
        if events & cpu::GED != 0 {
            self.look_at_power_button(options);
        }
        events
    }

    fn look_at_power_button(&mut self, options: &Options<'_>) {
        if machine::power_button_pressed() {
            if !options.no_button {
                say!(self, "\npower button: shutting down\n");
                self.shut_down();
            }
            say!(self, "\npower button: ignored (nobutton)\n");
        }
    }

    /// Waits for one of `wanted`, ^C, or the time.
    fn wait_for(&mut self, wanted: u32, milliseconds: u64, options: &Options<'_>) -> Woken {
        let mut left = milliseconds.saturating_mul(NS_PER_MS);
        let deadline = self.clock.now().map(|now| now.saturating_add(left));
        let result = loop {
            if self.interrupt_typed() {
                break Woken::Interrupted;
            }
            if left == 0 {
                break Woken::Timeout;
            }
            let step = u32::try_from(left).unwrap_or(u32::MAX);
            machine::set_timer(step);
            let events = self.wait(options);
            if events & wanted != 0 {
                break Woken::Event;
            }
            left = match (deadline, self.clock.now()) {
                (Some(deadline), Some(now)) => deadline.saturating_sub(now),
                // No clock: the timer is trusted.
                _ if events & cpu::TIMER != 0 => left.saturating_sub(step.into()),
                _ => left,
            };
        };
        machine::set_timer(0);
        result
    }

    /// Takes what was typed; what does not fit stays in the serial port.
    fn receive(&mut self) {
        if self.taken == self.received {
            (self.taken, self.received) = (0, 0);
        }
        if self.serial
            && let Some(room) = self.keys.get_mut(self.received..)
        {
            self.received += cpu::serial_read(room);
        }
    }

    /// Keeps what was typed; a ^C drops it and counts.
    fn interrupt_typed(&mut self) -> bool {
        self.receive();
        let keys = self.keys.get(self.taken..self.received).unwrap_or_default();
        let found = keys.iter().rposition(|&key| key == 0x03);
        self.taken += found.map_or(0, |position| position + 1);
        found.is_some()
    }

    fn execute(&mut self, line: &str, options: &Options<'_>) {
        // What was typed shows before the command takes its time, or its end.
        self.console.flush();
        match command::parse(line) {
            Command::Nothing => {}
            Command::Help => {
                for (usage, meaning) in command::HELP {
                    say!(self, "  {usage:<12} {meaning}\n");
                }
            }
            Command::Info => self.info(),
            Command::Echo(text) => say!(self, "{text}\n"),
            Command::Time => match machine::date() {
                Some(date) => say!(self, "{date}\n"),
                None => say!(self, "there is no real-time clock\n"),
            },
            Command::Uptime => match self.clock.now().map(|now| now / NS_PER_MS) {
                Some(now) => say!(self, "up {}.{:03} s\n", now / 1000, now % 1000),
                None => say!(self, "the VMM offers no clock\n"),
            },
            Command::Sleep(milliseconds) => match self.wait_for(0, milliseconds, options) {
                Woken::Interrupted => say!(self, "^C\n"),
                _ => say!(self, "slept {milliseconds} ms\n"),
            },
            Command::Mem(mib) => self.touch_memory(mib),
            Command::Cpus => self.start_cpus(options),
            Command::Pci => self.list_pci(),
            Command::Shutdown => self.shut_down(),
            Command::Reset(way) => self.reset(way),
            Command::Crash => cpu::crash(),
            Command::Spin => {
                say!(self, "spinning\n");
                self.console.flush();
                cpu::spin()
            }
            Command::Usage(usage) => say!(self, "{usage}\n"),
            Command::Unknown(name) => say!(self, "unknown command \"{name}\"; help lists the commands\n"),
        }
    }

    fn info(&mut self) {
        say!(self, "memory: {} MiB\n", self.memory.usable_bytes() / MIB);
        for range in self.memory.ranges() {
            let kind = if range.usable() { "usable" } else { "reserved" };
            say!(self, "  {:#012x}-{:#012x} {kind}\n", range.start, range.end - 1);
        }
        if self.memory.more_ranges > 0 {
            say!(self, "  and {} more\n", self.memory.more_ranges);
        }
        match &self.acpi {
            Some(acpi) => say!(self, "vcpus: {}\n", acpi.processors),
            None => say!(self, "vcpus: unknown, no ACPI tables\n"),
        }
        say!(self, "command line: {}\n", self.memory.command_line());
        let serial = if machine::serial_works() {
            "16550 at 0x3f8"
        } else {
            "no scratch register"
        };
        say!(self, "serial: {serial}\n");
        match machine::date() {
            Some(date) => say!(self, "rtc: {date}\n"),
            None => say!(self, "rtc: none\n"),
        }
        match machine::ioapic_pins() {
            Some(pins) => say!(self, "ioapic: {pins} pins\n"),
            None => say!(self, "ioapic: none\n"),
        }
        match self.acpi.as_ref().and_then(|acpi| acpi.ecam) {
            Some((base, last)) => say!(self, "pci: ECAM at {base:#x}, buses 0-{last}\n"),
            None if machine::pci_ports() => say!(self, "pci: ports 0xcf8 and 0xcfc\n"),
            None => say!(self, "pci: none\n"),
        }
    }

    /// Writes to each page and reads it back.
    fn touch_memory(&mut self, mib: Option<u64>) {
        let wanted = mib.map_or(u64::MAX, |mib| mib.saturating_mul(MIB / PAGE));
        let range_count = self.memory.ranges().len();
        let span = |shell: &Self, index: usize| {
            let range = shell.memory.ranges().get(index).copied().unwrap_or_default();
            let start = range
                .start
                .max(shell.mapper.free_memory())
                .checked_next_multiple_of(PAGE);
            match start {
                Some(start) if range.usable() && start < range.end => start..range.end & !(PAGE - 1),
                _ => 0..0,
            }
        };
        // Mapping takes free memory, so all of it comes first.
        for index in 0..range_count {
            let span = span(self, index);
            let last = (span.end.saturating_sub(1) >> 30).min(511);
            for gib in span.start >> 30..=last {
                if !span.is_empty() && !self.mapper.map(gib, &self.memory) {
                    say!(self, "cannot map GiB {gib}\n");
                    break;
                }
            }
        }
        let started = self.clock.now();
        let (mut touched, mut wrong) = (0u64, 0u64);
        for pass in 0..2 {
            let mut left = wanted;
            for index in 0..range_count {
                for page in span(self, index).step_by(PAGE as usize) {
                    if left == 0 || !self.mapper.map(page >> 30, &self.memory) {
                        break;
                    }
                    left -= 1;
                    let word = page as usize as *mut u64;
                    if pass == 0 {
                        // SAFETY: a mapped page of usable memory above the image and the page tables, which nothing uses.
                        unsafe { word.write_volatile(!page) };
                        touched += 1;
                    // SAFETY: as above.
                    } else if unsafe { word.read_volatile() } != !page {
                        wrong += 1;
                    }
                }
            }
        }
        if mib.is_some() && touched < wanted {
            say!(self, "there is less free memory than that\n");
        }
        say!(self, "touched {} MiB ({touched} pages)", touched * PAGE / MIB);
        if let (Some(started), Some(ended)) = (started, self.clock.now()) {
            let taken = ended.saturating_sub(started) / 1000;
            say!(self, " in {}.{:03} ms", taken / 1000, taken % 1000);
        }
        if wrong > 0 {
            say!(self, ", {wrong} PAGES READ BACK WRONG");
        }
        say!(self, "\n");
    }

    fn start_cpus(&mut self, options: &Options<'_>) {
        let Some(acpi) = self.acpi.clone() else {
            say!(self, "there are no ACPI tables to find vCPUs in\n");
            return;
        };
        if !machine::place_start_up_code(&self.memory) {
            say!(self, "there is no memory below 1 MiB for the start-up code\n");
            return;
        }
        let own = machine::own_apic_id();
        say!(self, "cpu {own}: hello (boot processor)\n");
        let mut answered = 1;
        for &id in acpi.apic_ids().iter().filter(|&&id| id != own && id < 255) {
            let mut greeting = Greeting::new();
            _ = write!(greeting, "cpu {id}: hello\r\n");
            self.console.flush();
            machine::start_cpu(id, &greeting);
            match self.wait_for(cpu::HELLO, HELLO_MS, options) {
                Woken::Event if machine::last_hello() == id => answered += 1,
                Woken::Event => say!(self, "cpu {id} thinks it is cpu {}\n", machine::last_hello()),
                Woken::Timeout => say!(self, "cpu {id} did not answer\n"),
                Woken::Interrupted => {
                    say!(self, "^C\n");
                    return;
                }
            }
        }
        say!(self, "{answered} of {} vCPUs said hello\n", acpi.processors);
    }

    fn list_pci(&mut self) {
        if !machine::pci_ports() {
            say!(self, "there is no PCI\n");
            return;
        }
        for device in 0..32 {
            for function in 0..8 {
                let id = machine::pci_read(device, function, 0);
                if id & 0xffff == 0xffff {
                    if function == 0 {
                        break;
                    }
                    continue;
                }
                let class = machine::pci_read(device, function, 8) >> 8;
                say!(
                    self,
                    "00:{device:02x}.{function} {:04x}:{:04x} class {class:06x}\n",
                    id & 0xffff,
                    id >> 16
                );
                let several = machine::pci_read(device, function, 12) >> 23 & 1 == 1;
                if function == 0 && !several {
                    break;
                }
            }
        }
    }

    fn shut_down(&mut self) -> ! {
        self.console.flush();
        machine::soft_off(self.acpi.as_ref());
        cpu::halt()
    }

    fn reset(&mut self, way: ResetWay) -> ! {
        self.console.flush();
        match way {
            ResetWay::Acpi => machine::acpi_reset(self.acpi.as_ref()),
            ResetWay::I8042 => machine::i8042_reset(),
            ResetWay::TripleFault => cpu::triple_fault(),
        }
        cpu::halt()
    }
}
