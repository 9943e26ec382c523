//! Takes over what an earlier manager left: before this one listens, so that nobody sees it without.
//!
//! ```text
//!   keepers --inherit--> journals: the longest is gone on with        events, and how far they were counted
//!                        orphans: those of one guest are put together registry, ports, shares, lease; the component gets a connection
//!                                                                     '--> life: it lives, it died, or it is begun again
//!            silent: those that have not answered are waited for (`late`)
//!   what cannot be taken over is ended, and told of
//! ```

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    rc::Rc,
    time::Instant,
};

use futures::future::LocalBoxFuture;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use sepal_schema::{config::GuestConfig, error::Error, facet::Rights, news::DeviceNews, report::Reason};
use uuid::Uuid;

use super::{
    chronicle::past,
    journal::Journal,
    keeping::{Durable, Owner, copies, label},
    late,
    memory::Shared,
    record::{Phase, Record},
    slots::Slots,
};
use crate::{
    access::holder::expire_in_time,
    component::{Custody, Exit, Started},
    course::{End, Follow, Over},
    events::EventLog,
    guest::{Creation, Guest},
    lease, life,
    manager::Manager,
    model::{Ending, Event, EventKind, Moment},
    registry::{Restored, RestoredPhase},
    slot::Slot,
    starter::{Asking, Fate, Inheritance, Orphan},
};

/// What an earlier manager left of a guest's run.
pub(crate) enum Left {
    /// The component lives, and is to be asked what became of the guest.
    Lives {
        /// The connection with it.
        started: Started,
        /// The manager's ends of the ports' sockets.
        sockets: Vec<UnixStream>,
    },
    /// The component has ended.
    Died {
        exit: Exit,
        log: Option<OwnedFd>,
        sockets: Vec<UnixStream>,
    },
    /// The guest was being created.
    Creating,
    /// The run was over.
    Over(Box<Bygone>),
}

impl Left {
    /// Ends what there is of it, without taking it over.
    pub(crate) async fn end(self) {
        match self {
            Self::Lives { started, .. } => {
                (started.kill)();
                started.exit.await;
            }
            Self::Over(bygone) => {
                if let Some(exit) = bygone.exit {
                    exit.await;
                }
            }
            Self::Died { .. } | Self::Creating => {}
        }
    }
}

/// A run that was over before this manager came.
pub(crate) struct Bygone {
    /// How it ended, and what follows.
    pub(crate) over: Over,
    /// That has been told.
    pub(crate) told: bool,
    /// Resolves when its component is gone; none: it is.
    pub(crate) exit: Option<LocalBoxFuture<'static, Exit>>,
    pub(crate) log: Option<OwnedFd>,
    /// The manager's ends of the ports' sockets.
    pub(crate) sockets: Vec<UnixStream>,
}

/// What was kept of a guest, read.
pub(super) struct Found {
    pub(super) record: Record,
    config: GuestConfig,
    pub(super) slots: Slots<Shared>,
    pub(super) orphan: Orphan,
}

/// Takes over everything that was left, and waits for what is left with keepers that have not answered.
pub fn take_over(manager: &Rc<Manager>, (inheritances, asking): (Vec<Inheritance>, Asking)) {
    let mut orphans = Vec::new();
    let mut journals = Vec::new();
    for mut inheritance in inheritances {
        orphans.extend(inheritance.orphans);
        journals.extend(open_journals(inheritance.own.remove(label::JOURNAL)));
    }
    adopt(manager, journals, orphans.is_empty());
    for found in unite(orphans) {
        let name = found.record.name.clone();
        if let Err(error) = restore(manager, found) {
            tracing::error!(guest = name, "the guest cannot be taken over, and ends: {error}");
        }
    }
    manager.registry(|registry, _| registry.remember_bygone());
    late::wait(manager, asking);
}

pub(super) fn open_journals(fds: Option<Vec<OwnedFd>>) -> Vec<Journal<Shared>> {
    let fds = fds.into_iter().flatten();
    fds.filter_map(|fd| Journal::open(Shared::from(fd)).ok()).collect()
}

/// Goes on with the longest of these journals.
pub(super) fn adopt(manager: &Manager, journals: Vec<Journal<Shared>>, nobody_needs_one: bool) {
    // Those of keepers that were not told of a later one are older.
    let kept = match journals.into_iter().max_by_key(Journal::end) {
        Some(journal) => {
            manager.registry(|registry, _| registry.restore_events(past(&journal)));
            manager.chronicle.go_on_with(journal, &*manager.starter)
        }
        None if nobody_needs_one => Ok(()),
        None => manager.keep_journal(),
    };
    if let Err(error) = kept {
        tracing::error!("no guest that is started from now on can go on without this manager: {error}");
    }
}

