//! The command line of `guest`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// Runs virtual machines, each in a jail of its own.
///
/// Without a running guest manager, `launch` starts a private one that lives as long as the guest.
#[derive(Debug, Parser)]
#[command(name = "guest", version, max_term_width = 100, after_help = EXIT_STATUS)]
pub(crate) struct Cli {
    /// Socket of the guest manager [default: the user's, $XDG_RUNTIME_DIR/sepal/manager.sock]
    #[arg(long, global = true, value_name = "SOCKET", env = "SEPAL_MANAGER")]
    pub(crate) manager: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_STATUS: &str = "\
Exit status of launch, attach, stop and wait:
  0  the guest shut down (attach: or was detached from)
  1  the command failed, and the message says why
  2  the command line is wrong
 10  the guest reset itself
 11  the guest crashed
 12  the guest was stopped by force
 13  the guest could not be started (launch itself: 1)
 14  the guest did not react to being asked to shut down, and was stopped by force
 15  the guest's component died
 16  the guest ended in a way that this version does not know
124  the time given was over first";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest and connect the terminal to its serial port
    ///
    /// With no kernel, the small guest that is built in. On a terminal, Ctrl-] detaches or stops; with standard output
    /// redirected, it receives the guest's bytes and nothing else.
    Launch(Launch),
    /// Connect the terminal to a guest's serial port; Ctrl-] detaches
    Attach(Attach),
    /// List the guests, those that have ended included
    List(List),
    /// Show what there is to know about a guest
    Info(Named),
    /// Ask a guest to shut down, and wait until it has
    Stop(Stop),
    /// Wait until a guest has ended
    Wait(Wait),
    /// Print what a guest's serial port printed
    Logs(Logs),
    /// Forget a guest that has ended
    Remove {
        /// Name of the guest
        name: String,
    },
    /// Stop all guests by force and end the guest manager
    EndManager,
    /// Print the versions of this program and of the guest manager
    Version(Version),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Launch {
    /// Name of the guest: letters, digits, '.', '_' and '-' [default: the manager chooses]
    pub(crate) name: Option<String>,
    /// Kernel: an ELF image (vmlinux) or a bzImage (vmlinuz)
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line [default: "console=ttyS0" with --kernel]
    #[arg(long, value_name = "STRING")]
    pub(crate) cmdline: Option<String>,
    /// Appended to the command line; may be given several times
    #[arg(long, value_name = "STRING")]
    pub(crate) cmdline_add: Vec<String>,
    /// Memory: MiB, or with a unit (512M, 2G) [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub(crate) memory: Option<i32>,
    /// Number of vCPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) cpus: u8,
    /// Back the guest's memory with transparent huge pages where the host allows it
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Leave the guest running, and a guest manager with it; print its name
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Start even if this layer of the jail is missing on this host (see `guest info`); may be given several times
    #[arg(long, value_name = "LAYER")]
    pub(crate) waive_layer: Vec<String>,
    /// Most memory that the guest and its component may use on the host, in MiB or with a unit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub(crate) limit_memory: Option<i32>,
    /// Most CPU time that it may use, in percent of one CPU
    #[arg(long, value_name = "PERCENT")]
    pub(crate) limit_cpu: Option<u32>,
    /// Most threads that the component may have
    #[arg(long, value_name = "N")]
    pub(crate) limit_tasks: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// Name of the guest
    pub(crate) name: String,
    /// Connect to the serial port (the default, as long as it is the only console)
    #[arg(long)]
    pub(crate) serial: bool,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the guest
    pub(crate) name: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Name of the guest
    pub(crate) name: String,
    /// Stop by force: at once, or with --timeout after the guest had that time to shut down
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Seconds to wait for the guest to shut down [default: 30]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    pub(crate) timeout: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Name of the guest
    pub(crate) name: String,
    /// Seconds to wait at most [default: no limit]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    pub(crate) timeout: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Name of the guest
    pub(crate) name: String,
    /// Go on printing until the guest ends
    #[arg(long, short)]
    pub(crate) follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Version {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads a memory size as MiB: a number of MiB, or a number with one of the units M, MiB, G, GiB, T, TiB.
fn parse_memory(text: &str) -> Result<i32, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let mib: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1 << 10,
        "t" | "tb" | "tib" => 1 << 20,
        _ => return Err(format!("'{unit}' is no unit of memory; M, G and T are (MiB, GiB, TiB)")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a memory size starts with a number: 512M, 2G".to_owned())?;
    let size = number.checked_mul(mib).and_then(|size| i32::try_from(size).ok());
    match size {
        Some(0) => Err("a guest needs some memory".into()),
        Some(size) => Ok(size),
        None => Err(format!(
            "{text} is more than the {} MiB that can be asked for",
            i32::MAX
        )),
    }
}

/// Reads a time in seconds, fractions allowed.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is needed".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_sizes() {
        for (text, mib) in [
            ("128", 128),
            ("512M", 512),
            ("2G", 2048),
            ("1GiB", 1024),
            ("1 T", 1 << 20),
            ("7mb", 7),
        ] {
            assert_eq!(parse_memory(text), Ok(mib), "{text}");
        }
        for text in [
            "",
            "M",
            "0",
            "-1",
            "1.5G",
            "12K",
            "4000000000",
            "99999999999999999999",
            "9999T",
        ] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn seconds() {
        assert_eq!(parse_seconds("0.05"), Ok(Duration::from_millis(50)));
        for text in ["", "x", "-1", "NaN", "inf", "1e30"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }
}
