//! Seals the process: puts the inner layers in force one by one, and checks the outer ones.
//!
//! The order matters: `/proc` is read before the root goes, the root needs capabilities, dropping the bounding set needs
//! one, and the filter comes last because it forbids all the rest.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{FILTERED, landlock};
use crate::layer::{Layer, LayerStatus};
use crate::seccomp::{self, ThreadRole};
use crate::startup::Startup;

/// How a component's jail is to be; comes with its startup handles.
#[derive(Clone, Debug)]
pub struct SealSpec {
    pub(super) startup: Startup,
}

/// Why a component is not sealed. It has to end then.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// A required layer could not be put in force.
    #[error(
        "jail layer {layer} is unavailable: {cause}; to make it available, {remedy}; to start without it, waive {layer}",
        remedy = layer.remedy()
    )]
    Layer {
        /// The layer.
        layer: Layer,
        /// What failed, and how.
        cause: String,
    },
    /// The process that started this one is dead.
    #[error("the process that started this component is gone")]
    StarterGone,
    /// The process has more than one thread.
    #[error("the process has {0} threads; the jail is sealed while it has one")]
    Threads(u64),
    /// [`seal`] was called before.
    #[error("the jail is sealed already")]
    AlreadySealed,
    /// [`super::narrow`] before [`seal`].
    #[error("a thread's filter can be narrowed only after the jail is sealed")]
    NotSealed,
    /// The system refused something that is no layer.
    #[error("sealing the jail: {action}: {source}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
}

impl SealError {
    /// The layer that is to blame, if it is one.
    #[must_use]
    pub fn layer(&self) -> Option<Layer> {
        match self {
            Self::Layer { layer, .. } => Some(*layer),
            _ => None,
        }
    }
}

/// A failed step of a layer.
fn step<T, E: std::fmt::Display>(layer: Layer, what: &str, result: Result<T, E>) -> Result<T, SealError> {
    result.map_err(|error| SealError::Layer {
        layer,
        cause: format!("{what}: {error}"),
    })
}

impl SealSpec {
    /// True if the starter gave this layer up.
    #[must_use]
    pub fn waives(&self, layer: Layer) -> bool {
        self.startup.waived.contains(&layer)
    }

    /// Runs `enforce` unless the layer is waived; it returns the details.
    fn layer(
        &self,
        report: &mut Vec<LayerStatus>,
        layer: Layer,
        enforce: impl FnOnce() -> Result<String, SealError>,
    ) -> Result<(), SealError> {
        report.push(if self.waives(layer) {
            LayerStatus::waived(layer)
        } else {
            LayerStatus::holds(layer, enforce()?)
        });
        Ok(())
    }
}

