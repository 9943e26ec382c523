//! Entropy device (virtio 5.4): fills the driver's buffers with random bytes of the host's kernel.
//!
//! ```text
//!   driver's buffer --pop--> first 64 KiB <-- getrandom      limited? unpop, and the timer brings the queue on
//! ```
//!
//! Of a larger buffer only the beginning is written, as virtio 5.4.6.2 allows: one request cannot keep the device busy, and the driver asks
//! again.
//!
//! System calls of its thread beside those of [`dispatch`](crate::dispatch): `getrandom`, and with a limit `timerfd_settime` and `read`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::EventSet;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::chain::{Chain, Writer};
use super::device::{Context, DeviceKind, Fault, VirtioDevice};
use super::violation::Violation;
use crate::dispatch::DeviceError;
use crate::rate::{RateLimit, RateTimer};

/// Most bytes that one request gets.
pub const MOST_BYTES: u32 = 64 * 1024;

/// The device's only queue (virtio 5.4.2).
const QUEUE: u16 = 0;

/// Entries of the queue; Linux has one request under way.
const QUEUE_SIZE: u16 = 64;

/// Token of the rate limit's timer.
const TIMER: u32 = 0;

/// Requests answered before the loop looks at its other events.
const REQUESTS_A_TURN: usize = 16;

/// How the device is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct RngConfig {
    /// Bytes and requests that it serves.
    pub rate: RateLimit,
}

/// What the device has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngStats {
    /// Requests answered.
    pub requests: u64,
    /// Random bytes given.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// The device's owner's side.
#[derive(Clone, Debug)]
pub struct RngHandle(Arc<Counters>);

impl RngHandle {
    /// What the device has done so far.
    pub fn stats(&self) -> RngStats {
        RngStats {
            requests: self.0.requests.load(Ordering::Relaxed),
            bytes: self.0.bytes.load(Ordering::Relaxed),
        }
    }
}

/// The device.
pub struct Rng {
    limit: Option<RateTimer>,
    counters: Arc<Counters>,
}

impl Rng {
    /// A device and its owner's side.
    ///
    /// # Errors
    ///
    /// The host gives no timerfd.
    pub fn new(config: RngConfig) -> io::Result<(Self, RngHandle)> {
        let counters = Arc::new(Counters::default());
        let device = Self {
            limit: RateTimer::new(&config.rate)?,
            counters: Arc::clone(&counters),
        };
        Ok((device, RngHandle(counters)))
    }

    /// Answers requests until there are none, the turn is over, or the limit is reached.
    fn pump(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        for _ in 0..REQUESTS_A_TURN {
            let Some(queue) = context.queue(QUEUE) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_doorbell()? {
                    continue;
                }
                return Ok(context.interrupt(QUEUE)?);
            };
            let len = accept(&chain)?;
            if let Some(limit) = &mut self.limit
                && !limit.admit(len.into()).map_err(|e| Fault::Host(e.into()))?
            {
                queue.unpop(chain);
                return Ok(context.interrupt(QUEUE)?);
            }
            fill(&mut chain.writer(queue.memory()), len)
                .map_err(|e| Fault::Host(format!("the host gives no random bytes: {e}").into()))?;
            queue.push(chain, len)?;
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes.fetch_add(len.into(), Ordering::Relaxed);
        }
        context.interrupt(QUEUE)?;
        context.ring(QUEUE);
        Ok(())
    }
}

/// How many bytes the request gets: at least 1 (virtio 5.4.6).
fn accept(chain: &Chain) -> Result<u32, Violation> {
    if !chain.readable().is_empty() {
        return Err(Violation::Direction {
            queue: QUEUE,
            what: "a request for random bytes has a buffer for the device to read",
        });
    }
    match chain.writable_bytes().min(MOST_BYTES) {
        0 => Err(Violation::Length {
            queue: QUEUE,
            what: "a request for random bytes",
            got: 0,
            expected: "at least one",
        }),
        len => Ok(len),
    }
}

/// Writes `len` random bytes.
fn fill(writer: &mut Writer<'_, '_>, len: u32) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let mut left = len as usize;
    while left > 0 {
        let want = left.min(buffer.len());
        match getrandom(&mut buffer[..want], GetRandomFlags::empty()) {
            Ok(got) => {
                writer.write(&buffer[..got]).map_err(io::Error::other)?;
                left -= got;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        match &self.limit {
            Some(timer) => context.watch(timer, TIMER, EventSet::IN),
            None => Ok(()),
        }
    }

    fn notify(&mut self, _: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        self.pump(context)
    }

    fn ready(&mut self, _: u32, _: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        if let Some(timer) = &self.limit {
            timer.expired();
        }
        self.pump(context)
    }

    fn reset(&mut self, _: &mut Context<'_>) {
        // No chain outlives a call, and what was admitted stays charged: a reset does not go around the limit.
    }
}

#[cfg(test)]
mod tests;
