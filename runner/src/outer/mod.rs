//! The outer half: makes a component's namespaces, uid, groups and descriptors, and executes its binary.
//!
//! ```text
//!   starter                                   child
//!   ───────                                   ─────
//!   clone3(new namespaces, pidfd, cgroup) ──> lays its descriptors out, setsid
//!   uid and gid maps, v1 groups               waits
//!   one byte ───────────────────────────────> becomes uid 0 of its namespace, execveat
//!   end of file = it runs   <──────────────── (or: the step that failed, and errno)
//! ```
//!
//! The binary is executed after the user namespace was entered, so its memory belongs to that namespace. What needs the
//! old mounts (the dynamic linker) is done by then; [`crate::inner::seal`] gives up the rest.

mod child;
mod component;
mod diagnose;
mod spec;
mod uid;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Pid;
use rustix::thread::LinkNameSpaceType;

use crate::cgroup::{CgroupError, Group, Groups, Limits};
use crate::layer::Layer;
use crate::startup::{FIRST_HANDLE, STARTUP_VARIABLE, Startup};
pub use component::{Component, ExitStatus};
pub(crate) use diagnose::probe;
pub use spec::{ComponentSpec, Handles, JailSpec, Program, UidRange};
use uid::UidError;

/// Why a component did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The binary cannot be used.
    #[error("program {path}: {reason}")]
    Program {
        /// Its path, or what the caller calls it.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A startup handle is wrong.
    #[error("startup handle {name:?}: {reason}")]
    Handle {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A required layer of the jail is unavailable.
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
    /// A limit that was asked for cannot be enforced.
    #[error("limit cannot be enforced: {cause}")]
    Limit {
        /// Why.
        cause: String,
    },
    /// The system refused something that is no layer.
    #[error("starting a component: {action}: {source}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
}

impl SpawnError {
    /// The layer that is to blame, if it is one.
    #[must_use]
    pub fn layer(&self) -> Option<Layer> {
        match self {
            Self::Layer { layer, .. } => Some(*layer),
            Self::Limit { .. } => Some(Layer::Cgroup),
            _ => None,
        }
    }
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> SpawnError {
    move |source| SpawnError::System {
        action,
        source: source.into(),
    }
}

/// Starts components. It holds what all starts have in common.
///
/// A component dies with the *thread* that started it (`PR_SET_PDEATHSIG`) and with the `Runner`'s process, so
/// long-lived components are started by a single-threaded process: the keeper.
#[derive(Debug)]
pub struct Runner {
    null: OwnedFd,
    /// Both ends of the lifeline: the reading one goes to components, the writing one to nobody.
    lifeline: (OwnedFd, OwnedFd),
    namespaces: Vec<(Layer, u64)>,
    uid: u32,
    gid: u32,
    /// Where uids come from unless a start says otherwise.
    uids: UidRange,
    checked: Option<UidRange>,
    groups: Option<Groups>,
    started: u64,
    /// Since the first [`Runner::prepare`].
    ahead: Option<Ahead>,
}

impl Runner {
    /// Prepares to start components: opens `/dev/null`, makes the lifeline, reads the own identity and namespaces.
    ///
    /// # Errors
    ///
    /// [`SpawnError::System`].
    pub fn new() -> Result<Self, SpawnError> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(system("opening /dev/null"))?;
        let lifeline =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(system("making the lifeline"))?;
        let mut namespaces = Vec::new();
        for (layer, _, name) in Layer::NAMESPACES {
            let metadata = fs::metadata(format!("/proc/self/ns/{name}")).map_err(system("reading /proc/self/ns"))?;
            namespaces.push((layer, metadata.ino()));
        }
        let pids = namespaces.iter().find(|(layer, _)| *layer == Layer::PidNamespace);
        let uids =
            UidRange::of_this_host(pids.map_or(0, |(_, inode)| *inode)).map_err(system("reading the own id maps"))?;
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Self {
            null,
            lifeline,
            namespaces,
            uid,
            gid,
            uids,
            checked: None,
            groups: None,
            started: 0,
            ahead: None,
        })
    }

    /// Starts a component and waits until it runs its binary.
    ///
    /// # Errors
    ///
    /// [`SpawnError`]; nothing is left of the start then.
    pub fn spawn(&mut self, spec: ComponentSpec) -> Result<Component, SpawnError> {
        let mut component = self.start(spec)?;
        component.finish_start()?;
        Ok(component)
    }

    /// Starts a component without waiting for `exec`: when [`Component::starting`] is readable,
    /// [`Component::finish_start`] tells what became of it.
    ///
    /// # Errors
    ///
    /// [`SpawnError`]; nothing is left of the start then.
    pub fn start(&mut self, spec: ComponentSpec) -> Result<Component, SpawnError> {
        let group = self.make_group(&spec.jail)?;
        self.start_in(spec, group)
    }

    /// Starts a component in these groups.
    fn start_in(&mut self, spec: ComponentSpec, group: Option<Group>) -> Result<Component, SpawnError> {
        let jail = &spec.jail;
        let own_uid = self.uid == 0 && !jail.waives(Layer::HostUid);
        let user_namespace = !jail.waives(Layer::UserNamespace);
        if own_uid && !user_namespace {
            let cause = "it comes with the user namespace, which is waived".to_owned();
            return Err(SpawnError::Layer {
                layer: Layer::HostUid,
                cause,
            });
        }
        let uids = jail.uids.unwrap_or(self.uids);
        if own_uid && self.checked != Some(uids) {
            uids.check_foreign().map_err(|error| host_uid(&error))?;
            self.checked = Some(uids);
        }

        let child_channel;
        let channel;
        (channel, child_channel) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(system("making the start channel"))?;

        let stderr = spec.stderr.as_ref().map_or(self.null.as_fd(), AsFd::as_fd);
        let sources = [self.lifeline.0.as_fd(), self.null.as_fd(), stderr]
            .into_iter()
            .chain(spec.handles.fds.iter().map(AsFd::as_fd))
            .chain([child_channel.as_fd(), spec.program.fd.as_fd()]);
        let floor = FIRST_HANDLE + spec.handles.fds.len() as RawFd + 2;
        let mut above = Above::new(floor);
        let fds = sources.map(|fd| above.place(fd)).collect::<Result<Vec<_>, _>>()?;

        let startup = Startup {
            handles: spec.handles.entries.clone(),
            waived: jail.waived.iter().copied().collect(),
            namespaces: self.namespaces.clone(),
            own_uid,
            uids,
            rlimits: jail.rlimits,
            cgroup: group.as_ref().map(|_| jail.limits.describe()),
        };
        let record = serde_json::to_string(&startup).map_err(|error| SpawnError::System {
            action: "writing the startup record",
            source: error.into(),
        })?;
        let environment = CString::new(format!("{STARTUP_VARIABLE}={record}"))
            .map_err(|_| system("writing the startup record")(Errno::INVAL))?;
        let argv: Vec<_> = spec
            .args
            .iter()
            .map(|arg| arg.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        let envp = [environment.as_ptr(), std::ptr::null()];

        // The names that lock uids of a small range belong to a network namespace, which starters have to share.
        let locks = own_uid && !uids.is_exclusive_by_pid();
        let flags = self.take_ahead(flags_of(jail), locks)?;
        let flags = u64::from(flags.cast_unsigned());
        let plan = child::Plan {
            fds: &fds,
            become_namespace_root: own_uid,
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
        };
        let cgroup = group.as_ref().and_then(Group::v2).map(AsFd::as_fd);
        let (pid, pidfd) = clone_child(flags, cgroup, &plan).map_err(|error| diagnose::clone_failure(jail, &error))?;
        drop(child_channel);
        let mut component = Component {
            pid,
            pidfd,
            label: spec.program.label,
            uid: None,
            group,
            channel: Some(channel),
            exit: None,
        };

        // From here on dropping the component kills the child.
        component.admit(self, own_uid.then_some(uids), user_namespace)?;
        Ok(component)
    }

    /// Prepares the next start: moves the calling thread into empty network, IPC and UTS namespaces, which the next component takes
    /// over. Making them is most of what a start's namespaces cost, so the keeper does it while it has nothing to do.
    ///
    /// Only for single-threaded processes that need nothing of those. Does nothing where it is not permitted: the start makes
    /// its namespaces itself then.
    pub fn prepare(&mut self) {
        if self.ahead.is_none() {
            self.ahead = Ahead::here().ok();
        }
        if let Some(ahead) = &mut self.ahead
            && !ahead.unused
        {
            // SAFETY: changes the thread's namespaces and nothing of the process's memory or descriptors.
            ahead.unused = unsafe { libc::unshare(AHEAD_FLAGS) } == 0;
            ahead.away |= ahead.unused;
        }
    }

    /// Those of a start's namespaces that it has to make itself, after what [`Runner::prepare`] did. With `home`, or without one of those that are
    /// made ahead, the start has to happen in the namespaces that this process began in.
    fn take_ahead(&mut self, flags: libc::c_int, home: bool) -> Result<libc::c_int, SpawnError> {
        let Some(ahead) = &mut self.ahead else {
            return Ok(flags);
        };
        let prepared = std::mem::take(&mut ahead.unused);
        if home || flags & AHEAD_FLAGS != AHEAD_FLAGS {
            ahead.go_home().map_err(system("going back to the host's namespaces"))?;
            return Ok(flags);
        }
        Ok(if prepared { flags & !AHEAD_FLAGS } else { flags })
    }

    fn make_group(&mut self, jail: &JailSpec) -> Result<Option<Group>, SpawnError> {
        if jail.limits.is_empty() {
            return Ok(None);
        }
        let name = self.new_name();
        self.groups()?.create(&name, &jail.limits).map(Some).map_err(limit)
    }

    /// Changes the limits of a component that was started here to these and no others.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Limit`]: a value is out of its range (nothing has changed then), or this host cannot enforce it;
    /// [`SpawnError::System`].
    pub fn set_limits(&mut self, component: &mut Component, limits: &Limits) -> Result<(), SpawnError> {
        let pid = component.pid();
        let group = component.group.get_or_insert_with(Group::none);
        let name = group.name().map_or_else(|| self.new_name(), str::to_owned);
        self.groups()?.change(group, &name, pid, limits).map_err(limit)
    }

    fn groups(&mut self) -> Result<&mut Groups, SpawnError> {
        Ok(match &mut self.groups {
            Some(groups) => groups,
            none => none.insert(Groups::new().map_err(system("reading /proc/self/mountinfo"))?),
        })
    }

    /// A name for the groups of a component, which no other has.
    fn new_name(&mut self) -> String {
        self.started += 1;
        self.started.to_string()
    }
}

/// The kinds of namespaces that [`Runner::prepare`] makes, and where `/proc` has this thread's.
const AHEAD: [(LinkNameSpaceType, &str); 3] = [
    (LinkNameSpaceType::Network, "/proc/thread-self/ns/net"),
    (LinkNameSpaceType::InterProcessCommunication, "/proc/thread-self/ns/ipc"),
    (LinkNameSpaceType::HostNameAndNISDomainName, "/proc/thread-self/ns/uts"),
];
const AHEAD_FLAGS: libc::c_int = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// The namespaces, of the kinds that are made ahead, in which this process began.
#[derive(Debug)]
struct Ahead {
    home: Vec<(LinkNameSpaceType, OwnedFd)>,
    /// This process is in others. One that could not leave could not go back, either.
    away: bool,
    /// Those others were used by nobody.
    unused: bool,
}

impl Ahead {
    fn here() -> Result<Self, Errno> {
        let open = |(kind, path)| {
            let own = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            Ok((kind, own))
        };
        Ok(Self {
            home: AHEAD.into_iter().map(open).collect::<Result<_, Errno>>()?,
            away: false,
            unused: false,
        })
    }

    fn go_home(&mut self) -> Result<(), Errno> {
        if self.away {
            for (kind, own) in &self.home {
                rustix::thread::move_into_link_name_space(own.as_fd(), Some(*kind))?;
            }
            self.away = false;
        }
        Ok(())
    }
}

/// The flags of `clone3` for the namespaces of a jail.
fn flags_of(jail: &JailSpec) -> libc::c_int {
    Layer::NAMESPACES
        .iter()
        .filter(|(layer, ..)| !jail.waives(*layer))
        .fold(0, |flags, (_, flag, _)| flags | flag)
}

/// A limit that is out of range is for whoever asked; for all else the host's administrator can do something.
fn limit(error: CgroupError) -> SpawnError {
    let cause = match error {
        CgroupError::Range { .. } => error.to_string(),
        _ => format!("{error}; {}", Layer::Cgroup.remedy()),
    };
    SpawnError::Limit { cause }
}

fn host_uid(error: &UidError) -> SpawnError {
    SpawnError::Layer {
        layer: Layer::HostUid,
        cause: error.to_string(),
    }
}

/// Duplicates of descriptors that would be overwritten while the child lays out its own.
struct Above {
    floor: RawFd,
    kept: Vec<OwnedFd>,
}

impl Above {
    fn new(floor: RawFd) -> Self {
        Self {
            floor,
            kept: Vec::new(),
        }
    }

    fn place(&mut self, fd: BorrowedFd<'_>) -> Result<RawFd, SpawnError> {
        if fd.as_raw_fd() >= self.floor {
            return Ok(fd.as_raw_fd());
        }
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, self.floor).map_err(system("duplicating a handle"))?;
        let number = copy.as_raw_fd();
        self.kept.push(copy);
        Ok(number)
    }
}

