//! Memory device (virtio 5.15): blocks of a region that the guest plugs and unplugs as it is asked to.
//!
//! ```text
//!   owner: request(bytes) --> requested_size --> driver --PLUG, UNPLUG, UNPLUG_ALL, STATE--> blocks::Blocks decides
//!                             plugged_size <-------------------------------------------------- '-- unplugged: discard --> host
//! ```
//!
//! The machine maps the whole region as guest memory from the start; the host gives pages as they are touched. So plugging costs nothing, and
//! unplugging gives the pages back. All of the region is usable: what is requested bounds how much is plugged, not where.
//!
//! VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE is offered. Reading an unplugged block would make the host give pages for it, as guest memory is
//! shared memory, which has no page of zeroes to lend; a driver that accepts the feature does not read there. Nothing hinders a guest that
//! does all the same: it gets memory that is not accounted as plugged, within the region that its owner gave and the limit of its component.
//!
//! A reset of the device changes no block (virtio 5.15.5.2): the next driver finds what is plugged and asks for the state, or unplugs all. Only a
//! new machine begins with nothing plugged.
//!
//! System calls of its thread beside those of [`dispatch`](crate::dispatch): what [`Reclaim`](super::device::Reclaim) does (`fallocate` or
//! `madvise`), `timerfd_settime`, `read`.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};
use super::violation::Violation;
use crate::alarm::{Alarm, Pace};
use crate::dispatch::{DeviceError, DeviceEvent};
use crate::interrupt::lock;

use blocks::{Blocks, Decision, Request, Response};

mod blocks;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The device's only queue (virtio 5.15.2).
const QUEUE: u16 = 0;

/// Entries of the queue; Linux has one request under way.
const QUEUE_SIZE: u16 = 64;

/// Places in the configuration space (virtio 5.15.4).
const PLUGGED_SIZE: usize = 40;
const REQUESTED_SIZE: usize = 48;

/// Requests answered before the loop looks at its other events.
const REQUESTS_A_TURN: usize = 16;

/// The least time between two events that the memory has changed.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// Smallest block: a page, which is what can be given back.
const SMALLEST_BLOCK: u64 = 4096;

/// Most blocks of a region: their map takes 2 MiB then.
const MOST_BLOCKS: u64 = 1 << 24;

/// Tokens of the watched descriptors.
const OWNER: u32 = 0;
const ALARM: u32 = 1;

/// How a memory device is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDeviceConfig {
    /// Bytes of a block: a power of two, at least 4096.
    pub block_size: u64,
    /// Guest physical addresses of the region, multiples of the block size: guest memory that is described to the guest by nothing else.
    pub region: Range<u64>,
    /// Bytes that are to be plugged at the start: a multiple of the block size, at most the region's size.
    pub requested: u64,
}

/// How much memory there is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySizes {
    /// Of a block.
    pub block: u64,
    /// Of the region.
    pub region: u64,
    /// The part of the region in which blocks can be plugged now.
    pub usable: u64,
    /// What is plugged.
    pub plugged: u64,
    /// What the guest is asked to have plugged.
    pub requested: u64,
}

/// So much memory cannot be requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes cannot be plugged: it has to be a multiple of {block_size} and at most {region_size}")]
pub struct BadRequest {
    /// What was asked for.
    pub bytes: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes of the region.
    pub region_size: u64,
}

/// What device and owner share.
#[derive(Debug)]
struct Shared {
    bell: EventFd,
    sizes: Mutex<MemorySizes>,
}

/// The memory's owner's side. Nothing here waits.
#[derive(Clone, Debug)]
pub struct MemoryHandle(Arc<Shared>);

impl MemoryHandle {
    /// Asks the guest to have so many bytes plugged. It may take its time, or never get there.
    ///
    /// # Errors
    ///
    /// Not a multiple of the block size, or more than the region.
    pub fn request(&self, bytes: u64) -> Result<(), BadRequest> {
        let mut sizes = lock(&self.0.sizes);
        if !bytes.is_multiple_of(sizes.block) || bytes > sizes.region {
            return Err(BadRequest {
                bytes,
                block_size: sizes.block,
                region_size: sizes.region,
            });
        }
        sizes.requested = bytes;
        drop(sizes);
        // Fails only with a full counter, and then the device has been told.
        let _ = self.0.bell.write(1);
        Ok(())
    }

    /// How much there is.
    pub fn sizes(&self) -> MemorySizes {
        *lock(&self.0.sizes)
    }
}

/// The device.
pub struct MemoryDevice {
    blocks: Blocks,
    shared: Arc<Shared>,
    alarm: Alarm,
    pace: Pace,
}

