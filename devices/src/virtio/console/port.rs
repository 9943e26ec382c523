//! One port: its two queues, its host end, and what waits in between (drawn in [`console`](super)).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::super::chain::Chain;
use super::super::device::{Context, Fault};
use super::super::queue::Virtqueue;
use super::super::violation::Violation;
use crate::stream::{HostEnd, Life, OutputRing, Watch, Wrote};

/// Bytes of output that wait for the host before the oldest are dropped.
pub const OUTPUT_CAPACITY: usize = 256 * 1024;

/// How long the output of a plain port is held back for a host end that takes no more, before the oldest is dropped.
pub const PATIENCE: Duration = Duration::from_millis(200);

/// Bytes moved by one system call, at most.
pub(super) const CHUNK: usize = 64 * 1024;

/// Bytes and chains moved before the loop looks at its other events.
const BYTES_A_TURN: usize = 1024 * 1024;
const CHAINS_A_TURN: usize = 256;

/// What a port's owner can see of it.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) from_guest: AtomicU64,
    pub(super) to_guest: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) guest_open: AtomicBool,
    pub(super) host_open: AtomicBool,
}

/// See the module's head.
pub(super) struct Port {
    index: usize,
    host: Option<HostEnd>,
    ring: OutputRing,
    /// The host takes no more for now: it is watched for being writable.
    blocked: bool,
    /// How long output is held back then.
    patience: Duration,
    /// Until when it is held back now. `None` while the host takes output, and after it has not done so in time.
    held: Option<Instant>,
    /// The host has taken something since it last took no more.
    progress: bool,
    /// The host takes no more ever, which its owner has not been told yet.
    closed: bool,
    /// A chain of the transmit queue of which so many bytes have been taken.
    sending: Option<(Chain, u32)>,
    /// Input taken from the host for which the driver had no room.
    input: Vec<u8>,
    /// The driver has no more room for input: its doorbell will tell.
    starved: bool,
    counters: Arc<Counters>,
}

/// Queue of the port's input (virtio 5.3.2).
pub(super) fn receive_queue(port: usize) -> u16 {
    // At most 32 ports.
    if port == 0 { 0 } else { 2 + 2 * port as u16 }
}

/// Queue of its output.
pub(super) fn transmit_queue(port: usize) -> u16 {
    receive_queue(port) + 1
}

impl Port {
    pub(super) fn new(index: usize, console: bool, host: Option<HostEnd>, counters: Arc<Counters>) -> Self {
        counters.host_open.store(host.is_some(), Ordering::Relaxed);
        Self {
            index,
            host,
            ring: OutputRing::new(OUTPUT_CAPACITY),
            blocked: false,
            // The driver of a console spins until its output is taken, so that never waits.
            patience: if console { Duration::ZERO } else { PATIENCE },
            held: None,
            progress: true,
            closed: false,
            sending: None,
            input: Vec::new(),
            starved: true,
            counters,
        }
    }

    pub(super) fn host(&self) -> Option<&HostEnd> {
        self.host.as_ref()
    }

    /// The host end while it is watched.
    pub(super) fn watched(&self) -> Option<&HostEnd> {
        self.host().filter(|host| host.life() == Life::Watched)
    }

    fn host_writable(&self) -> bool {
        !self.closed && self.host.as_ref().is_some_and(HostEnd::can_write)
    }

    /// Takes the driver's output, by way of `chunk`, until there is none or the turn is over.
    pub(super) fn pump_output(&mut self, chunk: &mut [u8; CHUNK], context: &mut Context<'_>) -> Result<(), Fault> {
        let index = transmit_queue(self.index);
        let (mut bytes, mut chains) = (BYTES_A_TURN, CHAINS_A_TURN);
        while bytes > 0 && chains > 0 {
            let Some(queue) = context.queue(index).filter(|_| !self.holds_back()) else {
                return Ok(());
            };
            let mut taken = 0;
            let result = self.gather(queue, chunk, &mut taken, &mut chains);
            // A console's driver may be spinning for its buffer, so it goes back before the system call.
            let told = context.interrupt(index);
            self.send(&chunk[..taken]);
            result?;
            told?;
            if taken == 0 && chains > 0 {
                return Ok(());
            }
            bytes = bytes.saturating_sub(taken);
        }
        context.ring(index);
        Ok(())
    }

