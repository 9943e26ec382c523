//! The figures of guests: what their components tell, and what they told last where they do not tell in time.
//!
//! ```text
//!   somebody asks --> a question in flight? --no--> ask the component -----> the answer, whenever it comes: kept with its time
//!                          | yes                                                |
//!                          '---> wait for an answer <---------------------------'     5 ms; 100 ms for the first one ever
//!                                   | heard: told with age 0
//!                                   | not: what is kept, with its age; TIMED_OUT if nothing is
//! ```
//!
//! A component has one question at a time, however many clients ask and however long it hangs. The first is put when the guest starts, so
//! that there are figures of a component that hangs soon after. What was told last outlives the guest.
//!
//! ```text
//!   all     those of all guests, a page at a time
//!   usage   what the host says about a component's memory
//! ```

mod all;
mod usage;

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use capnp::message::TypedBuilder;
use sepal_schema::{
    config::MAX_CPUS,
    error::{Error, Kind},
    guest_capnp::{VcpuState, guest, statistics::stats_result, stats},
    manager_capnp::guest_manager::named_stats,
};

pub(crate) use self::all::serve;
use self::usage::Usage;
use crate::{changed::Changed, cpu, guest::Guest, model::bounded_error};

/// How long somebody who asks waits for a component.
const PATIENCE: Duration = Duration::from_millis(5);
/// The same, of a component that has not told any figures yet: just started, or just taken over.
const FIRST_PATIENCE: Duration = Duration::from_millis(100);
/// The longest answer of a component that is kept, in words of 8 bytes: 64 vCPUs and 32 devices of each kind take a tenth.
const MAX_WORDS: u64 = 8192;
/// Words that the manager adds to what a component tells: its memory, if it did not tell of any.
const MEMORY_WORDS: u64 = 4;

/// What a component told.
#[derive(Clone)]
struct Told {
    figures: Rc<TypedBuilder<stats::Owned>>,
    at: Instant,
}

impl Told {
    /// The vCPUs of which it says that they run.
    fn running(&self) -> Vec<u8> {
        let vcpus = self
            .figures
            .get_root_as_reader()
            .and_then(|figures| figures.get_vcpus());
        let vcpus = vcpus.ok().into_iter().flatten();
        let running = vcpus.filter(|vcpu| matches!(vcpu.get_state(), Ok(VcpuState::Running)));
        running.map(|vcpu| vcpu.get_index()).take(MAX_CPUS.into()).collect()
    }

    /// Words of 8 bytes that they take in a message.
    fn words(&self) -> u64 {
        let size = self
            .figures
            .get_root_as_reader()
            .and_then(|figures| figures.total_size());
        size.map_or(MAX_WORDS, |size| size.word_count)
    }
}

#[derive(Default)]
struct State {
    /// Since when the component is asked.
    asked: Option<Instant>,
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
    /// Words of 8 bytes that they took in a message the last time; none if they were never told.
    fn words(&self) -> Option<u64> {
        Some(self.last()?.words() + MEMORY_WORDS)
    }

    fn last(&self) -> Option<Told> {
        self.state.look(|state| state.last.clone())
    }

    fn heard(&self, outcome: Result<Told, Error>) {
        self.state.change(|state| {
            state.asked = None;
            state.answers += 1;
            match outcome {
                Ok(told) => (state.last, state.failure) = (Some(told), None),
                Err(error) => state.failure = Some(error),
            }
        });
    }

    /// How long the component has owed an answer.
    pub(crate) fn waited_for(&self) -> Duration {
        self.state
            .look(|state| state.asked.map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// Waits for the next answer, whatever it is.
    async fn next(&self) {
        let before = self.state.look(|state| state.answers);
        self.state.until(|state| (state.answers > before).then_some(())).await;
    }

    /// Why there are none.
    fn missing(&self) -> Error {
        self.state
            .look(|state| state.failure.clone())
            .unwrap_or_else(never_told)
    }
}

fn never_told() -> Error {
    Error::new(
        Kind::TimedOut,
        "the guest's component does not answer, and has not told any figures before",
    )
}

/// What the manager knows by itself of a guest, without asking its component.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    uptime_ns: u64,
    usage: Usage,
    /// Bit n: the thread of vCPU n waits for something.
    asleep: u64,
    paused: bool,
    /// It has ended, or waits for its next run: whatever its component told last, no vCPU does anything.
    ended: bool,
}

impl Seen {
    fn of(guest: &Guest, told: &Told) -> Self {
        let ended = !guest.live() || guest.is_restarting();
        let vitals = guest.manager.registry(|registry, now| registry.vitals(guest.id, now));
        match vitals.filter(|vitals| vitals.generation == guest.generation()) {
            Some(vitals) => Self {
                uptime_ns: vitals.uptime_ns,
                usage: usage::of(vitals.component_pid).unwrap_or_default(),
                asleep: match ended {
                    true => 0,
                    false => cpu::asleep(guest, vitals.component_pid, told.running().into_iter()),
                },
                paused: guest.is_paused(),
                ended,
            },
            None => Self {
                ended,
                ..Self::default()
            },
        }
    }
}

/// Figures, and how old they are.
pub(crate) struct Aged {
    told: Told,
    age: Duration,
    seen: Seen,
}

impl Aged {
    /// Writes them into an answer.
    ///
    /// # Errors
    /// The message is full.
    pub(crate) fn write(&self, mut to: stats_result::Builder<'_>) -> Result<(), capnp::Error> {
        to.set_stats(self.told.figures.get_root_as_reader()?)?;
        match to.which()? {
            stats_result::Stats(stats) => self.add(stats?),
            stats_result::Error(_) => Ok(()),
        }
    }

