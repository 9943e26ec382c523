//! Starts components through the keeper, which is their parent: it jails them, reaps them, and cleans up behind a manager that is killed.
//!
//! ```text
//!   own keeper:    none --(first start, or one after its death)--> there --(its connection closes)--> none
//!                                                                    '--(it stands still)--> another one; it is one of the others
//!   other keepers: those of managers before this one, as long as anything lives there
//! ```
//!
//! `still` is about one that stands still. `link` is the connection with one of them; `succession` is how the next manager finds them, `asking` how it takes them over, `roster` what it knows of one
//! that does not answer.

mod asking;
mod link;
mod roster;
mod still;
mod succession;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use futures::{channel::oneshot, future::LocalBoxFuture};
use sepal_runner::{
    cgroup::Limits,
    keeper::{Inherited, InheritedState, KeeperClient, KeeperError, OWN},
    layer::Layer,
    outer::{ComponentSpec, JailSpec, Program, SpawnError},
    startup::{CONTROL, HandleKind, KVM},
};
use sepal_schema::{
    config::Limits as ResourceLimits,
    error::{Error, Kind},
    transport::Handle,
};

pub use self::{
    asking::{Answer, Asking, Silent},
    roster::Known,
};
use self::{
    link::{Beside, Link, Waiters, exit, failure as start_failure},
    roster::Roster,
    succession::Keepers,
};
use crate::{
    component::{ComponentStarter, Custody, Exit, StartRequest, Started},
    host,
    state::State,
};

/// The component's program and the keeper's, beside the manager's own unless another folder is given.
const COMPONENT: &str = "vmm-component";
const KEEPER: &str = "sepal-keeper";

/// How long a start may take until the component's program runs.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the keeper may take to take notice of a start; that takes less than a millisecond.
const NOTICE: Duration = Duration::from_secs(3);
/// How long the manager waits for a keeper at its own end.
const PARTING: Duration = Duration::from_secs(2);

/// The programs that the manager runs.
#[derive(Debug)]
pub struct Programs {
    component: OwnedFd,
    label: PathBuf,
    keeper: PathBuf,
}

impl Programs {
    /// Finds them in a folder.
    ///
    /// # Errors
    /// A sentence that names the program that is missing or cannot be used.
    pub fn find(folder: &Path) -> Result<Self, SpawnError> {
        let open = |name| Program::open(folder.join(name));
        // Only to see that it is there: it is started by its path.
        open(KEEPER)?;
        let (component, label) = open(COMPONENT)?.into_parts();
        Ok(Self {
            component,
            label,
            keeper: folder.join(KEEPER),
        })
    }

    fn component(&self) -> Result<Program, Error> {
        let copy = self.component.try_clone();
        let copy = copy.map_err(|error| start_failure(format!("the component's program: {error}")))?;
        Program::from_fd(copy, &self.label).map_err(|error| start_failure(error.to_string()))
    }
}

/// How long a keeper that no manager follows remembers what has ended, once nothing of it lives any more.
const LINGER: Duration = Duration::from_secs(3600);

/// Starts components. Clones share one keeper.
#[derive(Clone)]
pub struct KeeperStarter(Rc<Shared>);

struct Shared {
    handle: Handle,
    programs: Programs,
    /// Files that the keeper removes when the manager is killed, each with the lock file whose holder they belong to.
    files: Vec<(PathBuf, PathBuf)>,
    /// Where the next manager finds the keepers.
    state: State,
    own: RefCell<Option<Rc<Link>>>,
    others: RefCell<Vec<Rc<Link>>>,
    /// What is kept for the next manager beside no component; none as long as there is to be no next one.
    for_successor: RefCell<Option<BTreeMap<String, OwnedFd>>>,
    last_id: Cell<u64>,
}

/// What an earlier manager left with one of its keepers.
pub struct Inheritance {
    /// What it kept beside no component, by label.
    pub own: BTreeMap<String, Vec<OwnedFd>>,
    /// What it kept beside components.
    pub orphans: Vec<Orphan>,
}

