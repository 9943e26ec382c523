//! Where this host's cgroup hierarchies are mounted, which controllers each offers, and where in them to make groups.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A controller that limits are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// Memory use.
    Memory,
    /// Number of processes and threads.
    Pids,
    /// Processor time.
    Cpu,
}

impl Controller {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Pids, Self::Cpu];

    /// The kernel's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
        }
    }
}

/// The directory in which starters make theirs: root's at the top of a hierarchy, a user's at the top of what the user's service manager has.
pub(super) const SHARED_PARENT: &str = "sepal";

/// The mounted hierarchies, and this process's place in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    v2: Option<Mounted>,
    v1: Vec<(Controller, Mounted)>,
    /// Controllers that the v2 tree offers.
    v2_controllers: Vec<Controller>,
    root: bool,
}

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mounted {
    mount: PathBuf,
    /// This process's group, relative to the mount; empty for the topmost one.
    own: PathBuf,
}

impl Mounted {
    /// The group, of version 2, at the top of what this user may change, if no process is in it: the topmost one for root; that of the user's service manager
    /// (`user@1000.service`), which has its processes and those of its units in groups below. A group with processes, as a unit's own, can pass no
    /// controllers on (linux/Documentation/admin-guide/cgroup-v2.rst, No Internal Process Constraint).
    fn top(&self, root: bool) -> Option<PathBuf> {
        if root {
            return Some(self.mount.clone());
        }
        let is_managers = |group: &&Path| {
            let name = group.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("user@") && name.ends_with(".service"))
        };
        let managers = self.own.ancestors().find(is_managers)?;
        Some(self.mount.join(managers))
    }
}

/// Where one controller's groups are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) controller: Controller,
    pub(super) v2: bool,
    pub(super) parent: PathBuf,
    /// The directories above `parent`, topmost first, whose `cgroup.subtree_control` has to let the controller through.
    pub(super) levels: Vec<PathBuf>,
}

impl Hierarchies {
    /// Reads `/proc/self/mountinfo` and `/proc/self/cgroup`.
    ///
    /// # Errors
    ///
    /// If those cannot be read.
    pub fn discover() -> io::Result<Self> {
        let root = rustix::process::geteuid().is_root();
        let mut found = Self::parse(
            &fs::read_to_string("/proc/self/mountinfo")?,
            &fs::read_to_string("/proc/self/cgroup")?,
            root,
        );
        if let Some(v2) = &found.v2 {
            // Below the topmost group this file lists what may be passed on; at the top it lists what the tree has.
            let offered = v2.top(root).unwrap_or_else(|| v2.mount.join(&v2.own));
            let offered = fs::read_to_string(offered.join("cgroup.controllers")).unwrap_or_default();
            found.v2_controllers = Controller::ALL
                .into_iter()
                .filter(|c| offered.split_whitespace().any(|name| name == c.name()))
                .collect();
        }
        Ok(found)
    }

