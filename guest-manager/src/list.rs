//! Makes the answer to `list` fit into one message, also with many guests: what nobody reads in a list goes first. Reads them page by page, and bounds how much
//! is kept for those who do.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use capnp::message::{AllocationStrategy, Builder, HeapAllocator};
use sepal_schema::{
    error::{Error, Kind},
    info::GuestInfo,
};

/// Room for the answer, in bytes: a message has at most 128 KiB, and needs some for itself.
const ROOM: usize = 120 * 1024;
/// Sentences are cut to this length, in bytes, where there are many guests.
const SHORT: usize = 40;
/// Most guests in all listings of a user who is not an admin: 24 listings where there are as many guests as there can be.
const MAX_OF_USER: usize = 32 << 10;
/// Most guests in all listings of all such users.
const MAX_OF_OTHERS: usize = 64 << 10;

/// Leaves out as little as possible: first the layers of the jails, then command lines and devices, then the problems and what explains
/// the ends, then what the guests are made of, and how they ended.
///
/// # Errors
/// `NO_RESOURCES`: even so they do not fit.
pub(crate) fn fit(mut infos: Vec<GuestInfo>) -> Result<Vec<GuestInfo>, Error> {
    let steps: [fn(&mut GuestInfo); 5] = [
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
        |info| info.descriptor = None,
        |info| info.stop = None,
    ];
    for step in steps {
        if room_for(&infos) {
            return Ok(infos);
        }
        infos.iter_mut().for_each(step);
    }
    if room_for(&infos) {
        return Ok(infos);
    }
    let message = format!(
        "there are {} guests, more than fit into a list: browse them",
        infos.len()
    );
    Err(Error::new(Kind::NoResources, message))
}

fn room_for(infos: &[GuestInfo]) -> bool {
    infos.iter().map(size).sum::<usize>() <= ROOM
}

/// The next ones of `infos`, at most `most` (0: any number), that fit into one message. What does not even fit alone is told as [`fit`] does.
pub(crate) fn page(infos: &mut std::vec::IntoIter<GuestInfo>, most: u32) -> Vec<GuestInfo> {
    let most = match usize::try_from(most) {
        Ok(0) | Err(_) => usize::MAX,
        Ok(most) => most,
    };
    let (mut room, mut count) = (ROOM, 0);
    for info in infos.as_slice().iter().take(most) {
        match room.checked_sub(size(info)) {
            Some(left) => room = left,
            None => break,
        }
        count += 1;
    }
    if count == 0 {
        return infos.next().and_then(|info| fit(vec![info]).ok()).unwrap_or_default();
    }
    infos.take(count).collect()
}

/// How many guests are kept for users who are no admins, in listings that are read page by page.
#[derive(Debug, Default)]
pub(crate) struct Listings(RefCell<BTreeMap<u32, usize>>);

/// Room for a listing, until it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    listings: Rc<Listings>,
    uid: u32,
    count: usize,
}

impl Listings {
    /// Room for a listing of so many guests, for a user who is no admin.
    ///
    /// # Errors
    /// `NO_RESOURCES`: too many are held.
    pub(crate) fn hold(self: &Rc<Self>, uid: u32, count: usize) -> Result<Held, Error> {
        let mut held = self.0.borrow_mut();
        let (own, all) = (held.get(&uid).copied().unwrap_or(0), held.values().sum::<usize>());
        let whose = match (own + count > MAX_OF_USER, all + count > MAX_OF_OTHERS) {
            (false, false) => {
                held.insert(uid, own + count);
                let listings = self.clone();
                return Ok(Held { listings, uid, count });
            }
            (true, _) => "this user's listings",
            (false, true) => "the listings of all users who are no admins",
        };
        let message = format!("there are too many guests in {whose}; listings that are let go of make room");
        Err(Error::new(Kind::NoResources, message))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.listings.0.borrow_mut();
        let left = held.remove(&self.uid).unwrap_or(0).saturating_sub(self.count);
        if left > 0 {
            held.insert(self.uid, left);
        }
    }
}

fn shorten(text: &mut String) {
    text.truncate(text.floor_char_boundary(SHORT));
}

/// Bytes that a guest's information takes in a message at most.
fn size(info: &GuestInfo) -> usize {
    // How an answer falls into segments is not known: each pointer from one into another takes a word more there. Here all of them do.
    let allocator = HeapAllocator::new()
        .first_segment_words(1)
        .allocation_strategy(AllocationStrategy::FixedSize);
    let mut message = Builder::new(allocator);
    info.write(message.init_root());
    message.size_in_words() * 8
}