impl MemoryDevice {
    /// A device and its owner's side.
    ///
    /// # Errors
    ///
    /// Sizes or addresses that do not fit together, or the host gives no eventfd or timerfd.
    pub fn new(config: MemoryDeviceConfig) -> io::Result<(Self, MemoryHandle)> {
        let MemoryDeviceConfig {
            block_size,
            region,
            requested,
        } = config;
        let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if !block_size.is_power_of_two() || block_size < SMALLEST_BLOCK {
            return wrong(format!(
                "a block of {block_size} bytes; it has to be a power of two, at least {SMALLEST_BLOCK}"
            ));
        }
        let aligned = region.start.is_multiple_of(block_size) && region.end.is_multiple_of(block_size);
        if region.is_empty() || !aligned || (region.end - region.start) / block_size > MOST_BLOCKS {
            return wrong(format!(
                "a region from {:#x} to {:#x}; it has to be 1 to {MOST_BLOCKS} blocks of {block_size:#x} bytes",
                region.start, region.end
            ));
        }
        let region_size = region.end - region.start;
        if !requested.is_multiple_of(block_size) || requested > region_size {
            let error = BadRequest {
                bytes: requested,
                block_size,
                region_size,
            };
            return wrong(error.to_string());
        }
        let shared = Arc::new(Shared {
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            sizes: Mutex::new(MemorySizes {
                block: block_size,
                region: region_size,
                usable: region_size,
                plugged: 0,
                requested,
            }),
        });
        let device = Self {
            blocks: Blocks::new(block_size, region, requested),
            shared: Arc::clone(&shared),
            alarm: Alarm::new()?,
            pace: Pace::new(EVENT_INTERVAL),
        };
        Ok((device, MemoryHandle(shared)))
    }

    /// Answers requests until there are none or the turn is over.
    fn pump(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
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
            let length = |what, got: u32, expected| Violation::Length {
                queue: QUEUE,
                what,
                got: got.into(),
                expected,
            };
            let mut bytes = [0; Request::BYTES];
            let read = chain.reader(memory).read(&mut bytes);
            read.map_err(|_| length("a memory request", chain.readable_bytes(), "at least 24"))?;
            if chain.writable_bytes() < Response::BYTES as u32 {
                let error = length("room for a memory response", chain.writable_bytes(), "at least 10");
                return Err(Fault::Violation(error));
            }
            let response = self.carry_out(Request::parse(&bytes), context);
            // There is room.
            let _ = chain.writer(memory).write(&response.bytes());
            if let Some(queue) = context.queue(QUEUE) {
                queue.push(chain, Response::BYTES as u32)?;
            }
        }
        context.interrupt(QUEUE)?;
        context.ring(QUEUE);
        Ok(())
    }

    fn carry_out(&mut self, request: Request, context: &Context<'_>) -> Response {
        let decision = self.blocks.decide(request);
        match &decision {
            Decision::Answer(response) => return *response,
            Decision::Plug(_) => {}
            Decision::Unplug(blocks) => {
                let addresses = self.blocks.addresses(blocks);
                let len = addresses.end - addresses.start;
                if let Err(error) = context.reclaim.discard(addresses.start, len) {
                    context.report(DeviceEvent::IoError {
                        device: context.name().into(),
                        operation: "discard",
                        reason: error.to_string(),
                        no_space: false,
                    });
                    return Response::Busy;
                }
            }
        }
        self.blocks.done(&decision);
        let plugged = self.blocks.plugged_size();
        lock(&self.shared.sizes).plugged = plugged;
        // Not a reason to interrupt the driver (virtio 5.15.4): it knows, and would look for work.
        context.set_config(PLUGGED_SIZE, &plugged.to_le_bytes());
        self.pace.changed();
        Response::Ack
    }

    /// Takes over what the owner asked for.
    fn take_orders(&mut self, context: &Context<'_>) {
        // Nonblocking; all that it can say is that somebody rang.
        let _ = self.shared.bell.read();
        let requested = lock(&self.shared.sizes).requested;
        if requested != self.blocks.requested_size() {
            self.blocks.request(requested);
            context.update_config(REQUESTED_SIZE, &requested.to_le_bytes());
            self.pace.changed();
        }
    }

    /// Tells the owner what has changed and is due, and sets the alarm for what comes next.
    fn settle(&mut self, context: &Context<'_>) -> Result<(), Fault> {
        if self.pace.take(Instant::now()) {
            context.report(DeviceEvent::MemoryChanged {
                device: context.name().into(),
                plugged: self.blocks.plugged_size(),
                requested: self.blocks.requested_size(),
            });
        }
        self.alarm.set(self.pace.next()).map_err(|e| Fault::Host(e.into()))
    }
}

impl VirtioDevice for MemoryDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Memory
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> ConfigLayout {
        let blocks = &self.blocks;
        let fields = [
            blocks.block_size(),
            // node_id, without meaning, and padding.
            0,
            blocks.region().start,
            blocks.region_size(),
            // usable_region_size
            blocks.region_size(),
            blocks.plugged_size(),
            blocks.requested_size(),
        ];
        ConfigLayout {
            bytes: fields.into_iter().flat_map(u64::to_le_bytes).collect(),
            writable: Vec::new(),
        }
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        context.watch(&self.shared.bell, OWNER, EventSet::IN)?;
        context.watch(&self.alarm, ALARM, EventSet::IN)
    }

    fn notify(&mut self, _: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        self.pump(context)?;
        self.settle(context)
    }

    fn ready(&mut self, token: u32, _: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        match token {
            OWNER => self.take_orders(context),
            _ => {
                self.alarm.rang();
            }
        }
        self.settle(context)
    }

    fn reset(&mut self, _: &mut Context<'_>) {
        // No request outlives a call, and the blocks stay as they are.
    }
}

#[cfg(test)]
mod tests;
