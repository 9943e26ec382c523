//! What the commands can be told that launch, define and start guests.

use std::path::PathBuf;

use clap::{Args, ValueEnum, builder::NonEmptyStringValueParser};

use super::options::{GuestOptions, KERNEL_SOURCE, VSOCK_SOURCE};

#[derive(Debug, Args)]
pub(crate) struct Launch {
    /// Name of the guest: letters, digits, '.', '_' and '-', the first a letter or digit [default: the manager chooses]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub(crate) name: Option<String>,
    /// A configuration file (TOML), or - for standard input; what the options say counts before it
    #[arg(long, short, value_name = "FILE", groups = [KERNEL_SOURCE, VSOCK_SOURCE])]
    pub(crate) file: Option<PathBuf>,
    /// Leave the guest running, and a guest manager with it; print its name
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Only tell whether the guest could be launched, as far as that is known without starting anything
    #[arg(long, conflicts_with = "detach")]
    pub(crate) check: bool,
    #[command(flatten)]
    pub(crate) options: GuestOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Define {
    /// Name of the guest: letters, digits, '.', '_' and '-', the first a letter or digit [default: what the file says]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub(crate) name: Option<String>,
    /// A configuration file (TOML), or - for standard input; what the options say counts before it
    #[arg(long, short, value_name = "FILE", groups = [KERNEL_SOURCE, VSOCK_SOURCE])]
    pub(crate) file: Option<PathBuf>,
    /// Put this definition in the place of the one that there is
    #[arg(long)]
    pub(crate) replace: bool,
    /// Start the guest whenever the guest manager starts
    #[arg(long)]
    pub(crate) autostart: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) options: GuestOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Name of the definition
    pub(crate) name: String,
    /// Connect the terminal to the guest's serial port; Ctrl-] detaches
    #[arg(long, short)]
    pub(crate) attach: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Autostart {
    /// Name of the definition
    pub(crate) name: String,
    /// Whether the guest is started when the guest manager starts
    pub(crate) state: Switch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// It is
    On,
    /// It is not
    Off,
}
