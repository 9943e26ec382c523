//! The host's side of a serial port: what its thread does (the states are drawn in [`serial`](super), the host end's in
//! [`stream`](crate::stream)).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::{BATCH_INTERVAL, INPUT_BACKLOG, INPUT_LOW, Output, Serial};
use crate::dispatch::{DeviceError, DeviceEvent, DispatchDevice, EventSet, Watches};
use crate::stream::{HostEnd, Life, Watch, Wrote};

/// Tokens of the watched descriptors.
const DOORBELL: u32 = 0;
const HOST: u32 = 1;
const TICK: u32 = 2;

/// Bytes moved by one system call, at most.
const CHUNK: usize = 4096;

/// Chunks written before the loop looks at its other events.
const CHUNKS_A_TURN: usize = 16;

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
    pub(super) host: HostEnd,
    timer: OwnedFd,
    ticking: bool,
    /// Output taken out of the ring and not yet written: `chunk[written..filled]`.
    chunk: Box<[u8; CHUNK]>,
    written: usize,
    filled: usize,
    /// The host takes no more for now: it is watched for being writable.
    pub(super) blocked: bool,
    /// The guest has enough input for now: the doorbell will tell.
    paused: bool,
}

impl SerialLoop {
    pub(super) fn new(port: Arc<Serial>, fd: OwnedFd) -> io::Result<Self> {
        let host = HostEnd::new(fd)?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        if !host.can_write() {
            port.state().discard();
        }
        Ok(Self {
            port,
            host,
            timer,
            ticking: false,
            chunk: Box::new([0; CHUNK]),
            written: 0,
            filled: 0,
            blocked: false,
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
            match self.host.write(&self.chunk[self.written..self.filled]) {
                Wrote::Bytes(n) => {
                    self.written += n;
                    wrote = true;
                }
                Wrote::Blocked => return Written::Blocked,
                Wrote::Closed => return Written::Closed,
            }
        }
        Written::Some
    }

    /// Brings output on, after whatever event.
    fn pump_output(&mut self, watches: &Watches<'_, '_>) -> Result<(), DeviceError> {
        if !self.host.can_write() {
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
        if self.host.close_output() {
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
        while self.host.can_read() {
            {
                let mut state = self.port.state();
                self.paused = state.backlog.len() > INPUT_LOW;
                state.input_paused = self.paused;
            }
            if self.paused {
                return;
            }
            let n = self.host.read(&mut buffer);
            if n > 0 {
                let mut state = self.port.state();
                state.backlog.extend(&buffer[..n]);
                let after = state.settle();
                drop(state);
                self.port.finish(after);
            }
            if self.host.life() == Life::Watched {
                return;
            }
        }
    }

    /// The host's end is closed.
    fn hang_up(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        self.close_output(watches)?;
        watches.remove(&self.host)?;
        self.host.hang_up();
        self.pump_input();
        Ok(())
    }

    /// Watches the host end for what is wanted of it now.
    fn rewatch(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        match self.host.watch_for(!self.paused, self.blocked) {
            Some(Watch::Modify(events)) => watches.modify(&self.host, HOST, events),
            Some(Watch::Remove) => watches.remove(&self.host),
            None => Ok(()),
        }
    }
}

impl DispatchDevice for SerialLoop {
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        watches.add(&self.port.doorbell, DOORBELL, EventSet::IN)?;
        watches.add(&self.timer, TICK, EventSet::IN)?;
        watches
            .add(&self.host, HOST, EventSet::empty())
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
            _ if self.host.life() == Life::Watched => {
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
        while self.host.can_write() {
            let go_on = match self.write_out() {
                Written::All(_) => return,
                Written::Some => Instant::now() < deadline,
                Written::Blocked => self.host.wait_writable(deadline),
                Written::Closed => false,
            };
            if !go_on {
                let mut state = self.port.state();
                let left = state.ring.clear();
                state.ring.count_dropped(self.filled - self.written + left);
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
