//! The kernel's notice that tasks stall for memory: pressure stall information (linux/Documentation/accounting/psi.rst).
//!
//! ```text
//!   /proc/pressure/memory <--"some STALL WINDOW"-- Trigger --POLLPRI--> a thread of its own --eventfd--> the loop
//! ```
//!
//! A trigger that is set while the kernel counts for another one may tell at once, of stalls that are long over (about one in forty here, Linux 6.18, by
//! `window_update` in kernel/sched/psi.c). So what comes in a trigger's first window is left out: pressure that lasts is told of in the next one.
//!
//! The notice is POLLPRI, which the loop does not wait for; and whoever polls takes it. So a thread waits, for as long as its [`Notices`] are there.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::OFlags,
};
use sepal_runner::cgroup::{Controller, Hierarchies};
use sepal_schema::transport::{AsyncFd, Handle, reactor::Direction};

use super::policy::Policy;

/// The host's.
const HOST: &str = "/proc/pressure/memory";
/// A control group's own, of version 2.
const OF_GROUP: &str = "memory.pressure";
/// Who is not privileged may only name windows that are multiples of this (Linux 6.5).
const UNPRIVILEGED: Duration = Duration::from_secs(2);

/// A condition that the kernel watches. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Trigger {
    file: File,
    /// When what it tells begins to count.
    counts_from: Instant,
}

impl Trigger {
    /// Has the kernel watch what a policy names. A user without privilege gets the next window that such may have, with the same share.
    ///
    /// # Errors
    /// Why that is not possible, as a clause.
    pub(crate) fn new(policy: &Policy) -> Result<Self, String> {
        let group = Hierarchies::discover()
            .ok()
            .and_then(|found| found.own_group(Controller::Memory));
        let places = [Some(PathBuf::from(HOST)), group.map(|group| group.join(OF_GROUP))];
        let mut first = None;
        for place in places.into_iter().flatten() {
            match Self::at(&place, policy) {
                Ok(trigger) => return Ok(trigger),
                Err(error) => first = first.or(Some(format!("{}: {error}", place.display()))),
            }
        }
        Err(first.unwrap_or_default())
    }

    /// Whether the kernel would watch at all.
    ///
    /// # Errors
    /// As [`Trigger::new`].
    pub(crate) fn try_out() -> Result<(), String> {
        Self::new(&Policy::default()).map(drop)
    }

    fn at(place: &Path, policy: &Policy) -> io::Result<Self> {
        let nonblock = OFlags::NONBLOCK.bits().cast_signed();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nonblock)
            .open(place)?;
        let written = file.write_all(condition(policy.window, policy.stall_percent).as_bytes());
        let window = match written {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let wider = widened(policy.window);
                file.write_all(condition(wider, policy.stall_percent).as_bytes())?;
                wider
            }
            written => {
                written?;
                policy.window
            }
        };
        Ok(Self {
            file,
            counts_from: Instant::now() + window,
        })
    }
}

/// What the kernel takes: the stall and the window in microseconds.
fn condition(window: Duration, percent: u8) -> String {
    let window = window.as_micros();
    let stall = (window * u128::from(percent) / 100).max(1);
    format!("some {stall} {window}\0")
}

/// The next window that one without privilege may have.
fn widened(window: Duration) -> Duration {
    let unit = UNPRIVILEGED.as_millis();
    let count = window.as_millis().div_ceil(unit).max(1);
    UNPRIVILEGED.saturating_mul(u32::try_from(count).unwrap_or(1))
}

/// Notices of pressure. Dropping it ends the thread that waits for them.
pub(crate) struct Notices {
    told: AsyncFd<Arc<OwnedFd>>,
    _end: OwnedFd,
}

impl Notices {
    /// Begins to wait for what `trigger` watches.
    ///
    /// # Errors
    /// There are no descriptors left, or no thread can be made.
    pub(crate) fn new(handle: &Handle, trigger: Trigger) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let told = Arc::new(eventfd(0, flags)?);
        // Closing the writing end is what ends the thread.
        let (ended, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let tell = told.clone();
        thread::Builder::new()
            .name("pressure".into())
            .stack_size(64 * 1024)
            .spawn(move || wait(&trigger, &ended, &tell))?;
        Ok(Self {
            told: handle.register(told)?,
            _end: end,
        })
    }

    /// Waits for the next notice.
    pub(crate) async fn next(&self) {
        let read = |fd: &Arc<OwnedFd>| Ok(rustix::io::read(&**fd, &mut [0; 8])?);
        if self.told.io(Direction::Read, read).await.is_err() {
            // An event counter cannot fail; if it did, there would be no more notices.
            futures::future::pending().await
        }
    }
}

/// Passes notices on until the other end of `ended` is closed, or the kernel watches no more.
fn wait(trigger: &Trigger, ended: &OwnedFd, tell: &OwnedFd) {
    loop {
        let mut fds = [
            PollFd::new(&trigger.file, PollFlags::PRI),
            PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        let [notice, end] = fds.map(|fd| fd.revents());
        if !end.is_empty() {
            return;
        }
        if notice.contains(PollFlags::ERR) {
            tracing::warn!("nobody tells any more when the host runs short of memory: the kernel has ended that");
            return;
        }
        if Instant::now() < trigger.counts_from {
            continue;
        }
        // A counter that is full has been told often enough.
        let _ = rustix::io::write(tell, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::transport::Reactor;

    use super::*;

    #[test]
    fn conditions_have_the_kernels_units() {
        assert_eq!(condition(Duration::from_secs(1), 10), "some 100000 1000000\0");
        assert_eq!(condition(Duration::from_millis(500), 100), "some 500000 500000\0");
        for (window, wider) in [(500, 2), (2000, 2), (2001, 4), (10_000, 10)] {
            assert_eq!(widened(Duration::from_millis(window)), Duration::from_secs(wider));
        }
    }

    #[test]
    fn the_thread_ends_with_its_notices() {
        let Ok(trigger) = Trigger::new(&Policy::default()) else {
            println!("skipped: no pressure stall information");
            return;
        };
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        let threads = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
            names.filter(|name| name.trim() == "pressure").count()
        };
        let before = threads();
        let notices = Notices::new(&handle, trigger).unwrap();
        // What the thread would say.
        rustix::io::write(&**notices.told.get_ref(), &1_u64.to_ne_bytes()).unwrap();
        reactor.run_until(notices.next()).unwrap();
        drop(notices);
        // Its name is there from its first to its last moment.
        while threads() > before {
            thread::yield_now();
        }
    }
}
