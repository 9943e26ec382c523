//! The device: what it is made of, and what its transport and its owner ask of it. What it does with requests is in `service`.

mod service;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventSet;

use super::backend::Job;
use super::buffers::Buffers;
use super::config::{
    self, BlockConfig, BlockError, BlockInfo, DiskMode, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FileRole, MAX_QUEUES,
    QUEUE_SIZE,
};
use super::engine::{self, Done, Engine, Prepared};
use super::handle::{BlockHandle, Resize, ResizeError, Shared};
use super::image::{self, Image};
use super::poll::Poll;
use super::request::{ID_BYTES, Limits, Operation, SECTOR};
use crate::dispatch::DeviceError;
use crate::rate::{RateLimit, RateLimiter, RateTimer};
use crate::virtio::chain::Chain;
use crate::virtio::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};

const ENGINE: u32 = 0;
const RATE: u32 = 1;
const ORDERS: u32 = 2;

/// Failures that are reported at once, and a second: a guest can make as many as it likes.
const REPORTS: RateLimit = RateLimit {
    bytes_per_second: 0,
    operations_per_second: 1,
    burst_bytes: 0,
    burst_operations: 16,
};

/// A request that the engine has.
struct Flying {
    queue: u16,
    chain: Chain,
}

/// A disk. Its other half is the [`BlockHandle`] that is made with it.
pub struct Block {
    shared: Arc<Shared>,
    image: Image,
    id: [u8; ID_BYTES],
    mode: DiskMode,
    block_size: u32,
    queues: u16,
    /// Until the device starts.
    prepared: Option<Prepared>,
    engine: Option<Box<dyn Engine>>,
    flying: Vec<Option<Flying>>,
    /// Indices of `flying` that are free.
    free: Vec<u32>,
    limits: Limits,
    /// The driver cannot flush: every write has to survive.
    write_through: bool,
    rate: Option<RateTimer>,
    /// The rate limit holds requests back; its timer is set.
    held: bool,
    poll: Poll,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    slow_writes: u32,
    reports: RateLimiter,
    started: Instant,
    /// Room for what the engine has done.
    done: Vec<Done>,
    /// Room for chains that are taken together.
    batch: Vec<Chain>,
    /// Rooms for the buffers of requests to come.
    rooms: Vec<Buffers>,
}

