//! The command line of `guest`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use clap_complete::Shell;
use sepal_schema::config::{
    OnPanic, OnReset,
    device::{Balloon, Console, MemoryDevice, Rng, WatchdogAction},
};

use crate::place::Address;
use crate::specs::{self, DiskSpec, NetSpec, ShareSpec, VhostUserSpec, VsockSpec};

/// Runs virtual machines, each in a jail of its own.
///
/// Without a running guest manager, `launch` starts a private one that lives as long as the guest.
#[derive(Debug, Parser)]
#[command(name = "guest", version, max_term_width = 100, after_help = EXIT_STATUS)]
pub(crate) struct Cli {
    /// The guest manager: PATH or unix:PATH of its socket, or ssh://[USER@]HOST[:PORT][/PATH] on another machine [default: the user's own]
    #[arg(long, global = true, value_name = "ADDRESS", env = "SEPAL_MANAGER", hide_env_values = true,
          value_parser = OsStringValueParser::new().try_map(Address::parse))]
    pub(crate) manager: Option<Address>,
    /// The program to run instead of ssh for ssh:// addresses
    #[arg(
        long,
        global = true,
        value_name = "PROGRAM",
        env = "SEPAL_SSH",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub(crate) ssh: Option<OsString>,

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
    Launch(Box<Launch>),
    /// Connect the terminal to a guest's serial port; Ctrl-] detaches
    Attach(Attach),
    /// Connect the terminal to a port of a guest's virtio console; Ctrl-] detaches
    Console(ConsoleAt),
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
    /// Show and change how much memory a guest lends back to the host
    #[command(subcommand)]
    Balloon(BalloonCommand),
    /// Show and change how much memory is plugged into a guest
    #[command(subcommand)]
    Mem(MemCommand),
    /// Show and resize a guest's disks
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Show a guest's network devices, plug their cables in and out
    #[command(subcommand)]
    Net(NetCommand),
    /// Connect standard input and output to a guest's vsock
    #[command(subcommand)]
    Vsock(VsockCommand),
    /// Run a program in a guest that has an agent
    ///
    /// The exit status is the program's; 128 and its number if a signal killed it.
    Exec(Exec),
    /// Copy a file into a guest that has an agent, or out of it
    Cp {
        /// The file: PATH here, or NAME:PATH in a guest
        from: String,
        /// Where to: NAME:PATH in a guest, or PATH here
        to: String,
    },
    /// Forget a guest that has ended
    Remove {
        /// Name of the guest
        name: String,
    },
    /// Stop all guests by force and end the guest manager
    EndManager,
    /// Print the versions of this program and of the guest manager
    Version(Version),
    /// Connect standard input and output to the guest manager of this machine, for a `guest` on another
    #[command(hide = true)]
    Relay(Relay),
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
    /// What becomes of a guest that resets itself: stop (the default), restart or pause (restarted, but paused before its first instruction)
    #[arg(long, value_name = "ACTION", value_parser = specs::parse_on_reset)]
    pub(crate) on_reset: Option<OnReset>,
    /// What becomes of a guest whose kernel panics: leave (it to the guest; the default), stop, restart or pause; implies --panic-device
    #[arg(long, value_name = "ACTION", value_parser = specs::parse_on_panic)]
    pub(crate) on_panic: Option<OnPanic>,
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
    #[command(flatten)]
    pub(crate) devices: Devices,
}

