//! A raw configuration: what a program has set, and the guest's configuration that the manager gets of it.
//!
//! What Android's machines have without being asked is the same for all: a serial port, a virtio console with three ports (the console, one that nothing is
//! connected to, the log), entropy, vsock and a watchdog.

use std::{
    ffi::c_int,
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::PathBuf,
};

use rustix::fs::SealFlags;
use sepal_schema::{
    config::{
        self, GuestConfig, Handles, INSTANCE_ID, MAX_NAME, MemoryBacking, OnReset,
        device::{self, Balloon, Console, DiskFormat, DiskMode, Rng, Vsock, WatchdogAction},
    },
    config_capnp::guest_config,
    error::{Error, Kind},
};

use crate::environment;

/// What Linux needs to be told: where to print before it has found the console, where afterwards, and to reset itself when it panics.
const CMDLINE: &str = "earlycon=uart8250,io,0x3f8 console=hvc0 panic=-1";
/// The console, an unused one, the log.
const CONSOLE_PORTS: u16 = 3;
/// Names the folder where each machine's vsock ports are offered as Unix sockets.
const VSOCK_VARIABLE: &str = "SEPAL_AVF_VSOCK_DIR";
/// What the name of such a socket ends with.
const VSOCK_SUFFIX: &str = ".vsock";

/// A disk.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) image: OwnedFd,
    pub(crate) writable: bool,
}

/// What is behind a handle `AVirtualMachineRawConfig`.
#[derive(Debug, Default)]
pub struct RawConfig {
    pub(crate) name: Option<String>,
    pub(crate) instance_id: Option<[u8; INSTANCE_ID]>,
    pub(crate) kernel: Option<OwnedFd>,
    pub(crate) initrd: Option<OwnedFd>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) memory_mib: i32,
    pub(crate) protected_vm: bool,
    pub(crate) balloon: bool,
    pub(crate) memory: Vec<MemoryBacking>,
    /// The guest's vsock context id, 0 for one of the manager's choice.
    pub(crate) cid: u32,
}

/// Why there is no machine of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Incomplete {
    #[error("it has no name")]
    Name,
    #[error("it has no kernel")]
    Kernel,
}

impl RawConfig {
    /// The name, if it can be a machine's.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn complete(&self) -> Result<String, Incomplete> {
        let name = self.name.clone().ok_or(Incomplete::Name)?;
        match self.kernel {
            Some(_) => Ok(name),
            None => Err(Incomplete::Kernel),
        }
    }

    /// Writes the configuration of a guest of this name; its descriptors are copies.
    ///
    /// # Errors
    /// What cannot be handed over.
    pub(crate) fn write(&self, name: &str, to: guest_config::Builder<'_>, handles: &dyn Handles) -> Result<(), Error> {
        let no_descriptors = |error: io::Error| Error::new(Kind::NoResources, format!("copying descriptors: {error}"));
        self.guest(name).map_err(no_descriptors)?.encode(to, handles)
    }

    fn guest(&self, name: &str) -> io::Result<GuestConfig> {
        let file = |fd: &Option<OwnedFd>| {
            let copy = fd.as_ref().map(OwnedFd::try_clone).transpose()?;
            Ok::<_, io::Error>(copy.map_or(config::File::None, config::File::Fd))
        };
        let disk = |disk: &Disk| {
            Ok::<_, io::Error>(device::Disk {
                id: String::new(),
                image: config::File::Fd(disk.image.try_clone()?),
                mode: match disk.writable {
                    true => DiskMode::ReadWrite,
                    false => DiskMode::ReadOnly,
                },
                format: DiskFormat::Raw,
                direct: false,
                block_size: 0,
                rate_limit: device::RateLimit::default(),
                backing: Vec::new(),
                queues: 0,
                scratch: config::File::None,
            })
        };
        let memory = |range: &MemoryBacking| {
            Ok::<_, io::Error>(MemoryBacking {
                memfd: range.memfd.try_clone()?,
                ..*range
            })
        };
        Ok(GuestConfig {
            name: name.to_owned(),
            instance_id: self.instance_id,
            kernel: file(&self.kernel)?,
            initrd: file(&self.initrd)?,
            cmdline: CMDLINE.to_owned(),
            memory_mib: self.memory_mib,
            protected_vm: self.protected_vm,
            custom_memory: self.memory.iter().map(memory).collect::<Result<_, _>>()?,
            disks: self.disks.iter().map(disk).collect::<Result<_, _>>()?,
            console: Some(Console {
                ports: CONSOLE_PORTS,
                console_ports: CONSOLE_PORTS,
            }),
            rng: Some(Rng {
                rate_limit: device::RateLimit::default(),
            }),
            balloon: self.balloon.then_some(Balloon {
                deflate_on_oom: true,
                free_page_reporting: true,
            }),
            vsock: Some(Vsock {
                cid: self.cid,
                listeners: Vec::new(),
                socket_path: vsock_path(name)?,
            }),
            watchdog: Some(WatchdogAction::Stop),
            on_reset: OnReset::Stop,
            ..GuestConfig::default()
        })
    }
}

/// Where the vsock ports of the guest of this name are offered; empty: nowhere.
fn vsock_path(name: &str) -> io::Result<String> {
    let Some(folder) = environment::variable(VSOCK_VARIABLE) else {
        return Ok(String::new());
    };
    let path = std::path::absolute(PathBuf::from(folder).join(format!("{name}{VSOCK_SUFFIX}")))?;
    let text = path.into_os_string().into_string();
    text.map_err(|_| io::Error::other(format!("the folder of {VSOCK_VARIABLE} is not UTF-8")))
}

/// How long a name may be for the path of its vsock ports to fit.
pub(crate) fn longest_name() -> usize {
    match vsock_path("") {
        Ok(path) if !path.is_empty() => device::MAX_SOCKET_PATH.saturating_sub(path.len()),
        // What is wrong with it is told when there is a machine.
        _ => MAX_NAME,
    }
}

/// Takes over the descriptor with this number; none if there is none.
///
/// # Safety
/// If it is open, it is the caller's to give away.
pub(crate) unsafe fn take_fd(number: c_int) -> Option<OwnedFd> {
    // SAFETY: only asks about the number. What is taken is not for the programs that this process may start.
    if number < 0 || unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return None;
    }
    // SAFETY: it is open, and the caller gives it away.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Keeps a memfd that backs a guest's memory from being shortened, if it lets itself be.
pub(crate) fn seal(fd: impl AsFd) {
    // What is no memfd has no seals, and needs none to be refused.
    let _ = rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK);
}

#[cfg(test)]
mod tests;
