//! The figures of guests: what their components tell, and what they told last where they do not tell in time.
//!
//! ```text
//!   somebody asks --> a question in flight? --no--> ask the component -----> the answer, whenever it comes: kept with its time
//!                          | yes                                                |
//!                          '---> wait 5 ms for an answer <----------------------'
//!                                   | heard: told with age 0
//!                                   | not: what is kept, with its age; TIMED_OUT if nothing is
//! ```
//!
//! A component has one question at a time, however many clients ask and however long it hangs. The first is put when the guest starts, so
//! that there are figures of a component that hangs soon after. What was told last outlives the guest.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use capnp::message::TypedBuilder;
use sepal_schema::{
    error::{Error, Kind},
    guest_capnp::{guest, statistics::stats_result, stats},
};

use crate::{changed::Changed, guest::Guest, model::bounded_error};

/// How long somebody who asks waits for the component.
const PATIENCE: Duration = Duration::from_millis(5);
/// The longest answer of a component that is kept, in words of 8 bytes: 64 vCPUs and 32 devices of each kind take a tenth.
const MAX_WORDS: u64 = 8192;

/// What a component told.
#[derive(Clone)]
struct Told {
    figures: Rc<TypedBuilder<stats::Owned>>,
    at: Instant,
}

#[derive(Default)]
struct State {
    asking: bool,
    /// Counts the answers, failures included.
    answers: u64,
    last: Option<Told>,
    /// What kept the component from answering the last question.
    failure: Option<Error>,
}

/// What is kept of a guest's figures.
#[derive(Default)]
pub(crate) struct Figures {
    state: Changed<State>,
}

impl Figures {
    fn last(&self) -> Option<Told> {
        self.state.look(|state| state.last.clone())
    }

    fn heard(&self, outcome: Result<Told, Error>) {
        self.state.change(|state| {
            state.asking = false;
            state.answers += 1;
            match outcome {
                Ok(told) => (state.last, state.failure) = (Some(told), None),
                Err(error) => state.failure = Some(error),
            }
        });
    }

    /// Waits for the next answer.
    async fn next(&self) -> Result<Told, Error> {
        let before = self.state.look(|state| state.answers);
        let next = |state: &mut State| {
            (state.answers > before).then(|| match (&state.failure, &state.last) {
                (None, Some(told)) => Ok(told.clone()),
                (Some(error), _) => Err(error.clone()),
                (None, None) => Err(never_told()),
            })
        };
        self.state.until(next).await
    }
}

fn never_told() -> Error {
    Error::new(
        Kind::TimedOut,
        "the guest's component does not answer, and has not told any figures before",
    )
}

/// Figures, and how old they are.
pub(crate) struct Aged {
    told: Told,
    age: Duration,
}

impl Aged {
    /// Writes them into an answer.
    ///
    /// # Errors
    /// The message is full.
    pub(crate) fn write(&self, mut to: stats_result::Builder<'_>) -> Result<(), capnp::Error> {
        to.set_stats(self.told.figures.get_root_as_reader()?)?;
        if let stats_result::Stats(stats) = to.which()? {
            stats?.set_age_ns(u64::try_from(self.age.as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(())
    }
}

/// The figures of a guest, within a few milliseconds.
///
/// # Errors
/// `TIMED_OUT` if the component has never told any; for a guest that ended before it did, `NOT_RUNNING`; or why the component has none.
pub(crate) async fn of(guest: &Rc<Guest>) -> Result<Aged, Error> {
    let figures = &guest.figures;
    let handle = &guest.manager.handle;
    let heard = match ask(guest) {
        Ok(()) => handle
            .timeout(PATIENCE, figures.next())
            .await
            .unwrap_or_else(|_| Err(never_told())),
        Err(error) => Err(error),
    };
    match (heard, figures.last()) {
        (Ok(told), _) => Ok(Aged {
            told,
            age: Duration::ZERO,
        }),
        (Err(_), Some(told)) => Ok(Aged {
            age: told.at.elapsed(),
            told,
        }),
        (Err(error), None) => Err(guest.check_live().err().unwrap_or(error)),
    }
}

/// Asks the component, unless it has still to answer.
///
/// # Errors
/// There is none to ask: as [`Guest::remote`].
pub(crate) fn ask(guest: &Rc<Guest>) -> Result<(), Error> {
    let remote = guest.remote()?;
    if guest
        .figures
        .state
        .change(|state| std::mem::replace(&mut state.asking, true))
    {
        return Ok(());
    }
    let asked = Rc::downgrade(guest);
    guest.manager.handle.spawn(async move {
        let outcome = question(remote).await;
        if let Some(guest) = asked.upgrade() {
            guest.figures.heard(outcome);
        }
    });
    Ok(())
}

async fn question(remote: guest::Client) -> Result<Told, Error> {
    let observer = remote.observer_request().send().pipeline.get_observer();
    let answer = observer.stats_request().send().promise.await?;
    let figures = match answer.get()?.which().map_err(capnp::Error::from)? {
        stats_result::Stats(figures) => figures?,
        stats_result::Error(error) => return Err(bounded_error(Error::read(error?)?)),
    };
    if figures.total_size()?.word_count > MAX_WORDS {
        return Err(Error::new(
            Kind::InternalError,
            "the guest's component tells more figures than a guest has",
        ));
    }
    let mut copy = TypedBuilder::new_default();
    copy.set_root(figures)?;
    Ok(Told {
        figures: Rc::new(copy),
        at: Instant::now(),
    })
}
