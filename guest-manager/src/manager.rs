//! What all of the manager shares: the registry, the guests' holders, how to start components, the settings.

use std::{cell::RefCell, collections::HashMap, os::fd::OwnedFd, path::PathBuf, rc::Rc, time::Duration};

use event_listener::{Event, EventListener};
use futures::future::{join, join_all};
use sepal_schema::{error::Error, info::GuestInfo, transport::Handle};

use crate::{
    audit::Audit,
    capacity::{Capacity, Room, Used},
    changed::Changed,
    cids::Cids,
    component::ComponentStarter,
    definitions::{self, Definitions},
    durable::chronicle::Chronicle,
    events::Cursor,
    files,
    guest::Guest,
    history,
    host::{self, Host},
    lease,
    model::{self, GuestId, Moment},
    node::{Node, limits},
    pressure::Pressure,
    problems::{Facts, problems},
    registry::{Limits, Registry},
    roles::Roles,
    slot::Slot,
    state::State,
    uploads::Uploads,
};

/// How long a guest that is being created when the manager leaves is waited for.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);
/// How long nobody is listened to because guests are being taken over.
const REACHED_WITHIN: Duration = Duration::from_secs(1);

/// What can differ from one manager to another.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The host's kind.
    pub host: Host,
    /// What KVM offers of the host's processor, for components ([`host::supported_cpuid`]); empty: each asks itself.
    pub cpuid: Rc<[u8]>,
    /// How much serial output is kept for a guest, in bytes.
    pub history: usize,
    /// How many guests and events there may be.
    pub limits: Limits,
    /// How long a component may take to stop its machine before its process is killed.
    pub force_after: Duration,
    /// How long a lease that nobody has is waited for before its guest is stopped.
    pub lease_grace: Duration,
    /// How long a power button may take where the caller names no deadline.
    pub default_deadline: Duration,
    /// How long a guest waits, at first, that begins again by itself too often; fifty times as much at most.
    pub restart_wait: Duration,
    /// Folder of the files, without names, that keep what is written to volatile disks.
    pub scratch: PathBuf,
    /// Where it is noted who changed what.
    pub audit: Audit,
    /// Who may do what.
    pub roles: Roles,
    /// Where is kept what is to outlive the manager.
    pub state: State,
    /// How often what is known of a guest's failures is written into its definition's file at most: once in this time.
    pub failures_rest: Duration,
    /// How much memory guests may be promised in all, in bytes; none: each whatever the host has when it is created.
    pub max_memory: Option<u64>,
}

impl Default for Settings {
    /// An ordinary host; 256 KiB of history; 5 s to stop by force; 30 s to shut down; 100 ms to 5 s between restarts; `$TMPDIR`, or
    /// /var/tmp, for what is written to volatile disks; the audit goes to the log; nobody may connect but
    /// this process's own user and root; nothing is kept; failures are written every 10 s at most; no bound for the memory of all guests.
    fn default() -> Self {
        Self {
            host: Host::default(),
            cpuid: Rc::default(),
            history: history::DEFAULT_CAPACITY,
            limits: Limits::default(),
            force_after: Duration::from_secs(5),
            lease_grace: lease::GRACE,
            default_deadline: Duration::from_secs(30),
            restart_wait: Duration::from_millis(100),
            scratch: files::default_scratch(),
            audit: Audit::to_log(),
            roles: Roles::new(rustix::process::geteuid().as_raw(), []),
            state: State::default(),
            failures_rest: Duration::from_secs(10),
            max_memory: None,
        }
    }
}

