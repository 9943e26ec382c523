//! One guest, from its creation to its end: what its capabilities lead to. What drives it is in `life`.
//!
//! ```text
//!       .----------------------- begin again ----------------.   (the next generation: same name, ports, capabilities)
//!       v                                                    |
//!   creating --> created --> started -----------------> (run over) --> ended     each waited for by any number of clients
//!       |            |  '--> held: paused before its first   ^
//!       |            |       instruction, then started       |
//!       '------------'---------------------------------------'
//!   run wanted, again wanted, stop wanted: asked for by clients, at any time, heard by `life`; a stop wins
//! ```

mod cause;
mod lasting;
mod remote;
mod state;
mod upkeep;
mod waits;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use sepal_schema::{
    config::{GuestConfig, OnPanic},
    error::{Error, Kind},
    info::{GuestDescriptor, GuestInfo, GuestStatus, Upkeep},
    news::DeviceNews,
    report::StopReport,
};

pub use self::cause::{Again, StopCause};
pub(crate) use self::remote::within;
use self::{
    remote::Remote,
    state::{Ended, Run, State},
};
use crate::{
    access::Access,
    changed::Changed,
    configuration::Configuration,
    course::Over,
    cpu::Cpus,
    durable::Durable,
    host,
    lease::Leased,
    manager::Manager,
    model::{self, Ending, EventKind, GuestId},
    pressure::{self, Ballast},
    restart::Counted,
    serial::Port,
    statistics::Figures,
    vsock::listeners::Listeners,
};

/// What a guest is created with.
#[derive(Debug)]
pub struct Creation {
    /// Which creation under its name.
    pub generation: u64,
    /// Its vCPUs are to be started as soon as it is created.
    pub run_wanted: bool,
    /// Ports of its console.
    pub consoles: u16,
    /// Whether the agent in it is talked to.
    pub agent: bool,
    /// What happens when its kernel has panicked.
    pub on_panic: OnPanic,
    /// What is wanted for its vCPUs.
    pub cpus: Cpus,
}

impl Creation {
    /// Of a guest of this configuration.
    pub(crate) fn of(config: &GuestConfig, generation: u64, run_wanted: bool) -> Self {
        Self {
            generation,
            run_wanted,
            consoles: config.console.map_or(0, |console| console.ports()),
            agent: config.agent,
            on_panic: config.on_panic,
            cpus: Cpus::of(config),
        }
    }
}

/// A guest.
pub struct Guest {
    /// The shared state.
    pub manager: Rc<Manager>,
    /// Who holds its name.
    pub id: GuestId,
    /// Its name.
    pub name: Rc<str>,
    /// Its serial port.
    pub port: Rc<Port>,
    /// The ports of its console.
    pub consoles: Vec<Rc<Port>>,
    /// Whether the agent in it is talked to.
    pub has_agent: bool,
    /// What was given out of it, and to whom it is open.
    pub access: Access,
    /// What happens when its kernel has panicked.
    pub on_panic: OnPanic,
    /// What is wanted for its vCPUs.
    pub cpus: Cpus,
    /// How many connections say that its agent is there.
    pub(crate) agents: Cell<u32>,
    /// Who listens for it on ports of the host.
    pub(crate) listeners: Listeners,
    only_once: RefCell<Option<Error>>,
    insists: Cell<bool>,
    configuration: RefCell<Option<Result<Configuration, Error>>>,
    cid: Cell<u32>,
    notes: RefCell<Vec<String>>,
    pub(crate) figures: Figures,
    pub(crate) ballast: Ballast,
    /// What keeps it.
    pub(crate) lease: Leased,
    durable: RefCell<Option<Rc<Durable>>>,
    /// What is counted of its runs, and of short ones in a row.
    counted: Cell<(Counted, u32)>,
    /// How its run ended, and what follows, until the next one begins.
    over: RefCell<Option<Over>>,
    /// The number of the last event that its component told.
    heard: Cell<u64>,
    /// Its component has not answered for so long that a person is told.
    silent: Cell<bool>,
    agent_ready: Changed<bool>,
    /// The generation whose agent was told of last.
    agent_told: Cell<u64>,
    remote: Changed<Option<Remote>>,
    state: Changed<State>,
}

