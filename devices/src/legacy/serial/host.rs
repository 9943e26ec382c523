//! The host's side of a serial port: what its thread does (the states are drawn in [`serial`](super)).
//!
//! The host end's life:
//!
//! ```text
//!   Watched --- closed by the host, input still unread ---> Draining (not watched: a hang-up can't be masked) --- read to its end ---> Gone
//!      '------- closed by the host, nothing unread -------------------------------------------------------------------------------------^
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::{BATCH_INTERVAL, INPUT_BACKLOG, INPUT_LOW, Output, Serial};
use crate::dispatch::{DeviceError, DeviceEvent, DispatchDevice, EventSet, Watches};

/// Tokens of the watched descriptors.
const DOORBELL: u32 = 0;
const HOST: u32 = 1;
const TICK: u32 = 2;

/// Bytes moved by one system call, at most.
const CHUNK: usize = 4096;

/// Chunks written before the loop looks at its other events.
const CHUNKS_A_TURN: usize = 16;

/// The host end of the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host {
    Watched,
    Draining,
    Gone,
}

/// What came of writing output.
enum Written {
    /// Everything that there was; whether that was anything.
    All(bool),
    /// Enough for this turn; there may be more.
    Some,
    /// The host takes no more for now.
    Blocked,
    /// The host takes no more ever.
    Closed,
}

/// Moves bytes between a [`Serial`] and its host end; made by [`Serial::host_loop`].
pub struct SerialLoop {
    port: Arc<Serial>,
    fd: OwnedFd,
    pub(super) host: Host,
    /// What the host end is watched for now.
    watched: EventSet,
    timer: OwnedFd,
    ticking: bool,
    /// Output taken out of the ring and not yet written: `chunk[written..filled]`.
    chunk: Box<[u8; CHUNK]>,
    written: usize,
    filled: usize,
    /// The host takes no more for now: it is watched for being writable.
    pub(super) blocked: bool,
    can_write: bool,
    can_read: bool,
    /// The guest has enough input for now: the doorbell will tell.
    paused: bool,
}

impl SerialLoop {
    pub(super) fn new(port: Arc<Serial>, fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let mode = flags & OFlags::RWMODE;
        let (can_read, can_write) = (mode != OFlags::WRONLY, mode != OFlags::RDONLY);
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        if !can_write {
            port.state().discard();
        }
        Ok(Self {
            port,
            fd,
            host: Host::Watched,
            watched: EventSet::empty(),
            timer,
            ticking: false,
            chunk: Box::new([0; CHUNK]),
            written: 0,
            filled: 0,
            blocked: false,
            can_write,
            can_read,
            paused: false,
        })
    }

