//! How a device asks for an interrupt: wires ([`InterruptLine`]) and messages ([`Msi`], [`MsiSink`]).
//!
//! Devices know only these traits. The machine connects a wire to a pin of the [`IoApic`](crate::legacy::ioapic::IoApic), and a message to
//! the hypervisor (`KVM_SIGNAL_MSI`, or an irqfd where the message is fixed).
//!
//! A wire's level depends on device state that sits behind a lock, while moving the wire may be a system call. `LevelLatch` lets a
//! device decide the level under its lock and move the wire after releasing it, from any thread, without losing or reordering an edge:
//!
//! ```text
//!    under the lock                      without the lock (one thread at a time: the publisher)
//!    latch.update(level) -> true   ==>   while let Some(l) = { lock; latch.next() } { line.set(l) }
//!                        -> false        (another thread publishes, or nothing changed)
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One interrupt wire from a device.
///
/// Whether "asserted" is electrically high or low is the business of the interrupt controller; a device only says that it wants service
/// (level) or that something happened (a pulse, seen as an edge).
pub trait InterruptLine: Send + Sync {
    /// Asserts the line or releases it. Setting the level that it already has changes nothing.
    fn set(&self, asserted: bool);

    /// Asserts and releases the line: one edge.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A message-signalled interrupt as it goes over the bus (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Message address: bits 20-31 are 0xfee, 12-19 the destination, 3 the redirection hint, 2 the destination mode.
    pub address: u64,
    /// Message data: bits 0-7 the vector, 8-10 the delivery mode, 14 the level, 15 the trigger mode.
    pub data: u32,
}

/// Where messages go: implemented by the machine.
pub trait MsiSink: Send + Sync {
    /// Delivers `msi`. A message that the hypervisor refuses is lost, as on real hardware, so there is no error.
    fn signal(&self, msi: Msi);
}

/// The level that a device wants on its line, and how far that has got: kept under the device's own lock (see the module's head).
#[derive(Debug, Default)]
pub(crate) struct LevelLatch {
    /// What the device wants.
    wanted: bool,
    /// What the line was last told.
    published: bool,
    /// The wanted level fell since the line was told "asserted": the line has to show a new edge even if the level is back.
    fell: bool,
    /// A thread is at work in [`publish`].
    publishing: bool,
}

impl LevelLatch {
    /// Notes the level that the device now wants. True: the caller has become the publisher and must call [`publish`] once it has
    /// released the device's lock.
    #[must_use]
    pub(crate) fn update(&mut self, level: bool) -> bool {
        if self.wanted && !level {
            self.fell = true;
        }
        self.wanted = level;
        let publish = !self.publishing && self.pending();
        self.publishing |= publish;
        publish
    }

    /// Whether the line does not yet show what the device wants.
    fn pending(&self) -> bool {
        self.wanted != self.published || (self.published && self.fell)
    }

    /// The next level to tell the line; `None` ends the caller's time as publisher.
    fn next(&mut self) -> Option<bool> {
        if !self.pending() {
            self.fell = false;
            self.publishing = false;
            return None;
        }
        self.published = !self.published;
        self.fell = false;
        Some(self.published)
    }
}

/// Moves `line` until it shows what the device behind `device` wants, without holding the lock while the line moves. To be called by the
/// thread that got `true` from [`LevelLatch::update`].
pub(crate) fn publish<T>(device: &Mutex<T>, latch: impl Fn(&mut T) -> &mut LevelLatch, line: &dyn InterruptLine) {
    loop {
        let next = latch(&mut lock(device)).next();
        match next {
            Some(level) => line.set(level),
            None => return,
        }
    }
}

/// Locks `mutex` also when a thread panicked while it held it: a quarantined device still has to answer its bus, and every state behind
/// these locks is valid after each single statement that changes it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a publisher to its end, collecting what the line is told.
    fn drain(latch: &mut LevelLatch) -> Vec<bool> {
        std::iter::from_fn(|| latch.next()).collect()
    }

    #[test]
    fn a_level_that_dips_while_it_is_published_makes_a_second_edge() {
        let mut latch = LevelLatch::default();
        assert!(latch.update(true));
        assert_eq!(latch.next(), Some(true));
        // Another thread, while the publisher is on its way to the line.
        assert!(!latch.update(false));
        assert!(!latch.update(true));
        assert_eq!(drain(&mut latch), [false, true]);
    }

    #[test]
    fn an_unchanged_level_needs_no_publisher() {
        let mut latch = LevelLatch::default();
        assert!(!latch.update(false));
        assert!(latch.update(true));
        assert_eq!(drain(&mut latch), [true]);
        assert!(!latch.update(true));
        assert!(latch.update(false));
        assert_eq!(drain(&mut latch), [false]);
    }

    proptest! {
        /// Any interleaving of updates and publisher steps: the line alternates, ends at the wanted level, and shows an edge after
        /// the last rise of the level.
        #[test]
        fn the_line_ends_where_the_device_wants_it(steps in prop::collection::vec((any::<bool>(), any::<bool>()), 1..200)) {
            let mut latch = LevelLatch::default();
            let (mut level, mut publisher, mut line) = (false, false, false);
            let mut edge_owed = false;
            for (is_update, value) in steps {
                if is_update {
                    edge_owed |= value && !level;
                    edge_owed &= value;
                    level = value;
                    let elected = latch.update(value);
                    prop_assert!(!(elected && publisher), "two publishers");
                    publisher |= elected;
                } else if publisher {
                    match latch.next() {
                        Some(next) => {
                            prop_assert_ne!(next, line);
                            line = next;
                            edge_owed &= !next;
                        }
                        None => publisher = false,
                    }
                }
            }
            if publisher {
                for next in drain(&mut latch) {
                    prop_assert_ne!(next, line);
                    line = next;
                    edge_owed &= !next;
                }
            }
            prop_assert_eq!(line, level);
            prop_assert!(!edge_owed);
        }
    }
}
