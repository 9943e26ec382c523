//! A device's dispatch loop: one thread with its own event manager, which hands ready file descriptors to the device.
//!
//! ```text
//!            begin                 start ok                 stop requested
//!   (none) --------> starting --------------> running --------------------> stopping (device.stop) ---> ended: Ok
//!                       |  setup or start         |  handler panics or                                      ^
//!                       |  fails or panics        |  returns an error                                       |
//!                       v                         v                                                         |
//!             wait returns StartError   quarantined: device.quarantine(), dropped, DeviceEvent::Failed -> ended: Err
//! ```
//!
//! - `setup` runs on the thread before anything else: it narrows the thread's system-call filter. The epoll and the stop eventfd exist by then.
//! - `wait` returns only when the device has started, so a failure to start is its result and not a message somebody has to look for. `spawn` does
//!   both; who has many devices begins them all, and then waits.
//! - Whoever has many ends them together, too: `stop_all` asks all of them, started or not, before it joins any, and waits for them only once.
//! - What a device watches (queue doorbells, host files, timerfds) it registers under tokens of its own through [`Watches`].
//! - Nothing here is on a vCPU's path: a device shares with its bus side whatever it needs, behind locks that it never holds in a system call.
//!
//! System calls of the loop itself, beside those of the device and of the allocator and locks (`futex`, `mmap`, `munmap`, `madvise`, `brk`,
//! `mprotect`): `epoll_wait`, `epoll_ctl`, `read` and `write` on eventfds, `close`, `clock_gettime`, and at the thread's end `sigaltstack`,
//! `rt_sigprocmask` and `exit`. A panic's message needs `write` to standard error; builds with debug assertions call `fcntl` before a `close`.

mod error;
mod event;

use std::any::Any;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use error::{StartError, StopError};
pub use event::{DeviceEvent, DeviceReporter};
pub use event_manager::EventSet;

use crate::interrupt::lock;

/// Why a device cannot start or go on: anything that explains itself in a sentence.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// How long a loop may take beyond the deadline it was given before it counts as hung.
pub const HANG_GRACE: Duration = Duration::from_secs(1);

/// Events taken from one `epoll_wait`; more wait for the next.
const EVENTS_PER_WAIT: usize = 32;

/// The deadline of a stop that may take as long as it likes: a year.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Longest reason kept of a panic, in bytes: a message may quote what a guest wrote.
const REASON_MAX: usize = 256;

/// What runs in a [`DispatchLoop`].
pub trait DispatchDevice: Send {
    /// Registers what the device watches. Runs once, on the loop's thread, after its setup.
    ///
    /// # Errors
    ///
    /// Whatever keeps the device from working: [`DispatchLoop::spawn`] returns it.
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError>;

    /// Handles `events` on the descriptor that was registered with `token`.
    ///
    /// # Errors
    ///
    /// Only what the device cannot go on after: the loop ends, and the device is quarantined and reported.
    fn ready(&mut self, token: u32, events: EventSet, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError>;

    /// The loop ends as asked: brings out what must not be lost, at the latest by `deadline`.
    fn stop(&mut self, deadline: Instant) {
        let _ = deadline;
    }

    /// The loop ends because the device failed: makes its bus side answer without it. Called even after a panic, so it should only set
    /// flags.
    fn quarantine(&mut self) {}
}

/// What a device's handlers get of their loop: the descriptors that it watches, and the way to report.
pub struct Watches<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    identity: &'a Identity,
}

impl Watches<'_, '_> {
    /// Starts to watch `fd` (level-triggered unless `events` says otherwise); `token` comes back with its events.
    ///
    /// # Errors
    ///
    /// The descriptor is watched already, or cannot be watched (a regular file).
    pub fn add(&mut self, fd: &impl AsRawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        Ok(self.ops.add(Events::with_data_raw(fd.as_raw_fd(), token, events))?)
    }

    /// Changes the events watched on `fd`.
    ///
    /// # Errors
    ///
    /// The descriptor is not watched.
    pub fn modify(&mut self, fd: &impl AsRawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        Ok(self.ops.modify(Events::with_data_raw(fd.as_raw_fd(), token, events))?)
    }

    /// Ends watching `fd`. Must come before the descriptor is closed: its number may be given to another file at once.
    ///
    /// # Errors
    ///
    /// The descriptor is not watched.
    pub fn remove(&mut self, fd: &impl AsRawFd) -> Result<(), DeviceError> {
        Ok(self.ops.remove(Events::empty_raw(fd.as_raw_fd()))?)
    }

