//! The device's passes: takes requests, has them done, answers them.
//!
//! One pass of [`Block::service`] collects what the engine has done, takes a share of what each queue has, and tells the driver; passes follow each
//! other while there is something to do. Then it looks out for a moment (see `poll`), asks for doorbells, and returns to the loop.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

use super::{Block, Flying, nanoseconds};
use crate::dispatch::DeviceEvent;
use crate::virtio::access;
use crate::virtio::block::backend::Job;
use crate::virtio::block::engine::Done;
use crate::virtio::block::request::{self, IOERR, OK, Operation, Request};
use crate::virtio::chain::Chain;
use crate::virtio::device::{Context, Fault};
use crate::virtio::violation::Violation;

/// Most requests that one queue has taken before the others, and the driver, have their turn.
const SHARE: usize = 32;
/// Most requests that are taken, done and shown to the driver together: enough to share out what a system call and a look at the rings cost, few
/// enough for the driver to prepare the next ones meanwhile.
const BATCH: u16 = 8;
/// Rooms for buffers that are kept.
const KEPT_ROOMS: usize = 64;
/// Longest that the loop is kept from its other events while there is work, in nanoseconds.
const TURN: u128 = 1_000_000;
/// Longest transfer, in bytes, that the loop's thread does itself: what a copy takes no longer than a switch of threads, some times over.
const AT_ONCE: u64 = 256 << 10;
/// A write that took longer than this found the page cache busy with storage.
const SLOW_WRITE: Duration = Duration::from_millis(2);
/// So many writes are left to the engine then.
const WRITES_AFTER_SLOW: u32 = 64;

impl Block {
    /// Does all there is to do, up to a turn's length.
    pub(super) fn service(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        if !context.active() {
            return Ok(());
        }
        let begun = Instant::now();
        if let Some(since) = self.idle_since.take() {
            self.poll.came_after(nanoseconds(begun - since));
        }
        for queue in context.queues.iter_mut().flatten() {
            queue.ignore_doorbell()?;
        }
        loop {
            let mut worked = self.collect(context)?;
            for queue in 0..self.queues {
                worked |= self.take(queue, context)?;
            }
            if let Some(engine) = &mut self.engine {
                engine.kick();
            }
            for queue in 0..self.queues {
                context.interrupt(queue)?;
            }
            self.shared.counters.in_flight(self.flying.len() - self.free.len());
            if !worked {
                if self.look_out(context)? {
                    self.poll.found();
                } else if !self.sleep(context)? {
                    return Ok(());
                }
            }
            // Also of a driver that shows work and takes it back.
            if begun.elapsed().as_nanos() > TURN {
                // The first that is enabled will do: all are served.
                if let Some(queue) = context.queues.iter().flatten().next() {
                    context.ring(queue.index());
                }
                return Ok(());
            }
        }
    }

    /// Answers what the engine has done: whether there was anything.
    fn collect(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        let Some(engine) = self.engine.as_mut().filter(|engine| engine.pending()) else {
            return Ok(false);
        };
        let mut all = std::mem::take(&mut self.done);
        engine.completed(&mut all);
        let any = !all.is_empty();
        let mut finished = Ok(());
        for Done { id, job, result } in all.drain(..) {
            // All have landed, even if the rings turn out to be bad at the first.
            if let Some(flying) = self.land(id)
                && finished.is_ok()
            {
                finished = self.finish(flying.queue, flying.chain, job, result, context);
            }
        }
        self.done = all;
        finished.map(|()| any)
    }

    /// The engine does not have request `id` any more.
    pub(super) fn land(&mut self, id: u32) -> Option<Flying> {
        let flying = self.flying.get_mut(id as usize)?.take()?;
        self.free.push(id);
        Some(flying)
    }

    /// Takes a share of what `queue` has: whether there was anything.
    fn take(&mut self, queue: u16, context: &mut Context<'_>) -> Result<bool, Fault> {
        let mut taken = 0;
        while taken < SHARE && !self.held {
            let count = self.take_batch(queue, context)?;
            if count == 0 {
                break;
            }
            taken += count;
        }
        Ok(taken > 0)
    }

    /// Takes a few requests, has them done, and shows the driver what is done by then: how many it took.
    fn take_batch(&mut self, queue: u16, context: &mut Context<'_>) -> Result<usize, Fault> {
        let most = u16::try_from(self.free.len()).map_or(BATCH, |free| free.min(BATCH));
        let Some(ring) = context.queue(queue) else {
            return Ok(0);
        };
        let mut batch = std::mem::take(&mut self.batch);
        let popped = ring.pop_some(most, &mut batch);
        let count = batch.len();
        let begun = self.begin_all(queue, &mut batch, context);
        batch.clear();
        self.batch = batch;
        let collected = if count > 1 && begun.is_ok() {
            if let Some(engine) = &mut self.engine {
                engine.kick();
            }
            self.collect(context).map(drop)
        } else {
            Ok(())
        };
        // What was done before a fault is done.
        if let Some(ring) = context.queue(queue) {
            ring.publish()?;
        }
        begun?;
        collected?;
        popped?;
        Ok(count)
    }

