//! Reads the devices of a configuration out of a message. Those that come in lists are read by modules of their own; what all have in common, and the devices
//! of which a guest has one, are here.
//!
//! Every function takes the descriptors that belong to its part before it refuses anything, so that none stays behind.

mod disks;
mod networks;
mod vhost_user;

use std::{collections::HashMap, hash::Hash};

use super::{
    GuestConfig, Handles, MAX_DEVICES, OnPanic,
    decode::{absolute, at_most, text},
    device::{
        AGENT_PORT, Balloon, Console, Disk, Link, Listener, MAX_CONSOLE_PORTS, MAX_LISTENERS, MAX_MEMORY_ALIGNMENT,
        MAX_MEMORY_REGION, MAX_SOCKET_PATH, MIN_CID, MIN_MEMORY_BLOCK, MemoryDevice, Network, RateLimit, Rng, Share,
        VhostUser, Vsock, WatchdogAction,
    },
};
use crate::{
    config_capnp::{
        Toggle,
        guest_config::{self, rate_limit},
    },
    error::Error,
};

pub use networks::show_mac;

/// Most bytes of a rate or a burst.
const MAX_RATE_BYTES: u64 = 1 << 40;
/// Most operations of a rate or a burst.
const MAX_RATE_OPERATIONS: u64 = 1 << 32;

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
            disks: disks::disks(config, handles),
            networks: networks::networks(config, handles),
            shares: vhost_user::shares(config, handles),
            vhost_user: vhost_user::vhost_user(config, handles),
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

fn console(config: guest_config::Reader<'_>) -> Result<Option<Console>, Error> {
    let from = config.get_console()?;
    let set = [
        ("ports", from.get_ports() != 0),
        ("consolePorts", from.get_console_ports() != 0),
    ];
    let wanted = wanted("console", from.get_enabled(), &set)?;
    let console = Console {
        ports: bounded("console.ports".to_owned(), from.get_ports(), MAX_CONSOLE_PORTS)?,
        console_ports: from.get_console_ports(),
    };
    if console.console_ports > console.ports() {
        let message = format!(
            "console.consolePorts is {}, and console.ports {}",
            console.console_ports,
            console.ports()
        );
        return Err(bad("console.consolePorts", message));
    }
    Ok(wanted.then_some(console))
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
