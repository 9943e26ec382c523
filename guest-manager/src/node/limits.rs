//! The limits of this process and its host that guests come up against, and how much of each is in use.
//!
//! Read for every guest that is started, so each question is one short read: what takes long (all processes of a user) is asked only where the cheap answer,
//! all tasks of the host, is too many.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::process::{Resource, getrlimit};
use sepal_runner::cgroup::{Controller, Hierarchies};

use crate::capacity::Used;

/// Where this process's descriptors are.
const OWN_DESCRIPTORS: &str = "/proc/self/fd";

/// This process's descriptors.
pub(crate) fn descriptors() -> Used {
    // Since Linux 6.2 the folder's size is their number (proc_pid_fd(5)).
    let counted = fs::metadata(OWN_DESCRIPTORS).map_or(0, |folder| folder.len());
    let used = match counted {
        0 => fs::read_dir(OWN_DESCRIPTORS).map_or(0, |entries| entries.count() as u64),
        counted => counted,
    };
    Used {
        used,
        most: getrlimit(Resource::Nofile).current,
    }
}

/// The limits of tasks (processes and threads) that hold for this process's components. Each can be another the next time: `systemctl set-property` changes those of
/// control groups, prlimit(1) and sysctl(8) the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tasks {
    /// This process is bound to its user's limit.
    user: bool,
    /// The control groups, this process's own and those above it, that may have a limit.
    groups: Vec<PathBuf>,
}

impl Tasks {
    /// Finds out which limits there may be.
    pub(crate) fn find() -> Self {
        let own = Hierarchies::discover()
            .ok()
            .and_then(|found| found.own_group(Controller::Pids));
        Self {
            // Root is not held to it (setrlimit(2): CAP_SYS_RESOURCE), and each of root's components has a uid of its own.
            user: !rustix::process::geteuid().is_root(),
            groups: own.map_or_else(Vec::new, |own| groups(&own)),
        }
    }

    /// The one that leaves least.
    pub(crate) fn look(&self) -> Used {
        let all = fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| parse_tasks(&text));
        let all = all.unwrap_or(0);
        let setting = |name: &str| number(Path::new("/proc/sys/kernel"), name);
        let system = Used {
            used: all,
            most: [setting("threads-max"), setting("pid_max")].into_iter().flatten().min(),
        };
        let user = getrlimit(Resource::Nproc)
            .current
            .filter(|_| self.user)
            .map(|most| Used {
                // No user has more than there are.
                used: if all <= most / 2 { all } else { tasks_of_user() },
                most: Some(most),
            });
        let groups = self.groups.iter().map(|group| Used {
            used: number(group, "pids.current").unwrap_or(0),
            most: number(group, "pids.max"),
        });
        let limits = [system].into_iter().chain(user).chain(groups);
        limits
            .min_by_key(|limit| limit.left().unwrap_or(u64::MAX))
            .unwrap_or_default()
    }
}

/// A control group and those above it, as far as they can have a limit of tasks: the topmost one of a hierarchy cannot.
fn groups(own: &Path) -> Vec<PathBuf> {
    let may_be_limited = |group: &&Path| group.join("pids.max").exists();
    own.ancestors().filter(may_be_limited).map(Path::to_owned).collect()
}

/// A file that holds one number; none if it is not there, or holds another thing (`max`).
fn number(folder: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
}

/// The number of tasks by the text of `/proc/loadavg` (proc_loadavg(5)): `0.20 0.18 0.12 1/80 11206`.
fn parse_tasks(text: &str) -> Option<u64> {
    let (_, all) = text.split_ascii_whitespace().nth(3)?.split_once('/')?;
    all.parse().ok()
}

/// All tasks of this process's user.
fn tasks_of_user() -> u64 {
    let own = rustix::process::getuid().as_raw();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let counts = processes.filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        count_of(&status, own)
    });
    counts.sum()
}

/// The tasks of a process of the user `uid`, by the text of its `/proc/PID/status` (proc_pid_status(5)).
fn count_of(status: &str, uid: u32) -> Option<u64> {
    let field = |wanted: &str| {
        let mut fields = status.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(key, _)| *key == wanted).map(|(_, value)| value.trim())
    };
    let real: u32 = field("Uid")?.split_ascii_whitespace().next()?.parse().ok()?;
    if real == uid {
        field("Threads")?.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_read() {
        assert_eq!(parse_tasks("0.20 0.18 0.12 1/80 11206\n"), Some(80));
        for text in ["", "0.20 0.18 0.12", "a b c d e", "a b c 1/x e"] {
            assert_eq!(parse_tasks(text), None, "{text}");
        }
        let status = "Name:\ta b\nUid:\t7\t8\t9\t10\nThreads:\t12\n";
        assert_eq!((count_of(status, 7), count_of(status, 8)), (Some(12), None));
        assert_eq!(count_of("Uid:\t7\n", 7), None);
    }

    #[test]
    fn the_nearest_group_counts_and_its_limit_may_change() {
        let top = tempfile::tempdir().unwrap();
        let own = top.path().join("above/own");
        fs::create_dir_all(&own).unwrap();
        let write = |group: &str, file: &str, text: &str| fs::write(top.path().join(group).join(file), text).unwrap();
        for (group, max, current) in [("above", "100\n", "90\n"), ("above/own", "max\n", "9\n")] {
            write(group, "pids.max", max);
            write(group, "pids.current", current);
        }
        let tasks = Tasks {
            user: false,
            groups: groups(&own),
        };
        assert_eq!(tasks.groups, [own.clone(), top.path().join("above")]);
        let used = |used, most| Used { used, most: Some(most) };
        assert_eq!(tasks.look(), used(90, 100));
        write("above/own", "pids.max", "12\n");
        assert_eq!(tasks.look(), used(9, 12));
        write("above/own", "pids.max", "max\n");
        assert_eq!(tasks.look(), used(90, 100));
    }

    #[test]
    fn this_process_has_descriptors_and_tasks() {
        let (before, opened) = (descriptors(), fs::File::open("/dev/null").unwrap());
        // Other tests open and close some meanwhile.
        assert!(before.used >= 3 && before.most.is_none_or(|most| most > before.used));
        drop(opened);
        assert!(tasks_of_user() >= 1);
        let tasks = Tasks::find().look();
        assert!(tasks.left().is_none_or(|left| left > 0), "{tasks:?}");
    }
}
