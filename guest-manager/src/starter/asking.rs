//! Asks the keepers that earlier managers have left for what they hold: all of them at once, and those that stand still for as long as it takes.
//!
//! ```text
//!   ask ── nobody listens any more ──────────────────> it has ended, and all its guests with it
//!    ^ │
//!    │ ├── connected, the key said ── it hands over ──> its guests          (a keeper that stands still does so when it goes on)
//!    │ │                └── the connection breaks ──.
//!    │ └── no room among those who wait there ──────┤
//!    └────────────────── later, and later ──────────'
//! ```

use std::{io, rc::Rc, time::Duration};

use futures::{
    future::LocalBoxFuture,
    stream::{FuturesUnordered, StreamExt},
};
use sepal_runner::keeper::{Inherited, KeeperClient, KeeperError, Key};
use sepal_schema::transport::{Handle, reactor::Direction};

use super::{
    Inheritance, Shared,
    link::Link,
    roster::{Known, Roster},
    succession::{Keepers, Left},
};

/// How long the manager waits for all keepers before it goes on without those that have not answered.
const AT_FIRST: Duration = Duration::from_secs(2);
/// How long it is waited before a keeper is asked again, at first and at most: each time twice as long.
const AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(10));

/// What came of asking a keeper.
pub enum Answer {
    /// It has handed over.
    There(Inheritance),
    /// It has ended, and its guests with it.
    Ended,
    /// It is not to be asked.
    Stranger,
}

/// A keeper that has not answered.
#[derive(Debug, Clone)]
pub struct Silent {
    /// By which it is known in the log, and by [`Asking::next`].
    pub keeper: String,
    /// What it holds, as far as the earlier manager could note it.
    pub guests: Vec<Known>,
}

/// Keepers that are asked.
#[derive(Default)]
pub struct Asking {
    asked: FuturesUnordered<LocalBoxFuture<'static, (String, Answer)>>,
    silent: Vec<Silent>,
}

impl Asking {
    /// Asks these.
    pub(super) fn begin(shared: &Rc<Shared>, keepers: Keepers) -> Self {
        let left = keepers.left().unwrap_or_else(|error| {
            tracing::error!("{}: {error}", keepers.path().display());
            Vec::new()
        });
        let (keepers, mut asking) = (Rc::new(keepers), Self::default());
        for left in left {
            let roster = open(&keepers, &left);
            asking.silent.push(Silent {
                keeper: left.name().to_owned(),
                guests: roster.as_ref().map_or_else(Vec::new, |roster| roster.guests()),
            });
            let (shared, keepers) = (shared.clone(), keepers.clone());
            asking.asked.push(Box::pin(async move {
                let answer = ask(&shared, &keepers, &left, roster).await;
                (left.name().to_owned(), answer)
            }));
        }
        asking
    }

    /// What those hold that answer soon.
    pub(super) async fn first(&mut self, handle: &Handle) -> Vec<Inheritance> {
        let mut inherited = Vec::new();
        let answers = async {
            while let Some((_, answer)) = self.next().await {
                if let Answer::There(inheritance) = answer {
                    inherited.push(inheritance);
                }
            }
        };
        // Nothing is lost where that takes longer.
        let _ = handle.timeout(AT_FIRST, answers).await;
        inherited
    }

    /// The keepers that have not answered.
    pub fn silent(&self) -> &[Silent] {
        &self.silent
    }

    /// Waits for the next answer, which is one for good; none: all have answered.
    pub async fn next(&mut self) -> Option<(Silent, Answer)> {
        let (name, answer) = self.asked.next().await?;
        let at = self.silent.iter().position(|silent| silent.keeper == name)?;
        Some((self.silent.swap_remove(at), answer))
    }
}

fn open(keepers: &Keepers, left: &Left) -> Option<Rc<Roster>> {
    let unknown = |error: &io::Error| {
        let keeper = left.name();
        tracing::error!("which guests the keeper {keeper} holds is not known: {error}");
    };
    keepers.roster(left).inspect_err(unknown).ok().map(Rc::new)
}

/// Asks a keeper until it has answered.
async fn ask(shared: &Rc<Shared>, keepers: &Keepers, left: &Left, roster: Option<Rc<Roster>>) -> Answer {
    let (mut wait, mut told) = (AGAIN.0, String::new());
    loop {
        let attempted = match keepers.key(left) {
            Ok(key) => attempt(&shared.handle, left, &key).await,
            Err(source) => Err(keyless(left, source)),
        };
        match attempted {
            Ok((keeper, all)) => {
                tracing::info!(pid = keeper.pid(), "took over from the keeper {}", left.name());
                let roster = roster.clone().or_else(|| open(keepers, left));
                match Link::new(&shared.handle, keeper, roster) {
                    Ok(link) => return Answer::There(shared.inheritance(link, all)),
                    Err(error) => tracing::error!("{error}"),
                }
            }
            Err(error @ KeeperError::Ended { .. }) => {
                tracing::debug!("{error}");
                keepers.remove(left);
                return Answer::Ended;
            }
            // Left as it is, for whoever finds out what is wrong.
            Err(error @ KeeperError::Foreign { .. }) => {
                tracing::error!("{error}");
                return Answer::Stranger;
            }
            // That there is no room soon changes, as a rule; if not, it is told which guests are missing.
            Err(error @ KeeperError::Crowded { .. }) => tracing::debug!("{error}"),
            Err(error) => {
                // The same once.
                let why = error.to_string();
                match why == told {
                    true => tracing::debug!("{why}"),
                    false => tracing::error!("{why}; the keeper {} is asked again", left.name()),
                }
                told = why;
            }
        }
        shared.handle.sleep(wait).await;
        wait = (wait * 2).min(AGAIN.1);
    }
}

/// What keeps a keeper from being asked whose key cannot be used: that it has ended, or that.
fn keyless(left: &Left, source: io::Error) -> KeeperError {
    let action = "reading its key";
    let there = KeeperClient::look(&left.socket);
    there.err().unwrap_or(KeeperError::System { action, source })
}

/// Asks a keeper once, and waits for what it has for as long as the connection lasts.
async fn attempt(handle: &Handle, left: &Left, key: &Key) -> Result<(KeeperClient, Vec<Inherited>), KeeperError> {
    let system = |source| KeeperError::System {
        action: "watching the connection",
        source,
    };
    let mut asked = KeeperClient::ask(&left.socket, key)?;
    let watched = handle.register(asked.watched().map_err(system)?).map_err(system)?;
    loop {
        if let Some(taken) = asked.try_take()? {
            return Ok(taken);
        }
        watched.exhausted(Direction::Read);
        watched.readable().await;
    }
}