impl Block {
    /// A disk of `config`, and its host side.
    ///
    /// # Errors
    ///
    /// What in the configuration, or about which of its files, is wrong.
    pub fn new(config: BlockConfig) -> Result<(Self, BlockHandle), BlockError> {
        if config.id.len() > ID_BYTES {
            return Err(BlockError::Id(config.id));
        }
        if !matches!(config.block_size, 512 | 4096) {
            return Err(BlockError::BlockSize(config.block_size));
        }
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            return Err(BlockError::Queues(config.queues));
        }
        let resources = |operation| move |error| image::host(FileRole::Image, operation, error);
        let rate = RateTimer::new(&config.rate_limit).map_err(resources("timerfd_create"))?;
        let mut info = BlockInfo {
            id: config.id.clone(),
            mode: config.mode,
            format: config.format,
            direct: config.direct,
            bytes: 0,
            block_size: config.block_size,
            queues: config.queues,
            engine: None,
        };
        let (io_uring, poll) = (config.io_uring, Poll::new(config.poll));
        let image = Image::open(config)?;
        info.bytes = image.bytes;
        let BlockInfo {
            mode,
            block_size,
            queues,
            ..
        } = info;
        let mut id = [0; ID_BYTES];
        id[..info.id.len()].copy_from_slice(info.id.as_bytes());
        let shared = Shared::new(info).map_err(resources("eventfd"))?;
        let most = u32::from(queues) * u32::from(QUEUE_SIZE);
        // An overlay is in memory for the most part: a ring would only help with what is read from the image.
        let file = image.file.as_ref().filter(|_| image.overlay.is_none());
        // One more for the flush at the end.
        let prepared = engine::prepare(io_uring, file, most + 1);
        let block = Self {
            shared: shared.clone(),
            limits: Limits {
                capacity: image.bytes,
                read_only: mode == DiskMode::ReadOnly,
                discard: false,
                write_zeroes: false,
            },
            image,
            id,
            mode,
            block_size,
            queues,
            prepared: Some(prepared),
            engine: None,
            flying: (0..most).map(|_| None).collect(),
            free: (0..most).rev().collect(),
            write_through: false,
            rate,
            held: false,
            poll,
            idle_since: None,
            slow_writes: 0,
            reports: RateLimiter::new(&REPORTS, 0),
            started: Instant::now(),
            done: Vec::new(),
            batch: Vec::new(),
            rooms: Vec::new(),
        };
        Ok((block, BlockHandle(shared)))
    }

    /// Waits for the requests that the engine has, of `queue` or of all, and gives them to `each`. False: the deadline came first.
    fn drain(
        &mut self,
        queue: Option<u16>,
        deadline: Option<Instant>,
        mut each: impl FnMut(&mut Self, Flying, Job, std::io::Result<()>),
    ) -> bool {
        loop {
            let of_queue = |flying: &Flying| queue.is_none_or(|queue| flying.queue == queue);
            if !self.flying.iter().flatten().any(of_queue) {
                return true;
            }
            let Some(engine) = &mut self.engine else {
                return true;
            };
            if !engine.wait(deadline) {
                return false;
            }
            let mut all = std::mem::take(&mut self.done);
            engine.completed(&mut all);
            for Done { id, job, result } in all.drain(..) {
                if let Some(flying) = self.land(id) {
                    each(self, flying, job, result);
                }
            }
            self.done = all;
        }
    }

    /// Gives the disk another size, and tells the driver.
    fn resize(&mut self, bytes: u64, shrink: bool, context: &mut Context<'_>) -> Result<u64, ResizeError> {
        let id = || String::from_utf8_lossy(&self.id).trim_end_matches('\0').to_owned();
        let refused = |reason| ResizeError::NotSupported { id: id(), reason };
        let failed = |error| ResizeError::Host { id: id(), error };
        let Some(file) = &self.image.file else {
            return Err(refused("only raw disks can be resized"));
        };
        let there = file.size().map_err(failed)?;
        let wanted = if bytes == 0 { there } else { bytes };
        if wanted == 0 || !wanted.is_multiple_of(self.block_size.into()) {
            return Err(ResizeError::Size {
                id: id(),
                bytes: wanted,
                block_size: self.block_size,
            });
        }
        if wanted < there && !shrink {
            return Err(ResizeError::Cuts {
                id: id(),
                bytes: wanted,
                there,
            });
        }
        if wanted != there {
            if self.mode != DiskMode::ReadWrite {
                return Err(refused("its image cannot be changed, only its image's size taken over"));
            }
            if !file.is_regular() {
                return Err(refused(
                    "its image is a block device, whose size can only be taken over",
                ));
            }
            file.resize(wanted).map_err(failed)?;
        }
        if let Some(overlay) = &self.image.overlay {
            overlay.resize(wanted);
        }
        self.limits.capacity = wanted;
        self.image.bytes = wanted;
        self.shared.change_info(|info| info.bytes = wanted);
        context.update_config(0, &(wanted / SECTOR).to_le_bytes());
        Ok(wanted)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A descriptor by its number, for the loop.
struct Fd(RawFd);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        config::features(self.mode, self.queues)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn config(&self) -> ConfigLayout {
        config::layout(self.image.bytes, self.block_size, self.queues, self.mode)
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        let prepared = self.prepared.take().ok_or("it was started before")?;
        let engine = prepared.begin(&self.image.backend)?;
        self.shared.change_info(|info| info.engine = Some(engine.kind()));
        context.watch(&Fd(engine.fd()), ENGINE, EventSet::IN)?;
        self.engine = Some(engine);
        if let Some(rate) = &self.rate {
            context.watch(rate, RATE, EventSet::IN)?;
        }
        context.watch(&*self.shared, ORDERS, EventSet::IN)
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        self.limits.discard = context.accepted(F_DISCARD);
        self.limits.write_zeroes = context.accepted(F_WRITE_ZEROES);
        self.write_through = !context.accepted(F_FLUSH);
        Ok(())
    }

    fn notify(&mut self, _queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        self.service(context)
    }

    fn ready(&mut self, token: u32, _events: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        match token {
            ENGINE => {
                if let Some(engine) = &mut self.engine {
                    engine.woken();
                }
            }
            RATE => {
                if let Some(rate) = &self.rate {
                    rate.expired();
                }
                self.held = false;
            }
            _ => {
                for Resize { bytes, shrink, then } in self.shared.take_orders() {
                    then(self.resize(bytes, shrink, context));
                }
                return Ok(());
            }
        }
        self.service(context)
    }

    fn reset_queue(&mut self, queue: u16, context: &mut Context<'_>) {
        self.drain(Some(queue), None, |block, flying, job, result| {
            if flying.queue != queue {
                // A ring that has gone bad is noticed the next time.
                let _ = block.finish(flying.queue, flying.chain, job, result, context);
            }
        });
        for queue in 0..self.queues {
            let _ = context.interrupt(queue);
        }
    }

    fn reset(&mut self, _context: &mut Context<'_>) {
        self.drain(None, None, |_, _, _, _| {});
        self.shared.counters.in_flight(0);
        self.held = false;
        self.idle_since = None;
    }

    fn stop(&mut self, deadline: Instant) {
        let drained = self.drain(None, Some(deadline), |_, _, _, _| {});
        if self.mode != DiskMode::ReadWrite {
            return;
        }
        let Some(engine) = self.engine.as_mut().filter(|_| drained) else {
            tracing::error!("a disk was stopped in the middle of its work");
            return;
        };
        if let Err(error) = flush(&mut **engine, self.flying.len() as u32, deadline) {
            tracing::error!(%error, "a disk was stopped without a flush");
        }
    }
}

/// Has an engine without other work flush.
fn flush(engine: &mut dyn Engine, id: u32, deadline: Instant) -> std::io::Result<()> {
    let job = Job {
        operation: Operation::Flush,
        offset: 0,
        len: 0,
        buffers: Buffers::default(),
        durable: false,
    };
    engine.submit(id, job, &vm_memory::GuestMemoryMmap::default());
    let mut done = Vec::new();
    while done.is_empty() {
        if !engine.wait(Some(deadline)) {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        engine.completed(&mut done);
    }
    done.into_iter().try_for_each(|done| done.result)
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("mode", &self.mode)
            .field("bytes", &self.image.bytes)
            .finish_non_exhaustive()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.shared.end();
    }
}