impl Guest {
    /// A guest whose creation begins.
    pub fn new(manager: Rc<Manager>, id: GuestId, name: Rc<str>, creation: Creation) -> Rc<Self> {
        let port = || Port::new(manager.settings.history);
        let (serial, consoles) = (port(), (0..creation.consoles).map(|_| port()).collect());
        let run = Run {
            generation: creation.generation,
            wanted: creation.run_wanted,
            ..Run::default()
        };
        let state = State {
            run,
            ..State::default()
        };
        Rc::new(Self {
            manager,
            id,
            name,
            port: serial,
            consoles,
            has_agent: creation.agent,
            access: Access::default(),
            on_panic: creation.on_panic,
            cpus: creation.cpus,
            listeners: Listeners::default(),
            only_once: RefCell::default(),
            insists: Cell::default(),
            configuration: RefCell::default(),
            cid: Cell::new(0),
            notes: RefCell::default(),
            figures: Figures::default(),
            ballast: Ballast::default(),
            lease: Leased::default(),
            durable: RefCell::default(),
            counted: Cell::default(),
            over: RefCell::default(),
            heard: Cell::default(),
            silent: Cell::default(),
            agent_ready: Changed::default(),
            agent_told: Cell::default(),
            agents: Cell::default(),
            remote: Changed::default(),
            state: Changed::new(state),
        })
    }

    /// Which creation under its name. Moves on when the guest begins again.
    pub fn generation(&self) -> u64 {
        self.state.look(|state| state.run.generation)
    }

    /// Why it cannot begin again, if it cannot: something that it was given serves one run only.
    pub fn only_once(&self) -> Option<Error> {
        self.only_once.borrow().clone()
    }

    /// Whether it can begin again.
    pub(crate) fn set_only_once(&self, why: Option<Error>) {
        self.only_once.replace(why);
    }

    /// Its context id; 0 if it has no socket device.
    pub fn cid(&self) -> u32 {
        self.cid.get()
    }

    /// Waits until the agent in it has said that it is there.
    pub async fn agent_ready(&self) {
        self.agent_ready.until(|ready| ready.then_some(())).await;
    }

    /// Whether the agent in it has said that it is there.
    pub fn agent_is_ready(&self) -> bool {
        self.agent_ready.look(|ready| *ready)
    }

    /// The agent in it is there, or is no more.
    pub(crate) fn set_agent_ready(&self, ready: bool) {
        self.agent_ready.change(|known| *known = ready);
        self.save();
    }

    /// The agent in it is there, which is told once for each run: how often it comes and goes is the guest's to say, and not to fill everybody's history.
    pub(crate) fn agent_arrives(&self) {
        self.set_agent_ready(true);
        let generation = self.generation();
        if self.agent_told.replace(generation) != generation {
            self.happened(EventKind::Device(DeviceNews::GuestReady));
        }
    }

    /// It has a context id.
    pub(crate) fn set_cid(&self, cid: u32) {
        self.cid.set(cid);
    }

    /// Sentences for a person about what it got from the host.
    pub fn notes(&self) -> Vec<String> {
        self.notes.borrow().clone()
    }

    /// What it got from the host is not as it should be.
    pub(crate) fn set_notes(&self, notes: Vec<String>) {
        self.notes.replace(notes);
    }

    /// All that is known about it. When its name has gone on to another, what was known at its end.
    pub fn info(&self) -> GuestInfo {
        let generation = self.generation();
        let current = self.manager.info(self.id, host::available_mib());
        let current = current.filter(|info| info.generation == generation);
        let last = || {
            self.state
                .look(|state| state.ended.as_ref().and_then(|ended| ended.info.clone()))
        };
        current.or_else(last).unwrap_or_else(|| GuestInfo {
            // Let go of, and not quite gone yet.
            name: self.name.to_string(),
            status: GuestStatus::Stopping,
            generation,
            uptime_ns: 0,
            descriptor: None,
            stop: None,
            problems: Vec::new(),
            layers: Vec::new(),
            component_pid: 0,
            paused: false,
            detached: false,
            upkeep: Upkeep::default(),
        })
    }

    /// All is over: its ports end.
    pub(crate) fn close_ports(&self) {
        self.port.close();
        self.consoles.iter().for_each(|port| port.close());
    }

    /// The machine is there.
    pub(crate) fn set_created(&self) {
        let generation = self.generation();
        let (wanted, held) = (self.run_is_wanted(), self.is_held());
        self.manager.registry(|registry, now| {
            if !registry.created(self.id, generation) {
                return;
            }
            if wanted {
                // Asked for together with create; nothing but a stop can have come in between, which wins.
                let _ = registry.run(self.id, generation);
            } else if held {
                registry.hold(self.id, generation, now);
            }
        });
        self.state.change(|state| {
            state.run.created = true;
            state.created.get_or_insert(Ok(())).is_ok()
        });
        self.save();
    }

    /// The run is over, and another is to follow; its report, or none if nothing is to follow after all.
    pub(crate) fn set_restarting(&self, ending: Ending, uptime_ns: u64) -> Option<StopReport> {
        let generation = self.generation();
        let report = self
            .manager
            .registry(|registry, now| registry.restarting(self.id, generation, ending, uptime_ns, now))?;
        self.forget_remote();
        self.set_agent_ready(false);
        self.state.change(|state| {
            state.run = Run {
                generation,
                over: true,
                ..Run::default()
            };
        });
        self.save();
        Some(report)
    }

