//! Guests of keepers that did not answer when this manager began: their names are kept for them, and they are taken over when their keeper answers, whenever
//! that is.
//!
//! ```text
//!   silent ── answers ──> its guests are taken over, as at the start; what it does not hold was not there
//!      └───── ends ─────> its guests have died with it; those that are to run whenever a manager does begin again
//! ```

use std::{collections::HashMap, rc::Rc};

use sepal_schema::{error::Error, report::Reason};
use uuid::Uuid;

use super::{
    keeping::label,
    record::Record,
    succeed::{Found, adopt, give_up, open_journals, restore, unite},
};
use crate::{
    cids::Cid,
    definitions::{self, autostart},
    guest::Guest,
    manager::Manager,
    model::{Ending, GuestId},
    starter::{Answer, Asking, Inheritance, Known, Silent},
};

/// A guest that nobody has reached yet.
struct Missed {
    id: GuestId,
    known: Known,
    /// Nobody else is to get it meanwhile.
    _cid: Option<Cid>,
}

/// Waits for those that have not answered.
pub(super) fn wait(manager: &Rc<Manager>, mut asking: Asking) {
    let silent = asking.silent().iter();
    let mut missed: HashMap<String, Vec<Missed>> = silent
        .map(|silent| (silent.keeper.clone(), miss_all(manager, silent)))
        .collect();
    let manager = manager.clone();
    manager.handle.clone().spawn(async move {
        while let Some((Silent { keeper, .. }, answer)) = asking.next().await {
            let missed = missed.remove(&keeper).unwrap_or_default();
            match answer {
                Answer::There(inheritance) => arrive(&manager, inheritance, missed),
                Answer::Ended => end(&manager, &keeper, missed),
                Answer::Stranger => missed.iter().for_each(|missed| let_go(&manager, missed)),
            }
        }
    });
}

/// Keeps what belongs to the guests of a silent keeper.
fn miss_all(manager: &Manager, silent: &Silent) -> Vec<Missed> {
    let (keeper, names) = (&silent.keeper, silent.guests.iter().map(|known| &*known.name));
    let names = names.collect::<Vec<_>>().join(", ");
    tracing::warn!(
        guests = names,
        "the keeper {keeper} of an earlier manager does not answer; what it holds is taken over when it does"
    );
    silent.guests.iter().filter_map(|known| miss(manager, known)).collect()
}

fn miss(manager: &Manager, known: &Known) -> Option<Missed> {
    let missed = manager.registry(|registry, _| registry.miss(&known.name, known.uuid, known.generation));
    // It was moving from this keeper to another one, which has answered.
    let missed = missed.inspect_err(|error| tracing::debug!("{}", error.message));
    Some(Missed {
        id: missed.ok()?,
        known: known.clone(),
        _cid: match known.cid {
            0 => None,
            cid => manager.cids.take(cid, &known.name).ok(),
        },
    })
}

fn let_go(manager: &Manager, missed: &Missed) {
    manager.registry(|registry, now| registry.found_missing(missed.id, now));
}

/// A keeper has answered.
fn arrive(manager: &Rc<Manager>, inheritance: Inheritance, mut missed: Vec<Missed>) {
    // They are their guests' again.
    missed.iter_mut().for_each(|missed| missed._cid = None);
    let Inheritance { mut own, orphans } = inheritance;
    let journals = open_journals(own.remove(label::JOURNAL));
    // What this manager has told has numbers already.
    let journals = match manager.registry(|registry, _| registry.log().last()) {
        0 => journals,
        _ => Vec::new(),
    };
    adopt(manager, journals, orphans.is_empty());
    for mut found in unite(orphans) {
        let memory = found.slots.memory();
        let known = |guest: &Rc<Guest>| guest.durable().is_some_and(|durable| durable.is_in(memory));
        if manager.guests().iter().any(known) {
            // It goes on with another component, whose keeper has answered before.
            give_up(found.orphan);
            continue;
        }
        if let Err(error) = rename(manager, &mut found) {
            tracing::error!(guest = found.record.name, "{}", error.message);
        }
        let name = found.record.name.clone();
        // Nobody could have redeemed its lease before.
        found.record.lease_ends = None;
        if let Err(error) = restore(manager, found) {
            tracing::error!(guest = name, "the guest cannot be taken over, and ends: {error}");
        }
    }
    missed.iter().for_each(|missed| let_go(manager, missed));
    manager.registry(|registry, _| registry.remember_bygone());
}

/// Gives a guest another name where somebody took its own meanwhile, which only happens where the earlier manager could not note it: neither is lost.
fn rename(manager: &Manager, found: &mut Found) -> Result<(), Error> {
    let Record { name, uuid, .. } = &found.record;
    let free = manager.registry(|registry, _| registry.late_name(name, Uuid::from_bytes(*uuid)));
    if *free == **name {
        return Ok(());
    }
    let uuid = definitions::fresh_uuid()?;
    tracing::warn!(
        guest = &*free,
        "this guest was {name} until its keeper did not answer; that name is another's by now"
    );
    found.record.name = free.to_string();
    found.record.uuid = uuid.into_bytes();
    found.orphan.custody.note(&Known {
        name: free,
        uuid,
        generation: found.record.generation,
        cid: found.record.cid,
    });
    Ok(())
}

/// A keeper has ended without an answer.
fn end(manager: &Rc<Manager>, keeper: &str, missed: Vec<Missed>) {
    let mut names = Vec::new();
    for Missed { id, known, .. } in missed {
        // Another keeper has answered for it: it was moving from this one to that.
        if !manager.registry(|registry, _| registry.is_unreached(id)) {
            continue;
        }
        tracing::error!(
            guest = &*known.name,
            "its keeper {keeper} ended without an answer, and the guest with it"
        );
        let ending = Ending::new(Reason::VmmTerminated, "its keeper ended, and the guest with it");
        manager.registry(|registry, now| registry.ended(id, known.generation, ending, 0, now));
        names.push(Rc::from(&*known.name));
    }
    // As they would have been started with this manager, had that known.
    let started = autostart::start_marked(manager.clone(), names);
    manager.handle.spawn(started);
}
