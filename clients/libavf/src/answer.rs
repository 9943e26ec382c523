//! An answer from one thread to another that waits for it. Not the standard library's channel: that leaves something behind in the waiting thread, which is the
//! program's, and tools that look for leaks find it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

enum State<T> {
    Awaited,
    There(T),
    /// It will not come, or has been taken.
    Gone,
}

struct Slot<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Slot<T> {
    fn set(&self, change: impl FnOnce(&mut State<T>)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }
}

/// Where the answer is given. Dropped before, there is none.
pub(crate) struct Answer<T>(Arc<Slot<T>>);

/// Where it is waited for.
pub(crate) struct Awaited<T>(Arc<Slot<T>>);

/// Both ends.
pub(crate) fn answer<T>() -> (Answer<T>, Awaited<T>) {
    let slot = Arc::new(Slot {
        state: Mutex::new(State::Awaited),
        changed: Condvar::new(),
    });
    (Answer(slot.clone()), Awaited(slot))
}

impl<T> Answer<T> {
    /// Gives it.
    pub(crate) fn give(self, answer: T) {
        self.0.set(|state| *state = State::There(answer));
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        self.0.set(|state| {
            if matches!(state, State::Awaited) {
                *state = State::Gone;
            }
        });
    }
}

impl<T> Awaited<T> {
    /// Waits for it; none if there is none.
    pub(crate) fn take(self) -> Option<T> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        while matches!(*state, State::Awaited) {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match std::mem::replace(&mut *state, State::Gone) {
            State::There(answer) => Some(answer),
            State::Awaited | State::Gone => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_or_does_not() {
        let (given, awaited) = answer();
        let thread = std::thread::spawn(move || given.give(7));
        assert_eq!(awaited.take(), Some(7));
        thread.join().unwrap();
        let (given, awaited) = answer::<u8>();
        let thread = std::thread::spawn(move || drop(given));
        assert_eq!(awaited.take(), None);
        thread.join().unwrap();
    }
}
