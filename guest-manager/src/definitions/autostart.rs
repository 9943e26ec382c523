//! What is started because the manager is there: when that starts, or when it finds out that what went on without it has ended.

use std::{pin::pin, rc::Rc, time::Duration};

use futures::{
    future::{join_all, select},
    stream::{self, StreamExt},
};
use sepal_schema::error::Kind;

use super::start;
use crate::{client::Client, guest::Guest, manager::Manager};

/// How many guests are created at a time, so that a host that has many to start does not begin all of them before it has one.
const AT_A_TIME: usize = 4;
/// How long those that follow wait for one that is being created: its files may lie on dead storage.
const PATIENCE: Duration = Duration::from_secs(30);

/// Starts all guests that are marked for it and do not run, by name, and returns when each runs or was given up. One that cannot be started is tried again
/// if its restart policy says so.
pub async fn start_all(manager: Rc<Manager>) {
    start_all_within(manager, PATIENCE).await;
}

/// As [`start_all`]; those that follow one wait for it for so long at most.
pub async fn start_all_within(manager: Rc<Manager>, patience: Duration) {
    let marked = manager.definitions.marked();
    start_these(manager, marked, patience).await;
}

/// As [`start_all`], of those of these names that are marked for it.
pub(crate) async fn start_marked(manager: Rc<Manager>, mut names: Vec<Rc<str>>) {
    let marked = manager.definitions.marked();
    names.retain(|name| marked.contains(name));
    start_these(manager, names, PATIENCE).await;
}

async fn start_these(manager: Rc<Manager>, names: Vec<Rc<str>>, patience: Duration) {
    let begun = stream::iter(names).map(|name| begin(&manager, name, patience));
    let begun: Vec<Option<Rc<Guest>>> = begun.buffer_unordered(AT_A_TIME).collect().await;
    join_all(begun.iter().flatten().map(|guest| settle(guest))).await;
}

/// Begins a guest, and returns when it runs, its first attempt has failed, or that takes too long: those that follow keep nobody waiting.
async fn begin(manager: &Rc<Manager>, name: Rc<str>, patience: Duration) -> Option<Rc<Guest>> {
    match start(manager, &Client::of_the_manager(), &name, true) {
        Ok(guest) => {
            guest.insist();
            if manager.handle.timeout(patience, first_attempt(&guest)).await.is_err() {
                tracing::warn!(guest = &*name, "it takes long to be started; others are meanwhile");
            }
            Some(guest)
        }
        // It goes on from an earlier manager, or somebody was faster.
        Err(error) if error.kind == Kind::AlreadyRunning => None,
        Err(error) => {
            tracing::error!(guest = &*name, "it cannot be started: {error}");
            None
        }
    }
}

async fn first_attempt(guest: &Guest) {
    let (runs, failed) = (pin!(guest.started()), pin!(guest.over(guest.generation())));
    // Whichever comes first.
    let _ = select(runs, failed).await;
}

/// Tells what became of it.
async fn settle(guest: &Guest) {
    match guest.started().await {
        Ok(()) => tracing::info!(guest = &*guest.name, "started with the manager"),
        Err(error) => tracing::error!(
            guest = &*guest.name,
            "it could not be started with the manager: {error}"
        ),
    }
}