    /// Writes what the ring holds until it is empty, the turn is over, or the host takes no more.
    fn write_out(&mut self) -> Written {
        let mut wrote = false;
        for _ in 0..CHUNKS_A_TURN {
            if self.written == self.filled {
                let mut state = self.port.state();
                self.filled = state.ring.take(&mut self.chunk[..]);
                self.written = 0;
                if self.filled == 0 {
                    // Under the same lock as the look at the ring, so the next byte finds a loop that either sleeps or will look.
                    state.output = if wrote { Output::Batching } else { Output::Asleep };
                    return Written::All(wrote);
                }
                state.output = Output::Working;
            }
            match rustix::io::write(&self.fd, &self.chunk[self.written..self.filled]) {
                Ok(n) => {
                    self.written += n;
                    wrote = true;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Written::Blocked,
                Err(_) => return Written::Closed,
            }
        }
        Written::Some
    }

    /// Brings output on, after whatever event.
    fn pump_output(&mut self, watches: &Watches<'_, '_>) -> Result<(), DeviceError> {
        if !self.can_write {
            return Ok(());
        }
        let written = self.write_out();
        self.blocked = matches!(written, Written::Blocked);
        match written {
            Written::All(wrote) => self.tick(wrote),
            Written::Some => Ok(self.port.doorbell.write(1)?),
            Written::Blocked => self.tick(false),
            Written::Closed => self.close_output(watches),
        }
    }

    /// Starts or stops the timer that ends each batch.
    fn tick(&mut self, on: bool) -> Result<(), DeviceError> {
        if on != self.ticking {
            let interval = Timespec {
                tv_sec: 0,
                tv_nsec: if on { BATCH_INTERVAL.as_nanos() as i64 } else { 0 },
            };
            let times = Itimerspec {
                it_interval: interval,
                it_value: interval,
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &times)?;
            self.ticking = on;
        }
        Ok(())
    }

    /// Output goes nowhere from now on.
    fn close_output(&mut self, watches: &Watches<'_, '_>) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.can_write) {
            self.port.state().discard();
            (self.written, self.filled, self.blocked) = (0, 0, false);
            watches.report(DeviceEvent::HostClosed {
                device: watches.device().into(),
            });
            self.tick(false)?;
        }
        Ok(())
    }

    /// Takes input from the host while the guest has little. A drained host is read to its end, a watched one for one turn.
    fn pump_input(&mut self) {
        let mut buffer = [0; INPUT_BACKLOG - INPUT_LOW];
        while self.can_read {
            {
                let mut state = self.port.state();
                self.paused = state.backlog.len() > INPUT_LOW;
                state.input_paused = self.paused;
            }
            if self.paused {
                return;
            }
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(n @ 1..) => {
                    let mut state = self.port.state();
                    state.backlog.extend(&buffer[..n]);
                    let after = state.settle();
                    drop(state);
                    self.port.finish(after);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.host == Host::Watched => return,
                // The end of the input, or a host end that broke: no more comes either way.
                Ok(0) | Err(_) => self.can_read = false,
            }
            if self.host == Host::Watched {
                return;
            }
        }
    }

    /// The host's end is closed.
    fn hang_up(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        self.close_output(watches)?;
        watches.remove(&self.fd)?;
        self.host = Host::Draining;
        self.pump_input();
        Ok(())
    }

    /// Watches the host end for what is wanted of it now.
    fn rewatch(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        if !self.can_read && !self.can_write {
            if self.host == Host::Watched {
                watches.remove(&self.fd)?;
            }
            self.host = Host::Gone;
        }
        let wanted = self.wanted();
        if self.host == Host::Watched && wanted != self.watched {
            watches.modify(&self.fd, HOST, wanted)?;
            self.watched = wanted;
        }
        Ok(())
    }

    /// The events that the host end is to be watched for, beside the hang-up that always comes.
    fn wanted(&self) -> EventSet {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.can_read && !self.paused);
        wanted.set(EventSet::OUT, self.can_write && self.blocked);
        wanted
    }

    /// Waits until the host takes output again. False: not before `deadline`.
    fn wait_writable(&self, deadline: Instant) -> bool {
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

impl DispatchDevice for SerialLoop {
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        watches.add(&self.port.doorbell, DOORBELL, EventSet::IN)?;
        watches.add(&self.timer, TICK, EventSet::IN)?;
        self.watched = self.wanted();
        watches
            .add(&self.fd, HOST, self.watched)
            .map_err(|e| format!("the host end cannot be watched: {e}"))?;
        self.pump_output(watches)?;
        self.rewatch(watches)
    }

    fn ready(&mut self, token: u32, events: EventSet, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        match token {
            DOORBELL => {
                // Nonblocking; all that it can say is that somebody rang.
                let _ = self.port.doorbell.read();
                self.pump_output(watches)?;
                if self.paused {
                    self.pump_input();
                }
            }
            TICK => {
                let mut expirations = [0; 8];
                // Nonblocking; a tick that was stopped meanwhile gives nothing, and looking once more does no harm.
                let _ = rustix::io::read(&self.timer, &mut expirations);
                self.pump_output(watches)?;
            }
            _ if self.host == Host::Watched => {
                if events.contains(EventSet::OUT) {
                    self.pump_output(watches)?;
                }
                if events.contains(EventSet::IN) {
                    self.pump_input();
                }
                if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                    self.hang_up(watches)?;
                }
            }
            _ => {}
        }
        self.rewatch(watches)
    }

    /// Brings out all output; what the host does not take by `deadline` counts as dropped.
    fn stop(&mut self, deadline: Instant) {
        while self.can_write {
            let go_on = match self.write_out() {
                Written::All(_) => return,
                Written::Some => Instant::now() < deadline,
                Written::Blocked => self.wait_writable(deadline),
                Written::Closed => false,
            };
            if !go_on {
                let mut state = self.port.state();
                state.ring.dropped += (self.filled - self.written + state.ring.clear()) as u64;
                return;
            }
        }
    }

    fn quarantine(&mut self) {
        self.port.state().discard();
    }
}

impl Drop for SerialLoop {
    fn drop(&mut self) {
        self.port.state().discard();
    }
}