    /// The device's name, as given to [`DispatchLoop::spawn`].
    pub fn device(&self) -> &str {
        &self.identity.name
    }

    /// Tells the device's owner. A failure needs no report of its own: the handler's error is reported.
    pub fn report(&self, event: DeviceEvent) {
        self.identity.reporter.report(event);
    }
}

/// Who a loop is, and whom it tells.
struct Identity {
    name: String,
    reporter: Arc<dyn DeviceReporter>,
}

/// How a loop's thread is asked to end.
struct StopRequest {
    fd: EventFd,
    /// By when the device is to have ended its work.
    deadline: Mutex<Option<Instant>>,
}

/// A running dispatch loop (see the module's head). Dropping it stops the loop without time for the device to bring anything out.
pub struct DispatchLoop {
    name: String,
    stop: Arc<StopRequest>,
    /// Gets one message when the thread has ended its work.
    outcome: Receiver<Result<(), String>>,
    thread: Option<JoinHandle<()>>,
}

/// A dispatch loop whose device has not said yet that it has started. Dropping it stops the loop.
pub struct StartingLoop {
    started: Receiver<Result<(), StartError>>,
    the_loop: DispatchLoop,
}

impl StartingLoop {
    /// Waits until the device has started.
    ///
    /// # Errors
    ///
    /// [`StartError`] says which step failed; the thread is gone then, and the reporter has heard nothing.
    pub fn wait(mut self) -> Result<DispatchLoop, StartError> {
        let refused = match self.started.recv() {
            Ok(Ok(())) => return Ok(self.the_loop),
            Ok(Err(refused)) => refused,
            // The sender is dropped unused only when the thread unwinds outside of what it catches.
            Err(_) => StartError::Panicked {
                device: self.the_loop.name.clone(),
                reason: "the thread ended".into(),
            },
        };
        if let Some(thread) = self.the_loop.thread.take() {
            let _ = thread.join();
        }
        Err(refused)
    }
}

impl DispatchLoop {
    /// [`begin`](Self::begin), and waits until the device has started.
    ///
    /// # Errors
    ///
    /// [`StartError`] says which step failed; the thread is gone then, and `reporter` has heard nothing.
    pub fn spawn<D, E>(
        name: impl Into<String>,
        setup: impl FnOnce() -> Result<(), E> + Send + 'static,
        device: D,
        reporter: Arc<dyn DeviceReporter>,
    ) -> Result<Self, StartError>
    where
        D: DispatchDevice + 'static,
        E: std::fmt::Display,
    {
        Self::begin(name, setup, device, reporter)?.wait()
    }

    /// Starts a thread called `name` (of which Linux shows 15 bytes) that runs `setup`, then starts `device` and hands it its events.
    /// Returns before it has done so: who starts many devices waits for all of them together.
    ///
    /// # Errors
    ///
    /// [`StartError::Resources`]: there is no thread then.
    pub fn begin<D, E>(
        name: impl Into<String>,
        setup: impl FnOnce() -> Result<(), E> + Send + 'static,
        device: D,
        reporter: Arc<dyn DeviceReporter>,
    ) -> Result<StartingLoop, StartError>
    where
        D: DispatchDevice + 'static,
        E: std::fmt::Display,
    {
        let name = name.into();
        let resources = |reason: String| StartError::Resources {
            device: name.clone(),
            reason,
        };
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| resources(e.to_string()))?;
        let stop = Arc::new(StopRequest {
            fd,
            deadline: Mutex::new(None),
        });
        let identity = Arc::new(Identity {
            name: name.clone(),
            reporter,
        });
        let subscriber = Subscriber {
            device,
            identity: Arc::clone(&identity),
            stop: Arc::clone(&stop),
            state: State::Running,
        };
        let manager = EventManager::new_with_capacity(EVENTS_PER_WAIT).map_err(|e| resources(e.to_string()))?;