/// What an earlier manager kept beside a component.
pub struct Orphan {
    /// By label.
    pub kept: BTreeMap<String, Vec<OwnedFd>>,
    /// Where it is kept.
    pub custody: Rc<dyn Custody>,
    /// What has become of the component.
    pub fate: Fate,
}

/// What has become of a component whose manager has gone.
pub enum Fate {
    /// It lives.
    Lives {
        /// Its process id on the host.
        pid: u32,
        /// Kills the process; may be called again, and after the end.
        kill: Box<dyn Fn()>,
        /// Resolves when the process is gone and reaped.
        exit: LocalBoxFuture<'static, Exit>,
    },
    /// It has ended.
    Ended(Exit),
}

impl KeeperStarter {
    /// Starts the keeper, which removes `files` if this process is killed. With `state` there can be components that outlive this process.
    ///
    /// # Errors
    /// The keeper does not start.
    pub fn new(
        handle: &Handle,
        programs: Programs,
        files: Vec<(PathBuf, PathBuf)>,
        state: State,
    ) -> Result<Self, KeeperError> {
        let shared = Rc::new(Shared {
            handle: handle.clone(),
            programs,
            files,
            state,
            own: RefCell::default(),
            others: RefCell::default(),
            for_successor: RefCell::default(),
            last_id: Cell::new(0),
        });
        shared.own_keeper()?;
        Ok(Self(shared))
    }

    /// Takes over from the keepers that earlier managers have left, and removes what is left of those that have ended. Waits for them for 2 s at most; those
    /// that have not answered by then go on being asked.
    pub async fn inherit(&self) -> (Vec<Inheritance>, Asking) {
        let nothing = || (Vec::new(), Asking::default());
        let Ok(state) = self.0.state.folder() else {
            return nothing();
        };
        let folder = state.keepers();
        let opened =
            Keepers::open(&folder, false).inspect_err(|error| tracing::error!("{}: {error}", folder.display()));
        let Ok(Some(keepers)) = opened else {
            return nothing();
        };
        let mut asking = Asking::begin(&self.0, keepers);
        let inherited = asking.first(&self.0.handle).await;
        if let Ok(Some(keepers)) = Keepers::open(&folder, false) {
            keepers.sweep();
        }
        (inherited, asking)
    }

    /// Lets go of the keepers. What outlives the manager goes on, everything else is ended, and waited for; a keeper that stands still, for 2 s at most.
    pub fn close(&self) {
        let part = |link: &Link, stays: bool| {
            link.end_rest();
            let closed = link.take().map(|keeper| match stays {
                true => keeper.leave(PARTING),
                false => keeper.close_within(PARTING),
            });
            match closed {
                Some(Err(KeeperError::Unresponsive { .. })) => {
                    tracing::warn!("{}; it is not waited for", link.silence())
                }
                Some(Err(error)) => tracing::warn!("{error}"),
                Some(Ok(())) | None => {}
            }
        };
        for link in self.0.others.take() {
            part(&link, true);
        }
        if let Some(link) = self.0.own.take() {
            part(&link, link.has_durable());
        }
    }
}

impl Shared {
    fn inheritance(&self, link: Rc<Link>, all: Vec<Inherited>) -> Inheritance {
        let mut inheritance = Inheritance {
            own: BTreeMap::new(),
            orphans: Vec::new(),
        };
        for Inherited { id, state, kept, .. } in all {
            if id == OWN {
                inheritance.own = kept;
                continue;
            }
            let fate = match state {
                InheritedState::None => Fate::Ended(Exit::Unknown("it was never started".to_owned())),
                InheritedState::Failed(message) => Fate::Ended(Exit::Unknown(message)),
                InheritedState::Exited(status) => Fate::Ended(exit(status)),
                InheritedState::Starting => Self::lives(&link, id, 0, None),
                InheritedState::Running { pid, pidfd, .. } => Self::lives(&link, id, pid, Some(pidfd)),
            };
            let custody: Rc<dyn Custody> = Rc::new(Beside { link: link.clone(), id });
            // Until it is released: whatever becomes of this manager, the next one is to find it.
            if let Err(error) = custody.set_durable() {
                tracing::error!("{error}");
            }
            inheritance.orphans.push(Orphan { kept, custody, fate });
        }
        if let Some(kept) = &*self.for_successor.borrow()
            && let Err(error) = keep_own(&link, kept)
        {
            tracing::debug!("{}", error.message);
        }
        self.others.borrow_mut().push(link);
        inheritance
    }

