//! The event loop of a thread: file descriptors, timers, tasks and worker threads on one event manager.
//!
//! ```text
//!   run_until:   jobs of other threads -> the future itself -> tasks that were woken -+-> wait for events -> (again)
//!                      ^                                                             |
//!                      +---------- woken meanwhile: no wait, only a look ------------+
//! ```
//!
//! The event manager says which descriptors are ready; what waits for them are futures, polled by a
//! [`FuturesUnordered`], so the loop is fair between tasks and a task costs nothing while it waits. Dispatching only
//! collects wakers: no code of a task runs while the event manager is borrowed, and descriptors can come and go at any
//! time. Any thread may complete what a task waits for; the loop wakes up (see `wake`). A loop may look for events a little longer before it sleeps (see
//! `linger`).

mod async_fd;
mod blocking;
mod linger;
#[cfg(test)]
mod tests;
mod timer;
mod wake;

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::Future,
    io,
    os::fd::{AsFd, AsRawFd},
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use futures::{
    FutureExt, StreamExt,
    future::{AbortHandle, Abortable, LocalBoxFuture},
    stream::FuturesUnordered,
};

use self::{
    async_fd::Source,
    blocking::Pool,
    linger::Linger,
    timer::Timers,
    wake::{MainWake, Root},
};

pub use self::{
    async_fd::{AsyncFd, Direction},
    blocking::Blocking,
    timer::Sleep,
    wake::{ReactorGone, Remote},
};

/// Rounds that the loop goes while tasks keep waking each other before it looks at the descriptors.
const ROUNDS_WITHOUT_EVENTS: u32 = 32;

/// How long a loop that answers calls, or waits for answers, lingers with profit: about what waking a processor takes twice.
pub const LINGER: Duration = Duration::from_micros(50);

/// Worker threads of a loop that may have some, for what always ends.
const WORKER_THREADS: usize = 4;
/// Worker threads of such a loop for what others answer for: each may hang with one of them for good, without holding up the next one.
const FOREIGN_THREADS: usize = 16;

fn manager_error(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        error => io::Error::other(format!("event manager: {error}")),
    }
}

/// What the event manager calls.
enum Subscriber {
    Io(Rc<Source>),
    Wake(Arc<Root>),
    Timer(Rc<Timers>),
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        WOKEN.with_borrow_mut(|woken| match self {
            Self::Io(source) => source.event(events.event_set(), ops, woken),
            Self::Wake(root) => root.clear(),
            Self::Timer(timers) => timers.fired(woken),
        });
    }

    /// Descriptors are added by whoever registers them, who can report an error.
    fn init(&mut self, _: &mut EventOps<'_>) {}
}

thread_local! {
    /// Wakers of what a dispatch made ready, called once the event manager is free again.
    static WOKEN: RefCell<Vec<Waker>> = const { RefCell::new(Vec::new()) };
}

/// What a [`Handle`] leads to.
struct Core {
    events: RefCell<EventManager<Subscriber>>,
    incoming: RefCell<Vec<LocalBoxFuture<'static, ()>>>,
    closed: Cell<bool>,
    linger: RefCell<Linger>,
    timers: Rc<Timers>,
    root: Arc<Root>,
    remote: Remote,
    pool: Pool,
    foreign: Pool,
}

/// The event loop of a thread.
///
/// Dropping it drops every task. [`Handle`]s may outlive it; what they spawn is then dropped at once.
pub struct Reactor {
    core: Rc<Core>,
    tasks: FuturesUnordered<LocalBoxFuture<'static, ()>>,
    root_waker: Waker,
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor")
            .field("tasks", &self.tasks.len())
            .finish_non_exhaustive()
    }
}

impl Reactor {
    /// A loop that makes some worker threads when [`Handle::spawn_blocking`] and [`Handle::spawn_foreign`] are used, and none before.
    ///
    /// # Errors
    /// When the epoll, eventfd or timerfd descriptors cannot be made.
    pub fn new() -> io::Result<Self> {
        Self::with_worker_threads(WORKER_THREADS, FOREIGN_THREADS)
    }