/// Seals the process. On success the calling thread has the [`ThreadRole::Control`] filter, and what later threads start
/// with is the same.
///
/// # Errors
///
/// [`SealError`]; the process is in a state between then, and has to end.
pub fn seal(spec: &SealSpec) -> Result<Vec<LayerStatus>, SealError> {
    let threads = fs::metadata("/proc/self/task")
        .map_err(system("reading /proc/self/task"))?
        .nlink()
        .saturating_sub(2);
    if threads != 1 {
        return Err(SealError::Threads(threads));
    }
    FILTERED
        .set(!spec.waives(Layer::Seccomp))
        .map_err(|_| SealError::AlreadySealed)?;
    die_with_starter()?;

    let mut report = Vec::with_capacity(Layer::ALL.len());
    let own = rustix::fs::open(
        "/proc/self/ns",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(system("opening /proc/self/ns"))?;
    for (layer, _, name) in Layer::NAMESPACES {
        spec.layer(&mut report, layer, || {
            check_namespace(spec, layer, &own, name)?;
            if layer == Layer::PidNamespace && std::process::id() != 1 {
                return step(layer, "its first process", Err("this process is not"));
            }
            // The mount namespace is only half of its layer; the other half follows below.
            Ok(if layer == Layer::Root {
                "empty read-only tmpfs".to_owned()
            } else {
                "of its own".to_owned()
            })
        })?;
    }
    if spec.startup.own_uid {
        spec.layer(&mut report, Layer::HostUid, || check_host_uid(spec))?;
    } else if spec.waives(Layer::HostUid) {
        report.push(LayerStatus::waived(Layer::HostUid));
    } else {
        let uid = rustix::process::getuid().as_raw();
        let detail = mapped_uid().map_or_else(
            |_| format!("runs as uid {uid}"),
            |uid| format!("runs as its starter's uid {uid}"),
        );
        report.push(LayerStatus::not_requested(Layer::HostUid, detail));
    }
    report.push(match &spec.startup.cgroup {
        Some(limits) => LayerStatus::holds(Layer::Cgroup, limits.clone()),
        None => LayerStatus::not_requested(Layer::Cgroup, "no limits"),
    });
    drop(own);
    if !spec.waives(Layer::Root) {
        empty_root(!spec.waives(Layer::UserNamespace))?;
    }
    spec.layer(&mut report, Layer::Rlimits, || limit_resources(spec))?;
    spec.layer(&mut report, Layer::NoNewPrivs, || {
        step(
            Layer::NoNewPrivs,
            "PR_SET_NO_NEW_PRIVS",
            rustix::thread::set_no_new_privs(true),
        )?;
        Ok("set".to_owned())
    })?;
    spec.layer(&mut report, Layer::Landlock, || {
        landlock::deny_all().map_err(|cause| SealError::Layer {
            layer: Layer::Landlock,
            cause,
        })
    })?;
    spec.layer(&mut report, Layer::Capabilities, drop_capabilities)?;
    spec.layer(&mut report, Layer::NotDumpable, || {
        let set = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
        step(Layer::NotDumpable, "PR_SET_DUMPABLE", set)?;
        Ok("set".to_owned())
    })?;
    spec.layer(&mut report, Layer::Seccomp, || {
        if spec.waives(Layer::NoNewPrivs) {
            return step(
                Layer::Seccomp,
                "its condition",
                Err("it rests on no-new-privs, which is waived"),
            );
        }
        keep_allocator_from_files();
        let instructions = seccomp::program_len(ThreadRole::Control);
        step(
            Layer::Seccomp,
            "installing the filter",
            seccomp::install(ThreadRole::Control),
        )?;
        Ok(format!("control filter of {instructions} instructions"))
    })?;
    Ok(report)
}

/// Keeps the C library's allocator from reading files, which would kill a sealed process, and from a heap a thread. A heap of its own for each
/// thread costs memory, and system calls at its start. The first time that the allocator gives memory of such a heap back, it reads
/// `/proc/sys/vm/overcommit_memory` (glibc `malloc/arena.c`, `shrink_heap`); and where it has to choose how many heaps there may be, it counts the
/// host's CPUs in `/sys/devices/system/cpu/online` as soon as there are more than eight threads (`arena_get2`). With one heap it does neither. A
/// component's threads allocate little, and what they free and allocate again is in their own caches.
fn keep_allocator_from_files() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets numbers in the allocator; this is the only thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // The default, said so that it stays: large blocks are mappings of their own whatever was freed before.
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
    }
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> SealError {
    move |source| SealError::System {
        action,
        source: source.into(),
    }
}

/// Asks for SIGKILL when the starter dies, and checks that it has not died before.
fn die_with_starter() -> Result<(), SealError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(system("asking for the starter's death signal"))?;
    // Parentage cannot tell (in a process namespace of its own the parent is always 0), so the lifeline does: only the
    // starter holds its other end.
    // SAFETY: descriptor 0 was checked to be the lifeline when the handles were taken, and nothing closes it.
    let lifeline = unsafe { BorrowedFd::borrow_raw(0) };
    let mut poll = [PollFd::new(&lifeline, PollFlags::IN)];
    let immediately = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut poll, Some(&immediately)).map_err(system("polling the lifeline"))? {
        0 => Ok(()),
        _ => Err(SealError::StarterGone),
    }
}

/// Checks that this process's namespace, as its directory of them tells, is not the starter's.
fn check_namespace(spec: &SealSpec, layer: Layer, own: &OwnedFd, name: &str) -> Result<(), SealError> {
    let own = step(
        layer,
        "reading /proc/self/ns",
        rustix::fs::statat(own, name, AtFlags::empty()),
    )?
    .st_ino;
    let starters = spec.startup.namespaces.iter().find(|(known, _)| *known == layer);
    match starters {
        Some((_, starters)) if *starters != own => Ok(()),
        Some(_) => step(layer, "comparing with the starter's", Err("it is the same namespace")),
        None => step(
            layer,
            "comparing with the starter's",
            Err("the startup record does not name that"),
        ),
    }
}

