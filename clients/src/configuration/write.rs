//! A guest as the text of a configuration file, which says no more than it has to.

use anyhow::{Context, Result};
use sepal_schema::config::{
    File, GuestConfig, Limits, OnPanic, OnReset, Pin, Restart, RestartPolicy,
    device::{
        Backend, Backing, Balloon, Console, Disk, DiskFormat, DiskMode, Link, MemoryDevice, Network, RateLimit, Rng,
        Share, VhostUser, Vsock, WatchdogAction,
    },
    show_mac,
};
use serde::Serialize;

use crate::specs::{DEVICE_TYPES, restart_policy_name, show_cpus};

/// The files of a guest that have no name, by the protocol's names: those in `missing`, and those that are given by their content.
pub(crate) fn nameless(config: &GuestConfig, missing: &[String]) -> Vec<String> {
    let mut nameless = missing.to_vec();
    let mut look = |field: String, file: &File| match file {
        File::None | File::Path(_) => {}
        File::Fd(_) | File::Bytes(_) | File::Upload(_) if nameless.contains(&field) => {}
        File::Fd(_) | File::Bytes(_) | File::Upload(_) => nameless.push(field),
    };
    look("kernel".into(), &config.kernel);
    look("initrd".into(), &config.initrd);
    for (i, disk) in config.disks.iter().enumerate() {
        look(format!("disks[{i}].image"), &disk.image);
        look(format!("disks[{i}].scratch"), &disk.scratch);
        for (j, backing) in disk.backing.iter().enumerate() {
            look(format!("disks[{i}].backing[{j}]"), &backing.file);
        }
    }
    nameless
}