        let (outcome_sender, outcome) = sync_channel(1);
        let (started_sender, started) = sync_channel(1);
        let body = Body { identity, manager };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || body.run(setup, subscriber, started_sender, outcome_sender))
            .map_err(|e| resources(e.to_string()))?;
        Ok(StartingLoop {
            started,
            the_loop: Self {
                name,
                stop,
                outcome,
                thread: Some(thread),
            },
        })
    }

    /// Asks the loop to end and gives the device `within` to bring out what must not be lost; returns at once. A later request replaces the
    /// time left.
    pub fn request_stop(&self, within: Duration) {
        let now = Instant::now();
        self.request_stop_by(now.checked_add(within).unwrap_or(now + FOREVER));
    }

    fn request_stop_by(&self, deadline: Instant) {
        *lock(&self.stop.deadline) = Some(deadline);
        // An eventfd's write fails only when its counter is full, and then the loop has been asked already.
        let _ = self.stop.fd.write(1);
    }

    /// Asks the loop to end, gives the device `within` to bring out what must not be lost, and joins its thread.
    ///
    /// # Errors
    ///
    /// [`StopError::Failed`] if the device failed, now or earlier; [`StopError::Hung`] if the thread has not ended [`HANG_GRACE`] after
    /// `within`.
    pub fn stop(mut self, within: Duration) -> Result<(), StopError> {
        self.request_stop(within);
        self.join(within.saturating_add(HANG_GRACE))
    }

    /// Asks all loops to end, those that are still `starting` as well, gives their devices until `deadline` to bring out what must not be lost,
    /// and joins the threads. However many do not end, it returns at the latest [`HANG_GRACE`] after `deadline`, or after now if that has passed.
    ///
    /// Returns what went wrong, in the order of the loops: [`StopError::Failed`] of each device that failed, now or earlier, or did not start;
    /// [`StopError::Hung`] of each whose thread has not ended by then.
    pub fn stop_all(
        running: impl IntoIterator<Item = Self>,
        starting: impl IntoIterator<Item = StartingLoop>,
        deadline: Instant,
    ) -> Vec<StopError> {
        let starting = starting.into_iter().map(|starting| starting.the_loop);
        let loops: Vec<_> = running.into_iter().chain(starting).collect();
        for one in &loops {
            one.request_stop_by(deadline);
        }
        let give_up = deadline.max(Instant::now()) + HANG_GRACE;
        let mut errors = Vec::new();
        for mut one in loops {
            // Where others took all the time, one that has ended by then still says so.
            errors.extend(one.join(give_up.saturating_duration_since(Instant::now())).err());
        }
        errors
    }

    /// Joins the thread, which was asked to end, if it does so within `patience`.
    fn join(&mut self, patience: Duration) -> Result<(), StopError> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let device = self.name.clone();
        match self.outcome.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => Err(StopError::Hung { device }),
            received => {
                let panicked = thread.join().is_err();
                match received {
                    Ok(Ok(())) if !panicked => Ok(()),
                    Ok(Err(reason)) => Err(StopError::Failed { device, reason }),
                    _ => Err(StopError::Failed {
                        device,
                        reason: "its thread panicked".into(),
                    }),
                }
            }
        }
    }
}

impl Drop for DispatchLoop {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.request_stop(Duration::ZERO);
            if let Err(error) = self.join(HANG_GRACE) {
                tracing::warn!(%error, "dispatch loop dropped");
            }
        }
    }
}

/// What a loop's thread owns.
struct Body<D: DispatchDevice> {
    identity: Arc<Identity>,
    manager: EventManager<Subscriber<D>>,
}

impl<D: DispatchDevice> Body<D> {
    fn run<E: std::fmt::Display>(
        mut self,
        setup: impl FnOnce() -> Result<(), E>,
        subscriber: Subscriber<D>,
        started: SyncSender<Result<(), StartError>>,
        outcome: SyncSender<Result<(), String>>,
    ) {
        let device = || self.identity.name.clone();
        let id = catch_unwind(AssertUnwindSafe(|| {
            setup().map_err(|e| StartError::Setup {
                device: device(),
                reason: e.to_string(),
            })?;
            start(&mut self.manager, subscriber).map_err(|e| StartError::Device {
                device: device(),
                reason: e.to_string(),
            })
        }))
        .unwrap_or_else(|panic| {
            Err(StartError::Panicked {
                device: device(),
                reason: panic_message(&*panic),
            })
        });
        let id = match id {
            Ok(id) => id,
            Err(error) => {
                // Dropping the device runs its code, too. The first reason is the one that counts.
                let _ = caught(|| drop(self.manager));
                // For an owner that does not wait for the start.
                send(&outcome, Err(format!("it did not start: {}", error.reason())));
                return send(&started, Err(error));
            }
        };
        send(&started, Ok(()));
        drop(started);

        let mut result = self.dispatch(id);
        // Dropping the device runs its code, too.
        let dropped = caught(|| drop(self.manager));
        result = result.and(dropped);
        if let Err(reason) = &result {
            let Identity { name, reporter } = &*self.identity;
            reporter.report(DeviceEvent::Failed {
                device: name.clone(),
                reason: reason.clone(),
            });
        }
        send(&outcome, result);
    }

