//! What the next manager has to know of a guest, in a message.

use std::{
    cell::RefCell,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use capnp::{message, serialize};
use sepal_schema::{
    config::{GuestConfig, Handles, Pin},
    config_capnp::guest_config,
    crash::CrashReport,
    error::{Error, Kind},
    facet::{Bounds, Terms},
    info::{GuestDescriptor, LayerInfo, read_layers, write_layers},
    report::StopReport,
    store_capnp::{durable_guest, durable_share},
};

use crate::{
    access::{secret::Digest, shares::Kept, thing::Thing},
    configuration::Configuration,
    course::{End, Follow, Over},
    cpu::Share,
    guest::{Again, StopCause},
    model::{Ending, Moment},
    restart::Counted,
};

use durable_guest::BeginAgain;
pub(crate) use durable_guest::Phase;

/// A guest, besides its configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Record {
    pub(crate) name: String,
    /// Tells it from all others, whatever its name is.
    pub(crate) uuid: [u8; 16],
    pub(crate) generation: u64,
    pub(crate) descriptor: Option<GuestDescriptor>,
    pub(crate) layers: Vec<LayerInfo>,
    pub(crate) phase: Phase,
    pub(crate) detached: bool,
    pub(crate) lease_tokens: Vec<Digest>,
    /// When it is stopped unless its lease is redeemed; none: that is not waited for.
    pub(crate) lease_ends: Option<Instant>,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) trusted: bool,
    pub(crate) counted: Counted,
    /// Short runs in a row after which it began again by itself.
    pub(crate) short_runs: u32,
    pub(crate) shares: Vec<Kept>,
    pub(crate) crashes: Vec<CrashReport>,
    /// How the run before ended.
    pub(crate) stop: Option<StopReport>,
    pub(crate) cid: u32,
    /// What is wanted for its vCPUs, in place of what the configuration said.
    pub(crate) pins: Vec<Pin>,
    /// The same, of the host's processors.
    pub(crate) share: Share,
    /// Nanoseconds of the monotonic clock; 0: the vCPUs have not started.
    pub(crate) started_ns: u64,
    pub(crate) agent_ready: bool,
    /// It waits, paused, before its first instruction.
    pub(crate) held: bool,
    pub(crate) paused: bool,
    /// What was taken of its memory because the host ran short, in bytes.
    pub(crate) balloon_taken: u64,
    /// Somebody has set its balloon.
    pub(crate) balloon_by_hand: bool,
    /// What would create it again.
    pub(crate) origin: Option<Configuration>,
    /// Why it is being stopped by force.
    pub(crate) stop_wanted: Option<StopCause>,
    /// Why its run is being ended for the next one.
    pub(crate) again: Option<Again>,
    /// It was asked to shut down.
    pub(crate) asked: bool,
    /// How its run ended, if that is to be told, or another run is to follow.
    pub(crate) over: Option<Over>,
    /// The number of the last event of its component that has been told on.
    pub(crate) heard: u64,
    /// The number of the last event of all guests when this was written.
    pub(crate) sequence: u64,
    /// Sentences about what it got from the host.
    pub(crate) notes: Vec<String>,
    /// Devices that broke in this run, each with its reason.
    pub(crate) broken: Vec<(String, String)>,
}

/// Descriptors that a configuration names by number: those of a record.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(RefCell<Vec<Option<OwnedFd>>>);

impl Descriptors {
    /// Those that were kept, in order.
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self(RefCell::new(fds.into_iter().map(Some).collect()))
    }

    /// Those that were sent, in order.
    pub(crate) fn into_inner(self) -> Vec<OwnedFd> {
        self.0.into_inner().into_iter().flatten().collect()
    }
}

impl Handles for Descriptors {
    fn send(&self, fd: OwnedFd) -> Result<u32, Error> {
        let mut fds = self.0.borrow_mut();
        fds.push(Some(fd));
        Ok(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX))
    }

    fn take(&self, number: u32) -> Result<OwnedFd, Error> {
        let mut fds = self.0.borrow_mut();
        let fd = usize::try_from(number)
            .ok()
            .and_then(|number| fds.get_mut(number)?.take());
        fd.ok_or_else(|| Error::new(Kind::BadConfig, format!("the descriptor {number} was not kept")))
    }
}

