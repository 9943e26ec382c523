//! What device options of the command line mean: `FILE,ro,id=root` and the like, read into values, with errors that say what is wrong.
//!
//! A specification is a list of words with commas between; a comma that belongs to a word is written twice. The first word is what the device is
//! about, the others are flags or `key=value`.

mod disks;
mod upkeep;

use std::path::PathBuf;

use sepal_schema::config::{
    INSTANCE_ID, OnPanic, OnReset,
    device::{Balloon, Console, MAX_CONSOLE_PORTS, MemoryDevice, RateLimit, Rng, WatchdogAction},
};

pub(crate) use disks::{DiskSpec, parse_disk, parse_format, parse_mode};
pub(crate) use upkeep::{
    parse_cpus, parse_milliseconds, parse_pin, parse_restart, parse_restart_policy, parse_uuid, restart_policy_name,
    show_cpus,
};

/// What is at the other end of a network device of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LinkSpec {
    User,
    Tap(String),
    Bridge(String),
}

/// A network device of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetSpec {
    pub(crate) link: LinkSpec,
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) mtu: u16,
    pub(crate) queues: u16,
    pub(crate) offloads: Option<bool>,
    pub(crate) link_down: bool,
    pub(crate) rate_limit: RateLimit,
}

/// A socket device of the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct VsockSpec {
    pub(crate) cid: u32,
    pub(crate) socket: Option<PathBuf>,
}

/// A share of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareSpec {
    pub(crate) tag: String,
    pub(crate) socket: PathBuf,
    pub(crate) queues: u16,
}

/// Another device that a process serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VhostUserSpec {
    pub(crate) device_type: u16,
    pub(crate) socket: PathBuf,
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
}

/// The words of a specification.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c != ',' {
            // There always is a last word.
            words.last_mut().into_iter().for_each(|word| word.push(c));
        } else if rest.next_if_eq(&',').is_some() {
            words.last_mut().into_iter().for_each(|word| word.push(','));
        } else {
            words.push(String::new());
        }
    }
    words
}

/// The first word, and the others as keys and values; flags have none.
fn split(text: &str) -> (String, Vec<(String, Option<String>)>) {
    let mut words = words(text).into_iter();
    let first = words.next().unwrap_or_default();
    let option = |word: String| match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (word, None),
    };
    (first, words.map(option).collect())
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{key}={value}: a number is needed, and one that is not too large"))
}

fn unknown(key: &str, value: Option<&str>, known: &str) -> String {
    match value {
        Some(value) => format!("'{key}={value}' is not known here; known are {known}"),
        None => format!("'{key}' is not known here; known are {known}"),
    }
}

/// Reads a size in bytes: a number, or a number with one of the units K, M, G, T (of 1024).
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("'{text}' is no size: a size starts with a number, as 512M or 2G do"))?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("'{unit}' is no unit; K, M, G and T are (KiB, MiB, GiB, TiB)")),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is more than can be said"))
}

/// Takes a rate limit's keys; whether `key` is one of them.
fn rate(limit: &mut RateLimit, key: &str, value: Option<&str>) -> Result<bool, String> {
    let to = match key {
        "bps" => &mut limit.bytes_per_second,
        "iops" => &mut limit.operations_per_second,
        "burst-bytes" => &mut limit.burst_bytes,
        "burst-ops" => &mut limit.burst_operations,
        _ => return Ok(false),
    };
    let value = value.ok_or_else(|| format!("{key} needs a value: {key}=10M"))?;
    *to = parse_bytes(value).map_err(|error| format!("{key}={value}: {error}"))?;
    Ok(true)
}

/// Reads six bytes in hexadecimal, with colons between.
pub(crate) fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let byte = |part: &str| match part.len() {
        2 => u8::from_str_radix(part, 16).ok(),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("'{text}' is no address; one looks like 02:00:5e:10:00:01"))
}

/// Reads whether a link is down at first.
pub(crate) fn parse_link(text: &str) -> Result<bool, String> {
    match text {
        "up" => Ok(false),
        "down" => Ok(true),
        _ => Err(format!("a link is up or down, not '{text}'")),
    }
}

