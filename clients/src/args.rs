//! The command line of `guest`.
//!
//! ```text
//!   launch, options, devices, sharing   what the commands with much to say can be told
//!   watching                   what is told to those that watch
//!   looking                    and to those that look into a guest
//!   units                      sizes, times, ranges
//!   help                       the commands in groups, examples, exit statuses
//! ```

mod devices;
mod help;
mod host;
mod launch;
mod looking;
mod options;
mod sharing;
pub(crate) mod units;
mod watching;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{
    Args, CommandFactory, FromArgMatches, Parser, Subcommand,
    builder::{OsStringValueParser, TypedValueParser},
};
use clap_complete::Shell;

use self::units::parse_time;
pub(crate) use self::{
    devices::{BalloonCommand, ConsoleAt, DiskCommand, LinkState, MemCommand, NetCommand, VsockCommand},
    host::{Doctor, Pressure, PressureCommand, PressureSet},
    launch::{Autostart, Define, Launch, Start, Switch},
    looking::{Cpu, CpuOptions, Peek, PeekOptions, PinOptions, PinVcpus, Pinned, Stack, StackOptions},
    options::GuestOptions,
    sharing::{Action, Limits, Redeem, Revoke, Share},
    watching::{Metrics, Sort, Stats, Top},
};
use crate::place::Address;

/// Runs virtual machines, each in a jail of its own.
///
/// Without a running guest manager, `launch` starts a private one that lives as long as the command; a guest that is --durable outlives it.
#[derive(Debug, Parser)]
#[command(name = "guest", version, max_term_width = 100)]
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

