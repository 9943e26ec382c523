//! How long a disk takes for a request, without a virtual machine: a driver's thread that looks for answers all the time, and the device on its own
//! thread, as they would be with a guest; only the guest's exits are missing.
//!
//! `cargo run --release -p sepal-devices --example block_latency [IMAGE]`; without an image, one of 256 MiB in the folder for temporary files. All of
//! it is in the page cache.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use rustix::event::epoll;
use sepal_devices::dispatch::{DeviceError, DeviceEvent};
use sepal_devices::virtio::block::{Block, BlockConfig, DiskFormat, DiskMode};
use sepal_devices::virtio::device::{Context, Reclaim, Transport, VirtioDevice, WatchList};
use sepal_devices::virtio::feature;
use sepal_devices::virtio::queue::{QueueSetup, Virtqueue};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const IMAGE: u64 = 256 << 20;
const ENTRIES: u16 = 256;
const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
/// Headers and statuses, 64 bytes a request; then data, 1 MiB a request.
const HEADERS: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const MOST: u16 = 32;
const SETUP: QueueSetup = QueueSetup {
    size: ENTRIES,
    descriptors: DESCRIPTORS,
    available: AVAILABLE,
    used: USED,
};
const DOORBELL: u32 = 1000;
/// The device's first token.
const ENGINE: u32 = 0;

struct Surroundings {
    epoll: OwnedFd,
    again: AtomicBool,
}

impl Surroundings {
    fn new() -> Outcome<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            again: AtomicBool::new(false),
        })
    }

    /// Starts a device with its queue, has `work` done with it, and resets it.
    fn run(
        &self,
        mut block: Block,
        memory: &GuestMemoryMmap,
        work: impl FnOnce(&mut Block, &mut Context<'_>) -> Outcome<()>,
    ) -> Outcome<()> {
        let features = block.features() | feature::VERSION_1 | feature::EVENT_IDX;
        let mut context = Context {
            memory,
            reclaim: self,
            queues: &mut [Some(Virtqueue::new(0, SETUP, features, memory.clone())?)],
            features,
            transport: self,
            watches: &mut Watched(self),
        };
        block.start(&mut context)?;
        block.activate(&mut context)?;
        work(&mut block, &mut context)?;
        block.reset(&mut context);
        Ok(())
    }
}

impl Transport for Surroundings {
    fn interrupt(&self, _: u16) {}
    fn update_config(&self, _: usize, _: &[u8]) {}
    fn set_config(&self, _: usize, _: &[u8]) {}

    fn read_config(&self, _: usize, _: &mut [u8]) {}
    fn ring(&self, _: u16) {
        self.again.store(true, Ordering::Relaxed);
    }
    fn queue_fds(&self, _: u16) -> (Option<RawFd>, Option<RawFd>) {
        (None, None)
    }
}

impl Reclaim for Surroundings {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

struct Watched<'a>(&'a Surroundings);

impl WatchList for Watched<'_> {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        // SAFETY: the device owns what it asks to watch, for the time of this call at least.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let data = epoll::EventData::new_u64(token.into());
        Ok(epoll::add(
            &self.0.epoll,
            fd,
            data,
            epoll::EventFlags::from_bits_retain(events.bits()),
        )?)
    }
    fn modify(&mut self, _: RawFd, _: u32, _: EventSet) -> Result<(), DeviceError> {
        Ok(())
    }
    fn remove(&mut self, _: RawFd) -> Result<(), DeviceError> {
        Ok(())
    }
    fn device(&self) -> &str {
        "disk"
    }
    fn report(&self, event: DeviceEvent) {
        eprintln!("{event:?}");
    }
}

/// Keeps the calling thread on one processor: the two threads would else meet on one, on a busy host, and wait for each other.
fn stay_on(cpu: usize) -> Outcome<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Guest memory, with data for the requests.
fn memory() -> Outcome<GuestMemoryMmap> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
    memory.write_slice(&vec![0x5a; 48 << 20], GuestAddress(DATA))?;
    Ok(memory)
}

/// The device's thread, until `stop`.
fn serve(block: Block, memory: &GuestMemoryMmap, doorbell: &EventFd, stop: &AtomicBool) -> Outcome<()> {
    stay_on(1)?;
    let around = Surroundings::new()?;
    around.run(block, memory, |block, context| {
        context.watches.add(doorbell.as_raw_fd(), DOORBELL, EventSet::IN)?;
        block.notify(0, context)?;
        let mut events = Vec::with_capacity(8);
        while !stop.load(Ordering::Relaxed) {
            let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let again = around.again.swap(false, Ordering::Relaxed);
            events.clear();
            match epoll::wait(
                &around.epoll,
                rustix::buffer::spare_capacity(&mut events),
                again.then_some(&at_once),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if again {
                block.notify(0, context)?;
            }
            for event in &events {
                match event.data.u64() as u32 {
                    DOORBELL => {
                        let _ = doorbell.read();
                        block.notify(0, context)?;
                    }
                    token => block.ready(token, EventSet::IN, context)?,
                }
            }
        }
        Ok(())
    })
}

/// Numbers that look random (xorshift): the same ones each time.
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// The driver's side.
struct Driver<'a> {
    memory: &'a GuestMemoryMmap,
    doorbell: &'a EventFd,
    available: u16,
    used: u16,
    doorbells: u64,
}

