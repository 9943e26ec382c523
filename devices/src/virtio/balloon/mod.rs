//! Traditional memory balloon (virtio 5.5): the guest lends memory back, and says how it fares.
//!
//! ```text
//!   owner: set_target --> num_pages --> driver --inflateq: page numbers--> discard, joined where they touch --> host
//!                         actual <-----'      '--deflateq: page numbers--> nothing to do: pages come back when touched
//!   owner: request_stats --> buffer given back --> driver --statsq: numbers--> callback
//!                                                  driver --reporting: free pages--> discard --> host
//! ```
//!
//! `actual`, like all statistics, is only what the guest says: a guest that uses pages it has lent gets them back, filled with zeroes, and no
//! harm is done to anybody but its account. Lists of any length are worked off in turns, so a reset never waits for one.
//!
//! With VIRTIO_BALLOON_F_PAGE_POISON and a poison value other than 0, reported pages are left as they are, since discarded ones read as 0.
//!
//! System calls of its thread beside those of [`dispatch`](crate::dispatch): what [`Reclaim`](super::device::Reclaim) does (`fallocate` or
//! `madvise`), `timerfd_settime`, `read`.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::chain::Chain;
use super::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};
use super::violation::Violation;
use crate::alarm::{Alarm, Pace};
use crate::dispatch::{DeviceError, DeviceEvent};
use crate::interrupt::lock;

use handle::Shared;
use pages::{PAGE, page_ranges, whole_pages};
use stats::{ENTRY, MOST, Waiters};

pub use handle::{BalloonHandle, BalloonSize, BalloonStats};
pub use stats::{MemoryStat, MemoryStats, StatsError};

mod handle;
mod pages;
mod stats;

/// VIRTIO_BALLOON_F_STATS_VQ.
const F_STATS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_POISON.
const F_PAGE_POISON: u64 = 1 << 4;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_REPORTING: u64 = 1 << 5;

/// Entries of each queue; Linux reports up to 32 ranges at a time and refuses a shorter queue.
const QUEUE_SIZE: u16 = 128;

/// Places in the configuration space (virtio 5.5.4).
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const POISON: usize = 12;
const CONFIG_BYTES: usize = 16;

/// Page numbers looked at together: neighbours among them are discarded together.
const NUMBERS_AT_ONCE: usize = 1024;
/// Such rounds, or chains, before the loop looks at its other events.
const ROUNDS_A_TURN: usize = 8;

/// The least time between two events that the balloon has changed.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// Tokens of the watched descriptors.
const OWNER: u32 = 0;
const ALARM: u32 = 1;

/// How a balloon is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct BalloonConfig {
    /// The guest may take pages back by itself before it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest is offered to report pages that it does not use, which are given back to the host.
    pub page_reporting: bool,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
    None,
}

impl Role {
    /// Of queue `queue` for a driver that accepted `features`. The standard gives reporting queue 4 always (virtio 5.5.2); Linux up to 6.10 counts
    /// only the queues that there are, and without VIRTIO_BALLOON_F_FREE_PAGE_HINT, which is not offered, takes one before it. Those would be
    /// nothing else, so they serve for reporting too.
    fn of(queue: u16, features: u64) -> Self {
        match queue {
            0 => Self::Inflate,
            1 => Self::Deflate,
            2 if features & F_STATS != 0 => Self::Stats,
            2..=4 if features & F_REPORTING != 0 => Self::Reporting,
            _ => Self::None,
        }
    }
}

/// A list of page numbers of which so many bytes have been worked off.
struct Work {
    chain: Chain,
    done: u32,
}

/// The device.
pub struct Balloon {
    config: BalloonConfig,
    shared: Arc<Shared>,
    alarm: Alarm,
    pace: Pace,
    /// Lists that are being worked off: of the inflate and the deflate queue.
    work: [Option<Work>; 2],
    /// The driver's buffer for statistics, while it is ours.
    buffer: Option<Chain>,
    /// The driver was asked for statistics and has not answered.
    asked: bool,
    waiters: Waiters,
    /// The host's refusal has been reported.
    refusal_reported: bool,
}

impl Balloon {
    /// A device and its owner's side.
    ///
    /// # Errors
    ///
    /// The host gives no eventfd or timerfd.
    pub fn new(config: BalloonConfig) -> io::Result<(Self, BalloonHandle)> {
        let shared = Arc::new(Shared::new()?);
        let device = Self {
            config,
            shared: Arc::clone(&shared),
            alarm: Alarm::new()?,
            pace: Pace::new(EVENT_INTERVAL),
            work: [None, None],
            buffer: None,
            asked: false,
            waiters: Waiters::default(),
            refusal_reported: false,
        };
        Ok((device, BalloonHandle::new(shared)))
    }

