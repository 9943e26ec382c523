//! Drives a [`VirtioDevice`] without a virtual machine: rings in a memory of a few MiB, written by the test as a driver would, or as one that
//! breaks the rules.

mod bench;

use std::collections::BTreeMap;

use rustix::event::Timespec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use self::bench::Bench;
pub(crate) use self::bench::Watched;
use super::device::{Context, Fault, VirtioDevice};
use super::feature;
use super::queue::{QueueSetup, Virtqueue};
use crate::dispatch::DeviceEvent;

/// Bytes of the rig's guest memory, from address 0.
pub const MEMORY: u64 = 16 << 20;
/// Where buffers of the fake driver begin; below are the rings.
const BUFFERS: u64 = 1 << 20;
/// Bytes of guest memory for the rings of one queue.
const RING_SPACE: u64 = 0x8000;
/// Entries that a queue of the rig has at most, whatever the device allows.
pub const QUEUE_SIZE: u16 = 256;

/// A buffer of a request.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// For the device to read.
    Out(Vec<u8>),
    /// For the device to write, of this many bytes.
    In(u32),
}

/// A request that the device gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
    /// What its `In` buffers hold now, one after the other, all of their bytes.
    pub bytes: Vec<u8>,
}

/// The driver's side of one queue.
pub struct DriverQueue {
    /// Where its rings are.
    pub setup: QueueSetup,
    free: Vec<u16>,
    /// Those under way, by their first descriptors.
    requests: BTreeMap<u16, Request>,
    available: u16,
    used: u16,
}

/// A request under way.
#[derive(Default)]
struct Request {
    descriptors: Vec<u16>,
    /// Addresses and lengths of its `In` buffers.
    ins: Vec<(u64, u32)>,
}

impl DriverQueue {
    fn new(index: u16, size: u16) -> Self {
        let base = 0x1000 + RING_SPACE * u64::from(index);
        Self {
            setup: QueueSetup {
                size,
                descriptors: base,
                available: base + 0x4000,
                used: base + 0x6000,
            },
            free: (0..size).rev().collect(),
            requests: BTreeMap::new(),
            available: 0,
            used: 0,
        }
    }
}

/// A device on a bench.
pub struct Rig<D: VirtioDevice> {
    /// The device.
    pub device: D,
    /// Guest memory: [`MEMORY`] bytes from 0.
    pub memory: GuestMemoryMmap,
    /// The driver's side of each queue.
    pub drivers: Vec<DriverQueue>,
    /// What the device reported.
    pub bench: Bench,
    queues: Vec<Option<Virtqueue>>,
    features: u64,
    next_buffer: u64,
    list: Watched,
}

impl<D: VirtioDevice> Rig<D> {
    /// Starts `device`; it rests until [`activate`](Self::activate).
    ///
    /// # Panics
    ///
    /// The host gives no memory or epoll, or the device does not start.
    #[expect(clippy::expect_used, reason = "a bench without memory or a device is no bench")]
    pub fn new(device: D) -> Self {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("the rig's guest memory");
        let sizes = device.queue_sizes();
        let mut rig = Self {
            bench: Bench::new(device.config().bytes, memory.clone()),
            drivers: (0..)
                .zip(&sizes)
                .map(|(n, &size)| DriverQueue::new(n, size.min(QUEUE_SIZE)))
                .collect(),
            queues: sizes.iter().map(|_| None).collect(),
            memory,
            device,
            features: 0,
            next_buffer: BUFFERS,
            list: Watched::new().expect("the rig's epoll"),
        };
        rig.call(|device, context| device.start(context))
            .expect("the device starts");
        rig
    }

    /// Starts `device` and activates it with every feature it offers.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new), or the device refuses.
    #[expect(clippy::expect_used, reason = "a bench without a device is no bench")]
    pub fn active(device: D) -> Self {
        let mut rig = Self::new(device);
        rig.activate(u64::MAX).expect("the device is activated");
        rig
    }

    /// Sets all queues up anew and activates the device; of `features` it gets those that it offers, with the transport's.
    ///
    /// # Errors
    ///
    /// The device's fault.
    pub fn activate(&mut self, features: u64) -> Result<(), Fault> {
        self.features = (self.device.features() & features) | (feature::TRANSPORT & features) | feature::VERSION_1;
        for (n, driver) in (0u16..).zip(&mut self.drivers) {
            *driver = DriverQueue::new(n, driver.setup.size);
            let zeroes = vec![0; RING_SPACE as usize];
            // The rings lie inside the rig's memory.
            let _ = self.memory.write_slice(&zeroes, GuestAddress(driver.setup.descriptors));
            let queue = Virtqueue::new(n, driver.setup, self.features, self.memory.clone())?;
            self.queues[usize::from(n)] = Some(queue);
        }
        self.guarded(|device, context| device.activate(context))?;
        (0..self.queues.len() as u16)
            .try_for_each(|queue| self.guarded(|device, context| device.notify(queue, context)))
    }