/// Reads `user|tap[=NAME]|bridge=NAME[,mac=..][,mtu=N][,queues=N][,offloads=on|off][,link=up|down][,bps=..]`.
pub(crate) fn parse_net(text: &str) -> Result<NetSpec, String> {
    const KNOWN: &str = "mac=, mtu=, queues=, offloads=on|off, link=up|down, bps=, iops=, burst-bytes= and burst-ops=";
    let (first, options) = split(text);
    let link = match first.split_once('=') {
        None if first == "user" => LinkSpec::User,
        None if first == "tap" => LinkSpec::Tap(String::new()),
        Some(("tap", name)) if !name.is_empty() => LinkSpec::Tap(name.to_owned()),
        Some(("bridge", name)) if !name.is_empty() => LinkSpec::Bridge(name.to_owned()),
        _ => {
            return Err(format!(
                "'{first}' is no network; user, tap, tap=NAME and bridge=NAME are"
            ));
        }
    };
    let mut net = NetSpec {
        link,
        mac: None,
        mtu: 0,
        queues: 0,
        offloads: None,
        link_down: false,
        rate_limit: RateLimit::default(),
    };
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            ("mac", Some(value)) => net.mac = Some(parse_mac(value)?),
            ("mtu", Some(value)) => net.mtu = number("mtu", value)?,
            ("queues", Some(value)) => net.queues = number("queues", value)?,
            ("offloads", Some("on")) => net.offloads = Some(true),
            ("offloads", Some("off")) => net.offloads = Some(false),
            ("link", Some(value)) => net.link_down = parse_link(value)?,
            (key, value) if rate(&mut net.rate_limit, key, value)? => {}
            (key, value) => return Err(unknown(key, value, KNOWN)),
        }
    }
    Ok(net)
}

/// Reads `[CID][,socket=PATH]`.
pub(crate) fn parse_vsock(text: &str) -> Result<VsockSpec, String> {
    let mut vsock = VsockSpec::default();
    for (i, word) in words(text).iter().enumerate() {
        match word.split_once('=') {
            Some(("socket", path)) if !path.is_empty() => vsock.socket = Some(path.into()),
            None if i == 0 && word.is_empty() => {}
            None if i == 0 => {
                vsock.cid = word
                    .parse()
                    .map_err(|_| format!("'{word}' is no context id; 3 to {} are", u32::MAX - 1))?;
            }
            _ => return Err(format!("'{word}' is not known here; CID and socket=PATH are")),
        }
    }
    Ok(vsock)
}

/// Reads `[PORTS][,consoles=N]`.
pub(crate) fn parse_console(text: &str) -> Result<Console, String> {
    let (ports, options) = split(text);
    let most = MAX_CONSOLE_PORTS;
    let mut console = Console::default();
    if !ports.is_empty() {
        let parsed = ports.parse().ok().filter(|ports| (1..=most).contains(ports));
        console.ports = parsed.ok_or_else(|| format!("a console has 1 to {most} ports"))?;
    }
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            ("consoles", Some(value)) => console.console_ports = number("consoles", value)?,
            (key, value) => return Err(unknown(key, value, "consoles=")),
        }
    }
    Ok(console)
}

/// Reads `[bps=BYTES]`.
pub(crate) fn parse_rng(text: &str) -> Result<Rng, String> {
    let mut rng = Rng::default();
    for word in words(text).iter().filter(|word| !word.is_empty()) {
        let (key, value) = word
            .split_once('=')
            .map_or((word.as_str(), None), |(key, value)| (key, Some(value)));
        if !rate(&mut rng.rate_limit, key, value)? {
            return Err(unknown(key, value, "bps=, iops=, burst-bytes= and burst-ops="));
        }
    }
    Ok(rng)
}

/// Reads `[deflate-on-oom][,reporting]`.
pub(crate) fn parse_balloon(text: &str) -> Result<Balloon, String> {
    let mut balloon = Balloon::default();
    for word in words(text).iter().filter(|word| !word.is_empty()) {
        match word.as_str() {
            "deflate-on-oom" => balloon.deflate_on_oom = true,
            "reporting" => balloon.free_page_reporting = true,
            _ => return Err(unknown(word, None, "deflate-on-oom and reporting")),
        }
    }
    Ok(balloon)
}

/// Reads `SIZE[,requested=SIZE][,block=SIZE][,alignment=SIZE]`.
pub(crate) fn parse_memory_device(text: &str) -> Result<MemoryDevice, String> {
    let (size, options) = split(text);
    let mut device = MemoryDevice {
        region_size: parse_bytes(&size)?,
        ..MemoryDevice::default()
    };
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            ("requested", Some(value)) => device.requested = parse_bytes(value)?,
            ("block", Some(value)) => device.block_size = parse_bytes(value)?,
            ("alignment", Some(value)) => device.region_alignment = parse_bytes(value)?,
            (key, value) => return Err(unknown(key, value, "requested=, block= and alignment=")),
        }
    }
    Ok(device)
}

