//! The threads that run vCPUs, as the host shows them: found by their names in `/proc/PID/task` (proc_pid_task(5)), which every component gives them.
//!
//! A component that has been taken over may name its threads as it likes. All that comes of it is that others of its own threads are pinned, or told of.

use std::{collections::BTreeMap, fs, io};

use rustix::{
    io::Errno,
    thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity},
};
use sepal_schema::config::MAX_CPUS;

/// The most threads of a component that are looked at: 64 vCPUs and as many devices have fewer.
const MOST_THREADS: usize = 1024;

/// What the host tells of a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Its id on the host.
    pub(crate) id: u32,
    /// How long it ran, in nanoseconds.
    pub(crate) cpu_time_ns: u64,
    /// How long it was ready to run and did not, in nanoseconds.
    pub(crate) wait_time_ns: u64,
    /// It waits for something: inside KVM, of a vCPU that runs, that is an interrupt.
    pub(crate) sleeps: bool,
    /// The processor on which it ran last.
    pub(crate) last_cpu: u16,
    /// Those on which it may run.
    pub(crate) cpus: Vec<u16>,
}

/// The ids of the threads of a component that run vCPUs, by the vCPU's index.
///
/// # Errors
/// There is no such process.
pub(crate) fn find(pid: u32) -> io::Result<BTreeMap<u8, u32>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))?.take(MOST_THREADS) {
        let entry = entry?;
        let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // One that has ended meanwhile is none.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if let (Some(id), Some(vcpu)) = (id, vcpu_of(&name)) {
            found.insert(vcpu, id);
        }
    }
    Ok(found)
}

/// What the host tells of the threads of a component that run vCPUs, by the vCPU's index. One that ends meanwhile is left out.
///
/// # Errors
/// There is no such process.
pub(crate) fn look(pid: u32) -> io::Result<BTreeMap<u8, Seen>> {
    let threads = find(pid)?.into_iter();
    Ok(threads.filter_map(|(vcpu, id)| Some((vcpu, seen(pid, id)?))).collect())
}

fn seen(pid: u32, id: u32) -> Option<Seen> {
    let read = |what| fs::read_to_string(format!("/proc/{pid}/task/{id}/{what}")).ok();
    let (sleeps, last_cpu) = parse_stat(&read("stat")?)?;
    // A kernel without scheduler information has no times to tell.
    let (cpu_time_ns, wait_time_ns) = read("schedstat")
        .and_then(|text| parse_schedstat(&text))
        .unwrap_or((0, 0));
    Some(Seen {
        id,
        cpu_time_ns,
        wait_time_ns,
        sleeps,
        last_cpu,
        cpus: list(&sched_getaffinity(thread(id)).ok()?),
    })
}

/// Whether a thread of a component waits for something at this moment; none if it is no more.
pub(crate) fn sleeps(pid: u32, id: u32) -> Option<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{id}/stat")).ok()?;
    let (sleeps, _) = parse_stat(&stat)?;
    Some(sleeps)
}

/// The vCPU that a thread of this name runs: `vcpu12`.
fn vcpu_of(name: &str) -> Option<u8> {
    let number = name.trim_end().strip_prefix("vcpu")?;
    number.parse().ok().filter(|vcpu| *vcpu < MAX_CPUS)
}

/// State and last processor (fields 3 and 39 of proc_pid_stat(5)): whether it sleeps, and where it ran.
fn parse_stat(stat: &str) -> Option<(bool, u16)> {
    // The name before may contain anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let last_cpu = fields.nth(39 - 3 - 1)?.parse().ok()?;
    Some((matches!(state, "S" | "D" | "I"), last_cpu))
}

/// Nanoseconds on a processor, and waiting for one (Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat").
fn parse_schedstat(schedstat: &str) -> Option<(u64, u64)> {
    let mut fields = schedstat.split_ascii_whitespace().map(|field| field.parse().ok());
    Some((fields.next()??, fields.next()??))
}

fn thread(id: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(id).ok()?)
}

/// The processors that a process may run on: those of its first thread, which nobody pins.
///
/// # Errors
/// There is no such process.
pub(crate) fn allowed(pid: u32) -> io::Result<Vec<u16>> {
    let thread = thread(pid).ok_or(Errno::SRCH)?;
    Ok(list(&sched_getaffinity(Some(thread))?))
}

/// The processors that this process may run on, and with it those that it starts.
///
/// # Errors
/// The host has more processors than the interface can name.
pub(crate) fn own() -> io::Result<Vec<u16>> {
    Ok(list(&sched_getaffinity(None)?))
}

