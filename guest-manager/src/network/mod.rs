//! The other end of network devices: what the manager opens or starts so that a component gets handles only.
//!
//! ```text
//!   Link::User ----------> passt: a process with one end of a socket pair ---------.
//!   Link::TapNamed, -----> tap: /dev/net/tun, interface: MTU, bridge, up ----------+--> Link::Socket or Link::Tap, and a Guard
//!   Link::Bridge                                                                   |
//!   Link::Tap, Socket ------- from the client, as they are ------------------------'
//! ```
//!
//! A tap is never persistent: it goes with the last of its descriptors, which the component has. passt ends when the component's end of the pair
//! closes. So nothing is left of either when manager and component are killed.
//!
//! [`open`] blocks, for up to [`passt::PATIENCE`], and belongs on a worker thread.

mod interface;
pub mod passt;
mod tap;
#[cfg(test)]
mod tests;

use std::io;

use sepal_schema::config::device::{Link, Network};
use sepal_schema::error::{Error, Kind};

use self::passt::Passt;

/// Why the other end of a network device cannot be had. Each names what is lacking.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host has no driver for taps.
    #[error("/dev/net/tun is missing: this host's kernel has no driver for tap devices (module tun)")]
    NoTun,
    /// The device node is not for this user.
    #[error("/dev/net/tun cannot be opened by the guest manager: {0}")]
    TunDenied(io::Error),
    /// The manager may not make taps, or change them.
    #[error(
        "the guest manager may not {what}: it lacks CAP_NET_ADMIN; hand over a tap that somebody else opened, or use user-mode networking"
    )]
    NoPrivilege {
        /// What needs the privilege.
        what: String,
    },
    /// A tap that exists belongs to somebody else.
    #[error("the tap {0} belongs to another user, and the guest manager lacks CAP_NET_ADMIN")]
    NotOwner(String),
    /// A tap is used by another guest or program.
    #[error("the tap {0} is in use")]
    Busy(String),
    /// An interface of that name is something else.
    #[error("{name} is a network interface, but no tap with {queues}")]
    NoTap {
        /// Its name.
        name: String,
        /// What was asked of it.
        queues: &'static str,
    },
    /// No interface can have that name.
    #[error("{0:?} cannot be an interface's name: 1 to 15 bytes without blanks, '/', ':' and '%' are allowed")]
    Name(String),
    /// There is no such bridge.
    #[error("there is no network interface {0}: a bridge has to be made first (ip link add {0} type bridge)")]
    NoBridge(String),
    /// It is an interface, but no bridge.
    #[error("{0} is a network interface, but no bridge")]
    NotBridge(String),
    /// The program for user-mode networking is missing.
    #[error("user-mode networking needs the program {0}, which this host does not have: install the package passt")]
    NoPasst(String),
    /// The program for user-mode networking did not come up.
    #[error("passt, which serves user-mode networking, did not start: {0}")]
    PasstFailed(String),
    /// The host failed otherwise.
    #[error("{what}: {error}")]
    Host {
        /// What was to be done.
        what: String,
        /// What the host said.
        error: io::Error,
    },
}

impl NetworkError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoTun => Kind::NotSupported,
            Self::TunDenied(_) | Self::NoPrivilege { .. } | Self::NotOwner(_) => Kind::PermissionDenied,
            Self::Busy(_) => Kind::AlreadyBound,
            Self::NoTap { .. } | Self::Name(_) | Self::NotBridge(_) => Kind::BadConfig,
            Self::NoBridge(_) => Kind::NotFound,
            Self::NoPasst(_) | Self::PasstFailed(_) => Kind::FailedServiceConnect,
            Self::Host { .. } => Kind::NoResources,
        }
    }
}

impl NetworkError {
    /// The error as it is told, of what a field of the network device `index` asks for.
    fn of(self, index: usize, field: &str) -> Error {
        let field = format!("networks[{index}].{field}");
        Error::new(self.kind(), format!("{field}: {self}")).about(field)
    }
}

/// Makes an error of a step from what the host said.
fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.into();
    move |error| match error.raw_os_error() {
        Some(libc::EPERM) => NetworkError::NoPrivilege { what },
        _ => NetworkError::Host { what, error },
    }
}

/// What has to live as long as the guest uses a network. Dropping it ends what serves it, and waits for that end: some milliseconds.
#[derive(Debug, Default)]
pub struct Guard {
    passt: Option<Passt>,
}

/// The network device `index` of a configuration, with its other end as handles, and what has to be kept until the guest ends.
///
/// # Errors
///
/// Says about which field it is, and what is lacking: `FAILED_SERVICE_CONNECT` (passt is missing or does not start), `PERMISSION_DENIED` (with the
/// privilege), `NOT_FOUND` (the bridge), `ALREADY_BOUND` (the tap is in use), `BAD_CONFIG`, `NOT_SUPPORTED` (no taps), `NO_RESOURCES`.
pub fn open(index: usize, network: Network) -> Result<(Network, Guard), Error> {
    let mut guard = Guard::default();
    let (mtu, queue_pairs) = (network.mtu(), network.queue_pairs());
    let (field, link) = match network.link {
        Link::User => (
            "user",
            passt::start(passt::PROGRAM, mtu, network.mac).map(|(socket, passt)| {
                guard.passt = Some(passt);
                Link::Socket(socket)
            }),
        ),
        Link::TapNamed(name) => ("tapNamed", tap::named(&name, queue_pairs, mtu).map(Link::Tap)),
        Link::Bridge(bridge) => ("bridge", tap::bridged(&bridge, queue_pairs, mtu).map(Link::Tap)),
        link @ (Link::Tap(_) | Link::Socket(_)) => ("", Ok(link)),
    };
    let link = link.map_err(|error| error.of(index, field))?;
    Ok((Network { link, ..network }, guard))
}

/// Whether the other end of the network device `index` could be had, as far as that can be told without making or starting anything.
///
/// # Errors
///
/// As for [`open`]; what only shows when it is tried, a lack of privilege above all, is not among them.
pub(crate) fn check(index: usize, network: &Network) -> Result<(), Error> {
    let (field, checked) = match &network.link {
        Link::User => ("user", passt::check(passt::PROGRAM)),
        Link::TapNamed(name) => ("tapNamed", tap::check(name, None)),
        Link::Bridge(bridge) => ("bridge", tap::check("", Some(bridge))),
        Link::Tap(_) | Link::Socket(_) => return Ok(()),
    };
    checked.map_err(|error| error.of(index, field))
}
