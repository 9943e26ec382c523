//! Starts components through the keeper, which is their parent: it jails them, reaps them, and cleans up behind a manager that is killed.
//!
//! ```text
//!   no keeper --(first start, or one after the keeper's death)--> keeper --(its connection closes)--> no keeper
//!
//!   a component:  spawn --> Started --> Exited          each told to whoever waits for it
//!                    '----> Failed
//!                    '----------------> the keeper is gone, and every component with it
//! ```

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use event_listener::Event;
use futures::{
    FutureExt,
    channel::oneshot,
    future::{LocalBoxFuture, pending, select_all},
};
use sepal_runner::{
    cgroup::Limits,
    keeper::{KeeperClient, KeeperError, KeeperEvent},
    layer::Layer,
    outer::{ComponentSpec, ExitStatus, JailSpec, Program, SpawnError},
    startup::{CONTROL, HandleKind, KVM},
};
use sepal_schema::{
    config::Limits as ResourceLimits,
    error::{Error, Kind},
    transport::{AsyncFd, Handle, reactor::Direction},
};

use crate::{
    component::{ComponentStarter, Exit, StartRequest, Started},
    host,
};

/// The component's program and the keeper's, beside the manager's own unless another folder is given.
const COMPONENT: &str = "vmm-component";
const KEEPER: &str = "sepal-keeper";

/// How long a start may take until the component's program runs.
const START_TIMEOUT: Duration = Duration::from_secs(10);

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

/// Whoever waits for what the keeper says about a component.
struct Waiting {
    started: Option<oneshot::Sender<Result<u32, Error>>>,
    exited: Option<oneshot::Sender<Exit>>,
}

/// Starts components. Clones share one keeper.
#[derive(Clone)]
pub struct KeeperStarter(Rc<Shared>);

struct Shared {
    handle: Handle,
    programs: Programs,
    /// Files that the keeper removes when the manager is killed.
    files: Vec<PathBuf>,
    keeper: RefCell<Option<KeeperClient>>,
    asked: Event,
    waiting: RefCell<HashMap<u64, Waiting>>,
    last_id: Cell<u64>,
}

impl KeeperStarter {
    /// Starts the keeper, which removes `files` if this process is killed.
    ///
    /// # Errors
    /// The keeper does not start.
    pub fn new(handle: &Handle, programs: Programs, files: Vec<PathBuf>) -> Result<Self, KeeperError> {
        let shared = Rc::new(Shared {
            handle: handle.clone(),
            programs,
            files,
            keeper: RefCell::default(),
            asked: Event::new(),
            waiting: RefCell::default(),
            last_id: Cell::new(0),
        });
        shared.ensure_keeper()?;
        Ok(Self(shared))
    }

    /// Ends the keeper and what still runs below it, and waits until it is done.
    pub fn close(&self) {
        let Some(keeper) = self.0.keeper.borrow_mut().take() else {
            return;
        };
        // The event loop has a descriptor of the connection, too, so that closing ours alone would not end it.
        let ended = rustix::net::shutdown(&keeper, rustix::net::Shutdown::Both).map_err(|errno| errno.to_string());
        if let Err(error) = ended.and_then(|()| keeper.close().map_err(|error| error.to_string())) {
            tracing::warn!("{error}");
        }
    }
}

impl Shared {
    fn ensure_keeper(self: &Rc<Self>) -> Result<(), KeeperError> {
        if self.keeper.borrow().is_some() {
            return Ok(());
        }
        let mut keeper = KeeperClient::start(&self.programs.keeper)?;
        for file in &self.files {
            keeper.remove_at_end(file)?;
        }
        let system = |action| move |source| KeeperError::System { action, source };
        let watched = keeper
            .as_fd()
            .try_clone_to_owned()
            .map_err(system("watching the connection"))?;
        let watched = self
            .handle
            .register(watched)
            .map_err(system("watching the connection"))?;
        tracing::debug!(pid = keeper.pid(), "keeper started");
        *self.keeper.borrow_mut() = Some(keeper);
        let shared = self.clone();
        self.handle.spawn(async move { shared.listen(watched).await });
        Ok(())
    }