    /// Begins the requests of a batch, as far as the rate limit lets them.
    fn begin_all(&mut self, queue: u16, batch: &mut Vec<Chain>, context: &mut Context<'_>) -> Result<(), Fault> {
        let together = batch.len() > 1 && self.engine.as_ref().is_some_and(|engine| engine.is_for_batches());
        let mut chains = batch.drain(..);
        while let Some(chain) = chains.next() {
            if let Some(rate) = &mut self.rate
                && !rate
                    .admit(request::data_bytes(&chain))
                    .map_err(|e| Fault::Host(e.into()))?
            {
                self.held = true;
                if let Some(ring) = context.queue(queue) {
                    // The last one first.
                    chains.rev().for_each(|later| ring.unpop(later));
                    ring.unpop(chain);
                }
                return Ok(());
            }
            self.begin(queue, chain, together, context)?;
        }
        Ok(())
    }

    /// Does a request, or gives it to the engine; reads in any case if they are `together` with others.
    fn begin(&mut self, queue: u16, chain: Chain, together: bool, context: &mut Context<'_>) -> Result<(), Fault> {
        let room = self.rooms.pop().unwrap_or_default();
        let (operation, offset, len, buffers) = match request::parse(queue, &chain, context.memory, &self.limits, room)?
        {
            Request::Work {
                operation,
                offset,
                len,
                buffers,
            } => (operation, offset, len, buffers),
            Request::GetId => {
                // The length was checked.
                let _ = chain.writer(context.memory).write(&self.id);
                self.shared.counters.told_id();
                return Ok(answer(queue, chain, OK, context)?);
            }
            Request::Answer(status) => {
                if status == IOERR {
                    self.shared.counters.failed();
                }
                return Ok(answer(queue, chain, status, context)?);
            }
        };
        let job = Job {
            operation,
            offset,
            len,
            buffers,
            durable: self.write_through,
        };
        // An empty one needs nobody.
        if !(together && operation == Operation::Read && len > 0)
            && let Some(result) = self.at_once(&job)
        {
            return self.finish(queue, chain, job, result, context);
        }
        let (Some(engine), Some(id)) = (&mut self.engine, self.free.pop()) else {
            return self.finish(queue, chain, job, Err(std::io::ErrorKind::ResourceBusy.into()), context);
        };
        self.flying[id as usize] = Some(Flying { queue, chain });
        engine.submit(id, job, context.memory);
        Ok(())
    }

    /// Does a job here and now if that takes no longer than to have it done; `None`: it may take longer.
    fn at_once(&mut self, job: &Job) -> Option<std::io::Result<()>> {
        if job.len > AT_ONCE {
            return None;
        }
        if job.operation == Operation::Write && job.len > 0 && self.slow_writes > 0 {
            self.slow_writes -= 1;
            return None;
        }
        let begun = (job.operation == Operation::Write).then(Instant::now);
        let result = job.run_at_once(&*self.image.backend);
        if begun.is_some_and(|begun| begun.elapsed() > SLOW_WRITE) {
            self.slow_writes = WRITES_AFTER_SLOW;
        }
        match result {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// As if a write had just found the page cache busy.
    #[cfg(test)]
    pub(in crate::virtio::block) fn storage_is_busy(&mut self) {
        self.slow_writes = WRITES_AFTER_SLOW;
    }

    /// Answers a request that was done.
    pub(super) fn finish(
        &mut self,
        queue: u16,
        chain: Chain,
        job: Job,
        result: std::io::Result<()>,
        context: &mut Context<'_>,
    ) -> Result<(), Fault> {
        let status = match result {
            Ok(()) => {
                self.shared.counters.succeeded(job.operation, job.len);
                OK
            }
            Err(error) => {
                self.shared.counters.failed();
                let now = nanoseconds(self.started.elapsed());
                if self.reports.take(now, 0).is_ok() {
                    context.report(DeviceEvent::IoError {
                        device: context.name().to_owned(),
                        operation: job.operation.name(),
                        reason: error.to_string(),
                        no_space: matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded),
                    });
                }
                IOERR
            }
        };
        if self.rooms.len() < KEPT_ROOMS {
            self.rooms.push(job.buffers);
        }
        Ok(answer(queue, chain, status, context)?)
    }

    /// Looks out for work for as long as it is worth: whether there is some.
    fn look_out(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        let budget = self.poll.budget();
        if budget == 0 || self.held {
            return Ok(false);
        }
        let begun = Instant::now();
        loop {
            if self.engine.as_ref().is_some_and(|engine| engine.pending()) {
                return Ok(true);
            }
            for queue in context.queues.iter().flatten() {
                if queue.available()? > 0 {
                    return Ok(true);
                }
            }
            if nanoseconds(begun.elapsed()) > budget {
                self.idle_since = Some(begun);
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Asks to be woken for whatever comes next. True: something is there already.
    fn sleep(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        let mut more = self.engine.as_mut().is_some_and(|engine| engine.before_sleep());
        // What is held back waits for the timer, not for a doorbell.
        if !self.held {
            for queue in context.queues.iter_mut().flatten() {
                more |= queue.wait_for_doorbell()?;
            }
        }
        if more {
            self.idle_since = None;
        } else {
            self.idle_since.get_or_insert_with(Instant::now);
        }
        Ok(more)
    }
}

/// Gives a chain back with its status, which is its last writable byte. The driver sees it once the batch is published.
fn answer(queue: u16, chain: Chain, status: u8, context: &mut Context<'_>) -> Result<(), Violation> {
    if let Some(last) = chain.writable().iter().rev().find(|segment| segment.len > 0) {
        let at = last.address + u64::from(last.len - 1);
        // The buffer was in guest memory when the chain was taken.
        let _ = access::write(context.memory, GuestAddress(at), &[status]);
    }
    let written = chain.writable_bytes();
    match context.queue(queue) {
        Some(ring) => ring.stage(chain, written),
        None => Ok(()),
    }
}