/// The uid, outside, of the one uid that this process's user namespace has.
fn mapped_uid() -> Result<u32, String> {
    let map = fs::read_to_string("/proc/self/uid_map").map_err(|error| error.to_string())?;
    let mut numbers = map.split_whitespace().map(str::parse::<u32>);
    match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(0)), Some(Ok(outside)), Some(Ok(1)), None) => Ok(outside),
        _ => Err(format!("the map {:?} has more than one uid", map.trim())),
    }
}

fn check_host_uid(spec: &SealSpec) -> Result<String, SealError> {
    let outside = step(Layer::HostUid, "reading the uid map", mapped_uid())?;
    let (range, uid) = (spec.startup.uids, rustix::process::getuid().as_raw());
    if uid != 0 || outside < range.first || outside - range.first >= range.count {
        let cause = format!("this process has uid {uid} in a namespace that maps 0 to {outside}");
        return Err(SealError::Layer {
            layer: Layer::HostUid,
            cause,
        });
    }
    Ok(format!("uid and gid {outside}"))
}

/// Makes an empty tmpfs the root and lets go of everything mounted before.
fn empty_root(user_namespace: bool) -> Result<(), SealError> {
    const LAYER: Layer = Layer::Root;
    if !user_namespace {
        // A mount namespace of a new user namespace receives mounts but propagates none; without one, it has to be cut off.
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        step(
            LAYER,
            "making the mounts private",
            rustix::mount::mount_change("/", private),
        )?;
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    // Any directory serves as the mount point, and /proc is one that every start has read before.
    let mounted = rustix::mount::mount("none", "/proc", "tmpfs", flags, Some(c"size=4k,nr_inodes=1,mode=0555"));
    step(LAYER, "mounting a tmpfs", mounted)?;
    step(LAYER, "entering the tmpfs", rustix::process::chdir("/proc"))?;
    step(LAYER, "pivot_root", rustix::process::pivot_root(".", "."))?;
    // The old root lies on top of the new one now.
    step(
        LAYER,
        "unmounting the old root",
        rustix::mount::unmount(".", UnmountFlags::DETACH),
    )?;
    let now = step(LAYER, "checking the root", rustix::fs::statvfs("/"))?;
    let wanted =
        StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
    if !now.f_flag.contains(wanted) {
        return step(
            LAYER,
            "checking the root",
            Err(format!("its mount flags are {:?}", now.f_flag)),
        );
    }
    Ok(())
}

fn limit_resources(spec: &SealSpec) -> Result<String, SealError> {
    let rlimits = spec.startup.rlimits;
    let mut wanted = vec![
        ("RLIMIT_CORE", Resource::Core, 0),
        ("RLIMIT_NOFILE", Resource::Nofile, rlimits.open_files),
    ];
    if !spec.waives(Layer::UserNamespace) {
        wanted.push(("RLIMIT_NPROC", Resource::Nproc, rlimits.threads));
    }
    if let Some(bytes) = rlimits.file_size {
        wanted.push(("RLIMIT_FSIZE", Resource::Fsize, bytes));
    }
    let mut in_force = Vec::with_capacity(wanted.len());
    for (name, resource, value) in wanted {
        let most = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let value = value.min(most);
        let limit = Some(value);
        in_force.push(format!("{name} {value}"));
        step(
            Layer::Rlimits,
            name,
            rustix::process::setrlimit(
                resource,
                Rlimit {
                    current: limit,
                    maximum: limit,
                },
            ),
        )?;
    }
    Ok(in_force.join(", "))
}

/// Empties the bounding set, then all others (the ambient set goes with the permitted one).
fn drop_capabilities() -> Result<String, SealError> {
    const LAYER: Layer = Layer::Capabilities;
    for number in 0..u64::BITS {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // One past the last capability that this kernel has.
            Err(Errno::INVAL) => break,
            Err(errno) => return step(LAYER, "emptying the bounding set", Err(errno)),
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    step(LAYER, "capset", rustix::thread::set_capabilities(None, none))?;
    let now = step(LAYER, "capget", rustix::thread::capabilities(None))?;
    if now != none {
        return step(LAYER, "capget", Err(format!("{:?} are left", now.permitted)));
    }
    Ok("all sets empty".to_owned())
}
