//! A value that tasks of the loop wait on: whoever changes it wakes them.

use std::cell::RefCell;

use event_listener::Event;

/// A value that can be waited for. Waiting costs memory only while it lasts.
#[derive(Debug, Default)]
pub struct Changed<T> {
    value: RefCell<T>,
    event: Event,
}

impl<T> Changed<T> {
    /// Holds `value`.
    pub fn new(value: T) -> Self {
        Self {
            value: RefCell::new(value),
            event: Event::new(),
        }
    }

    /// Looks at the value.
    pub fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.value.borrow())
    }

    /// Changes the value and wakes all who wait. `change` must not come back here.
    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut self.value.borrow_mut());
        self.event.notify(usize::MAX);
        result
    }

    /// Waits until `ready` finds what it looks for, which may be at once.
    pub async fn until<R>(&self, mut ready: impl FnMut(&mut T) -> Option<R>) -> R {
        loop {
            // Registered before the look; on one thread nothing can come between, but it costs nothing to be sure.
            let listener = self.event.listen();
            if let Some(result) = ready(&mut self.value.borrow_mut()) {
                return result;
            }
            listener.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{executor::LocalPool, join};

    use super::*;

    #[test]
    fn every_waiter_is_woken() {
        let value = Changed::new(0);
        let wait = |at_least| value.until(move |value| (*value >= at_least).then_some(*value));
        let change = async {
            value.change(|value| *value = 1);
            value.change(|value| *value += 1);
        };
        let (one, two, ()) = LocalPool::new().run_until(async { join!(wait(1), wait(2), change) });
        assert!(one >= 1 && two == 2);
        assert_eq!(value.look(|value| *value), 2);
    }
}