    /// Writes them into an answer about many guests.
    ///
    /// # Errors
    /// The message is full.
    pub(crate) fn write_named(&self, mut to: named_stats::Builder<'_>) -> Result<(), capnp::Error> {
        to.set_stats(self.told.figures.get_root_as_reader()?)?;
        self.add(to.get_stats()?)
    }

    /// Adds what the component does not tell.
    fn add(&self, mut to: stats::Builder<'_>) -> Result<(), capnp::Error> {
        to.set_age_ns(u64::try_from(self.age.as_nanos()).unwrap_or(u64::MAX));
        to.set_uptime_ns(self.seen.uptime_ns);
        let mut memory = to.reborrow().get_memory()?;
        memory.set_resident(self.seen.usage.resident);
        memory.set_shared(self.seen.usage.shared);
        let mut vcpus = to.get_vcpus()?;
        for i in 0..vcpus.len() {
            let mut vcpu = vcpus.reborrow().get(i);
            let (index, state) = (
                vcpu.reborrow_as_reader().get_index(),
                vcpu.reborrow_as_reader().get_state(),
            );
            let asleep = self
                .seen
                .asleep
                .checked_shr(index.into())
                .is_some_and(|bits| bits & 1 == 1);
            if self.seen.ended {
                vcpu.set_state(VcpuState::Stopped);
            } else if asleep && matches!(state, Ok(VcpuState::Running)) {
                // In the guest it waits for nothing else; and what the component told may be old.
                vcpu.set_state(match self.seen.paused {
                    true => VcpuState::Paused,
                    false => VcpuState::Halted,
                });
            }
        }
        Ok(())
    }

    /// Words of 8 bytes that they take in a message.
    pub(crate) fn words(&self) -> u64 {
        self.told.words() + MEMORY_WORDS
    }
}

/// The figures of a guest, within a few milliseconds.
///
/// # Errors
/// `TIMED_OUT` if the component has never told any; for a guest that ended before it did, `NOT_RUNNING`; or why the component has none.
pub(crate) async fn of(guest: &Rc<Guest>) -> Result<Aged, Error> {
    let (begin, asked) = (Instant::now(), ask(guest));
    if asked.is_ok() {
        let patience = match guest.figures.last() {
            Some(_) => PATIENCE,
            None => FIRST_PATIENCE,
        };
        let heard = guest.manager.handle.timeout(patience, guest.figures.next());
        // What has not come by then is told the next time.
        let _ = heard.await;
    }
    told(guest, begin, asked)
}

/// What is known of a guest that was asked since `begin`, as far as it could be.
fn told(guest: &Rc<Guest>, begin: Instant, asked: Result<(), Error>) -> Result<Aged, Error> {
    let Some(told) = guest.figures.last() else {
        let why = guest.check_live().err().or(asked.err());
        return Err(why.unwrap_or_else(|| guest.figures.missing()));
    };
    let age = match told.at >= begin {
        true => Duration::ZERO,
        false => told.at.elapsed(),
    };
    let seen = Seen::of(guest, &told);
    Ok(Aged { told, age, seen })
}

/// Asks the component, unless it has still to answer.
///
/// # Errors
/// There is none to ask: as [`Guest::remote`].
pub(crate) fn ask(guest: &Rc<Guest>) -> Result<(), Error> {
    let remote = guest.remote()?;
    cpu::look_for_threads(guest);
    let asking = guest.figures.state.change(|state| {
        let asking = state.asked.is_some();
        state.asked.get_or_insert_with(Instant::now);
        asking
    });
    if asking {
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
