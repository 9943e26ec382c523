//! Limits of memory, processes and processor time, by cgroup v2, and by v1 for controllers that only v1 offers.
//!
//! A component gets groups only when it has limits. They stand below a directory that belongs to one starter:
//!
//! ```text
//!   <hierarchy>/<parent>/sepal-<pid>-<start time>/<component>
//! ```
//!
//! so that the next starter can tell which are left from one that died ([`Groups::sweep`]). `parent` is `sepal` for root, and for an ordinary user
//! `sepal` in the group of the user's service manager, all of which is the user's; or the starter's own group, where that was delegated in another way.

mod hierarchy;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use hierarchy::Place;
pub use hierarchy::{Controller, Hierarchies};

/// What a component may use at most. `None` = no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Memory in bytes, guest memory included (v2 `memory.max`, v1 `memory.limit_in_bytes`); at least one page.
    pub memory_bytes: Option<u64>,
    /// Threads and processes (`pids.max`), at least 1.
    pub pids: Option<u32>,
    /// Processor time in thousandths of one processor (v2 `cpu.max`, v1 `cpu.cfs_quota_us`), 10 to 1,000,000.
    pub cpu_millis: Option<u32>,
    /// Share of processor time among competitors (v2 `cpu.weight`, v1 `cpu.shares` in proportion), 1 to 10,000; 100 is usual.
    pub cpu_weight: Option<u32>,
}

