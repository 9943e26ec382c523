//! The connection with one keeper: what is asked of it, and what it says of its components.
//!
//! ```text
//!   a component:  spawn --> Started --> Exited          each told to whoever waits for it
//!                    '----> Failed
//!                    '----------------> the keeper is gone, and every component with it
//! ```
//!
//! One that is to end, and of which the keeper says nothing, is ended without it (`still`): the keeper's late word is nobody's then.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    os::fd::{AsFd, OwnedFd},
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
    outer::ExitStatus,
};
use sepal_schema::{
    error::{Error, Kind},
    transport::{
        AsyncFd, Handle,
        reactor::{Direction, Task},
    },
};

use super::{
    roster::{Known, Roster},
    still,
};
use crate::component::{Custody, Exit};

/// How long it is waited for a keeper that is asked for something that takes it a moment.
const ANSWER: Duration = Duration::from_secs(10);

/// Whoever waits for what the keeper says about a component.
struct Waiting {
    started: Option<oneshot::Sender<Result<u32, Error>>>,
    exited: Option<oneshot::Sender<Exit>>,
    /// It is to end, with the keeper or without.
    ending: Option<Task>,
}

/// A component that runs.
struct Running {
    pid: u32,
    /// Its pidfd; none as long as it starts.
    process: Option<Rc<OwnedFd>>,
}

/// Is told what kept limits from holding, if something did.
type Limited = oneshot::Sender<Option<String>>;

/// What the keeper will say about a component.
pub(super) struct Waiters {
    pub(super) has_started: oneshot::Receiver<Result<u32, Error>>,
    pub(super) has_exited: oneshot::Receiver<Exit>,
}

/// The connection.
pub(super) struct Link {
    handle: Handle,
    /// The keeper's process id.
    pid: u32,
    /// It stood still when it was last looked, and has said nothing since.
    still: Cell<bool>,
    /// None once it is gone, or was let go of.
    keeper: RefCell<Option<KeeperClient>>,
    asked: Event,
    /// Nothing waits to be sent any more.
    sent: Event,
    waiting: RefCell<HashMap<u64, Waiting>>,
    /// The components that run, by their ids.
    running: RefCell<HashMap<u64, Running>>,
    /// Who waits to hear that the limits of an id hold, in the order in which they asked.
    limiting: RefCell<HashMap<u64, VecDeque<Limited>>>,
    /// The ids that outlive the manager.
    durable: RefCell<HashSet<u64>>,
    /// Where it is noted what they stand for.
    roster: RefCell<Option<Rc<Roster>>>,
}

impl Link {
    /// Hears what a keeper says, from now on.
    pub(super) fn new(
        handle: &Handle,
        keeper: KeeperClient,
        roster: Option<Rc<Roster>>,
    ) -> Result<Rc<Self>, KeeperError> {
        let system = |source| KeeperError::System {
            action: "watching the connection",
            source,
        };
        let watched = keeper.as_fd().try_clone_to_owned().map_err(system)?;
        let watched = handle.register(watched).map_err(system)?;
        let link = Rc::new(Self {
            handle: handle.clone(),
            pid: keeper.pid(),
            still: Cell::new(false),
            keeper: RefCell::new(Some(keeper)),
            asked: Event::new(),
            sent: Event::new(),
            waiting: RefCell::default(),
            running: RefCell::default(),
            limiting: RefCell::default(),
            durable: RefCell::default(),
            roster: RefCell::new(roster),
        });
        let listening = link.clone();
        handle.spawn(async move { listening.listen(watched).await });
        Ok(link)
    }

    /// Whether the keeper is there.
    pub(super) fn is_there(&self) -> bool {
        self.keeper.borrow().is_some()
    }

    /// What there is to say of the keeper when it does not answer.
    pub(super) fn silence(&self) -> String {
        still::words(self.pid)
    }

    /// Looks whether the keeper stands still: it has not read what was said to it a while ago, or is stopped.
    pub(super) fn look(&self) -> bool {
        let unheard = self.keeper.borrow().as_ref().is_some_and(KeeperClient::has_unheard);
        self.still.set(unheard || still::is_stopped(self.pid));
        self.still.get()
    }

    /// Whether it stood still at the last look, and has said nothing since.
    pub(super) fn stands_still(&self) -> bool {
        self.still.get()
    }

    /// Whether anything of it outlives the manager.
    pub(super) fn has_durable(&self) -> bool {
        !self.durable.borrow().is_empty()
    }

    /// From now on it is noted here what outlives the manager.
    pub(super) fn set_roster(&self, roster: Roster) {
        self.roster.replace(Some(Rc::new(roster)));
    }

    fn roster(&self) -> Option<Rc<Roster>> {
        self.roster.borrow().clone()
    }

