//! What capabilities to a guest permit, as Rust values: rights, bounds, and the names that people use for them.

use std::{fmt, ops::BitOr, time::Duration};

use crate::{
    error::{Error, cut},
    facet_capnp::{bounds, description, facet, share},
};

pub use crate::facet_capnp::{FacetKind, Right};

/// All rights, in the order of the schema.
pub const RIGHTS: [Right; 18] = [
    Right::Observe,
    Right::Output,
    Right::Input,
    Right::Shutdown,
    Right::Kill,
    Right::Pause,
    Right::Reset,
    Right::Nmi,
    Right::Balloon,
    Right::Memory,
    Right::Disk,
    Right::Network,
    Right::Connect,
    Right::Listen,
    Right::Agent,
    Right::Debug,
    Right::Share,
    Right::Cpu,
];

/// All kinds of facets, in the order of the schema.
pub const KINDS: [FacetKind; 14] = [
    FacetKind::Guest,
    FacetKind::Serial,
    FacetKind::Console,
    FacetKind::Power,
    FacetKind::BalloonController,
    FacetKind::MemController,
    FacetKind::DiskController,
    FacetKind::NetController,
    FacetKind::HostVsockEndpoint,
    FacetKind::Agent,
    FacetKind::Observer,
    FacetKind::Statistics,
    FacetKind::Debug,
    FacetKind::CpuController,
];

/// The most ports that bounds name.
pub const MAX_PORTS: u32 = 64;
/// The longest label of a share, in bytes.
pub const MAX_LABEL: usize = 64;
/// The longest token, in bytes.
pub const MAX_TOKEN: usize = 128;
/// What the kernel shows for every user whom it cannot name in this user namespace (`overflowuid`, user_namespaces(7)).
const OVERFLOW: u32 = 65534;

/// The right as it is written on command lines and in errors: `observe`.
pub fn right_name(right: Right) -> &'static str {
    match right {
        Right::Observe => "observe",
        Right::Output => "output",
        Right::Input => "input",
        Right::Shutdown => "shutdown",
        Right::Kill => "kill",
        Right::Pause => "pause",
        Right::Reset => "reset",
        Right::Nmi => "nmi",
        Right::Balloon => "balloon",
        Right::Memory => "memory",
        Right::Disk => "disk",
        Right::Network => "network",
        Right::Connect => "connect",
        Right::Listen => "listen",
        Right::Agent => "agent",
        Right::Debug => "debug",
        Right::Share => "share",
        Right::Cpu => "cpu",
    }
}

/// The kind as it is written on command lines and at the beginning of tokens: `balloon`.
pub fn kind_name(kind: FacetKind) -> &'static str {
    match kind {
        FacetKind::Guest => "guest",
        FacetKind::Serial => "serial",
        FacetKind::Console => "console",
        FacetKind::Power => "power",
        FacetKind::BalloonController => "balloon",
        FacetKind::MemController => "memory",
        FacetKind::DiskController => "disk",
        FacetKind::NetController => "network",
        FacetKind::HostVsockEndpoint => "vsock",
        FacetKind::Agent => "agent",
        FacetKind::Observer => "observer",
        FacetKind::Statistics => "stats",
        FacetKind::Debug => "debug",
        FacetKind::CpuController => "cpu",
    }
}

/// The right of this name.
pub fn right_of(name: &str) -> Option<Right> {
    RIGHTS.into_iter().find(|&right| right_name(right) == name)
}

/// The kind of this name.
pub fn kind_of(name: &str) -> Option<FacetKind> {
    KINDS.into_iter().find(|&kind| kind_name(kind) == name)
}

/// A set of rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rights(u32);

impl Rights {
    /// No right at all.
    pub const NONE: Self = Self(0);
    /// Every right there is.
    pub const ALL: Self = Self((1 << RIGHTS.len()) - 1);

    /// Whether `right` is among them.
    pub fn has(self, right: Right) -> bool {
        self.0 & bit(right) != 0
    }

    /// Those that are in both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// These without `right`.
    #[must_use]
    pub fn without(self, right: Right) -> Self {
        Self(self.0 & !bit(right))
    }

    /// The rights one by one, in the order of the schema.
    pub fn iter(self) -> impl Iterator<Item = Right> {
        RIGHTS.into_iter().filter(move |&right| self.has(right))
    }

    /// Reads a list of rights; those that this version does not know are left out.
    pub fn read(from: capnp::enum_list::Reader<'_, Right>) -> Self {
        from.iter().take(64).flatten().collect()
    }
}

fn bit(right: Right) -> u32 {
    1 << (right as u16)
}

impl From<Right> for Rights {
    fn from(right: Right) -> Self {
        Self(bit(right))
    }
}