/// The period of processor quotas in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// A limit that cannot be enforced, or groups that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The value is out of its range.
    #[error("the {what} limit is {value}, but has to be {range}")]
    Range {
        /// Which limit.
        what: &'static str,
        /// The value asked for.
        value: u64,
        /// What is possible.
        range: &'static str,
    },
    /// No hierarchy offers the controller.
    #[error("this host offers no {controller} controller, neither in a cgroup v2 tree nor in v1")]
    NoController {
        /// The controller.
        controller: &'static str,
    },
    /// The file system refused.
    #[error("{action} {path}: {source}")]
    Refused {
        /// What was attempted.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// One write that puts a limit in force.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    controller: Controller,
    /// File and content in a v2 group.
    v2: (&'static str, String),
    /// Files and contents in a v1 group, in order.
    v1: Vec<(&'static str, String)>,
}

impl Setting {
    /// True if the group has this setting's files.
    fn applies(&self, place: &Place, directory: &Path) -> bool {
        let mut files = self.v1.iter().map(|(file, _)| *file);
        match place.v2 {
            true => directory.join(self.v2.0).exists(),
            false => files.all(|file| directory.join(file).exists()),
        }
    }

    /// Writes it into a group.
    fn write(&self, place: &Place, directory: &Path) -> Result<(), CgroupError> {
        if place.v2 {
            return write(&directory.join(self.v2.0), &self.v2.1);
        }
        let mut files = self.v1.iter();
        files.try_for_each(|(file, content)| write(&directory.join(file), content))
    }
}

impl Limits {
    /// True if nothing is limited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The limits in words, for a report.
    #[must_use]
    pub fn describe(&self) -> String {
        let parts = [
            self.memory_bytes.map(|bytes| format!("memory {bytes} bytes")),
            self.pids.map(|pids| format!("{pids} threads")),
            self.cpu_millis
                .map(|millis| format!("{}.{:03} processors", millis / 1000, millis % 1000)),
            self.cpu_weight.map(|weight| format!("processor weight {weight}")),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// What puts the limits in force.
    fn settings(&self) -> Result<Vec<Setting>, CgroupError> {
        let check = |what, value: u64, least: u64, most: u64, range| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(CgroupError::Range { what, value, range })
            }
        };
        let mut settings = Vec::new();
        if let Some(bytes) = self.memory_bytes {
            check("memory", bytes, 4096, i64::MAX as u64, "4096 to 2^63 - 1 bytes")?;
            settings.push(Setting {
                controller: Controller::Memory,
                v2: ("memory.max", bytes.to_string()),
                v1: vec![("memory.limit_in_bytes", bytes.to_string())],
            });
        }
        if let Some(pids) = self.pids {
            check("pids", pids.into(), 1, 4 << 20, "1 to 4194304")?;
            settings.push(Setting {
                controller: Controller::Pids,
                v2: ("pids.max", pids.to_string()),
                v1: vec![("pids.max", pids.to_string())],
            });
        }
        if let Some(millis) = self.cpu_millis {
            check(
                "cpu quota",
                millis.into(),
                10,
                1_000_000,
                "10 to 1000000 thousandths of a processor",
            )?;
            let quota = u64::from(millis) * CPU_PERIOD_US / 1000;
            settings.push(Setting {
                controller: Controller::Cpu,
                v2: ("cpu.max", format!("{quota} {CPU_PERIOD_US}")),
                v1: vec![
                    ("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
                    ("cpu.cfs_quota_us", quota.to_string()),
                ],
            });
        }
        if let Some(weight) = self.cpu_weight {
            check("cpu weight", weight.into(), 1, 10_000, "1 to 10000")?;
            // The usual values, 100 and 1024, mean the same share. v1 takes 2 at least.
            let shares = (u64::from(weight) * 1024 / 100).max(2);
            settings.push(Setting {
                controller: Controller::Cpu,
                v2: ("cpu.weight", weight.to_string()),
                v1: vec![("cpu.shares", shares.to_string())],
            });
        }
        Ok(settings)
    }
}

/// What takes the limits that are not among these out of force.
fn lifted(limits: &Limits) -> Vec<Setting> {
    let setting = |controller, v2: (&'static str, &str), v1: (&'static str, &str)| Setting {
        controller,
        v2: (v2.0, v2.1.to_owned()),
        v1: vec![(v1.0, v1.1.to_owned())],
    };
    let none = [
        (
            limits.memory_bytes.is_none(),
            setting(
                Controller::Memory,
                ("memory.max", "max"),
                ("memory.limit_in_bytes", "-1"),
            ),
        ),
        (
            limits.pids.is_none(),
            setting(Controller::Pids, ("pids.max", "max"), ("pids.max", "max")),
        ),
        (
            limits.cpu_millis.is_none(),
            setting(Controller::Cpu, ("cpu.max", "max"), ("cpu.cfs_quota_us", "-1")),
        ),
        (
            limits.cpu_weight.is_none(),
            setting(Controller::Cpu, ("cpu.weight", "100"), ("cpu.shares", "1024")),
        ),
    ];
    none.into_iter()
        .filter_map(|(lifted, setting)| lifted.then_some(setting))
        .collect()
}

/// The groups that one starter makes, and the directories above them.
#[derive(Debug)]
pub struct Groups {
    hierarchies: Hierarchies,
    /// `sepal-<pid>-<start time>`.
    own_name: String,
    /// Directories made so far for this starter, one for each hierarchy.
    own: Vec<PathBuf>,
}

/// The groups of one component. Dropping it removes them, which succeeds once its processes are gone.
#[derive(Debug)]
pub struct Group {
    directories: Vec<PathBuf>,
    /// The v2 group, for `CLONE_INTO_CGROUP`.
    v2: Option<OwnedFd>,
    /// v1 groups, which a process is moved into.
    v1: Vec<PathBuf>,
}

/// What every starter's directory begins with.
const PREFIX: &str = "sepal-";

fn refused(action: &'static str, path: &Path, source: impl Into<io::Error>) -> CgroupError {
    CgroupError::Refused {
        action,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// How often the shared parent is made again when it vanishes.
const SHARED_TRIES: usize = 16;

/// Removes the directory that starters share, unless another one uses it. A user's own group is not ours to remove.
fn remove_shared(parent: &Path) {
    if parent.ends_with(hierarchy::SHARED_PARENT) {
        let _ = fs::remove_dir(parent);
    }
}

fn make(directory: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(refused("making", directory, error)),
        _ => Ok(()),
    }
}

fn open_group(directory: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(
        directory,
        OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| refused("opening", directory, errno))
}

fn write(file: &Path, content: &str) -> Result<(), CgroupError> {
    fs::write(file, content).map_err(|error| refused("writing", file, error))
}

impl Groups {
    /// Looks up this host's hierarchies; makes nothing yet.
    ///
    /// # Errors
    ///
    /// If `/proc/self` cannot be read.
    pub fn new() -> io::Result<Self> {
        let pid = std::process::id();
        let start = start_time(pid).ok_or_else(|| io::Error::other("/proc/self/stat cannot be read"))?;
        Ok(Self {
            hierarchies: Hierarchies::discover()?,
            own_name: format!("{PREFIX}{pid}-{start}"),
            own: Vec::new(),
        })
    }

    /// Makes a component's groups and sets its limits.
    ///
    /// # Errors
    ///
    /// [`CgroupError`]: a value out of range, a controller that the host lacks, or a refusal. Nothing is left then.
    pub fn create(&mut self, name: &str, limits: &Limits) -> Result<Group, CgroupError> {
        let mut group = Group::none();
        for setting in limits.settings()? {
            self.enforce(&mut group, name, &setting)?;
        }
        Ok(group)
    }

    /// Changes the limits of a component that runs to these and no others. What was not limited so far needs groups that are made
    /// now; the process is moved into them.
    ///
    /// # Errors
    ///
    /// [`CgroupError`], as [`Groups::create`]; limits before the one it is about are in force then.
    pub fn change(&mut self, group: &mut Group, name: &str, pid: u32, limits: &Limits) -> Result<(), CgroupError> {
        // All values are looked at before the first is written.
        let settings = limits.settings()?;
        for setting in lifted(limits) {
            if let Some(place) = self.hierarchies.place(setting.controller)
                && let Some(directory) = group.directory_in(&place)
                // The group may be there for another controller's sake alone.
                && setting.applies(&place, directory)
            {
                setting.write(&place, directory)?;
            }
        }
        for setting in settings {
            if let Some(made) = self.enforce(group, name, &setting)? {
                write(&made.join("cgroup.procs"), &pid.to_string())?;
            }
        }
        Ok(())
    }

    /// Writes a setting, into a group that is made if there is none in that hierarchy; that is returned then.
    fn enforce(&mut self, group: &mut Group, name: &str, setting: &Setting) -> Result<Option<PathBuf>, CgroupError> {
        let place = self
            .hierarchies
            .place(setting.controller)
            .ok_or(CgroupError::NoController {
                controller: setting.controller.name(),
            })?;
        // Also where there is a group: the controller may not reach it yet.
        let directory = self.make_own(&place)?.join(name);
        if let Some(known) = group.directory_in(&place) {
            setting.write(&place, known)?;
            return Ok(None);
        }
        make(&directory)?;
        group.directories.push(directory.clone());
        if place.v2 {
            group.v2 = Some(open_group(&directory)?);
        } else {
            group.v1.push(directory.clone());
        }
        setting.write(&place, &directory)?;
        Ok(Some(directory))
    }

    /// Makes this starter's directory in a hierarchy and lets the controller through to its groups.
    fn make_own(&mut self, place: &Place) -> Result<PathBuf, CgroupError> {
        let own = place.parent.join(&self.own_name);
        // Another starter that ends now may remove the shared parent under our hands.
        for _ in 0..SHARED_TRIES {
            make(&place.parent)?;
            match make(&own) {
                Err(CgroupError::Refused { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                done => {
                    done?;
                    break;
                }
            }
        }
        if !self.own.contains(&own) {
            self.own.push(own.clone());
        }
        if place.v2 {
            // From the top of what is ours to change down to the own directory; levels that have it already say so.
            let enable = format!("+{}", place.controller.name());
            for level in place.levels.iter().chain([&place.parent, &own]) {
                let file = level.join("cgroup.subtree_control");
                let enabled = fs::read_to_string(&file).unwrap_or_default();
                if !enabled.split_whitespace().any(|name| name == place.controller.name()) {
                    write(&file, &enable)?;
                }
            }
        }
        Ok(own)
    }

    /// Removes what starters that are gone have left, as far as it is empty. Returns how many directories went.
    #[must_use]
    pub fn sweep(&self) -> usize {
        let mut removed = 0;
        for parent in self.hierarchies.parents() {
            let Ok(entries) = fs::read_dir(&parent) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
                    continue;
                };
                let Some((pid, start)) = rest.split_once('-') else {
                    continue;
                };
                let (Ok(pid), Ok(start)) = (pid.parse::<u32>(), start.parse::<u64>()) else {
                    continue;
                };
                if start_time(pid) == Some(start) {
                    continue;
                }
                for child in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                    // Fails on the group's own files, which go with it.
                    removed += usize::from(fs::remove_dir(child.path()).is_ok());
                }
                removed += usize::from(fs::remove_dir(entry.path()).is_ok());
            }
            remove_shared(&parent);
        }
        removed
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for own in &self.own {
            let _ = fs::remove_dir(own);
            own.parent().map(remove_shared);
        }
    }
}

impl Group {
    /// None yet.
    pub(crate) fn none() -> Self {
        Self {
            directories: Vec::new(),
            v2: None,
            v1: Vec::new(),
        }
    }

    /// The directory in this place's hierarchy, if there is one.
    fn directory_in(&self, place: &Place) -> Option<&Path> {
        let mut directories = self.directories.iter();
        directories
            .find(|directory| directory.starts_with(&place.parent))
            .map(PathBuf::as_path)
    }

    /// The name that its directories have in common.
    pub(crate) fn name(&self) -> Option<&str> {
        self.directories.first()?.file_name()?.to_str()
    }

    /// A v2 group that exists.
    #[cfg(test)]
    pub(crate) fn in_v2(directory: PathBuf) -> Result<Self, CgroupError> {
        let v2 = Some(open_group(&directory)?);
        Ok(Self {
            directories: vec![directory],
            v2,
            v1: Vec::new(),
        })
    }

    /// The v2 group to clone into, if there is one.
    #[must_use]
    pub fn v2(&self) -> Option<&OwnedFd> {
        self.v2.as_ref()
    }

    /// Moves a process into the v1 groups.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Refused`].
    pub fn admit(&self, pid: u32) -> Result<(), CgroupError> {
        self.v1
            .iter()
            .try_for_each(|group| write(&group.join("cgroup.procs"), &pid.to_string()))
    }

    /// The directories, one for each hierarchy.
    #[must_use]
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Removes the groups. True once none is left.
    pub fn remove(&mut self) -> bool {
        self.directories.retain(|directory| match fs::remove_dir(directory) {
            Ok(()) => false,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        });
        self.directories.is_empty()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.remove();
    }
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/PID/stat` (`proc_pid_stat(5)`).
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may itself hold both spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_settings_of_both_versions() {
        let limits = Limits {
            memory_bytes: Some(1 << 30),
            pids: Some(64),
            cpu_millis: Some(1500),
            cpu_weight: Some(100),
        };
        let settings = limits.settings().unwrap();
        assert_eq!(settings[2].v2, ("cpu.max", "150000 100000".to_owned()));
        assert_eq!(settings[3].v1, vec![("cpu.shares", "1024".to_owned())]);
        assert_eq!(
            limits.describe(),
            "memory 1073741824 bytes, 64 threads, 1.500 processors, processor weight 100"
        );
        assert!(Limits::default().settings().unwrap().is_empty());
    }

    #[test]
    fn values_out_of_range_name_the_limit() {
        for limits in [
            Limits {
                memory_bytes: Some(4095),
                ..Limits::default()
            },
            Limits {
                pids: Some(0),
                ..Limits::default()
            },
            Limits {
                cpu_millis: Some(9),
                ..Limits::default()
            },
            Limits {
                cpu_weight: Some(10_001),
                ..Limits::default()
            },
        ] {
            assert!(
                matches!(limits.settings(), Err(CgroupError::Range { .. })),
                "{limits:?}"
            );
        }
    }

    #[test]
    fn start_times_are_stable() {
        let own = std::process::id();
        assert!(start_time(own).is_some());
        assert_eq!(start_time(own), start_time(own));
        assert_eq!(start_time(u32::MAX), None);
    }
}