/// Reads `TAG=SOCKET[,queues=N]`.
pub(crate) fn parse_share(text: &str) -> Result<ShareSpec, String> {
    let (first, options) = split(text);
    let (tag, socket) = match first.split_once('=') {
        Some((tag, socket)) if !tag.is_empty() && !socket.is_empty() => (tag.to_owned(), socket.into()),
        _ => return Err("a share is TAG=SOCKET: what the guest mounts it by, and where virtiofsd listens".into()),
    };
    let mut share = ShareSpec { tag, socket, queues: 0 };
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            ("queues", Some(value)) => share.queues = number("queues", value)?,
            (key, value) => return Err(unknown(key, value, "queues=")),
        }
    }
    Ok(share)
}

/// The names of virtio device types (virtio 1.2, section 5).
pub(crate) const DEVICE_TYPES: [(&str, u16); 5] = [("net", 1), ("block", 2), ("gpu", 16), ("sound", 25), ("fs", 26)];

/// Reads a virtio device type, by its name or number.
pub(crate) fn parse_device_type(text: &str) -> Result<u16, String> {
    let named = DEVICE_TYPES.iter().find(|(name, _)| *name == text);
    let number = named.map(|(_, number)| *number).or_else(|| text.parse().ok());
    number.ok_or_else(|| format!("'{text}' is no type of a device; net, block, gpu, sound, fs and numbers are"))
}

/// Reads `TYPE=SOCKET[,queues=N][,queue-size=N]`.
pub(crate) fn parse_vhost_user(text: &str) -> Result<VhostUserSpec, String> {
    let (first, options) = split(text);
    let device = first.split_once('=');
    let Some((device_type, socket)) = device.and_then(|(name, socket)| Some((parse_device_type(name).ok()?, socket)))
    else {
        return Err("a vhost-user device is TYPE=SOCKET; a type is net, block, gpu, sound, fs or a number".into());
    };
    let mut device = VhostUserSpec {
        device_type,
        socket: socket.into(),
        queues: 0,
        queue_size: 0,
    };
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            ("queues", Some(value)) => device.queues = number("queues", value)?,
            ("queue-size", Some(value)) => device.queue_size = number("queue-size", value)?,
            (key, value) => return Err(unknown(key, value, "queues= and queue-size=")),
        }
    }
    Ok(device)
}

/// Reads what a watchdog does.
pub(crate) fn parse_watchdog(text: &str) -> Result<WatchdogAction, String> {
    match text {
        "reset" => Ok(WatchdogAction::Reset),
        "stop" => Ok(WatchdogAction::Stop),
        "none" => Ok(WatchdogAction::None),
        _ => Err(format!(
            "'{text}' is nothing that a watchdog does; reset, stop and none are"
        )),
    }
}

/// Reads the digits of an instance id.
pub(crate) fn parse_instance_id(text: &str) -> Result<[u8; INSTANCE_ID], String> {
    let wrong = || format!("an instance id has {} hexadecimal digits", 2 * INSTANCE_ID);
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = text.as_bytes().chunks(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    let bytes: Option<Vec<u8>> = pairs.collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)
}

/// Reads what becomes of a guest that resets itself.
pub(crate) fn parse_on_reset(text: &str) -> Result<OnReset, String> {
    match text {
        "stop" => Ok(OnReset::Stop),
        "restart" => Ok(OnReset::Restart),
        "pause" => Ok(OnReset::Pause),
        _ => Err(format!(
            "'{text}' is nothing that is done at a reset; stop, restart and pause are"
        )),
    }
}