/// A configuration as it is kept: the message, and the descriptors that it names.
pub(crate) struct Kit {
    message: message::TypedBuilder<guest_config::Owned>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Kit {
    /// Of a configuration whose files are descriptors.
    ///
    /// # Errors
    /// What cannot be written.
    pub(crate) fn new(config: GuestConfig) -> Result<Self, Error> {
        let (mut message, fds) = (message::TypedBuilder::new_default(), Descriptors::default());
        config.encode(message.init_root(), &fds)?;
        Ok(Self {
            message,
            fds: fds.into_inner(),
        })
    }
}

impl Record {
    /// As it is kept, with the configuration.
    ///
    /// # Errors
    /// The configuration cannot be copied.
    pub(crate) fn write(&self, kit: &Kit, now: (Moment, Instant)) -> Result<Vec<u8>, capnp::Error> {
        let mut message = message::Builder::new_default();
        let mut to: durable_guest::Builder<'_> = message.init_root();
        to.set_name(&self.name);
        to.set_uuid(&self.uuid);
        to.set_generation(self.generation);
        to.set_config(kit.message.get_root_as_reader()?)?;
        if let Some(descriptor) = &self.descriptor {
            descriptor.write(to.reborrow().init_descriptor());
        }
        write_layers(&self.layers, to.reborrow().init_layers(length(self.layers.len())));
        to.set_phase(self.phase);
        to.set_detached(self.detached);
        let mut tokens = to.reborrow().init_lease_tokens(length(self.lease_tokens.len()));
        for (i, token) in (0..).zip(&self.lease_tokens) {
            tokens.set(i, token);
        }
        to.set_uid(self.uid);
        to.set_gid(self.gid);
        to.set_trusted(self.trusted);
        to.set_restarts(self.counted.restarts);
        to.set_failures(self.counted.failures);
        to.set_waits(self.counted.waits);
        to.set_short_runs(self.short_runs);
        let mut shares = to.reborrow().init_shares(length(self.shares.len()));
        for (i, share) in (0..).zip(&self.shares) {
            write_share(share, shares.reborrow().get(i), now);
        }
        let mut crashes = to.reborrow().init_crashes(length(self.crashes.len()));
        for (i, crash) in (0..).zip(&self.crashes) {
            crash.write(crashes.reborrow().get(i));
        }
        if let Some(stop) = &self.stop {
            stop.write(to.reborrow().init_stop());
        }
        to.set_cid(self.cid);
        self.write_cpus(to.reborrow().get_config()?)?;
        to.set_started_ns(self.started_ns);
        to.set_agent_ready(self.agent_ready);
        to.set_held(self.held);
        to.set_paused(self.paused);
        to.set_balloon_taken(self.balloon_taken);
        to.set_balloon_by_hand(self.balloon_by_hand);
        if let Some(origin) = &self.origin {
            origin.keep(to.reborrow().init_origin())?;
        }
        to.set_lease_ends_ns(self.lease_ends.map_or(0, |at| ns_of(at, now)));
        write_stop_wanted(self.stop_wanted.as_ref(), to.reborrow().init_stop_wanted());
        to.set_begin_again(match self.again {
            None => BeginAgain::No,
            Some(Again::Asked) => BeginAgain::Asked,
            Some(Again::Panicked) => BeginAgain::Panicked,
        });
        to.set_asked(self.asked);
        if let Some(over) = &self.over {
            write_over(over, to.reborrow().init_over(), now);
        }
        to.set_heard(self.heard);
        to.set_sequence(self.sequence);
        let mut notes = to.reborrow().init_notes(length(self.notes.len()));
        for (i, note) in (0..).zip(&self.notes) {
            notes.set(i, note);
        }
        let mut broken = to.reborrow().init_broken(length(self.broken.len()));
        for (i, (device, reason)) in (0..).zip(&self.broken) {
            let mut to = broken.reborrow().get(i);
            to.set_device(device);
            to.set_reason(reason);
        }
        let mut bytes = Vec::new();
        serialize::write_message(&mut bytes, &message)?;
        Ok(bytes)
    }

    fn write_cpus(&self, mut to: guest_config::Builder<'_>) -> Result<(), capnp::Error> {
        let mut pins = to.reborrow().init_pins(length(self.pins.len()));
        for (i, pin) in (0..).zip(&self.pins) {
            let mut to = pins.reborrow().get(i);
            to.set_vcpu(pin.vcpu);
            to.set_cpus(&pin.cpus[..])?;
        }
        let mut limits = to.get_limits()?;
        limits.set_cpu_weight(self.share.weight);
        limits.set_cpu_percent(self.share.percent);
        Ok(())
    }

