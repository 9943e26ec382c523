//! What would create a guest again: its configuration as a definition has it, files by their paths.
//!
//! ```text
//!   configuration of a client --of--> Configuration: a message without descriptors     fields that only handles can give are named
//! ```
//!
//! Made when the guest is, while the descriptors that the client sent are there: what they lead to is asked of the kernel, and no descriptor is kept.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
};

use capnp::{
    message::{Builder, HeapAllocator, ReaderOptions},
    serialize,
};
use sepal_schema::{
    config::{
        File, GuestConfig, Handles,
        device::{Backend, Link},
    },
    config_capnp::guest_config,
    error::{Error, Kind},
    guest_capnp::observer::configuration_result,
};

/// Longest path that is told, in bytes (PATH_MAX of Linux without the NUL).
const MAX_PATH: usize = 4095;
/// Words of 8 bytes that a configuration takes, as a rule.
const WORDS: u32 = 256;

/// What would create a guest again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configuration {
    /// A message without descriptors.
    config: Rc<[u8]>,
    missing: Vec<String>,
}

impl Configuration {
    /// Of a configuration as a client sent it.
    ///
    /// # Errors
    /// `NO_RESOURCES`: the process has no descriptor left.
    pub(crate) fn of(config: &GuestConfig) -> Result<Self, Error> {
        let copy = config.try_clone().map_err(|error| {
            let message = format!("no descriptors to look what the guest is made of: {error}");
            Error::new(Kind::NoResources, message)
        })?;
        let (copy, missing) = with_paths(copy);
        let mut config = builder();
        copy.encode(config.init_root(), &Nobody)?;
        Ok(Self::kept(config.get_root_as_reader()?, missing)?)
    }

    /// As an earlier manager wrote it.
    ///
    /// # Errors
    /// The message is not well-formed.
    pub(crate) fn read(from: configuration_result::Reader<'_>) -> Result<Self, capnp::Error> {
        let missing = from.get_missing()?.iter();
        let missing = missing.map(|field| Ok(field?.to_string()?));
        Self::kept(from.get_config()?, missing.collect::<Result<_, capnp::Error>>()?)
    }

    fn kept(config: guest_config::Reader<'_>, missing: Vec<String>) -> Result<Self, capnp::Error> {
        // In the one form that all that say the same have. That form is one segment, for which there has to be room: all of the other, and the pointer to it.
        let words = u32::try_from(config.total_size()?.word_count).unwrap_or(u32::MAX);
        let mut message = Builder::new(HeapAllocator::new().first_segment_words(words.saturating_add(1)));
        message.set_root_canonical(config)?;
        Ok(Self {
            config: serialize::write_message_to_words(&message).into(),
            missing,
        })
    }

    /// Writes it for the manager that comes next.
    ///
    /// # Errors
    /// The message is full.
    pub(crate) fn keep(&self, mut to: configuration_result::Builder<'_>) -> Result<(), capnp::Error> {
        let message = serialize::read_message(&self.config[..], ReaderOptions::new())?;
        to.set_config(message.get_root::<guest_config::Reader<'_>>()?)?;
        to.set_missing(&self.missing[..])
    }

    /// Writes it into an answer, for the guest that is called `name` and has this UUID.
    ///
    /// # Errors
    /// The message is full.
    pub(crate) fn write(
        &self,
        mut to: configuration_result::Builder<'_>,
        name: &str,
        uuid: Option<&[u8]>,
    ) -> Result<(), capnp::Error> {
        self.keep(to.reborrow())?;
        let mut config = to.get_config()?;
        config.set_name(name);
        if let Some(uuid) = uuid {
            config.set_uuid(uuid);
        }
        Ok(())
    }
}

fn builder() -> Builder<HeapAllocator> {
    Builder::new(HeapAllocator::new().first_segment_words(WORDS))
}

/// Whoever is sent descriptors and closes them: they are numbered 0 in the message, and named as missing beside it.
struct Nobody;

impl Handles for Nobody {
    fn send(&self, _: OwnedFd) -> Result<u32, Error> {
        Ok(0)
    }

