//! Reads the devices that vhost-user back ends serve out of a message: shares and others.

use super::{bad, bounded, unique, unknown};
use crate::{
    config::{
        Handles,
        decode::{absolute, at_most, take, text},
        device::{
            Backend, MAX_BACKEND_PATH, MAX_QUEUE_SIZE, MAX_QUEUES, MAX_SHARES, MAX_TAG, MAX_VHOST_USER,
            MAX_VHOST_USER_QUEUES, Share, VhostUser,
        },
    },
    config_capnp::guest_config::{self, backend},
    error::Error,
};

/// The largest number of a virtio device type that the PCI id of a device has room for (virtio 1.2, section 4.1.2: 0x1040 to 0x107f).
const MAX_DEVICE_TYPE: u16 = 63;

fn backend(field: &str, from: backend::Reader<'_>, handles: &dyn Handles) -> Result<Backend, Error> {
    use backend::Which;
    match from.which().map_err(|_| unknown(field))? {
        Which::Socket(socket) => Ok(Backend::Socket(take(field, socket?, handles)?)),
        Which::Path(path) => {
            let path = text(field, path?, MAX_BACKEND_PATH)?;
            absolute(field, &path)?;
            Ok(Backend::Path(path))
        }
    }
}

pub(super) fn shares(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Share>, Error> {
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

pub(super) fn vhost_user(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<VhostUser>, Error> {
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