impl<'a> Driver<'a> {
    fn new(memory: &'a GuestMemoryMmap, doorbell: &'a EventFd) -> Self {
        Self {
            memory,
            doorbell,
            available: 0,
            used: 0,
            doorbells: 0,
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) -> Outcome<()> {
        Ok(self.memory.write_obj(value, GuestAddress(at))?)
    }

    fn load(&self, at: u64) -> Outcome<u16> {
        Ok(self.memory.load(GuestAddress(at), Ordering::Acquire)?)
    }

    /// Request `slot`: header, data, status.
    fn prepare(&self, slot: u16, write: bool, sector: u64, len: u32) -> Outcome<()> {
        let header = HEADERS + 64 * u64::from(slot);
        self.put(header, u64::from(write))?;
        self.put(header + 8, sector)?;
        let data = DATA + (1 << 20) * u64::from(slot);
        let flags = 1 | if write { 0 } else { 2 };
        let first = 3 * slot;
        for (n, (address, len, flags)) in [(header, 16, 1u16), (data, len, flags), (header + 16, 1, 2)]
            .into_iter()
            .enumerate()
        {
            let at = DESCRIPTORS + 16 * (u64::from(first) + n as u64);
            self.put(at, address)?;
            self.put(at + 8, len)?;
            self.put(at + 12, flags)?;
            self.put(at + 14, first + n as u16 + 1)?;
        }
        self.put(header + 16, 0xffu8)
    }

    fn submit(&mut self, slots: &[u16]) -> Outcome<()> {
        let old = self.available;
        for slot in slots {
            self.put(AVAILABLE + 4 + 2 * u64::from(self.available % ENTRIES), 3 * slot)?;
            self.available = self.available.wrapping_add(1);
        }
        self.memory
            .store(self.available, GuestAddress(AVAILABLE + 2), Ordering::Release)?;
        fence(Ordering::SeqCst);
        // VIRTIO_F_EVENT_IDX (virtio 2.7.10.1).
        let event = self.load(USED + 4 + 8 * u64::from(ENTRIES))?;
        if self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old) {
            self.doorbells += 1;
            self.doorbell.write(1)?;
        }
        Ok(())
    }

    /// The slots that are done, at least one.
    fn reap(&mut self, slots: &mut Vec<u16>) -> Outcome<()> {
        slots.clear();
        loop {
            let index = self.load(USED + 2)?;
            if index == self.used {
                std::hint::spin_loop();
                continue;
            }
            while self.used != index {
                let at = USED + 4 + 8 * u64::from(self.used % ENTRIES);
                let head: u32 = self.memory.read_obj(GuestAddress(at))?;
                let slot = (head / 3) as u16;
                let status: u8 = self
                    .memory
                    .read_obj(GuestAddress(HEADERS + 64 * u64::from(slot) + 16))?;
                if status != 0 {
                    return Err(format!("status {status}").into());
                }
                slots.push(slot);
                self.used = self.used.wrapping_add(1);
            }
            return Ok(());
        }
    }

    /// Has requests done on this thread: nanoseconds that the device took for each.
    fn batch(&mut self, slots: &[u16], block: &mut Block, context: &mut Context<'_>) -> Outcome<f64> {
        self.submit(slots)?;
        let begun = Instant::now();
        block.notify(0, context)?;
        let took = begun.elapsed();
        let (mut left, mut reaped) = (slots.len(), Vec::new());
        while left > 0 {
            // What the kernel did not do at once.
            while self.load(USED + 2)? == self.used {
                block.ready(ENGINE, EventSet::IN, context)?;
            }
            self.reap(&mut reaped)?;
            left -= reaped.len();
        }
        Ok(took.as_secs_f64() * 1e9 / slots.len() as f64)
    }

