//! What happens to the devices of a guest, as Rust values: a part of the events.

use crate::{
    error::cut,
    guest_capnp::event::{self, Which},
};

pub use event::Panic;

/// What happened to a device of a guest, or is told through one; the fields are documented in `guest.capnp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceNews {
    /// It broke and was quarantined.
    Failed {
        /// Its name.
        device: String,
        /// What it did.
        reason: String,
    },
    /// The driver broke a rule: it rests until the driver resets it.
    NeedsReset {
        /// Its name.
        device: String,
        /// Which rule.
        reason: String,
    },
    /// The driver has reset it, and it works again.
    Recovered {
        /// Its name.
        device: String,
    },
    /// The host failed a request of the guest.
    IoError {
        /// Its name.
        device: String,
        /// What was to be done.
        operation: String,
        /// What the host said.
        message: String,
        /// How many errors this stands for.
        count: u64,
        /// The host's file system is full.
        no_space: bool,
    },
    /// The balloon is changed.
    Balloon {
        /// Pages of 4096 bytes that the guest has given.
        current_pages: u32,
        /// Pages that it is asked to give.
        requested_pages: u32,
    },
    /// Memory was plugged, unplugged or requested.
    Memory {
        /// Bytes plugged.
        plugged: u64,
        /// Bytes that are to be plugged.
        requested: u64,
    },
    /// The process behind it has gone.
    BackendLost {
        /// Its name.
        device: String,
        /// How that was noticed.
        reason: String,
    },
    /// There is a process behind it again.
    BackendRestored {
        /// Its name.
        device: String,
    },
    /// The guest's kernel has panicked.
    GuestPanicked(Panic),
    /// The guest did not keep its watchdog from expiring.
    WatchdogExpired {
        /// What is done about it.
        action: String,
    },
    /// The agent in the guest has answered for the first time in this run.
    GuestReady,
}

impl DeviceNews {
    /// Whether somebody may have to do something about it.
    pub fn is_trouble(&self) -> bool {
        match self {
            Self::Recovered { .. }
            | Self::Balloon { .. }
            | Self::Memory { .. }
            | Self::BackendRestored { .. }
            | Self::GuestReady => false,
            Self::Failed { .. }
            | Self::NeedsReset { .. }
            | Self::IoError { .. }
            | Self::BackendLost { .. }
            | Self::GuestPanicked(_)
            | Self::WatchdogExpired { .. } => true,
        }
    }

    /// Writes the news into an event.
    pub fn write(&self, mut to: event::Builder<'_>) {
        match self {
            Self::Failed { device, reason } => {
                let mut to = to.init_device_failed();
                to.set_device(cut(device));
                to.set_reason(cut(reason));
            }
            Self::NeedsReset { device, reason } => {
                let mut to = to.init_device_needs_reset();
                to.set_device(cut(device));
                to.set_reason(cut(reason));
            }
            Self::Recovered { device } => to.set_device_recovered(cut(device)),
            Self::IoError {
                device,
                operation,
                message,
                count,
                no_space,
            } => {
                let mut to = to.init_io_error();
                to.set_device(cut(device));
                to.set_operation(cut(operation));
                to.set_message(cut(message));
                to.set_count(*count);
                to.set_no_space(*no_space);
            }
            Self::Balloon {
                current_pages,
                requested_pages,
            } => {
                let mut to = to.init_balloon_changed();
                to.set_current_pages(*current_pages);
                to.set_requested_pages(*requested_pages);
            }
            Self::Memory { plugged, requested } => {
                let mut to = to.init_memory_changed();
                to.set_plugged_bytes(*plugged);
                to.set_requested_bytes(*requested);
            }
            Self::BackendLost { device, reason } => {
                let mut to = to.init_backend_lost();
                to.set_device(cut(device));
                to.set_reason(cut(reason));
            }
            Self::BackendRestored { device } => to.set_backend_restored(cut(device)),
            Self::GuestPanicked(how) => to.set_guest_panicked(*how),
            Self::WatchdogExpired { action } => to.set_watchdog_expired(cut(action)),
            Self::GuestReady => to.set_guest_ready(()),
        }
    }

