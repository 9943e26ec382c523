//! What devices tell their owner.

/// Something about a device that its owner wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceEvent {
    /// The device broke and is quarantined; the guest and the other devices go on.
    Failed {
        /// The device's name.
        device: String,
        /// What happened, for a person.
        reason: String,
    },
    /// The driver broke a rule: the device rests until the driver resets it. The guest and the other devices go on.
    NeedsReset {
        /// The device's name.
        device: String,
        /// Which rule.
        reason: String,
    },
    /// The driver reset a device that needed it, and the device works again.
    Recovered {
        /// The device's name.
        device: String,
    },
    /// The host failed a request of the device's; the guest was told, and the device goes on.
    IoError {
        /// The device's name.
        device: String,
        /// What was to be done: "read", "write", "flush", ...
        operation: &'static str,
        /// What the host said.
        reason: String,
        /// The host's file system is full.
        no_space: bool,
    },
    /// The guest holds this many bytes in its balloon now.
    BalloonChanged {
        /// The device's name.
        device: String,
        /// Bytes that the guest does without.
        actual: u64,
        /// Bytes that it is asked to do without.
        requested: u64,
    },
    /// This much memory is plugged into the guest now.
    MemoryChanged {
        /// The device's name.
        device: String,
        /// Bytes that are plugged.
        plugged: u64,
        /// Bytes that the guest is asked to have plugged.
        requested: u64,
    },
    /// The process behind the device went away; the device waits for another.
    BackendLost {
        /// The device's name.
        device: String,
        /// What happened.
        reason: String,
    },
    /// The device has a process behind it again.
    BackendRestored {
        /// The device's name.
        device: String,
    },
    /// The guest says that its kernel panicked.
    GuestPanicked {
        /// The device's name.
        device: String,
        /// It goes on to load a crash kernel.
        crash_loaded: bool,
    },
    /// The guest did not feed its watchdog in time.
    WatchdogExpired {
        /// The device's name.
        device: String,
    },
    /// The host end of the device's stream was closed; its output is discarded from now on.
    HostClosed {
        /// The device's name.
        device: String,
    },
}

/// Takes events of devices. Called on the device's own thread, or on a vCPU's when a bus access made the device panic: must not block.
pub trait DeviceReporter: Send + Sync {
    /// Notes `event`.
    fn report(&self, event: DeviceEvent);
}