    /// Fills `chunk` from the driver's chains, counting bytes up in `filled` and whole chains down in `chains`, and gives back those that are
    /// done. What was filled counts even if the driver broke a rule then.
    fn gather(
        &mut self,
        queue: &mut Virtqueue,
        chunk: &mut [u8],
        filled: &mut usize,
        chains: &mut usize,
    ) -> Result<(), Violation> {
        while *filled < chunk.len() && *chains > 0 {
            let (chain, done) = match self.sending.take() {
                Some(sending) => sending,
                None => match queue.pop()? {
                    Some(chain) => (chain, 0),
                    None if queue.wait_for_doorbell()? => continue,
                    None => break,
                },
            };
            let index = queue.index();
            if !chain.writable().is_empty() {
                return Err(Violation::Direction {
                    queue: index,
                    what: "output has a buffer for the device to write",
                });
            }
            let taken = if self.host_writable() {
                let mut reader = chain.reader(queue.memory());
                // Both are within the chain, as `done` was counted on it.
                let _ = reader.skip(done as usize);
                let len = reader.left().min(chunk.len() - *filled);
                let _ = reader.read(&mut chunk[*filled..*filled + len]);
                *filled += len;
                len as u32
            } else {
                chain.readable_bytes() - done
            };
            self.counters.from_guest.fetch_add(taken.into(), Ordering::Relaxed);
            if done + taken < chain.readable_bytes() {
                self.sending = Some((chain, done + taken));
            } else {
                queue.push(chain, 0)?;
                *chains -= 1;
            }
        }
        Ok(())
    }

    /// Sends `bytes` to the host, or keeps them for it.
    fn send(&mut self, bytes: &[u8]) {
        // The host may have made room that its event has not told of yet: nothing is dropped before that was tried.
        if !self.blocked || self.ring.len() + bytes.len() > self.ring.capacity() {
            self.flush();
        }
        let mut rest = bytes;
        while !rest.is_empty() && !self.blocked && self.host_writable() {
            let wrote = self.write(rest);
            rest = &rest[self.note(wrote)..];
        }
        if self.host_writable() {
            self.ring.extend(rest);
            self.counters.dropped.store(self.ring.dropped(), Ordering::Relaxed);
        }
    }

    /// Writes what waits, until the host takes no more.
    pub(super) fn flush(&mut self) {
        self.blocked = false;
        while !self.ring.is_empty() && !self.blocked && self.host_writable() {
            let wrote = self.write(self.ring.front());
            let n = self.note(wrote);
            self.ring.consume(n);
        }
        if self.closed {
            self.ring.clear();
        }
    }

    fn write(&self, bytes: &[u8]) -> Wrote {
        self.host.as_ref().map_or(Wrote::Closed, |host| host.write(bytes))
    }

    /// Notes why nothing was written, if that is so: how many bytes were.
    fn note(&mut self, wrote: Wrote) -> usize {
        match wrote {
            Wrote::Bytes(n) => {
                self.progress = true;
                return n;
            }
            Wrote::Blocked => {
                // A host that has taken something has deserved patience anew.
                if std::mem::take(&mut self.progress) && !self.patience.is_zero() {
                    self.held = Instant::now().checked_add(self.patience);
                }
                self.blocked = true;
            }
            Wrote::Closed => self.closed = true,
        }
        0
    }

    /// Whether the driver's output stays where it is for now, because the host end reads, but not as fast.
    fn holds_back(&mut self) -> bool {
        self.held = self.held_until().filter(|until| *until > Instant::now());
        self.held.is_some()
    }

