//! The events of all guests as the next manager is to know them, and whether this one is about to go.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use capnp::{message, serialize};
use sepal_schema::{
    error::{Error, Kind},
    guest_capnp::event,
};

use super::{journal::Journal, keeping::label, memory::Shared};
use crate::{
    component::ComponentStarter,
    events::EventLog,
    model::{Event, EventKind, read_event},
};

/// What the manager knows of its successor.
#[derive(Default)]
pub(crate) struct Chronicle {
    /// None as long as there was nothing that goes on without this manager.
    journal: RefCell<Option<Journal<Shared>>>,
    /// All keepers have it.
    kept: Cell<bool>,
    leaving: Cell<bool>,
}

/// An event that an earlier manager told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Past {
    pub(crate) sequence: u64,
    pub(crate) time_ns: u64,
    pub(crate) guest: String,
    pub(crate) generation: u64,
    pub(crate) kind: EventKind,
}

impl Chronicle {
    /// Something is to go on without this manager: from now on what happens is kept.
    ///
    /// # Errors
    /// `NO_RESOURCES`, or why nothing can go on.
    pub(crate) fn begin(&self, log: &EventLog, starter: &dyn ComponentStarter) -> Result<(), Error> {
        if self.kept.get() {
            return Ok(());
        }
        let inherited = self.journal.borrow_mut().take();
        if let Some(journal) = inherited {
            return self.go_on_with(journal, starter);
        }
        let journal = Shared::new().and_then(Journal::create);
        let mut journal = journal.map_err(|error| {
            let message = format!("what happens cannot be kept: {error}");
            Error::new(Kind::NoResources, message).about("durable")
        })?;
        log.after(0).for_each(|event| append(&mut journal, event));
        self.go_on_with(journal, starter)
    }

    /// What happens is kept in this journal, which an earlier manager may have begun: also where it cannot be said to all keepers, for the guests of those to
    /// whom it can be.
    ///
    /// # Errors
    /// As [`Chronicle::begin`], which tries again.
    pub(crate) fn go_on_with(&self, journal: Journal<Shared>, starter: &dyn ComponentStarter) -> Result<(), Error> {
        let copy = journal.memory().descriptor();
        let copy = copy.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?;
        let told = starter.keep_for_successor(BTreeMap::from([(label::JOURNAL.to_owned(), copy)]));
        self.kept.set(told.is_ok());
        *self.journal.borrow_mut() = Some(journal);
        told
    }

    /// These have happened: what comes after the event of this number.
    pub(crate) fn note(&self, log: &EventLog, after: u64) {
        if let Some(journal) = &mut *self.journal.borrow_mut() {
            log.after(after).for_each(|event| append(journal, event));
        }
    }

    /// From now on whatever hangs up does so because this manager goes.
    pub(crate) fn leave(&self) {
        self.leaving.set(true);
    }

    /// Whether this manager is about to go, and what can go on without it is to do so.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }
}

fn append(journal: &mut Journal<Shared>, event: &Event) {
    let mut message = message::Builder::new_default();
    event.write(message.init_root());
    let mut bytes = Vec::new();
    let written = serialize::write_message(&mut bytes, &message).map_err(std::io::Error::other);
    if let Err(error) = written.and_then(|()| journal.append(&bytes)) {
        tracing::error!("an event is not kept for the next manager: {error}");
    }
}

/// The events in a journal that can be told again: the last ones, numbered without gaps.
pub(crate) fn past(journal: &Journal<Shared>) -> Vec<Past> {
    let entries = journal.entries().unwrap_or_else(|error| {
        tracing::error!("the events of the manager before cannot be read: {error}");
        Vec::new()
    });
    let mut events: Vec<Past> = Vec::new();
    for entry in &entries {
        let next = read(entry).ok().flatten();
        let follows = |next: &Past| events.last().is_none_or(|last| last.sequence + 1 == next.sequence);
        match next {
            Some(next) if follows(&next) => events.push(next),
            // One that this version does not know; before it nothing can be told in one row with what follows.
            next => events = next.into_iter().collect(),
        }
    }
    events
}

fn read(entry: &[u8]) -> Result<Option<Past>, capnp::Error> {
    let message = serialize::read_message(&mut &*entry, message::ReaderOptions::new())?;
    let from: event::Reader<'_> = message.get_root()?;
    let kind = read_event(from)?;
    Ok(kind.map(|kind| Past {
        sequence: from.get_sequence(),
        time_ns: from.get_time_ns(),
        guest: from
            .get_guest()
            .and_then(|name| Ok(name.to_string()?))
            .unwrap_or_default(),
        generation: from.get_generation(),
        kind,
    }))
}

#[cfg(test)]
mod tests {
    use futures::future::LocalBoxFuture;

    use super::*;
    use crate::{
        component::{StartRequest, Started},
        model::GuestId,
    };

    /// Keeps nothing for a successor for the first time, and everything later.
    #[derive(Default)]
    struct Reluctant {
        asked: Cell<u32>,
    }

    impl ComponentStarter for Reluctant {
        fn start(&self, _: StartRequest) -> LocalBoxFuture<'static, Result<Started, Error>> {
            unreachable!("nothing is started")
        }

        fn check(&self, _: &StartRequest) -> Result<(), Error> {
            Ok(())
        }

        fn keep_for_successor(&self, kept: BTreeMap<String, std::os::fd::OwnedFd>) -> Result<(), Error> {
            assert!(kept.contains_key(label::JOURNAL));
            match self.asked.replace(self.asked.get() + 1) {
                0 => Err(Error::new(Kind::NoStorage, "the disk is full")),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn what_cannot_be_kept_at_first_is_kept_as_soon_as_it_can_be() {
        let (chronicle, starter) = (Chronicle::default(), Reluctant::default());
        let mut log = EventLog::new(8);
        log.append(9, GuestId(1), &"web".into(), 1, EventKind::Starting);
        let journal = Journal::create(Shared::new().unwrap()).unwrap();
        let error = chronicle.go_on_with(journal, &starter).unwrap_err();
        assert_eq!(error.kind, Kind::NoStorage);
        // For the guests that were taken over it is written all the same.
        chronicle.note(&log, 0);
        let told = |chronicle: &Chronicle| past(chronicle.journal.borrow().as_ref().unwrap()).len();
        assert_eq!(told(&chronicle), 1);
        chronicle.begin(&log, &starter).unwrap();
        chronicle.begin(&log, &starter).unwrap();
        assert_eq!((starter.asked.get(), told(&chronicle)), (2, 1));
    }

    #[test]
    fn what_happened_is_told_again_without_gaps() {
        let mut journal = Journal::create(Shared::new().unwrap()).unwrap();
        let mut log = EventLog::new(8);
        for generation in 1..=5 {
            log.append(9, GuestId(1), &"web".into(), generation, EventKind::Starting);
        }
        log.after(0).for_each(|event| append(&mut journal, event));
        let events = past(&journal);
        let told: Vec<_> = events.iter().map(|event| (event.sequence, event.generation)).collect();
        assert_eq!(told, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]);
        assert!(
            events
                .iter()
                .all(|event| event.guest == "web" && event.kind == EventKind::Starting)
        );
        // Something that nobody understands: only what follows is of use.
        journal.append(b"what?").unwrap();
        for generation in [6, 7] {
            log.append(9, GuestId(1), &"web".into(), generation, EventKind::Started);
        }
        log.after(5).for_each(|event| append(&mut journal, event));
        let told: Vec<_> = past(&journal).iter().map(|event| event.sequence).collect();
        assert_eq!(told, [6, 7]);
    }
}