/// Reads what becomes of a guest whose kernel panics.
pub(crate) fn parse_on_panic(text: &str) -> Result<OnPanic, String> {
    match text {
        "leave" => Ok(OnPanic::Leave),
        "stop" => Ok(OnPanic::Stop),
        "restart" => Ok(OnPanic::Restart),
        "pause" => Ok(OnPanic::Pause),
        _ => Err(format!(
            "'{text}' is nothing that is done at a panic; leave, stop, restart and pause are"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let net = parse_net("tap=tap0,mac=02:00:5e:10:00:01,mtu=9000,queues=2,offloads=off,link=down,bps=1M").unwrap();
        assert_eq!(
            (net.link, net.mac),
            (LinkSpec::Tap("tap0".into()), Some([2, 0, 0x5e, 0x10, 0, 1]))
        );
        assert_eq!(
            (net.mtu, net.queues, net.offloads, net.link_down),
            (9000, 2, Some(false), true)
        );
        assert_eq!(parse_net("user").unwrap().link, LinkSpec::User);
        assert_eq!(parse_net("tap").unwrap().link, LinkSpec::Tap(String::new()));
        assert_eq!(parse_net("bridge=br0").unwrap().link, LinkSpec::Bridge("br0".into()));
        for (text, word) in [
            ("", "is no network"),
            ("bridge", "is no network"),
            ("bridge=", "is no network"),
            ("user=x", "is no network"),
            ("user,mac=1", "is no address"),
            ("user,mac=02:00:5e:10:00:001", "is no address"),
            ("user,mtu=70000", "too large"),
            ("user,link=sideways", "sideways"),
        ] {
            let error = parse_net(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn other_devices() {
        assert_eq!(parse_vsock("").unwrap(), VsockSpec::default());
        let vsock = parse_vsock("7,socket=/run/a").unwrap();
        assert_eq!((vsock.cid, vsock.socket), (7, Some("/run/a".into())));
        assert_eq!(parse_vsock(",socket=/run/a").unwrap().cid, 0);
        assert!(parse_vsock("x").is_err() && parse_vsock("3,4").is_err() && parse_vsock("socket=").is_err());
        let console = |text: &str| parse_console(text).map(|console| (console.ports, console.console_ports));
        assert_eq!((console("3"), console("")), (Ok((3, 0)), Ok((0, 0))));
        assert_eq!(
            (console("3,consoles=2"), console(",consoles=1")),
            (Ok((3, 2)), Ok((0, 1)))
        );
        assert!(
            ["0", "33", "consoles=2", "2,consoles", "2,sizes=1"]
                .map(console)
                .iter()
                .all(Result::is_err)
        );
        assert_eq!(parse_rng("bps=64K").unwrap().rate_limit.bytes_per_second, 65536);
        assert!(parse_rng("fast").is_err());
        let balloon = parse_balloon("deflate-on-oom,reporting").unwrap();
        assert!(balloon.deflate_on_oom && balloon.free_page_reporting && parse_balloon("air").is_err());
        let memory = parse_memory_device("1G,requested=512M,block=4M,alignment=8M").unwrap();
        assert_eq!(
            (
                memory.region_size,
                memory.requested,
                memory.block_size,
                memory.region_alignment
            ),
            (1 << 30, 512 << 20, 4 << 20, 8 << 20)
        );
        assert!(parse_memory_device("much").is_err());
        let share = parse_share("home=/run/fs.sock,queues=2").unwrap();
        assert_eq!((share.tag.as_str(), share.queues), ("home", 2));
        assert!(parse_share("home").is_err() && parse_share("=x").is_err());
        let device = parse_vhost_user("sound=/run/s,queues=4,queue-size=64").unwrap();
        assert_eq!((device.device_type, device.queues, device.queue_size), (25, 4, 64));
        assert_eq!(parse_vhost_user("41=/run/s").unwrap().device_type, 41);
        assert!(parse_vhost_user("toaster=/run/s").is_err());
        assert_eq!(parse_watchdog("stop").unwrap(), WatchdogAction::Stop);
        assert!(parse_watchdog("bark").is_err());
        assert_eq!(parse_instance_id(&"0fA3".repeat(32)).unwrap()[..3], [0x0f, 0xa3, 0x0f]);
        for text in [
            "",
            "0f",
            &"0".repeat(127),
            &"0".repeat(130),
            &"0g".repeat(64),
            &"+1".repeat(64),
            &"ü".repeat(64),
        ] {
            assert!(
                parse_instance_id(text).unwrap_err().contains("128 hexadecimal"),
                "{text}"
            );
        }
        assert_eq!(parse_on_reset("restart").unwrap(), OnReset::Restart);
        assert_eq!(parse_on_panic("pause").unwrap(), OnPanic::Pause);
        assert!(parse_on_reset("leave").is_err() && parse_on_panic("ignore").is_err());
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("1 MiB", 1 << 20),
            ("2g", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1.5G", "1P", "99999999T"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