    /// Works off lists of page numbers until there are none or the turn is over.
    fn pump_pages(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        for _ in 0..ROUNDS_A_TURN {
            let Some(queue) = context.queue(index) else {
                return Ok(());
            };
            let work = match self.work[usize::from(index)].take() {
                Some(work) => work,
                None => match queue.pop()? {
                    Some(chain) => Work {
                        chain: check_list(index, chain)?,
                        done: 0,
                    },
                    None if queue.wait_for_doorbell()? => continue,
                    None => return Ok(context.interrupt(index)?),
                },
            };
            let mut reader = work.chain.reader(memory);
            // Within the chain, as it was counted on it.
            let _ = reader.skip(work.done as usize);
            let bytes = reader.read_to_end(4 * NUMBERS_AT_ONCE);
            let mut numbers: Vec<u32> = bytes.as_chunks().0.iter().map(|n| u32::from_le_bytes(*n)).collect();
            for &number in &numbers {
                if !memory.check_range(GuestAddress(u64::from(number) * PAGE), PAGE as usize) {
                    return Err(Fault::Violation(Violation::Device {
                        queue: index,
                        reason: format!("page number {number:#x} is not in guest memory"),
                    }));
                }
            }
            if index == 0 {
                let ranges = page_ranges(&mut numbers);
                let given = self.discard(&ranges, context);
                self.shared.inflated.fetch_add(given, Ordering::Relaxed);
            }
            let done = work.done + bytes.len() as u32;
            if done < work.chain.readable_bytes() {
                self.work[usize::from(index)] = Some(Work { done, ..work });
            } else if let Some(queue) = context.queue(index) {
                queue.push(work.chain, 0)?;
            }
        }
        context.interrupt(index)?;
        context.ring(index);
        Ok(())
    }

    /// Takes free pages until none are reported or the turn is over.
    fn pump_reports(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let mut poison = [0; 4];
        if context.accepted(F_PAGE_POISON) {
            context.read_config(POISON, &mut poison);
        }
        for _ in 0..ROUNDS_A_TURN {
            let Some(queue) = context.queue(index) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_doorbell()? {
                    continue;
                }
                return Ok(context.interrupt(index)?);
            };
            if !chain.readable().is_empty() {
                return Err(Fault::Violation(Violation::Direction {
                    queue: index,
                    what: "a report of free pages has a buffer for the device to read",
                }));
            }
            if poison == [0; 4] {
                let given = self.discard(&whole_pages(chain.writable()), context);
                self.shared.reported.fetch_add(given, Ordering::Relaxed);
            }
            if let Some(queue) = context.queue(index) {
                queue.push(chain, 0)?;
            }
        }
        context.interrupt(index)?;
        context.ring(index);
        Ok(())
    }

    /// Gives ranges back to the host: how many bytes. What it refuses stays with the guest, which loses nothing by it.
    fn discard(&mut self, ranges: &[Range<u64>], context: &Context<'_>) -> u64 {
        let mut given = 0;
        for range in ranges {
            let len = range.end - range.start;
            match context.reclaim.discard(range.start, len) {
                Ok(()) => given += len,
                Err(error) => {
                    self.shared.refused.fetch_add(len, Ordering::Relaxed);
                    if !std::mem::replace(&mut self.refusal_reported, true) {
                        context.report(DeviceEvent::IoError {
                            device: context.name().into(),
                            operation: "discard",
                            reason: error.to_string(),
                            no_space: false,
                        });
                    }
                }
            }
        }
        given
    }

    /// Takes the driver's statistics.
    fn pump_stats(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        loop {
            let Some(queue) = context.queue(index) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_doorbell()? {
                    continue;
                }
                break;
            };
            if !chain.writable().is_empty() {
                return Err(Fault::Violation(Violation::Direction {
                    queue: index,
                    what: "statistics have a buffer for the device to write",
                }));
            }
            if self.buffer.is_some() {
                return Err(Fault::Violation(Violation::Device {
                    queue: index,
                    reason: "a second buffer of statistics, of which there can be one at a time".into(),
                }));
            }
            let stats = MemoryStats {
                stats: stats::parse(&chain.reader(queue.memory()).read_to_end(ENTRY * MOST)),
                at: Instant::now(),
            };
            let answers = std::mem::take(&mut self.asked);
            // The first buffer answers nothing, and some drivers leave it empty.
            if answers || !stats.stats.is_empty() {
                lock(&self.shared.asked).latest = Some(stats.clone());
            }
            if answers {
                self.waiters.answer(&Ok(stats));
            }
            self.buffer = Some(chain);
        }
        self.ask(context)
    }

    /// Asks the driver for statistics if somebody waits for them.
    fn ask(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        const STATS: u16 = 2;
        if self.waiters.is_empty() || self.asked {
            return Ok(());
        }
        if let Some(queue) = context.queue(STATS)
            && let Some(buffer) = self.buffer.take()
        {
            queue.push(buffer, 0)?;
            self.asked = true;
            context.interrupt(STATS)?;
        }
        Ok(())
    }

    /// Takes over what the owner asked for.
    fn take_orders(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        // Nonblocking; all that it can say is that somebody rang.
        let _ = self.shared.bell.read();
        let (target, waiters) = {
            let mut asked = lock(&self.shared.asked);
            (asked.target, std::mem::take(&mut asked.waiters))
        };
        let mut before = [0; 4];
        context.read_config(NUM_PAGES, &mut before);
        if before != target.to_le_bytes() {
            context.update_config(NUM_PAGES, &target.to_le_bytes());
            self.pace.changed();
        }
        for waiter in waiters {
            if context.accepted(F_STATS) {
                self.waiters.add(waiter);
            } else {
                (waiter.callback)(Err(StatsError::NotSupported));
            }
        }
        self.ask(context)
    }

    /// Notes what the guest says that it has lent.
    fn set_current(&mut self, pages: u32) {
        if self.shared.current.swap(pages, Ordering::Relaxed) != pages {
            self.pace.changed();
        }
    }

    /// Tells the owner what has changed and is due, lets callers go whose time is up, and sets the alarm for what comes next.
    fn settle(&mut self, context: &Context<'_>) -> Result<(), Fault> {
        let now = Instant::now();
        self.waiters.expire(now);
        if self.pace.take(now) {
            let current = self.shared.current.load(Ordering::Relaxed);
            let requested = lock(&self.shared.asked).target;
            context.report(DeviceEvent::BalloonChanged {
                device: context.name().into(),
                actual: u64::from(current) * PAGE,
                requested: u64::from(requested) * PAGE,
            });
        }
        let next = [self.pace.next(), self.waiters.next()].into_iter().flatten().min();
        self.alarm.set(next).map_err(|e| Fault::Host(e.into()))
    }

    /// The driver takes its buffer for statistics back.
    fn forget_stats(&mut self) {
        (self.buffer, self.asked) = (None, false);
        self.waiters.answer(&Err(StatsError::Reset));
    }
}

