//! Worker threads for what would block the loop: opening files on slow storage, name look-ups.
//!
//! Threads are made when work comes and none is idle, up to a small bound; a pool of zero threads never makes one and
//! refuses all work, which is what a jailed component uses.

use std::{
    any::Any,
    collections::VecDeque,
    future::Future,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    thread,
};

use futures::channel::oneshot;

/// Jobs that may wait for a thread; one more is refused.
const MAX_QUEUED: usize = 4096;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

/// A bounded set of worker threads, made on demand.
pub(super) struct Pool {
    shared: Arc<Shared>,
    max_threads: usize,
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(super) fn new(max_threads: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
            }),
            max_threads,
        }
    }

    pub(super) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Blocking<T> {
        let (sender, receiver) = oneshot::channel();
        let job = Box::new(move || {
            // Whoever asked has given up: no need to begin.
            if !sender.is_canceled() {
                let _ = sender.send(catch_unwind(AssertUnwindSafe(job)));
            }
        });
        match self.enqueue(job) {
            Ok(()) => Blocking {
                state: BlockingState::Running(receiver),
            },
            Err(error) => Blocking {
                state: BlockingState::Refused(Some(error)),
            },
        }
    }

    fn enqueue(&self, job: Job) -> io::Result<()> {
        if self.max_threads == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this event loop has no worker threads",
            ));
        }
        let mut state = lock(&self.shared);
        if state.queue.len() >= MAX_QUEUED {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "too much work waits for worker threads",
            ));
        }
        if state.queue.len() >= state.idle && state.threads < self.max_threads {
            let shared = self.shared.clone();
            let made = thread::Builder::new()
                .name("worker".into())
                .spawn(move || work(&shared));
            match made {
                Ok(_) => state.threads += 1,
                // Those that exist will come to it.
                Err(_) if state.threads > 0 => (),
                Err(error) => return Err(error),
            }
        }
        state.queue.push_back(job);
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    /// Lets the threads end on their own: one that hangs on dead storage must not keep the process.
    fn drop(&mut self) {
        let mut state = lock(&self.shared);
        state.closed = true;
        let unrun = std::mem::take(&mut state.queue);
        drop(state);
        drop(unrun);
        self.shared.work.notify_all();
    }
}

fn work(shared: &Shared) {
    let mut state = lock(shared);
    loop {
        if let Some(job) = state.queue.pop_front() {
            drop(state);
            job();
            state = lock(shared);
        } else if state.closed {
            return;
        } else {
            state.idle += 1;
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

enum BlockingState<T> {
    Running(oneshot::Receiver<Result<T, Box<dyn Any + Send>>>),
    Refused(Option<io::Error>),
}

/// The result of work on a worker thread. Dropped before a thread has begun the work, the work is not done.
#[must_use = "the work is skipped when its future is dropped first"]
pub struct Blocking<T> {
    state: BlockingState<T>,
}

impl<T> std::fmt::Debug for Blocking<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blocking").finish_non_exhaustive()
    }
}

impl<T> Unpin for Blocking<T> {}

impl<T> Future for Blocking<T> {
    /// An error when the work was refused (`Unsupported`: the loop has no worker threads; `ResourceBusy`: too much
    /// waits), when no thread could be made, or when the work panicked.
    type Output = io::Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        match &mut self.state {
            BlockingState::Refused(error) => Poll::Ready(Err(error
                .take()
                .unwrap_or_else(|| io::Error::other("polled after its end")))),
            BlockingState::Running(receiver) => Pin::new(receiver).poll(cx).map(|result| match result {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(panic)) => Err(io::Error::other(format!(
                    "a worker thread panicked: {}",
                    crate::transport::panic_message(&*panic)
                ))),
                Err(oneshot::Canceled) => Err(io::Error::other("the event loop has ended")),
            }),
        }
    }
}
