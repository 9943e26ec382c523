//! What the commands about the host can be told.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::units::parse_time;

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Print JSON, with all of KVM's capabilities
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Pressure {
    #[command(subcommand)]
    pub(crate) command: Option<PressureCommand>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PressureCommand {
    /// Change the policy; what is left out stays as it is
    Set(PressureSet),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct PressureSet {
    /// Take memory from guests with balloons when the host runs short of it
    #[arg(long, conflicts_with = "off")]
    pub(crate) on: bool,
    /// Take none, and give back at once what is taken
    #[arg(long)]
    pub(crate) off: bool,
    /// Pressure begins when tasks of the host stall for memory this share of the time, in percent, 1 to 100
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) stall: Option<u8>,
    /// The time in which that is measured, 500ms to 10s
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) window: Option<Duration>,
    /// How much of a guest's memory is taken or given back at a time, in percent, 1 to 50
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=50))]
    pub(crate) step: Option<u8>,
    /// What each guest keeps at least of its memory, in percent, 10 to 100
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(10..=100))]
    pub(crate) reserve: Option<u8>,
    /// How long there has to be no pressure before each step that is given back, at most 1h
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) calm: Option<Duration>,
}