    /// Resets the device, as its driver would.
    pub fn reset(&mut self) {
        self.call(|device, context| device.reset(context));
        self.queues.fill_with(|| None);
        self.features = 0;
        self.next_buffer = BUFFERS;
    }

    /// Resets one queue and enables it again, empty.
    ///
    /// # Errors
    ///
    /// The device's fault.
    pub fn reset_queue(&mut self, index: u16) -> Result<(), Fault> {
        self.call(|device, context| device.reset_queue(index, context));
        let n = usize::from(index);
        self.queues[n] = None;
        self.drivers[n] = DriverQueue::new(index, self.drivers[n].setup.size);
        let _ = self.memory.write_slice(
            &vec![0; RING_SPACE as usize],
            GuestAddress(self.drivers[n].setup.descriptors),
        );
        self.queues[n] = Some(Virtqueue::new(
            index,
            self.drivers[n].setup,
            self.features,
            self.memory.clone(),
        )?);
        self.guarded(|device, context| device.notify(index, context))
    }

    /// Whether the device is active: neither resting nor stopped by a fault.
    pub fn is_active(&self) -> bool {
        self.features != 0
    }

    /// Makes a request of `buffers` available on `queue`, without ringing. Returns its first descriptor.
    ///
    /// # Panics
    ///
    /// There are more requests under way than the ring or the rig's memory holds.
    #[expect(clippy::expect_used, reason = "a test that asks for too much is to fail")]
    pub fn add(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let n = usize::from(queue);
        let mut taken = Vec::new();
        let mut ins = Vec::new();
        let mut descriptors = Vec::new();
        for buffer in buffers {
            let (len, flags) = match buffer {
                Buffer::Out(bytes) => (bytes.len() as u32, 0),
                Buffer::In(len) => (*len, 2),
            };
            let address = self.allocate(len);
            match buffer {
                Buffer::Out(bytes) => self
                    .memory
                    .write_slice(bytes, GuestAddress(address))
                    .expect("in memory"),
                Buffer::In(_) => ins.push((address, len)),
            }
            taken.push(self.drivers[n].free.pop().expect("a free descriptor"));
            descriptors.push((address, len, flags));
        }
        for (i, &(address, len, flags)) in descriptors.iter().enumerate() {
            let next = taken.get(i + 1).copied();
            let flags = flags | u16::from(next.is_some());
            self.write_descriptor(queue, taken[i], address, len, flags, next.unwrap_or(0));
        }
        let head = *taken.first().expect("at least one buffer");
        self.drivers[n].requests.insert(
            head,
            Request {
                descriptors: taken,
                ins,
            },
        );
        self.make_available(queue, head);
        head
    }

