//! What is started when the manager starts.

use std::{rc::Rc, time::Duration};

use futures::stream::{self, StreamExt};
use sepal_schema::{
    config::Restart,
    error::{Error, Kind},
};

use super::start;
use crate::{
    client::Client,
    manager::Manager,
    restart::{How, Row, Verdict},
};

/// How many guests are created at a time, so that a host that has many to start does not begin all of them before it has one.
const AT_A_TIME: usize = 4;

/// Starts all guests that are marked for it and do not run, and returns when each runs or was given up. One that cannot be started is tried again if its
/// restart policy says so.
pub async fn start_all(manager: Rc<Manager>) {
    let marked = |name: Rc<str>| {
        let record = manager.definitions.get(&name).ok().filter(|record| record.autostart)?;
        // What cannot even be read fails at the first attempt, and is told then.
        let rules = record
            .config()
            .map_or_else(|_| Restart::default(), |config| config.restart);
        Some((name, rules))
    };
    let kept = manager.definitions.kept().into_iter();
    let marked: Vec<_> = kept.filter_map(|(name, _)| marked(name)).collect();
    let starts = stream::iter(marked).map(|(name, rules)| start_one(&manager, name, rules));
    starts.buffer_unordered(AT_A_TIME).collect::<()>().await;
}

async fn start_one(manager: &Rc<Manager>, name: Rc<str>, rules: Restart) {
    let mut row = Row::new(rules, 0, 0);
    loop {
        let error = match once(manager, &name).await {
            Ok(()) => {
                tracing::info!(guest = &*name, "started with the manager");
                return;
            }
            // It goes on from an earlier manager, or somebody was faster.
            Err(error) if error.kind == Kind::AlreadyRunning => return,
            Err(error) => error,
        };
        let guest = &*name;
        match row.after(How::Failed, Duration::ZERO) {
            Verdict::Again(wait) => {
                tracing::error!(
                    guest,
                    "it cannot be started, and is tried again in {} ms: {error}",
                    wait.as_millis()
                );
                manager.handle.sleep(wait).await;
            }
            Verdict::GiveUp(times) => {
                tracing::error!(guest, "it cannot be started, and was tried {times} times: {error}");
                return;
            }
            Verdict::End => {
                tracing::error!(guest, "it cannot be started: {error}");
                return;
            }
        }
        // Nobody wants it any more.
        if !manager.definitions.get(&name).is_ok_and(|record| record.autostart) {
            return;
        }
    }
}

async fn once(manager: &Rc<Manager>, name: &str) -> Result<(), Error> {
    let guest = start(manager, &Client::of_the_manager(), name, true)?;
    guest.started().await
}
