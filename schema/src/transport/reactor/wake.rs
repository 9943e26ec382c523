//! Waking the loop: from its own tasks, and from other threads while it sleeps.
//!
//! ```text
//!             begin()                    prepare_sleep()
//!   RUNNING <--------- NOTIFIED   RUNNING --------------> SLEEPING
//!      |                  ^                                  |
//!      +---- wake() ------+<-------- wake() + eventfd -------+
//! ```
//!
//! A wake-up that comes while the loop runs costs one atomic exchange. Only one that finds the loop asleep, which can
//! only come from another thread, writes to the eventfd.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    task::Wake,
};

use rustix::event::EventfdFlags;

use super::Handle;

const RUNNING: u8 = 0;
const NOTIFIED: u8 = 1;
const SLEEPING: u8 = 2;

/// The waker that every task of a loop leads to.
pub(super) struct Root {
    state: AtomicU8,
    event: OwnedFd,
}

impl Root {
    pub(super) fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            state: AtomicU8::new(NOTIFIED),
            event,
        })
    }

    pub(super) fn notify(&self) {
        if self.state.swap(NOTIFIED, Ordering::SeqCst) == SLEEPING {
            // Can only fail by overflowing, and then the loop has a wake-up pending already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// A round begins: every wake-up so far is covered by it.
    pub(super) fn begin(&self) {
        self.state.swap(RUNNING, Ordering::SeqCst);
    }

    /// Whether the loop may sleep: nothing woke it since [`Root::begin`]. From here on a wake-up goes through the eventfd.
    pub(super) fn prepare_sleep(&self) -> bool {
        self.state
            .compare_exchange(RUNNING, SLEEPING, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Empties the eventfd.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Wake for Root {
    fn wake(self: Arc<Self>) {
        self.notify();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.notify();
    }
}

/// Wakes the future that `run_until` drives: it is polled only when it was woken itself.
pub(super) struct MainWake {
    root: Arc<Root>,
    woken: AtomicBool,
}

impl MainWake {
    pub(super) fn new(root: Arc<Root>) -> Self {
        Self {
            root,
            woken: AtomicBool::new(true),
        }
    }

    pub(super) fn take(&self) -> bool {
        self.woken.swap(false, Ordering::SeqCst)
    }
}

impl Wake for MainWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        self.root.notify();
    }
}

type Job = Box<dyn FnOnce(&Handle) + Send>;

struct Shared {
    root: Arc<Root>,
    /// `None` once the loop is gone.
    jobs: Mutex<Option<VecDeque<Job>>>,
}

/// Reaches a loop from another thread.
#[derive(Clone)]
pub struct Remote(Arc<Shared>);

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").finish_non_exhaustive()
    }
}

/// The loop that a [`Remote`] led to has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the event loop has ended")]
pub struct ReactorGone;

impl Remote {
    pub(super) fn new(root: Arc<Root>) -> Self {
        Self(Arc::new(Shared {
            root,
            jobs: Mutex::new(Some(VecDeque::new())),
        }))
    }

    /// Runs `job` on the loop's thread, after those handed over earlier. A job that comes after the last round of the
    /// loop is dropped unrun.
    ///
    /// # Errors
    /// [`ReactorGone`] when the loop has been dropped.
    pub fn run(&self, job: impl FnOnce(&Handle) + Send + 'static) -> Result<(), ReactorGone> {
        match self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(jobs) => jobs.push_back(Box::new(job)),
            None => return Err(ReactorGone),
        }
        self.0.root.notify();
        Ok(())
    }

    /// Makes the loop go round once.
    pub fn wake(&self) {
        self.0.root.notify();
    }

    pub(super) fn take_jobs(&self) -> VecDeque<Job> {
        match self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(jobs) if !jobs.is_empty() => std::mem::take(jobs),
            _ => VecDeque::new(),
        }
    }

    pub(super) fn close(&self) {
        let jobs = self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(jobs);
    }
}
