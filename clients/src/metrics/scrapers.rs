//! Who is served at the moment, and who has to go when others want to be. Apart from effects but for time.
//!
//! ```text
//!   enter --> Asks --(its request is complete)--> Waits --(there is an answer)--> Hears --> gone
//!              '------ the first to go when there is no room, after a second ------'
//! ```
//!
//! Connections that say nothing, or do not listen, would otherwise keep those out that do.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::poll_fn,
    rc::Rc,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use futures::channel::oneshot;

/// How long one may be silent, or deaf, before it has to make room for others: far longer than a scraper needs on a busy host.
const GRACE: Duration = Duration::from_secs(1);

/// What a scraper is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has not said all that it wants.
    Asks,
    /// Its answer is being made.
    Waits,
    /// Its answer is on its way.
    Hears,
}

struct Entry {
    stage: Stage,
    since: Instant,
    /// Dropped: it has to go.
    _stay: oneshot::Sender<()>,
}

/// All that are served, in the order in which they came.
pub(super) struct Scrapers {
    most: usize,
    last: Cell<u64>,
    open: RefCell<BTreeMap<u64, Entry>>,
    /// Who waits for room.
    waker: Cell<Option<Waker>>,
}

/// One that is served, as long as this is kept.
pub(super) struct Served {
    number: u64,
    scrapers: Rc<Scrapers>,
}

impl Scrapers {
    /// Nobody yet, and `most` at a time.
    pub(super) fn new(most: usize) -> Rc<Self> {
        Rc::new(Self {
            most,
            last: Cell::new(0),
            open: RefCell::default(),
            waker: Cell::default(),
        })
    }

    /// One more, that asks; what is returned beside it resolves when it has to go.
    pub(super) fn enter(self: &Rc<Self>, now: Instant) -> (Served, oneshot::Receiver<()>) {
        let (stay, go) = oneshot::channel();
        let number = self.last.get() + 1;
        self.last.set(number);
        let entry = Entry {
            stage: Stage::Asks,
            since: now,
            _stay: stay,
        };
        self.open.borrow_mut().insert(number, entry);
        let scrapers = self.clone();
        (Served { number, scrapers }, go)
    }

    /// Makes room for one more, if there is none, by having one go: of those that have been silent for long enough the one that came first, or else of
    /// those that do not listen. Whether there is room; if not, when there may be, unless something changes.
    fn room(&self, now: Instant) -> Result<(), Option<Instant>> {
        let mut open = self.open.borrow_mut();
        if open.len() < self.most {
            return Ok(());
        }
        for stage in [Stage::Asks, Stage::Hears] {
            let old = |entry: &Entry| entry.stage == stage && now.saturating_duration_since(entry.since) >= GRACE;
            if let Some(number) = open.iter().find_map(|(number, entry)| old(entry).then_some(*number)) {
                open.remove(&number);
                return Ok(());
            }
        }
        let lingering = open.values().filter(|entry| entry.stage != Stage::Waits);
        Err(lingering.map(|entry| entry.since + GRACE).min())
    }

    /// Waits until there is room for one more; `sleep` waits until a moment.
    pub(super) async fn until_room<F: Future<Output = ()>>(&self, sleep: impl Fn(Option<Instant>) -> F) {
        while let Err(then) = self.room(Instant::now()) {
            let mut asked = false;
            let changed = poll_fn(|context| match std::mem::replace(&mut asked, true) {
                false => {
                    self.waker.set(Some(context.waker().clone()));
                    Poll::Pending
                }
                true => Poll::Ready(()),
            });
            let slept = std::pin::pin!(sleep(then));
            futures::future::select(changed, slept).await;
        }
    }

    fn changed(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Served {
    /// It is at the next stage.
    pub(super) fn goes_on(&self, stage: Stage, now: Instant) {
        if let Some(entry) = self.scrapers.open.borrow_mut().get_mut(&self.number) {
            (entry.stage, entry.since) = (stage, now);
        }
        self.scrapers.changed();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.scrapers.open.borrow_mut().remove(&self.number);
        self.scrapers.changed();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn those_that_are_silent_make_room() {
        let scrapers = Scrapers::new(3);
        let (begin, second) = (Instant::now(), GRACE);
        let (first, mut first_goes) = scrapers.enter(begin);
        let (deaf, mut deaf_goes) = scrapers.enter(begin);
        assert_eq!(scrapers.room(begin), Ok(()));
        let (silent, mut silent_goes) = scrapers.enter(begin + second / 2);
        first.goes_on(Stage::Waits, begin);
        deaf.goes_on(Stage::Hears, begin);
        // Nobody has been idle for long.
        assert_eq!(scrapers.room(begin), Err(Some(begin + second)));
        // Whoever says nothing goes before who does not listen, and who waits for us never.
        let later = begin + 2 * second;
        assert_eq!(scrapers.room(later), Ok(()));
        assert!((&mut silent_goes).now_or_never().is_some() && (&mut deaf_goes).now_or_never().is_none());
        drop(silent);
        let (_third, _) = scrapers.enter(later);
        assert_eq!(scrapers.room(later), Ok(()));
        assert!((&mut deaf_goes).now_or_never().is_some());
        let (fourth, _) = scrapers.enter(later);
        fourth.goes_on(Stage::Waits, later);
        assert_eq!(scrapers.room(later), Err(Some(later + second)));
        assert!((&mut first_goes).now_or_never().is_none());
        drop(first);
        assert_eq!(scrapers.room(later), Ok(()));
        drop(deaf);
    }

    #[test]
    fn whoever_waits_for_room_hears_of_it() {
        let scrapers = Scrapers::new(1);
        let (first, _go) = scrapers.enter(Instant::now());
        first.goes_on(Stage::Waits, Instant::now());
        let mut waiting = std::pin::pin!(scrapers.until_room(|then| {
            assert_eq!(then, None, "only the one that is served can change anything");
            futures::future::pending()
        }));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        assert!(waiting.now_or_never().is_some());
    }
}