/// Every signal, blocked while the child is made, so that no handler of the starter runs in it.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> Self {
        // SAFETY: both sets are locals that the calls fill; the calls fail only for a bad `how`.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: restores the set that `new` was given.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut());
        }
    }
}

/// linux/sched.h; `libc` has it in a type too small.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `clone3` with these namespace flags; the child runs the plan.
fn clone_child(flags: u64, cgroup: Option<BorrowedFd<'_>>, plan: &child::Plan<'_>) -> io::Result<(Pid, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid value of this plain struct.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | u64::from(libc::CLONE_PIDFD.cast_unsigned());
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    let blocked = SignalsBlocked::new();
    // SAFETY: the struct is valid for its size; without CLONE_VM the child runs on a copy of this memory.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if result == 0 {
        // SAFETY: this is the child, with every signal blocked; the plan was built from NULL-terminated arrays.
        unsafe { child::run(plan) }
    }
    let error = io::Error::last_os_error();
    drop(blocked);
    let pid = i32::try_from(result)
        .ok()
        .filter(|pid| *pid > 0)
        .and_then(Pid::from_raw)
        .ok_or(error)?;
    // SAFETY: CLONE_PIDFD stored a fresh descriptor, which nothing else owns.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

#[cfg(test)]
mod tests;