    /// Until when it does.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.held.filter(|_| self.blocked && self.host_writable())
    }

    /// Whether output can go on that was held back until now.
    pub(super) fn let_go(&mut self) -> bool {
        self.held.is_some() && !self.holds_back()
    }

    /// Gives the driver the host's input, by way of `chunk`, while it `wants` any and has room, or until the turn is over.
    pub(super) fn pump_input(
        &mut self,
        wants: bool,
        chunk: &mut [u8; CHUNK],
        context: &mut Context<'_>,
    ) -> Result<(), Fault> {
        let index = receive_queue(self.index);
        let Some(queue) = context.queue(index).filter(|_| wants) else {
            return Ok(());
        };
        let mut left = BYTES_A_TURN;
        let over = loop {
            if !self.input.is_empty() {
                let (given, result) = deliver(queue, &self.input);
                self.count_input(given);
                self.input.drain(..given);
                result?;
                if !self.input.is_empty() {
                    self.starved = true;
                    break false;
                }
                self.input = Vec::new();
            }
            self.starved = queue.available()? == 0 && !queue.wait_for_doorbell()?;
            let Some(host) = self.host.as_mut().filter(|_| !self.starved) else {
                break false;
            };
            if left == 0 {
                break true;
            }
            let got = host.read(chunk);
            if got == 0 {
                break false;
            }
            left = left.saturating_sub(got);
            let (given, result) = deliver(queue, &chunk[..got]);
            self.count_input(given);
            self.input.extend(&chunk[given..got]);
            result?;
        };
        context.interrupt(index)?;
        if over {
            context.ring(index);
        }
        Ok(())
    }

    fn count_input(&self, bytes: usize) {
        self.counters.to_guest.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The host's end is closed; the caller has ended watching it.
    pub(super) fn hang_up(&mut self) {
        self.closed |= self.host_writable();
        if let Some(host) = &mut self.host {
            host.hang_up();
        }
        self.flush();
    }

    /// Whether the host end was closed since the last call.
    pub(super) fn take_closed(&mut self) -> bool {
        let closed = std::mem::take(&mut self.closed);
        if closed {
            self.ring.clear();
            self.blocked = false;
            self.counters.host_open.store(false, Ordering::Relaxed);
            if let Some(host) = &mut self.host {
                host.close_output();
            }
        }
        closed
    }

    /// How watching the host end has to change, for a driver that `wants` input or not.
    pub(super) fn watch_change(&mut self, wants: bool) -> Option<Watch> {
        let input = wants && !self.starved;
        self.host.as_mut()?.watch_for(input, self.blocked)
    }

    /// The driver takes back its buffers for input. What came from the host and found no room stays.
    pub(super) fn starve(&mut self) {
        self.starved = true;
    }

    /// The driver takes back the output that it has not been given back. What was copied still goes out.
    pub(super) fn give_up_output(&mut self) {
        self.sending = None;
    }

    /// Brings out what waits for the host; what it does not take by `deadline` counts as dropped.
    pub(super) fn stop(&mut self, deadline: Instant) {
        loop {
            self.flush();
            if self.ring.is_empty() {
                return;
            }
            if !self.host.as_ref().is_some_and(|host| host.wait_writable(deadline)) {
                let left = self.ring.clear();
                self.ring.count_dropped(left);
                self.counters.dropped.store(self.ring.dropped(), Ordering::Relaxed);
                return;
            }
        }
    }
}

/// Writes `bytes` into the driver's buffers: how many there was room for, even if the driver broke a rule then. It rings when there is more.
fn deliver(queue: &mut Virtqueue, bytes: &[u8]) -> (usize, Result<(), Violation>) {
    let mut given = 0;
    let result = loop {
        match deliver_one(queue, &bytes[given..]) {
            Ok(0) => break Ok(()),
            Ok(n) => given += n,
            Err(violation) => break Err(violation),
        }
    };
    (given, result)
}

/// Fills one of the driver's buffers: with how many bytes. 0 if there is none, or nothing to fill it with.
fn deliver_one(queue: &mut Virtqueue, bytes: &[u8]) -> Result<usize, Violation> {
    while !bytes.is_empty() {
        let Some(chain) = queue.pop()? else {
            if queue.wait_for_doorbell()? {
                continue;
            }
            break;
        };
        let index = queue.index();
        if !chain.readable().is_empty() {
            return Err(Violation::Direction {
                queue: index,
                what: "a buffer for input is for the device to read",
            });
        }
        let len = bytes.len().min(chain.writable_bytes() as usize);
        if len == 0 {
            return Err(Violation::Length {
                queue: index,
                what: "a buffer for input",
                got: 0,
                expected: "at least one",
            });
        }
        // There is room for as much.
        let _ = chain.writer(queue.memory()).write(&bytes[..len]);
        queue.push(chain, len as u32)?;
        return Ok(len);
    }
    Ok(0)
}