    fn lives(link: &Rc<Link>, id: u64, pid: u32, process: Option<OwnedFd>) -> Fate {
        let (killed, waiters) = (link.clone(), link.expect(id));
        link.runs(id, pid, process);
        Fate::Lives {
            pid,
            kill: Box::new(move || killed.kill(id)),
            exit: told(waiters.has_exited),
        }
    }

    /// The keeper for what is started from now on.
    fn own_keeper(&self) -> Result<Rc<Link>, KeeperError> {
        let usable = |link: &&Rc<Link>| link.is_there() && !link.stands_still();
        if let Some(link) = self.own.borrow().as_ref().filter(usable) {
            return Ok(link.clone());
        }
        let mut keeper = KeeperClient::start(&self.programs.keeper)?;
        for (file, lock) in &self.files {
            keeper.remove_unless_locked(file, lock)?;
        }
        tracing::debug!(pid = keeper.pid(), "keeper started");
        let link = Link::new(&self.handle, keeper, None)?;
        if let Some(still) = self.own.replace(Some(link.clone())).filter(|before| before.is_there()) {
            tracing::error!("{}; components are started by another one from now on", still.silence());
            self.others.borrow_mut().push(still);
        }
        if let Some(kept) = &*self.for_successor.borrow() {
            // What it can be told later still, nothing depends on yet.
            if let Err(error) = self.offer(&link).and_then(|()| keep_own(&link, kept)) {
                tracing::error!("{}", error.message);
            }
        }
        Ok(link)
    }

    /// Says to a keeper how the next manager comes.
    fn offer(&self, link: &Link) -> Result<(), Error> {
        let failed = |error: std::io::Error| {
            let message = format!("no guest can outlive this manager: {error}");
            Error::new(Kind::NoStorage, message).about("durable")
        };
        let keepers = Keepers::open(&self.state.folder()?.keepers(), true).map_err(failed)?;
        let keepers = keepers.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let offer = keepers.offer().map_err(failed)?;
        link.set_roster(Roster::open(offer.roster).map_err(failed)?);
        link.ask(|keeper| {
            for path in &offer.paths {
                keeper.remove_with_keeper(path)?;
            }
            keeper.offer_succession(offer.listener, &offer.key, LINGER)
        })
    }

    fn spawn(self: &Rc<Self>, request: &StartRequest) -> Result<Spawned, Error> {
        let failed = |what: &str, error: &dyn std::fmt::Display| start_failure(format!("{what}: {error}"));
        let (socket, theirs) = UnixStream::pair().map_err(|error| failed("no socket for the component", &error))?;
        let (words, stderr) = std::io::pipe().map_err(|error| failed("no pipe for the component's log", &error))?;
        // Without a manager nobody reads it: a component that waited for room would stand still, and its guest with it.
        rustix::io::ioctl_fionbio(&stderr, true).map_err(|error| failed("no pipe for the component's log", &error))?;
        let kvm = host::open_kvm()?;
        let mut spec = ComponentSpec::new(self.programs.component()?, c"vmm-component".to_owned());
        spec.stderr = Some(stderr.into());
        spec.jail = jail(&request.limits, &request.waived_layers)?;
        let spec_failed = |error: SpawnError| start_failure(error.to_string());
        spec.handles
            .add(CONTROL, HandleKind::Socket, theirs.into())
            .map_err(spec_failed)?;
        spec.handles
            .add(KVM, HandleKind::Kvm, kvm.into())
            .map_err(spec_failed)?;

        let link = self.own_keeper().map_err(|error| start_failure(error.to_string()))?;
        let id = self.last_id.get() + 1;
        self.last_id.set(id);
        let waiters = link.expect(id);
        if let Err(error) = link.ask(|keeper| keeper.spawn(id, spec)) {
            link.forget(id);
            return Err(error);
        }
        Ok(Spawned {
            link,
            id,
            waiters,
            socket,
            stderr: words.into(),
        })
    }