impl BitOr<Right> for Rights {
    type Output = Self;

    fn bitor(self, right: Right) -> Self {
        Self(self.0 | bit(right))
    }
}

impl FromIterator<Right> for Rights {
    fn from_iter<I: IntoIterator<Item = Right>>(rights: I) -> Self {
        rights.into_iter().fold(Self::NONE, |all, right| all | right)
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NONE {
            return f.write_str("nothing");
        }
        for (i, right) in self.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}", right_name(right))?;
        }
        Ok(())
    }
}

/// Both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The least.
    pub min: u64,
    /// The most.
    pub max: u64,
}

impl Range {
    /// Whether `value` is in it.
    pub fn contains(self, value: u64) -> bool {
        (self.min..=self.max).contains(&value)
    }
}

/// What is left of a capability's power when it is narrowed; documented in `facet.capnp`. The default narrows nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bounds {
    /// The rights that are kept; none: all.
    pub only: Option<Rights>,
    /// How long from now it works; none: for as long as the guest.
    pub lifetime: Option<Duration>,
    /// Changing calls a second, and how many at once; none: any number.
    pub rate: Option<CallRate>,
    /// Sizes of the balloon, in pages of 4096 bytes.
    pub balloon_pages: Option<Range>,
    /// Sizes that may be plugged, in bytes.
    pub memory_bytes: Option<Range>,
    /// Ports that may be used; empty: all.
    pub vsock_ports: Vec<u32>,
}

/// How often something may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallRate {
    /// In the long run; not 0.
    pub per_second: u32,
    /// At once after a rest; not 0.
    pub burst: u32,
}

impl Bounds {
    /// Only these rights, and nothing else narrowed.
    pub fn only(rights: Rights) -> Self {
        Self {
            only: Some(rights),
            ..Self::default()
        }
    }

    /// Writes the bounds into a message.
    pub fn write(&self, mut to: bounds::Builder<'_>) {
        if let Some(only) = self.only {
            write_rights(only, |count| to.reborrow().init_only(count));
        }
        let lifetime = self.lifetime.map_or(0, |lifetime| lifetime.as_millis().max(1));
        to.set_lifetime_ms(u64::try_from(lifetime).unwrap_or(u64::MAX));
        if let Some(rate) = self.rate {
            to.set_calls_per_second(rate.per_second);
            to.set_burst(rate.burst);
        }
        let range = |range: Range, mut to: bounds::range::Builder<'_>| {
            to.set_min(range.min);
            to.set_max(range.max);
        };
        if let Some(pages) = self.balloon_pages {
            range(pages, to.reborrow().init_balloon_pages());
        }
        if let Some(bytes) = self.memory_bytes {
            range(bytes, to.reborrow().init_memory_bytes());
        }
        let count = u32::try_from(self.vsock_ports.len()).unwrap_or(u32::MAX);
        let mut ports = to.init_vsock_ports(count);
        for (i, &port) in (0..count).zip(&self.vsock_ports) {
            ports.set(i, port);
        }
    }

    /// Reads bounds out of a message.
    ///
    /// # Errors
    /// `BAD_CONFIG` naming the field. A right that this version does not know is one of them: leaving it out could leave none, which means all.
    pub fn read(from: bounds::Reader<'_>) -> Result<Self, Error> {
        let only = from.get_only()?;
        let only = match only.len() {
            0 => None,
            1..=64 => {
                let rights = only.iter().collect::<Result<Rights, _>>();
                let unknown =
                    |_| Error::not_supported("bounds.only", "bounds.only names a right that is not known here");
                Some(rights.map_err(unknown)?)
            }
            many => {
                return Err(Error::bad_config(
                    "bounds.only",
                    format!("bounds.only names {many} rights"),
                ));
            }
        };
        let (per_second, burst) = (from.get_calls_per_second(), from.get_burst());
        let rate = match (per_second, burst) {
            (0, 0) => None,
            (0, _) => {
                let message = "bounds.burst is set without bounds.callsPerSecond";
                return Err(Error::bad_config("bounds.burst", message));
            }
            (per_second, 0) => Some(CallRate {
                per_second,
                burst: per_second,
            }),
            (per_second, burst) => Some(CallRate { per_second, burst }),
        };
        let range = |field: &str, from: bounds::range::Reader<'_>| {
            let range = Range {
                min: from.get_min(),
                max: from.get_max(),
            };
            if range.max < range.min {
                let message = format!("{field} is from {} to {}, which holds nothing", range.min, range.max);
                return Err(Error::bad_config(field, message));
            }
            Ok(range)
        };
        let balloon_pages = match from.has_balloon_pages() {
            true => Some(range("bounds.balloonPages", from.get_balloon_pages()?)?),
            false => None,
        };
        let memory_bytes = match from.has_memory_bytes() {
            true => Some(range("bounds.memoryBytes", from.get_memory_bytes()?)?),
            false => None,
        };
        let ports = from.get_vsock_ports()?;
        if ports.len() > MAX_PORTS {
            let message = format!(
                "bounds.vsockPorts names {} ports; at most {MAX_PORTS} are allowed",
                ports.len()
            );
            return Err(Error::bad_config("bounds.vsockPorts", message));
        }
        Ok(Self {
            only,
            lifetime: Some(from.get_lifetime_ms())
                .filter(|&ms| ms != 0)
                .map(Duration::from_millis),
            rate,
            balloon_pages,
            memory_bytes,
            vsock_ports: ports.iter().collect(),
        })
    }
}

