//! Drives a [`VhostUser`] without a virtual machine. Unlike [`virtio::testing::Rig`](crate::virtio::testing::Rig) it has guest memory that
//! another process can map, and lends doorbells as the PCI transport does.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use rustix::event::Timespec;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VhostUser;
use crate::dispatch::DeviceEvent;
use crate::virtio::device::{Context, Reclaim, Transport, VirtioDevice};
use crate::virtio::queue::{QueueSetup, Virtqueue};
use crate::virtio::testing::Watched;

/// Bytes of guest memory, in two pieces of this size.
pub const PIECE: usize = 1 << 20;
/// Where the second piece begins.
const SECOND: u64 = 1 << 32;
/// Entries of each queue.
pub const ENTRIES: u16 = 16;
/// Bytes between the rings of two queues.
const RINGS: u64 = 0x1000;

/// What surrounds the device.
struct Surroundings {
    /// Doorbells that are lent; without, the device has to be notified.
    bells: Option<Vec<EventFd>>,
    /// Interrupts that came through the loop, by queue.
    interrupts: RefCell<BTreeMap<u16, u32>>,
    config: RefCell<Vec<u8>>,
}

impl Transport for Surroundings {
    fn interrupt(&self, queue: u16) {
        *self.interrupts.borrow_mut().entry(queue).or_default() += 1;
    }

    fn update_config(&self, offset: usize, bytes: &[u8]) {
        self.set_config(offset, bytes);
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        let mut config = self.config.borrow_mut();
        for (place, byte) in config.iter_mut().skip(offset).zip(bytes) {
            *place = *byte;
        }
    }

    fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        let config = self.config.borrow();
        for (byte, place) in bytes.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *place;
        }
    }

    fn ring(&self, queue: u16) {
        if let Some(bell) = self.bells.as_ref().and_then(|bells| bells.get(usize::from(queue))) {
            // Fails only with a full counter.
            let _ = bell.write(1);
        }
    }

    fn queue_fds(&self, queue: u16) -> (Option<RawFd>, Option<RawFd>) {
        let bell = self.bells.as_ref().and_then(|bells| bells.get(usize::from(queue)));
        (bell.map(AsRawFd::as_raw_fd), None)
    }
}

/// Takes no memory back.
struct Keep;

impl Reclaim for Keep {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A device with its driver.
pub struct Bench {
    /// The device.
    pub device: VhostUser,
    /// Guest memory: [`PIECE`] bytes from 0 and from 4 GiB on, in one file.
    pub memory: GuestMemoryMmap,
    around: Surroundings,
    queues: Vec<Option<Virtqueue>>,
    features: u64,
    events: Watched,
    requests: Requests,
}

/// A driver's side of the rings.
pub(super) struct Requests {
    memory: GuestMemoryMmap,
    /// Requests made and taken back, by queue.
    made: Vec<u16>,
    used: Vec<u16>,
}

#[expect(clippy::expect_used, reason = "a bench without memory or a device is no bench")]
impl Bench {
    /// Starts `device`; with `lends`, its transport lends doorbells.
    ///
    /// # Panics
    ///
    /// The host gives no descriptors, or the device does not start.
    pub fn new(device: VhostUser, lends: bool) -> Self {
        let count = device.queue_sizes().len();
        let config = device.config().bytes;
        let memory = memory();
        let mut bench = Self {
            requests: Requests::new(memory.clone(), count),
            memory,
            around: Surroundings {
                bells: lends.then(|| {
                    let bell = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
                    (0..count).map(|_| bell()).collect()
                }),
                interrupts: RefCell::default(),
                config: RefCell::new(config),
            },
            queues: (0..count).map(|_| None).collect(),
            features: 0,
            events: Watched::new().expect("an epoll"),
            device,
        };
        bench
            .call(|device, context| device.start(context))
            .expect("the device starts");
        bench
    }

