//! Typed errors: what a method answers when something that can be expected goes wrong.

use capnp::capability::FromClientHook;

use crate::{agent_capnp, error_capnp, facet_capnp, guest_capnp, lifecycle_capnp, manager_capnp, vsock_capnp};

/// What to match on; the values and their meanings are documented in `error.capnp`.
pub use error_capnp::error::Kind;

/// The longest message that is sent or taken in, in bytes; what is longer is cut at a character boundary.
pub const MAX_MESSAGE: usize = 4096;

/// An expected failure, as it travels: a kind, a sentence for a person, and what it is about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What to match on.
    pub kind: Kind,
    /// A sentence for a person.
    pub message: String,
    /// The field, file or device that it is about; empty where there is none.
    pub about: String,
}

impl Error {
    /// An error of `kind` that is about nothing in particular.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            about: String::new(),
        }
    }

    /// Names the field, file or device that the error is about.
    #[must_use]
    pub fn about(mut self, about: impl Into<String>) -> Self {
        self.about = about.into();
        self
    }

    /// A field of a request that cannot be used.
    pub fn bad_config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::BadConfig, message).about(field)
    }

    /// A field of a request that this version or host cannot honour.
    pub fn not_supported(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::NotSupported, message).about(field)
    }

    /// Writes the error into a message.
    pub fn write(&self, mut to: error_capnp::error::Builder<'_>) {
        to.set_kind(self.kind);
        to.set_message(cut(&self.message));
        to.set_about(cut(&self.about));
    }

    /// Reads an error out of a message. A kind that this version does not know reads as [`Kind::InternalError`], with the text kept.
    pub fn read(from: error_capnp::error::Reader<'_>) -> Result<Self, capnp::Error> {
        Ok(Self {
            kind: from.get_kind().unwrap_or(Kind::InternalError),
            message: cut(from.get_message()?.to_str()?).to_owned(),
            about: cut(from.get_about()?.to_str()?).to_owned(),
        })
    }

    /// The exception for where no typed error fits: its words begin with the kind.
    pub fn exception(&self) -> capnp::Error {
        capnp::Error::failed(format!("{}: {}", self.kind_name(), self.message))
    }

    /// A capability that there is not, for the reason of this error: every call to it fails with it.
    pub fn broken<C: FromClientHook>(&self) -> C {
        let exception = self.exception();
        capnp_rpc::new_future_client(async move { Err(exception) })
    }

    /// The kind as it is written in the documentation: `BAD_CONFIG`.
    pub fn kind_name(&self) -> &'static str {
        kind_name(self.kind)
    }
}

/// A broken connection, or a bug of the peer: an exception of the RPC system becomes an internal error.
impl From<capnp::Error> for Error {
    fn from(error: capnp::Error) -> Self {
        Self::new(Kind::InternalError, error.to_string())
    }
}

/// Writes the outcome of an operation that returns nothing.
pub fn write_completion(outcome: &Result<(), Error>, mut to: error_capnp::completion::Builder<'_>) {
    match outcome {
        Ok(()) => to.set_ok(()),
        Err(error) => error.write(to.init_error()),
    }
}

/// Reads the outcome of an operation that returns nothing.
pub fn read_completion(from: error_capnp::completion::Reader<'_>) -> Result<(), Error> {
    use error_capnp::completion::Which;
    match from.which().map_err(capnp::Error::from)? {
        Which::Ok(()) => Ok(()),
        Which::Error(error) => Err(Error::read(error?)?),
    }
}

/// A result that carries a capability beside its error.
pub trait Outcome: Sized {
    /// The result, if it worked.
    ///
    /// # Errors
    /// What the peer answered instead.
    fn outcome(self) -> Result<Self, Error>;
}

/// Answers a call with a capability, or with the error and a capability that is broken by it:
/// `answer!(results, set_console, outcome)`.
#[macro_export]
macro_rules! answer {
    ($results:ident, $set:ident, $outcome:expr) => {
        match $outcome {
            Ok(capability) => $results.get().$set(capability),
            Err(error) => {
                let error: $crate::error::Error = error;
                let mut to = $results.get();
                to.$set(error.broken());
                error.write(to.init_error());
            }
        }
    };
}

macro_rules! outcomes {
    ($($result:path),* $(,)?) => {$(
        impl Outcome for $result {
            fn outcome(self) -> Result<Self, Error> {
                match self.has_error() {
                    true => Err(Error::read(self.get_error()?)?),
                    false => Ok(self),
                }
            }
        }
    )*};
}