    /// Hands events to the device until it is asked to stop, or fails.
    fn dispatch(&mut self, id: SubscriberId) -> Result<(), String> {
        let result = loop {
            // Handlers' panics are caught one by one in `Subscriber`; this one is for the event manager itself.
            match catch_unwind(AssertUnwindSafe(|| self.manager.run())) {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => break Err(error.to_string()),
                Err(panic) => break Err(panic_message(&*panic)),
            }
            let Ok(subscriber) = self.manager.subscriber_mut(id) else {
                break Err("the loop lost its device".into());
            };
            match std::mem::replace(&mut subscriber.state, State::Running) {
                State::Running => {}
                State::Stopping => {
                    let deadline = lock(&subscriber.stop.deadline).unwrap_or_else(Instant::now);
                    break caught(|| subscriber.device.stop(deadline));
                }
                State::Failed(reason) => break Err(reason),
            }
        };
        if result.is_err()
            && let Ok(subscriber) = self.manager.subscriber_mut(id)
        {
            // The first reason is the one that counts.
            let _ = caught(|| subscriber.device.quarantine());
        }
        result
    }
}

/// Sends to a receiver that may have gone: then nobody wants to know any more.
fn send<T>(sender: &SyncSender<T>, value: T) {
    let _ = sender.send(value);
}

/// Adds the device to the manager and lets it register its descriptors.
fn start<D: DispatchDevice>(
    manager: &mut EventManager<Subscriber<D>>,
    subscriber: Subscriber<D>,
) -> Result<SubscriberId, DeviceError> {
    // Calls `Subscriber::init`, which has no result: a refusal is left in the state.
    let id = manager.add_subscriber(subscriber);
    let subscriber = manager.subscriber_mut(id)?;
    match std::mem::replace(&mut subscriber.state, State::Running) {
        State::Failed(reason) => Err(reason.into()),
        _ => Ok(id),
    }
}

/// What a handler left the loop to do.
enum State {
    Running,
    Stopping,
    Failed(String),
}

/// The device as the event manager knows it.
struct Subscriber<D> {
    device: D,
    identity: Arc<Identity>,
    stop: Arc<StopRequest>,
    state: State,
}

impl<D: DispatchDevice> Subscriber<D> {
    /// The device, with what its handlers get.
    fn parts<'a, 'b>(&'a mut self, ops: &'a mut EventOps<'b>) -> (&'a mut D, Watches<'a, 'b>) {
        (
            &mut self.device,
            Watches {
                ops,
                identity: &self.identity,
            },
        )
    }
}

impl<D: DispatchDevice> MutEventSubscriber for Subscriber<D> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // Runs inside `start`, which catches a panic and reads the state.
        let watched = ops
            .add(Events::new_raw(self.stop.fd.as_raw_fd(), EventSet::IN))
            .map_err(DeviceError::from);
        let (device, mut watches) = self.parts(ops);
        if let Err(error) = watched.and_then(|()| device.start(&mut watches)) {
            self.state = State::Failed(error.to_string());
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if !matches!(self.state, State::Running) {
            return;
        }
        if events.fd() == self.stop.fd.as_raw_fd() {
            self.state = State::Stopping;
            return;
        }
        let (token, set) = (events.data(), events.event_set());
        let (device, mut watches) = self.parts(ops);
        let handled = catch_unwind(AssertUnwindSafe(|| device.ready(token, set, &mut watches)));
        match handled {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.state = State::Failed(error.to_string()),
            Err(panic) => self.state = State::Failed(panic_message(&*panic)),
        }
    }
}

/// Runs `call`, with a panic's message as its error.
fn caught(call: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| panic_message(&*panic))
}

/// The message of a panic, at most [`REASON_MAX`] bytes.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message");
    message[..message.floor_char_boundary(REASON_MAX)].to_owned()
}

#[cfg(any(test, feature = "testing"))]
pub mod stepper;
#[cfg(test)]
mod tests;
