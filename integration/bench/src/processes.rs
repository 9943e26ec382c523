//! What the kernel tells about processes: memory by mapping, threads, processor time, wake-ups.
//!
//! The parsers are pure; [`Process`] reads. Everything is documented in proc(5) and the kernel's `Documentation/filesystems/proc.rst`. Other users'
//! processes can be read by root only: so can a guest's, which runs under a user of its own.

use std::{
    collections::BTreeMap,
    fs, io,
    ops::{Add, AddAssign, Sub},
    path::PathBuf,
};

/// One mapping of a process, as `smaps` tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Access rights, as in `rw-p`.
    pub(crate) access: String,
    /// The file's inode; 0 without a file.
    pub(crate) inode: u64,
    /// The file, or what the kernel calls it, like `[heap]`; empty for anonymous memory.
    pub(crate) name: String,
    /// Addresses that it has, in KiB.
    pub(crate) size: u64,
    /// What of it is in memory.
    pub(crate) memory: Memory,
}

/// What is in memory, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All of it.
    pub(crate) rss: u64,
    /// All of it, what is shared divided by the number of sharers.
    pub(crate) pss: u64,
    /// What no other process has: it would be free without this one.
    pub(crate) uss: u64,
}

impl Add for Memory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            rss: self.rss + other.rss,
            pss: self.pss + other.pss,
            uss: self.uss + other.uss,
        }
    }
}

impl AddAssign for Memory {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Memory {
    fn sum<I: Iterator<Item = Self>>(memories: I) -> Self {
        memories.fold(Self::default(), Self::add)
    }
}

/// The mappings in the text of `/proc/PID/smaps`. Lines that are not understood are passed over.
pub(crate) fn parse_smaps(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some(mapping) = parse_mapping(line) {
            mappings.push(mapping);
            continue;
        }
        let Some(mapping) = mappings.last_mut() else { continue };
        let mut words = line.split_whitespace();
        let (Some(field), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u64>)) else {
            continue;
        };
        match field {
            "Size:" => mapping.size = kib,
            "Rss:" => mapping.memory.rss = kib,
            "Pss:" => mapping.memory.pss = kib,
            "Private_Clean:" | "Private_Dirty:" => mapping.memory.uss += kib,
            _ => {}
        }
    }
    mappings
}

/// The line that begins a mapping: addresses, access, offset, device, inode, and the name, if there is one.
fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    u64::from_str_radix(start, 16).ok()?;
    u64::from_str_radix(end, 16).ok()?;
    let access = words.next()?.to_owned();
    let inode = words.nth(2)?.parse().ok()?;
    let name = words.collect::<Vec<_>>().join(" ");
    Some(Mapping {
        access,
        inode,
        name,
        ..Mapping::default()
    })
}

/// The mappings without the guest's own memory, which has `guest` KiB; `None` if that is not recognized.
///
/// It is told by what a VMM cannot do without: addresses for all of the guest's memory. Memory by a file that is only in memory (memfd, shmem) is
/// the guest's if all mappings of that file together are as large as the guest's memory. Without such a file, it is each writable anonymous
/// mapping that is as large by itself. Nothing else of a VMM is that large, if the guest has more than a few dozen MiB; the sizes of what is
/// left show that in the notes of a run. Page tables and what KVM keeps in the kernel are no mappings: nobody's are counted here.
pub(crate) fn beyond_guest(mappings: Vec<Mapping>, guest: u64) -> Option<Vec<Mapping>> {
    let in_memory = |mapping: &Mapping| {
        ["/memfd:", "/dev/shm/", "/dev/zero"]
            .iter()
            .any(|prefix| mapping.name.starts_with(prefix))
    };
    let mut files: BTreeMap<u64, u64> = BTreeMap::new();
    for mapping in mappings.iter().filter(|mapping| in_memory(mapping)) {
        *files.entry(mapping.inode).or_default() += mapping.size;
    }
    files.retain(|_, size| *size >= guest);
    let anonymous = |mapping: &Mapping| {
        let unnamed = mapping.name.is_empty() || mapping.name.starts_with("[anon");
        files.is_empty() && unnamed && mapping.access.starts_with("rw") && mapping.size >= guest
    };
    let (guests, rest): (Vec<_>, Vec<_>) = mappings
        .into_iter()
        .partition(|mapping| in_memory(mapping) && files.contains_key(&mapping.inode) || anonymous(mapping));
    (!guests.is_empty()).then_some(rest)
}

/// What mappings have together.
pub(crate) fn total(mappings: &[Mapping]) -> Memory {
    mappings.iter().map(|mapping| mapping.memory).sum()
}

/// The names of the largest mappings by PSS, those of one name and access together.
pub(crate) fn largest(mappings: &[Mapping], count: usize) -> Vec<(String, u64)> {
    let mut by_name: BTreeMap<String, u64> = BTreeMap::new();
    for mapping in mappings.iter().filter(|mapping| mapping.memory.pss > 0) {
        let name = match mapping.name.rsplit('/').next() {
            None | Some("") => "anonymous",
            Some(name) => name,
        };
        *by_name.entry(format!("{name} {}", mapping.access)).or_default() += mapping.memory.pss;
    }
    let mut largest: Vec<_> = by_name.into_iter().collect();
    largest.sort_by_key(|(_, kib)| std::cmp::Reverse(*kib));
    largest.truncate(count);
    largest
}