    /// Microseconds an operation: median of stretches of a hundred.
    fn run(&mut self, write: bool, len: u32, depth: u16, sequential: bool, count: usize) -> Outcome<f64> {
        let places = IMAGE / u64::from(len);
        let (mut next, mut random) = (0u64, Random::new());
        let mut sector = || {
            next = (next + 1) % places;
            (if sequential { next } else { random.next() % places }) * u64::from(len) / 512
        };
        let mut slots: Vec<u16> = (0..depth).collect();
        for &slot in &slots {
            self.prepare(slot, write, sector(), len)?;
        }
        let all = slots.clone();
        self.submit(&all)?;
        let (mut done, mut times) = (0, Vec::new());
        let (mut begun, mut since) = (Instant::now(), 0);
        while done < count {
            self.reap(&mut slots)?;
            done += slots.len();
            since += slots.len();
            for &slot in &slots {
                self.prepare(slot, write, sector(), len)?;
            }
            self.submit(&slots)?;
            if since >= 100 {
                let now = Instant::now();
                times.push((now - begun).as_secs_f64() * 1e6 / since as f64);
                (begun, since) = (now, 0);
            }
        }
        let mut left = usize::from(depth);
        while left > 0 {
            self.reap(&mut slots)?;
            left -= slots.len();
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(times.get(times.len() / 2).copied().unwrap_or(f64::NAN))
    }
}

fn measure(what: &str, config: BlockConfig) -> Outcome<()> {
    let (block, handle) = Block::new(config)?;
    let memory = memory()?;
    let (doorbell, stop) = (Arc::new(EventFd::new(EFD_NONBLOCK)?), Arc::new(AtomicBool::new(false)));
    let thread = {
        let (memory, doorbell, stop) = (memory.clone(), doorbell.clone(), stop.clone());
        std::thread::spawn(move || serve(block, &memory, &doorbell, &stop))
    };
    let mut driver = Driver::new(&memory, &doorbell);
    let mut line = format!("{what:32}");
    let kinds = [
        (false, 4096, 1, false),
        (false, 4096, MOST, false),
        (true, 4096, 1, false),
        (false, 65536, 8, false),
        (false, 262_144, 4, true),
    ];
    for (write, len, depth, sequential) in kinds {
        let count = (40_000 * 4096 / len as usize).max(4_000);
        driver.run(write, len, depth, sequential, count / 10)?;
        let us = driver.run(write, len, depth, sequential, count)?;
        line += &format!(" {us:8.2}");
    }
    let engine = handle.info().engine;
    stop.store(true, Ordering::Relaxed);
    doorbell.write(1)?;
    thread.join().map_err(|_| "the device panicked")??;
    println!("{line}   {engine:?}, {} doorbells", driver.doorbells);
    Ok(())
}

/// What the device's thread alone does for a request, in nanoseconds: driver and device take turns on one thread, and only the device's are timed. The
/// least of many batches, which tells more than a median where others want the processors, too.
fn alone(config: BlockConfig) -> Outcome<()> {
    let (block, _handle) = Block::new(BlockConfig {
        poll: Duration::ZERO,
        ..config
    })?;
    let memory = memory()?;
    let doorbell = EventFd::new(EFD_NONBLOCK)?;
    let mut driver = Driver::new(&memory, &doorbell);
    println!("\nns of the device's thread, least of many batches");
    Surroundings::new()?.run(block, &memory, |block, context| {
        for (what, write, len, places) in [
            ("4k read", false, 4096, IMAGE / 4096),
            ("4k read, 64k of the image", false, 4096, 16),
            ("512 read, one place", false, 512, 1),
            ("64k read", false, 65536, IMAGE / 65536),
            ("4k write, one place", true, 4096, 1),
        ] {
            let mut line = format!("{what:32}");
            let mut random = Random::new();
            for depth in [1, 4, 8, MOST] {
                let slots: Vec<u16> = (0..depth).collect();
                let mut least = f64::INFINITY;
                for _ in 0..if write { 100 } else { 3000 } {
                    for &slot in &slots {
                        driver.prepare(slot, write, random.next() % places * u64::from(len) / 512, len)?;
                    }
                    least = least.min(driver.batch(&slots, block, context)?);
                }
                line += &format!(" QD{depth}: {least:6.0}");
            }
            println!("{line}");
        }
        Ok(())
    })
}

fn main() -> Outcome<()> {
    stay_on(0)?;
    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let path = given
        .clone()
        .unwrap_or_else(|| std::env::temp_dir().join("sepal-block-latency.img"));
    let file = File::options()
        .read(true)
        .write(true)
        .create(given.is_none())
        .truncate(false)
        .open(&path)?;
    if given.is_none() {
        let piece = vec![0x77; 1 << 20];
        for at in (0..IMAGE).step_by(1 << 20) {
            std::os::unix::fs::FileExt::write_all_at(&file, &piece, at)?;
        }
        file.sync_all()?;
    }
    let config = || -> Outcome<BlockConfig> { Ok(BlockConfig::new("disk", file.try_clone()?.into())) };
    if std::env::args_os().nth(2).is_some_and(|what| what == "alone") {
        return alone(config()?);
    }
    println!("us an operation                  4k rd QD1  QD32  4k wr QD1 64k rd QD8 256k seq QD4");
    measure("raw", config()?)?;
    measure(
        "raw, threads",
        BlockConfig {
            io_uring: false,
            ..config()?
        },
    )?;
    measure(
        "raw, no looking out",
        BlockConfig {
            poll: Duration::ZERO,
            ..config()?
        },
    )?;
    measure(
        "raw, volatile",
        BlockConfig {
            mode: DiskMode::Volatile,
            ..config()?
        },
    )?;
    alone(config()?)?;
    alone(BlockConfig {
        io_uring: false,
        ..config()?
    })?;
    if given.is_none() {
        std::fs::remove_file(&path)?;
    }
    // A qcow2 image of the same size, if one is given beside it.
    if let Some(qcow2) = std::env::args_os().nth(2) {
        let image = File::options().read(true).write(true).open(qcow2)?;
        let config = BlockConfig {
            format: DiskFormat::Qcow2,
            ..BlockConfig::new("disk", image.into())
        };
        measure("qcow2", config)?;
    }
    Ok(())
}