/// Checks a list of page numbers.
fn check_list(queue: u16, chain: Chain) -> Result<Chain, Violation> {
    if !chain.writable().is_empty() {
        return Err(Violation::Direction {
            queue,
            what: "a list of page numbers has a buffer for the device to write",
        });
    }
    if !chain.readable_bytes().is_multiple_of(4) {
        return Err(Violation::Length {
            queue,
            what: "a list of page numbers",
            got: chain.readable_bytes().into(),
            expected: "a multiple of 4",
        });
    }
    Ok(chain)
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        let mut features = F_STATS;
        if self.config.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if self.config.page_reporting {
            // Without the poison value, Linux does not report pages where it initializes them.
            features |= F_REPORTING | F_PAGE_POISON;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; if self.config.page_reporting { 5 } else { 3 }]
    }

    fn config(&self) -> ConfigLayout {
        ConfigLayout {
            bytes: vec![0; CONFIG_BYTES],
            writable: vec![ACTUAL..ACTUAL + 4, POISON..POISON + 4],
        }
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        context.watch(&self.shared.bell, OWNER, EventSet::IN)?;
        context.watch(&self.alarm, ALARM, EventSet::IN)
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        match Role::of(queue, context.features) {
            Role::Inflate | Role::Deflate => self.pump_pages(queue, context)?,
            Role::Stats => self.pump_stats(queue, context)?,
            Role::Reporting => self.pump_reports(queue, context)?,
            Role::None => {}
        }
        self.settle(context)
    }

    fn ready(&mut self, token: u32, _: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        match token {
            OWNER => self.take_orders(context)?,
            _ => {
                self.alarm.rang();
            }
        }
        self.settle(context)
    }

    fn config_written(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let mut actual = [0; 4];
        context.read_config(ACTUAL, &mut actual);
        self.set_current(u32::from_le_bytes(actual));
        self.settle(context)
    }

    fn reset_queue(&mut self, queue: u16, context: &mut Context<'_>) {
        match Role::of(queue, context.features) {
            Role::Inflate | Role::Deflate => self.work[usize::from(queue)] = None,
            Role::Stats => self.forget_stats(),
            Role::Reporting | Role::None => {}
        }
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        self.work = [None, None];
        self.forget_stats();
        self.refusal_reported = false;
        // A driver that is gone has lent nothing: the next one has all memory again.
        context.update_config(ACTUAL, &[0; 4]);
        context.update_config(POISON, &[0; 4]);
        self.set_current(0);
        // Fails only if the timer cannot be set, and then the next event sets it.
        let _ = self.settle(context);
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests;
