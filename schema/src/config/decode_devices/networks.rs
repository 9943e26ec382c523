//! Reads network cards out of a message.

use super::{bad, bounded, rate, toggle, unique, unknown};
use crate::{
    config::{
        Handles, MAX_DEVICES,
        decode::{at_most, take, text},
        device::{Link, MAX_INTERFACE_NAME, MAX_MTU, MAX_QUEUE_PAIRS, MIN_MTU, Network},
    },
    config_capnp::guest_config::{self, network},
    error::Error,
};

/// Most queues of a tap that are looked at.
const MAX_TAPS: u32 = MAX_QUEUE_PAIRS as u32;

pub(super) fn networks(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Network>, Error> {
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
