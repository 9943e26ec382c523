//! The configuration of a guest, from what the command line says.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sepal_schema::config::{
    self, GuestConfig, Limits, OnPanic, OnReset,
    device::{Backend, Backing, Disk, DiskFormat, DiskMode, Link, Network, Share, VhostUser, Vsock},
};

use crate::{
    args::GuestOptions,
    specs::{DiskSpec, LinkSpec, NetSpec, ShareSpec, VhostUserSpec, VsockSpec},
    uploads,
};

/// What a Linux kernel needs to be told to print on the serial port.
const LINUX_CONSOLE: &str = "console=ttyS0";

/// The configuration of a guest of this name, the manager being on this machine (`here`) or on another.
///
/// # Errors
/// A file cannot be opened, or a path not be told the manager.
pub(crate) fn config(name: Option<&str>, args: &GuestOptions, here: bool) -> Result<GuestConfig> {
    let cmdline = match (&args.cmdline, &args.kernel) {
        (Some(cmdline), _) => cmdline.clone(),
        (None, Some(_)) => LINUX_CONSOLE.to_owned(),
        (None, None) => String::new(),
    };
    let megabytes = |size: Option<i32>| size.and_then(|mib| u64::try_from(mib).ok()).unwrap_or(0);
    let devices = &args.devices;
    let vsock = devices.vsock.as_ref();
    let open =
        |what, path: Option<&PathBuf>| path.map_or(Ok(config::File::None), |path| uploads::open(what, path, false));
    Ok(GuestConfig {
        name: name.unwrap_or_default().to_owned(),
        instance_id: devices.instance_id,
        kernel: open("kernel", args.kernel.as_ref())?,
        initrd: open("initrd", args.initrd.as_ref())?,
        cmdline,
        cmdline_add: args.cmdline_add.clone(),
        cpus: args.cpus.unwrap_or(0),
        memory_mib: args.memory.unwrap_or(0),
        huge_pages: args.huge_pages,
        protected_vm: args.protected,
        limits: Limits {
            memory_mib: megabytes(args.limit_memory),
            cpu_percent: args.limit_cpu.unwrap_or(0),
            cpu_weight: args.limit_weight.unwrap_or(0),
            tasks: args.limit_tasks.unwrap_or(0),
        },
        waived_layers: args.waive_layer.clone(),
        disks: devices.disks.iter().map(disk).collect::<Result<_>>()?,
        networks: devices.networks.iter().map(network).collect(),
        console: devices.console,
        rng: devices.rng,
        balloon: devices.balloon,
        vsock: vsock.map(|spec| socket_device(spec, here)).transpose()?,
        memory_device: devices.memory_device,
        shares: devices
            .shares
            .iter()
            .map(|spec| share(spec, here))
            .collect::<Result<_>>()?,
        vhost_user: devices
            .vhost_user
            .iter()
            .map(|spec| vhost_user(spec, here))
            .collect::<Result<_>>()?,
        watchdog: devices.watchdog,
        generation_id: devices.generation_id,
        panic_device: devices.panic_device || args.on_panic.is_some_and(|does| does != OnPanic::Leave),
        on_reset: args.on_reset.unwrap_or(OnReset::Stop),
        on_panic: args.on_panic.unwrap_or(OnPanic::Leave),
        agent: vsock.is_some() && !devices.no_agent,
        uuid: args.uuid,
        restart: args.restart.unwrap_or_default(),
        durable: args.durable,
        pins: args.pins.clone(),
        ..GuestConfig::default()
    })
}

fn disk(spec: &DiskSpec) -> Result<Disk> {
    let below = |(path, format): &(PathBuf, DiskFormat)| {
        Ok::<_, anyhow::Error>(Backing {
            file: uploads::open("disk", path, false)?,
            format: *format,
        })
    };
    Ok(Disk {
        id: spec.id.clone(),
        image: uploads::open("disk", &spec.file, spec.mode == DiskMode::ReadWrite)?,
        mode: spec.mode,
        format: spec.format,
        direct: spec.direct,
        block_size: spec.block_size,
        rate_limit: spec.rate_limit,
        backing: spec.backing.iter().map(below).collect::<Result<_>>()?,
        queues: spec.queues,
        scratch: config::File::None,
    })
}

fn network(spec: &NetSpec) -> Network {
    Network {
        mac: spec.mac,
        link: match &spec.link {
            LinkSpec::User => Link::User,
            LinkSpec::Tap(name) => Link::TapNamed(name.clone()),
            LinkSpec::Bridge(name) => Link::Bridge(name.clone()),
        },
        mtu: spec.mtu,
        rate_limit: spec.rate_limit,
        queue_pairs: spec.queues,
        offloads: spec.offloads,
        link_down: spec.link_down,
    }
}

/// A path as the manager needs it, whose own folder is another. On another machine nobody knows ours.
fn absolute(path: &Path, here: bool) -> Result<String> {
    if !here && !path.is_absolute() {
        bail!(
            "{} is a path of the guest manager's machine, and has to begin with '/'",
            path.display()
        );
    }
    let path = std::path::absolute(path).with_context(|| format!("the path {}", path.display()))?;
    let text = path
        .to_str()
        .with_context(|| format!("the path {} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

fn socket_device(spec: &VsockSpec, here: bool) -> Result<Vsock> {
    let socket = spec.socket.as_deref().map(|path| absolute(path, here)).transpose()?;
    Ok(Vsock {
        cid: spec.cid,
        listeners: Vec::new(),
        socket_path: socket.unwrap_or_default(),
    })
}

fn share(spec: &ShareSpec, here: bool) -> Result<Share> {
    Ok(Share {
        tag: spec.tag.clone(),
        backend: Backend::Path(absolute(&spec.socket, here)?),
        queues: spec.queues,
    })
}

fn vhost_user(spec: &VhostUserSpec, here: bool) -> Result<VhostUser> {
    Ok(VhostUser {
        device_type: spec.device_type,
        backend: Backend::Path(absolute(&spec.socket, here)?),
        queues: spec.queues,
        queue_size: spec.queue_size,
    })
}
