//! What a configuration file says about devices.

use sepal_schema::config::{
    File, GuestConfig,
    device::{
        Backend, Backing, Balloon, Console, Disk, DiskFormat, DiskMode, Link, MAX_CONSOLE_PORTS, MAX_MTU,
        MAX_QUEUE_PAIRS, MAX_QUEUE_SIZE, MAX_QUEUES, MAX_VHOST_USER_QUEUES, MIN_CID, MIN_MTU, MemoryDevice, Network,
        RateLimit, Rng, Share, VhostUser, Vsock,
    },
};

use super::section::Section;
use crate::specs;

/// Reads them all.
pub(super) fn read(guest: &Section<'_>, to: &mut GuestConfig) {
    to.disks = guest.sections("disk", "disks").iter().filter_map(disk).collect();
    to.networks = guest.sections("net", "networks").iter().filter_map(network).collect();
    to.shares = guest.sections("share", "shares").iter().filter_map(share).collect();
    let others = guest.sections("vhost-user", "vhostUser");
    to.vhost_user = others.iter().filter_map(vhost_user).collect();
    to.console = guest.device("console", "console").map(|console| Console {
        ports: console
            .number("ports", "ports", 1..=MAX_CONSOLE_PORTS.into())
            .unwrap_or(0),
        console_ports: console
            .number("consoles", "consolePorts", 1..=MAX_CONSOLE_PORTS.into())
            .unwrap_or(0),
    });
    to.rng = guest.device("rng", "rng").map(|rng| Rng { rate_limit: rate(&rng) });
    to.balloon = guest.device("balloon", "balloon").map(|balloon| Balloon {
        deflate_on_oom: balloon.flag("deflate-on-oom", "deflateOnOom").unwrap_or_default(),
        free_page_reporting: balloon.flag("reporting", "freePageReporting").unwrap_or_default(),
    });
    to.vsock = guest.device("vsock", "vsock").map(|vsock| Vsock {
        cid: vsock
            .number("cid", "cid", MIN_CID.into()..=u64::from(u32::MAX) - 1)
            .unwrap_or(0),
        listeners: Vec::new(),
        socket_path: vsock.socket("socket", "socketPath").unwrap_or_default(),
    });
    to.memory_device = guest
        .section("memory-device", "memoryDevice")
        .and_then(|device| memory_device(&device));
}

fn rate(device: &Section<'_>) -> RateLimit {
    let bytes = |key, field: &str| device.bytes(key, &format!("rateLimit.{field}")).unwrap_or(0);
    RateLimit {
        bytes_per_second: bytes("bps", "bytesPerSecond"),
        operations_per_second: bytes("iops", "operationsPerSecond"),
        burst_bytes: bytes("burst-bytes", "burstBytes"),
        burst_operations: bytes("burst-ops", "burstOperations"),
    }
}

fn disk(from: &Section<'_>) -> Option<Disk> {
    let file = from.needed("file", |key| from.file(key, "image"));
    let disk = Disk {
        id: from.text("id", "id").unwrap_or_default(),
        image: File::None,
        mode: from
            .word("mode", "mode", specs::parse_mode)
            .unwrap_or(DiskMode::ReadWrite),
        format: from
            .word("format", "format", specs::parse_format)
            .unwrap_or(DiskFormat::Unspecified),
        direct: from.flag("direct", "direct").unwrap_or_default(),
        block_size: from.number("block-size", "blockSize", 512..=4096).unwrap_or(0),
        rate_limit: rate(from),
        backing: from
            .texts_or_sections("backing", "backing")
            .into_iter()
            .filter_map(backing)
            .collect(),
        queues: from.number("queues", "queues", 1..=MAX_QUEUES.into()).unwrap_or(0),
        scratch: from.file("scratch", "scratch").map_or(File::None, File::Path),
    };
    let image = File::Path(file?);
    Some(Disk { image, ..disk })
}

