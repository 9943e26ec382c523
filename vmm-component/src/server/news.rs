//! What devices report, made fit for whoever listens: in the protocol's words, and no more than one event of a kind a second for each device,
//! however often a guest provokes it.
//!
//! ```text
//!   report --> [quiet] --told at once--> [pacing] --report--> kept, the latest counts
//!                 ^                          |
//!                 '-- nothing was kept ------'-- after a second: what was kept is told, if anything was
//! ```

use std::{
    collections::{HashMap, hash_map::Entry},
    mem::{Discriminant, discriminant},
};

use sepal_devices::dispatch::DeviceEvent;
use sepal_schema::news::{DeviceNews, Panic};

/// Bytes of a balloon's page.
const PAGE: u64 = 4096;

/// A device's event in the protocol's words; none for one that only concerns the component.
pub(super) fn translate(event: DeviceEvent) -> Option<DeviceNews> {
    let pages = |bytes: u64| u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
    Some(match event {
        DeviceEvent::Failed { device, reason } => DeviceNews::Failed { device, reason },
        DeviceEvent::NeedsReset { device, reason } => DeviceNews::NeedsReset { device, reason },
        DeviceEvent::Recovered { device } => DeviceNews::Recovered { device },
        DeviceEvent::IoError {
            device,
            operation,
            reason,
            no_space,
        } => DeviceNews::IoError {
            device,
            operation: operation.to_owned(),
            message: reason,
            count: 1,
            no_space,
        },
        DeviceEvent::BalloonChanged { actual, requested, .. } => DeviceNews::Balloon {
            current_pages: pages(actual),
            requested_pages: pages(requested),
        },
        DeviceEvent::MemoryChanged { plugged, requested, .. } => DeviceNews::Memory { plugged, requested },
        DeviceEvent::BackendLost { device, reason } => DeviceNews::BackendLost { device, reason },
        DeviceEvent::BackendRestored { device } => DeviceNews::BackendRestored { device },
        DeviceEvent::GuestPanicked { crash_loaded, .. } => DeviceNews::GuestPanicked(match crash_loaded {
            true => Panic::CrashLoaded,
            false => Panic::Panicked,
        }),
        // Who knows the configuration says what is done about it.
        DeviceEvent::WatchdogExpired { .. } => DeviceNews::WatchdogExpired { action: String::new() },
        // The end of a console's socket, which the guest manager knows better, and what later devices report.
        _ => return None,
    })
}

/// What is paced on its own: a kind of news about a device, and for errors an operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Topic {
    kind: Discriminant<DeviceNews>,
    device: String,
    operation: String,
}

impl Topic {
    fn of(news: &DeviceNews) -> Self {
        let (device, operation) = match news {
            DeviceNews::Failed { device, .. }
            | DeviceNews::NeedsReset { device, .. }
            | DeviceNews::Recovered { device }
            | DeviceNews::BackendLost { device, .. }
            | DeviceNews::BackendRestored { device } => (device.as_str(), ""),
            DeviceNews::IoError { device, operation, .. } => (device.as_str(), operation.as_str()),
            DeviceNews::Balloon { .. }
            | DeviceNews::Memory { .. }
            | DeviceNews::GuestPanicked(_)
            | DeviceNews::WatchdogExpired { .. }
            | DeviceNews::GuestReady => ("", ""),
        };
        Self {
            kind: discriminant(news),
            device: device.to_owned(),
            operation: operation.to_owned(),
        }
    }
}

/// Decides what is told when. Topics are bounded by the guest's devices.
#[derive(Debug, Default)]
pub(super) struct Pacer(HashMap<Topic, Option<DeviceNews>>);

impl Pacer {
    /// Something happened. If it is to be told at once, it is returned with its topic, for which [`due`](Self::due) is to be asked a second later.
    pub(super) fn report(&mut self, news: DeviceNews) -> Option<(Topic, DeviceNews)> {
        match self.0.entry(Topic::of(&news)) {
            Entry::Vacant(quiet) => {
                let topic = quiet.key().clone();
                quiet.insert(None);
                Some((topic, news))
            }
            Entry::Occupied(mut pacing) => {
                let kept = pacing.get_mut();
                *kept = Some(merge(kept.take(), news));
                None
            }
        }
    }

    /// A second has passed since something was told. What was kept meanwhile is returned, to be told now and asked after again; none: the topic
    /// is quiet.
    pub(super) fn due(&mut self, topic: &Topic) -> Option<DeviceNews> {
        match self.0.get_mut(topic)?.take() {
            Some(news) => Some(news),
            None => {
                self.0.remove(topic);
                None
            }
        }
    }
}

/// Two of a topic as one: the later, counted with the earlier.
fn merge(earlier: Option<DeviceNews>, later: DeviceNews) -> DeviceNews {
    let before = match earlier {
        Some(DeviceNews::IoError { count, .. }) => count,
        _ => 0,
    };
    match later {
        DeviceNews::IoError {
            device,
            operation,
            message,
            count,
            no_space,
        } => DeviceNews::IoError {
            device,
            operation,
            message,
            count: count.saturating_add(before),
            no_space,
        },
        later => later,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn io_error(device: usize, operation: &str) -> DeviceNews {
        DeviceNews::IoError {
            device: format!("disk{device}"),
            operation: operation.into(),
            message: "Input/output error".into(),
            count: 1,
            no_space: false,
        }
    }

    fn count(news: &DeviceNews) -> u64 {
        match news {
            DeviceNews::IoError { count, .. } => *count,
            _ => 0,
        }
    }

    #[test]
    fn the_first_is_told_at_once_and_the_others_together() {
        let mut pacer = Pacer::default();
        let (topic, first) = pacer.report(io_error(0, "read")).unwrap();
        assert_eq!(count(&first), 1);
        for _ in 0..3 {
            assert!(pacer.report(io_error(0, "read")).is_none());
        }
        assert!(pacer.report(io_error(0, "write")).is_some() && pacer.report(io_error(1, "read")).is_some());
        assert_eq!(count(&pacer.due(&topic).unwrap()), 3);
        assert_eq!(pacer.due(&topic), None);
        assert!(pacer.report(io_error(0, "read")).is_some());
    }

    #[test]
    fn the_latest_state_is_what_is_told() {
        let mut pacer = Pacer::default();
        let size = |pages| DeviceNews::Balloon {
            current_pages: pages,
            requested_pages: 9,
        };
        let (topic, _) = pacer.report(size(1)).unwrap();
        assert!(pacer.report(size(2)).is_none() && pacer.report(size(3)).is_none());
        assert_eq!(pacer.due(&topic), Some(size(3)));
    }

    proptest! {
        #[test]
        fn no_error_is_lost_or_counted_twice(steps in proptest::collection::vec((0usize..3, any::<bool>()), 0..200)) {
            let (mut pacer, mut topics, mut reported, mut told) = (Pacer::default(), HashMap::new(), 0, 0);
            for (device, tick) in steps {
                if tick {
                    if let Some(topic) = topics.get(&device) {
                        match pacer.due(topic) {
                            Some(news) => told += count(&news),
                            None => drop(topics.remove(&device)),
                        }
                    }
                    continue;
                }
                reported += 1;
                if let Some((topic, news)) = pacer.report(io_error(device, "read")) {
                    told += count(&news);
                    prop_assert!(topics.insert(device, topic).is_none(), "told twice within a second");
                }
            }
            for topic in topics.values() {
                told += pacer.due(topic).map_or(0, |news| count(&news));
                prop_assert_eq!(pacer.due(topic), None);
            }
            prop_assert_eq!(told, reported);
        }
    }
}
