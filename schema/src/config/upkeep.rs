//! How a guest is told apart and kept: its UUID, what follows when it ends, and where its vCPUs may run. The guest manager's to carry out; `config.capnp` tells
//! what each field means.
//!
//! Zeroes are kept as they came, so that a configuration can be handed on as it is; the methods resolve them.

use std::{collections::HashSet, time::Duration};

use uuid::Uuid;

use super::{GuestConfig, MAX_CPUS, decode::at_most, decode_devices::unknown, encode::length};
use crate::{
    config_capnp::guest_config::{self, restart},
    error::Error,
};

pub use restart::Policy as RestartPolicy;

/// Bytes of a UUID.
const UUID: usize = 16;
/// Most processors of the host that a vCPU is pinned to by name.
pub const MAX_PIN_CPUS: u32 = 1024;
/// How many failed runs in a row are followed by another, where the configuration does not say.
pub const DEFAULT_ATTEMPTS: u32 = 5;
/// The first wait of a row, where the configuration does not say.
pub const DEFAULT_DELAY: Duration = Duration::from_millis(100);
/// The longest wait, where the configuration does not say.
pub const DEFAULT_MAX_DELAY: Duration = Duration::from_secs(30);
/// How long a good run lasts, where the configuration does not say.
pub const DEFAULT_HEALTHY: Duration = Duration::from_secs(10);

/// What follows when a guest ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    /// After what it is begun again.
    pub policy: RestartPolicy,
    /// After how many failed runs in a row, 0 for the default.
    pub attempts: u32,
    /// Milliseconds before the first further run of a row, 0 for the default.
    pub delay_ms: u32,
    /// Milliseconds of the longest wait, 0 for the default.
    pub max_delay_ms: u32,
    /// Milliseconds after which a run is a good one, 0 for the default.
    pub healthy_ms: u32,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            policy: RestartPolicy::Never,
            attempts: 0,
            delay_ms: 0,
            max_delay_ms: 0,
            healthy_ms: 0,
        }
    }
}

/// Milliseconds, or `default` for 0.
fn resolved(milliseconds: u32, default: Duration) -> Duration {
    match milliseconds {
        0 => default,
        some => Duration::from_millis(some.into()),
    }
}

impl Restart {
    /// Reads it out of a message.
    ///
    /// # Errors
    /// `BAD_CONFIG` about `restart.policy` or `restart.maxDelayMs`.
    pub(crate) fn read(from: restart::Reader<'_>) -> Result<Self, Error> {
        let restart = Self {
            policy: from.get_policy().map_err(|_| unknown("restart.policy"))?,
            attempts: from.get_attempts(),
            delay_ms: from.get_delay_ms(),
            max_delay_ms: from.get_max_delay_ms(),
            healthy_ms: from.get_healthy_ms(),
        };
        if restart.max_delay_ms != 0 && Duration::from_millis(restart.max_delay_ms.into()) < restart.delay() {
            let message = format!(
                "restart.maxDelayMs is {}, less than the first delay of {} ms",
                restart.max_delay_ms,
                restart.delay().as_millis()
            );
            return Err(Error::bad_config("restart.maxDelayMs", message));
        }
        Ok(restart)
    }

    /// Writes it into a message.
    pub(crate) fn write(&self, mut to: restart::Builder<'_>) {
        to.set_policy(self.policy);
        to.set_attempts(self.attempts);
        to.set_delay_ms(self.delay_ms);
        to.set_max_delay_ms(self.max_delay_ms);
        to.set_healthy_ms(self.healthy_ms);
    }

    /// How many failed runs in a row are followed by another, with the default resolved.
    pub fn attempts(&self) -> u32 {
        if self.attempts == 0 {
            DEFAULT_ATTEMPTS
        } else {
            self.attempts
        }
    }

    /// The first wait of a row, with the default resolved.
    pub fn delay(&self) -> Duration {
        resolved(self.delay_ms, DEFAULT_DELAY)
    }

    /// The longest wait, with the default resolved: never less than the first.
    pub fn max_delay(&self) -> Duration {
        resolved(self.max_delay_ms, DEFAULT_MAX_DELAY).max(self.delay())
    }

    /// How long a run has to last to be a good one, with the default resolved.
    pub fn healthy(&self) -> Duration {
        resolved(self.healthy_ms, DEFAULT_HEALTHY)
    }
}

/// Where a vCPU may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// The vCPU.
    pub vcpu: u8,
    /// Processors of the host, ascending, each once: 1 to [`MAX_PIN_CPUS`].
    pub cpus: Vec<u16>,
}

/// Reads all of it; `to` has its number of vCPUs already.
pub(super) fn decode(config: guest_config::Reader<'_>, to: &mut GuestConfig) -> Result<(), Error> {
    to.uuid = uuid(config.get_uuid()?)?;
    to.restart = Restart::read(config.get_restart()?)?;
    to.durable = config.get_durable();
    to.pins = pins(config, to.cpus())?;
    Ok(())
}

fn uuid(from: &[u8]) -> Result<Option<Uuid>, Error> {
    if from.is_empty() {
        return Ok(None);
    }
    match <[u8; UUID]>::try_from(from).map(Uuid::from_bytes) {
        Err(_) => {
            let message = format!("the UUID has {} bytes; it needs {UUID}, or none", from.len());
            Err(Error::bad_config("uuid", message))
        }
        Ok(uuid) if uuid.is_nil() => Err(Error::bad_config("uuid", "the UUID is all zero, which stands for none")),
        Ok(uuid) => Ok(Some(uuid)),
    }
}

fn pins(config: guest_config::Reader<'_>, vcpus: u8) -> Result<Vec<Pin>, Error> {
    let list = config.get_pins()?;
    at_most("pins", list.len(), MAX_CPUS.into())?;
    let mut seen = HashSet::new();
    let mut pins = Vec::new();
    for (i, from) in list.iter().enumerate() {
        let (vcpu, listed) = (from.get_vcpu(), from.get_cpus()?);
        let field = format!("pins[{i}].vcpu");
        if vcpu >= vcpus {
            let message = format!("{field} is {vcpu}; the guest has {vcpus}, counted from 0");
            return Err(Error::bad_config(field, message));
        }
        if !seen.insert(vcpu) {
            return Err(Error::bad_config(
                &field,
                format!("{field} is {vcpu}, which is pinned before"),
            ));
        }
        let field = format!("pins[{i}].cpus");
        at_most(&field, listed.len(), MAX_PIN_CPUS)?;
        let mut cpus: Vec<u16> = listed.iter().collect();
        cpus.sort_unstable();
        cpus.dedup();
        if cpus.is_empty() {
            return Err(Error::bad_config(&field, format!("{field} names no processor")));
        }
        pins.push(Pin { vcpu, cpus });
    }
    Ok(pins)
}

/// Writes all of it.
pub(super) fn encode(config: &GuestConfig, mut to: guest_config::Builder<'_>) -> Result<(), Error> {
    if let Some(uuid) = config.uuid {
        to.set_uuid(uuid.as_bytes());
    }
    if config.restart != Restart::default() {
        config.restart.write(to.reborrow().init_restart());
    }
    to.set_durable(config.durable);
    if !config.pins.is_empty() {
        let mut pins = to.init_pins(length(config.pins.len()));
        for (i, pin) in config.pins.iter().enumerate() {
            let mut to = pins.reborrow().get(length(i));
            to.set_vcpu(pin.vcpu);
            to.set_cpus(&pin.cpus[..])?;
        }
    }
    Ok(())
}