fn write_rights<'a>(rights: Rights, init: impl FnOnce(u32) -> capnp::enum_list::Builder<'a, Right>) {
    let rights: Vec<_> = rights.iter().collect();
    let count = u32::try_from(rights.len()).unwrap_or(u32::MAX);
    let mut list = init(count);
    for (i, right) in (0..count).zip(rights) {
        list.set(i, right);
    }
}

/// What a capability is, and what it permits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// What it is for.
    pub kind: FacetKind,
    /// The guest's name.
    pub guest: String,
    /// All that it permits.
    pub rights: Rights,
    /// How long it still works; none: for as long as the guest.
    pub expires_in: Option<Duration>,
    /// The tightest bounds on the way to it.
    pub bounds: Bounds,
}

impl Description {
    /// Writes it into a message.
    pub fn write(&self, mut to: description::Builder<'_>) {
        to.set_kind(self.kind);
        to.set_guest(cut(&self.guest));
        write_rights(self.rights, |count| to.reborrow().init_rights(count));
        to.set_expires_in_ms(milliseconds(self.expires_in));
        self.bounds.write(to.init_bounds());
    }

    /// Reads it out of a message.
    ///
    /// # Errors
    /// The message is not well-formed, or says what cannot be.
    pub fn read(from: description::Reader<'_>) -> Result<Self, Error> {
        Ok(Self {
            kind: known(from.get_kind())?,
            guest: cut(from.get_guest()?.to_str().map_err(capnp::Error::from)?).to_owned(),
            rights: Rights::read(from.get_rights()?),
            expires_in: duration(from.get_expires_in_ms()),
            bounds: Bounds::read(from.get_bounds()?)?,
        })
    }
}

/// With what conditions a token is given out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Terms {
    /// The first who redeems it uses it up.
    pub once: bool,
    /// The only user who may redeem it.
    pub uid: Option<u32>,
    /// For people.
    pub label: String,
}

impl Terms {
    /// Writes them into a message.
    pub fn write(&self, mut to: facet::terms::Builder<'_>) {
        to.set_once(self.once);
        to.set_bound_to_uid(self.uid.is_some());
        to.set_uid(self.uid.unwrap_or(0));
        to.set_label(&self.label);
    }

    /// Reads them out of a message.
    ///
    /// # Errors
    /// `BAD_CONFIG` for a label that is too long or not fit to be shown, and for a uid that says nothing about who that is.
    pub fn read(from: facet::terms::Reader<'_>) -> Result<Self, Error> {
        let label = from.get_label()?.to_str().map_err(capnp::Error::from)?;
        if label.len() > MAX_LABEL || label.chars().any(char::is_control) {
            let message = format!("terms.label has more than {MAX_LABEL} bytes, or control characters");
            return Err(Error::bad_config("terms.label", message));
        }
        let uid = from.get_bound_to_uid().then(|| from.get_uid());
        if let Some(uid @ (OVERFLOW | u32::MAX)) = uid {
            let message = format!("terms.uid is {uid}, which stands for nobody in particular");
            return Err(Error::bad_config("terms.uid", message));
        }
        Ok(Self {
            once: from.get_once(),
            uid,
            label: label.to_owned(),
        })
    }
}

/// A share as it is listed; the fields are documented in `facet.capnp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Identifies it within its guest.
    pub id: u64,
    /// What was shared.
    pub kind: FacetKind,
    /// With what conditions.
    pub terms: Terms,
    /// What it permits.
    pub rights: Rights,
    /// How long it still works; none: for as long as the guest.
    pub expires_in: Option<Duration>,
    /// How often it has been redeemed.
    pub redeemed: u32,
    /// Who shared it.
    pub shared_by_uid: u32,
}