outcomes!(
    agent_capnp::agent::exec_result::Reader<'_>,
    agent_capnp::agent::sink_result::Reader<'_>,
    facet_capnp::facet::narrow_result::Reader<'_>,
    facet_capnp::facet::share_result::Reader<'_>,
    guest_capnp::guest::agent_result::Reader<'_>,
    guest_capnp::guest::balloon_controller_result::Reader<'_>,
    guest_capnp::guest::console_result::Reader<'_>,
    guest_capnp::guest::cpu_controller_result::Reader<'_>,
    guest_capnp::guest::disk_controller_result::Reader<'_>,
    guest_capnp::guest::host_vsock_endpoint_result::Reader<'_>,
    guest_capnp::guest::mem_controller_result::Reader<'_>,
    guest_capnp::guest::net_controller_result::Reader<'_>,
    guest_capnp::observer::configuration_result::Reader<'_>,
    guest_capnp::read_result::Reader<'_>,
    lifecycle_capnp::component::attach_result::Reader<'_>,
    manager_capnp::guest_manager::define_result::Reader<'_>,
    manager_capnp::guest_manager::definition_result::Reader<'_>,
    manager_capnp::guest_manager::launch_result::Reader<'_>,
    manager_capnp::guest_manager::lookup_result::Reader<'_>,
    manager_capnp::guest_manager::new_guest_result::Reader<'_>,
    manager_capnp::guest_manager::redeem_result::Reader<'_>,
    manager_capnp::guest_manager::upload_result::Reader<'_>,
    vsock_capnp::host_vsock_endpoint::byte_stream_result::Reader<'_>,
    vsock_capnp::host_vsock_endpoint::listen_result::Reader<'_>,
);

/// The kind as it is written in the documentation: `BAD_CONFIG`.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::InternalError => "INTERNAL_ERROR",
        Kind::DeviceNotPresent => "DEVICE_NOT_PRESENT",
        Kind::BadConfig => "BAD_CONFIG",
        Kind::GuestInitializationFailure => "GUEST_INITIALIZATION_FAILURE",
        Kind::DeviceInitializationFailure => "DEVICE_INITIALIZATION_FAILURE",
        Kind::DeviceStartFailure => "DEVICE_START_FAILURE",
        Kind::DeviceMemoryOverlap => "DEVICE_MEMORY_OVERLAP",
        Kind::FailedServiceConnect => "FAILED_SERVICE_CONNECT",
        Kind::DuplicatePublicServices => "DUPLICATE_PUBLIC_SERVICES",
        Kind::KernelLoadFailure => "KERNEL_LOAD_FAILURE",
        Kind::VcpuStartFailure => "VCPU_START_FAILURE",
        Kind::VcpuRuntimeFailure => "VCPU_RUNTIME_FAILURE",
        Kind::NotCreated => "NOT_CREATED",
        Kind::AlreadyRunning => "ALREADY_RUNNING",
        Kind::ControllerForcedHalt => "CONTROLLER_FORCED_HALT",
        Kind::NotRunning => "NOT_RUNNING",
        Kind::StartFailure => "START_FAILURE",
        Kind::NoStorage => "NO_STORAGE",
        Kind::NoResources => "NO_RESOURCES",
        Kind::ConnectionRefused => "CONNECTION_REFUSED",
        Kind::NotSupported => "NOT_SUPPORTED",
        Kind::PermissionDenied => "PERMISSION_DENIED",
        Kind::NotFound => "NOT_FOUND",
        Kind::TimedOut => "TIMED_OUT",
        Kind::Cancelled => "CANCELLED",
        Kind::VmmTerminated => "VMM_TERMINATED",
        Kind::AlreadyBound => "ALREADY_BOUND",
        Kind::Revoked => "REVOKED",
    }
}

/// As much of a text as is sent or taken in.
pub(crate) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_MESSAGE)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire() {
        let error = Error::bad_config("disks[2].id", "the id has 21 bytes, at most 20 are allowed");
        let mut message = capnp::message::Builder::new_default();
        error.write(message.init_root());
        assert_eq!(Error::read(message.get_root_as_reader().unwrap()).unwrap(), error);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let error = Error::new(Kind::InternalError, "é".repeat(MAX_MESSAGE));
        let mut message = capnp::message::Builder::new_default();
        error.write(message.init_root());
        let read = Error::read(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(read.message.len(), MAX_MESSAGE);
        assert!(error.message.starts_with(&read.message));
    }

    #[test]
    fn a_long_message_of_a_peer_is_cut_too() {
        let mut message = capnp::message::Builder::new_default();
        let mut error = message.init_root::<error_capnp::error::Builder<'_>>();
        error.set_message("é".repeat(MAX_MESSAGE));
        error.set_about("x".repeat(MAX_MESSAGE + 1));
        let read = Error::read(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!((read.message.len(), read.about.len()), (MAX_MESSAGE, MAX_MESSAGE));
    }

    #[test]
    fn a_completion_survives_the_wire() {
        for outcome in [Ok(()), Err(Error::new(Kind::NotCreated, "create comes first"))] {
            let mut message = capnp::message::Builder::new_default();
            write_completion(&outcome, message.init_root());
            assert_eq!(read_completion(message.get_root_as_reader().unwrap()), outcome);
        }
    }
}