    /// The pure part of [`Hierarchies::discover`]; the controllers of the v2 tree are not among its inputs.
    fn parse(mountinfo: &str, own_groups: &str, root: bool) -> Self {
        let own = |wanted: Option<Controller>| {
            own_groups
                .lines()
                .find_map(|line| {
                    let mut fields = line.splitn(3, ':');
                    let (id, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
                    let matches = match wanted {
                        None => id == "0" && controllers.is_empty(),
                        Some(controller) => controllers.split(',').any(|name| name == controller.name()),
                    };
                    matches.then(|| PathBuf::from(path.trim_start_matches('/')))
                })
                .unwrap_or_default()
        };
        let mut found = Self {
            root,
            ..Self::default()
        };
        for line in mountinfo.lines() {
            // proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, "-", type, source,
            // superblock options.
            let Some((mount, filesystem)) = line.split_once(" - ") else {
                continue;
            };
            let (Some(mount), mut filesystem) = (mount.split(' ').nth(4), filesystem.split(' ')) else {
                continue;
            };
            let mount = PathBuf::from(mount);
            match (filesystem.next(), filesystem.nth(1)) {
                (Some("cgroup2"), _) if found.v2.is_none() => found.v2 = Some(Mounted { mount, own: own(None) }),
                (Some("cgroup"), Some(options)) => {
                    for controller in Controller::ALL {
                        let offers = options.split(',').any(|name| name == controller.name());
                        if offers && !found.v1.iter().any(|(known, _)| *known == controller) {
                            found.v1.push((
                                controller,
                                Mounted {
                                    mount: mount.clone(),
                                    own: own(Some(controller)),
                                },
                            ));
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Where the v2 tree is mounted, if it is.
    #[must_use]
    pub fn v2_mount(&self) -> Option<&Path> {
        self.v2.as_ref().map(|v2| v2.mount.as_path())
    }

    /// How a controller is offered: 2, 1, or not at all.
    #[must_use]
    pub fn version_of(&self, controller: Controller) -> Option<u8> {
        if self.v2_controllers.contains(&controller) {
            Some(2)
        } else {
            self.v1.iter().any(|(known, _)| *known == controller).then_some(1)
        }
    }

    /// This process's own group in the hierarchy that offers a controller; none where nothing does.
    #[must_use]
    pub fn own_group(&self, controller: Controller) -> Option<PathBuf> {
        let mounted = self.mounted(controller)?;
        Some(mounted.mount.join(&mounted.own))
    }

    /// True if this process may make groups for every controller that is offered.
    pub(crate) fn writable(&self) -> bool {
        Controller::ALL
            .into_iter()
            .filter_map(|controller| self.place(controller))
            .all(|place| {
                // Root's parent may not exist yet; what counts then is the directory it would be made in.
                let existing = place.parent.ancestors().find(|directory| directory.exists());
                existing.is_some_and(crate::host::may_write)
            })
    }

    pub(super) fn place(&self, controller: Controller) -> Option<Place> {
        let v2 = self.v2_controllers.contains(&controller);
        let mounted = self.mounted(controller)?;
        let top = mounted.top(self.root).filter(|_| v2);
        Some(Place {
            controller,
            v2,
            parent: self.parent_in(mounted, v2),
            // A user without a service manager passes controllers on from the group that was delegated, its own.
            levels: top.into_iter().collect(),
        })
    }

    fn mounted(&self, controller: Controller) -> Option<&Mounted> {
        if self.v2_controllers.contains(&controller) {
            return self.v2.as_ref();
        }
        self.v1
            .iter()
            .find_map(|(known, mounted)| (*known == controller).then_some(mounted))
    }

    /// Every directory in which starters of this kind make theirs.
    pub(super) fn parents(&self) -> Vec<PathBuf> {
        let v2 = self.v2.iter().map(|mounted| (mounted, true));
        let v1 = self.v1.iter().map(|(_, mounted)| (mounted, false));
        let mut parents: Vec<PathBuf> = v2.chain(v1).map(|(mounted, v2)| self.parent_in(mounted, v2)).collect();
        parents.dedup();
        parents
    }

    fn parent_in(&self, mounted: &Mounted, v2: bool) -> PathBuf {
        match mounted.top(self.root) {
            Some(top) if v2 || self.root => top.join(SHARED_PARENT),
            _ => mounted.mount.join(&mounted.own),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
broken line
";
    const OWN: &str = "4:memory:/a/b\n1:cpu,cpuacct:/\n0::/user.slice/x\n";

    #[test]
    fn a_hybrid_host_gives_v1_controllers() {
        let found = Hierarchies::parse(HYBRID, OWN, false);
        assert_eq!(found.v2_mount(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(found.version_of(Controller::Memory), Some(1));
        assert_eq!(found.version_of(Controller::Pids), None);
        let place = found.place(Controller::Memory).unwrap();
        assert_eq!(
            (place.v2, place.parent),
            (false, PathBuf::from("/sys/fs/cgroup/memory/a/b"))
        );
        let own = found.own_group(Controller::Memory);
        assert_eq!(own, Some(PathBuf::from("/sys/fs/cgroup/memory/a/b")));
        let root = Hierarchies::parse(HYBRID, OWN, true);
        assert_eq!(
            root.place(Controller::Cpu).unwrap().parent,
            PathBuf::from("/sys/fs/cgroup/cpu/sepal")
        );
    }

    #[test]
    fn a_users_groups_are_where_no_process_is() {
        let service = "0::/user.slice/user-7.slice/user@7.service/app.slice/sepal.service\n2:memory:/x\n";
        let mut found = Hierarchies::parse(HYBRID, service, false);
        found.v2_controllers = vec![Controller::Pids];
        let place = found.place(Controller::Pids).unwrap();
        let top = PathBuf::from("/sys/fs/cgroup/unified/user.slice/user-7.slice/user@7.service");
        assert_eq!((place.parent, place.levels), (top.join("sepal"), vec![top.clone()]));
        // Nobody delegates anything of version 1 so.
        let v1 = found.place(Controller::Memory).unwrap();
        assert_eq!(
            (v1.parent, v1.levels),
            (PathBuf::from("/sys/fs/cgroup/memory/x"), vec![])
        );
        assert!(found.parents().contains(&top.join("sepal")));
        // A tree that was delegated in another way.
        let mut other = Hierarchies::parse(HYBRID, OWN, false);
        other.v2_controllers = vec![Controller::Pids];
        let place = other.place(Controller::Pids).unwrap();
        let own = PathBuf::from("/sys/fs/cgroup/unified/user.slice/x");
        assert_eq!((place.parent, place.levels), (own, vec![]));
    }

    #[test]
    fn a_v2_tree_is_preferred_and_passed_through_from_the_top() {
        let mut found = Hierarchies::parse(HYBRID, OWN, true);
        found.v2_controllers = vec![Controller::Memory];
        let place = found.place(Controller::Memory).unwrap();
        assert!(place.v2);
        assert_eq!(place.parent, PathBuf::from("/sys/fs/cgroup/unified/sepal"));
        assert_eq!(place.levels, vec![PathBuf::from("/sys/fs/cgroup/unified")]);
    }
}
