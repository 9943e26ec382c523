//! A guest that goes on without its manager, as far as that concerns the guest.

use std::{rc::Rc, time::Instant};

use sepal_schema::error::{Error, Kind};

use super::Guest;
use crate::{
    course::Over,
    durable::{
        Durable,
        record::{Phase, Record},
    },
};

impl Guest {
    /// Whether it goes on when its manager ends.
    pub(crate) fn is_durable(&self) -> bool {
        self.durable.borrow().is_some()
    }

    /// What is kept of it for the next manager.
    pub(crate) fn durable(&self) -> Option<Rc<Durable>> {
        self.durable.borrow().clone()
    }

    /// From now on it goes on when its manager ends, once that is kept beside its component.
    ///
    /// # Errors
    /// Nothing can be kept for the next manager.
    pub(crate) fn set_durable(&self, durable: Rc<Durable>) -> Result<(), Error> {
        self.manager.keep_journal()?;
        self.stay_durable(durable)
    }

    /// As [`Guest::set_durable`], of a guest that an earlier manager has left: also where nothing else could go on without this one.
    ///
    /// # Errors
    /// What it prints cannot be kept.
    pub(crate) fn stay_durable(&self, durable: Rc<Durable>) -> Result<(), Error> {
        for port in std::iter::once(&self.port).chain(&self.consoles) {
            // Before anything is printed.
            port.mirror().map_err(|error| {
                let message = format!("what the guest prints cannot be kept: {error}");
                Error::new(Kind::NoResources, message).about("durable")
            })?;
        }
        *self.durable.borrow_mut() = Some(durable);
        self.manager.registry(|registry, _| registry.set_durable(self.id));
        Ok(())
    }

    /// It goes on where an earlier manager left it.
    pub(crate) fn go_on(&self, from: &Record) {
        self.set_cid(from.cid);
        self.ballast.go_on(from.balloon_taken, from.balloon_by_hand);
        self.agent_ready.change(|ready| *ready = from.agent_ready);
        if from.agent_ready {
            self.agent_told.set(from.generation);
        }
        self.count_on(from.counted, from.short_runs);
        self.heard.set(from.heard);
        self.over.replace(from.over.clone());
        self.set_notes(from.notes.clone());
        self.manager
            .registry(|registry, _| registry.restore_failures(self.id, from.broken.clone()));
        let created = matches!(from.phase, Phase::Created | Phase::Running);
        let again = from.again.filter(|_| from.phase == Phase::Running);
        self.state.change(|state| {
            state.run.again_wanted = again;
            state.run.asked = from.asked;
            // What waits for its next run begins that when its time has come.
            state.run.wanted &= from.phase != Phase::Restarting;
            state.run.created = created;
            state.run.held = from.held;
            state.run.started = from.phase == Phase::Running;
            state.run.over = from.phase == Phase::Restarting;
            if from.generation > 1 || created {
                state.created = Some(Ok(()));
            }
        });
    }

    /// Its run is over, which is on record from now on: before its component's process is gone, and with it what that could tell another manager.
    pub(crate) fn note_over(&self, over: &Over) {
        if self.is_durable() {
            self.over.replace(Some(over.clone()));
            self.save();
        }
    }

    /// How its run ended, if that is to be told, or another run is to follow.
    pub(crate) fn noted_over(&self) -> Option<Over> {
        self.over.borrow().clone()
    }

    /// The number of the last event of its component that has been told on.
    pub(crate) fn heard(&self) -> u64 {
        self.heard.get()
    }

    /// Its component's event of this number (0: it does not count them) has been told on, and what follows from it done.
    pub(crate) fn set_heard(&self, number: u64) {
        if number > self.heard.get() {
            self.heard.set(number);
            self.save();
        }
    }

    /// What there is to know of it has changed.
    pub(crate) fn save(&self) {
        if let Some(durable) = self.durable() {
            durable.save(self);
        }
    }

    /// Milliseconds until it is stopped unless its lease is redeemed; 0: that is not waited for.
    pub(crate) fn lease_ends_ms(&self) -> u32 {
        let left = self.lease.ends_in(Instant::now());
        u32::try_from(left.as_millis()).unwrap_or(u32::MAX)
    }
}
