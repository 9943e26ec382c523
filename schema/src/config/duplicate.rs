//! A second configuration with descriptors of its own for the same files, so that one of them can be given away.

use std::{io, os::fd::OwnedFd};

use super::{
    File, GuestConfig, MemoryBacking,
    device::{Backend, Backing, Disk, Link, Listener, Network, Share, VhostUser, Vsock},
};

fn all<T>(list: &[T], duplicate: impl Fn(&T) -> io::Result<T>) -> io::Result<Vec<T>> {
    list.iter().map(duplicate).collect()
}

impl File {
    /// Another descriptor, or another reference, for the same file.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::None => Self::None,
            Self::Fd(fd) => Self::Fd(fd.try_clone()?),
            Self::Bytes(bytes) => Self::Bytes(bytes.clone()),
            Self::Upload(upload) => Self::Upload(upload.clone()),
            Self::Path(path) => Self::Path(path.clone()),
        })
    }
}

impl Disk {
    fn try_clone(&self) -> io::Result<Self> {
        let below = |backing: &Backing| {
            Ok(Backing {
                file: backing.file.try_clone()?,
                format: backing.format,
            })
        };
        Ok(Self {
            id: self.id.clone(),
            image: self.image.try_clone()?,
            backing: all(&self.backing, below)?,
            scratch: self.scratch.try_clone()?,
            ..*self
        })
    }
}

impl Link {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::User => Self::User,
            Self::Tap(queues) => Self::Tap(all(queues, OwnedFd::try_clone)?),
            Self::TapNamed(name) => Self::TapNamed(name.clone()),
            Self::Bridge(name) => Self::Bridge(name.clone()),
            Self::Socket(socket) => Self::Socket(socket.try_clone()?),
        })
    }
}

impl Network {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            link: self.link.try_clone()?,
            ..*self
        })
    }
}

impl Backend {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Socket(socket) => Self::Socket(socket.try_clone()?),
            Self::Path(path) => Self::Path(path.clone()),
        })
    }
}

impl Vsock {
    fn duplicate(&self) -> Self {
        let listener = |listener: &Listener| Listener {
            port: listener.port,
            acceptor: listener.acceptor.clone(),
        };
        Self {
            cid: self.cid,
            listeners: self.listeners.iter().map(listener).collect(),
            socket_path: self.socket_path.clone(),
        }
    }
}

impl GuestConfig {
    /// The same configuration, with descriptors of its own for the same open files: what their offset and flags are is shared.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let memory = |range: &MemoryBacking| {
            Ok(MemoryBacking {
                memfd: range.memfd.try_clone()?,
                ..*range
            })
        };
        let share = |share: &Share| {
            Ok(Share {
                tag: share.tag.clone(),
                backend: share.backend.try_clone()?,
                ..*share
            })
        };
        let vhost_user = |device: &VhostUser| {
            Ok(VhostUser {
                backend: device.backend.try_clone()?,
                ..*device
            })
        };
        Ok(Self {
            name: self.name.clone(),
            kernel: self.kernel.try_clone()?,
            initrd: self.initrd.try_clone()?,
            cmdline: self.cmdline.clone(),
            cmdline_add: self.cmdline_add.clone(),
            custom_memory: all(&self.custom_memory, memory)?,
            waived_layers: self.waived_layers.clone(),
            disks: all(&self.disks, Disk::try_clone)?,
            networks: all(&self.networks, Network::try_clone)?,
            vsock: self.vsock.as_ref().map(Vsock::duplicate),
            shares: all(&self.shares, share)?,
            vhost_user: all(&self.vhost_user, vhost_user)?,
            pins: self.pins.clone(),
            ..*self
        })
    }
}