impl Cli {
    /// What this program was called with; ends it where that is wrong, or asks for help alone.
    pub(crate) fn read() -> Self {
        let matches = Self::documented().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// The command line, with its help.
    pub(crate) fn documented() -> clap::Command {
        help::add(Self::command())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest and connect the terminal to its serial port
    ///
    /// With no kernel, the small guest that is built in. On a terminal, Ctrl-] detaches or stops; with standard output
    /// redirected, it receives the guest's bytes and nothing else.
    Launch(Box<Launch>),
    /// Connect the terminal to a guest's serial port
    ///
    /// Ctrl-] detaches, and the guest runs on. The exit status tells how it ended, if it does.
    Attach(Attach),
    /// Connect the terminal to a port of a guest's console
    ///
    /// A port of the virtio console, whose guest is told the terminal's size. Ctrl-] detaches, and the guest runs on.
    Console(ConsoleAt),
    /// Keep what a guest is made of, to start it from
    ///
    /// From a file, from options as `launch` has them, or both. The guest manager keeps it across its own restarts and the machine's. Files are named by
    /// paths, and opened when the guest starts; what is missing by now is told as a warning.
    Define(Box<Define>),
    /// Forget a definition; a guest that runs goes on
    Undefine(Name),
    /// Start a guest from its definition
    ///
    /// It goes on without this command. A guest manager is started where none runs.
    Start(Start),
    /// Say whether a guest starts whenever the guest manager does
    Autostart(Autostart),
    /// Print a definition, as the file that would make it again
    Definition(Name),
    /// List the guests: those that run, are defined, or have ended
    List(Json),
    /// Show what there is to know about a guest
    Info(Info),
    /// Print what happens to a guest, or to all, as it happens
    ///
    /// One line an event, cut at 80 columns; --json has all of it. Goes on until the guest has ended.
    Events(Events),
    /// Show what a guest's vCPUs and devices did so far, or all guests'
    #[command(override_usage = "guest stats [--json] <NAME>\n       guest stats [--json] --all")]
    Stats(Stats),
    /// Show what the guests that run use, as it changes
    ///
    /// On a terminal it is live: the keys c, m, d, n, x and a sort (CPU, memory, disks, networks, exits, name), arrows sort and scroll, q
    /// ends. Otherwise it prints a block of text every interval. CPU% is of one host CPU; figures are of the interval before, and a state with
    /// an asterisk is one whose component has not told anything since.
    Top(Top),
    /// Print figures for monitoring (OpenMetrics), or serve them
    ///
    /// With --listen it answers `GET /metrics` on a Unix socket or a port of this machine, until it is ended.
    Metrics(Metrics),
    /// Show the registers of a guest's vCPU
    Registers(Registers),
    /// Print a guest's memory, as it is at this moment
    Peek(Peek),
    /// Show the calls that a vCPU is in, as far as they can be read
    ///
    /// By frame pointers while these lead on, then by what looks like a return address on the stack: marked with a question mark.
    Stack(Stack),
    /// Show a guest's vCPUs, or change its share of the host
    Cpu(Cpu),
    /// Say on which of the host's processors a guest's vCPUs may run
    ///
    /// Holds at once, and when the guest begins again, until it has ended.
    Pin(PinVcpus),
    /// Ask a guest to shut down, and wait until it has
    ///
    /// Says which rung of the ladder it took: asked, forced (its component stopped it), killed (its component did not, and was killed).
    Stop(Stop),
    /// Wait until a guest has ended
    Wait(Wait),
    /// Pause a guest: none of its vCPUs runs
    Pause(Name),
    /// Let a guest that is paused go on
    Resume(Name),
    /// Begin a guest again; what it has in memory is lost
    Reset(Name),
    /// Send a non-maskable interrupt to all vCPUs of a guest
    Nmi(Name),
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
    Remove(Name),
    /// Share a facet of a guest: print a token that others can redeem
    ///
    /// Whoever has the token gets what it permits, and no more, on a connection of their own: `guest redeem TOKEN`. The token is all of standard
    /// output. The share ends with the guest, or by `guest revoke`.
    Share(Share),
    /// List what is shared of a guest
    Shares(Named),
    /// Take back what is shared of a guest, and all that came of it
    Revoke(Revoke),
    /// Use what somebody has shared, by its token
    ///
    /// Without an action, does what the token is for: connects the terminal to a serial port or console, shows what an observer sees, or the
    /// figures. Any other token needs an action, and is not used up when that is missing or does not fit.
    Redeem(Redeem),
    /// Show who this is to the guest manager, and what it permits
    Whoami(Json),
    /// Stop all guests by force and end the guest manager
    EndManager(EndManager),
    /// Say what the host offers, what is missing, and how to get it
    ///
    /// The exit status is 1 if something keeps guests from being started. Where no guest manager runs, one is started for the look.
    Doctor(Doctor),
    /// Show or change what is done when the host runs short of memory
    ///
    /// Guests with a balloon that nobody has set by hand lend some of their memory then, and get it back later.
    Pressure(Pressure),
    /// Print the versions of this program and of the guest manager
    Version(Json),
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
pub(crate) struct Attach {
    /// Name of the guest
    pub(crate) name: String,
    /// Connect to the serial port (the default, as long as it is the only console)
    #[arg(long)]
    pub(crate) serial: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Json {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Name of the guest
    pub(crate) name: String,
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
pub(crate) struct Info {
    /// Name of the guest
    pub(crate) name: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Print a configuration file that would make this guest again
    #[arg(long, conflicts_with = "json")]
    pub(crate) toml: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EndManager {
    /// Leave the guests that are durable to the next guest manager, and stop only the others
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: StopOptions,
}

#[derive(Debug, Args)]
pub(crate) struct StopOptions {
    /// Stop by force: at once, or with --timeout after the guest had that time to shut down
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Stop by force at once, without asking
    #[arg(long, short, conflicts_with_all = ["force", "timeout"])]
    pub(crate) kill: bool,
    /// How long to wait for the guest to shut down: 90, 30s, 2m [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) timeout: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Name of the guest [default: all guests]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) options: EventOptions,
}

#[derive(Debug, Args)]
pub(crate) struct EventOptions {
    /// Begin with so many of the last events that are kept, at most 1024 [default: 0; with --no-follow all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1024))]
    pub(crate) replay: Option<u32>,
    /// Go on until the guest has ended, which is the default
    #[arg(long, short, overrides_with = "no_follow")]
    pub(crate) follow: bool,
    /// Print what has happened so far, and no more
    #[arg(long)]
    pub(crate) no_follow: bool,
    /// Print JSON, a line an event
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Registers {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: RegisterOptions,
}

#[derive(Debug, Args)]
pub(crate) struct RegisterOptions {
    /// The vCPU, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) vcpu: u8,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: WaitOptions,
}

#[derive(Debug, Args)]
pub(crate) struct WaitOptions {
    /// How long to wait at most: 90, 30s, 2m [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
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
pub(crate) struct Exec {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: ExecOptions,
}

#[derive(Debug, Args)]
pub(crate) struct ExecOptions {
    /// Run it on a terminal of its own
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Added to its environment; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Where to run it
    #[arg(long, value_name = "FOLDER")]
    pub(crate) cwd: Option<String>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::documented().debug_assert();
    }

    #[test]
    fn following_is_the_default_and_the_last_word_counts() {
        let follows = |arguments: &[&str]| {
            let all = ["guest", "events"].iter().chain(arguments);
            match Cli::try_parse_from(all).map(|cli| cli.command) {
                Ok(Command::Events(events)) => !events.options.no_follow,
                other => panic!("{other:?}"),
            }
        };
        assert!(follows(&[]) && follows(&["--follow"]) && follows(&["--no-follow", "--follow"]));
        assert!(!follows(&["--no-follow"]));
    }
}
