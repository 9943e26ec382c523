//! What a capability is for, and how a client gets one.

use std::fmt;

use capnp::capability::FromClientHook;
use sepal_schema::{
    facet::{FacetKind, Right, Rights, kind_name},
    facet_capnp::facet,
    transport::guard,
};

use super::holder::Holder;
use crate::{agent::AgentServer, facets, guest_server::GuestServer, vsock};

/// What a capability is for: enough to make another for the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thing {
    Guest,
    Serial,
    /// A port of the console.
    Console(u32),
    /// What the serial port printed: as `Serial`, with nothing but the right `output`.
    Output,
    Power,
    Balloon,
    Memory,
    Disks,
    Networks,
    Vsock,
    Agent,
    Observer,
    Statistics,
    Debug,
    Cpus,
}

impl Thing {
    /// The kind that it is told to be.
    pub(crate) fn kind(self) -> FacetKind {
        match self {
            Self::Guest => FacetKind::Guest,
            Self::Serial | Self::Output => FacetKind::Serial,
            Self::Console(_) => FacetKind::Console,
            Self::Power => FacetKind::Power,
            Self::Balloon => FacetKind::BalloonController,
            Self::Memory => FacetKind::MemController,
            Self::Disks => FacetKind::DiskController,
            Self::Networks => FacetKind::NetController,
            Self::Vsock => FacetKind::HostVsockEndpoint,
            Self::Agent => FacetKind::Agent,
            Self::Observer => FacetKind::Observer,
            Self::Statistics => FacetKind::Statistics,
            Self::Debug => FacetKind::Debug,
            Self::Cpus => FacetKind::CpuController,
        }
    }

    /// The port, of a console.
    pub(crate) fn port(self) -> u32 {
        match self {
            Self::Console(port) => port,
            _ => 0,
        }
    }

    /// What is told to be of a kind, with this port if it is a console; none if there is no such thing.
    pub(crate) fn of(kind: FacetKind, port: u32) -> Option<Self> {
        Some(match kind {
            FacetKind::Guest => Self::Guest,
            FacetKind::Serial => Self::Serial,
            FacetKind::Console => Self::Console(port),
            FacetKind::Power => Self::Power,
            FacetKind::BalloonController => Self::Balloon,
            FacetKind::MemController => Self::Memory,
            FacetKind::DiskController => Self::Disks,
            FacetKind::NetController => Self::Networks,
            FacetKind::HostVsockEndpoint => Self::Vsock,
            FacetKind::Agent => Self::Agent,
            FacetKind::Observer => Self::Observer,
            FacetKind::Statistics => Self::Statistics,
            FacetKind::Debug => Self::Debug,
            FacetKind::CpuController => Self::Cpus,
        })
    }

    /// The rights that mean something for it.
    pub(crate) fn rights(self) -> Rights {
        use Right::{
            Agent, Balloon, Connect, Cpu, Debug, Disk, Input, Kill, Listen, Memory, Network, Nmi, Observe, Output,
            Pause, Reset, Share, Shutdown,
        };
        let own: &[Right] = match self {
            Self::Guest => return Rights::ALL,
            Self::Serial | Self::Console(_) => &[Output, Input],
            Self::Output => &[Output],
            Self::Power => &[Shutdown, Kill, Pause, Reset, Nmi],
            Self::Balloon => &[Observe, Balloon],
            Self::Memory => &[Observe, Memory],
            Self::Disks => &[Observe, Disk],
            Self::Networks => &[Observe, Network],
            Self::Vsock => &[Connect, Listen],
            Self::Agent => &[Agent],
            Self::Observer => &[Observe, Output],
            Self::Statistics => &[Observe],
            Self::Debug => &[Debug],
            Self::Cpus => &[Observe, Cpu],
        };
        own.iter().copied().chain([Share]).collect()
    }
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Console(port) if *port > 0 => write!(f, "console {port}"),
            thing => f.write_str(kind_name(thing.kind())),
        }
    }
}

/// Any capability to a guest, as what they have in common.
fn facet<C: FromClientHook>(client: C) -> facet::Client {
    FromClientHook::new(client.into_client_hook())
}

/// Makes a client's capability of what it holds.
pub(crate) fn serve(holder: Holder) -> facet::Client {
    use sepal_schema::{
        agent_capnp::agent, cpu_capnp::cpu_controller, debug_capnp::debug, device_capnp, guest_capnp,
        vsock_capnp::host_vsock_endpoint,
    };
    match holder.thing {
        Thing::Guest => facet::<guest_capnp::guest::Client>(guard::new_client(GuestServer(holder))),
        Thing::Serial => facet::<guest_capnp::serial::Client>(guard::new_client(facets::PortServer::new(holder))),
        Thing::Console(_) => facet::<guest_capnp::console::Client>(guard::new_client(facets::PortServer::new(holder))),
        Thing::Output => facet::<guest_capnp::output::Client>(guard::new_client(facets::OutputServer(holder))),
        Thing::Power => facet::<guest_capnp::power::Client>(guard::new_client(facets::PowerServer(holder))),
        Thing::Balloon => {
            facet::<device_capnp::balloon_controller::Client>(guard::new_client(facets::BalloonServer(holder)))
        }
        Thing::Memory => facet::<device_capnp::mem_controller::Client>(guard::new_client(facets::MemoryServer(holder))),
        Thing::Disks => facet::<device_capnp::disk_controller::Client>(guard::new_client(facets::DiskServer(holder))),
        Thing::Networks => {
            facet::<device_capnp::net_controller::Client>(guard::new_client(facets::NetworkServer(holder)))
        }
        Thing::Vsock => facet::<host_vsock_endpoint::Client>(guard::new_client(vsock::Endpoint(holder))),
        Thing::Agent => facet::<agent::Client>(guard::new_client(AgentServer(holder))),
        Thing::Observer => facet::<guest_capnp::observer::Client>(guard::new_client(facets::ObserverServer(holder))),
        Thing::Statistics => {
            facet::<guest_capnp::statistics::Client>(guard::new_client(facets::StatisticsServer(holder)))
        }
        Thing::Debug => facet::<debug::Client>(guard::new_client(facets::DebugServer(holder))),
        Thing::Cpus => facet::<cpu_controller::Client>(guard::new_client(facets::CpuServer(holder))),
    }
}

/// As [`serve`], as the interface that the holder's thing is known to have.
pub(crate) fn serve_as<C: FromClientHook>(holder: Holder) -> C {
    C::new(serve(holder).into_client_hook())
}