    /// Reads the news out of an event; none if it is about something else. A way to panic that this version does not know reads as the plain
    /// one.
    ///
    /// # Errors
    /// The message is not well-formed.
    pub fn read(from: event::Reader<'_>) -> Result<Option<Self>, capnp::Error> {
        let text = |from: Result<capnp::text::Reader<'_>, capnp::Error>| {
            Ok::<_, capnp::Error>(cut(from?.to_str()?).to_owned())
        };
        let Ok(which) = from.which() else { return Ok(None) };
        Ok(Some(match which {
            Which::DeviceFailed(from) => Self::Failed {
                device: text(from.get_device())?,
                reason: text(from.get_reason())?,
            },
            Which::DeviceNeedsReset(from) => Self::NeedsReset {
                device: text(from.get_device())?,
                reason: text(from.get_reason())?,
            },
            Which::DeviceRecovered(device) => Self::Recovered { device: text(device)? },
            Which::IoError(from) => Self::IoError {
                device: text(from.get_device())?,
                operation: text(from.get_operation())?,
                message: text(from.get_message())?,
                count: from.get_count(),
                no_space: from.get_no_space(),
            },
            Which::BalloonChanged(from) => Self::Balloon {
                current_pages: from.get_current_pages(),
                requested_pages: from.get_requested_pages(),
            },
            Which::MemoryChanged(from) => Self::Memory {
                plugged: from.get_plugged_bytes(),
                requested: from.get_requested_bytes(),
            },
            Which::BackendLost(from) => Self::BackendLost {
                device: text(from.get_device())?,
                reason: text(from.get_reason())?,
            },
            Which::BackendRestored(device) => Self::BackendRestored { device: text(device)? },
            Which::GuestPanicked(how) => Self::GuestPanicked(how.unwrap_or(Panic::Panicked)),
            Which::WatchdogExpired(action) => Self::WatchdogExpired { action: text(action)? },
            Which::GuestReady(()) => Self::GuestReady,
            Which::Restarting(_)
            | Which::Crashed(_)
            | Which::Defined(())
            | Which::Starting(())
            | Which::Started(())
            | Which::Paused(())
            | Which::Resumed(())
            | Which::ShuttingDown(())
            | Which::Stopped(_)
            | Which::Removed(()) => return Ok(None),
        }))
    }

    /// The texts of it, to be made fit for whoever shows them.
    pub fn map_texts(mut self, mut change: impl FnMut(&mut String)) -> Self {
        match &mut self {
            Self::Failed { device, reason }
            | Self::NeedsReset { device, reason }
            | Self::BackendLost { device, reason } => {
                change(device);
                change(reason);
            }
            Self::Recovered { device } | Self::BackendRestored { device } => change(device),
            Self::IoError {
                device,
                operation,
                message,
                ..
            } => {
                change(device);
                change(operation);
                change(message);
            }
            Self::WatchdogExpired { action } => change(action),
            Self::Balloon { .. } | Self::Memory { .. } | Self::GuestPanicked(_) | Self::GuestReady => {}
        }
        self
    }
}

/// One of each kind, for tests that go through all.
#[doc(hidden)]
pub fn examples() -> Vec<DeviceNews> {
    let device = || "disk0".to_owned();
    let reason = || "a descriptor loop".to_owned();
    vec![
        DeviceNews::Failed {
            device: device(),
            reason: reason(),
        },
        DeviceNews::NeedsReset {
            device: device(),
            reason: reason(),
        },
        DeviceNews::Recovered { device: device() },
        DeviceNews::IoError {
            device: device(),
            operation: "read".into(),
            message: "Input/output error".into(),
            count: 3,
            no_space: true,
        },
        DeviceNews::Balloon {
            current_pages: 1,
            requested_pages: 2,
        },
        DeviceNews::Memory {
            plugged: 1 << 21,
            requested: 1 << 22,
        },
        DeviceNews::BackendLost {
            device: device(),
            reason: reason(),
        },
        DeviceNews::BackendRestored { device: device() },
        DeviceNews::GuestPanicked(Panic::CrashLoaded),
        DeviceNews::WatchdogExpired { action: "reset".into() },
        DeviceNews::GuestReady,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_survive_the_wire() {
        for news in examples() {
            let mut message = capnp::message::Builder::new_default();
            news.write(message.init_root());
            let read = DeviceNews::read(message.get_root_as_reader().unwrap()).unwrap();
            assert_eq!(read, Some(news));
        }
    }

    #[test]
    fn other_events_are_no_news_of_devices() {
        let mut message = capnp::message::Builder::new_default();
        message.init_root::<event::Builder<'_>>().set_paused(());
        assert_eq!(DeviceNews::read(message.get_root_as_reader().unwrap()).unwrap(), None);
    }

    #[test]
    fn all_texts_are_changed() {
        for news in examples() {
            let changed = news.clone().map_texts(|text| text.clear());
            let words = format!("{changed:?}");
            assert!(
                !words.contains("disk0") && !words.contains("loop") && !words.contains("error\""),
                "{words}"
            );
        }
    }
}