    /// Hears what the keeper says, until it is gone.
    async fn listen(&self, watched: AsyncFd<OwnedFd>) {
        loop {
            let asked = self.asked.listen();
            // None: the manager itself has ended it.
            let Some(unsent) = self.take_events() else { return };
            watched.exhausted(Direction::Read);
            let room: LocalBoxFuture<'_, ()> = if unsent {
                watched.exhausted(Direction::Write);
                Box::pin(watched.writable())
            } else {
                Box::pin(pending())
            };
            select_all([
                Box::pin(watched.readable()) as LocalBoxFuture<'_, ()>,
                room,
                Box::pin(asked.map(drop)),
            ])
            .await;
        }
    }

    /// Sends what waits and takes what has come. Returns whether something still waits for room; none when the keeper is gone.
    fn take_events(&self) -> Option<bool> {
        let mut slot = self.keeper.borrow_mut();
        let keeper = slot.as_mut()?;
        loop {
            match keeper.try_recv() {
                Ok(Some(event)) => self.heard(event),
                Ok(None) => return Some(keeper.has_unsent()),
                Err(error) => {
                    tracing::error!("{error}; every component ended with it");
                    let keeper = slot.take();
                    drop(slot);
                    self.gone(keeper, &error.to_string());
                    return None;
                }
            }
        }
    }

    fn heard(&self, event: KeeperEvent) {
        let mut waiting = self.waiting.borrow_mut();
        match event {
            KeeperEvent::Started { id, pid, .. } => {
                if let Some(started) = waiting.get_mut(&id).and_then(|waiting| waiting.started.take()) {
                    let _ = started.send(Ok(pid));
                }
            }
            KeeperEvent::Failed { id, layer, message } => {
                if let Some(started) = waiting.remove(&id).and_then(|waiting| waiting.started) {
                    let error = start_failure(message).about(layer.map_or("", Layer::name));
                    let _ = started.send(Err(error));
                }
            }
            KeeperEvent::Exited { id, status } => {
                if let Some(exited) = waiting.remove(&id).and_then(|waiting| waiting.exited) {
                    let _ = exited.send(match status {
                        ExitStatus::Code(code) => Exit::Code(code),
                        ExitStatus::Signal(signal) => Exit::Signal(signal),
                    });
                }
            }
        }
    }

    fn gone(&self, keeper: Option<KeeperClient>, why: &str) {
        for (_, waiting) in self.waiting.take() {
            if let Some(started) = waiting.started {
                let _ = started.send(Err(start_failure(why.to_owned())));
            }
            if let Some(exited) = waiting.exited {
                let _ = exited.send(Exit::Unknown(format!("it ended with the keeper: {why}")));
            }
        }
        // Reaped away from the loop: it has closed its connection, but may not have ended yet.
        let reaping = self.handle.spawn_blocking(|| keeper.map(KeeperClient::close));
        self.handle.spawn(async move {
            // How it ended has been told, and work that nobody awaits is not done.
            let _ = reaping.await;
        });
    }

    fn spawn(self: &Rc<Self>, request: &StartRequest) -> Result<(u64, Waiters, UnixStream, OwnedFd), Error> {
        let failed = |what: &str, error: &dyn std::fmt::Display| start_failure(format!("{what}: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed("no socket for the component", &error))?;
        let (words, stderr) = std::io::pipe().map_err(|error| failed("no pipe for the component's log", &error))?;
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

        self.ensure_keeper().map_err(|error| start_failure(error.to_string()))?;
        let id = self.last_id.get() + 1;
        self.last_id.set(id);
        let (started, has_started) = oneshot::channel();
        let (exited, has_exited) = oneshot::channel();
        self.waiting.borrow_mut().insert(
            id,
            Waiting {
                started: Some(started),
                exited: Some(exited),
            },
        );
        let sent = match self.keeper.borrow_mut().as_mut() {
            Some(keeper) => keeper.spawn(id, spec).map_err(|error| start_failure(error.to_string())),
            None => Err(start_failure("the keeper is gone".to_owned())),
        };
        if let Err(error) = sent {
            self.waiting.borrow_mut().remove(&id);
            return Err(error);
        }
        self.asked.notify(usize::MAX);
        Ok((
            id,
            Waiters {
                has_started,
                has_exited,
            },
            ours,
            words.into(),
        ))
    }

    fn kill(&self, id: u64) {
        if !self.waiting.borrow().contains_key(&id) {
            return;
        }
        if let Some(keeper) = self.keeper.borrow_mut().as_mut()
            && let Err(error) = keeper.kill(id)
        {
            // What comes of it is heard by the listener.
            tracing::debug!("{error}");
        }
        self.asked.notify(usize::MAX);
    }
}

struct Waiters {
    has_started: oneshot::Receiver<Result<u32, Error>>,
    has_exited: oneshot::Receiver<Exit>,
}

/// Kills a component that nobody waits for any more before it has started.
struct Unwanted {
    shared: Rc<Shared>,
    id: Option<u64>,
}

impl Drop for Unwanted {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.shared.kill(id);
        }
    }
}

impl ComponentStarter for KeeperStarter {
    fn start(&self, request: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>> {
        let shared = self.0.clone();
        Box::pin(async move {
            let (id, waiters, socket, stderr) = shared.spawn(&request)?;
            let mut unwanted = Unwanted {
                shared: shared.clone(),
                id: Some(id),
            };
            let pid = match shared.handle.timeout(START_TIMEOUT, waiters.has_started).await {
                Ok(Ok(started)) => started?,
                Ok(Err(_)) => return Err(start_failure("the keeper is gone".to_owned())),
                Err(_) => {
                    let seconds = START_TIMEOUT.as_secs();
                    return Err(start_failure(format!("the component did not start within {seconds} s")));
                }
            };
            unwanted.id = None;
            let exited = waiters.has_exited;
            Ok(Started {
                pid,
                socket,
                stderr: Some(stderr),
                kill: Box::new(move || shared.kill(id)),
                exit: Box::pin(async move {
                    exited
                        .await
                        .unwrap_or_else(|_| Exit::Unknown("the keeper does not say how it ended".to_owned()))
                }),
            })
        })
    }

    fn check(&self, request: &StartRequest) -> Result<(), Error> {
        jail(&request.limits, &request.waived_layers)?;
        host::open_kvm().map(drop)
    }
}

fn start_failure(message: String) -> Error {
    Error::new(Kind::StartFailure, message)
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
    let some = |value: u32| (value != 0).then_some(value);
    jail.limits = Limits {
        memory_bytes: (limits.memory_mib != 0).then_some(limits.memory_mib.saturating_mul(1 << 20)),
        pids: some(limits.tasks),
        cpu_millis: some(limits.cpu_percent.saturating_mul(10)),
        cpu_weight: some(limits.cpu_weight),
    };
    Ok(jail)
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
