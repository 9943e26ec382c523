//! What `stats`, `top` and `metrics` can be told.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::units::parse_time;
use crate::metrics::listen::Listen;

#[derive(Debug, Args)]
pub(crate) struct Stats {
    /// Name of the guest
    #[arg(required_unless_present = "all")]
    pub(crate) name: Option<String>,
    /// Show all guests that run, a line each
    #[arg(long, conflicts_with = "name")]
    pub(crate) all: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What the guests are sorted by: names from the first on, all else from the most on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// CPU time of the vCPUs
    Cpu,
    /// Memory on the host
    Mem,
    /// Bytes read and written
    Disk,
    /// Bytes received and sent
    Net,
    /// Exits
    Exits,
    /// Name
    Name,
}

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// What comes first
    #[arg(long, value_name = "KEY", value_enum, default_value_t = Sort::Cpu)]
    pub(crate) sort: Sort,
    /// How often to look: 1s, 500ms
    #[arg(long, short, value_name = "TIME", default_value = "1s", value_parser = parse_interval)]
    pub(crate) interval: Duration,
    /// Print one block of text, for what happens within an interval, and end
    #[arg(long, conflicts_with = "batch")]
    pub(crate) once: bool,
    /// Print so many blocks of text, and end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch: Option<u32>,
    /// Print JSON, a line a block
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Metrics {
    /// Serve them over HTTP, on a Unix socket or a port of this machine alone: unix:PATH, 127.0.0.1:PORT or [::1]:PORT
    #[arg(long, value_name = "ADDRESS", value_parser = Listen::parse)]
    pub(crate) listen: Option<Listen>,
}

/// Reads how often something is to be done: not so often that looking is all that happens.
fn parse_interval(text: &str) -> Result<Duration, String> {
    match parse_time(text)? {
        time if time < Duration::from_millis(100) => Err("it must be at least 100ms".to_owned()),
        time if time > Duration::from_secs(86_400) => Err("it must be at most 1d".to_owned()),
        time => Ok(time),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        assert_eq!(parse_interval("0.1"), Ok(Duration::from_millis(100)));
        for text in ["0", "99ms", "2d", "x"] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }
}
