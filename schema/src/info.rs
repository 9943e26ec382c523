//! What there is to know about a guest, as a Rust value.

use uuid::Uuid;

use crate::{
    config::Restart,
    error::{Error, cut},
    guest_capnp,
    report::StopReport,
};

pub use guest_capnp::{GuestStatus, layer_info::State as LayerState};

/// One layer of the jail; see `guest.capnp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// The layer's name.
    pub name: String,
    /// Whether it holds.
    pub state: LayerState,
    /// What holds, or why it does not.
    pub detail: String,
}

/// What a guest is made of; see `guest.capnp`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestDescriptor {
    /// Number of vCPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Where the kernel came from.
    pub kernel: String,
    /// The complete command line.
    pub cmdline: String,
    /// Names of the devices.
    pub devices: Vec<String>,
}

/// What there is to know about a guest; see `guest.capnp` for each field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInfo {
    /// The guest's name.
    pub name: String,
    /// Where it is in its life.
    pub status: GuestStatus,
    /// Counts the creations under this name.
    pub generation: u64,
    /// Nanoseconds since the vCPUs started.
    pub uptime_ns: u64,
    /// What it is made of, or would be when it is started next; none before the first creation.
    pub descriptor: Option<GuestDescriptor>,
    /// How it ended the last time; none if it has not yet.
    pub stop: Option<StopReport>,
    /// At most [`MAX_PROBLEMS`] sentences about what is not as it should be.
    pub problems: Vec<String>,
    /// The layers of the jail.
    pub layers: Vec<LayerInfo>,
    /// Process id of the component; 0 if there is none.
    pub component_pid: u32,
    /// Whether its vCPUs are held.
    pub paused: bool,
    /// Whether it lives on without the client that launched it.
    pub detached: bool,
    /// How it is told apart, and kept.
    pub upkeep: Upkeep,
}

/// How a guest is told apart, kept, and begun again; see `guest.capnp` for each field. A component knows none of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Upkeep {
    /// Tells it from all other guests of its manager.
    pub uuid: Option<Uuid>,
    /// There is a definition of this name.
    pub defined: bool,
    /// It is started when its manager starts.
    pub autostart: bool,
    /// It goes on without its manager.
    pub durable: bool,
    /// How often it was begun again by itself since somebody started it.
    pub restarts: u32,
    /// How many runs in a row have failed.
    pub failures: u32,
    /// Milliseconds until it is stopped unless its lease is redeemed; 0 where that is not waited for.
    pub lease_ends_ms: u32,
    /// What follows when it ends by itself.
    pub restart: Restart,
}

/// Most problems that are told at a time.
pub const MAX_PROBLEMS: usize = 8;

impl GuestInfo {
    /// Reads what an observer answers to `info`.
    ///
    /// # Errors
    /// What kept the observer from answering.
    pub fn read_result(from: guest_capnp::observer::info_result::Reader<'_>) -> Result<Self, Error> {
        use guest_capnp::observer::info_result::Which;
        match from.which().map_err(capnp::Error::from)? {
            Which::Info(info) => Ok(Self::read(info?)?),
            Which::Error(error) => Err(Error::read(error?)?),
        }
    }

    /// Writes the information into a message; problems past [`MAX_PROBLEMS`] are left out.
    pub fn write(&self, mut to: guest_capnp::guest_info::Builder<'_>) {
        to.set_name(&self.name);
        to.set_status(self.status);
        to.set_generation(self.generation);
        to.set_uptime_ns(self.uptime_ns);
        if let Some(descriptor) = &self.descriptor {
            descriptor.write(to.reborrow().init_descriptor());
        }
        if let Some(stop) = &self.stop {
            stop.write(to.reborrow().init_stop());
        }
        let problems = &self.problems[..self.problems.len().min(MAX_PROBLEMS)];
        let mut list = to.reborrow().init_problems(length(problems.len()));
        for (i, problem) in problems.iter().enumerate() {
            list.set(length(i), problem);
        }
        write_layers(&self.layers, to.reborrow().init_layers(length(self.layers.len())));
        to.set_component_pid(self.component_pid);
        to.set_paused(self.paused);
        to.set_detached(self.detached);
        let upkeep = &self.upkeep;
        if let Some(uuid) = &upkeep.uuid {
            to.set_uuid(uuid.as_bytes());
        }
        to.set_defined(upkeep.defined);
        to.set_autostart(upkeep.autostart);
        to.set_durable(upkeep.durable);
        to.set_restarts(upkeep.restarts);
        to.set_failures(upkeep.failures);
        to.set_lease_ends_ms(upkeep.lease_ends_ms);
        if upkeep.restart != Restart::default() {
            upkeep.restart.write(to.init_restart());
        }
    }

    /// Reads the information out of a message. A status that this version does not know reads as not started, and a UUID that is none as none.
    pub fn read(from: guest_capnp::guest_info::Reader<'_>) -> Result<Self, capnp::Error> {
        Ok(Self {
            name: from.get_name()?.to_string()?,
            status: from.get_status().unwrap_or(GuestStatus::NotStarted),
            generation: from.get_generation(),
            uptime_ns: from.get_uptime_ns(),
            descriptor: match from.has_descriptor() {
                true => Some(GuestDescriptor::read(from.get_descriptor()?)?),
                false => None,
            },
            stop: if from.has_stop() {
                Some(StopReport::read(from.get_stop()?)?)
            } else {
                None
            },
            problems: texts(from.get_problems()?)?,
            layers: read_layers(from.get_layers()?)?,
            component_pid: from.get_component_pid(),
            paused: from.get_paused(),
            detached: from.get_detached(),
            upkeep: Upkeep {
                uuid: Uuid::from_slice(from.get_uuid()?).ok(),
                defined: from.get_defined(),
                autostart: from.get_autostart(),
                durable: from.get_durable(),
                restarts: from.get_restarts(),
                failures: from.get_failures(),
                lease_ends_ms: from.get_lease_ends_ms(),
                // A policy that this version does not know is told as none.
                restart: Restart::read(from.get_restart()?).unwrap_or_default(),
            },
        })
    }
}

