//! Serial port: a 16550A for the guest, a stream socket or pipe for the host.
//!
//! ```text
//!   vCPU thread                    behind one short lock                     the port's own thread (SerialLoop)
//!   -----------                    ---------------------                     ----------------------------------
//!   write THR --> Uart --byte--> [output ring, drops its oldest] --chunk--> write(host)
//!                                        '- doorbell -------------------->  (see "Output")
//!   read RBR <--- Uart <-- FIFO <-- [input backlog] <---------------------- read(host)
//!                                        '- doorbell when there is room ->  (see "Input")
//! ```
//!
//! Output: a guest is never held up. The first byte after silence rings the doorbell and is on its way at once; from then on the
//! loop looks every [`BATCH_INTERVAL`] by a timer of its own, so a busy guest rings no more, and when it finds nothing it goes to sleep:
//!
//! ```text
//!            byte: bell                     host takes no more
//!   Asleep -------------> Working -----------------------------> Working, waiting for the host (ring drops its oldest)
//!      ^                   |   ^                                        | writable
//!      | tick: nothing     |   | tick, or bell (ring a quarter full)    |
//!      |                   v   |                                        |
//!      '-------------- Batching <---------------------------------------'
//! ```
//!
//! Why a thread and not a write from the vCPU while the port is idle: that would save the first byte one wake-up (32 us against 14 us until
//! a reader has it, median of `examples/serial_latency.rs` on two cores), at the same cost to the vCPU (7 us); but the vCPU's thread would then
//! work on the host's file, against the rule that a device's host handles belong to its own thread.
//!
//! Input: the loop reads no more than the backlog holds. With the backlog full it stops watching the host for input, so the host's writer
//! blocks; the guest's reads ring the doorbell when the backlog has emptied far enough.
//!
//! When the host closes its end, output is discarded from then on; input that came before is still delivered. A stop of the loop brings
//! out all output, waiting for a slow host until its deadline.
//!
//! System calls of the loop beside those of [`dispatch`](crate::dispatch): `read`, `write` and `close` on the host end,
//! `timerfd_settime`, `ppoll` on stop, and what the interrupt line does. The process ignores SIGPIPE, as every Rust program does
//! unless it chose otherwise.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::uart::Uart;
use crate::bus::BusDevice;
use crate::interrupt::{InterruptLine, LevelLatch, lock, publish};
use crate::stream::OutputRing;

pub use host::SerialLoop;

mod host;

/// Ports of a serial port.
pub const PORTS: u64 = 8;

/// Bytes of output that wait for the host before the oldest are dropped, unless chosen otherwise.
pub const DEFAULT_OUTPUT_CAPACITY: usize = 64 * 1024;

/// How long output after the first byte is gathered before it goes out.
pub const BATCH_INTERVAL: Duration = Duration::from_millis(1);

/// Bytes of input that are taken from the host ahead of the guest.
const INPUT_BACKLOG: usize = 4096;

/// With this much input left the loop goes on reading.
const INPUT_LOW: usize = 1024;

/// Where output is (see the module's head).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// The next byte rings the doorbell.
    Asleep,
    /// The loop will look by itself, or waits for the host.
    Working,
    /// The loop's timer runs; only a filling ring rings the doorbell.
    Batching,
    /// Nobody will take it any more: it goes nowhere.
    Discarded,
}

/// What the two sides share.
#[derive(Debug)]
struct State {
    uart: Uart,
    latch: LevelLatch,
    ring: OutputRing,
    output: Output,
    backlog: VecDeque<u8>,
    /// The loop has stopped reading for lack of room and wants to be told.
    input_paused: bool,
}

/// What is left to do after the lock is released.
#[derive(Default)]
#[must_use]
struct After {
    bell: bool,
    publish: bool,
}

