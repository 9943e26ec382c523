//! What a guest can be made of, as the options of `guest launch` and `guest define`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use sepal_schema::config::{
    INSTANCE_ID, OnPanic, OnReset, Pin, Restart, Uuid,
    device::{Balloon, Console, MemoryDevice, Rng, WatchdogAction},
};

use super::units::parse_memory;
use crate::specs::{self, DiskSpec, NetSpec, ShareSpec, VhostUserSpec, VsockSpec};

/// The options that can name a kernel, for those that need one.
pub(super) const KERNEL_SOURCE: &str = "kernel-source";
/// The options that can make a socket device.
pub(super) const VSOCK_SOURCE: &str = "vsock-source";

/// A guest, as far as it is said. What is not, is as a configuration file says, or as it is by default.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new(KERNEL_SOURCE).multiple(true)), group(ArgGroup::new(VSOCK_SOURCE).multiple(true)))]
pub(crate) struct GuestOptions {
    /// Kernel: an ELF image (vmlinux) or a bzImage (vmlinuz)
    #[arg(long, value_name = "FILE", group = KERNEL_SOURCE)]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM file system of the kernel
    #[arg(long, value_name = "FILE", requires = KERNEL_SOURCE)]
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
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) cpus: Option<u8>,
    /// Back the guest's memory with transparent huge pages where the host allows it
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// What becomes of a guest that resets itself: stop (the default), restart or pause (restarted, but paused before its first instruction)
    #[arg(long, value_name = "ACTION", value_parser = specs::parse_on_reset)]
    pub(crate) on_reset: Option<OnReset>,
    /// What becomes of a guest whose kernel panics: leave (it to the guest; the default), stop, restart or pause; implies --panic-device
    #[arg(long, value_name = "ACTION", value_parser = specs::parse_on_panic)]
    pub(crate) on_panic: Option<OnPanic>,
    /// Begin the guest again when it ends by itself: never (the default), on-failure or always, then attempts=N, delay=TIME, max-delay=TIME,
    /// healthy=TIME, with commas between
    ///
    /// After so many failed runs in a row (5) it is given up; the waits between them double from the first delay (100ms) to the longest (30s), and a run of
    /// the time that healthy= tells (10s) ends the row.
    #[arg(long, value_name = "POLICY[,...]", value_parser = specs::parse_restart)]
    pub(crate) restart: Option<Restart>,
    /// The guest goes on when its manager ends, and the next manager takes it over
    #[arg(long)]
    pub(crate) durable: bool,
    /// Where a vCPU may run: VCPU=CPUS, as 0=2 or 1=0-3,8; may be given several times
    #[arg(long = "pin", value_name = "VCPU=CPUS", value_parser = specs::parse_pin)]
    pub(crate) pins: Vec<Pin>,
    /// What tells the guest from all others of its manager [default: the manager makes one]
    #[arg(long, value_name = "UUID", value_parser = specs::parse_uuid)]
    pub(crate) uuid: Option<Uuid>,
    /// Hide the guest's memory from the host, which must be able to
    #[arg(long)]
    pub(crate) protected: bool,
    /// Start even if this layer of the jail is missing on this host (see `guest info`); may be given several times
    #[arg(long, value_name = "LAYER")]
    pub(crate) waive_layer: Vec<String>,
    /// Most memory that the guest and its component may use on the host, in MiB or with a unit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub(crate) limit_memory: Option<i32>,
    /// Most CPU time that it may use, in percent of one CPU
    #[arg(long, value_name = "PERCENT")]
    pub(crate) limit_cpu: Option<u32>,
    /// Its share of CPU time relative to others, 1 to 10000
    #[arg(long, value_name = "WEIGHT", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) limit_weight: Option<u32>,
    /// Most threads that the component may have
    #[arg(long, value_name = "N")]
    pub(crate) limit_tasks: Option<u32>,
    #[command(flatten)]
    pub(crate) devices: Devices,
}

/// The devices of a guest. In a specification, a comma that belongs to a name is written twice.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub(crate) struct Devices {
    /// A disk: FILE, then ro, rw or volatile; id=ID, format=raw or format=qcow2, direct, queues=N, block-size=N, bps=N, iops=N, burst-bytes=N,
    /// burst-ops=N; and for qcow2 the files below it, nearest first: backing=FILE and backing-format=FORMAT
    ///
    /// All with commas between. rw is the default; with volatile, what the guest writes is forgotten when it stops; it is kept in scratch=FILE, which is empty
    /// at first, or where the guest manager keeps such. May be given several times.
    #[arg(long = "disk", value_name = "FILE[,...]", value_parser = specs::parse_disk)]
    pub(crate) disks: Vec<DiskSpec>,
    /// A network device: user, tap, tap=NAME or bridge=NAME, then mac=ADDRESS, mtu=N, queues=N, offloads=on or off, link=up or down, bps=N,
    /// iops=N, burst-bytes=N, burst-ops=N, with commas between
    ///
    /// user needs no privilege: the guest reaches out, nobody reaches in. May be given several times.
    #[arg(long = "net", value_name = "KIND[,...]", value_parser = specs::parse_net)]
    pub(crate) networks: Vec<NetSpec>,
    /// A virtio console: [PORTS][,consoles=N], of one port or this many (1 to 32), of which the first, or the first N, are terminals to the guest
    #[arg(long, value_name = "PORTS[,...]", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = specs::parse_console)]
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
    #[arg(long, value_name = "CID[,...]", group = VSOCK_SOURCE, num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = specs::parse_vsock)]
    pub(crate) vsock: Option<VsockSpec>,
    /// Do not talk to the agent in the guest, which is done over vsock where there is one
    #[arg(long, requires = VSOCK_SOURCE)]
    pub(crate) no_agent: bool,
    /// Memory that can be plugged while the guest runs: SIZE[,requested=SIZE][,block=SIZE][,alignment=SIZE]
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
    /// A device that tells the guest, across restarts, which one it is: 128 hexadecimal digits
    #[arg(long, value_name = "HEX", value_parser = specs::parse_instance_id)]
    pub(crate) instance_id: Option<[u8; INSTANCE_ID]>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn devices() {
        let launch = |arguments: &[&str]| {
            let all = ["guest", "launch"].iter().chain(arguments);
            match Cli::try_parse_from(all).map(|cli| cli.command) {
                Ok(Command::Launch(launch)) => Ok(launch.options.devices),
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
        assert_eq!(devices.console, Some(Console::default()));
        assert!(devices.rng.is_some() && devices.vsock.is_some() && devices.watchdog.is_none());
        assert_eq!(
            launch(&["--console=3"]).unwrap().console.map(|console| console.ports),
            Some(3)
        );
        assert_eq!(
            launch(&["--watchdog=stop"]).unwrap().watchdog,
            Some(WatchdogAction::Stop)
        );
        assert!(
            launch(&["--balloon", "--no-balloon"])
                .unwrap_err()
                .contains("cannot be used with")
        );
        assert!(
            launch(&["--disk", "a,read-only"])
                .unwrap_err()
                .contains("'read-only' is not known here")
        );
    }
}
