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
    cpu::Share,
    model::Moment,
};

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
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) trusted: bool,
    pub(crate) restarts: u32,
    pub(crate) failures: u32,
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
        to.set_restarts(self.restarts);
        to.set_failures(self.failures);
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
            uid: from.get_uid(),
            gid: from.get_gid(),
            trusted: from.get_trusted(),
            restarts: from.get_restarts(),
            failures: from.get_failures(),
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
        };
        Ok((record, config))
    }
}

fn write_share(share: &Kept, mut to: durable_share::Builder<'_>, (moment, now): (Moment, Instant)) {
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
    let expires = share.expires.map_or(0, |at| {
        let left = at.saturating_duration_since(now).as_nanos();
        let at = u128::from(moment.monotonic_ns) + left;
        u64::try_from(at).unwrap_or(u64::MAX).max(1)
    });
    to.set_expires_ns(expires);
}

fn read_share(from: durable_share::Reader<'_>, (moment, now): (Moment, Instant)) -> Result<Option<Kept>, Error> {
    let kind = from.get_kind().map_err(capnp::Error::from)?;
    let (Some(thing), Ok(digest)) = (Thing::of(kind, from.get_port()), from.get_token_hash()?.try_into()) else {
        return Ok(None);
    };
    let expires = match from.get_expires_ns() {
        0 => None,
        at => {
            let left = Duration::from_nanos(at.saturating_sub(moment.monotonic_ns));
            Some(now.checked_add(left).unwrap_or(now))
        }
    };
    Ok(Some(Kept {
        id: from.get_id(),
        parent: from.get_parent(),
        thing,
        digest,
        bounds: Bounds::read(from.get_bounds()?)?,
        expires,
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
mod tests {
    use std::{fs::File, io::Read, os::fd::AsRawFd};

    use sepal_schema::{
        config::{self, OnReset},
        facet::{CallRate, Range, Rights},
        report::{Reason, Rung},
    };

    use super::*;

    fn record(now: Instant) -> Record {
        Record {
            name: "web".into(),
            uuid: [7; 16],
            generation: 3,
            descriptor: Some(GuestDescriptor {
                cpus: 2,
                memory_mib: 64,
                kernel: "embedded".into(),
                cmdline: "quiet".into(),
                devices: vec!["serial".into()],
            }),
            layers: Vec::new(),
            phase: Phase::Running,
            detached: true,
            lease_tokens: vec![[1; 32], [2; 32]],
            uid: 1000,
            gid: 100,
            trusted: true,
            restarts: 4,
            failures: 1,
            shares: vec![Kept {
                id: 9,
                parent: 8,
                thing: Thing::Console(2),
                digest: [3; 32],
                bounds: Bounds {
                    rate: Some(CallRate {
                        per_second: 2,
                        burst: 5,
                    }),
                    balloon_pages: Some(Range { min: 1, max: 9 }),
                    vsock_ports: vec![7],
                    ..Bounds::only(Rights::ALL)
                },
                expires: Some(now + Duration::from_secs(60)),
                terms: Terms {
                    once: true,
                    uid: Some(5),
                    label: "for the tests".into(),
                },
                redeemed: 0,
                shared_by_uid: 1000,
            }],
            crashes: Vec::new(),
            stop: Some(StopReport {
                reason: Reason::Crash,
                detail: "it crashed".into(),
                error: None,
                uptime_ns: 5,
                time_ns: 6,
                about: "vcpu1".into(),
                rung: Rung::None,
                component: None,
            }),
            cid: 77,
            pins: vec![Pin {
                vcpu: 0,
                cpus: vec![1, 5],
            }],
            share: Share {
                weight: 50,
                percent: 150,
            },
            started_ns: 12345,
            agent_ready: true,
            held: true,
            paused: true,
            balloon_taken: 4096,
            balloon_by_hand: true,
            origin: Configuration::of(&GuestConfig::default()).ok(),
        }
    }

    #[test]
    fn a_record_survives_with_its_files() {
        let (moment, now) = (Moment::now(), Instant::now());
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, name).unwrap();
            File::open(path).unwrap().into()
        };
        let config = GuestConfig {
            name: "web".into(),
            memory_mib: 64,
            kernel: config::File::Fd(file("kernel")),
            initrd: config::File::Fd(file("initrd")),
            on_reset: OnReset::Restart,
            durable: true,
            ..GuestConfig::default()
        };
        let kit = Kit::new(config).unwrap();
        let record = record(now);
        let bytes = record.write(&kit, (moment, now)).unwrap();
        let fds = kit.fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let (read, config) = Record::read(&bytes, fds, (moment, now)).unwrap();
        assert_eq!(read, record);
        assert!(config.durable && config.on_reset == OnReset::Restart && config.memory_mib() == 64);
        for (given, content) in [(config.kernel, "kernel"), (config.initrd, "initrd")] {
            let config::File::Fd(fd) = given else {
                panic!("no descriptor")
            };
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            assert_eq!(text, content);
        }
        // A minute later by both clocks the share has expired, and not before.
        let later = (
            Moment {
                monotonic_ns: moment.monotonic_ns + 61_000_000_000,
                ..moment
            },
            now + Duration::from_secs(61),
        );
        let fds = kit.fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let (read, _) = Record::read(&bytes, fds, later).unwrap();
        assert_eq!(read.shares[0].expires, Some(later.1));
    }

    #[test]
    fn what_is_no_record_is_an_error() {
        let (moment, now) = (Moment::now(), Instant::now());
        let kit = Kit::new(GuestConfig {
            kernel: config::File::Fd(File::open("/dev/null").unwrap().into()),
            ..GuestConfig::default()
        });
        let bytes = record(now).write(&kit.unwrap(), (moment, now)).unwrap();
        // Without the kernel's descriptor.
        assert!(Record::read(&bytes, Vec::new(), (moment, now)).is_err());
        for length in [0, 1, 7, bytes.len() / 2] {
            assert!(Record::read(&bytes[..length], Vec::new(), (moment, now)).is_err());
        }
    }

    #[test]
    fn descriptors_are_taken_once() {
        let null: OwnedFd = File::open("/dev/null").unwrap().into();
        let number = null.as_raw_fd();
        let fds = Descriptors::new(vec![null]);
        assert_eq!(fds.take(0).unwrap().as_raw_fd(), number);
        assert!(fds.take(0).is_err() && fds.take(1).is_err() && fds.take(u32::MAX).is_err());
    }
}