    /// What was kept, and the configuration, of which `fds` are the descriptors.
    ///
    /// # Errors
    /// The message is not well-formed, or a descriptor is missing.
    pub(crate) fn read(bytes: &[u8], fds: Vec<OwnedFd>, now: (Moment, Instant)) -> Result<(Self, GuestConfig), Error> {
        let message = serialize::read_message(&mut &*bytes, message::ReaderOptions::new())?;
        let from: durable_guest::Reader<'_> = message.get_root()?;
        let config = GuestConfig::decode(from.get_config()?, &Descriptors::new(fds))?;
        let descriptor = match from.has_descriptor() {
            true => Some(GuestDescriptor::read(from.get_descriptor()?)?),
            false => None,
        };
        let stop = match from.has_stop() {
            true => Some(StopReport::read(from.get_stop()?)?),
            false => None,
        };
        let token = |token: Result<&[u8], capnp::Error>| Digest::try_from(token.ok()?).ok();
        // Those of a kind that this version does not know, nobody could use here.
        let share = |share| read_share(share, now).ok().flatten();
        let crashes = from
            .get_crashes()?
            .iter()
            .map(CrashReport::read)
            .collect::<Result<_, _>>()?;
        let record = Self {
            name: from.get_name()?.to_string().map_err(capnp::Error::from)?,
            uuid: from.get_uuid()?.try_into().unwrap_or_default(),
            generation: from.get_generation(),
            descriptor,
            layers: read_layers(from.get_layers()?)?,
            // One that this version does not know is begun anew.
            phase: from.get_phase().unwrap_or(Phase::Creating),
            detached: from.get_detached(),
            lease_tokens: from.get_lease_tokens()?.iter().filter_map(token).collect(),
            lease_ends: moment_of(from.get_lease_ends_ns(), now),
            uid: from.get_uid(),
            gid: from.get_gid(),
            trusted: from.get_trusted(),
            counted: Counted {
                failures: from.get_failures(),
                // Less was written by a version that did not count them.
                waits: from.get_waits().max(from.get_failures()),
                restarts: from.get_restarts(),
            },
            short_runs: from.get_short_runs(),
            shares: from.get_shares()?.iter().filter_map(share).collect(),
            crashes,
            stop,
            cid: from.get_cid(),
            pins: config.pins.clone(),
            share: Share::of(&config),
            started_ns: from.get_started_ns(),
            agent_ready: from.get_agent_ready(),
            held: from.get_held(),
            paused: from.get_paused(),
            balloon_taken: from.get_balloon_taken(),
            balloon_by_hand: from.get_balloon_by_hand(),
            origin: match from.has_origin() {
                true => Some(Configuration::read(from.get_origin()?)?),
                false => None,
            },
            stop_wanted: read_stop_wanted(from.get_stop_wanted())?,
            again: match from.get_begin_again() {
                Ok(BeginAgain::Asked) => Some(Again::Asked),
                Ok(BeginAgain::Panicked) => Some(Again::Panicked),
                Ok(BeginAgain::No) | Err(_) => None,
            },
            asked: from.get_asked(),
            over: match from.has_over() {
                true => Some(read_over(from.get_over()?, now)?),
                false => None,
            },
            heard: from.get_heard(),
            sequence: from.get_sequence(),
            notes: from
                .get_notes()?
                .iter()
                .map(|note| Ok(note?.to_string()?))
                .collect::<Result<_, capnp::Error>>()?,
            broken: from
                .get_broken()?
                .iter()
                .map(|from| Ok((from.get_device()?.to_string()?, from.get_reason()?.to_string()?)))
                .collect::<Result<_, capnp::Error>>()?,
        };
        Ok((record, config))
    }
}

/// A moment as it is kept: nanoseconds of the monotonic clock, which both managers' hosts have; never 0.
fn ns_of(at: Instant, (moment, now): (Moment, Instant)) -> u64 {
    let (ahead, behind) = (at.saturating_duration_since(now), now.saturating_duration_since(at));
    let at = (u128::from(moment.monotonic_ns) + ahead.as_nanos()).saturating_sub(behind.as_nanos());
    u64::try_from(at).unwrap_or(u64::MAX).max(1)
}

/// A moment that was kept, or now if it is over; none: there is none.
fn moment_of(ns: u64, (moment, now): (Moment, Instant)) -> Option<Instant> {
    let left = Duration::from_nanos(ns.saturating_sub(moment.monotonic_ns));
    (ns != 0).then(|| now.checked_add(left).unwrap_or(now))
}

fn write_stop_wanted(cause: Option<&StopCause>, mut to: durable_guest::stop_wanted::Builder<'_>) {
    match cause {
        None => to.set_no(()),
        Some(StopCause::Killed(why)) => to.set_killed(&**why),
        Some(StopCause::Hangup(after)) => to.set_hangup(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
        Some(StopCause::Panicked) => to.set_panicked(()),
    }
}

fn read_stop_wanted(from: durable_guest::stop_wanted::Reader<'_>) -> Result<Option<StopCause>, capnp::Error> {
    use durable_guest::stop_wanted::Which;
    Ok(match from.which() {
        Ok(Which::No(())) => None,
        Ok(Which::Killed(why)) => Some(StopCause::Killed(why?.to_string()?)),
        Ok(Which::Hangup(after)) => Some(StopCause::Hangup(Duration::from_millis(after))),
        Ok(Which::Panicked(())) => Some(StopCause::Panicked),
        // Of a later version: it is stopped all the same.
        Err(_) => Some(StopCause::Killed("it was being stopped by force".to_owned())),
    })
}

fn write_over(over: &Over, mut to: durable_guest::over::Builder<'_>, now: (Moment, Instant)) {
    let End { ending, uptime_ns } = &over.end;
    let report = ending.clone().report(*uptime_ns, now.0);
    report.write(to.reborrow().init_report());
    to.set_gave_up(ending.gave_up);
    if let Some(follow) = &over.follows {
        to.set_follows(true);
        to.set_hold(follow.hold);
        to.set_by_itself(follow.by_itself);
        to.set_begins_ns(ns_of(follow.begins, now));
    }
}

fn read_over(from: durable_guest::over::Reader<'_>, now: (Moment, Instant)) -> Result<Over, capnp::Error> {
    let report = StopReport::read(from.get_report()?)?;
    let uptime_ns = report.uptime_ns;
    let follow = || Follow {
        hold: from.get_hold(),
        by_itself: from.get_by_itself(),
        begins: moment_of(from.get_begins_ns(), now).unwrap_or(now.1),
    };
    Ok(Over {
        end: End {
            ending: Ending {
                error: report.error,
                about: report.about,
                rung: report.rung,
                component: report.component,
                gave_up: from.get_gave_up(),
                ..Ending::new(report.reason, report.detail)
            },
            uptime_ns,
        },
        follows: from.get_follows().then(follow),
    })
}

fn write_share(share: &Kept, mut to: durable_share::Builder<'_>, now: (Moment, Instant)) {
    let (kind, port) = (share.thing.kind(), share.thing.port());
    to.set_id(share.id);
    to.set_parent(share.parent);
    to.set_kind(kind);
    to.set_port(port);
    to.set_token_hash(&share.digest);
    share.bounds.write(to.reborrow().init_bounds());
    to.set_once(share.terms.once);
    to.set_bound_to_uid(share.terms.uid.is_some());
    to.set_uid(share.terms.uid.unwrap_or(0));
    to.set_label(&share.terms.label);
    to.set_redeemed(share.redeemed);
    to.set_shared_by_uid(share.shared_by_uid);
    to.set_expires_ns(share.expires.map_or(0, |at| ns_of(at, now)));
}

fn read_share(from: durable_share::Reader<'_>, now: (Moment, Instant)) -> Result<Option<Kept>, Error> {
    let kind = from.get_kind().map_err(capnp::Error::from)?;
    let (Some(thing), Ok(digest)) = (Thing::of(kind, from.get_port()), from.get_token_hash()?.try_into()) else {
        return Ok(None);
    };
    Ok(Some(Kept {
        id: from.get_id(),
        parent: from.get_parent(),
        thing,
        digest,
        bounds: Bounds::read(from.get_bounds()?)?,
        expires: moment_of(from.get_expires_ns(), now),
        terms: Terms {
            once: from.get_once(),
            uid: from.get_bound_to_uid().then(|| from.get_uid()),
            label: from.get_label()?.to_string().map_err(capnp::Error::from)?,
        },
        redeemed: from.get_redeemed(),
        shared_by_uid: from.get_shared_by_uid(),
    }))
}

/// Everything that is kept is bounded far below 2^32.
fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