/// The shared state. One a manager, on the event loop's thread.
pub struct Manager {
    /// The event loop.
    pub handle: Handle,
    /// What can differ.
    pub settings: Settings,
    /// Where it is noted who changed what.
    pub audit: Audit,
    /// Starts components.
    pub starter: Box<dyn ComponentStarter>,
    /// Uploads that clients hold.
    pub uploads: Uploads,
    /// Images that guests use.
    pub images: files::Images,
    /// Context ids that guests have.
    pub cids: Cids,
    /// What guests were promised.
    pub capacity: Capacity,
    /// What is done when the host runs short of memory.
    pub pressure: Pressure,
    /// What was found out about the host.
    pub node: Node,
    tasks: limits::Tasks,
    /// The kernel for configurations without one: sealed memory.
    pub default_kernel: OwnedFd,
    /// What happens, for the next manager.
    pub(crate) chronicle: Chronicle,
    pub(crate) definitions: Definitions,
    registry: RefCell<Registry>,
    logged: Event,
    slots: RefCell<HashMap<GuestId, Rc<Slot>>>,
    shutdown: Changed<bool>,
}

impl Manager {
    /// A manager without guests but those that are defined.
    ///
    /// # Errors
    /// `NO_RESOURCES`: there is no memory for the embedded kernel; `NO_STORAGE`: the state folder cannot be used.
    pub fn new(handle: Handle, settings: Settings, starter: Box<dyn ComponentStarter>) -> Result<Rc<Self>, Error> {
        let default_kernel = files::sealed_memory("kernel", sepal_default_guest::IMAGE)?;
        let definitions = Definitions::open(&handle, &settings.state)?;
        let mut registry = Registry::new(settings.limits);
        for (name, kept, runs) in definitions.kept() {
            let id = registry.keep(&name, kept, None, Moment::now());
            registry.restore_runs(id, runs);
        }
        Ok(Rc::new(Self {
            handle,
            pressure: Pressure::restored(&definitions),
            definitions,
            registry: RefCell::new(registry),
            audit: settings.audit.clone(),
            settings,
            starter,
            uploads: Uploads::default(),
            images: files::Images::default(),
            cids: Cids::default(),
            capacity: Capacity::default(),
            node: Node::default(),
            tasks: limits::Tasks::find(),
            default_kernel,
            chronicle: Chronicle::default(),
            logged: Event::new(),
            slots: RefCell::default(),
            shutdown: Changed::default(),
        }))
    }

    /// Something is to go on without this manager: from now on what happens is kept for the next one.
    ///
    /// # Errors
    /// `NO_RESOURCES`, or why nothing can go on.
    pub(crate) fn keep_journal(&self) -> Result<(), Error> {
        self.chronicle.begin(self.registry.borrow().log(), &*self.starter)
    }

    /// Whether this manager is about to go, and what can go on without it is to do so.
    pub(crate) fn is_leaving(&self) -> bool {
        self.chronicle.is_leaving()
    }

    /// Reads or changes what is known about guests, and tells those who read the events along if there are any new ones.
    pub fn registry<R>(&self, work: impl FnOnce(&mut Registry, Moment) -> R) -> R {
        let (result, forgotten, news) = {
            let mut registry = self.registry.borrow_mut();
            let before = registry.log().last();
            let result = work(&mut registry, Moment::now());
            let news = registry.log().last() != before;
            if news {
                // Before anybody is told.
                self.chronicle.note(registry.log(), before);
            }
            (result, registry.take_forgotten(), news)
        };
        for id in forgotten {
            // Dropped with the map free again: the end of a slot may come back here.
            let slot = self.slots.borrow_mut().remove(&id);
            drop(slot);
        }
        if news {
            self.logged.notify(usize::MAX);
        }
        result
    }

    /// The next event for a cursor, waited for if need be, with the number of those that it lost before.
    pub async fn next_event(&self, cursor: &mut Cursor) -> (Rc<model::Event>, u64) {
        loop {
            let listener: EventListener = self.logged.listen();
            if let Some(next) = self.registry.borrow().log().next(cursor) {
                return next;
            }
            listener.await;
        }
    }

    /// Remembers who holds a name.
    pub fn add_slot(&self, slot: Rc<Slot>) {
        self.slots.borrow_mut().insert(slot.id, slot);
    }

    /// Who holds a name; none if it was let go of.
    pub fn slot(&self, id: GuestId) -> Option<Rc<Slot>> {
        self.slots.borrow().get(&id).cloned()
    }

    /// The guests that were created last under their names.
    pub(crate) fn guests(&self) -> Vec<Rc<Guest>> {
        self.slots.borrow().values().filter_map(|slot| slot.current()).collect()
    }

