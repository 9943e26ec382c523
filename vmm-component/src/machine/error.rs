//! Why a machine could not be created, started or driven, in words for a person and as a kind for the protocol.

use std::io;
use std::time::Duration;

use sepal_schema::error::{Error, Kind};
use vmm_sys_util::errno;

use crate::acpi::AcpiError;
use crate::boot::{BootError, BootErrorClass};
use crate::memory::MemoryError;

/// What [`Machine`](super::Machine)'s methods fail with.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A field of the configuration is out of its range.
    #[error("{field}: {reason}")]
    BadConfig {
        /// The field of the guest's configuration, or the argument.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The cancel flag was seen while the machine was being created.
    #[error("creation was cancelled")]
    Cancelled,
    /// KVM refused a step of the machine's set-up.
    #[error("{step}: {source}")]
    Kvm {
        /// What was asked of KVM.
        step: &'static str,
        /// KVM's answer.
        source: errno::Error,
    },
    /// The host's KVM lacks something that the machine cannot do without.
    #[error("this host's KVM lacks {0}")]
    MissingCapability(&'static str),
    /// The guest's memory could not be set up.
    #[error(transparent)]
    Memory(MemoryError),
    /// The kernel, its command line or its initial file system could not be loaded.
    #[error(transparent)]
    Boot(BootError),
    /// The help that a guest needs on a host without hardware virtualization could not be set up.
    #[error("no hardware virtualization on this host: {0}")]
    Unassisted(String),
    /// The tables that describe the machine to its guest could not be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A device could not be made.
    #[error("device {device}: {reason}")]
    DeviceInit {
        /// The device's name.
        device: String,
        /// Why.
        reason: String,
    },
    /// A device's loop did not start.
    #[error("device {device} did not start: {reason}")]
    DeviceStart {
        /// The device's name.
        device: String,
        /// Why.
        reason: String,
    },
    /// A device's address range overlaps another's.
    #[error("device {device}: {reason}")]
    DeviceOverlap {
        /// The device's name.
        device: String,
        /// Which ranges meet.
        reason: String,
    },
    /// A vCPU could not be made, set up or given its thread.
    #[error("vCPU {vcpu} did not start: {reason}")]
    VcpuStart {
        /// The vCPU's index.
        vcpu: u8,
        /// Which step failed, and how.
        reason: String,
    },
    /// The machine was not started, or has ended.
    #[error("the machine does not run")]
    NotRunning,
    /// The machine was started before.
    #[error("the machine was started before")]
    AlreadyStarted,
    /// Too many register readings wait for this vCPU already.
    #[error("too many requests wait for vCPU {vcpu}")]
    Busy {
        /// The vCPU's index.
        vcpu: u8,
    },
    /// KVM does not show a vCPU's registers.
    #[error("the registers of vCPU {vcpu} cannot be read: {source}")]
    Registers {
        /// The vCPU's index.
        vcpu: u8,
        /// KVM's answer.
        source: errno::Error,
    },
    /// Some vCPUs did not leave the guest in time.
    #[error("vCPUs {vcpus:?} did not pause within {waited:?}")]
    PauseTimeout {
        /// Indices of the vCPUs that still ran.
        vcpus: Vec<u8>,
        /// How long they were waited for.
        waited: Duration,
    },
    /// The host ran out of something, or refused a system call that has nothing to do with KVM.
    #[error("{step}: {source}")]
    Host {
        /// What was asked of the host.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl MachineError {
    /// Wraps an error of a KVM call; for `map_err`.
    pub(super) fn kvm(step: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Kvm { step, source }
    }

    /// Wraps an error of any other system call; for `map_err`.
    pub(super) fn host(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { step, source }
    }

    /// The protocol's class of this failure.
    pub fn kind(&self) -> Kind {
        match self {
            Self::BadConfig { .. } => Kind::BadConfig,
            Self::Memory(error) if error.is_bad_config() => Kind::BadConfig,
            Self::Memory(_) => Kind::GuestInitializationFailure,
            Self::Cancelled => Kind::Cancelled,
            Self::Kvm { .. } | Self::MissingCapability(_) | Self::Acpi(_) | Self::Unassisted(_) => {
                Kind::GuestInitializationFailure
            }
            Self::Boot(error) => match error.class() {
                BootErrorClass::KernelLoad => Kind::KernelLoadFailure,
                BootErrorClass::BadConfig => Kind::BadConfig,
            },
            Self::DeviceInit { .. } => Kind::DeviceInitializationFailure,
            Self::DeviceStart { .. } => Kind::DeviceStartFailure,
            Self::DeviceOverlap { .. } => Kind::DeviceMemoryOverlap,
            Self::VcpuStart { .. } => Kind::VcpuStartFailure,
            Self::NotRunning => Kind::NotRunning,
            Self::AlreadyStarted => Kind::AlreadyRunning,
            Self::Busy { .. } => Kind::NoResources,
            Self::PauseTimeout { .. } => Kind::TimedOut,
            Self::Registers { .. } | Self::Host { .. } => Kind::InternalError,
        }
    }

    /// The error as it travels, naming the field or device that it is about.
    pub fn to_error(&self) -> Error {
        let error = Error::new(self.kind(), self.to_string());
        match self {
            Self::BadConfig { field, .. } => error.about(*field),
            Self::Memory(_) => error.about("memory"),
            Self::DeviceInit { device, .. } | Self::DeviceStart { device, .. } | Self::DeviceOverlap { device, .. } => {
                error.about(device.clone())
            }
            Self::Boot(boot) => error.about(boot.field()),
            Self::VcpuStart { vcpu, .. } | Self::Busy { vcpu } | Self::Registers { vcpu, .. } => {
                error.about(format!("vcpu{vcpu}"))
            }
            _ => error,
        }
    }
}

impl From<MemoryError> for MachineError {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Cancelled => Self::Cancelled,
            error => Self::Memory(error),
        }
    }
}

impl From<BootError> for MachineError {
    fn from(error: BootError) -> Self {
        match error {
            BootError::Cancelled => Self::Cancelled,
            error => Self::Boot(error),
        }
    }
}