    /// A loop that never makes a thread: [`Handle::spawn_blocking`] is refused.
    ///
    /// # Errors
    /// As [`Reactor::new`].
    pub fn single_threaded() -> io::Result<Self> {
        Self::with_worker_threads(0, 0)
    }

    fn with_worker_threads(threads: usize, foreign: usize) -> io::Result<Self> {
        let mut events = EventManager::new().map_err(manager_error)?;
        let root = Arc::new(Root::new()?);
        let timers = Rc::new(Timers::new()?);
        for (fd, subscriber) in [
            (root.fd().as_raw_fd(), Subscriber::Wake(root.clone())),
            (timers.fd().as_raw_fd(), Subscriber::Timer(timers.clone())),
        ] {
            let id = events.add_subscriber(subscriber);
            let mut ops = events.event_ops(id).map_err(manager_error)?;
            ops.add(Events::new_raw(fd, EventSet::IN)).map_err(manager_error)?;
        }
        let core = Rc::new(Core {
            events: RefCell::new(events),
            incoming: RefCell::default(),
            closed: Cell::new(false),
            linger: RefCell::new(Linger::new(Duration::ZERO)),
            timers,
            root: root.clone(),
            remote: Remote::new(root.clone()),
            pool: Pool::new(threads),
            foreign: Pool::new(foreign),
        });
        Ok(Self {
            core,
            tasks: FuturesUnordered::new(),
            root_waker: Waker::from(root),
        })
    }

    /// Has the loop look for events for at most `most` ([`LINGER`] pays) before it sleeps, as long as some come in that time; zero is never, as it is
    /// unless this is called. It takes processor time, and makes calls one at a time faster.
    pub fn lingering(self, most: Duration) -> Self {
        self.core.linger.replace(Linger::new(most));
        self
    }

    /// What tasks use to reach the loop.
    pub fn handle(&self) -> Handle {
        Handle(self.core.clone())
    }

    /// Drives `future` and all tasks until `future` is done. Tasks that are not done then go on in the next call.
    ///
    /// # Errors
    /// When waiting for events fails, which is a bug or a lack of kernel memory.
    pub fn run_until<F: Future>(&mut self, future: F) -> io::Result<F::Output> {
        let mut future = pin!(future);
        let main = Arc::new(MainWake::new(self.core.root.clone()));
        let main_waker = Waker::from(main.clone());
        let mut busy_rounds = 0;
        loop {
            self.core.root.begin();
            for job in self.core.remote.take_jobs() {
                job(&Handle(self.core.clone()));
            }
            if main.take()
                && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&main_waker))
            {
                return Ok(output);
            }
            self.run_tasks();
            if self.core.root.prepare_sleep() {
                busy_rounds = 0;
                self.core.turn(true)?;
            } else {
                busy_rounds += 1;
                if busy_rounds >= ROUNDS_WITHOUT_EVENTS {
                    busy_rounds = 0;
                    self.core.turn(false)?;
                }
            }
        }
    }

    /// Polls the tasks that were woken. Those that wake themselves or each other wait for the next round.
    fn run_tasks(&mut self) {
        let incoming = self.core.incoming.take();
        self.tasks.extend(incoming);
        let mut cx = Context::from_waker(&self.root_waker);
        while let Poll::Ready(Some(())) = self.tasks.poll_next_unpin(&mut cx) {}
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.core.closed.set(true);
        self.core.remote.close();
        self.tasks.clear();
        drop(self.core.incoming.take());
    }
}

impl Core {
    /// Looks for events for a while, if that is worth it; whether there were any.
    fn linger(&self, mut look: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
        let mut linger = self.linger.borrow_mut();
        let Some(most) = linger.before_sleep() else {
            return Ok(false);
        };
        let begun = Instant::now();
        let mut found = look()?;
        while !found && begun.elapsed() < most {
            std::hint::spin_loop();
            found = look()?;
        }
        linger.lingered(found);
        Ok(found)
    }

