//! Makes the answer to `list` fit into one message, however many guests there are: with many of them, what nobody reads in a list goes first.

use capnp::message::{Builder, HeapAllocator};
use sepal_schema::info::GuestInfo;

/// Room for the answer, in bytes: a message has at most 128 KiB, and needs some for itself.
const ROOM: usize = 120 * 1024;
/// Words of 8 bytes that the information on a guest takes, as a rule.
const WORDS: u32 = 128;
/// Sentences are cut to this length, in bytes, where there are many guests.
const SHORT: usize = 40;

/// Leaves out as little as possible: first the layers of the jails, then command lines and devices, then the problems and what explains
/// the ends.
pub(crate) fn fit(mut infos: Vec<GuestInfo>) -> Vec<GuestInfo> {
    let steps: [fn(&mut GuestInfo); 3] = [
        |info| info.layers.clear(),
        |info| {
            if let Some(descriptor) = &mut info.descriptor {
                descriptor.cmdline.clear();
                descriptor.devices.clear();
                shorten(&mut descriptor.kernel);
            }
        },
        |info| {
            info.problems.clear();
            if let Some(stop) = &mut info.stop {
                stop.error = None;
                shorten(&mut stop.detail);
            }
        },
    ];
    for step in steps {
        if infos.iter().map(size).sum::<usize>() <= ROOM {
            break;
        }
        infos.iter_mut().for_each(step);
    }
    infos
}

fn shorten(text: &mut String) {
    text.truncate(text.floor_char_boundary(SHORT));
}

/// Bytes that a guest's information takes in a message.
fn size(info: &GuestInfo) -> usize {
    // Not the usual 8 KiB, all of which would be zeroed for each guest.
    let allocator = HeapAllocator::new().first_segment_words(WORDS);
    let mut message = Builder::new(allocator);
    info.write(message.init_root());
    message.size_in_words() * 8
}

#[cfg(test)]
mod tests {
    use sepal_schema::{
        error::{Error, Kind},
        info::{GuestDescriptor, GuestStatus, LayerInfo, LayerState, Upkeep},
        report::{Reason, StopReport},
    };

    use super::*;
    use crate::registry::{MAX_GUESTS, MAX_REMEMBERED};

    fn info(texts: usize) -> GuestInfo {
        let text = || "é".repeat(texts / 2);
        let error = Error::new(Kind::InternalError, text()).about(text());
        let layer = LayerInfo {
            name: "user-namespace".into(),
            state: LayerState::Holds,
            detail: text(),
        };
        GuestInfo {
            name: "n".repeat(64),
            status: GuestStatus::Running,
            generation: 1,
            uptime_ns: 1,
            descriptor: Some(GuestDescriptor {
                cpus: 1,
                memory_mib: 1,
                kernel: text(),
                cmdline: text(),
                devices: vec!["serial".into(); 8],
            }),
            stop: Some(StopReport {
                reason: Reason::Crash,
                detail: text(),
                error: Some(error),
                uptime_ns: 1,
                time_ns: 1,
                about: String::new(),
                rung: sepal_schema::report::Rung::None,
                component: None,
            }),
            problems: vec![text(); 8],
            layers: vec![layer; 15],
            component_pid: 1,
            paused: false,
            detached: false,
            upkeep: Upkeep::default(),
        }
    }

    #[test]
    fn a_few_guests_are_told_completely() {
        let infos = vec![info(40); 20];
        assert_eq!(fit(infos.clone()), infos);
    }

    #[test]
    fn the_most_guests_with_the_longest_texts_fit() {
        let infos = fit(vec![info(2048); MAX_GUESTS + MAX_REMEMBERED]);
        assert_eq!(infos.len(), MAX_GUESTS + MAX_REMEMBERED);
        assert!(infos.iter().map(size).sum::<usize>() <= ROOM);
        assert!(
            infos
                .iter()
                .all(|info| info.stop.as_ref().unwrap().reason == Reason::Crash)
        );
    }

    #[test]
    fn layers_go_first() {
        let infos = fit(vec![info(40); 100]);
        assert!(infos[0].layers.is_empty() && !infos[0].problems.is_empty());
    }
}