impl State {
    /// A byte that the guest sent.
    fn transmit(&mut self, byte: u8) -> bool {
        if self.output == Output::Discarded {
            return false;
        }
        self.ring.push(byte);
        let bell = match self.output {
            Output::Asleep => true,
            Output::Batching => self.ring.len() >= self.ring.capacity() / 4,
            Output::Working | Output::Discarded => false,
        };
        if bell {
            self.output = Output::Working;
        }
        bell
    }

    /// Nobody takes output any more.
    fn discard(&mut self) {
        self.output = Output::Discarded;
        self.ring.clear();
    }

    /// Moves input on into the FIFO and works out the interrupt line; to be called after every change.
    fn settle(&mut self) -> After {
        for _ in 0..self.uart.room() {
            let Some(byte) = self.backlog.pop_front() else { break };
            self.uart.receive(byte);
        }
        let bell = self.input_paused && self.backlog.len() <= INPUT_LOW;
        if bell {
            self.input_paused = false;
        }
        let level = self.uart.interrupt();
        After {
            bell,
            publish: self.latch.update(level),
        }
    }
}

/// The guest's side of a serial port: put it on the port bus, eight ports long. [`SerialLoop`] is the host's side.
pub struct Serial {
    state: Mutex<State>,
    line: Arc<dyn InterruptLine>,
    doorbell: EventFd,
}

impl Serial {
    /// A port that raises `line`, with room for `output_capacity` bytes of output ([`DEFAULT_OUTPUT_CAPACITY`] serves well). Output gathers
    /// in it until a [`SerialLoop`] runs.
    ///
    /// # Errors
    ///
    /// The host gave no eventfd.
    pub fn new(line: Arc<dyn InterruptLine>, output_capacity: usize) -> io::Result<Arc<Self>> {
        let state = State {
            uart: Uart::default(),
            latch: LevelLatch::default(),
            ring: OutputRing::with_room(output_capacity),
            output: Output::Working,
            backlog: VecDeque::with_capacity(INPUT_BACKLOG),
            input_paused: false,
        };
        let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Self {
            state: Mutex::new(state),
            line,
            doorbell,
        }))
    }

    /// The host's side, to be run by a [`DispatchLoop`](crate::dispatch::DispatchLoop): moves bytes between the guest and `host`, a stream
    /// socket, pipe or terminal whose other end belongs to somebody else. A pipe's end works in its own direction only. `host` is made
    /// nonblocking. There is one such loop for a port; when it is dropped, output is discarded from then on.
    ///
    /// # Errors
    ///
    /// `host` is not open for reading or writing, or the host gave no timerfd. (What cannot be watched, such as a regular file, is refused
    /// when the loop starts.)
    pub fn host_loop(self: &Arc<Self>, host: OwnedFd) -> io::Result<SerialLoop> {
        SerialLoop::new(Arc::clone(self), host)
    }

    /// Bytes of output lost, since the start, because the host did not take them in time.
    pub fn dropped(&self) -> u64 {
        self.state().ring.dropped()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Does what a change left to do. The lock is released: both are system calls.
    fn finish(&self, after: After) {
        if after.bell {
            // Fails only with a full counter, and then the loop has been told.
            let _ = self.doorbell.write(1);
        }
        if after.publish {
            publish(&self.state, |state| &mut state.latch, &*self.line);
        }
    }
}

/// The ports of an access that starts at `offset`.
fn ports(offset: u64) -> impl Iterator<Item = u8> {
    (offset.min(PORTS)..).map(|port| port as u8)
}

impl BusDevice for Serial {
    /// Wide accesses are split into bytes at consecutive ports, as an ISA bus does.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state();
        for (port, byte) in ports(offset).zip(data) {
            *byte = state.uart.read(port);
        }
        let after = state.settle();
        drop(state);
        self.finish(after);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let mut bell = false;
        for (port, byte) in ports(offset).zip(data) {
            if let Some(byte) = state.uart.write(port, *byte) {
                bell |= state.transmit(byte);
            }
        }
        let mut after = state.settle();
        drop(state);
        after.bell |= bell;
        self.finish(after);
    }
}

#[cfg(test)]
mod tests;
