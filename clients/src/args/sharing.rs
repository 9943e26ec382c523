//! What can be said about handing capabilities on.

use std::time::Duration;

use clap::{Args, Subcommand};
use sepal_schema::facet::{self, CallRate, FacetKind, Range, Right};

use super::{
    CpuOptions, EventOptions, ExecOptions, LinkState, PeekOptions, PinOptions, RegisterOptions, StackOptions,
    StopOptions, WaitOptions,
    units::{parse_lifetime, parse_range, parse_rate},
};
use crate::specs;

#[derive(Debug, Args)]
pub(crate) struct Share {
    /// Name of the guest
    pub(crate) name: String,
    /// What of it: guest, serial, console, power, balloon, memory, disk, network, vsock, agent, observer, stats, debug or cpu
    #[arg(value_name = "FACET", value_parser = parse_kind)]
    pub(crate) kind: FacetKind,
    /// The console's port
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) port: u32,
    #[command(flatten)]
    pub(crate) bounds: Limits,
    /// The first who redeems it uses it up
    #[arg(long)]
    pub(crate) once: bool,
    /// Only this user can redeem it: a number or a name
    #[arg(long, value_name = "USER")]
    pub(crate) uid: Option<String>,
    /// For people, shown by `guest shares`
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) label: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is left of a capability when it is shared.
#[derive(Debug, Args)]
#[command(next_help_heading = "What is left of it [default: all]")]
pub(crate) struct Limits {
    /// These rights alone: observe, output, input, shutdown, kill, pause, reset, nmi, balloon, memory, disk, network, connect, listen, agent,
    /// debug, share
    #[arg(long, value_name = "RIGHT,...", value_delimiter = ',', value_parser = parse_right)]
    pub(crate) only: Vec<Right>,
    /// It ends after this time, a second at least: 90s, 15m, 8h, 2d
    #[arg(long, value_name = "TIME", value_parser = parse_lifetime)]
    pub(crate) expires: Option<Duration>,
    /// So many changes a second, BURST of them at once after a rest
    #[arg(long, value_name = "N[/BURST]", value_parser = parse_rate)]
    pub(crate) rate: Option<CallRate>,
    /// Sizes that the balloon may be set to: 0..64M
    #[arg(long, value_name = "MIN..MAX", value_parser = parse_range)]
    pub(crate) balloon: Option<Range>,
    /// Sizes that may be plugged: 0..1G
    #[arg(long, value_name = "MIN..MAX", value_parser = parse_range)]
    pub(crate) memory: Option<Range>,
    /// These vsock ports alone
    #[arg(long, value_name = "PORT,...", value_delimiter = ',')]
    pub(crate) ports: Vec<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Name of the guest
    pub(crate) name: String,
    /// The share, by its number in `guest shares`, or all
    #[arg(value_name = "ID|all", value_parser = parse_share)]
    pub(crate) share: u64,
}

#[derive(Debug, Args)]
#[command(
    subcommand_value_name = "ACTION",
    subcommand_help_heading = "Actions, each for the tokens that it fits"
)]
pub(crate) struct Redeem {
    /// The token, as `guest share` printed it
    pub(crate) token: String,
    #[command(subcommand)]
    pub(crate) action: Option<Action>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Show what it permits, and until when
    Describe {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Connect the terminal (serial, console, guest); Ctrl-] detaches
    Attach,
    /// Print what a port has printed (serial, console, observer, guest)
    Read {
        /// Go on printing until the guest ends
        #[arg(long, short)]
        follow: bool,
    },
    /// Show what there is to know (observer, guest)
    Info {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what happens (observer, guest)
    Events(EventOptions),
    /// Wait until the guest has ended; the exit status tells how (observer, guest)
    Wait(WaitOptions),
    /// Show the figures (stats, observer, guest)
    Stats {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask the guest to shut down, and do not wait (power, guest)
    Shutdown,
    /// Ask the guest to shut down, and wait until it has (power, guest)
    Stop(StopOptions),
    /// Stop it by force at once (power, guest)
    Kill,
    /// Pause it (power, guest)
    Pause,
    /// Let it go on (power, guest)
    Resume,
    /// Begin it again (power, guest)
    Reset,
    /// Send a non-maskable interrupt to its vCPUs (power, guest)
    Nmi,
    /// Show the size (balloon, memory)
    Size {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Set the size (balloon, memory)
    Set {
        /// Bytes, or with a unit (64M, 1G)
        #[arg(value_parser = specs::parse_bytes)]
        size: u64,
    },
    /// List the disks (disk, guest)
    Disks {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a disk another size (disk, guest)
    Resize {
        /// The disk, by its name (disk0) or id
        disk: String,
        /// Bytes, or with a unit; 0 takes over the size that the image has by now
        #[arg(value_parser = specs::parse_bytes)]
        size: u64,
        /// Cut the image: what is behind the new size is lost
        #[arg(long)]
        shrink: bool,
    },
    /// List the network devices (network, guest)
    Networks {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Plug a cable in or out (network, guest)
    Link {
        /// The device: net0, ...
        network: String,
        /// What the link is to be
        state: LinkState,
    },
    /// Connect to a port of the guest (vsock, guest)
    Connect {
        /// The guest's port
        port: u32,
    },
    /// Serve a connection of the guest to a port of the host (vsock, guest)
    Listen {
        /// The host's port
        port: u32,
    },
    /// Run a program in the guest (agent, guest)
    Exec(ExecOptions),
    /// Show a vCPU's registers (debug, guest)
    Registers(RegisterOptions),
    /// Print memory (debug, guest)
    Peek(PeekOptions),
    /// Show the calls that a vCPU is in (debug, guest)
    Stack(StackOptions),
    /// Show what the vCPUs do, or change their share of the host (cpu, guest)
    Cpus(CpuOptions),
    /// Say where vCPUs may run (cpu, guest)
    Pin(PinOptions),
}

fn parse_kind(text: &str) -> Result<FacetKind, String> {
    facet::kind_of(text).ok_or_else(|| {
        let names: Vec<_> = facet::KINDS.map(facet::kind_name).into();
        format!("'{text}' is no facet; these are: {}", names.join(", "))
    })
}

fn parse_right(text: &str) -> Result<Right, String> {
    facet::right_of(text).ok_or_else(|| {
        let names: Vec<_> = facet::RIGHTS.map(facet::right_name).into();
        format!("'{text}' is no right; these are: {}", names.join(", "))
    })
}

/// Reads the number of a share; 0 stands for all.
fn parse_share(text: &str) -> Result<u64, String> {
    match (text, text.parse()) {
        ("all", _) => Ok(0),
        (_, Ok(id @ 1u64..)) => Ok(id),
        _ => Err(format!(
            "'{text}' is no share; a number that `guest shares` shows is, or all"
        )),
    }
}
