//! What the commands about devices can be told.

use clap::{Args, Subcommand, ValueEnum};

use super::Named;
use crate::specs;

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
        /// Cut the image: what is behind the new size is lost
        #[arg(long)]
        shrink: bool,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_ports() {
        assert_eq!(parse_console_at("bee"), Ok(("bee".into(), 0)));
        assert_eq!(parse_console_at("bee:3"), Ok(("bee".into(), 3)));
        assert!(parse_console_at("bee:x").is_err());
    }
}