    fn take(&self, number: u32) -> Result<OwnedFd, Error> {
        Err(Error::new(
            Kind::BadConfig,
            format!("descriptor {number} was never sent"),
        ))
    }
}

/// Names files by their paths, and tells the fields that have none.
fn with_paths(mut config: GuestConfig) -> (GuestConfig, Vec<String>) {
    let mut missing = Vec::new();
    let mut name = |field: String, file: &mut File| {
        let named = match std::mem::take(file) {
            File::Fd(fd) => path_of(&fd).map(File::Path),
            File::Upload(_) => None,
            named @ (File::None | File::Bytes(_) | File::Path(_)) => Some(named),
        };
        match named {
            Some(named) => *file = named,
            None => missing.push(field),
        }
    };
    name("kernel".into(), &mut config.kernel);
    name("initrd".into(), &mut config.initrd);
    for (i, disk) in config.disks.iter_mut().enumerate() {
        name(format!("disks[{i}].image"), &mut disk.image);
        for (j, below) in disk.backing.iter_mut().enumerate() {
            name(format!("disks[{i}].backing[{j}]"), &mut below.file);
        }
        name(format!("disks[{i}].scratch"), &mut disk.scratch);
    }
    for i in 0..config.custom_memory.len() {
        missing.push(format!("customMemory[{i}].memfd"));
    }
    for (i, network) in config.networks.iter().enumerate() {
        match network.link {
            Link::Tap(_) => missing.push(format!("networks[{i}].tap")),
            Link::Socket(_) => missing.push(format!("networks[{i}].socket")),
            Link::User | Link::TapNamed(_) | Link::Bridge(_) => {}
        }
    }
    let shares = config.shares.iter().map(|share| &share.backend).enumerate();
    let others = config.vhost_user.iter().map(|device| &device.backend).enumerate();
    let backends = shares
        .map(|(i, backend)| (format!("shares[{i}].backend"), backend))
        .chain(others.map(|(i, backend)| (format!("vhostUser[{i}].backend"), backend)));
    missing.extend(
        backends
            .filter(|(_, backend)| matches!(backend, Backend::Socket(_)))
            .map(|(field, _)| field),
    );
    if let Some(vsock) = &mut config.vsock
        && !vsock.listeners.is_empty()
    {
        vsock.listeners.clear();
        missing.push("vsock.listeners".into());
    }
    (config, missing)
}

/// The path of a file that came as a descriptor; none if it has none (any more). Only asks the kernel, never the file system.
pub(crate) fn path_of(fd: &OwnedFd) -> Option<String> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    let path = path.to_str()?;
    // Memory and deleted files have paths that lead nowhere (proc_pid_fd(5)), pipes and sockets have none.
    let leads_there = path.starts_with('/') && !path.starts_with("/memfd:") && !path.ends_with(" (deleted)");
    (leads_there && path.len() <= MAX_PATH).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use sepal_schema::config::{
        MemoryBacking,
        device::{Backing, Disk, DiskFormat, DiskMode, Network, Share, VhostUser},
    };

    use super::*;
    use crate::files::sealed_memory;

    fn socket() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    fn memory() -> OwnedFd {
        sealed_memory("kernel", b"image").unwrap()
    }