    /// Kills what does not outlive the manager. The keeper does that, too, as soon as it is let go of and runs.
    pub(super) fn end_rest(&self) {
        let durable = self.durable.borrow();
        for (id, running) in &*self.running.borrow() {
            if let Some(process) = running.process.as_ref().filter(|_| !durable.contains(id)) {
                // Where that is not permitted, it is the keeper's.
                let _ = still::kill(process);
            }
        }
    }

    /// Lets go of the keeper.
    pub(super) fn take(&self) -> Option<KeeperClient> {
        self.keeper.borrow_mut().take()
    }

    /// Asks the keeper for something.
    ///
    /// # Errors
    /// `START_FAILURE`: it is gone.
    pub(super) fn ask<T>(&self, ask: impl FnOnce(&mut KeeperClient) -> Result<T, KeeperError>) -> Result<T, Error> {
        let asked = match self.keeper.borrow_mut().as_mut() {
            Some(keeper) => ask(keeper).map_err(|error| failure(error.to_string())),
            None => Err(failure("the keeper is gone".to_owned())),
        };
        self.asked.notify(usize::MAX);
        asked
    }

    /// Waits for what the keeper will say about a component.
    pub(super) fn expect(&self, id: u64) -> Waiters {
        let (started, has_started) = oneshot::channel();
        let (exited, has_exited) = oneshot::channel();
        let waiting = Waiting {
            started: Some(started),
            exited: Some(exited),
            ending: None,
        };
        self.waiting.borrow_mut().insert(id, waiting);
        Waiters {
            has_started,
            has_exited,
        }
    }

    /// Nothing is waited for: the component was never asked for.
    pub(super) fn forget(&self, id: u64) {
        self.waiting.borrow_mut().remove(&id);
    }

    /// Kills a component that is waited for.
    pub(super) fn kill(self: &Rc<Self>, id: u64) {
        match self.waiting.borrow_mut().get_mut(&id) {
            None => return,
            Some(waiting) if waiting.ending.is_some() => {}
            Some(waiting) => {
                let link = self.clone();
                waiting.ending = Some(self.handle.spawn_owned(async move { link.see_to_end(id).await }));
            }
        }
        if let Err(error) = self.ask(|keeper| keeper.kill(id)) {
            // What comes of it is heard by the listener.
            tracing::debug!("{error}");
        }
    }

    /// Ends a component without the keeper, if that does not say soon that it has ended: given up as soon as it does.
    async fn see_to_end(&self, id: u64) {
        self.handle.sleep(still::PATIENCE).await;
        let running = self
            .running
            .borrow()
            .get(&id)
            .map(|running| (running.pid, running.process.clone()));
        // One that has not started yet the keeper kills when it goes on, before that has done anything.
        let Some((pid, Some(process))) = running else { return };
        match still::end(&self.handle, process, self.pid).await {
            Ok(exit) => {
                tracing::warn!(pid, "{}; the component was ended without it", self.silence());
                self.has_exited(id, exit);
            }
            Err(error) => tracing::error!(
                pid,
                "{}, and the component cannot be ended without it: {error}",
                self.silence()
            ),
        }
    }

    fn has_exited(&self, id: u64, exit: Exit) {
        self.running.borrow_mut().remove(&id);
        let waiting = self.waiting.borrow_mut().remove(&id);
        if let Some(exited) = waiting.and_then(|waiting| waiting.exited) {
            let _ = exited.send(exit);
        }
    }

    /// A component runs under this process id, and pidfd, if it has started.
    pub(super) fn runs(&self, id: u64, pid: u32, process: Option<OwnedFd>) {
        let process = process.map(Rc::new);
        self.running.borrow_mut().insert(id, Running { pid, process });
    }

    /// The id of the component that runs under this process id, if it is one of this keeper's.
    pub(super) fn id_of(&self, pid: u32) -> Option<u64> {
        let running = self.running.borrow();
        running
            .iter()
            .find_map(|(id, running)| (running.pid == pid).then_some(*id))
    }

