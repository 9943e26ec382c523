//! What the host is, has and offers: what `GuestManager.node` answers, and `guest doctor` puts in words.
//!
//! ```text
//!   cpus, cells      /proc/cpuinfo, /sys/devices/system/node --.
//!   kvm              KVM_CHECK_EXTENSION ----------------------+--> Facts --findings (pure)--> Vec<Finding>
//!   layers           the runner's probes ----------------------|      '--> write --> NodeInfo
//!   limits           /proc/self/fd, /proc/loadavg, cgroups ----'
//! ```
//!
//! All of it is looked at by a worker thread: probing namespaces makes processes. Whoever asks while that is being done, or within a second after it, gets the same
//! answer, so that nobody keeps the host busy by asking.

mod cells;
mod cpus;
mod findings;
mod kvm;
pub(crate) mod limits;
mod write;

use std::{
    cell::RefCell,
    fs, io,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use futures::{
    FutureExt,
    future::{LocalBoxFuture, Shared},
};
use sepal_runner::{
    Layer,
    host::{Finding as Probe, Subject},
};
use sepal_schema::{
    error::{Error, Kind},
    node_capnp::node_info,
};

pub(crate) use self::cells::parse_meminfo as memory_line;
pub use self::{
    cells::{Cell, HugePages},
    cpus::Cpus,
    findings::{Finding, Severity},
    kvm::{Capability, Found as Kvm},
};
use crate::{
    capacity::{Room, Used},
    manager::Manager,
    network::passt,
    pressure::psi,
};

/// How old an answer may be.
const FRESH: Duration = Duration::from_secs(1);

/// What was found out about the host.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Its name in the network.
    pub host_name: String,
    /// The kernel's version.
    pub kernel: String,
    /// Processors.
    pub cpus: Cpus,
    /// How many of them this process may use.
    pub usable_cpus: u32,
    /// Memory in all, in bytes.
    pub memory_bytes: u64,
    /// What nobody uses, in bytes.
    pub free_bytes: u64,
    /// NUMA cells, at least one.
    pub cells: Vec<Cell>,
    /// KVM.
    pub kvm: Kvm,
    /// KVM uses the processor's own virtualization.
    pub hardware: bool,
    /// What the runner found: layers of the jail, and io_uring.
    pub probes: Vec<Probe>,
    /// What guests were promised, and what limits leave.
    pub room: Room,
    /// Guests that have not ended, and how many there may be.
    pub guests: Used,
    /// Why memory pressure cannot be noticed; none if it can.
    pub no_pressure: Option<String>,
    /// Transparent huge pages of guest memory are there for those who ask.
    pub huge_pages: bool,
    /// The device of taps is there.
    pub tun: bool,
    /// The program for user-mode networks is there.
    pub passt: bool,
    /// Folders that the manager writes to, with what is free on their disks, in bytes.
    pub disks: Vec<Disk>,
    /// The manager keeps definitions.
    pub keeps_state: bool,
    /// A sentence for each file of the state folder that was not as it should be when the manager started.
    pub broken_state: Vec<String>,
}

/// A folder that the manager writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// What for.
    pub purpose: &'static str,
    /// Where it is.
    pub folder: PathBuf,
    /// What is free there, in bytes; none if it is not there.
    pub free_bytes: Option<u64>,
}

/// What only the manager knows.
struct Asked {
    hardware: bool,
    room: Room,
    guests: Used,
    state: Option<PathBuf>,
    broken_state: Vec<String>,
    scratch: PathBuf,
}

type Looking = Shared<LocalBoxFuture<'static, Result<Rc<Facts>, Error>>>;

/// The last look at the host, or the one that is being taken.
#[derive(Default)]
pub struct Node {
    looking: RefCell<Option<(Instant, Looking)>>,
}

impl Node {
    /// What the host is and offers.
    async fn facts(manager: &Rc<Manager>) -> Result<Rc<Facts>, Error> {
        let fresh = |(begun, looking): &(Instant, Looking)| looking.peek().is_none() || begun.elapsed() < FRESH;
        let known = manager
            .node
            .looking
            .borrow()
            .as_ref()
            .filter(|known| fresh(known))
            .cloned();
        let looking = match known {
            Some((_, looking)) => looking,
            None => {
                let (asked, handle) = (Asked::new(manager), manager.handle.clone());
                let look = async move {
                    let found = handle.spawn_blocking(move || look(asked)).await;
                    found
                        .map(Rc::new)
                        .map_err(|error| Error::new(Kind::NoResources, error.to_string()))
                };
                let looking = look.boxed_local().shared();
                *manager.node.looking.borrow_mut() = Some((Instant::now(), looking.clone()));
                looking
            }
        };
        looking.await
    }
}

/// Answers `GuestManager.node`.
///
/// # Errors
/// `NO_RESOURCES`: no thread could look.
pub async fn answer(manager: &Rc<Manager>, to: node_info::Builder<'_>) -> Result<(), Error> {
    let facts = Node::facts(manager).await?;
    write::write(&facts, to);
    Ok(())
}