impl GuestDescriptor {
    /// Writes the descriptor into a message.
    pub fn write(&self, mut to: guest_capnp::guest_descriptor::Builder<'_>) {
        to.set_cpus(self.cpus);
        to.set_memory_mib(self.memory_mib);
        to.set_kernel(&self.kernel);
        to.set_cmdline(&self.cmdline);
        let mut list = to.init_devices(length(self.devices.len()));
        for (i, device) in self.devices.iter().enumerate() {
            list.set(length(i), device);
        }
    }

    /// Reads the descriptor out of a message.
    pub fn read(from: guest_capnp::guest_descriptor::Reader<'_>) -> Result<Self, capnp::Error> {
        Ok(Self {
            cpus: from.get_cpus(),
            memory_mib: from.get_memory_mib(),
            kernel: from.get_kernel()?.to_string()?,
            cmdline: from.get_cmdline()?.to_string()?,
            devices: texts(from.get_devices()?)?,
        })
    }
}

/// Writes the layers of a jail into a message.
pub fn write_layers(layers: &[LayerInfo], mut to: capnp::struct_list::Builder<'_, guest_capnp::layer_info::Owned>) {
    for (i, layer) in layers.iter().enumerate() {
        let mut to = to.reborrow().get(length(i));
        to.set_name(&layer.name);
        to.set_state(layer.state);
        to.set_detail(&layer.detail);
    }
}

/// Most layers of a jail that are taken in; there are 15.
pub const MAX_LAYERS: usize = 32;

/// Reads the layers of a jail out of a message, at most [`MAX_LAYERS`]: a component tells its own, and may be hostile. A state that this
/// version does not know reads as waived: it is not known to hold.
pub fn read_layers(
    from: capnp::struct_list::Reader<'_, guest_capnp::layer_info::Owned>,
) -> Result<Vec<LayerInfo>, capnp::Error> {
    from.iter()
        .take(MAX_LAYERS)
        .map(|layer| {
            Ok(LayerInfo {
                name: cut(layer.get_name()?.to_str()?).to_owned(),
                state: layer.get_state().unwrap_or(LayerState::Waived),
                detail: cut(layer.get_detail()?.to_str()?).to_owned(),
            })
        })
        .collect()
}

/// The status as it is written on command lines and in JSON.
pub fn status_name(status: GuestStatus) -> &'static str {
    match status {
        GuestStatus::NotStarted => "not-started",
        GuestStatus::Starting => "starting",
        GuestStatus::Running => "running",
        GuestStatus::Stopping => "stopping",
        GuestStatus::Stopped => "stopped",
        GuestStatus::VmmUnexpectedTermination => "vmm-terminated",
        GuestStatus::CrashLoop => "crash-loop",
    }
}

fn texts(list: capnp::text_list::Reader<'_>) -> Result<Vec<String>, capnp::Error> {
    list.iter().map(|text| Ok(text?.to_string()?)).collect()
}

/// Lists here are bounded far below 2^32 entries by whoever fills them.
fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::RestartPolicy,
        report::{Reason, Rung},
    };

    #[test]
    fn a_jail_of_countless_layers_is_cut() {
        let mut message = capnp::message::Builder::new_default();
        let info = message.init_root::<guest_capnp::guest_info::Builder<'_>>();
        let mut layers = info.init_layers(100);
        layers
            .reborrow()
            .get(0)
            .set_detail("x".repeat(crate::error::MAX_MESSAGE + 1));
        let layers = read_layers(layers.into_reader()).unwrap();
        assert_eq!(layers.len(), MAX_LAYERS);
        assert_eq!(layers[0].detail.len(), crate::error::MAX_MESSAGE);
    }

    #[test]
    fn information_survives_the_wire() {
        let info = GuestInfo {
            name: "web".into(),
            status: GuestStatus::Stopped,
            generation: 2,
            uptime_ns: 3,
            descriptor: Some(GuestDescriptor {
                cpus: 2,
                memory_mib: 128,
                kernel: "embedded".into(),
                cmdline: "quiet".into(),
                devices: vec!["serial".into(), "rtc".into()],
            }),
            stop: Some(StopReport {
                reason: Reason::Reset,
                detail: "triple fault".into(),
                error: None,
                uptime_ns: 1,
                time_ns: 2,
                about: String::new(),
                rung: Rung::None,
                component: None,
            }),
            problems: vec!["a layer of the jail is waived".into()],
            layers: vec![LayerInfo {
                name: "seccomp".into(),
                state: LayerState::Holds,
                detail: "".into(),
            }],
            component_pid: 7,
            paused: true,
            detached: true,
            upkeep: Upkeep {
                uuid: Some(Uuid::from_bytes([7; 16])),
                defined: true,
                autostart: true,
                durable: true,
                restarts: 3,
                failures: 2,
                lease_ends_ms: 1,
                restart: Restart {
                    policy: RestartPolicy::Always,
                    attempts: 3,
                    ..Restart::default()
                },
            },
        };
        let bare = GuestInfo {
            upkeep: Upkeep::default(),
            descriptor: None,
            stop: None,
            problems: vec![],
            layers: vec![],
            ..info.clone()
        };
        for info in [info, bare] {
            let mut message = capnp::message::Builder::new_default();
            info.write(message.init_root());
            assert_eq!(GuestInfo::read(message.get_root_as_reader().unwrap()).unwrap(), info);
        }
    }
}
