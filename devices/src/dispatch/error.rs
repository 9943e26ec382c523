//! Why a dispatch loop did not start, and why it did not end well.

/// Why a loop did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The host gave no thread, epoll or eventfd.
    #[error("{device}: no resources for its dispatch loop: {reason}")]
    Resources {
        /// The device's name.
        device: String,
        /// What the host said.
        reason: String,
    },
    /// The thread could not be set up (its system-call filter).
    #[error("{device}: its thread could not be set up: {reason}")]
    Setup {
        /// The device's name.
        device: String,
        /// What the setup said.
        reason: String,
    },
    /// The device refused to start.
    #[error("{device}: did not start: {reason}")]
    Device {
        /// The device's name.
        device: String,
        /// What the device said.
        reason: String,
    },
    /// The setup or the device panicked.
    #[error("{device}: panicked while it started: {reason}")]
    Panicked {
        /// The device's name.
        device: String,
        /// The panic's message.
        reason: String,
    },
}

impl StartError {
    /// What was said, without the device's name.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Resources { reason, .. }
            | Self::Setup { reason, .. }
            | Self::Device { reason, .. }
            | Self::Panicked { reason, .. } => reason,
        }
    }
}

/// Why a loop did not end well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// The device had failed before (it was reported then), failed while it stopped, or did not start and nobody waited for that.
    #[error("{device}: failed: {reason}")]
    Failed {
        /// The device's name.
        device: String,
        /// What happened.
        reason: String,
    },
    /// The loop did not end in time. Its thread goes on by itself; only the end of the process ends it.
    #[error("{device}: does not stop")]
    Hung {
        /// The device's name.
        device: String,
    },
}