    /// Calls the device with its context.
    pub fn call<R>(&mut self, call: impl FnOnce(&mut VhostUser, &mut Context<'_>) -> R) -> R {
        let mut context = Context {
            memory: &self.memory,
            reclaim: &Keep,
            queues: &mut self.queues,
            features: self.features,
            transport: &self.around,
            watches: &mut self.events,
        };
        call(&mut self.device, &mut context)
    }

    /// The driver sets up all queues with whatever the device offers.
    ///
    /// # Panics
    ///
    /// The device has a fault, which a vhost-user device never has.
    pub fn activate(&mut self) {
        self.features = self.device.features() | self.device.transport_features();
        for queue in 0..self.queues.len() as u16 {
            self.enable(queue);
        }
        self.call(|device, context| device.activate(context)).expect("no fault");
        for queue in 0..self.queues.len() as u16 {
            self.notify(queue);
        }
    }

    /// The driver sets up a queue, empty.
    fn enable(&mut self, queue: u16) {
        let setup = self.requests.set_up(queue);
        let queue = Virtqueue::new(queue, setup, self.features, self.memory.clone()).expect("a queue");
        let n = usize::from(queue.index());
        self.queues[n] = Some(queue);
    }

    fn notify(&mut self, queue: u16) {
        self.call(|device, context| device.notify(queue, context))
            .expect("no fault");
    }

    /// The driver resets the device.
    pub fn reset(&mut self) {
        self.call(|device, context| device.reset(context));
        self.queues.fill_with(|| None);
        self.features = 0;
    }

    /// The driver resets a queue and sets it up again.
    pub fn reset_queue(&mut self, queue: u16) {
        self.call(|device, context| device.reset_queue(queue, context));
        self.enable(queue);
        self.notify(queue);
    }

    /// The driver writes to the configuration space, wherever it likes.
    ///
    /// # Panics
    ///
    /// The device has a fault, which a vhost-user device never has.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        for (place, byte) in self.around.config.borrow_mut().iter_mut().skip(offset).zip(bytes) {
            *place = *byte;
        }
        self.call(|device, context| device.config_written(context))
            .expect("no fault");
    }

    /// The driver makes a request of `out` with room for `room` bytes of answer, in the second piece of memory, and rings.
    ///
    /// # Panics
    ///
    /// It does not fit.
    pub fn request(&mut self, queue: u16, out: &[u8], room: u32) {
        self.requests.make(queue, out, room);
        if self.around.bells.is_some() {
            self.around.ring(queue);
        } else {
            self.notify(queue);
        }
    }

    /// What the device answered to the oldest request, if it did.
    ///
    /// # Panics
    ///
    /// It used what was not given to it.
    pub fn answer(&mut self, queue: u16) -> Option<Vec<u8>> {
        self.requests.answer(queue)
    }

    /// Interrupts for `queue` that came through the loop since the last call.
    pub fn interrupts(&self, queue: u16) -> u32 {
        self.around.interrupts.borrow_mut().remove(&queue).unwrap_or(0)
    }

    /// The configuration space.
    pub fn config(&self) -> Vec<u8> {
        self.around.config.borrow().clone()
    }

    /// What the device reported since the last call.
    pub fn reports(&mut self) -> Vec<DeviceEvent> {
        self.events.take_reports()
    }

    /// Waits up to so many milliseconds (-1: forever) for events and hands them over: how many there were.
    ///
    /// # Panics
    ///
    /// The device has a fault, which a vhost-user device never has.
    pub fn step(&mut self, milliseconds: i32) -> usize {
        let timeout = Timespec {
            tv_sec: (milliseconds / 1000).into(),
            tv_nsec: (milliseconds % 1000 * 1_000_000).into(),
        };
        let timeout = (milliseconds >= 0).then_some(&timeout);
        let events = self.events.wait(timeout).expect("events");
        let count = events.len();
        for (fd, set) in events {
            // An earlier event may have ended its watch.
            if let Some(token) = self.events.token(fd) {
                self.call(|device, context| device.ready(token, set, context))
                    .expect("no fault");
            }
        }
        count
    }
}

