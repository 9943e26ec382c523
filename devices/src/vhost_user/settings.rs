//! What a device in another process is to be, and what is known of its kind.

use crate::virtio::device::{ConfigLayout, DeviceKind};
use crate::virtio::queue::MAX_SIZE;

use super::message::CONFIG_MAX;

/// Most queues of a device: what fits with the others on one loop.
pub const QUEUES_MAX: usize = 64;
/// Bytes of a file system's tag (virtio 5.11.4).
const TAG_BYTES: usize = 36;

/// Where the configuration space comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// From here: the back end is never asked.
    Given(ConfigLayout),
    /// From the back end, if it can tell; else the device has none.
    BackEnd,
}

/// What a device in another process is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The device.
    pub kind: DeviceKind,
    /// The largest size of each of its queues, powers of two; 1 to [`QUEUES_MAX`] of them.
    pub queue_sizes: Vec<u16>,
    /// Its configuration space.
    pub config: ConfigSource,
}

/// Why settings make no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSettings {
    /// Too many queues, or none.
    #[error("{0} queues, 1 to {QUEUES_MAX} are possible")]
    Queues(usize),
    /// A queue's size is no power of two, or too large.
    #[error("a queue of {0} entries, powers of two up to {MAX_SIZE} are possible")]
    QueueSize(u16),
    /// More configuration than the protocol can carry.
    #[error("{0} bytes of configuration, {CONFIG_MAX} are possible")]
    Config(usize),
    /// A tag of no byte, of more than 36, or with a zero in it.
    #[error("a tag has 1 to {TAG_BYTES} bytes, and none of them is zero")]
    Tag,
}

impl Settings {
    /// Checks them.
    ///
    /// # Errors
    ///
    /// [`BadSettings`].
    pub fn check(&self) -> Result<(), BadSettings> {
        let queues = self.queue_sizes.len();
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(BadSettings::Queues(queues));
        }
        let wrong = |size: &&u16| !size.is_power_of_two() || **size > MAX_SIZE;
        if let Some(size) = self.queue_sizes.iter().find(wrong) {
            return Err(BadSettings::QueueSize(*size));
        }
        match &self.config {
            ConfigSource::Given(layout) if layout.bytes.len() > CONFIG_MAX => {
                Err(BadSettings::Config(layout.bytes.len()))
            }
            _ => Ok(()),
        }
    }
}

/// Configuration space of a file system (virtio 5.11.4): a tag of 1 to 36 bytes of UTF-8, which the guest mounts it by, and the number of its
/// request queues, which is one less than it has queues.
///
/// # Errors
///
/// [`BadSettings::Tag`].
pub fn fs_config(tag: &str, request_queues: u32) -> Result<ConfigLayout, BadSettings> {
    if !(1..=TAG_BYTES).contains(&tag.len()) || tag.contains('\0') {
        return Err(BadSettings::Tag);
    }
    let mut bytes = tag.as_bytes().to_vec();
    bytes.resize(TAG_BYTES, 0);
    bytes.extend(request_queues.to_le_bytes());
    Ok(ConfigLayout {
        bytes,
        writable: Vec::new(),
    })
}

/// The configuration space of a device of this kind as virtio 1.2 defines it: what a back end is asked for, since many refuse to tell more than
/// there is. Without bytes where the kind has none, or is not known.
pub(super) fn config_layout(kind: DeviceKind) -> ConfigLayout {
    let (len, writable) = match kind.id() {
        // Network: up to the supported hash types.
        1 => (24, None),
        // Block: up to the secure erase limits; the write cache can be switched.
        2 => (72, Some(32..33)),
        // Console.
        3 => (12, None),
        // SCSI host.
        8 => (36, Some(20..28)),
        // GPU: its events are cleared.
        16 => (16, Some(4..8)),
        // Vsock.
        19 => (8, None),
        // Crypto.
        20 => (56, None),
        // Sound.
        25 => (12, None),
        // File system: without notifications.
        26 => (TAG_BYTES + 4, None),
        // GPIO.
        41 => (8, None),
        _ => (0, None),
    };
    ConfigLayout {
        bytes: vec![0; len],
        writable: writable.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_has_its_tag_and_its_request_queues() {
        let layout = fs_config("share", 1).unwrap();
        assert_eq!(layout.bytes.len(), 40);
        assert_eq!(&layout.bytes[..6], b"share\0");
        assert_eq!(layout.bytes[36..], [1, 0, 0, 0]);
        assert_eq!(fs_config("", 1), Err(BadSettings::Tag));
        assert_eq!(fs_config("a\0b", 1), Err(BadSettings::Tag));
        assert_eq!(fs_config(&"x".repeat(37), 1), Err(BadSettings::Tag));
    }

    #[test]
    fn settings_that_make_no_device_are_refused() {
        let settings = |queue_sizes: Vec<u16>, bytes| Settings {
            kind: DeviceKind::Other(2),
            queue_sizes,
            config: ConfigSource::Given(ConfigLayout {
                bytes: vec![0; bytes],
                writable: Vec::new(),
            }),
        };
        assert_eq!(settings(vec![], 0).check(), Err(BadSettings::Queues(0)));
        assert_eq!(settings(vec![1; 65], 0).check(), Err(BadSettings::Queues(65)));
        assert_eq!(settings(vec![128, 100], 0).check(), Err(BadSettings::QueueSize(100)));
        assert_eq!(settings(vec![128], 257).check(), Err(BadSettings::Config(257)));
        assert_eq!(settings(vec![128; 64], 256).check(), Ok(()));
    }
}