/// Writes a guest; `autostart` is whether it starts with its guest manager. Fields that `missing` names ([`nameless`]) are not known: they are left out,
/// and a comment says so. `there` is whether the guest manager's paths are those of another machine.
///
/// # Errors
/// A number is too large for TOML.
pub(crate) fn write(config: &GuestConfig, autostart: bool, missing: &[String], there: bool) -> Result<String> {
    let writer = Writer { missing, there };
    let mut text = String::new();
    for field in missing {
        text.push_str(&format!(
            "# has no name that could be written down: {}\n",
            field.escape_debug()
        ));
    }
    let written = writer.guest(config, autostart);
    text.push_str(&toml::to_string(&written).context("writing the configuration")?);
    Ok(text)
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Guest {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    uuid: Option<String>,
    instance_id: Option<String>,
    cpus: Option<u8>,
    memory: Option<String>,
    #[serde(skip_serializing_if = "is_off")]
    huge_pages: bool,
    #[serde(skip_serializing_if = "is_off")]
    protected: bool,
    kernel: Option<String>,
    initrd: Option<String>,
    cmdline: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cmdline_add: Vec<String>,
    on_reset: Option<&'static str>,
    on_panic: Option<&'static str>,
    watchdog: Option<&'static str>,
    #[serde(skip_serializing_if = "is_off")]
    panic_device: bool,
    #[serde(skip_serializing_if = "is_off")]
    generation_id: bool,
    agent: Option<bool>,
    #[serde(skip_serializing_if = "is_off")]
    durable: bool,
    #[serde(skip_serializing_if = "is_off")]
    autostart: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waive_layers: Vec<String>,
    restart: Option<RestartTable>,
    limits: Option<LimitsTable>,
    console: Option<ConsoleTable>,
    rng: Option<Rates>,
    balloon: Option<BalloonTable>,
    vsock: Option<VsockTable>,
    memory_device: Option<MemoryTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pin: Vec<PinTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disk: Vec<DiskTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<NetTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    share: Vec<ShareTable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    vhost_user: Vec<VhostUserTable>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct RestartTable {
    policy: &'static str,
    attempts: Option<u32>,
    delay: Option<String>,
    max_delay: Option<String>,
    healthy: Option<String>,
}

#[derive(Serialize)]
struct LimitsTable {
    memory: Option<String>,
    cpu: Option<u32>,
    weight: Option<u32>,
    tasks: Option<u32>,
}

#[derive(Serialize)]
struct ConsoleTable {
    ports: Option<u16>,
    consoles: Option<u16>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Rates {
    bps: Option<Size>,
    iops: Option<Size>,
    burst_bytes: Option<Size>,
    burst_ops: Option<Size>,
}

/// A number, with a unit where that is shorter.
#[derive(Serialize)]
#[serde(untagged)]
enum Size {
    Number(u64),
    Unit(String),
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct BalloonTable {
    deflate_on_oom: bool,
    reporting: bool,
}

#[derive(Serialize)]
struct VsockTable {
    cid: Option<u32>,
    socket: Option<String>,
}

#[derive(Serialize)]
struct MemoryTable {
    size: Size,
    requested: Option<Size>,
    block: Option<Size>,
    alignment: Option<Size>,
}

#[derive(Serialize)]
struct PinTable {
    vcpu: u8,
    cpus: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DiskTable {
    file: Option<String>,
    mode: &'static str,
    id: Option<String>,
    format: Option<&'static str>,
    #[serde(skip_serializing_if = "is_off")]
    direct: bool,
    queues: Option<u16>,
    block_size: Option<u32>,
    scratch: Option<String>,
    #[serde(flatten)]
    rates: Rates,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    backing: Vec<BackingTable>,
}

#[derive(Serialize)]
struct BackingTable {
    file: Option<String>,
    format: Option<&'static str>,
}

#[derive(Serialize)]
struct NetTable {
    kind: Option<&'static str>,
    name: Option<String>,
    mac: Option<String>,
    mtu: Option<u16>,
    queues: Option<u16>,
    offloads: Option<bool>,
    link: Option<&'static str>,
    #[serde(flatten)]
    rates: Rates,
}

#[derive(Serialize)]
struct ShareTable {
    tag: String,
    socket: Option<String>,
    queues: Option<u16>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct VhostUserTable {
    #[serde(rename = "type")]
    device_type: DeviceType,
    socket: Option<String>,
    queues: Option<u16>,
    queue_size: Option<u16>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum DeviceType {
    Name(&'static str),
    Number(u16),
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_off(flag: &bool) -> bool {
    !flag
}

/// What is not the default, which is 0.
fn set<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

fn size(bytes: u64) -> Size {
    for (unit, shift) in [("T", 40), ("G", 30), ("M", 20), ("K", 10)] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return Size::Unit(format!("{}{unit}", bytes >> shift));
        }
    }
    Size::Number(bytes)
}

fn mib(mib: u64) -> String {
    match mib % 1024 {
        0 => format!("{}G", mib / 1024),
        _ => format!("{mib}M"),
    }
}

fn time(milliseconds: u32) -> Option<String> {
    match (milliseconds, milliseconds % 1000) {
        (0, _) => None,
        (milliseconds, 0) => Some(format!("{}s", milliseconds / 1000)),
        (milliseconds, _) => Some(format!("{milliseconds}ms")),
    }
}

fn rates(limit: &RateLimit) -> Rates {
    Rates {
        bps: set(limit.bytes_per_second).map(size),
        iops: set(limit.operations_per_second).map(Size::Number),
        burst_bytes: set(limit.burst_bytes).map(size),
        burst_ops: set(limit.burst_operations).map(Size::Number),
    }
}

fn format(format: DiskFormat) -> Option<&'static str> {
    match format {
        DiskFormat::Unspecified => None,
        DiskFormat::Raw => Some("raw"),
        DiskFormat::Qcow2 => Some("qcow2"),
    }
}

struct Writer<'a> {
    missing: &'a [String],
    there: bool,
}

impl Writer<'_> {
    fn is_missing(&self, field: &str) -> bool {
        self.missing.iter().any(|missing| missing == field)
    }

    /// The name of a file as it is read; none for what has no name.
    fn file(&self, field: &str, file: &File) -> Option<String> {
        match file {
            File::Path(_) if self.is_missing(field) => None,
            File::Path(path) if self.there => Some(format!("path:{path}")),
            File::Path(path) => Some(path.clone()),
            File::None | File::Fd(_) | File::Bytes(_) | File::Upload(_) => None,
        }
    }

    fn guest(&self, config: &GuestConfig, autostart: bool) -> Guest {
        let linux = !config.kernel.is_none();
        let all = |list: &[Disk]| list.iter().enumerate().map(|(i, disk)| self.disk(i, disk)).collect();
        Guest {
            name: config.name.clone(),
            uuid: config.uuid.map(|uuid| uuid.to_string()),
            instance_id: config
                .instance_id
                .map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect()),
            cpus: set(config.cpus),
            memory: u64::try_from(config.memory_mib).ok().and_then(set).map(mib),
            huge_pages: config.huge_pages,
            protected: config.protected_vm,
            kernel: self.file("kernel", &config.kernel),
            initrd: self.file("initrd", &config.initrd),
            // A kernel without one would get what its kind needs.
            cmdline: (linux || !config.cmdline.is_empty()).then(|| config.cmdline.clone()),
            cmdline_add: config.cmdline_add.clone(),
            on_reset: match config.on_reset {
                OnReset::Stop => None,
                OnReset::Restart => Some("restart"),
                OnReset::Pause => Some("pause"),
            },
            on_panic: match config.on_panic {
                OnPanic::Leave => None,
                OnPanic::Stop => Some("stop"),
                OnPanic::Restart => Some("restart"),
                OnPanic::Pause => Some("pause"),
            },
            watchdog: config.watchdog.map(|action| match action {
                WatchdogAction::Reset => "reset",
                WatchdogAction::Stop => "stop",
                WatchdogAction::None => "none",
            }),
            panic_device: config.panic_device,
            generation_id: config.generation_id,
            agent: (config.vsock.is_some() && !config.agent).then_some(false),
            durable: config.durable,
            autostart,
            waive_layers: config.waived_layers.clone(),
            restart: restart(&config.restart),
            limits: limits(&config.limits),
            console: config.console.as_ref().map(console),
            rng: config.rng.as_ref().map(|Rng { rate_limit }| rates(rate_limit)),
            balloon: config.balloon.as_ref().map(balloon),
            vsock: config.vsock.as_ref().map(vsock),
            memory_device: config.memory_device.as_ref().map(memory_device),
            pin: config.pins.iter().map(pin).collect(),
            disk: all(&config.disks),
            net: config
                .networks
                .iter()
                .enumerate()
                .map(|(i, net)| self.network(i, net))
                .collect(),
            share: config
                .shares
                .iter()
                .enumerate()
                .map(|(i, share)| self.share(i, share))
                .collect(),
            vhost_user: config
                .vhost_user
                .iter()
                .enumerate()
                .map(|(i, device)| self.vhost_user(i, device))
                .collect(),
        }
    }

    fn disk(&self, i: usize, disk: &Disk) -> DiskTable {
        let at = |name: &str| format!("disks[{i}].{name}");
        let below = |(j, backing): (usize, &Backing)| BackingTable {
            file: self.file(&at(&format!("backing[{j}]")), &backing.file),
            format: format(backing.format),
        };
        DiskTable {
            file: self.file(&at("image"), &disk.image),
            mode: match disk.mode {
                DiskMode::ReadWrite => "rw",
                DiskMode::ReadOnly => "ro",
                DiskMode::VolatileWrite => "volatile",
            },
            id: set(disk.id.clone()),
            format: format(disk.format),
            direct: disk.direct,
            queues: set(disk.queues),
            block_size: set(disk.block_size),
            scratch: self.file(&at("scratch"), &disk.scratch),
            rates: rates(&disk.rate_limit),
            backing: disk.backing.iter().enumerate().map(below).collect(),
        }
    }

    fn network(&self, i: usize, network: &Network) -> NetTable {
        let (kind, name) = match &network.link {
            Link::User => (Some("user"), None),
            Link::TapNamed(name) => (Some("tap"), set(name.clone())),
            Link::Bridge(name) => (Some("bridge"), Some(name.clone())),
            Link::Tap(_) | Link::Socket(_) => (None, None),
        };
        let unknown = ["tap", "socket"]
            .iter()
            .any(|end| self.is_missing(&format!("networks[{i}].{end}")));
        NetTable {
            kind: kind.filter(|_| !unknown),
            name,
            mac: network.mac.map(show_mac),
            mtu: set(network.mtu),
            queues: set(network.queue_pairs),
            offloads: network.offloads,
            link: network.link_down.then_some("down"),
            rates: rates(&network.rate_limit),
        }
    }

    fn backend(&self, field: String, backend: &Backend) -> Option<String> {
        match backend {
            Backend::Path(path) if !self.is_missing(&field) => Some(path.clone()),
            Backend::Path(_) | Backend::Socket(_) => None,
        }
    }

    fn share(&self, i: usize, share: &Share) -> ShareTable {
        ShareTable {
            tag: share.tag.clone(),
            socket: self.backend(format!("shares[{i}].backend"), &share.backend),
            queues: set(share.queues),
        }
    }

    fn vhost_user(&self, i: usize, device: &VhostUser) -> VhostUserTable {
        let name = DEVICE_TYPES.iter().find(|(_, number)| *number == device.device_type);
        VhostUserTable {
            device_type: name.map_or(DeviceType::Number(device.device_type), |(name, _)| {
                DeviceType::Name(name)
            }),
            socket: self.backend(format!("vhostUser[{i}].backend"), &device.backend),
            queues: set(device.queues),
            queue_size: set(device.queue_size),
        }
    }
}

fn restart(restart: &Restart) -> Option<RestartTable> {
    let table = RestartTable {
        policy: restart_policy_name(restart.policy),
        attempts: set(restart.attempts),
        delay: time(restart.delay_ms),
        max_delay: time(restart.max_delay_ms),
        healthy: time(restart.healthy_ms),
    };
    (restart.policy != RestartPolicy::Never || *restart != Restart::default()).then_some(table)
}

fn limits(limits: &Limits) -> Option<LimitsTable> {
    (*limits != Limits::default()).then(|| LimitsTable {
        memory: set(limits.memory_mib).map(mib),
        cpu: set(limits.cpu_percent),
        weight: set(limits.cpu_weight),
        tasks: set(limits.tasks),
    })
}

fn console(console: &Console) -> ConsoleTable {
    ConsoleTable {
        ports: set(console.ports),
        consoles: set(console.console_ports),
    }
}

fn balloon(balloon: &Balloon) -> BalloonTable {
    BalloonTable {
        deflate_on_oom: balloon.deflate_on_oom,
        reporting: balloon.free_page_reporting,
    }
}

fn vsock(vsock: &Vsock) -> VsockTable {
    VsockTable {
        cid: set(vsock.cid),
        socket: set(vsock.socket_path.clone()),
    }
}

fn memory_device(device: &MemoryDevice) -> MemoryTable {
    MemoryTable {
        size: size(device.region_size),
        requested: set(device.requested).map(size),
        block: set(device.block_size).map(size),
        alignment: set(device.region_alignment).map(size),
    }
}

fn pin(pin: &Pin) -> PinTable {
    PinTable {
        vcpu: pin.vcpu,
        cpus: show_cpus(&pin.cpus),
    }
}
