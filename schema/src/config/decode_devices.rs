//! Reads the devices of a configuration out of a message.
//!
//! Every function takes the descriptors that belong to its part before it refuses anything, so that none stays behind.

use std::{collections::HashMap, hash::Hash};

use super::{
    File, GuestConfig, Handles, MAX_DEVICES, OnPanic,
    decode::{at_most, file, take, text},
    device::{
        AGENT_PORT, Backend, Backing, Balloon, Console, Disk, DiskFormat, DiskMode, Link, Listener, MAX_BACKING,
        MAX_CONSOLE_PORTS, MAX_DISK_ID, MAX_INTERFACE_NAME, MAX_LISTENERS, MAX_MEMORY_ALIGNMENT, MAX_MEMORY_REGION,
        MAX_MTU, MAX_QUEUE_PAIRS, MAX_QUEUE_SIZE, MAX_QUEUES, MAX_SHARES, MAX_SOCKET_PATH, MAX_TAG, MAX_VHOST_USER,
        MAX_VHOST_USER_QUEUES, MIN_CID, MIN_MEMORY_BLOCK, MIN_MTU, MemoryDevice, Network, RateLimit, Rng, Share,
        VhostUser, Vsock, WatchdogAction,
    },
};
use crate::{
    config_capnp::{
        Toggle,
        guest_config::{self, backend, disk, network, rate_limit},
    },
    error::Error,
};

/// Most bytes of a rate or a burst.
const MAX_RATE_BYTES: u64 = 1 << 40;
/// Most operations of a rate or a burst.
const MAX_RATE_OPERATIONS: u64 = 1 << 32;
/// Most queues of a tap that are looked at.
const MAX_TAPS: u32 = MAX_QUEUE_PAIRS as u32;
/// The largest number of a virtio device type that the PCI id of a device has room for (virtio 1.2, section 4.1.2: 0x1040 to 0x107f).
const MAX_DEVICE_TYPE: u16 = 63;

/// What [`GuestConfig`] gets from here.
pub(super) struct Devices {
    disks: Result<Vec<Disk>, Error>,
    networks: Result<Vec<Network>, Error>,
    shares: Result<Vec<Share>, Error>,
    vhost_user: Result<Vec<VhostUser>, Error>,
}

