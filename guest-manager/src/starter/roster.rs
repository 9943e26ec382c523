//! Which guests a keeper holds, in a file beside its key: so that the next manager knows whose names are taken as long as the keeper does not answer.
//!
//! ```text
//!   ID GENERATION UUID CID NAME        a line each; ID is the component's with the keeper
//! ```
//!
//! Written in place, as what is kept with the keeper is (`durable::slots`), so that it is there as a whole whenever the manager is killed. It has to outlive
//! the manager, not the host: the keeper does not outlive that either.

use std::{cell::RefCell, collections::BTreeMap, fs::File, io, os::fd::OwnedFd, rc::Rc};

use sepal_schema::config::check_name;
use uuid::Uuid;

use crate::durable::{memory::Shared, slots::Slots};

/// What can be known of a guest that goes on without its manager also as long as its keeper does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its name.
    pub name: Rc<str>,
    /// Tells it from all others.
    pub uuid: Uuid,
    /// Which creation under its name.
    pub generation: u64,
    /// Its context id; 0: it has none.
    pub cid: u32,
}

/// The file.
#[derive(Debug)]
pub(super) struct Roster {
    slots: RefCell<Slots<Shared>>,
    guests: RefCell<BTreeMap<u64, Known>>,
}

impl Roster {
    /// Goes on with what an earlier manager has written into the file, if anything.
    pub(super) fn open(file: File) -> io::Result<Self> {
        let (slots, content) = Slots::open(Shared::from(OwnedFd::from(file)))?;
        let content = content.unwrap_or_default();
        Ok(Self {
            slots: RefCell::new(slots),
            guests: RefCell::new(String::from_utf8_lossy(&content).lines().filter_map(read).collect()),
        })
    }

    /// The keeper holds a guest under this id.
    pub(super) fn add(&self, id: u64, known: &Known) {
        self.guests.borrow_mut().insert(id, known.clone());
        self.write();
    }

    /// It holds nothing any more under this id.
    pub(super) fn remove(&self, id: u64) {
        if self.guests.borrow_mut().remove(&id).is_some() {
            self.write();
        }
    }

    /// All that it holds.
    pub(super) fn guests(&self) -> Vec<Known> {
        self.guests.borrow().values().cloned().collect()
    }

    fn write(&self) {
        let guests = self.guests.borrow();
        let lines: String = guests.iter().map(|(id, known)| line(*id, known)).collect();
        if let Err(error) = self.slots.borrow_mut().write(lines.as_bytes()) {
            tracing::warn!("which guests go on without this manager cannot be noted in the state folder: {error}");
        }
    }
}

fn line(id: u64, known: &Known) -> String {
    let Known {
        generation,
        uuid,
        cid,
        name,
    } = known;
    format!("{id} {generation} {uuid} {cid} {name}\n")
}

fn read(line: &str) -> Option<(u64, Known)> {
    let mut words = line.split(' ');
    let mut next = || words.next();
    let id = next()?.parse().ok()?;
    let known = Known {
        generation: next()?.parse().ok()?,
        uuid: next()?.parse::<Uuid>().ok()?,
        cid: next()?.parse().ok()?,
        name: next().filter(|name| check_name(name).is_ok())?.into(),
    };
    Some((id, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str, generation: u64) -> Known {
        Known {
            name: name.into(),
            uuid: Uuid::from_bytes([generation.to_le_bytes()[0]; 16]),
            generation,
            cid: 3,
        }
    }

    #[test]
    fn the_next_manager_reads_what_the_last_one_wrote() {
        let file = tempfile::tempfile().unwrap();
        let roster = Roster::open(file.try_clone().unwrap()).unwrap();
        assert!(roster.guests().is_empty());
        roster.add(1, &known("web", 1));
        roster.add(2, &known("db.old", 7));
        roster.add(1, &known("web", 2));
        let next = Roster::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(next.guests(), [known("web", 2), known("db.old", 7)]);
        next.remove(1);
        next.remove(9);
        next.add(3, &known("ant", 1));
        let last = Roster::open(file).unwrap();
        assert_eq!(last.guests(), [known("db.old", 7), known("ant", 1)]);
    }

    #[test]
    fn what_is_no_guest_is_left_out() {
        let uuid = Uuid::from_bytes([7; 16]);
        assert_eq!(read(&format!("1 2 {uuid} 3 web")).unwrap().1.name.as_ref(), "web");
        for line in [
            "".to_owned(),
            "1 2".to_owned(),
            format!("1 2 {uuid} 3"),
            format!("1 2 {uuid} 3 "),
            format!("1 2 {uuid} 3 ../x"),
            format!("1 2 {uuid} -3 web"),
            "1 2 x 3 web".to_owned(),
        ] {
            assert!(read(&line).is_none(), "{line}");
        }
    }
}