    /// Follows a start to its end.
    async fn follow(&self, spawned: Spawned) -> Result<Started, NotStarted> {
        let Spawned {
            link,
            id,
            waiters,
            socket,
            stderr,
        } = spawned;
        let mut unwanted = Unwanted {
            link: link.clone(),
            id: Some(id),
        };
        let Waiters {
            mut has_started,
            has_exited,
        } = waiters;
        let mut answer = self.handle.timeout(NOTICE, &mut has_started).await;
        if answer.is_err() {
            if link.look() {
                return Err(NotStarted::Still(link.silence()));
            }
            answer = self.handle.timeout(START_TIMEOUT - NOTICE, has_started).await;
        }
        let pid = match answer {
            Ok(Ok(started)) => started?,
            Ok(Err(_)) => return Err(start_failure("the keeper is gone".to_owned()).into()),
            Err(_) if link.look() => return Err(NotStarted::Still(link.silence())),
            Err(_) => {
                let seconds = START_TIMEOUT.as_secs();
                return Err(start_failure(format!("the component did not start within {seconds} s")).into());
            }
        };
        unwanted.id = None;
        let killed = link.clone();
        Ok(Started {
            pid,
            socket,
            stderr: Some(stderr),
            kill: Box::new(move || killed.kill(id)),
            exit: told(has_exited),
            custody: Some(Rc::new(Beside { link, id })),
        })
    }
}

/// Why a component does not run.
enum NotStarted {
    /// The keeper stands still, in words.
    Still(String),
    Failed(Error),
}

impl From<Error> for NotStarted {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<NotStarted> for Error {
    fn from(reason: NotStarted) -> Self {
        match reason {
            NotStarted::Still(words) => start_failure(format!("the component did not start: {words}")),
            NotStarted::Failed(error) => error,
        }
    }
}

/// A component that was asked for.
struct Spawned {
    link: Rc<Link>,
    id: u64,
    waiters: Waiters,
    socket: UnixStream,
    stderr: OwnedFd,
}

fn told(has_exited: oneshot::Receiver<Exit>) -> LocalBoxFuture<'static, Exit> {
    Box::pin(async move {
        let exited = has_exited.await;
        exited.unwrap_or_else(|_| Exit::Unknown("the keeper does not say how it ended".to_owned()))
    })
}

fn keep_own(link: &Link, kept: &BTreeMap<String, OwnedFd>) -> Result<(), Error> {
    for (label, fd) in kept {
        let fd = fd
            .try_clone()
            .map_err(|error| Error::new(Kind::NoResources, error.to_string()))?;
        link.ask(|keeper| keeper.keep_descriptors(OWN, label, vec![fd]))?;
    }
    Ok(())
}

/// Kills a component that nobody waits for any more before it has started.
struct Unwanted {
    link: Rc<Link>,
    id: Option<u64>,
}

impl Drop for Unwanted {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.link.kill(id);
        }
    }
}

impl ComponentStarter for KeeperStarter {
    fn start(&self, request: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>> {
        let shared = self.0.clone();
        Box::pin(async move {
            let spawned = shared.spawn(&request)?;
            match shared.follow(spawned).await {
                // By another one.
                Err(NotStarted::Still(_)) => {}
                started => return Ok(started?),
            }
            let spawned = shared.spawn(&request)?;
            Ok(shared.follow(spawned).await?)
        })
    }

    fn check(&self, request: &StartRequest) -> Result<(), Error> {
        jail(&request.limits, &request.waived_layers)?;
        host::open_kvm().map(drop)
    }

    fn set_limits(&self, pid: u32, limits: ResourceLimits) -> LocalBoxFuture<'static, Result<(), Error>> {
        let (own, others) = (self.0.own.borrow(), self.0.others.borrow());
        let mut links = others.iter().chain(own.iter());
        let found = links.find_map(|link| Some((link.clone(), link.id_of(pid)?)));
        Box::pin(async move {
            match found {
                Some((link, id)) => link.set_limits(id, cgroup_limits(&limits)).await,
                None => Err(Error::new(Kind::NotRunning, "its component has ended")),
            }
        })
    }