impl Share {
    /// Writes it into a message.
    pub fn write(&self, mut to: share::Builder<'_>) {
        to.set_id(self.id);
        to.set_kind(self.kind);
        to.set_label(&self.terms.label);
        write_rights(self.rights, |count| to.reborrow().init_rights(count));
        to.set_expires_in_ms(milliseconds(self.expires_in));
        to.set_once(self.terms.once);
        to.set_bound_to_uid(self.terms.uid.is_some());
        to.set_uid(self.terms.uid.unwrap_or(0));
        to.set_redeemed(self.redeemed);
        to.set_shared_by_uid(self.shared_by_uid);
    }

    /// Reads it out of a message.
    ///
    /// # Errors
    /// The message is not well-formed, or of a kind that is not known here.
    pub fn read(from: share::Reader<'_>) -> Result<Self, Error> {
        Ok(Self {
            id: from.get_id(),
            kind: known(from.get_kind())?,
            terms: Terms {
                once: from.get_once(),
                uid: from.get_bound_to_uid().then(|| from.get_uid()),
                label: cut(from.get_label()?.to_str().map_err(capnp::Error::from)?).to_owned(),
            },
            rights: Rights::read(from.get_rights()?),
            expires_in: duration(from.get_expires_in_ms()),
            redeemed: from.get_redeemed(),
            shared_by_uid: from.get_shared_by_uid(),
        })
    }
}

fn known(kind: Result<FacetKind, capnp::NotInSchema>) -> Result<FacetKind, Error> {
    kind.map_err(|_| Error::not_supported("kind", "this kind of capability is not known here"))
}

/// A time that is there is at least a millisecond: 0 means none.
fn milliseconds(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1))
}

fn duration(milliseconds: u64) -> Option<Duration> {
    (milliseconds != 0).then(|| Duration::from_millis(milliseconds))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;

    fn range() -> impl Strategy<Value = Range> {
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| Range {
            min: a.min(b),
            max: a.max(b),
        })
    }

    prop_compose! {
        fn some_bounds()(
            only in prop::option::of(1u32..=Rights::ALL.0),
            lifetime in prop::option::of(1u64..1 << 40),
            rate in prop::option::of((1u32.., 1u32..)),
            balloon_pages in prop::option::of(range()),
            memory_bytes in prop::option::of(range()),
            vsock_ports in prop::collection::vec(any::<u32>(), 0..9),
        ) -> Bounds {
            Bounds {
                only: only.map(Rights),
                lifetime: lifetime.map(Duration::from_millis),
                rate: rate.map(|(per_second, burst)| CallRate { per_second, burst }),
                balloon_pages,
                memory_bytes,
                vsock_ports,
            }
        }
    }

    proptest! {
        #[test]
        fn bounds_survive_the_wire(bounds in some_bounds()) {
            let mut message = capnp::message::Builder::new_default();
            bounds.write(message.init_root());
            prop_assert_eq!(Bounds::read(message.get_root_as_reader().unwrap()).unwrap(), bounds);
        }
    }

    #[test]
    fn names_lead_back_to_what_they_name() {
        for right in RIGHTS {
            assert_eq!(right_of(right_name(right)), Some(right));
        }
        for kind in KINDS {
            assert_eq!(kind_of(kind_name(kind)), Some(kind));
        }
        assert_eq!(Rights::ALL.iter().count(), RIGHTS.len());
        assert_eq!((Rights::from(Right::Observe) | Right::Kill).to_string(), "observe,kill");
    }

    #[test]
    fn bounds_that_hold_nothing_name_their_field() {
        let mut message = capnp::message::Builder::new_default();
        let mut bounds: bounds::Builder<'_> = message.init_root();
        bounds.reborrow().init_memory_bytes().set_min(1);
        let error = Bounds::read(bounds.into_reader()).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "bounds.memoryBytes"));
    }

    #[test]
    fn a_share_survives_the_wire() {
        let terms = Terms {
            once: true,
            uid: Some(0),
            label: "for the night shift".into(),
        };
        let share = Share {
            id: 7,
            kind: FacetKind::Console,
            terms: terms.clone(),
            rights: Rights::from(Right::Output),
            expires_in: Some(Duration::from_secs(3)),
            redeemed: 2,
            shared_by_uid: 1000,
        };
        let mut message = capnp::message::Builder::new_default();
        share.write(message.init_root());
        assert_eq!(Share::read(message.get_root_as_reader().unwrap()).unwrap(), share);
        let mut message = capnp::message::Builder::new_default();
        terms.write(message.init_root());
        assert_eq!(Terms::read(message.get_root_as_reader().unwrap()).unwrap(), terms);
        for uid in [OVERFLOW, u32::MAX] {
            let mut message = capnp::message::Builder::new_default();
            Terms {
                uid: Some(uid),
                ..terms.clone()
            }
            .write(message.init_root());
            let error = Terms::read(message.get_root_as_reader().unwrap()).unwrap_err();
            assert_eq!(&error.about[..], "terms.uid");
        }
    }
}
