//! What surrounds a device without a virtual machine: its transport, the machine that takes memory back, and an event loop without a thread.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;

use event_manager::EventSet;
use rustix::event::{Timespec, epoll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::dispatch::{DeviceError, DeviceEvent};
use crate::interrupt::lock;
use crate::virtio::device::{Reclaim, Transport, WatchList};

/// What surrounds the device: stands in for its transport and its machine.
pub struct Bench {
    pub(super) config: RefCell<Vec<u8>>,
    config_changes: Cell<u32>,
    interrupts: RefCell<BTreeMap<u16, u32>>,
    /// Queues that the device wants to look at again.
    pub(super) rung: RefCell<BTreeSet<u16>>,
    pub(super) host: Host,
}

/// Takes memory back.
pub(super) struct Host {
    discarded: Mutex<Vec<(u64, u64)>>,
    memory: GuestMemoryMmap,
}

impl Bench {
    /// For a device with this configuration space, in `memory`.
    pub(super) fn new(config: Vec<u8>, memory: GuestMemoryMmap) -> Self {
        Self {
            config: RefCell::new(config),
            config_changes: Cell::new(0),
            interrupts: RefCell::default(),
            rung: RefCell::default(),
            host: Host {
                discarded: Mutex::default(),
                memory,
            },
        }
    }

    /// Interrupts for `queue` since the last call.
    pub fn interrupts(&self, queue: u16) -> u32 {
        self.interrupts.borrow_mut().remove(&queue).unwrap_or(0)
    }

    /// Changes of the configuration space that the driver was told of since the last call.
    pub fn config_changes(&self) -> u32 {
        self.config_changes.take()
    }

    /// The configuration space.
    pub fn config(&self) -> Vec<u8> {
        self.config.borrow().clone()
    }

    /// Ranges (start, length) given back to the host since the last call.
    pub fn discarded(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *lock(&self.host.discarded))
    }
}

impl Transport for Bench {
    fn interrupt(&self, queue: u16) {
        *self.interrupts.borrow_mut().entry(queue).or_default() += 1;
    }

    fn update_config(&self, offset: usize, bytes: &[u8]) {
        let before = self.config();
        self.set_config(offset, bytes);
        if *self.config.borrow() != before {
            self.config_changes.set(self.config_changes.get() + 1);
        }
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        for (place, byte) in self.config.borrow_mut().iter_mut().skip(offset).zip(bytes) {
            *place = *byte;
        }
    }

    fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        let config = self.config.borrow();
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = offset
                .checked_add(n)
                .and_then(|at| config.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    fn ring(&self, queue: u16) {
        self.rung.borrow_mut().insert(queue);
    }

    fn queue_fds(&self, _: u16) -> (Option<RawFd>, Option<RawFd>) {
        (None, None)
    }
}

impl Reclaim for Host {
    fn discard(&self, start: u64, len: u64) -> io::Result<()> {
        let whole = start.is_multiple_of(4096) && len.is_multiple_of(4096);
        let inside = usize::try_from(len).is_ok_and(|len| self.memory.check_range(GuestAddress(start), len));
        if !whole || !inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let zeroes = vec![0; len as usize];
        self.memory
            .write_slice(&zeroes, GuestAddress(start))
            .map_err(io::Error::other)?;
        lock(&self.discarded).push((start, len));
        Ok(())
    }
}

/// An event loop without a thread: an epoll that the test looks at.
pub(crate) struct Watched {
    epoll: OwnedFd,
    tokens: BTreeMap<RawFd, u32>,
    reports: RefCell<Vec<DeviceEvent>>,
}

fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the device that asks to watch a descriptor owns it, and the borrow ends within the call it is made for.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

impl Watched {
    /// Nothing is watched yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            tokens: BTreeMap::new(),
            reports: RefCell::default(),
        })
    }

    /// What was reported since the last call.
    pub(crate) fn take_reports(&mut self) -> Vec<DeviceEvent> {
        std::mem::take(self.reports.get_mut())
    }

    /// Waits at most this long (`None`: for ever) for events: descriptors, and what happened to them.
    pub(crate) fn wait(&self, timeout: Option<&Timespec>) -> io::Result<Vec<(RawFd, EventSet)>> {
        let mut events = Vec::with_capacity(32);
        loop {
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let set = |event: &epoll::Event| {
            let flags = event.flags;
            EventSet::from_bits(flags.bits()).unwrap_or(EventSet::IN)
        };
        Ok(events
            .iter()
            .map(|event| (event.data.u64() as RawFd, set(event)))
            .collect())
    }

    /// The token of a descriptor; `None` if its watch has ended meanwhile.
    pub(crate) fn token(&self, fd: RawFd) -> Option<u32> {
        self.tokens.get(&fd).copied()
    }
}

impl WatchList for Watched {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        let flags = epoll::EventFlags::from_bits_retain(events.bits());
        epoll::add(&self.epoll, borrow(fd), epoll::EventData::new_u64(fd as u64), flags)?;
        self.tokens.insert(fd, token);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        let flags = epoll::EventFlags::from_bits_retain(events.bits());
        epoll::modify(&self.epoll, borrow(fd), epoll::EventData::new_u64(fd as u64), flags)?;
        self.tokens.insert(fd, token);
        Ok(())
    }

    fn remove(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        epoll::delete(&self.epoll, borrow(fd))?;
        self.tokens.remove(&fd);
        Ok(())
    }

    fn device(&self) -> &str {
        "device"
    }

    fn report(&self, event: DeviceEvent) {
        self.reports.borrow_mut().push(event);
    }
}