/// The devices of a guest to be launched. In a specification, a comma that belongs to a name is written twice.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub(crate) struct Devices {
    /// A disk: FILE, then ro, rw or volatile; id=ID, format=raw or format=qcow2, direct, queues=N, block-size=N, bps=N, iops=N, burst-bytes=N,
    /// burst-ops=N; and for qcow2 the files below it, nearest first: backing=FILE and backing-format=FORMAT
    ///
    /// All with commas between. rw is the default; with volatile, what the guest writes is forgotten when it stops. May be given several times.
    #[arg(long = "disk", value_name = "FILE[,...]", value_parser = specs::parse_disk)]
    pub(crate) disks: Vec<DiskSpec>,
    /// A network device: user, tap, tap=NAME or bridge=NAME, then mac=ADDRESS, mtu=N, queues=N, offloads=on or off, link=up or down, bps=N,
    /// iops=N, burst-bytes=N, burst-ops=N, with commas between
    ///
    /// user needs no privilege: the guest reaches out, nobody reaches in. May be given several times.
    #[arg(long = "net", value_name = "KIND[,...]", value_parser = specs::parse_net)]
    pub(crate) networks: Vec<NetSpec>,
    /// A virtio console, of one port or this many (1 to 32)
    #[arg(long, value_name = "PORTS", num_args = 0..=1, require_equals = true, default_missing_value = "1", value_parser = specs::parse_console)]
    pub(crate) console: Option<Console>,
    /// An entropy source, of 1 MiB a second or [bps=N]
    #[arg(long, value_name = "LIMIT", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = specs::parse_rng)]
    pub(crate) rng: Option<Rng>,
    /// A balloon: [deflate-on-oom][,reporting]
    #[arg(long, value_name = "FLAGS", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = specs::parse_balloon)]
    pub(crate) balloon: Option<Balloon>,
    /// No balloon, which is the default
    #[arg(long, conflicts_with = "balloon")]
    pub(crate) no_balloon: bool,
    /// A socket device (vsock): [CID][,socket=PATH]; PATH offers it as a Unix socket to clients that say "CONNECT <port>"
    #[arg(long, value_name = "CID[,...]", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = specs::parse_vsock)]
    pub(crate) vsock: Option<VsockSpec>,
    /// Do not talk to the agent in the guest, which is done over vsock where there is one
    #[arg(long, requires = "vsock")]
    pub(crate) no_agent: bool,
    /// Memory that can be plugged while the guest runs: SIZE[,requested=SIZE][,block=SIZE]
    #[arg(long, value_name = "SIZE[,...]", value_parser = specs::parse_memory_device)]
    pub(crate) memory_device: Option<MemoryDevice>,
    /// A folder that virtiofsd serves at SOCKET, and the guest mounts by TAG: TAG=SOCKET[,queues=N]; may be given several times
    #[arg(long = "share", value_name = "TAG=SOCKET", value_parser = specs::parse_share)]
    pub(crate) shares: Vec<ShareSpec>,
    /// Another device that a process serves at SOCKET: TYPE=SOCKET[,queues=N][,queue-size=N]; may be given several times
    #[arg(long = "vhost-user", value_name = "TYPE=SOCKET", value_parser = specs::parse_vhost_user)]
    pub(crate) vhost_user: Vec<VhostUserSpec>,
    /// A watchdog, and what it does when it expires: reset (the default), stop or none
    #[arg(long, value_name = "ACTION", num_args = 0..=1, require_equals = true, default_missing_value = "reset", value_parser = specs::parse_watchdog)]
    pub(crate) watchdog: Option<WatchdogAction>,
    /// A device by which the guest's kernel tells that it has panicked
    #[arg(long)]
    pub(crate) panic_device: bool,
    /// A device that tells the guest when it is not the same machine any more
    #[arg(long)]
    pub(crate) generation_id: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Run it on a terminal of its own
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Added to its environment; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Where to run it
    #[arg(long, value_name = "FOLDER")]
    pub(crate) cwd: Option<String>,
    /// Name of the guest
    pub(crate) name: String,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleAt {
    /// Name of the guest, and of the port if it is not the first: NAME or NAME:PORT
    #[arg(value_name = "NAME[:PORT]", value_parser = parse_console_at)]
    pub(crate) at: (String, u32),
}