/// One of each guest: where it was moving from one component to the next, what is kept is kept twice.
pub(super) fn unite(orphans: Vec<Orphan>) -> Vec<Found> {
    let mut all: BTreeMap<[u8; 16], Found> = BTreeMap::new();
    for orphan in orphans {
        let found = match read(orphan) {
            Ok(found) => found,
            Err((orphan, error)) => {
                tracing::error!("what was kept of a guest cannot be read, and the guest ends: {error}");
                give_up(orphan);
                continue;
            }
        };
        let lives = |found: &Found| matches!(found.orphan.fate, Fate::Lives { .. });
        match all.remove(&found.record.uuid) {
            Some(other) if lives(&other) => {
                give_up(found.orphan);
                all.insert(other.record.uuid, other);
            }
            other => {
                if let Some(other) = other {
                    give_up(other.orphan);
                }
                all.insert(found.record.uuid, found);
            }
        }
    }
    all.into_values().collect()
}

fn read(mut orphan: Orphan) -> Result<Found, (Orphan, String)> {
    let mut reading = || {
        let mut first = |name| {
            orphan
                .kept
                .remove(name)
                .and_then(|fds: Vec<OwnedFd>| fds.into_iter().next())
        };
        let memory = first(label::RECORD).ok_or("there is no record")?;
        let (slots, bytes) = Slots::open(Shared::from(memory)).map_err(|error| error.to_string())?;
        let bytes = bytes.ok_or("nothing was recorded")?;
        let mut fds = Vec::new();
        for i in 0.. {
            match orphan.kept.remove(&format!("{}{i}", label::CONFIG)) {
                Some(more) => fds.extend(more),
                None => break,
            }
        }
        let read = Record::read(&bytes, fds, (Moment::now(), Instant::now()));
        let (record, config) = read.map_err(|error| error.to_string())?;
        Ok::<_, String>((record, config, slots))
    };
    match reading() {
        Ok((record, config, slots)) => Ok(Found {
            record,
            config,
            slots,
            orphan,
        }),
        Err(error) => Err((orphan, error)),
    }
}

/// Ends what an earlier manager left, and what is kept of it.
pub(super) fn give_up(orphan: Orphan) {
    if let Fate::Lives { kill, .. } = &orphan.fate {
        kill();
    }
    orphan.custody.release();
}

pub(super) fn restore(manager: &Rc<Manager>, found: Found) -> Result<(), Error> {
    let Found {
        record,
        config,
        slots,
        mut orphan,
    } = found;
    if record.phase == Phase::Ended {
        // All that there was to tell of it has been told.
        give_up(orphan);
        return Ok(());
    }
    let id = match manager.registry(|registry, _| registry.restore(restored(&record, &config))) {
        Ok(id) => id,
        Err(error) => {
            give_up(orphan);
            return Err(error);
        }
    };
    manager.registry(|registry, _| registry.restore_crashes(id, record.crashes.clone()));
    let slot = Slot::restored(manager, id, record.name.as_str().into());
    let runs = !record.held;
    let guest = Guest::new(
        manager.clone(),
        id,
        slot.name.clone(),
        Creation::of(&config, record.generation, runs),
    );
    slot.take_over(guest.clone());
    match &record.origin {
        Some(origin) => guest.note_origin(origin.clone()),
        // As far as it can be told from what the guest got.
        None => guest.note(&config),
    }
    let cid = orphan.kept.remove(label::CID).unwrap_or_default();
    // Without copies it is taken as by anybody else.
    manager
        .cids
        .hold(record.cid, &guest.name, copies(&cid).unwrap_or_default());
    let rings = orphan.kept.remove(label::RINGS).unwrap_or_default();
    for (port, ring) in std::iter::once(&guest.port).chain(&guest.consoles).zip(rings) {
        if let Err(error) = port.restore(ring) {
            tracing::error!(guest = &*guest.name, "what a port printed is lost: {error}");
        }
    }
    let (root, now) = (guest.access.root(Rights::ALL), Instant::now());
    let grants = guest
        .access
        .shares
        .borrow_mut()
        .restore(record.shares.clone(), &root, now);
    grants.iter().for_each(|grant| expire_in_time(&manager.handle, grant));
    guest.lease.restore(record.lease_tokens.clone());
    let unnoted = manager.registry(|registry, _| told_since(registry.log(), &record));
    guest.go_on(&record);
    guest.set_heard(record.heard.saturating_add(unnoted));
    let owner = Owner {
        uid: record.uid,
        gid: record.gid,
        trusted: record.trusted,
    };
    let left = left(&record, orphan.fate, &mut orphan.kept, &orphan.custody);
    let copy = config.try_clone().map_err(|error| error.to_string());
    let durable = copy.map_err(|error| Error::new(sepal_schema::error::Kind::NoResources, error));
    let durable = durable.and_then(|copy| Durable::restored(copy, owner, cid, slots, Some(orphan.custody.clone())));
    if let Err(error) = durable.and_then(|durable| guest.stay_durable(durable)) {
        // It goes on all the same, as long as this manager does: what is kept of it would be old when the next one comes.
        tracing::error!(guest = &*guest.name, "{error}");
        orphan.custody.release();
    }
    match record.detached {
        true => guest.save(),
        false => lease::wait(&guest, record.lease_ends),
    }
    if let Some(cause) = record.stop_wanted.clone() {
        guest.want_stop(cause);
    }
    tracing::info!(guest = &*guest.name, generation = record.generation, "goes on");
    manager.handle.spawn(life::live_on(guest, slot, config, owner, left));
    Ok(())
}

