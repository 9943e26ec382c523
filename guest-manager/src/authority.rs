//! What of a configuration needs the manager's own authority, and with it the role admin. Pure.

use sepal_schema::config::{
    File, GuestConfig,
    device::{Backend, Link},
};

/// What a configuration asks for that not everybody may have.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    /// The field.
    pub(crate) field: String,
    /// What it asks for, as the beginning of a sentence.
    pub(crate) what: String,
}

impl Needed {
    fn new(field: impl Into<String>, what: impl Into<String>) -> Self {
        let (field, what) = (field.into(), what.into());
        Self { field, what }
    }

    fn path(field: impl Into<String>, path: &str) -> Self {
        let field = field.into();
        let what = format!("{field}: naming the path {path}");
        Self { field, what }
    }
}

/// The first thing in `config` that needs the manager's own authority; none if nothing does.
pub(crate) fn needed(config: &GuestConfig) -> Option<Needed> {
    let file = |field: String, file: &File| match file {
        File::Path(path) => Some(Needed::path(field, path)),
        File::None | File::Fd(_) | File::Bytes(_) | File::Upload(_) => None,
    };
    let disks = config.disks.iter().enumerate().flat_map(|(i, disk)| {
        let backing = disk.backing.iter().enumerate();
        let backing = backing.map(move |(j, below)| file(format!("disks[{i}].backing[{j}]"), &below.file));
        let own = [
            file(format!("disks[{i}].image"), &disk.image),
            file(format!("disks[{i}].scratch"), &disk.scratch),
        ];
        own.into_iter().chain(backing)
    });
    let networks = config.networks.iter().enumerate().map(|(i, network)| {
        let (link, what) = match &network.link {
            Link::User => ("user", "a process that speaks to the network for the guest"),
            Link::TapNamed(_) => ("tapNamed", "a tap that the manager makes"),
            Link::Bridge(_) => ("bridge", "a tap on a bridge of the host"),
            Link::Tap(_) | Link::Socket(_) => return None,
        };
        let field = format!("networks[{i}].{link}");
        let what = format!("{field}: {what}");
        Some(Needed { field, what })
    });
    let backend = |field: String, backend: &Backend| match backend {
        Backend::Path(path) => Some(Needed::path(field, path)),
        Backend::Socket(_) => None,
    };
    let shares = config.shares.iter().enumerate();
    let shares = shares.map(|(i, share)| backend(format!("shares[{i}].backend"), &share.backend));
    let devices = config.vhost_user.iter().enumerate();
    let devices = devices.map(|(i, device)| backend(format!("vhostUser[{i}].backend"), &device.backend));
    let socket = config.vsock.as_ref().map(|vsock| &vsock.socket_path[..]);
    let rest = [
        file("kernel".to_owned(), &config.kernel),
        file("initrd".to_owned(), &config.initrd),
        socket
            .filter(|path| !path.is_empty())
            .map(|path| Needed::path("vsock.socketPath", path)),
        (!config.waived_layers.is_empty())
            .then(|| Needed::new("waivedLayers", "waivedLayers: going on without a layer of the jail")),
    ];
    let all = rest
        .into_iter()
        .chain(disks)
        .chain(networks)
        .chain(shares)
        .chain(devices);
    all.flatten().next()
}

#[cfg(test)]
mod tests {
    use sepal_schema::config::device::{Disk, DiskFormat, DiskMode, RateLimit, Share, Vsock};

    use super::*;

    fn path() -> File {
        File::Path("/boot/x".into())
    }

    #[test]
    fn what_a_client_brings_itself_needs_nothing() {
        let config = GuestConfig {
            kernel: File::Bytes(vec![1]),
            vsock: Some(Vsock::default()),
            ..GuestConfig::default()
        };
        assert_eq!(needed(&config), None);
    }

    #[test]
    fn what_the_manager_would_get_needs_its_authority() {
        let share = || Share {
            tag: "t".into(),
            backend: Backend::Path("/run/fs.sock".into()),
            queues: 0,
        };
        let vsock = Vsock {
            socket_path: "/run/x".into(),
            ..Vsock::default()
        };
        let disk = || Disk {
            id: String::new(),
            image: File::Bytes(vec![1]),
            mode: DiskMode::VolatileWrite,
            format: DiskFormat::Raw,
            direct: false,
            block_size: 0,
            rate_limit: RateLimit::default(),
            backing: Vec::new(),
            queues: 0,
            scratch: path(),
        };
        let configs = [
            (
                GuestConfig {
                    kernel: path(),
                    ..GuestConfig::default()
                },
                "kernel",
            ),
            (
                GuestConfig {
                    initrd: path(),
                    ..GuestConfig::default()
                },
                "initrd",
            ),
            (
                GuestConfig {
                    disks: vec![disk()],
                    ..GuestConfig::default()
                },
                "disks[0].scratch",
            ),
            (
                GuestConfig {
                    shares: vec![share()],
                    ..GuestConfig::default()
                },
                "shares[0].backend",
            ),
            (
                GuestConfig {
                    vsock: Some(vsock),
                    ..GuestConfig::default()
                },
                "vsock.socketPath",
            ),
            (
                GuestConfig {
                    waived_layers: vec!["cgroup".into()],
                    ..GuestConfig::default()
                },
                "waivedLayers",
            ),
        ];
        for (config, field) in configs {
            assert_eq!(needed(&config).map(|needed| needed.field).as_deref(), Some(field));
        }
    }
}
