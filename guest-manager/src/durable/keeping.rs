//! What is kept of a guest, and where.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use sepal_runner::keeper::MAX_KEPT;
use sepal_schema::{
    config::{GuestConfig, device::Link},
    error::{Error, Kind},
};

use super::{
    memory::Shared,
    record::{Kit, Phase, Record},
    slots::Slots,
};
use crate::{
    client::Client,
    component::{Component, Custody},
    guest::Guest,
    manager::Manager,
    model::Moment,
    starter::Known,
};

/// What is kept under which label.
pub(crate) mod label {
    /// The record.
    pub(crate) const RECORD: &str = "record";
    /// Descriptors of the configuration; a number follows.
    pub(crate) const CONFIG: &str = "config.";
    /// What the serial port printed, then the console's ports.
    pub(crate) const RINGS: &str = "rings";
    /// The manager's ends of the ports' sockets, in the same order.
    pub(crate) const PORTS: &str = "ports";
    /// What the context id is held by.
    pub(crate) const CID: &str = "cid";
    /// The component's standard error.
    pub(crate) const LOG: &str = "log";
    /// By which the component gets the connection to the next manager.
    pub(crate) const SUCCESSORS: &str = "successors";
    /// The journal; under the keeper's own id.
    pub(crate) const JOURNAL: &str = "journal";
}

/// Who launched a guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// It might name paths.
    pub(crate) trusted: bool,
}

impl From<&Client> for Owner {
    fn from(client: &Client) -> Self {
        Self {
            uid: client.who.uid,
            gid: client.who.gid,
            trusted: client.trusted,
        }
    }
}

/// What a run of a durable guest is furnished with besides.
pub(crate) struct Successor {
    /// The manager's ends of the ports' sockets.
    pub(crate) ports: Vec<OwnedFd>,
    /// The manager's end of the socket by which the connection to the next manager comes.
    pub(crate) successors: OwnedFd,
}

impl Successor {
    /// A socket for the connections to later managers: this manager's end, and the component's.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn socket() -> io::Result<(OwnedFd, OwnedFd)> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        Ok(rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?)
    }
}

/// What is kept of a guest.
pub(crate) struct Durable {
    kit: Kit,
    owner: Owner,
    /// What its context id is held by.
    cid: Vec<OwnedFd>,
    slots: RefCell<Slots<Shared>>,
    /// Beside which component.
    custody: RefCell<Option<Rc<dyn Custody>>>,
}

/// Whether a guest with this configuration could go on without its manager.
///
/// # Errors
/// `NOT_SUPPORTED` about `durable`, and why not.
pub(crate) fn check(manager: &Manager, config: &GuestConfig) -> Result<(), Error> {
    if !config.durable {
        return Ok(());
    }
    let refused = |why: String| {
        let message = format!("the guest cannot go on without its manager (field durable): {why}");
        Error::not_supported("durable", message)
    };
    manager.starter.outlived().map_err(|error| refused(error.message))?;
    let alone = |link: &Link| !matches!(link, Link::User);
    if let Some(i) = config.networks.iter().position(|network| !alone(&network.link)) {
        let why = format!("what serves networks[{i}] in user mode ends with the manager; a tap would not");
        return Err(refused(why));
    }
    Ok(())
}

impl Durable {
    /// Nothing is kept anywhere yet. `config` is what the guest is created from, its files descriptors; `owner` launched it;
    /// `cid` is what its context id is held by.
    ///
    /// # Errors
    /// `NO_RESOURCES`: there is no memory for the record.
    pub(crate) fn new(config: GuestConfig, owner: Owner, cid: Vec<OwnedFd>) -> Result<Rc<Self>, Error> {
        let memory = Shared::new().and_then(Slots::open);
        let (slots, _) = memory.map_err(|error| no_resources(&error))?;
        Self::restored(config, owner, cid, slots, None)
    }

    /// What is kept beside a component already.
    ///
    /// # Errors
    /// What cannot be written of the configuration.
    pub(crate) fn restored(
        config: GuestConfig,
        owner: Owner,
        cid: Vec<OwnedFd>,
        slots: Slots<Shared>,
        custody: Option<Rc<dyn Custody>>,
    ) -> Result<Rc<Self>, Error> {
        Ok(Rc::new(Self {
            kit: Kit::new(config)?,
            owner,
            cid,
            slots: RefCell::new(slots),
            custody: RefCell::new(custody),
        }))
    }

    /// Has everything kept beside the component that is to run the guest now, and no more beside the one before; returns when that has been said. From
    /// then on the guest goes on without this manager.
    ///
    /// # Errors
    /// `NO_RESOURCES`, or the keeper is gone.
    pub(crate) async fn keep(&self, guest: &Guest, component: &Component, with: Successor) -> Result<(), Error> {
        let custody = component.custody().ok_or_else(|| {
            let message = "nothing can be kept beside this component";
            Error::not_supported("durable", message)
        })?;
        self.save(guest);
        self.hand_over(guest, component, with, custody.as_ref())?;
        let before = self.custody.replace(Some(custody.clone()));
        custody.sent().await;
        if let Some(before) = before.filter(|before| !Rc::ptr_eq(before, custody)) {
            before.release();
        }
        Ok(())
    }

