//! The commands, as text: what a line means, the help, and the options on the kernel command line. Pure.

/// How `reset` resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResetWay {
    /// ACPI's reset register.
    Acpi,
    /// The keyboard controller's command 0xfe.
    I8042,
    /// A triple fault.
    TripleFault,
}

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command<'a> {
    /// An empty line.
    Nothing,
    /// Lists the commands.
    Help,
    /// The banner's facts again.
    Info,
    /// Prints its argument.
    Echo(&'a str),
    /// Prints the clock's date and time.
    Time,
    /// Prints the time since the machine was created.
    Uptime,
    /// Waits so many milliseconds.
    Sleep(u64),
    /// Touches so many MiB of memory, or all.
    Mem(Option<u64>),
    /// Starts the other vCPUs.
    Cpus,
    /// Lists PCI functions.
    Pci,
    /// ACPI S5.
    Shutdown,
    /// Resets the machine.
    Reset(ResetWay),
    /// Provokes a failure inside KVM.
    Crash,
    /// Runs for ever.
    Spin,
    /// A known command used wrongly: how to use it.
    Usage(&'static str),
    /// No such command.
    Unknown(&'a str),
}

/// Usage and meaning of each command.
pub(crate) const HELP: [(&str, &str); 14] = [
    ("help", "list the commands"),
    ("info", "memory, vCPUs, command line and devices"),
    ("echo TEXT", "print TEXT"),
    ("time", "the real-time clock's date and time (UTC)"),
    ("uptime", "time since the machine was created"),
    ("sleep N[ms]", "wait N seconds (or milliseconds); ^C ends it"),
    ("mem [MIB]", "touch that much memory, or all of it"),
    ("cpus", "start the other vCPUs and have each say hello"),
    ("pci", "list the PCI functions on bus 0"),
    ("shutdown", "power off (ACPI S5)"),
    ("reset [WAY]", "reset by acpi, i8042 or triple (a triple fault)"),
    ("crash", "make KVM fail to run this vCPU"),
    ("spin", "run for ever with interrupts off"),
    ("", "^U erases the line, ^C gives it up"),
];

/// Longest sleep, in milliseconds: a day.
const MAX_SLEEP: u64 = 86_400_000;

/// What a line means.
pub(crate) fn parse(line: &str) -> Command<'_> {
    let line = line.trim_matches(' ');
    let (name, argument) = line.split_once(' ').unwrap_or((line, ""));
    let argument = argument.trim_start_matches(' ');
    let simple = |command| {
        if argument.is_empty() {
            command
        } else {
            Command::Usage("this command takes no argument")
        }
    };
    match name {
        "" => Command::Nothing,
        "help" => simple(Command::Help),
        "info" => simple(Command::Info),
        "echo" => Command::Echo(argument),
        "time" => simple(Command::Time),
        "uptime" => simple(Command::Uptime),
        "sleep" => sleep(argument),
        "mem" => mem(argument),
        "cpus" => simple(Command::Cpus),
        "pci" => simple(Command::Pci),
        "shutdown" => simple(Command::Shutdown),
        "reset" => match argument {
            "" | "acpi" => Command::Reset(ResetWay::Acpi),
            "i8042" => Command::Reset(ResetWay::I8042),
            "triple" => Command::Reset(ResetWay::TripleFault),
            _ => Command::Usage("usage: reset [acpi|i8042|triple]"),
        },
        "crash" => simple(Command::Crash),
        "spin" => simple(Command::Spin),
        unknown => Command::Unknown(unknown),
    }
}

fn sleep(argument: &str) -> Command<'_> {
    let (digits, unit) = argument
        .strip_suffix("ms")
        .map_or((argument, 1000), |digits| (digits, 1));
    match number(digits).and_then(|count| count.checked_mul(unit)) {
        Some(milliseconds) if milliseconds <= MAX_SLEEP => Command::Sleep(milliseconds),
        _ => Command::Usage("usage: sleep SECONDS or sleep MILLISECONDSms, at most a day"),
    }
}

fn mem(argument: &str) -> Command<'_> {
    match number(argument) {
        Some(mib) if mib > 0 => Command::Mem(Some(mib)),
        None if argument.is_empty() => Command::Mem(None),
        _ => Command::Usage("usage: mem [MIB], with MIB above 0"),
    }
}

/// Decimal digits only: no sign, no blank.
fn number(digits: &str) -> Option<u64> {
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())?
}

/// Options on the kernel command line; words that are none are left to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options<'a> {
    /// Only the banner's first line.
    pub(crate) quiet: bool,
    /// The power button does nothing.
    pub(crate) no_button: bool,
    /// Commands to run after the banner, separated by ';'.
    pub(crate) run: &'a str,
}

impl<'a> Options<'a> {
    /// Words are separated by blanks; double quotes keep a word with blanks together. The last of several wins.
    pub(crate) fn parse(command_line: &'a str) -> Self {
        let mut options = Self::default();
        let mut rest = command_line;
        loop {
            rest = rest.trim_start_matches(' ');
            if rest.is_empty() {
                return options;
            }
            let mut quoted = false;
            let end = rest.find(|character| {
                quoted ^= character == '"';
                character == ' ' && !quoted
            });
            let (word, after) = end.and_then(|end| rest.split_at_checked(end)).unwrap_or((rest, ""));
            rest = after;
            // `"run=a b"` and `run="a b"` are the same.
            match word.trim_matches('"') {
                "quiet" => options.quiet = true,
                "nobutton" => options.no_button = true,
                word => {
                    if let Some(commands) = word.strip_prefix("run=") {
                        options.run = commands.trim_matches('"');
                    }
                }
            }
        }
    }
}
