//! Threads that do what would make the loop wait. They are started when there is work for them, and sleep when there is none.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Done, Engine, EngineKind};
use crate::dispatch::panic_message;
use crate::interrupt::lock;
use crate::virtio::block::backend::{Backend, Job};

/// Most threads of one device. Storage that is slower than memory serves some requests at once; more threads than this only cost memory.
const MOST_THREADS: usize = 4;
/// A thread's stack, in bytes: twice what the format's code is allowed.
const STACK: usize = 256 << 10;

/// A job under way, with what it points into.
struct Item {
    id: u32,
    job: Job,
    memory: GuestMemoryMmap,
}

#[derive(Default)]
struct Work {
    items: VecDeque<Item>,
    threads: usize,
    idle: usize,
    ended: bool,
}

struct Shared {
    backend: Arc<dyn Backend>,
    work: Mutex<Work>,
    more_work: Condvar,
    done: Mutex<Vec<Done>>,
    /// Length of `done`.
    count: AtomicUsize,
    more_done: Condvar,
    /// The loop sleeps, or is about to: it has to be woken.
    asleep: AtomicBool,
    event: EventFd,
}

impl Shared {
    fn finish(&self, done: Done) {
        let mut all = lock(&self.done);
        all.push(done);
        self.count.store(all.len(), Ordering::SeqCst);
        drop(all);
        self.more_done.notify_one();
        if self.asleep.swap(false, Ordering::SeqCst) {
            // An eventfd that cannot take more is readable anyway.
            let _ = self.event.write(1);
        }
    }

    fn run(&self, item: Item) {
        let Item { id, job, memory } = item;
        let result = catch_unwind(AssertUnwindSafe(|| job.run(&*self.backend))).unwrap_or_else(|panic| {
            Err(io::Error::other(format!(
                "the image cannot be used: {}",
                panic_message(&*panic)
            )))
        });
        self.finish(Done { id, job, result });
        drop(memory);
    }

    fn serve(&self) {
        let mut work = lock(&self.work);
        loop {
            if let Some(item) = work.items.pop_front() {
                drop(work);
                self.run(item);
                work = lock(&self.work);
            } else if work.ended {
                return;
            } else {
                work.idle += 1;
                work = self.more_work.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
            }
        }
    }
}

/// See the module's head.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// No threads yet.
    ///
    /// # Errors
    ///
    /// The host gives no eventfd.
    pub(super) fn new(backend: Arc<dyn Backend>) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                backend,
                work: Mutex::default(),
                more_work: Condvar::new(),
                done: Mutex::default(),
                count: AtomicUsize::new(0),
                more_done: Condvar::new(),
                asleep: AtomicBool::new(false),
                event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            }),
        })
    }

    /// Starts a thread; where the host gives none and there is none yet, the loop does the work itself.
    fn grow(&self) {
        let shared = self.shared.clone();
        let started = std::thread::Builder::new()
            .name("block-io".into())
            .stack_size(STACK)
            .spawn(move || shared.serve());
        match started {
            Ok(_) => lock(&self.shared.work).threads += 1,
            Err(error) => {
                tracing::warn!(%error, "no thread for a disk");
                while lock(&self.shared.work).threads == 0 {
                    let Some(item) = lock(&self.shared.work).items.pop_front() else {
                        return;
                    };
                    self.shared.run(item);
                }
            }
        }
    }
}

impl Engine for Pool {
    fn kind(&self) -> EngineKind {
        EngineKind::Threads
    }

    fn is_for_batches(&self) -> bool {
        false
    }

    fn submit(&mut self, id: u32, job: Job, memory: &GuestMemoryMmap) {
        let memory = memory.clone();
        let mut work = lock(&self.shared.work);
        work.items.push_back(Item { id, job, memory });
        let short = work.items.len() > work.idle && work.threads < MOST_THREADS;
        drop(work);
        self.shared.more_work.notify_one();
        if short {
            self.grow();
        }
    }

    fn kick(&mut self) {}

    fn pending(&self) -> bool {
        self.shared.count.load(Ordering::SeqCst) > 0
    }

    fn completed(&mut self, done: &mut Vec<Done>) {
        if self.pending() {
            let mut all = lock(&self.shared.done);
            done.append(&mut all);
            self.shared.count.store(0, Ordering::SeqCst);
        }
    }

    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        let mut done = lock(&self.shared.done);
        while done.is_empty() {
            done = match deadline {
                None => self.shared.more_done.wait(done).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let waited = self.shared.more_done.wait_timeout(done, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }

    fn fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn before_sleep(&mut self) -> bool {
        self.shared.asleep.store(true, Ordering::SeqCst);
        self.pending()
    }

    fn woken(&mut self) {
        // Not readable any more: woken for something else.
        let _ = self.shared.event.read();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // The threads end by themselves once they have done what they are doing; what points into guest memory keeps it mapped.
        lock(&self.shared.work).ended = true;
        self.shared.more_work.notify_all();
    }
}