impl Asked {
    fn new(manager: &Manager) -> Self {
        let guests = manager.registry(|registry, _| registry.occupancy());
        Self {
            hardware: !manager.settings.host.unassisted,
            room: manager.room(),
            guests,
            state: manager
                .settings
                .state
                .folder()
                .ok()
                .map(|folder| folder.path().to_owned()),
            broken_state: manager.definitions.problems().to_vec(),
            scratch: manager.settings.scratch.clone(),
        }
    }
}

/// Looks at everything. Blocks, and makes processes.
fn look(asked: Asked) -> Facts {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let name = rustix::system::uname();
    let meminfo = text("/proc/meminfo");
    let memory = |wanted| cells::parse_meminfo(&meminfo, wanted).unwrap_or(0);
    let cpus = cpus::parse(&text("/proc/cpuinfo"));
    let mut cells = cells::read(Path::new(cells::FOLDER));
    if cells.is_empty() {
        // A kernel without NUMA: all that there is, is one.
        cells.push(Cell {
            memory_bytes: memory("MemTotal"),
            free_bytes: memory("MemFree"),
            cpus: (0..u16::try_from(cpus.online).unwrap_or(u16::MAX)).collect(),
            distances: vec![10],
            ..Cell::default()
        });
    }
    let keeps_state = asked.state.is_some();
    let state = asked.state.map(|folder| Disk::look("definitions", folder));
    Facts {
        host_name: name.nodename().to_string_lossy().into_owned(),
        kernel: name.release().to_string_lossy().into_owned(),
        usable_cpus: cpus::usable().unwrap_or(cpus.online),
        cpus,
        memory_bytes: memory("MemTotal"),
        free_bytes: memory("MemFree"),
        cells,
        kvm: kvm::ask(),
        hardware: asked.hardware,
        probes: sepal_runner::host::examine(),
        room: asked.room,
        guests: asked.guests,
        no_pressure: psi::Trigger::try_out().err(),
        huge_pages: may_have_huge_pages(&text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        tun: Path::new("/dev/net/tun").exists(),
        passt: on_path(passt::PROGRAM),
        disks: state
            .into_iter()
            .chain([Disk::look("volatile disks", asked.scratch)])
            .collect(),
        keeps_state,
        broken_state: asked.broken_state,
    }
}

impl Disk {
    fn look(purpose: &'static str, folder: PathBuf) -> Self {
        let status: io::Result<_> = rustix::fs::statvfs(&folder).map_err(Into::into);
        Self {
            purpose,
            free_bytes: status
                .ok()
                .map(|status| status.f_bavail.saturating_mul(status.f_frsize)),
            folder,
        }
    }
}

/// Whether shared memory that asks for transparent huge pages gets them, by what the kernel's setting says (`always within_size [advise] never deny force`).
fn may_have_huge_pages(setting: &str) -> bool {
    let chosen = setting.split_ascii_whitespace().find(|word| word.starts_with('['));
    chosen.is_some_and(|chosen| !matches!(chosen, "[never]" | "[deny]"))
}

/// Whether there is a program of this name where programs are looked for.
fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| {
        let file = folder.join(program);
        rustix::fs::access(&file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file()
    })
}

impl Facts {
    /// What the runner found out about a layer; none of those that every kernel has on which the rest is there.
    fn probe(&self, subject: Subject) -> Option<&Probe> {
        self.probes.iter().find(|probe| probe.subject == subject)
    }

    /// Each layer of the jail with whether the host offers it, what was found, and how to get it.
    fn layers(&self) -> impl Iterator<Item = (Layer, bool, &str, &str)> {
        Layer::ALL
            .into_iter()
            .map(|layer| match self.probe(Subject::Layer(layer)) {
                Some(probe) => {
                    let remedy = probe.remedy.as_deref().unwrap_or_default();
                    (layer, probe.available, &*probe.detail, remedy)
                }
                None => (layer, true, "every kernel has it", ""),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_huge_pages() {
        for (setting, may) in [
            ("always within_size [advise] never deny force", true),
            ("always within_size advise [never] deny force", false),
            ("[always] never", true),
            ("", false),
        ] {
            assert_eq!(may_have_huge_pages(setting), may, "{setting}");
        }
    }

    #[test]
    fn programs_are_looked_for_on_the_path() {
        assert!(on_path("sh"));
        assert!(!on_path("no-such-program"));
    }

    #[test]
    fn this_host_is_found_out_about() {
        let facts = look(Asked {
            hardware: true,
            room: Room::default(),
            guests: Used::default(),
            state: None,
            broken_state: Vec::new(),
            scratch: "/var/tmp".into(),
        });
        assert!(facts.memory_bytes > 0 && facts.cpus.online > 0 && !facts.cells.is_empty());
        assert_eq!(facts.layers().count(), Layer::ALL.len());
        let of_cells: u64 = facts.cells.iter().map(|cell| cell.memory_bytes).sum();
        assert!(of_cells > 0 && facts.disks[0].free_bytes.is_some());
    }
}
