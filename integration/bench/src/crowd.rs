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
use sepal_integration::{Boot, Manager, disk};
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{Balloon, Console, Disk, DiskFormat, DiskMode, Link, Network, Rng, Vsock},
    },
    error::{Error, Outcome, read_completion},
    guest_capnp::{guest, observer, output, read_result, statistics},
    info::GuestInfo,
    manager_capnp::guest_manager,
};

use crate::{processes::Process, vmm::Kernel};

/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the embedded guest prints last, before it waits in hlt.
const PROMPT: &[u8] = b"sepal> ";

/// A guest manager of one's own, and its guests. All of them end with this.
pub(crate) struct Crowd {
    manager: Manager,
    members: Vec<Member>,
}

/// One of the guests.
struct Member {
    name: String,
    guest: guest::Client,
    /// Held: the guest ends when it is dropped.
    _lease: guest_manager::lease::Client,
}

impl Crowd {
    /// Starts the manager.
    pub(crate) fn start() -> Result<Self> {
        let manager = Manager::start().context("starting a guest manager")?;
        let mut crowd = Self {
            manager,
            members: Vec::new(),
        };
        // It has started when it answers.
        crowd.list()?;
        Ok(crowd)
    }

    /// Launches one more guest; the embedded one waits at its prompt when this returns. How long it took from sending `launch` until its first byte
    /// had come back; what reads the byte is sent along.
    pub(crate) fn add(&mut self, config: GuestConfig) -> Result<Duration> {
        let embedded = matches!(config.kernel, File::None);
        let request = self
            .manager
            .launch_request(Boot::new().configure(|empty| *empty = config))?;
        let (member, took) = self.run(async move {
            let sent = Instant::now();
            let launching = request.send();
            let output: output::Client = observer(&launching.pipeline.get_guest())
                .output_request()
                .send()
                .pipeline
                .get_output();
            let reading = output.read_request().send().promise;
            let response = launching.promise.await?;
            let launched = response.get()?.outcome()?;
            let member = Member {
                name: launched.get_name()?.to_string()?,
                guest: launched.get_guest()?,
                _lease: launched.get_lease()?,
            };
            let mut printed = bytes(&reading.await?)?;
            let took = sent.elapsed();
            while embedded && !printed.ends_with(PROMPT) {
                let mut request = output.read_request();
                request.get().set_position(printed.len() as u64);
                printed.extend(bytes(&request.send().promise.await?)?);
            }
            Ok((member, took))
        })?;
        self.members.push(member);
        Ok(took)
    }

    /// How many guests there are.
    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Asks for the list of all guests.
    pub(crate) fn list(&mut self) -> Result<Duration> {
        let (request, expected) = (self.manager.client().list_request(), self.len());
        self.run(async move {
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
        let observer = observer(&self.member(index)?.guest);
        self.run(async move {
            let asked = Instant::now();
            let response = observer.info_request().send().promise.await?;
            let info = GuestInfo::read_result(response.get()?)?;
            Ok((info, asked.elapsed()))
        })
    }

    /// Asks for the figures of a guest, which its component has to tell.
    pub(crate) fn statistics(&mut self, index: usize) -> Result<Duration> {
        use statistics::stats_result::Which;
        let observer = observer(&self.member(index)?.guest);
        self.run(async move {
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
        let mut forget = self.manager.client().remove_request();
        forget.get().set_name(&last.name);
        let stopped = stop(self.manager.client(), last.name);
        self.run(async move {
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
        let all: Vec<_> = names.map(|name| stop(self.manager.client(), name)).collect();
        self.run(try_join_all(all))?;
        Ok(asked.elapsed())
    }

    /// The manager.
    pub(crate) fn manager(&self) -> Result<Process> {
        self.manager
            .pid()
            .map(Process)
            .context("the manager is somebody else's")
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

    fn member(&self, index: usize) -> Result<&Member> {
        self.members
            .get(index)
            .with_context(|| format!("there is no guest {index}"))
    }

    fn run<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = self.manager.within(PATIENCE, work)?;
        outcome.with_context(|| format!("no answer within {PATIENCE:?}"))?
    }
}

fn observer(guest: &guest::Client) -> observer::Client {
    guest.observer_request().send().pipeline.get_observer()
}

/// What was read; the end of the guest is an error.
fn bytes(response: &capnp::capability::Response<read_result::Owned>) -> Result<Vec<u8>> {
    let piece = response.get()?.outcome()?;
    ensure!(!piece.get_ended(), "the guest ended before its prompt");
    Ok(piece.get_bytes()?.to_vec())
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

/// The embedded guest with a disk, a network device, a console, a source of entropy, a balloon and vsock, and the other end of its network. It has no drivers for
/// them: what is measured is what having them costs.
pub(crate) fn furnished(memory_mib: u16, scratch: &Path) -> Result<(GuestConfig, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let config = GuestConfig {
        disks: vec![empty_disk(scratch)?],
        networks: vec![Network::new(Link::Socket(OwnedFd::from(theirs)))],
        console: Some(Console::default()),
        rng: Some(Rng::default()),
        balloon: Some(Balloon::default()),
        vsock: Some(Vsock::default()),
        ..bare(memory_mib)
    };
    Ok((config, ours))
}

/// A disk of 64 MiB with nothing on it, which takes no place.
pub(crate) fn empty_disk(scratch: &Path) -> Result<Disk> {
    let image = tempfile::Builder::new().prefix("disk").tempfile_in(scratch)?;
    image.as_file().set_len(64 << 20)?;
    Ok(disk(image.path(), DiskMode::ReadWrite, DiskFormat::Raw)?)
}
