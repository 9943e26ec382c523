//! What is known of failed runs on its way to the disk: not each time, so that a guest that fails again and again does not keep the disk busy. Of one that has
//! failed, the runs that do not fail are known there, too, so that none of them is forgotten for an older one that did.
//!
//! ```text
//!   a run fails --> its name rests? --no--> on the disk, at once --> rests for a while --> more has come: on the disk, rests again
//!                      '--yes--> waits                                      '--> nothing has: the next failure is written at once
//!   the manager ends --> what waits is on the disk
//! ```
//!
//! So what is written is bounded by time, not by how fast guests fail; a power cut loses what the last rest had not let through.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    time::Duration,
};

use sepal_schema::error::Error;

use crate::{guest::Guest, manager::Manager, registry::Runs};

/// How long the manager waits for the disk in the end.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to be written, by name.
#[derive(Default)]
pub(super) struct Failures {
    waiting: RefCell<BTreeMap<Rc<str>, Runs>>,
    resting: RefCell<BTreeSet<Rc<str>>>,
}

impl Failures {
    /// What waits concerns a definition that is gone.
    pub(super) fn forget(&self, name: &str) {
        self.waiting.borrow_mut().remove(name);
    }
}

/// A guest's run is over: keeps what is known of it with the guest's definition, if it has one, and this run or one before has failed. Waits for nobody.
pub(crate) fn keep_crashes(guest: &Guest) {
    let (manager, name) = (guest.manager.clone(), guest.name.clone());
    let (defined, runs) = manager.registry(|registry, _| (registry.is_defined(&name), registry.runs(guest.id)));
    if !defined || runs.crashes.is_empty() {
        return;
    }
    let failures = &manager.definitions.failures;
    failures.waiting.borrow_mut().insert(name.clone(), runs);
    if !failures.resting.borrow_mut().insert(name.clone()) {
        return;
    }
    let handle = manager.handle.clone();
    handle.clone().spawn(async move {
        while write(&manager, &name).await {
            handle.sleep(manager.settings.failures_rest).await;
        }
        manager.definitions.failures.resting.borrow_mut().remove(&name);
    });
}

/// Writes what waits, and what is being written; returns when it is on the disk, or the disk does not keep up.
pub(crate) async fn finish(manager: &Manager) {
    // A disk that hangs does not keep the manager from ending.
    if manager.handle.timeout(PATIENCE, write_all(manager)).await.is_err() {
        tracing::error!("the disk of the state folder does not keep up: what is known of failed runs is not all kept");
    }
}

async fn write_all(manager: &Manager) {
    loop {
        let name = manager.definitions.failures.waiting.borrow().keys().next().cloned();
        match name {
            Some(name) => drop(write(manager, &name).await),
            None => break,
        }
    }
    drop(manager.definitions.turn.lock().await);
}

/// Writes what waits of a name; false if nothing does.
async fn write(manager: &Manager, name: &Rc<str>) -> bool {
    let definitions = &manager.definitions;
    let _turn = definitions.turn.lock().await;
    let Some(runs) = definitions.failures.waiting.borrow_mut().remove(name) else {
        return false;
    };
    // It may have been undefined meanwhile.
    let Ok(record) = definitions.get(name) else { return true };
    let written = async {
        let record = record.with_runs(&runs)?;
        definitions.store()?.put(&record).await?;
        Ok::<_, Error>(record)
    };
    match written.await {
        Ok(record) => {
            definitions.records.borrow_mut().insert(record.name.clone(), record);
        }
        Err(error) => tracing::error!(guest = &**name, "what is known of its failure is not kept: {error}"),
    }
    true
}