#[expect(clippy::expect_used, reason = "a driver without memory is no driver")]
impl Requests {
    pub(super) fn new(memory: GuestMemoryMmap, queues: usize) -> Self {
        Self {
            memory,
            made: vec![0; queues],
            used: vec![0; queues],
        }
    }

    /// Makes the rings of a queue empty, and says where they are.
    pub(super) fn set_up(&mut self, queue: u16) -> QueueSetup {
        let setup = Self::setup(queue);
        self.memory
            .write_slice(&[0; RINGS as usize], GuestAddress(setup.descriptors))
            .expect("in memory");
        let n = usize::from(queue);
        (self.made[n], self.used[n]) = (0, 0);
        setup
    }

    fn setup(queue: u16) -> QueueSetup {
        let base = RINGS * (1 + u64::from(queue));
        QueueSetup {
            size: ENTRIES,
            descriptors: base,
            available: base + 0x400,
            used: base + 0x800,
        }
    }

    /// Makes a request of `out` with room for `room` bytes of answer, without ringing.
    pub(super) fn make(&mut self, queue: u16, out: &[u8], room: u32) {
        let n = usize::from(queue);
        let (setup, slot) = (Self::setup(queue), self.made[n] % (ENTRIES / 2));
        let (out_at, in_at) = Self::buffers(queue, slot);
        let write = |bytes: &[u8], at: u64| {
            self.memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
        };
        write(out, out_at);
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            [
                &address.to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ]
            .concat()
        };
        let head = slot * 2;
        let at = setup.descriptors + 16 * u64::from(head);
        write(&descriptor(out_at, out.len() as u32, 1, head + 1), at);
        write(&descriptor(in_at, room, 2, 0), at + 16);
        // With VIRTIO_F_EVENT_IDX: wants to be told of the next one.
        let used_event = setup.available + 4 + 2 * u64::from(ENTRIES);
        write(&self.used[n].to_le_bytes(), used_event);
        let entry = setup.available + 4 + 2 * u64::from(self.made[n] % ENTRIES);
        write(&head.to_le_bytes(), entry);
        self.made[n] = self.made[n].wrapping_add(1);
        write(&self.made[n].to_le_bytes(), setup.available + 2);
    }

    /// What the device answered to the oldest request, if it did.
    pub(super) fn answer(&mut self, queue: u16) -> Option<Vec<u8>> {
        let n = usize::from(queue);
        let setup = Self::setup(queue);
        let read_u16 = |at: u64| self.memory.read_obj::<u16>(GuestAddress(at)).expect("in memory");
        if read_u16(setup.used + 2) == self.used[n] {
            return None;
        }
        let at = setup.used + 4 + 8 * u64::from(self.used[n] % ENTRIES);
        let (head, written) = (read_u16(at), read_u16(at + 4));
        assert_eq!(head % 2, 0, "a chain begins at an even descriptor");
        self.used[n] = self.used[n].wrapping_add(1);
        let mut bytes = vec![0; usize::from(written)];
        let (_, in_at) = Self::buffers(queue, head / 2);
        self.memory
            .read_slice(&mut bytes, GuestAddress(in_at))
            .expect("in memory");
        Some(bytes)
    }

    /// Where a request's buffers are: 8 KiB each, in the second piece.
    fn buffers(queue: u16, slot: u16) -> (u64, u64) {
        let place = u64::from(queue) * u64::from(ENTRIES / 2) + u64::from(slot);
        let at = SECOND + place * 0x4000;
        (at, at + 0x2000)
    }
}

#[expect(clippy::expect_used, reason = "a bench without memory is no bench")]
pub(super) fn memory() -> GuestMemoryMmap {
    let file = rustix::fs::memfd_create(c"guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = Arc::new(File::from(file));
    file.set_len(2 * PIECE as u64).expect("a file of this size");
    let place = |offset| Some(FileOffset::from_arc(Arc::clone(&file), offset));
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(0), PIECE, place(0)),
        (GuestAddress(SECOND), PIECE, place(PIECE as u64)),
    ])
    .expect("guest memory")
}