fn restored(record: &Record, config: &GuestConfig) -> Restored {
    Restored {
        name: record.name.as_str().into(),
        uuid: Some(Uuid::from_bytes(record.uuid)),
        generation: record.generation,
        phase: match record.phase {
            Phase::Creating => RestoredPhase::Creating,
            Phase::Created | Phase::Running => RestoredPhase::Launching,
            Phase::Restarting => RestoredPhase::Restarting,
            Phase::Ended => RestoredPhase::Ended,
        },
        started_ns: Some(record.started_ns).filter(|ns| *ns > 0),
        paused: record.paused,
        detached: record.detached,
        asked: record.asked,
        restarts: record.counted.restarts,
        failures: record.counted.failures,
        restart: config.restart,
        descriptor: record.descriptor.clone(),
        layers: record.layers.clone(),
        stop: record.stop.clone(),
    }
}

fn left(record: &Record, fate: Fate, kept: &mut BTreeMap<String, Vec<OwnedFd>>, custody: &Rc<dyn Custody>) -> Left {
    let mut first = |name| kept.remove(name).and_then(|fds| fds.into_iter().next());
    let (log, successors) = (first(label::LOG), first(label::SUCCESSORS));
    let ports = kept.remove(label::PORTS).unwrap_or_default();
    let sockets: Vec<UnixStream> = ports.into_iter().map(UnixStream::from).collect();
    if record.phase == Phase::Restarting || record.over.is_some() {
        let exit = match fate {
            Fate::Lives { kill, exit, .. } => {
                kill();
                Some(exit)
            }
            Fate::Ended(_) => None,
        };
        return Left::Over(Box::new(Bygone {
            over: record.over.clone().unwrap_or_else(|| at_once(record)),
            told: record.phase == Phase::Restarting,
            exit,
            log,
            sockets,
        }));
    }
    let (pid, kill, exit) = match (record.phase, fate) {
        (Phase::Creating, Fate::Ended(_)) => return Left::Creating,
        (_, Fate::Ended(exit)) => return Left::Died { exit, log, sockets },
        (_, Fate::Lives { pid, kill, exit }) => (pid, kill, exit),
    };
    let connected = successors
        .ok_or_else(|| io::Error::other("there is no way to it"))
        .and_then(|successors| connect(&successors));
    match connected {
        Ok(socket) => Left::Lives {
            started: Started {
                pid,
                socket,
                stderr: log,
                kill,
                exit,
                custody: Some(custody.clone()),
            },
            sockets,
        },
        // It ends by itself when its manager goes in the middle of a creation.
        Err(_) if record.phase == Phase::Creating => {
            kill();
            Left::Creating
        }
        Err(error) => {
            tracing::error!(
                guest = record.name,
                pid,
                "the component cannot be connected to, and is killed: {error}"
            );
            kill();
            Left::Died {
                exit: Exit::Unknown(format!("it could not be connected to again: {error}")),
                log,
                sockets,
            }
        }
    }
}

/// What follows a run where a version that did not say so has written the record.
fn at_once(record: &Record) -> Over {
    let detail = record
        .stop
        .as_ref()
        .map_or_else(String::new, |stop| stop.detail.clone());
    let reason = record.stop.as_ref().map_or(Reason::Crash, |stop| stop.reason);
    Over {
        end: End {
            ending: Ending::new(reason, detail),
            uptime_ns: 0,
        },
        follows: Some(Follow {
            hold: false,
            begins: Instant::now(),
            by_itself: true,
        }),
    }
}

/// How many events of a guest's component were told on after its record was written: what comes next from the component are those again.
fn told_since(log: &EventLog, record: &Record) -> u64 {
    let of_component = |event: &&Event| {
        let same = *event.guest == *record.name && event.generation == record.generation;
        // That the manager knows by itself.
        same && matches!(&event.kind, EventKind::Device(news) if *news != DeviceNews::GuestReady)
    };
    log.after(record.sequence).filter(of_component).count() as u64
}

/// A connection to a component: its end goes there beside one byte.
fn connect(successors: &OwnedFd) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let fds = [theirs.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(successors, &[IoSlice::new(&[0])], &mut control, flags)?;
    Ok(ours)
}
