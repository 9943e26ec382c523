//! What those commands can be told that look into a guest, and where its vCPUs run.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use sepal_schema::config::Pin;

use crate::specs::{parse_bytes, parse_pin};

/// Most frames of a stack.
const MOST_FRAMES: i64 = 256;

#[derive(Debug, Args)]
pub(crate) struct Cpu {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: CpuOptions,
}

#[derive(Debug, Args)]
pub(crate) struct CpuOptions {
    /// Let the guest have so much of the host's processors when others want them too: 1 to 10000, default for the host's own (100)
    #[arg(long, value_name = "N", value_parser = parse_weight)]
    pub(crate) weight: Option<u32>,
    /// Let the guest have so much of the host's processors at most, in percent of one: 150, or none
    #[arg(long, value_name = "PERCENT", value_parser = parse_limit)]
    pub(crate) limit: Option<u32>,
    /// Print JSON
    #[arg(long, conflicts_with_all = ["weight", "limit"])]
    pub(crate) json: bool,
}

/// Which vCPUs are to run where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pinned {
    /// None: all of them.
    pub(crate) vcpu: Option<u8>,
    /// None: on all processors that the guest may use.
    pub(crate) cpus: Vec<u16>,
}

#[derive(Debug, Args)]
pub(crate) struct PinVcpus {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: PinOptions,
}

#[derive(Debug, Args)]
pub(crate) struct PinOptions {
    /// Run a vCPU, or all, on these processors of the host only: 0=2, 1=0-3,8, all=4; 0=all lifts it [default: show what holds]
    #[arg(value_name = "VCPU=CPUS", value_parser = parse_pinned)]
    pub(crate) pins: Vec<Pinned>,
}

#[derive(Debug, Args)]
pub(crate) struct Peek {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: PeekOptions,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("space").args(["virtually", "physical", "translate"])), group(ArgGroup::new("form").args(["raw", "hex"])))]
pub(crate) struct PeekOptions {
    /// Where: 0x and hexadecimal digits, 16 hexadecimal digits, or a decimal number
    #[arg(value_parser = parse_address)]
    pub(crate) address: u64,
    /// How many bytes: 256, 4K
    #[arg(value_name = "LENGTH", default_value = "64", value_parser = parse_bytes)]
    pub(crate) length: u64,
    /// A virtual address, as the vCPU sees it at this moment (the default)
    #[arg(long = "virtual")]
    pub(crate) virtually: bool,
    /// A physical address
    #[arg(long)]
    pub(crate) physical: bool,
    /// Say where the virtual address leads, instead of what is there
    #[arg(long, conflicts_with = "form")]
    pub(crate) translate: bool,
    /// The vCPU, from 0
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "physical")]
    pub(crate) vcpu: u8,
    /// Print the bytes as they are
    #[arg(long)]
    pub(crate) raw: bool,
    /// Print them in hexadecimal, 16 a line, with their addresses (the default)
    #[arg(long)]
    pub(crate) hex: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Stack {
    /// Name of the guest
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: StackOptions,
}

#[derive(Debug, Args)]
pub(crate) struct StackOptions {
    /// The vCPU, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) vcpu: u8,
    /// Names the addresses: System.map of the guest's kernel, or what its /proc/kallsyms says
    #[arg(long, value_name = "FILE")]
    pub(crate) symbols: Option<PathBuf>,
    /// Print so many calls at most
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=MOST_FRAMES))]
    pub(crate) frames: u16,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_weight(text: &str) -> Result<u32, String> {
    match (text, text.parse()) {
        ("default", _) => Ok(0),
        (_, Ok(weight @ 1..=10_000)) => Ok(weight),
        _ => Err(format!("'{text}' is no weight; 1 to 10000 are, and default")),
    }
}

fn parse_limit(text: &str) -> Result<u32, String> {
    match (text, text.strip_suffix('%').unwrap_or(text).parse()) {
        ("none", _) => Ok(0),
        (_, Ok(percent @ 1..=100_000)) => Ok(percent),
        _ => Err(format!("'{text}' is no limit; 1 to 100000 percent are, and none")),
    }
}

fn parse_pinned(text: &str) -> Result<Pinned, String> {
    let (vcpu, cpus) = text
        .split_once('=')
        .ok_or_else(|| format!("'{text}' is no pin; VCPU=CPUS is, as 0=2, 1=0-3,8 or all=all"))?;
    // What a pin of a configuration cannot be: of all vCPUs, and to all processors.
    let number = if vcpu == "all" { "0" } else { vcpu };
    let Pin { vcpu: index, cpus } = match cpus {
        "all" => Pin {
            cpus: Vec::new(),
            ..parse_pin(&format!("{number}=0"))?
        },
        cpus => parse_pin(&format!("{number}={cpus}"))?,
    };
    Ok(Pinned {
        vcpu: (vcpu != "all").then_some(index),
        cpus,
    })
}

fn parse_address(text: &str) -> Result<u64, String> {
    let hexadecimal = text.strip_prefix("0x").or((text.len() == 16).then_some(text));
    let address = match hexadecimal {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    address.ok_or_else(|| format!("'{text}' is no address; 0xffffffff81000000, ffffffff81000000 and 4096 are"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, address) in [
            ("0xffffffff81000000", 0xffff_ffff_8100_0000),
            ("ffffffff81000000", 0xffff_ffff_8100_0000),
            ("0000000000001000", 0x1000),
            ("4096", 4096),
            ("0x0", 0),
        ] {
            assert_eq!(parse_address(text), Ok(address), "{text}");
        }
        for text in ["", "0x", "ffff", "-1", "0x1ffffffffffffffff", "99999999999999999999999"] {
            assert!(parse_address(text).unwrap_err().contains("no address"), "{text}");
        }
    }

    #[test]
    fn pins_of_vcpus_that_are_there_already() {
        let pinned = |vcpu, cpus: &[u16]| {
            Ok(Pinned {
                vcpu,
                cpus: cpus.to_vec(),
            })
        };
        assert_eq!(parse_pinned("1=0-3,8"), pinned(Some(1), &[0, 1, 2, 3, 8]));
        assert_eq!(parse_pinned("all=4"), pinned(None, &[4]));
        assert_eq!(parse_pinned("3=all"), pinned(Some(3), &[]));
        assert_eq!(parse_pinned("all=all"), pinned(None, &[]));
        for text in ["", "1", "x=1", "256=all", "1=", "1=x"] {
            assert!(parse_pinned(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shares_of_the_host() {
        assert_eq!((parse_weight("default"), parse_weight("200")), (Ok(0), Ok(200)));
        assert_eq!(
            (parse_limit("none"), parse_limit("150"), parse_limit("150%")),
            (Ok(0), Ok(150), Ok(150))
        );
        for text in ["", "0", "-1", "10001", "x"] {
            assert!(parse_weight(text).is_err(), "{text}");
        }
        for text in ["", "0", "100001", "x", "none%"] {
            assert!(parse_limit(text).is_err(), "{text}");
        }
    }
}
