//! Writes the devices of a configuration into a message.

use super::{
    Handles,
    device::{Backend, Disk, Link, Network, RateLimit, Share, VhostUser, Vsock},
    encode::{file, length},
};
use crate::{
    config_capnp::{
        Toggle,
        guest_config::{self, backend, disk, network, rate_limit, share, vhost_user, vsock},
    },
    error::Error,
};

pub(super) fn disks(disks: Vec<Disk>, to: guest_config::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
    let mut list = to.init_disks(length(disks.len()));
    for (i, disk) in disks.into_iter().enumerate() {
        write_disk(disk, list.reborrow().get(length(i)), handles)?;
    }
    Ok(())
}

fn write_disk(disk: Disk, mut to: disk::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
    to.set_id(&disk.id);
    file(disk.image, to.reborrow().init_image(), handles)?;
    file(disk.scratch, to.reborrow().init_scratch(), handles)?;
    to.set_mode(disk.mode);
    to.set_format(disk.format);
    to.set_direct(disk.direct);
    to.set_block_size(disk.block_size);
    rate(disk.rate_limit, to.reborrow().init_rate_limit());
    to.set_queues(disk.queues);
    let count = length(disk.backing.len());
    let mut formats = to.reborrow().init_backing_format(count);
    for (i, backing) in disk.backing.iter().enumerate() {
        formats.set(length(i), backing.format);
    }
    let mut files = to.init_backing(count);
    for (i, backing) in disk.backing.into_iter().enumerate() {
        file(backing.file, files.reborrow().get(length(i)), handles)?;
    }
    Ok(())
}

pub(super) fn networks(
    networks: Vec<Network>,
    to: guest_config::Builder<'_>,
    handles: &dyn Handles,
) -> Result<(), Error> {
    let mut list = to.init_networks(length(networks.len()));
    for (i, network) in networks.into_iter().enumerate() {
        write_network(network, list.reborrow().get(length(i)), handles)?;
    }
    Ok(())
}

fn write_network(network: Network, mut to: network::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
    if let Some(mac) = network.mac {
        to.set_mac(&mac);
    }
    match network.link {
        Link::User => to.set_user(()),
        Link::Tap(queues) => {
            let mut list = to.reborrow().init_tap(length(queues.len()));
            for (i, queue) in queues.into_iter().enumerate() {
                list.reborrow().get(length(i)).set_number(handles.send(queue)?);
            }
        }
        Link::TapNamed(name) => to.set_tap_named(&name),
        Link::Bridge(name) => to.set_bridge(&name),
        Link::Socket(socket) => to.reborrow().init_socket().set_number(handles.send(socket)?),
    }
    to.set_mtu(network.mtu);
    rate(network.rate_limit, to.reborrow().init_rate_limit());
    to.set_queue_pairs(network.queue_pairs);
    to.set_offloads(match network.offloads {
        None => Toggle::ByDefault,
        Some(on) => toggle(on),
    });
    to.set_link_down(network.link_down);
    Ok(())
}

pub(super) fn write_vsock(vsock: Vsock, mut to: vsock::Builder<'_>) {
    to.set_enabled(Toggle::On);
    to.set_cid(vsock.cid);
    to.set_socket_path(&vsock.socket_path);
    let mut list = to.init_listeners(length(vsock.listeners.len()));
    for (i, listener) in vsock.listeners.into_iter().enumerate() {
        let mut to = list.reborrow().get(length(i));
        to.set_port(listener.port);
        to.set_acceptor(listener.acceptor);
    }
}

pub(super) fn write_share(share: Share, mut to: share::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
    to.set_tag(&share.tag);
    to.set_queues(share.queues);
    write_backend(share.backend, to.init_backend(), handles)
}

pub(super) fn write_vhost_user(
    device: VhostUser,
    mut to: vhost_user::Builder<'_>,
    handles: &dyn Handles,
) -> Result<(), Error> {
    to.set_device_type(device.device_type);
    to.set_queues(device.queues);
    to.set_queue_size(device.queue_size);
    write_backend(device.backend, to.init_backend(), handles)
}

fn write_backend(backend: Backend, mut to: backend::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
    match backend {
        Backend::Socket(socket) => to.init_socket().set_number(handles.send(socket)?),
        Backend::Path(path) => to.set_path(&path),
    }
    Ok(())
}

pub(super) fn rate(limit: RateLimit, mut to: rate_limit::Builder<'_>) {
    to.set_bytes_per_second(limit.bytes_per_second);
    to.set_operations_per_second(limit.operations_per_second);
    to.set_burst_bytes(limit.burst_bytes);
    to.set_burst_operations(limit.burst_operations);
}

pub(super) fn toggle(on: bool) -> Toggle {
    if on { Toggle::On } else { Toggle::Off }
}