#[cfg(test)]
mod tests {
    use sepal_schema::{
        error::{Error, Kind},
        info::{GuestDescriptor, GuestStatus, LayerInfo, LayerState, Upkeep},
        manager_capnp::guest_manager::listing,
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
            upkeep: Upkeep {
                uuid: Some(sepal_schema::config::Uuid::from_bytes([7; 16])),
                ..Upkeep::default()
            },
        }
    }

    #[test]
    fn a_few_guests_are_told_completely() {
        let infos = vec![info(40); 20];
        assert_eq!(fit(infos.clone()).unwrap(), infos);
    }

    #[test]
    fn the_most_guests_with_the_longest_texts_fit() {
        let infos = fit(vec![info(2048); MAX_GUESTS + MAX_REMEMBERED]).unwrap();
        assert_eq!(infos.len(), MAX_GUESTS + MAX_REMEMBERED);
        assert!(infos.iter().map(size).sum::<usize>() <= ROOM);
        assert!(
            infos
                .iter()
                .all(|info| info.stop.as_ref().unwrap().reason == Reason::Crash)
        );
    }

    #[test]
    fn more_than_fit_are_told_page_by_page() {
        let mut all: Vec<_> = (0..1500)
            .map(|i| GuestInfo {
                name: format!("guest-{i}"),
                ..info(200)
            })
            .collect();
        all[700] = GuestInfo {
            name: "guest-700".into(),
            problems: vec!["x".repeat(ROOM); 8],
            ..info(40)
        };
        assert_eq!(fit(all.clone()).unwrap_err().kind, Kind::NoResources);
        let (mut infos, mut names) = (all.into_iter(), Vec::new());
        for most in [7, 1].into_iter().chain(std::iter::repeat(0)) {
            let page = page(&mut infos, most);
            assert!(!page.is_empty() && room_for(&page));
            assert!(most == 0 || page.len() <= most as usize);
            names.extend(page.into_iter().map(|info| info.name));
            if infos.as_slice().is_empty() {
                break;
            }
        }
        assert!(names.iter().enumerate().all(|(i, name)| *name == format!("guest-{i}")));
        assert_eq!(names.len(), 1500);
    }

    #[test]
    fn pages_are_messages_that_can_be_sent() {
        // As definitions are, which are the smallest, and from there to what runs.
        for (texts, layers) in [(0, 0), (8, 0), (8, 3), (40, 15), (200, 15)] {
            let one = GuestInfo {
                stop: None,
                problems: Vec::new(),
                layers: info(texts).layers[..layers].to_vec(),
                ..info(texts)
            };
            let all = vec![one; 2000];
            let listed = fit(all.clone()).unwrap_or_default();
            let mut infos = all.into_iter();
            let mut messages = vec![listed];
            while !infos.as_slice().is_empty() {
                messages.push(page(&mut infos, 0));
            }
            for infos in messages {
                // As the answer to a call is made.
                let mut message = Builder::new_default();
                let results = message.init_root::<listing::next_results::Builder<'_>>();
                let mut to = results.init_guests(u32::try_from(infos.len()).unwrap());
                for (i, info) in (0..).zip(&infos) {
                    info.write(to.reborrow().get(i));
                }
                let bytes = message.size_in_words() * 8;
                assert!(bytes <= 126 * 1024, "{} guests take {bytes} bytes", infos.len());
            }
        }
    }

    #[test]
    fn nobody_has_so_many_listings_that_others_suffer() {
        let listings = Rc::<Listings>::default();
        let refused = |uid| {
            let error = listings.hold(uid, 1024).unwrap_err();
            assert_eq!(error.kind, Kind::NoResources);
            error.message
        };
        let all_of = |uid| -> Vec<_> { (0..32).map(|_| listings.hold(uid, 1024).unwrap()).collect() };
        let (mut first, second) = (all_of(1000), all_of(1001));
        assert!(refused(1000).contains("this user's"), "{}", refused(1000));
        assert!(refused(1002).contains("all users"), "{}", refused(1002));
        first.pop();
        drop(listings.hold(1002, 1024).unwrap());
        first.push(listings.hold(1000, 1024).unwrap());
        drop((first, second));
        assert!(listings.0.borrow().is_empty());
    }

    #[test]
    fn layers_go_first() {
        let infos = fit(vec![info(40); 100]).unwrap();
        assert!(infos[0].layers.is_empty() && !infos[0].problems.is_empty());
    }
}