    fn hand_over(&self, guest: &Guest, component: &Component, with: Successor, to: &dyn Custody) -> Result<(), Error> {
        let resources = |error: io::Error| no_resources(&error);
        let record = self.slots.borrow().memory().descriptor().map_err(resources)?;
        to.keep(label::RECORD, vec![record])?;
        for (i, fds) in self.kit.fds.chunks(MAX_KEPT).enumerate() {
            to.keep(&format!("{}{i}", label::CONFIG), copies(fds).map_err(resources)?)?;
        }
        if !self.cid.is_empty() {
            to.keep(label::CID, copies(&self.cid).map_err(resources)?)?;
        }
        let ports = std::iter::once(&guest.port).chain(&guest.consoles);
        let rings = ports.map(|port| port.mirror()).collect::<Result<_, _>>();
        to.keep(label::RINGS, rings.map_err(resources)?)?;
        to.keep(label::PORTS, with.ports)?;
        if let Some(log) = component.words().map_err(resources)? {
            to.keep(label::LOG, vec![log])?;
        }
        to.keep(label::SUCCESSORS, vec![with.successors])?;
        to.note(&Known {
            name: guest.name.clone(),
            uuid: guest.info().upkeep.uuid.unwrap_or_default(),
            generation: guest.generation(),
            cid: guest.cid(),
        });
        to.set_durable()
    }

    /// Whether this is the memory that it is kept in.
    pub(super) fn is_in(&self, memory: &Shared) -> bool {
        self.slots.borrow().memory().is(memory)
    }

    /// Writes what there is to know of the guest now.
    pub(crate) fn save(&self, guest: &Guest) {
        let (moment, now) = (Moment::now(), Instant::now());
        let record = self.record(guest, moment, now);
        let written = record
            .write(&self.kit, (moment, now))
            .map_err(|error| error.to_string());
        let written = written.and_then(|bytes| {
            let written = self.slots.borrow_mut().write(&bytes);
            written.map_err(|error| error.to_string())
        });
        if let Err(error) = written {
            // The one before counts on.
            tracing::error!(
                guest = &*guest.name,
                "what the next manager is to know cannot be kept: {error}"
            );
        }
    }

    fn record(&self, guest: &Guest, moment: Moment, now: Instant) -> Record {
        let info = guest.info();
        let phase = match (guest.live(), guest.is_restarting()) {
            (false, _) => Phase::Ended,
            (_, true) => Phase::Restarting,
            _ if guest.has_started() => Phase::Running,
            _ if guest.is_created() => Phase::Created,
            _ => Phase::Creating,
        };
        let uptime = guest.uptime_ns();
        let (counted, short_runs) = guest.counted();
        Record {
            name: guest.name.to_string(),
            uuid: info.upkeep.uuid.unwrap_or_default().into_bytes(),
            generation: guest.generation(),
            descriptor: info.descriptor,
            layers: info.layers,
            phase,
            detached: info.detached,
            lease_tokens: guest.lease.tokens(),
            lease_ends: guest.lease.ends(),
            uid: self.owner.uid,
            gid: self.owner.gid,
            trusted: self.owner.trusted,
            counted,
            short_runs,
            shares: guest.access.shares.borrow().kept(now),
            crashes: guest.crashes().iter().map(|crash| (**crash).clone()).collect(),
            stop: info.stop,
            cid: guest.cid(),
            pins: guest.cpus.pins(),
            share: guest.cpus.share(),
            started_ns: match uptime {
                0 => 0,
                uptime => moment.monotonic_ns.saturating_sub(uptime).max(1),
            },
            agent_ready: guest.agent_is_ready(),
            held: guest.is_held(),
            paused: info.paused,
            balloon_taken: guest.ballast.taken(),
            balloon_by_hand: guest.ballast.is_by_hand(),
            origin: guest.origin(),
            stop_wanted: guest.stop_cause(),
            again: guest.again_cause(),
            asked: guest.was_asked(),
            over: guest.noted_over(),
            heard: guest.heard(),
            sequence: guest.manager.registry(|registry, _| registry.log().last()),
            notes: guest.notes(),
            broken: guest
                .manager
                .registry(|registry, _| registry.failures(guest.id).to_vec()),
        }
    }

    /// Nothing is kept any more: the guest has ended.
    pub(crate) fn release(&self) {
        if let Some(custody) = self.custody.take() {
            custody.release();
        }
    }
}

/// Copies of descriptors.
///
/// # Errors
/// There are none left.
pub(crate) fn copies(fds: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    fds.iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect()
}

fn no_resources(error: &io::Error) -> Error {
    let message = format!("what the next manager is to know of the guest cannot be kept: {error}");
    Error::new(Kind::NoResources, message).about("durable")
}