    /// What somebody reads who is told of `config`.
    fn told(config: &GuestConfig) -> (Result<GuestConfig, Error>, Vec<String>) {
        // By way of the next manager.
        let mut message = Builder::new_default();
        let first = Configuration::of(config).unwrap();
        first.keep(message.init_root()).unwrap();
        let told = Configuration::read(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(told, first);
        let mut message = Builder::new_default();
        told.write(message.init_root(), "web", Some(&[7; 16])).unwrap();
        let answer: configuration_result::Reader<'_> = message.get_root_as_reader().unwrap();
        let missing = answer.get_missing().unwrap().iter();
        let missing = missing.map(|field| field.unwrap().to_string().unwrap()).collect();
        (GuestConfig::decode(answer.get_config().unwrap(), &Nobody), missing)
    }

    #[test]
    fn files_are_told_by_their_paths() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            std::fs::write(folder.path().join(name), name).unwrap();
            OwnedFd::from(std::fs::File::open(folder.path().join(name)).unwrap())
        };
        let mut disk = Disk::new(File::Fd(file("disk")), DiskMode::ReadOnly);
        disk.format = DiskFormat::Qcow2;
        disk.backing.push(Backing {
            file: File::Fd(file("below")),
            format: DiskFormat::Raw,
        });
        let config = GuestConfig {
            kernel: File::Fd(file("kernel")),
            initrd: File::Path("/boot/initrd".into()),
            disks: vec![disk],
            cmdline: "quiet".into(),
            ..GuestConfig::default()
        };
        let (told, missing) = told(&config);
        let told = told.unwrap();
        assert!(missing.is_empty(), "{missing:?}");
        let path = |file: &File| match file {
            File::Path(path) => path.clone(),
            _ => panic!("not a path"),
        };
        let here = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        assert_eq!(path(&told.kernel), here("kernel"));
        assert_eq!(path(&told.initrd), "/boot/initrd");
        assert_eq!(path(&told.disks[0].image), here("disk"));
        assert_eq!(path(&told.disks[0].backing[0].file), here("below"));
        assert_eq!((&told.name[..], &told.cmdline[..]), ("web", "quiet"));
        assert_eq!(told.uuid.unwrap().as_bytes(), &[7; 16]);
    }

    #[test]
    fn a_configuration_of_any_size_is_told() {
        for count in [0, 1, 8, 32] {
            let disk = |i: usize| {
                let path = format!("/{}/{i}", "long/".repeat(40));
                Disk::new(File::Path(path), DiskMode::ReadOnly)
            };
            let config = GuestConfig {
                disks: (0..count).map(disk).collect(),
                cmdline: "x".repeat(60 * count),
                ..GuestConfig::default()
            };
            let (told, missing) = told(&config);
            let told = told.unwrap();
            assert!(missing.is_empty(), "{missing:?}");
            assert_eq!((told.disks.len(), told.cmdline), (count, config.cmdline));
        }
    }

    #[test]
    fn what_only_a_handle_can_give_is_named() {
        let gone = tempfile::tempfile().unwrap();
        let config = GuestConfig {
            kernel: File::Fd(memory()),
            initrd: File::Fd(gone.into()),
            disks: vec![Disk::new(File::Fd(memory()), DiskMode::ReadOnly)],
            networks: vec![
                Network::new(Link::User),
                Network::new(Link::Tap(vec![socket()])),
                Network::new(Link::Socket(socket())),
            ],
            shares: vec![Share {
                tag: "tag".into(),
                backend: Backend::Socket(socket()),
                queues: 0,
            }],
            vhost_user: vec![VhostUser {
                device_type: 2,
                backend: Backend::Path("/run/disk".into()),
                queues: 0,
                queue_size: 0,
            }],
            custom_memory: vec![MemoryBacking {
                memfd: memory(),
                start: 0,
                end: 4096,
            }],
            ..GuestConfig::default()
        };
        let (_, missing) = told(&config);
        let expected = [
            "kernel",
            "initrd",
            "disks[0].image",
            "customMemory[0].memfd",
            "networks[1].tap",
            "networks[2].socket",
            "shares[0].backend",
        ];
        assert_eq!(missing, expected);
    }

    #[test]
    fn a_configuration_without_files_is_told_as_it_came() {
        let config = GuestConfig {
            kernel: File::Bytes(b"image".to_vec()),
            cpus: 3,
            memory_mib: 77,
            ..GuestConfig::default()
        };
        let (told, missing) = told(&config);
        let told = told.unwrap();
        assert!(missing.is_empty());
        assert!(matches!(&told.kernel, File::Bytes(bytes) if bytes == b"image"));
        assert_eq!((told.cpus, told.memory_mib), (3, 77));
    }
}
