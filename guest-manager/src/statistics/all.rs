//! The figures of all guests that run, a page at a time: as many as fit into a message, all asked at once.

use std::{
    ops::Bound,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::{FutureExt, Stream, StreamExt, stream::FuturesUnordered};
use sepal_schema::{error::Error, manager_capnp::guest_manager};
use uuid::Uuid;

use super::{Aged, PATIENCE, ask, told};
use crate::{guest::Guest, manager::Manager, serial::yield_now};

/// Room for a page, in words of 8 bytes: a message has at most 16384, and needs some for itself.
const ROOM: u64 = 15 * 1024;
/// Words that a guest's figures are taken to need before they were told: two vCPUs, a disk and a network card take as many.
const USUAL: u64 = 128;
/// Words besides the figures: the structure, a name of up to 64 bytes, a UUID, an error's sentence.
const FRAME: u64 = 64;

/// The longest that all are waited for, as long as one after the other answers: a host with few processors has to let every component run.
const MOST: Duration = Duration::from_millis(50);
/// Rounds of the event loop in which an answer that is there has certainly come here.
const ROUNDS: usize = 8;

/// One guest in the answer.
struct Row {
    guest: Rc<Guest>,
    uuid: Option<Uuid>,
    figures: Result<Aged, Error>,
}

impl Row {
    fn words(&self) -> u64 {
        FRAME + self.figures.as_ref().map_or(0, Aged::words)
    }

    fn write(&self, mut to: guest_manager::named_stats::Builder<'_>) -> Result<(), capnp::Error> {
        to.set_name(&*self.guest.name);
        if let Some(uuid) = &self.uuid {
            to.set_uuid(uuid.as_bytes());
        }
        match &self.figures {
            Ok(figures) => figures.write_named(to)?,
            Err(error) => error.write(to.init_error()),
        }
        Ok(())
    }
}

/// Answers `GuestManager.stats`.
///
/// # Errors
/// The parameters cannot be read, or the message is full.
pub(crate) async fn serve(
    manager: Rc<Manager>,
    params: guest_manager::StatsParams,
    mut results: guest_manager::StatsResults,
) -> Result<(), capnp::Error> {
    let (after, most) = {
        let params = params.get()?;
        let after = params.get_after()?.to_str().unwrap_or_default().to_owned();
        let most = match params.get_most() {
            0 => usize::MAX,
            most => usize::try_from(most).unwrap_or(usize::MAX),
        };
        (after, most)
    };
    let running = running(&manager, &after);
    let expected = running
        .iter()
        .map(|(guest, _)| FRAME + guest.figures.words().unwrap_or(USUAL));
    let asked = fitting(expected, most);
    let rows = ask_all(&manager, &running[..asked]).await;
    let shown = fitting(rows.iter().map(Row::words), most);
    let mut to = results.get();
    to.set_more(shown < running.len());
    let mut list = to.init_guests(u32::try_from(shown).unwrap_or(u32::MAX));
    for (i, row) in (0..).zip(&rows[..shown]) {
        row.write(list.reborrow().get(i))?;
    }
    Ok(())
}

/// Asks all of them, and waits until they have answered, or none has for a while.
async fn ask_all(manager: &Manager, guests: &[(Rc<Guest>, Option<Uuid>)]) -> Vec<Row> {
    let begin = Instant::now();
    let asked: Vec<_> = guests.iter().map(|(guest, _)| ask(guest)).collect();
    let waited_for = guests.iter().zip(&asked).filter(|(_, asked)| asked.is_ok());
    let mut answers: FuturesUnordered<_> = waited_for.map(|((guest, _), _)| guest.figures.next()).collect();
    while begin.elapsed() < MOST {
        let answer = match manager.handle.timeout(PATIENCE, answers.next()).await {
            Ok(answer) => answer,
            // The time may have gone by while the questions were sent.
            Err(_) => soon(&mut answers).await,
        };
        if answer.is_none() {
            break;
        }
    }
    drop(answers);
    let mut rows = Vec::with_capacity(guests.len());
    for ((guest, uuid), asked) in guests.iter().zip(asked) {
        rows.push(Row {
            guest: guest.clone(),
            uuid: *uuid,
            figures: told(guest, begin, asked),
        });
        // For each the kernel is asked once or more: others get their turn.
        yield_now().await;
    }
    rows
}

/// The next answer, if it is there already.
async fn soon(answers: &mut (impl Stream<Item = ()> + Unpin)) -> Option<()> {
    for _ in 0..ROUNDS {
        if let Some(answer) = answers.next().now_or_never() {
            return answer;
        }
        yield_now().await;
    }
    None
}

/// The guests that run, sorted by name, those after a name.
fn running(manager: &Manager, after: &str) -> Vec<(Rc<Guest>, Option<Uuid>)> {
    let ids = manager.registry(|registry, _| registry.running((Bound::Excluded(after), Bound::Unbounded)));
    let current = ids
        .into_iter()
        .filter_map(|(id, uuid)| Some((manager.slot(id)?.current()?, uuid)));
    current.collect()
}

/// How many of these fit into a page, from the first on, at most `most`; one does, whatever its size.
fn fitting(words: impl Iterator<Item = u64>, most: usize) -> usize {
    let mut left = ROOM;
    let mut count = 0;
    for words in words.take(most) {
        match left.checked_sub(words) {
            Some(rest) => left = rest,
            None if count > 0 => break,
            None => left = 0,
        }
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_page_has_one_guest_at_least() {
        assert_eq!(fitting([].into_iter(), 5), 0);
        assert_eq!(fitting([ROOM + 1, 1].into_iter(), 5), 1);
        assert_eq!(fitting([1, ROOM + 1].into_iter(), 5), 1);
        assert_eq!(fitting([1; 9].into_iter(), 5), 5);
    }

    proptest! {
        #[test]
        fn pages_are_full_and_not_too_full(words in prop::collection::vec(0..ROOM / 2, 0..99), most in 1..99_usize) {
            let count = fitting(words.iter().copied(), most);
            let sum = |count: usize| words[..count].iter().sum::<u64>();
            prop_assert!(sum(count) <= ROOM);
            prop_assert!(count == words.len().min(most) || sum(count + 1) > ROOM);
        }
    }
}