/// Reads a guest's name and a port of its console.
fn parse_console_at(text: &str) -> Result<(String, u32), String> {
    match text.split_once(':') {
        None => Ok((text.to_owned(), 0)),
        Some((name, port)) => match port.parse() {
            Ok(port) => Ok((name.to_owned(), port)),
            Err(_) => Err(format!("'{port}' is no port of a console; 0 to 31 are")),
        },
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum BalloonCommand {
    /// Ask a guest to lend this much memory back to the host
    Set {
        /// Name of the guest
        name: String,
        /// Bytes, or with a unit (64M, 1G); 0 gives all back to the guest
        #[arg(value_parser = specs::parse_bytes)]
        size: u64,
    },
    /// Show the balloon's size and what the guest says about its memory
    Stats(Named),
}

#[derive(Debug, Subcommand)]
pub(crate) enum MemCommand {
    /// Show how much memory is plugged, requested and possible
    Show(Named),
    /// Ask a guest to have this much memory plugged
    Request {
        /// Name of the guest
        name: String,
        /// Bytes, or with a unit; a multiple of the block size
        #[arg(value_parser = specs::parse_bytes)]
        size: u64,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// List a guest's disks
    List(Named),
    /// Give a disk another size, and tell the guest
    Resize {
        /// Name of the guest
        name: String,
        /// The disk, by its name (disk0) or id
        disk: String,
        /// Bytes, or with a unit; 0 takes over the size that the image has by now
        #[arg(value_parser = specs::parse_bytes)]
        size: u64,
    },
    /// Show what the disks have read and written
    Stats(Named),
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// List a guest's network devices
    List(Named),
    /// Plug the cable of a network device in or out
    Link {
        /// Name of the guest
        name: String,
        /// The device: net0, ...
        network: String,
        /// What the link is to be
        state: LinkState,
    },
    /// Show what the network devices have sent and received
    Stats(Named),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LinkState {
    /// Plugged in
    Up,
    /// Plugged out
    Down,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VsockCommand {
    /// Connect to a port of the guest
    Connect {
        /// Name of the guest
        name: String,
        /// The guest's port
        port: u32,
    },
    /// Wait until the guest connects to a port of the host, and serve that connection
    Listen {
        /// Name of the guest
        name: String,
        /// The host's port
        port: u32,
    },
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
pub(crate) struct Relay {
    /// Where the guest manager listens [default: the user's own socket]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Where none runs, start one that ends with the connection
    #[arg(long, conflicts_with = "start")]
    pub(crate) private: bool,
    /// Where none runs, start one that stays
    #[arg(long)]
    pub(crate) start: bool,
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
    fn devices() {
        let launch = |arguments: &[&str]| {
            let all = ["guest", "launch"].iter().chain(arguments);
            match Cli::try_parse_from(all).map(|cli| cli.command) {
                Ok(Command::Launch(launch)) => Ok(launch.devices),
                Ok(_) => panic!("another command"),
                Err(error) => Err(error.to_string()),
            }
        };
        let all = [
            "--disk",
            "a,ro",
            "--disk",
            "b",
            "--net",
            "user",
            "--console",
            "--rng",
            "--balloon=reporting",
            "--vsock",
        ];
        let devices = launch(&all).unwrap();
        assert_eq!((devices.disks.len(), devices.networks.len()), (2, 1));
        assert_eq!(devices.console, Some(Console { ports: 1 }));
        assert!(devices.rng.is_some() && devices.vsock.is_some() && devices.watchdog.is_none());
        assert_eq!(launch(&["--console=3"]).unwrap().console, Some(Console { ports: 3 }));
        assert_eq!(
            launch(&["--watchdog=stop"]).unwrap().watchdog,
            Some(WatchdogAction::Stop)
        );
        assert!(
            launch(&["--balloon", "--no-balloon"])
                .unwrap_err()
                .contains("cannot be used with")
        );
        assert!(launch(&["--no-agent"]).unwrap_err().contains("--vsock"));
        assert!(
            launch(&["--disk", "a,read-only"])
                .unwrap_err()
                .contains("'read-only' is not known here")
        );
    }

    #[test]
    fn console_ports() {
        assert_eq!(parse_console_at("bee"), Ok(("bee".into(), 0)));
        assert_eq!(parse_console_at("bee:3"), Ok(("bee".into(), 3)));
        assert!(parse_console_at("bee:x").is_err());
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