impl Devices {
    /// Reads what has descriptors, of all kinds, whatever is wrong with one of them.
    pub(super) fn take(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Self {
        Self {
            disks: disks(config, handles),
            networks: networks(config, handles),
            shares: shares(config, handles),
            vhost_user: vhost_user(config, handles),
        }
    }

    /// Reads the others, and checks them all together.
    pub(super) fn finish(self, config: guest_config::Reader<'_>, to: &mut GuestConfig) -> Result<(), Error> {
        to.disks = self.disks?;
        to.networks = self.networks?;
        if toggle("defaultNetwork", config.get_default_network())? == Some(true) {
            to.networks.push(Network::new(Link::User));
        }
        to.shares = self.shares?;
        to.vhost_user = self.vhost_user?;
        to.console = console(config)?;
        to.rng = rng(config)?;
        to.balloon = balloon(config)?;
        to.vsock = vsock(config)?;
        to.memory_device = memory_device(config)?;
        to.watchdog = watchdog(config)?;
        to.generation_id = toggle("generationId", config.get_generation_id())? == Some(true);
        to.panic_device = toggle("panicDevice", config.get_panic_device())? == Some(true);
        to.on_panic = on_panic(config, to.panic_device)?;
        to.agent = agent(config, to.vsock.is_some())?;
        let devices = to.bus_devices();
        if devices > MAX_DEVICES as usize {
            let message =
                format!("the guest has {devices} devices on its bus; at most {MAX_DEVICES} of all kinds are possible");
            return Err(bad("devices", message));
        }
        Ok(())
    }
}

fn bad(field: impl Into<String>, message: impl Into<String>) -> Error {
    Error::bad_config(field, message)
}

/// Whether a device is wanted; none: as it is by default.
fn toggle(field: &str, from: Result<Toggle, capnp::NotInSchema>) -> Result<Option<bool>, Error> {
    match from {
        Ok(Toggle::ByDefault) => Ok(None),
        Ok(Toggle::On) => Ok(Some(true)),
        Ok(Toggle::Off) => Ok(Some(false)),
        Err(_) => Err(unknown(field)),
    }
}

pub(super) fn unknown(field: &str) -> Error {
    Error::not_supported(field, format!("{field} has a value that this version does not know"))
}

/// Whether a device that is off by default is wanted. Its other fields must be empty if it is not.
fn wanted(field: &str, from: Result<Toggle, capnp::NotInSchema>, set: &[(&str, bool)]) -> Result<bool, Error> {
    let wanted = toggle(&format!("{field}.enabled"), from)? == Some(true);
    match set.iter().find(|(_, set)| *set && !wanted) {
        Some((name, _)) => Err(bad(
            format!("{field}.{name}"),
            format!("{field}.{name} is set, but {field}.enabled is not on"),
        )),
        None => Ok(wanted),
    }
}

/// Refuses a number past `most`.
fn bounded<T: Copy + PartialOrd + std::fmt::Display>(field: String, seen: T, most: T) -> Result<T, Error> {
    if seen > most {
        let message = format!("{field} is {seen}; at most {most} is possible");
        return Err(bad(field, message));
    }
    Ok(seen)
}

/// Refuses a value that two entries of a list have.
fn unique<T: Hash + Eq>(
    list: &str,
    field: &str,
    values: impl Iterator<Item = (usize, T)>,
    show: impl Fn(&T) -> String,
) -> Result<(), Error> {
    let mut seen = HashMap::new();
    for (i, value) in values {
        if let Some(first) = seen.get(&value) {
            let message = format!("{list}[{i}] has the {field} {} of {list}[{first}]", show(&value));
            return Err(bad(format!("{list}[{i}].{field}"), message));
        }
        seen.insert(value, i);
    }
    Ok(())
}

fn rate(field: &str, from: rate_limit::Reader<'_>) -> Result<RateLimit, Error> {
    let at = |name: &str| format!("{field}.{name}");
    let limit = RateLimit {
        bytes_per_second: bounded(at("bytesPerSecond"), from.get_bytes_per_second(), MAX_RATE_BYTES)?,
        operations_per_second: bounded(
            at("operationsPerSecond"),
            from.get_operations_per_second(),
            MAX_RATE_OPERATIONS,
        )?,
        burst_bytes: bounded(at("burstBytes"), from.get_burst_bytes(), MAX_RATE_BYTES)?,
        burst_operations: bounded(at("burstOperations"), from.get_burst_operations(), MAX_RATE_OPERATIONS)?,
    };
    for (burst, rate, name, needs) in [
        (
            limit.burst_bytes,
            limit.bytes_per_second,
            "burstBytes",
            "bytesPerSecond",
        ),
        (
            limit.burst_operations,
            limit.operations_per_second,
            "burstOperations",
            "operationsPerSecond",
        ),
    ] {
        if burst != 0 && rate == 0 {
            return Err(bad(at(name), format!("{} is set, but {} is not", at(name), at(needs))));
        }
    }
    Ok(limit)
}

fn disks(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Disk>, Error> {
    let list = config.get_disks()?;
    at_most("disks", list.len(), MAX_DEVICES)?;
    let disks: Vec<_> = list
        .iter()
        .enumerate()
        .map(|(i, from)| disk(i, from, handles))
        .collect();
    let disks: Vec<Disk> = disks.into_iter().collect::<Result<_, _>>()?;
    let ids = disks.iter().enumerate().filter(|(_, disk)| !disk.id.is_empty());
    unique("disks", "id", ids.map(|(i, disk)| (i, &disk.id)), |id| {
        format!("\"{id}\"")
    })?;
    Ok(disks)
}

fn disk(i: usize, from: disk::Reader<'_>, handles: &dyn Handles) -> Result<Disk, Error> {
    let at = |name: &str| format!("disks[{i}].{name}");
    let image = file(&at("image"), from.get_image()?, handles);
    let backing = backing(i, from, handles);
    let scratch = file(&at("scratch"), from.get_scratch()?, handles);
    let (image, backing, scratch) = (image?, backing?, scratch?);
    let mode = from.get_mode().map_err(|_| unknown(&at("mode")))?;
    match &image {
        File::None => {
            let message = format!("{} is missing: a disk needs an image", at("image"));
            return Err(bad(at("image"), message));
        }
        File::Bytes(_) | File::Upload(_) if mode == DiskMode::ReadWrite => {
            let message = format!(
                "{} is given by its content, which nobody could read again: use readOnly or volatileWrite, or a file",
                at("image")
            );
            return Err(bad(at("image"), message));
        }
        _ => {}
    }
    match &scratch {
        File::None => {}
        _ if mode != DiskMode::VolatileWrite => {
            let message = format!("{} is set, but only a volatileWrite disk has one", at("scratch"));
            return Err(bad(at("scratch"), message));
        }
        File::Bytes(_) | File::Upload(_) => {
            let message = format!("{} is given by its content; it has to be an empty file", at("scratch"));
            return Err(bad(at("scratch"), message));
        }
        File::Fd(_) | File::Path(_) => {}
    }
    let format = from.get_format().map_err(|_| unknown(&at("format")))?;
    if !backing.is_empty() && format != DiskFormat::Qcow2 {
        let message = format!("{} is set, but only qcow2 images have files below them", at("backing"));
        return Err(bad(at("backing"), message));
    }
    let block_size = from.get_block_size();
    if !matches!(block_size, 0 | 512 | 4096) {
        let message = format!("{} is {block_size}; 512 and 4096 are possible", at("blockSize"));
        return Err(bad(at("blockSize"), message));
    }
    Ok(Disk {
        id: disk_id(&at("id"), from.get_id()?)?,
        image,
        mode,
        format,
        direct: from.get_direct(),
        block_size,
        rate_limit: rate(&at("rateLimit"), from.get_rate_limit()?)?,
        backing,
        queues: bounded(at("queues"), from.get_queues(), MAX_QUEUES)?,
        scratch,
    })
}

fn disk_id(field: &str, from: capnp::text::Reader<'_>) -> Result<String, Error> {
    let id = text(field, from, MAX_DISK_ID)?;
    match id.chars().find(|c| !c.is_ascii_graphic()) {
        Some(c) => Err(bad(
            field,
            format!(
                "{field} has the character '{}'; printable ASCII without blanks is allowed",
                c.escape_default()
            ),
        )),
        None => Ok(id),
    }
}

fn backing(i: usize, from: disk::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Backing>, Error> {
    let field = format!("disks[{i}].backing");
    let files = from.get_backing()?;
    at_most(&field, files.len(), MAX_BACKING)?;
    let taken: Vec<_> = files
        .iter()
        .enumerate()
        .map(|(j, from)| file(&format!("{field}[{j}]"), from, handles))
        .collect();
    let formats = from.get_backing_format()?;
    at_most(&format!("disks[{i}].backingFormat"), formats.len(), files.len())?;
    let mut formats = formats.iter();
    let mut backing = Vec::new();
    for (j, file) in taken.into_iter().enumerate() {
        let file = file?;
        if file.is_none() {
            return Err(bad(format!("{field}[{j}]"), format!("{field}[{j}] names no file")));
        }
        let format = formats.next().unwrap_or(Ok(DiskFormat::Unspecified));
        let format = format.map_err(|_| unknown(&format!("disks[{i}].backingFormat[{j}]")))?;
        backing.push(Backing { file, format });
    }
    Ok(backing)
}

fn networks(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Network>, Error> {
    let list = config.get_networks()?;
    at_most("networks", list.len(), MAX_DEVICES)?;
    let networks: Vec<_> = list
        .iter()
        .enumerate()
        .map(|(i, from)| network(i, from, handles))
        .collect();
    let networks: Vec<Network> = networks.into_iter().collect::<Result<_, _>>()?;
    let macs = networks
        .iter()
        .enumerate()
        .filter_map(|(i, network)| Some((i, network.mac?)));
    unique("networks", "mac", macs, |mac| show_mac(*mac))?;
    Ok(networks)
}

/// An address as people write it.
pub fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn network(i: usize, from: network::Reader<'_>, handles: &dyn Handles) -> Result<Network, Error> {
    let at = |name: &str| format!("networks[{i}].{name}");
    let link = link(i, from, handles)?;
    let mtu = from.get_mtu();
    if mtu != 0 && !(MIN_MTU..=MAX_MTU).contains(&mtu) {
        let message = format!("{} is {mtu}; {MIN_MTU} to {MAX_MTU} are possible", at("mtu"));
        return Err(bad(at("mtu"), message));
    }
    let queue_pairs = bounded(at("queuePairs"), from.get_queue_pairs(), MAX_QUEUE_PAIRS)?;
    let wrong = |message: &str| {
        Err(bad(
            at("queuePairs"),
            format!("{} is {queue_pairs}, {message}", at("queuePairs")),
        ))
    };
    match &link {
        Link::Tap(queues) if queue_pairs != 0 && usize::from(queue_pairs) != queues.len() => {
            return wrong(&format!("but {} descriptors of a tap are given", queues.len()));
        }
        Link::User | Link::Socket(_) if queue_pairs > 1 => return wrong("but only taps have more than one"),
        _ => {}
    }
    Ok(Network {
        mac: mac(&at("mac"), from.get_mac()?)?,
        link,
        mtu,
        rate_limit: rate(&at("rateLimit"), from.get_rate_limit()?)?,
        queue_pairs,
        offloads: toggle(&at("offloads"), from.get_offloads())?,
        link_down: from.get_link_down(),
    })
}

fn mac(field: &str, from: &[u8]) -> Result<Option<[u8; 6]>, Error> {
    if from.is_empty() {
        return Ok(None);
    }
    let Ok(mac) = <[u8; 6]>::try_from(from) else {
        let message = format!("{field} has {} bytes; an Ethernet address has 6", from.len());
        return Err(bad(field, message));
    };
    let why = if mac[0] & 1 != 0 {
        "is a multicast address; a device needs one of its own (an even first byte)"
    } else if mac == [0; 6] {
        "is no address"
    } else {
        return Ok(Some(mac));
    };
    Err(bad(field, format!("{field}: {} {why}", show_mac(mac))))
}

fn link(i: usize, from: network::Reader<'_>, handles: &dyn Handles) -> Result<Link, Error> {
    use network::Which;
    let at = |name: &str| format!("networks[{i}].{name}");
    Ok(match from.which().map_err(|_| unknown(&format!("networks[{i}]")))? {
        Which::User(()) => Link::User,
        Which::Tap(queues) => {
            let queues = queues?;
            at_most(&at("tap"), queues.len(), MAX_TAPS)?;
            if queues.is_empty() {
                return Err(bad(at("tap"), format!("{} has no descriptor", at("tap"))));
            }
            let taken: Vec<_> = queues.iter().map(|queue| take(&at("tap"), queue, handles)).collect();
            Link::Tap(taken.into_iter().collect::<Result<_, _>>()?)
        }
        Which::TapNamed(name) => Link::TapNamed(interface(&at("tapNamed"), name?)?),
        Which::Bridge(name) => {
            let name = interface(&at("bridge"), name?)?;
            if name.is_empty() {
                return Err(bad(
                    at("bridge"),
                    format!("{} is empty; it names a bridge", at("bridge")),
                ));
            }
            Link::Bridge(name)
        }
        Which::Socket(socket) => Link::Socket(take(&at("socket"), socket?, handles)?),
    })
}

/// The name of a network interface, or none. What Linux takes (dev_valid_name), and nothing that would have to be quoted.
fn interface(field: &str, from: capnp::text::Reader<'_>) -> Result<String, Error> {
    let name = text(field, from, MAX_INTERFACE_NAME)?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let why = match name.chars().find(|c| !allowed(*c)) {
        Some(c) => format!(
            "has the character '{}'; letters, digits, '.', '_' and '-' are allowed",
            c.escape_default()
        ),
        None if name.starts_with(['.', '-']) => "must start with a letter, a digit or '_'".to_owned(),
        None => return Ok(name),
    };
    Err(bad(field, format!("{field}: \"{}\" {why}", name.escape_default())))
}

fn console(config: guest_config::Reader<'_>) -> Result<Option<Console>, Error> {
    let from = config.get_console()?;
    let ports = from.get_ports();
    let wanted = wanted("console", from.get_enabled(), &[("ports", ports != 0)])?;
    let ports = bounded("console.ports".to_owned(), ports, MAX_CONSOLE_PORTS)?;
    Ok(wanted.then_some(Console { ports }))
}

fn rng(config: guest_config::Reader<'_>) -> Result<Option<Rng>, Error> {
    let from = config.get_rng()?;
    let rate_limit = rate("rng.rateLimit", from.get_rate_limit()?)?;
    let limited = rate_limit != RateLimit::default();
    let wanted = wanted("rng", from.get_enabled(), &[("rateLimit", limited)])?;
    Ok(wanted.then_some(Rng { rate_limit }))
}

fn balloon(config: guest_config::Reader<'_>) -> Result<Option<Balloon>, Error> {
    let from = config.get_balloon()?;
    let balloon = Balloon {
        deflate_on_oom: from.get_deflate_on_oom(),
        free_page_reporting: from.get_free_page_reporting(),
    };
    let set = [
        ("deflateOnOom", balloon.deflate_on_oom),
        ("freePageReporting", balloon.free_page_reporting),
    ];
    Ok(wanted("balloon", from.get_enabled(), &set)?.then_some(balloon))
}

fn vsock(config: guest_config::Reader<'_>) -> Result<Option<Vsock>, Error> {
    let from = config.get_vsock()?;
    let cid = from.get_cid();
    let listeners = from.get_listeners()?;
    let socket_path = text("vsock.socketPath", from.get_socket_path()?, MAX_SOCKET_PATH)?;
    let set = [
        ("cid", cid != 0),
        ("listeners", !listeners.is_empty()),
        ("socketPath", !socket_path.is_empty()),
    ];
    if !wanted("vsock", from.get_enabled(), &set)? {
        return Ok(None);
    }
    if cid != 0 && (cid < MIN_CID || cid == u32::MAX) {
        let message = format!(
            "vsock.cid is {cid}; {MIN_CID} to {} are possible, 0 leaves the choice to the manager",
            u32::MAX - 1
        );
        return Err(bad("vsock.cid", message));
    }
    at_most("vsock.listeners", listeners.len(), MAX_LISTENERS)?;
    let listeners: Vec<Listener> = listeners
        .iter()
        .enumerate()
        .map(|(i, from)| {
            let at = |name: &str| format!("vsock.listeners[{i}].{name}");
            let port = from.get_port();
            if !from.has_acceptor() {
                return Err(bad(at("acceptor"), format!("{} is missing", at("acceptor"))));
            }
            Ok(Listener {
                port,
                acceptor: from.get_acceptor()?,
            })
        })
        .collect::<Result<_, _>>()?;
    let ports = listeners.iter().enumerate().map(|(i, listener)| (i, listener.port));
    unique("vsock.listeners", "port", ports, u32::to_string)?;
    if !socket_path.is_empty() {
        absolute("vsock.socketPath", &socket_path)?;
    }
    Ok(Some(Vsock {
        cid,
        listeners,
        socket_path,
    }))
}

fn absolute(field: &str, path: &str) -> Result<(), Error> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    let message = format!("{field}: the path \"{}\" is not absolute", path.escape_debug());
    Err(bad(field, message))
}

fn memory_device(config: guest_config::Reader<'_>) -> Result<Option<MemoryDevice>, Error> {
    let from = config.get_memory_device()?;
    let device = MemoryDevice {
        block_size: from.get_block_size(),
        region_size: from.get_region_size(),
        region_alignment: from.get_region_alignment(),
        requested: from.get_requested(),
    };
    let set = [
        ("blockSize", device.block_size != 0),
        ("regionSize", device.region_size != 0),
        ("regionAlignment", device.region_alignment != 0),
        ("requested", device.requested != 0),
    ];
    if !wanted("memoryDevice", from.get_enabled(), &set)? {
        return Ok(None);
    }
    let (block, alignment) = (device.block_size(), device.region_alignment());
    let at = |name: &str| format!("memoryDevice.{name}");
    if !block.is_power_of_two() || !(MIN_MEMORY_BLOCK..=MAX_MEMORY_ALIGNMENT).contains(&block) {
        let message = format!(
            "{} is {block}; a power of two from {MIN_MEMORY_BLOCK} to {MAX_MEMORY_ALIGNMENT} is needed",
            at("blockSize")
        );
        return Err(bad(at("blockSize"), message));
    }
    if !alignment.is_power_of_two() || !(block..=MAX_MEMORY_ALIGNMENT).contains(&alignment) {
        let message = format!(
            "{} is {alignment}; a power of two from the block size to {MAX_MEMORY_ALIGNMENT} is needed",
            at("regionAlignment")
        );
        return Err(bad(at("regionAlignment"), message));
    }
    if device.region_size == 0 {
        return Err(bad(
            at("regionSize"),
            format!("{} is missing: how much can be plugged at most", at("regionSize")),
        ));
    }
    bounded(at("regionSize"), device.region_size, MAX_MEMORY_REGION)?;
    bounded(at("requested"), device.requested, device.region_size)?;
    for (name, bytes) in [("regionSize", device.region_size), ("requested", device.requested)] {
        if bytes % block != 0 {
            let message = format!("{} is {bytes}, no multiple of the block size {block}", at(name));
            return Err(bad(at(name), message));
        }
    }
    Ok(Some(device))
}

fn backend(field: &str, from: backend::Reader<'_>, handles: &dyn Handles) -> Result<Backend, Error> {
    use backend::Which;
    match from.which().map_err(|_| unknown(field))? {
        Which::Socket(socket) => Ok(Backend::Socket(take(field, socket?, handles)?)),
        Which::Path(path) => {
            let path = text(field, path?, libc::PATH_MAX as usize)?;
            absolute(field, &path)?;
            Ok(Backend::Path(path))
        }
    }
}

fn shares(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Share>, Error> {
    let list = config.get_shares()?;
    at_most("shares", list.len(), MAX_SHARES)?;
    let shares: Vec<_> = list
        .iter()
        .enumerate()
        .map(|(i, from)| {
            let at = |name: &str| format!("shares[{i}].{name}");
            let backend = backend(&at("backend"), from.get_backend()?, handles)?;
            let tag = text(&at("tag"), from.get_tag()?, MAX_TAG)?;
            if tag.is_empty() || tag.contains('\0') {
                let message = format!("{} must have 1 to {MAX_TAG} bytes, none of them NUL", at("tag"));
                return Err(bad(at("tag"), message));
            }
            let queues = bounded(at("queues"), from.get_queues(), MAX_QUEUES)?;
            Ok(Share { tag, backend, queues })
        })
        .collect();
    let shares: Vec<Share> = shares.into_iter().collect::<Result<_, Error>>()?;
    let tags = shares.iter().enumerate().map(|(i, share)| (i, &share.tag));
    unique("shares", "tag", tags, |tag| format!("\"{}\"", tag.escape_debug()))?;
    Ok(shares)
}

fn vhost_user(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<VhostUser>, Error> {
    let list = config.get_vhost_user()?;
    at_most("vhostUser", list.len(), MAX_VHOST_USER)?;
    let devices: Vec<_> = list
        .iter()
        .enumerate()
        .map(|(i, from)| {
            let at = |name: &str| format!("vhostUser[{i}].{name}");
            let backend = backend(&at("backend"), from.get_backend()?, handles)?;
            let device_type = from.get_device_type();
            if !(1..=MAX_DEVICE_TYPE).contains(&device_type) {
                let message = format!(
                    "{} is {device_type}; 1 to {MAX_DEVICE_TYPE} are possible",
                    at("deviceType")
                );
                return Err(bad(at("deviceType"), message));
            }
            let queue_size = bounded(at("queueSize"), from.get_queue_size(), MAX_QUEUE_SIZE)?;
            if queue_size != 0 && !queue_size.is_power_of_two() {
                let message = format!("{} is {queue_size}, no power of two", at("queueSize"));
                return Err(bad(at("queueSize"), message));
            }
            Ok(VhostUser {
                device_type,
                backend,
                queues: bounded(at("queues"), from.get_queues(), MAX_VHOST_USER_QUEUES)?,
                queue_size,
            })
        })
        .collect();
    devices.into_iter().collect()
}

fn watchdog(config: guest_config::Reader<'_>) -> Result<Option<WatchdogAction>, Error> {
    let action = config.get_watchdog_action();
    let action = action.map_err(|_| unknown("watchdogAction"))?;
    match toggle("watchdog", config.get_watchdog())? {
        Some(true) => Ok(Some(action)),
        _ if action != WatchdogAction::Reset => {
            Err(bad("watchdogAction", "watchdogAction is set, but watchdog is not on"))
        }
        _ => Ok(None),
    }
}

fn on_panic(config: guest_config::Reader<'_>, panic_device: bool) -> Result<OnPanic, Error> {
    let action = config.get_on_panic().map_err(|_| unknown("onPanic"))?;
    if action != OnPanic::Leave && !panic_device {
        let message = "onPanic is set, but panicDevice, by which a panic is told, is not on";
        return Err(bad("onPanic", message));
    }
    Ok(action)
}

fn agent(config: guest_config::Reader<'_>, vsock: bool) -> Result<bool, Error> {
    match toggle("agent", config.get_agent())? {
        Some(true) if !vsock => {
            let message = format!("agent is on, but vsock, over whose port {AGENT_PORT} it is reached, is not");
            Err(bad("agent", message))
        }
        wish => Ok(wish.unwrap_or(vsock)),
    }
}