/// Lets a thread run on these processors only.
///
/// # Errors
/// `ESRCH`: it has ended; `EINVAL`: none of them is there, or may be used; `EPERM`.
pub(crate) fn pin(id: u32, cpus: &[u16]) -> Result<(), Errno> {
    sched_setaffinity(Some(thread(id).ok_or(Errno::SRCH)?), &set(cpus))
}

fn set(cpus: &[u16]) -> CpuSet {
    let mut set = CpuSet::new();
    let numbers = cpus.iter().map(|cpu| usize::from(*cpu));
    numbers
        .filter(|cpu| *cpu < CpuSet::MAX_CPU)
        .for_each(|cpu| set.set(cpu));
    set
}

fn list(set: &CpuSet) -> Vec<u16> {
    (0..)
        .take(CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(usize::from(*cpu)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn threads_of_vcpus_are_known_by_their_names() {
        assert_eq!(vcpu_of("vcpu0\n"), Some(0));
        assert_eq!(vcpu_of("vcpu63\n"), Some(63));
        for other in ["vcpu64\n", "vcpu\n", "vcpu-1\n", "vcpux\n", "disk0\n", "", "vcpu256\n"] {
            assert_eq!(vcpu_of(other), None, "{other}");
        }
    }

    #[test]
    fn what_the_kernel_tells_is_read() {
        let rest =
            "1 1 1 0 -1 4194304 103 0 0 0 0 0 0 0 20 0 1 0 5964439 3133440 404 1 2 3 4 0 0 0 0 0 0 0 0 0 17 5 0 0 0";
        assert_eq!(parse_stat(&format!("8945 (a) b) S {rest}")), Some((true, 5)));
        assert_eq!(parse_stat(&format!("8945 (vcpu0) R {rest}")), Some((false, 5)));
        assert_eq!(parse_stat("8945 (vcpu0) R 1 2"), None);
        assert_eq!(parse_stat(""), None);
        assert_eq!(parse_schedstat("1224108 137113 2\n"), Some((1_224_108, 137_113)));
        assert_eq!(parse_schedstat("1224108\n"), None);
    }

    /// A thread of this name, until it is dropped.
    fn named(name: &str) -> (u32, mpsc::Sender<()>) {
        let (sender, receiver) = mpsc::channel();
        let (told, tells) = mpsc::channel();
        let body = move || {
            told.send(rustix::thread::gettid()).unwrap();
            let _: Result<(), _> = receiver.recv();
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(body).unwrap();
        (tells.recv().unwrap().as_raw_nonzero().get().unsigned_abs(), sender)
    }

    #[test]
    fn threads_are_found_looked_at_and_pinned() {
        let (id, _alive) = named("vcpu41");
        let _other = named("disk41");
        assert_eq!(find(std::process::id()).unwrap().get(&41), Some(&id));
        let own = own().unwrap();
        let before = look(std::process::id()).unwrap().remove(&41).unwrap();
        assert_eq!((before.id, &before.cpus), (id, &own));
        assert!(sleeps(std::process::id(), id).is_some());
        assert_eq!(sleeps(std::process::id(), u32::MAX), None);
        let last = *own.last().unwrap();
        // One that is not there does no harm beside one that is.
        pin(id, &[last, 1023]).unwrap();
        let after = look(std::process::id()).unwrap().remove(&41).unwrap();
        assert_eq!(after.cpus, [last]);
        assert_eq!(pin(id, &[1023, 65535]), Err(Errno::INVAL));
        assert_eq!(allowed(std::process::id()).unwrap(), own);
        pin(id, &own).unwrap();
        assert!(find(u32::MAX).is_err() && allowed(u32::MAX).is_err());
        assert_eq!(pin(u32::MAX, &own), Err(Errno::SRCH));
    }

    proptest! {
        #[test]
        fn hostile_texts_are_no_threads(text in ".*") {
            let _ = (parse_stat(&text), parse_schedstat(&text), vcpu_of(&text));
        }

        #[test]
        fn sets_are_as_listed(cpus in proptest::collection::btree_set(0..2000_u16, 0..64)) {
            let cpus: Vec<u16> = cpus.into_iter().collect();
            let there: Vec<u16> = cpus.iter().copied().filter(|cpu| usize::from(*cpu) < CpuSet::MAX_CPU).collect();
            prop_assert_eq!(list(&set(&cpus)), there);
        }
    }
}