/// What a process has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    /// How often its threads stopped running, of their own will or not: each time, something has woken them.
    pub(crate) wakeups: u64,
    /// Nanoseconds that its threads ran.
    pub(crate) cpu_ns: u64,
}

impl Add for Activity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            wakeups: self.wakeups + other.wakeups,
            cpu_ns: self.cpu_ns + other.cpu_ns,
        }
    }
}

impl Sub for Activity {
    type Output = Self;

    /// What came since `earlier`. Threads that ended since take with them what they did.
    fn sub(self, earlier: Self) -> Self {
        Self {
            wakeups: self.wakeups.saturating_sub(earlier.wakeups),
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
        }
    }
}

impl std::iter::Sum for Activity {
    fn sum<I: Iterator<Item = Self>>(activities: I) -> Self {
        activities.fold(Self::default(), Self::add)
    }
}

/// A number of `/proc/PID/status`.
pub(crate) fn status_field(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A thread's switches, from its `status`, and its nanoseconds, from its `schedstat`: time run, time waited, times it was run.
pub(crate) fn parse_activity(status: &str, schedstat: &str) -> Option<Activity> {
    let switches = |kind| status_field(status, kind);
    Some(Activity {
        wakeups: switches("voluntary_ctxt_switches")? + switches("nonvoluntary_ctxt_switches")?,
        cpu_ns: schedstat.split_whitespace().next()?.parse().ok()?,
    })
}

/// The parent, from `/proc/PID/stat`: after the name, which can have any character in it, the state and then the parent.
pub(crate) fn parse_parent(stat: &str) -> Option<u32> {
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(1)?.parse().ok()
}

/// `root` and all below it, given (process, parent) of all processes.
pub(crate) fn descendants(parents: &[(u32, u32)], root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&of) = found.get(next) {
        let children = parents
            .iter()
            .filter(|(_, parent)| *parent == of)
            .map(|(child, _)| *child);
        let new: Vec<_> = children.filter(|child| !found.contains(child)).collect();
        found.extend(new);
        next += 1;
    }
    found
}

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(pub(crate) u32);

impl Process {
    fn path(self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.0))
    }

    fn read(self, file: &str) -> io::Result<String> {
        let path = self.path(file);
        fs::read_to_string(&path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }

    /// It and all processes below it.
    pub(crate) fn tree(self) -> io::Result<Vec<Self>> {
        let mut parents = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // Processes end while one looks.
            if let Some(parent) = Self(pid).read("stat").ok().as_deref().and_then(parse_parent) {
                parents.push((pid, parent));
            }
        }
        Ok(descendants(&parents, self.0).into_iter().map(Self).collect())
    }

    /// The name of its program.
    pub(crate) fn name(self) -> io::Result<String> {
        Ok(self.read("comm")?.trim().to_owned())
    }

    /// Its mappings.
    pub(crate) fn mappings(self) -> io::Result<Vec<Mapping>> {
        Ok(parse_smaps(&self.read("smaps")?))
    }

    /// The mappings of it and all below it, without the guest's memory of so many KiB.
    pub(crate) fn beyond_guest(self, guest: u64) -> io::Result<Vec<Mapping>> {
        let mut rest = Vec::new();
        let mut recognized = false;
        for process in self.tree()? {
            let mappings = process.mappings()?;
            match beyond_guest(mappings.clone(), guest) {
                Some(mappings) => {
                    recognized = true;
                    rest.extend(mappings);
                }
                None => rest.extend(mappings),
            }
        }
        if !recognized {
            return Err(io::Error::other(
                "the guest's memory is not recognized among its mappings",
            ));
        }
        Ok(rest)
    }

    /// KiB of page tables, of it and all below it.
    pub(crate) fn page_tables(self) -> io::Result<u64> {
        let each = self.tree()?.into_iter().map(|process| {
            let status = process.read("status")?;
            Ok(status_field(&status, "VmPTE").unwrap_or(0))
        });
        each.sum()
    }

    /// Threads, of it and all below it.
    pub(crate) fn threads(self) -> io::Result<usize> {
        let each = self.tree()?.into_iter().map(|process| Ok(process.tasks()?.len()));
        each.sum()
    }

    /// The names of its threads.
    pub(crate) fn thread_names(self) -> io::Result<Vec<String>> {
        let names = self.tasks()?.into_iter().map(|task| {
            let name = self.read(&format!("task/{task}/comm"))?;
            Ok(name.trim().to_owned())
        });
        names.collect()
    }

    /// Descriptors that it has open.
    pub(crate) fn descriptors(self) -> io::Result<usize> {
        Ok(fs::read_dir(self.path("fd"))?.count())
    }

    fn tasks(self) -> io::Result<Vec<String>> {
        let tasks = fs::read_dir(self.path("task"))?;
        tasks
            .map(|task| Ok(task?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    /// What its threads did, since each of them began.
    pub(crate) fn activity(self) -> io::Result<Activity> {
        let each = self.tasks()?.into_iter().filter_map(|task| {
            // Threads end while one looks.
            let status = self.read(&format!("task/{task}/status")).ok()?;
            let schedstat = self.read(&format!("task/{task}/schedstat")).ok()?;
            parse_activity(&status, &schedstat)
        });
        Ok(each.sum())
    }
}

#[cfg(test)]
mod tests;