    /// The next generation begins, to be run as soon as it is created, or held unless somebody wanted it to run meanwhile. False if nothing is to
    /// follow after all.
    pub(crate) fn begin_again(&self, hold: bool) -> bool {
        let before = self.generation();
        let again = self
            .manager
            .registry(|registry, now| registry.again(self.id, before, now));
        let Some(generation) = again else { return false };
        self.ballast.begin_again();
        self.over.replace(None);
        self.heard.set(0);
        self.silent.set(false);
        self.state.change(|state| {
            let hold = hold && !state.run.wanted;
            state.run = Run {
                generation,
                wanted: !hold,
                held: hold,
                ..Run::default()
            };
        });
        self.save();
        true
    }

    /// All is over, and nothing is left of it.
    pub(crate) fn set_ended(&self, ending: Ending, uptime_ns: u64) -> StopReport {
        let (fallback, generation) = (ending.clone(), self.generation());
        let report = self.manager.registry(|registry, now| {
            let report = registry.ended(self.id, generation, ending, uptime_ns, now);
            // Its name was let go of while it was being stopped, and told about then.
            report.unwrap_or_else(|| fallback.report(uptime_ns, now))
        });
        let info = self
            .manager
            .info(self.id, None)
            .filter(|info| info.generation == generation);
        self.forget_remote();
        let durable = self.durable.take();
        self.state.change(|state| {
            let error = report.error.clone();
            let error = error.unwrap_or_else(|| Error::new(Kind::NotCreated, report.detail.clone()));
            state.created.get_or_insert(Err(error));
            state.ended = Some(Ended {
                report: report.clone(),
                info,
            });
        });
        if let Some(durable) = durable {
            // First that it has ended, so that it is not told again if this process is killed now.
            durable.save(self);
            durable.release();
        }
        report
    }

    /// Its component says that something happened.
    pub(crate) fn happened(&self, kind: EventKind) {
        let (id, generation) = (self.id, self.generation());
        match kind {
            EventKind::Started => {
                if !self.run_is_wanted() {
                    return;
                }
                self.manager
                    .registry(|registry, now| registry.started(id, generation, now));
                self.state.change(|state| state.run.started = true);
                self.save();
                pressure::started(self);
            }
            EventKind::Paused => self.set_paused(true),
            EventKind::Resumed => self.set_paused(false),
            EventKind::ShuttingDown => self.set_shutting_down(),
            EventKind::Device(news) => {
                match news.is_trouble() {
                    true => tracing::warn!(guest = &*self.name, ?news, "a device reports"),
                    false => tracing::info!(guest = &*self.name, ?news, "a device reports"),
                }
                self.manager
                    .registry(|registry, now| registry.device_news(id, generation, news, now));
            }
            // What the manager knows better itself.
            EventKind::Defined
            | EventKind::Starting
            | EventKind::Stopped(_)
            | EventKind::Restarting(_)
            | EventKind::Crashed(_)
            | EventKind::Removed => {}
        }
    }

    /// Its vCPUs are held, or go on.
    pub fn set_paused(&self, paused: bool) {
        let generation = self.generation();
        self.manager
            .registry(|registry, now| registry.paused(self.id, generation, paused, now));
        self.save();
    }

    /// It was asked to shut down.
    pub fn set_shutting_down(&self) {
        let generation = self.generation();
        self.state.change(|state| state.run.asked = true);
        self.manager
            .registry(|registry, now| registry.shutting_down(self.id, generation, now));
        self.save();
    }

    /// Whether its vCPUs are held, as far as is known here.
    pub fn is_paused(&self) -> bool {
        let info = self.manager.registry(|registry, now| registry.info(self.id, now));
        info.is_some_and(|info| info.paused && info.generation == self.generation())
    }

    /// Another creation under its name has taken its place before it ran.
    pub(crate) fn set_superseded(&self, report: StopReport) {
        let ended = Ended { report, info: None };
        self.state
            .change(|state| state.ended.get_or_insert(ended).report.clone());
    }

    /// Its component knows better what it is made of.
    pub(crate) fn describe(&self, from: &GuestDescriptor) {
        let generation = self.generation();
        self.manager.registry(|registry, _| {
            registry.describe(self.id, generation, |descriptor| {
                if !from.cmdline.is_empty() {
                    descriptor.cmdline = model::cut(&from.cmdline, sepal_schema::config::MAX_CMDLINE);
                }
                if !from.devices.is_empty() {
                    descriptor.devices = model::bounded_names(from.devices.clone());
                }
            });
        });
        self.save();
    }
}
