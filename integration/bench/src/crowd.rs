//! One guest manager and the guests that it holds, all launched by one client: what a host costs that is more than one guest.

use std::{
    fs,
    future::Future,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use sepal_integration::{Boot, disk};
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{Balloon, Console, Disk, DiskFormat, DiskMode, Link, Network, Rng, Vsock},
    },
    error::{Error, read_completion},
    guest_capnp::statistics,
    info::GuestInfo,
    manager_capnp::guest_manager,
};

use crate::{
    launcher::{Launched, Launcher},
    processes::Process,
    vmm::Kernel,
};

/// What the embedded guest prints last, before it waits in hlt.
const PROMPT: &[u8] = b"sepal> ";

/// A guest manager of one's own, and its guests. All of them end with this.
pub(crate) struct Crowd {
    launcher: Launcher,
    members: Vec<Launched>,
}

impl Crowd {
    /// Starts the manager.
    pub(crate) fn start() -> Result<Self> {
        Ok(Self {
            launcher: Launcher::start(&[])?,
            members: Vec::new(),
        })
    }

    /// Launches one more guest; the embedded one waits at its prompt when this returns. How long it took until its first byte had come back.
    pub(crate) fn add(&mut self, config: GuestConfig) -> Result<Duration> {
        let embedded = matches!(config.kernel, File::None);
        let (took, launched) = self.launcher.launch(Boot::of(config))?;
        if embedded {
            self.launcher.wait_for(&launched, PROMPT)?;
        }
        self.members.push(launched);
        Ok(took)
    }

    /// How many guests there are.
    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Asks for the list of all guests.
    pub(crate) fn list(&mut self) -> Result<Duration> {
        let (request, expected) = (self.launcher.client().list_request(), self.len());
        self.launcher.run(async move {
            let asked = Instant::now();
            let response = request.send().promise.await?;
            let listed = response.get()?.get_guests()?.len() as usize;
            ensure!(
                listed == expected,
                "{expected} guests were launched, {listed} are listed"
            );
            Ok(asked.elapsed())
        })
    }

    /// Asks for what there is to know about a guest.
    pub(crate) fn info(&mut self, index: usize) -> Result<(GuestInfo, Duration)> {
        let member = self.members.get(index).with_context(|| no_guest(index))?;
        self.launcher.info(member)
    }

    /// Asks for the figures of a guest, which its component has to tell.
    pub(crate) fn statistics(&mut self, index: usize) -> Result<Duration> {
        use statistics::stats_result::Which;
        let member = self.members.get(index).with_context(|| no_guest(index))?;
        let observer = member.observer();
        self.launcher.run(async move {
            let asked = Instant::now();
            let response = observer.stats_request().send().promise.await?;
            match response.get()?.which()? {
                Which::Stats(stats) => ensure!(!stats?.get_vcpus()?.is_empty(), "statistics without a vCPU"),
                Which::Error(error) => return Err(Error::read(error?)?.into()),
            }
            Ok(asked.elapsed())
        })
    }

    /// Stops the guest that came last, by force, and has it forgotten.
    pub(crate) fn stop_last(&mut self) -> Result<()> {
        let last = self.members.pop().context("there is no guest")?;
        let mut forget = self.launcher.client().remove_request();
        forget.get().set_name(&last.name);
        let stopped = stop(self.launcher.client(), last.name);
        self.launcher.run(async move {
            stopped.await?;
            let response = forget.send().promise.await?;
            Ok(read_completion(response.get()?)?)
        })
    }

    /// Stops all guests by force, all at once.
    pub(crate) fn stop_all(&mut self) -> Result<Duration> {
        let members = std::mem::take(&mut self.members);
        let asked = Instant::now();
        let names = members.iter().map(|member| member.name.clone());
        let all: Vec<_> = names.map(|name| stop(self.launcher.client(), name)).collect();
        self.launcher.run(try_join_all(all))?;
        Ok(asked.elapsed())
    }

    /// The manager.
    pub(crate) fn manager(&self) -> Result<Process> {
        self.launcher.process()
    }

    /// The manager's keeper, which is the components' parent.
    pub(crate) fn keeper(&self) -> Result<Process> {
        for process in self.manager()?.tree()? {
            if process.name()? == "sepal-keeper" {
                return Ok(process);
            }
        }
        anyhow::bail!("the manager has no keeper")
    }

    /// The component of a guest.
    pub(crate) fn component(&mut self, index: usize) -> Result<Process> {
        Ok(Process(self.info(index)?.0.component_pid))
    }
}

fn no_guest(index: usize) -> String {
    format!("there is no guest {index}")
}

fn stop(client: &guest_manager::Client, name: String) -> impl Future<Output = Result<()>> + use<> {
    let mut request = client.force_shutdown_request();
    request.get().set_name(&name);
    let sent = request.send().promise;
    async move {
        let response = sent.await?;
        read_completion(response.get()?).with_context(|| format!("stopping {name}"))
    }
}

/// The embedded guest with so much memory.
pub(crate) fn bare(memory_mib: u16) -> GuestConfig {
    GuestConfig {
        memory_mib: i32::from(memory_mib),
        cmdline: "quiet".to_owned(),
        ..GuestConfig::default()
    }
}

/// A kernel with so much memory.
pub(crate) fn of_kernel(kernel: Kernel<'_>, memory_mib: u16) -> Result<GuestConfig> {
    let file = fs::File::open(kernel.elf).with_context(|| format!("opening {}", kernel.elf.display()))?;
    Ok(GuestConfig {
        kernel: File::Fd(file.into()),
        ..bare(memory_mib)
    })
}

/// The embedded guest with devices, and the other end of its network.
pub(crate) fn furnished(memory_mib: u16, scratch: &Path) -> Result<(GuestConfig, UnixStream)> {
    furnish(bare(memory_mib), scratch)
}

/// A guest with a disk, a network device, a console, a source of entropy, a balloon and vsock besides, and the other end of its network. It has no drivers for
/// them: what is measured is what having them costs.
pub(crate) fn furnish(config: GuestConfig, scratch: &Path) -> Result<(GuestConfig, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let config = GuestConfig {
        disks: vec![empty_disk(scratch)?],
        networks: vec![Network::new(Link::Socket(OwnedFd::from(theirs)))],
        console: Some(Console::default()),
        rng: Some(Rng::default()),
        balloon: Some(Balloon::default()),
        vsock: Some(Vsock::default()),
        ..config
    };
    Ok((config, ours))
}

/// A disk of 64 MiB with nothing on it, which takes no place.
pub(crate) fn empty_disk(scratch: &Path) -> Result<Disk> {
    let image = tempfile::Builder::new().prefix("disk").tempfile_in(scratch)?;
    image.as_file().set_len(64 << 20)?;
    Ok(disk(image.path(), DiskMode::ReadWrite, DiskFormat::Raw)?)
}