fn backing(from: Result<String, Section<'_>>) -> Option<Backing> {
    let below = |name, format| Backing {
        file: File::Path(name),
        format,
    };
    match from {
        Ok(name) => Some(below(name, DiskFormat::Unspecified)),
        Err(section) => {
            let format = section.word("format", "", specs::parse_format);
            let name = section.needed("file", |key| section.file(key, ""))?;
            Some(below(name, format.unwrap_or(DiskFormat::Unspecified)))
        }
    }
}

fn network(from: &Section<'_>) -> Option<Network> {
    let link = link(from);
    let rest = Network {
        mac: from.word("mac", "mac", specs::parse_mac),
        mtu: from.number("mtu", "mtu", MIN_MTU.into()..=MAX_MTU.into()).unwrap_or(0),
        rate_limit: rate(from),
        queue_pairs: from
            .number("queues", "queuePairs", 1..=MAX_QUEUE_PAIRS.into())
            .unwrap_or(0),
        offloads: from.flag("offloads", "offloads"),
        link_down: from.word("link", "linkDown", specs::parse_link).unwrap_or_default(),
        link: Link::User,
    };
    Some(Network { link: link?, ..rest })
}

/// What is at the other end: its kind, and its name where it has one.
fn link(from: &Section<'_>) -> Option<Link> {
    let kind = from.needed("kind", |key| {
        from.word(key, "kind", |kind| match kind {
            "user" | "tap" | "bridge" => Ok(kind.to_owned()),
            _ => Err(format!("'{kind}' is no network; user, tap and bridge are")),
        })
    });
    let name = from.text(
        "name",
        if kind.as_deref() == Some("bridge") {
            "bridge"
        } else {
            "tapNamed"
        },
    );
    match (kind?.as_str(), name) {
        ("tap", name) => Some(Link::TapNamed(name.unwrap_or_default())),
        ("bridge", Some(name)) => Some(Link::Bridge(name)),
        ("bridge", None) => {
            if from.is_empty_of("name") {
                from.wrong("a network of the kind bridge needs the bridge's 'name'");
            }
            None
        }
        (_, Some(_)) => {
            from.wrong("a network of the kind user has no 'name'");
            None
        }
        (_, None) => Some(Link::User),
    }
}

fn memory_device(from: &Section<'_>) -> Option<MemoryDevice> {
    let size = from.needed("size", |key| from.bytes(key, "regionSize"));
    let device = MemoryDevice {
        block_size: from.bytes("block", "blockSize").unwrap_or(0),
        region_size: 0,
        region_alignment: from.bytes("alignment", "regionAlignment").unwrap_or(0),
        requested: from.bytes("requested", "requested").unwrap_or(0),
    };
    Some(MemoryDevice {
        region_size: size?,
        ..device
    })
}

fn share(from: &Section<'_>) -> Option<Share> {
    let tag = from.needed("tag", |key| from.text(key, "tag"));
    let socket = from.needed("socket", |key| from.socket(key, "backend"));
    let queues = from.number("queues", "queues", 1..=MAX_QUEUES.into()).unwrap_or(0);
    Some(Share {
        tag: tag?,
        backend: Backend::Path(socket?),
        queues,
    })
}

fn vhost_user(from: &Section<'_>) -> Option<VhostUser> {
    let device_type = from.needed("type", |key| {
        from.number_or_word(key, "deviceType", 0..=u16::MAX.into(), specs::parse_device_type)
    });
    let socket = from.needed("socket", |key| from.socket(key, "backend"));
    let queues = from.number("queues", "queues", 1..=MAX_VHOST_USER_QUEUES.into());
    let queue_size = from.number("queue-size", "queueSize", 1..=MAX_QUEUE_SIZE.into());
    Some(VhostUser {
        device_type: device_type?,
        backend: Backend::Path(socket?),
        queues: queues.unwrap_or(0),
        queue_size: queue_size.unwrap_or(0),
    })
}