    fn outlived(&self) -> Result<(), Error> {
        self.0.state.folder().map(drop)
    }

    fn keep_for_successor(&self, kept: BTreeMap<String, OwnedFd>) -> Result<(), Error> {
        self.0.state.folder()?;
        let link = self.0.own_keeper().map_err(|error| start_failure(error.to_string()))?;
        let offered = match &*self.0.for_successor.borrow() {
            Some(_) => Ok(()),
            None => self.0.offer(&link),
        };
        let told = offered.and_then(|()| keep_own(&link, &kept));
        // Whether or not anything of this manager's own can go on: what it has taken over does.
        for other in self.0.others.borrow().iter().filter(|link| link.is_there()) {
            // One that had nothing any more has ended meanwhile, and takes nothing along.
            if let Err(error) = keep_own(other, &kept) {
                tracing::debug!("{}", error.message);
            }
        }
        told?;
        *self.0.for_successor.borrow_mut() = Some(kept);
        Ok(())
    }
}

/// The jail that a configuration asks for.
fn jail(limits: &ResourceLimits, waived_layers: &[String]) -> Result<JailSpec, Error> {
    let mut jail = JailSpec::default();
    for (i, name) in waived_layers.iter().enumerate() {
        let layer: Layer = name.parse().map_err(|_| {
            let known: Vec<&str> = Layer::ALL.into_iter().map(Layer::name).collect();
            let message = format!(
                "the jail has no layer \"{}\"; there are {}",
                name.escape_debug(),
                known.join(", ")
            );
            Error::bad_config(format!("waivedLayers[{i}]"), message)
        })?;
        jail.waived.insert(layer);
    }
    jail.limits = cgroup_limits(limits);
    Ok(jail)
}

/// Limits as control groups have them.
fn cgroup_limits(limits: &ResourceLimits) -> Limits {
    let some = |value: u32| (value != 0).then_some(value);
    Limits {
        memory_bytes: (limits.memory_mib != 0).then_some(limits.memory_mib.saturating_mul(1 << 20)),
        pids: some(limits.tasks),
        cpu_millis: some(limits.cpu_percent.saturating_mul(10)),
        cpu_weight: some(limits.cpu_weight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_converted_and_none_is_none() {
        assert_eq!(jail(&ResourceLimits::default(), &[]).unwrap(), JailSpec::default());
        let limits = ResourceLimits {
            memory_mib: 64,
            cpu_percent: 150,
            cpu_weight: 7,
            tasks: 9,
        };
        let limits = jail(&limits, &[]).unwrap().limits;
        assert_eq!(limits.memory_bytes, Some(64 << 20));
        assert_eq!(
            (limits.cpu_millis, limits.cpu_weight, limits.pids),
            (Some(1500), Some(7), Some(9))
        );
    }

    #[test]
    fn waived_layers_must_exist() {
        let waived = ["landlock".to_owned(), "seccomp".to_owned()];
        assert!(
            jail(&ResourceLimits::default(), &waived)
                .unwrap()
                .waives(Layer::Seccomp)
        );
        let error = jail(&ResourceLimits::default(), &["landlock".to_owned(), "moat".to_owned()]).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "waivedLayers[1]"));
        assert!(error.message.contains("seccomp"), "{}", error.message);
    }

    #[test]
    fn a_missing_program_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Programs::find(folder.path()).unwrap_err().to_string();
        assert!(error.contains("sepal-keeper"), "{error}");
        std::fs::write(folder.path().join("sepal-keeper"), "").unwrap();
        let error = Programs::find(folder.path()).unwrap_err().to_string();
        assert!(error.contains("vmm-component"), "{error}");
    }
}