    /// Waits until the components of all guests that were taken over can be asked, for a moment: so that who connects finds none that cannot.
    pub async fn guests_reached(&self) {
        let guests = self.guests();
        let all = join_all(guests.iter().map(|guest| guest.reached()));
        // One that takes longer is waited for by nobody else.
        let _ = self.handle.timeout(REACHED_WITHIN, all).await;
    }

    /// All that is known about a guest, problems included; none if its name was let go of. `available_mib` as the host said last.
    pub fn info(&self, id: GuestId, available_mib: Option<u64>) -> Option<GuestInfo> {
        let guest = self.slot(id).and_then(|slot| slot.current());
        let output_lost = guest.as_ref().map_or(0, |guest| guest.port.lost());
        let lease_ends_ms = guest
            .as_ref()
            .filter(|guest| guest.live())
            .map_or(0, |guest| guest.lease_ends_ms());
        let silent = guest.as_ref().is_some_and(|guest| guest.is_silent());
        let notes = guest.map_or_else(Vec::new, |guest| guest.notes());
        let registry = self.registry.borrow();
        let mut info = registry.info(id, Moment::now())?;
        info.upkeep.lease_ends_ms = lease_ends_ms;
        let host = self.settings.host;
        info.problems = problems(&Facts {
            info: &info,
            failures: registry.failures(id),
            notes: &notes,
            host,
            available_mib,
            output_lost,
            unreached: registry.is_unreached(id),
            silent,
        });
        Some(info)
    }

    /// All guests, sorted by name.
    pub fn infos(&self) -> Vec<GuestInfo> {
        let available_mib = host::available_mib();
        let ids = self.registry.borrow().ids();
        ids.into_iter().filter_map(|id| self.info(id, available_mib)).collect()
    }

    /// What the host and the manager's own limits leave for guests.
    pub fn room(&self) -> Room {
        let (descriptors, tasks) = self.capacity.reserve(limits::descriptors(), self.tasks.look());
        Room {
            memory: Used {
                used: self.capacity.promised(),
                most: self.settings.max_memory,
            },
            available: host::available_bytes(),
            descriptors,
            tasks,
        }
    }

    /// Asks for the manager's end.
    pub fn shut_down(&self) {
        self.shutdown.change(|shutdown| *shutdown = true);
    }

    /// Waits until somebody asks for the manager's end.
    pub async fn shutdown_asked(&self) {
        self.shutdown.until(|shutdown| shutdown.then_some(())).await;
    }

    /// This manager gives way to another one: stops the guests that do not go on without it, and returns when they are gone; what is being created of the
    /// others has some time to get so far.
    pub async fn leave(&self, why: &str) {
        self.chronicle.leave();
        let (durable, others): (Vec<_>, Vec<_>) = {
            let slots = self.slots.borrow();
            let stays = |slot: &Rc<Slot>| slot.current().is_some_and(|guest| guest.is_durable());
            slots.values().cloned().partition(stays)
        };
        let created = durable
            .iter()
            .filter_map(|slot| slot.current())
            .map(|guest| async move {
                // What went wrong is for whoever waits for it.
                let _ = guest.created().await;
            });
        let (created, ended) = (join_all(created), join_all(others.iter().map(|slot| slot.end(why))));
        let _ = join(self.handle.timeout(LEAVE_WITHIN, created), ended).await;
        for slot in durable {
            if let Some(component) = slot.component_there() {
                component.leave();
            }
        }
    }

    /// Ends as it was asked to: with all guests, or only with those that do not go on without it.
    pub async fn end(&self, why: &str) {
        match self.shutdown.look(|asked| *asked) && !self.is_leaving() {
            true => self.stop_all(why).await,
            false => self.leave(why).await,
        }
        definitions::finish(self).await;
    }

    /// Stops all guests by force, and returns when they are gone.
    pub async fn stop_all(&self, why: &str) {
        let slots: Vec<_> = self.slots.borrow().values().cloned().collect();
        join_all(slots.iter().map(|slot| slot.end(why))).await;
    }
}