    /// Changes the limits of a component, and waits until they hold.
    ///
    /// # Errors
    /// `NOT_SUPPORTED`: what the host lacks; `START_FAILURE`: the keeper is gone, or does not answer.
    pub(super) async fn set_limits(&self, id: u64, limits: Limits) -> Result<(), Error> {
        let (limited, holds) = oneshot::channel();
        self.ask(|keeper| keeper.set_limits(id, limits))?;
        self.limiting.borrow_mut().entry(id).or_default().push_back(limited);
        match self.handle.timeout(ANSWER, holds).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(why))) => Err(Error::new(Kind::NotSupported, why)),
            Ok(Err(_)) => Err(failure("the keeper is gone".to_owned())),
            Err(_) => Err(failure(format!("{}; the limits hold when it does", self.silence()))),
        }
    }

    /// Hears what the keeper says, until it is gone.
    async fn listen(&self, watched: AsyncFd<OwnedFd>) {
        loop {
            let asked = self.asked.listen();
            // None: the manager itself has let go of it.
            let Some(unsent) = self.take_events() else {
                self.sent.notify(usize::MAX);
                return;
            };
            watched.exhausted(Direction::Read);
            let room: LocalBoxFuture<'_, ()> = if unsent {
                watched.exhausted(Direction::Write);
                Box::pin(watched.writable())
            } else {
                self.sent.notify(usize::MAX);
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
                    let keeper = slot.take();
                    drop(slot);
                    // One that was inherited ends with the last of what it had.
                    if self.waiting.borrow().is_empty() && !self.has_durable() {
                        tracing::debug!("{error}");
                    } else {
                        tracing::error!("{error}; every component ended with it");
                    }
                    self.gone(keeper, &error.to_string());
                    return None;
                }
            }
        }
    }

    fn heard(&self, event: KeeperEvent) {
        self.still.set(false);
        let mut waiting = self.waiting.borrow_mut();
        match event {
            KeeperEvent::Started { id, pid, pidfd, .. } => {
                self.runs(id, pid, Some(pidfd));
                if let Some(started) = waiting.get_mut(&id).and_then(|waiting| waiting.started.take()) {
                    let _ = started.send(Ok(pid));
                }
            }
            KeeperEvent::Failed { id, layer, message } => {
                self.running.borrow_mut().remove(&id);
                if let Some(started) = waiting.remove(&id).and_then(|waiting| waiting.started) {
                    let error = failure(message).about(layer.map_or("", Layer::name));
                    let _ = started.send(Err(error));
                }
            }
            KeeperEvent::Exited { id, status } => {
                drop(waiting);
                self.has_exited(id, exit(status));
            }
            KeeperEvent::NotKept { id, label, message } => {
                tracing::error!(id, label, "not kept for the manager after this one: {message}");
            }
            KeeperEvent::LimitsSet { id, error } => {
                let mut limiting = self.limiting.borrow_mut();
                let limited = limiting.get_mut(&id).and_then(VecDeque::pop_front);
                limiting.retain(|_, waiting| !waiting.is_empty());
                // Nobody waits any more for a call that was given up.
                limited.map(|limited| limited.send(error));
            }
            KeeperEvent::Refused { request, reason } => tracing::error!(request, "the keeper refuses: {reason}"),
        }
    }

    fn gone(&self, keeper: Option<KeeperClient>, why: &str) {
        self.durable.borrow_mut().clear();
        self.running.borrow_mut().clear();
        self.limiting.borrow_mut().clear();
        for (_, waiting) in self.waiting.take() {
            if let Some(started) = waiting.started {
                let _ = started.send(Err(failure(why.to_owned())));
            }
            if let Some(exited) = waiting.exited {
                let _ = exited.send(Exit::Unknown(format!("it ended with the keeper: {why}")));
            }
        }
        // Reaped away from the loop: it has closed its connection, but may not have ended yet.
        let reaping = self
            .handle
            .spawn_blocking(|| keeper.map(|keeper| keeper.close_within(ANSWER)));
        self.handle.spawn(async move {
            // How it ended has been told, and work that nobody awaits is not done.
            let _ = reaping.await;
        });
    }
}

/// What an id of a keeper stands for.
pub(super) struct Beside {
    pub(super) link: Rc<Link>,
    pub(super) id: u64,
}

impl Custody for Beside {
    fn keep(&self, label: &str, fds: Vec<OwnedFd>) -> Result<(), Error> {
        self.link.ask(|keeper| keeper.keep_descriptors(self.id, label, fds))
    }

    fn note(&self, known: &Known) {
        if let Some(roster) = self.link.roster() {
            roster.add(self.id, known);
        }
    }

    fn set_durable(&self) -> Result<(), Error> {
        self.link.ask(|keeper| keeper.set_durable(self.id, true))?;
        self.link.durable.borrow_mut().insert(self.id);
        Ok(())
    }

    fn release(&self) {
        self.link.durable.borrow_mut().remove(&self.id);
        if let Err(error) = self.link.ask(|keeper| keeper.release(self.id)) {
            tracing::debug!("{error}");
        }
        // Last: a name that is noted and not held is in nobody's way, once the keeper has answered.
        if let Some(roster) = self.link.roster() {
            roster.remove(self.id);
        }
    }

    fn sent(&self) -> LocalBoxFuture<'static, ()> {
        let link = self.link.clone();
        Box::pin(async move {
            loop {
                let sent = link.sent.listen();
                let unsent = link.keeper.borrow().as_ref().is_some_and(KeeperClient::has_unsent);
                if !unsent {
                    return;
                }
                sent.await;
            }
        })
    }
}

pub(super) fn exit(status: ExitStatus) -> Exit {
    match status {
        ExitStatus::Code(code) => Exit::Code(code),
        ExitStatus::Signal(signal) => Exit::Signal(signal),
    }
}

pub(super) fn failure(message: String) -> Error {
    Error::new(Kind::StartFailure, message)
}