    /// Waits for events (or only looks, unless `wait`) and wakes what they are for.
    fn turn(&self, wait: bool) -> io::Result<()> {
        self.timers.arm()?;
        let mut events = self.events.borrow_mut();
        let mut look = |timeout| events.run_with_timeout(timeout).map_err(manager_error);
        if !wait {
            look(0)?;
        } else if !self.linger(|| Ok(look(0)? > 0))? {
            look(-1)?;
        }
        drop(events);
        // Awake: what follows need not write to the eventfd. The next round covers what came while asleep.
        self.root.begin();
        let mut woken = WOKEN.take();
        for waker in woken.drain(..) {
            waker.wake();
        }
        // Keeps its memory for the next turn.
        WOKEN.set(woken);
        Ok(())
    }
}

/// Reaches the loop of this thread. Clones are cheap.
#[derive(Clone)]
pub struct Handle(Rc<Core>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

/// The time for something ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timed out")]
pub struct TimedOut;

impl Handle {
    /// Runs `future` as a task of the loop, until it is done or the loop is dropped. A panic in it is logged and ends
    /// only that task.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        if self.0.closed.get() {
            return;
        }
        let task = AssertUnwindSafe(future).catch_unwind().map(|result| {
            if let Err(panic) = result {
                tracing::error!(panic = crate::transport::panic_message(&*panic), "a task panicked");
            }
        });
        self.0.incoming.borrow_mut().push(task.boxed_local());
        self.0.root.notify();
    }

    /// Runs `future` as a task that ends when the returned [`Task`] is dropped.
    pub fn spawn_owned(&self, future: impl Future<Output = ()> + 'static) -> Task {
        let (abort, registration) = AbortHandle::new_pair();
        self.spawn(Abortable::new(future, registration).map(|_| ()));
        Task(abort)
    }

    /// Puts a descriptor on the loop and makes it non-blocking.
    ///
    /// # Errors
    /// `PermissionDenied` for what cannot be waited for, such as an ordinary file; `AlreadyExists` for what is
    /// registered; or a lack of kernel memory.
    pub fn register<T: AsFd>(&self, fd: T) -> io::Result<AsyncFd<T>> {
        AsyncFd::new(self, fd)
    }

    /// Waits for `duration`.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let now = Instant::now();
        // A century stands for "never" where the sum cannot be represented.
        let never = Duration::from_secs(100 * 365 * 24 * 3600);
        self.deadline(now.checked_add(duration).unwrap_or(now + never))
    }

    /// Waits until `deadline`.
    pub fn deadline(&self, deadline: Instant) -> Sleep {
        Sleep::new(self.0.timers.clone(), deadline)
    }

    /// Drives `future`, for at most `duration`.
    ///
    /// # Errors
    /// [`TimedOut`], with `future` dropped.
    pub async fn timeout<F: Future>(&self, duration: Duration, future: F) -> Result<F::Output, TimedOut> {
        let mut sleep = self.sleep(duration);
        let mut future = pin!(future);
        futures::future::poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            Pin::new(&mut sleep).poll(cx).map(|()| Err(TimedOut))
        })
        .await
    }

    /// Does work that may block, but always ends, on a worker thread.
    ///
    /// On a loop without worker threads the future resolves to an error of kind `Unsupported`.
    pub fn spawn_blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Blocking<T> {
        self.0.pool.run(work)
    }

    /// Does work on another worker thread that may hang for as long as somebody else likes: on files that others have named or handed over, which may lie on
    /// dead storage, or in a file system that is a program's. It holds up nothing but other work of its kind, and that only where much of it hangs.
    ///
    /// On a loop without worker threads the future resolves to an error of kind `Unsupported`.
    pub fn spawn_foreign<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Blocking<T> {
        self.0.foreign.run(work)
    }

    /// What other threads use to reach the loop.
    pub fn remote(&self) -> Remote {
        self.0.remote.clone()
    }
}

/// A task that ends when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the task"]
pub struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
