//! The host's end of a byte stream of the guest's: a serial port's, a console port's.
//!
//! ```text
//!   guest --> [OutputRing, drops its oldest] --write--> HostEnd --> socket, pipe, terminal
//!   guest <------------------------------------read--- HostEnd
//! ```
//!
//! The host end's life:
//!
//! ```text
//!   Watched --- closed by the host, input still unread ---> Draining (not watched: a hang-up can't be masked) --- read to its end ---> Gone
//!      '------- closed by the host, nothing unread -------------------------------------------------------------------------------------^
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::dispatch::EventSet;

/// A ring that has been emptied gives back what it took beyond this, unless it was made with all its room.
const KEPT_ROOM: usize = 16 * 1024;

/// The C library makes a block of this size a mapping of its own, of pages that nobody has used.
const OWN_MAPPING: usize = 128 * 1024;

/// Bytes to the host: bounded, in order, the oldest are dropped.
#[derive(Debug)]
pub(crate) struct OutputRing {
    bytes: VecDeque<u8>,
    capacity: usize,
    kept: usize,
    dropped: u64,
}

impl OutputRing {
    /// A ring that takes its memory now: for a vCPU's thread, whose writes must not end in the allocator. Pages that are never touched
    /// cost nothing, so it takes a block large enough to be made of such.
    pub(crate) fn with_room(capacity: usize) -> Self {
        let bytes = VecDeque::with_capacity(capacity.max(OWN_MAPPING));
        Self {
            kept: bytes.capacity(),
            bytes,
            ..Self::new(capacity)
        }
    }

    /// A ring that takes memory as it fills, and gives it back when it is empty.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            capacity,
            kept: KEPT_ROOM,
            dropped: 0,
        }
    }

    /// The most bytes it holds.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes dropped since the ring was made.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Counts bytes that were lost on their way from here.
    pub(crate) fn count_dropped(&mut self, bytes: usize) {
        self.dropped += bytes as u64;
    }

    pub(crate) fn push(&mut self, byte: u8) {
        if self.bytes.len() >= self.capacity {
            self.dropped += 1;
            if self.bytes.pop_front().is_none() {
                return;
            }
        }
        self.bytes.push_back(byte);
    }

    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let excess = (self.bytes.len() + newest.len()).saturating_sub(self.capacity);
        self.dropped += (bytes.len() - newest.len() + excess) as u64;
        self.bytes.drain(..excess);
        self.bytes.extend(newest);
    }

    /// Moves the oldest bytes to `to`; how many.
    pub(crate) fn take(&mut self, to: &mut [u8]) -> usize {
        let n = to.len().min(self.bytes.len());
        for (to, byte) in to.iter_mut().zip(self.bytes.drain(..n)) {
            *to = byte;
        }
        n
    }

    /// The oldest bytes that lie together; none only if none wait.
    pub(crate) fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Forgets the `n` oldest bytes, or as many as there are.
    pub(crate) fn consume(&mut self, n: usize) {
        self.bytes.drain(..n.min(self.bytes.len()));
        if self.bytes.is_empty() && self.bytes.capacity() > self.kept {
            self.bytes = VecDeque::new();
        }
    }

    /// Forgets the bytes that wait; how many.
    pub(crate) fn clear(&mut self) -> usize {
        let n = self.bytes.len();
        self.consume(n);
        n
    }
}

/// Where the host end is in its life (see the module's head).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Watched,
    Draining,
    Gone,
}

/// What came of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrote {
    /// So many bytes were taken.
    Bytes(usize),
    /// The host takes no more for now.
    Blocked,
    /// The host takes no more ever.
    Closed,
}

/// What is to be done about watching the host end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    Modify(EventSet),
    Remove,
}

/// The host end: a stream socket, pipe or terminal. A pipe's end works in its own direction only.
#[derive(Debug)]
pub(crate) struct HostEnd {
    fd: OwnedFd,
    life: Life,
    watched: EventSet,
    can_read: bool,
    can_write: bool,
}

impl HostEnd {
    /// Makes `fd` nonblocking. Its owner starts to watch it for nothing (a hang-up comes in any case) and then follows
    /// [`watch_for`](Self::watch_for).
    ///
    /// # Errors
    ///
    /// It is not open.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let mode = flags & OFlags::RWMODE;
        Ok(Self {
            fd,
            life: Life::Watched,
            watched: EventSet::empty(),
            can_read: mode != OFlags::WRONLY,
            can_write: mode != OFlags::RDONLY,
        })
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Whether input may still come.
    pub(crate) fn can_read(&self) -> bool {
        self.can_read
    }

    /// Whether output may still go out.
    pub(crate) fn can_write(&self) -> bool {
        self.can_write
    }

    /// Output goes nowhere from now on. True the first time.
    pub(crate) fn close_output(&mut self) -> bool {
        std::mem::take(&mut self.can_write)
    }

    /// The host's end was closed: what came before can still be read. The caller has ended watching.
    pub(crate) fn hang_up(&mut self) {
        self.can_write = false;
        self.life = Life::Draining;
    }

    /// Reads into `buffer`, which is not empty; how many bytes. 0: none for now, or, if [`can_read`](Self::can_read) says so, ever.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        while self.can_read {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(n @ 1..) => return n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.life == Life::Watched => return 0,
                // The end of the input, or a host end that broke: no more comes either way.
                Ok(0) | Err(_) => self.can_read = false,
            }
        }
        0
    }

    /// Writes `bytes`, which are not none, or the first of them.
    pub(crate) fn write(&self, bytes: &[u8]) -> Wrote {
        if !self.can_write {
            return Wrote::Closed;
        }
        loop {
            match rustix::io::write(&self.fd, bytes) {
                Ok(n) => return Wrote::Bytes(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Wrote::Blocked,
                Err(_) => return Wrote::Closed,
            }
        }
    }

    /// What has to change so that the host end is watched for input and for being writable as wanted, beside the hang-up that always comes.
    /// One that can do neither is not watched any more.
    pub(crate) fn watch_for(&mut self, input: bool, writable: bool) -> Option<Watch> {
        let was = self.life;
        if !self.can_read && !self.can_write {
            self.life = Life::Gone;
        }
        if was != Life::Watched {
            return None;
        }
        if self.life == Life::Gone {
            return Some(Watch::Remove);
        }
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.can_read && input);
        wanted.set(EventSet::OUT, self.can_write && writable);
        let changes = wanted != self.watched;
        self.watched = wanted;
        changes.then_some(Watch::Modify(wanted))
    }

    /// Waits until the host takes output again. False: not before `deadline`.
    pub(crate) fn wait_writable(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&left)) {
                Ok(ready) => return ready > 0,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsRawFd for HostEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