    /// Room for `len` bytes in guest memory. What was given out long ago is given out again.
    pub fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len).next_multiple_of(16);
        assert!(len <= MEMORY - BUFFERS, "the rig's memory is {MEMORY} bytes");
        if self.next_buffer + len > MEMORY {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.next_buffer += len;
        address
    }

    /// Writes one descriptor of the table of `queue`, whatever it says.
    pub fn write_descriptor(&self, queue: u16, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let table = self.drivers[usize::from(queue)].setup.descriptors;
        self.write_raw_descriptor(table + 16 * u64::from(index), address, len, flags, next);
    }

    /// Writes a descriptor at guest address `at`: for indirect tables.
    pub fn write_raw_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        // A place outside of memory is a test's own affair.
        let _ = self.memory.write_slice(&bytes, GuestAddress(at));
    }

    /// Puts `head` into the available ring of `queue`.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let driver = &mut self.drivers[usize::from(queue)];
        let slot = u64::from(driver.available % driver.setup.size);
        let at = driver.setup.available + 4 + 2 * slot;
        driver.available = driver.available.wrapping_add(1);
        let (index, at_index) = (driver.available, driver.setup.available + 2);
        let _ = self.memory.write_slice(&head.to_le_bytes(), GuestAddress(at));
        let _ = self.memory.write_slice(&index.to_le_bytes(), GuestAddress(at_index));
    }

    /// Writes the available index of `queue`, whatever it says.
    pub fn set_available_index(&mut self, queue: u16, index: u16) {
        let driver = &mut self.drivers[usize::from(queue)];
        driver.available = index;
        let at = GuestAddress(driver.setup.available + 2);
        let _ = self.memory.write_slice(&index.to_le_bytes(), at);
    }

    /// Rings the doorbell of `queue`, and lets the device come to rest.
    ///
    /// # Panics
    ///
    /// The device has a fault.
    #[expect(clippy::expect_used, reason = "the test expects the device to go on")]
    pub fn kick(&mut self, queue: u16) {
        self.try_kick(queue).expect("the device goes on");
    }

    /// [`kick`](Self::kick) for a device that may have a fault.
    ///
    /// # Errors
    ///
    /// The device's fault; it rests then.
    pub fn try_kick(&mut self, queue: u16) -> Result<(), Fault> {
        if self.queues.get(usize::from(queue)).is_some_and(Option::is_some) {
            self.guarded(|device, context| device.notify(queue, context))?;
        }
        self.settle()
    }

    /// Makes one request, rings, and returns it once the device gives it back, which it does without anything from outside.
    ///
    /// # Panics
    ///
    /// The device has a fault, or does not give it back by itself.
    #[expect(clippy::expect_used, reason = "the test expects the device to answer")]
    pub fn request(&mut self, queue: u16, buffers: &[Buffer]) -> Used {
        let head = self.add(queue, buffers);
        self.kick(queue);
        loop {
            match self.used(queue) {
                Some(used) if used.head == head => return used,
                Some(_) => {}
                None => self.wait().expect("the device goes on"),
            }
        }
    }

    /// The next request of `queue` that the device gave back.
    pub fn used(&mut self, queue: u16) -> Option<Used> {
        let driver = &mut self.drivers[usize::from(queue)];
        let read_u16 = |at: u64| {
            self.memory
                .read_obj::<u16>(GuestAddress(at))
                .map(u16::from_le)
                .unwrap_or(0)
        };
        if read_u16(driver.setup.used + 2) == driver.used {
            return None;
        }
        let at = driver.setup.used + 4 + 8 * u64::from(driver.used % driver.setup.size);
        let read_u32 = |at: u64| {
            self.memory
                .read_obj::<u32>(GuestAddress(at))
                .map(u32::from_le)
                .unwrap_or(0)
        };
        let (head, written) = (read_u32(at) as u16, read_u32(at + 4));
        driver.used = driver.used.wrapping_add(1);
        // With VIRTIO_F_EVENT_IDX: wants to be told of the next one.
        let used_event = driver.setup.available + 4 + 2 * u64::from(driver.setup.size);
        let _ = self
            .memory
            .write_slice(&driver.used.to_le_bytes(), GuestAddress(used_event));
        let Request { descriptors, ins } = driver.requests.remove(&head).unwrap_or_default();
        driver.free.extend(descriptors);
        let mut bytes = Vec::new();
        for (address, len) in ins {
            let start = bytes.len();
            bytes.resize(start + len as usize, 0);
            let _ = self.memory.read_slice(&mut bytes[start..], GuestAddress(address));
        }
        Some(Used { head, written, bytes })
    }

    /// Writes `bytes` to the configuration space as the driver would: where it may write.
    ///
    /// # Errors
    ///
    /// The device's fault.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) -> Result<(), Fault> {
        let writable = self.device.config().writable;
        {
            let mut config = self.bench.config.borrow_mut();
            for (at, byte) in (offset..).zip(bytes) {
                if writable.iter().any(|range| range.contains(&at))
                    && let Some(place) = config.get_mut(at)
                {
                    *place = *byte;
                }
            }
        }
        self.guarded(|device, context| device.config_written(context))
    }

    /// Hands the device the events that are there, and the doorbells it rang itself: how many there were.
    ///
    /// # Errors
    ///
    /// The device's fault; it rests then.
    pub fn step(&mut self) -> Result<usize, Fault> {
        self.poll(false)
    }

    /// Waits for an event on what the device watches, and hands it over.
    ///
    /// # Errors
    ///
    /// The device's fault; it rests then.
    pub fn wait(&mut self) -> Result<(), Fault> {
        self.poll(true).map(|_| ())
    }

    /// Steps until there is nothing to do.
    ///
    /// # Errors
    ///
    /// The device's fault; it rests then.
    ///
    /// # Panics
    ///
    /// The device does not come to rest.
    pub fn settle(&mut self) -> Result<(), Fault> {
        for _ in 0..100_000 {
            if self.step()? == 0 {
                return Ok(());
            }
        }
        panic!("the device does not come to rest");
    }

    /// What the device reported since the last call.
    pub fn reports(&mut self) -> Vec<DeviceEvent> {
        self.list.take_reports()
    }

    /// Calls the device with its context.
    pub fn call<R>(&mut self, call: impl FnOnce(&mut D, &mut Context<'_>) -> R) -> R {
        let mut context = Context {
            memory: &self.memory,
            reclaim: &self.bench.host,
            queues: &mut self.queues,
            features: self.features,
            transport: &self.bench,
            watches: &mut self.list,
        };
        call(&mut self.device, &mut context)
    }

    /// Calls the device; a fault makes it rest, as its transport would.
    fn guarded(&mut self, call: impl FnOnce(&mut D, &mut Context<'_>) -> Result<(), Fault>) -> Result<(), Fault> {
        let result = self.call(call);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn poll(&mut self, wait: bool) -> Result<usize, Fault> {
        let rung = self.bench.rung.take();
        let mut count = rung.len();
        for queue in rung {
            if self.queues.get(usize::from(queue)).is_some_and(Option::is_some) {
                self.guarded(|device, context| device.notify(queue, context))?;
            }
        }
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = (!wait || count > 0).then_some(&now);
        let events = self.list.wait(timeout).map_err(|error| Fault::Host(error.into()))?;
        for (fd, set) in events {
            // An earlier event may have ended its watch.
            if let Some(token) = self.list.token(fd) {
                count += 1;
                self.guarded(|device, context| device.ready(token, set, context))?;
            }
        }
        Ok(count)
    }
}
