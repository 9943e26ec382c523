//! How long block requests take, with a driver that polls: many in flight, each submitted again as soon as it is done.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::device::blk::SECTOR_SIZE;
use virtio_drivers::transport::Transport;
use zerocopy::IntoBytes;

use super::requests::{ENTRIES, FLUSH, Header, READ, RawDisk, WRITE};
use crate::arguments::Arguments;
use crate::guest::{Failure, Guest, Outcome};
use crate::{cpu, ensure};

/// A request slot: three descriptors. What the device reads and writes of it is on one cache line that belongs to no other slot; its data is in
/// whole pages, as with any operating system's driver, since the heap aligns blocks to their size.
#[repr(C, align(64))]
struct Slot {
    header: Header,
    status: [u8; 1],
    data: Vec<u8>,
}

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Random,
    Sequential,
}

/// Places, one after the other: random ones from a linear congruential generator (Knuth's MMIX), so that every run has the same.
struct Places {
    order: Order,
    state: u64,
    /// In units of a request.
    count: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        match self.order {
            Order::Sequential => self.state += 1,
            Order::Random => {
                self.state = self
                    .state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
            }
        }
        let drawn = if self.order == Order::Random {
            self.state >> 33
        } else {
            self.state
        };
        drawn % self.count
    }
}

/// `blk-bench:BYTES:DEPTH:OP:COUNT`: COUNT requests of BYTES, DEPTH at once; OP is `r`, `w` (random places), `sr` or `sw` (one after the
/// other). Reports microseconds an operation, as the median over the windows in which DEPTH requests (at least 8) finish, and overall.
pub(crate) fn bench(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let bytes: usize = arguments.number(0, 4096)?;
    let depth: usize = arguments.number(1, 1)?;
    let operation = arguments.text(2).unwrap_or("r");
    let count: usize = arguments.number(3, 2000)?;
    let (kind, order) = match operation {
        "r" => (READ, Order::Random),
        "w" => (WRITE, Order::Random),
        "sr" => (READ, Order::Sequential),
        "sw" => (WRITE, Order::Sequential),
        other => return Err(Failure(format!("no operation {other:?}"))),
    };
    ensure!(depth > 0 && depth * 3 <= ENTRIES, "a depth from 1 to {}", ENTRIES / 3);
    ensure!(bytes > 0 && bytes.is_multiple_of(SECTOR_SIZE), "whole sectors");
    // Who does not take this feature has every write on the disk before it is done (virtio 5.2.6.2), which no driver that matters asks for.
    let mut disk = RawDisk::open(guest, arguments.device, 0, FLUSH, None)?;
    let sectors = (bytes / SECTOR_SIZE) as u64;
    let mut places = Places {
        order,
        state: 1,
        count: disk.capacity / sectors,
    };
    ensure!(places.count > 0, "the disk is smaller than a request");
    let mut slots: Vec<Slot> = (0..depth)
        .map(|_| Slot {
            header: Header::default(),
            data: vec![0x5a; bytes],
            status: [0xff],
        })
        .collect();

    // Slot of the chain that begins at each descriptor.
    let mut owners = [0_usize; ENTRIES];
    let window = depth.max(8);
    let mut windows = Vec::with_capacity(count / window + 1);
    let (mut submitted, mut done, mut kicks) = (0, 0, 0_u64);
    let clock = guest.now();
    let first = cpu::tsc();
    let mut mark = first;
    let mut idle: Vec<usize> = (0..depth).collect();
    while done < count {
        let mut added = false;
        while submitted < count
            && let Some(index) = idle.pop()
        {
            let slot = &mut slots[index];
            slot.header = Header {
                kind,
                reserved: 0,
                sector: places.next() * sectors,
            };
            slot.status = [0xff];
            // SAFETY: the slot is not touched until the queue gives it back.
            let head = unsafe { add(&mut disk, slot) }?;
            owners[usize::from(head)] = index;
            submitted += 1;
            added = true;
        }
        if added && disk.queue.should_notify() {
            disk.port.notify(0);
            kicks += 1;
        }
        let mut stuck = 0_u64;
        while !disk.queue.can_pop() {
            core::hint::spin_loop();
            stuck += 1;
            ensure!(
                stuck < 20_000_000_000,
                "no answer; status {:#x}",
                disk.port.registers.status()
            );
        }
        while let Some(head) = disk.queue.peek_used() {
            let index = *owners
                .get(usize::from(head))
                .ok_or_else(|| Failure(format!("no chain {head}")))?;
            let slot = &mut slots[index];
            // SAFETY: the buffers that were added.
            unsafe { complete(&mut disk, head, slot) }?;
            ensure!(slot.status[0] == 0, "status {}", slot.status[0]);
            idle.push(index);
            done += 1;
            if done % window == 0 {
                let now = cpu::tsc();
                windows.push((now - mark) / window as u64);
                mark = now;
            }
        }
    }
    let ticks = cpu::tsc() - first;
    let nanoseconds = guest.now() - clock;
    windows.sort_unstable();
    let microseconds = |window: u64| window as f64 * nanoseconds as f64 / ticks.max(1) as f64 / 1000.0;
    let at = |share: usize| {
        windows
            .get((windows.len().saturating_sub(1)) * share / 100)
            .copied()
            .map_or(0.0, microseconds)
    };
    let overall = nanoseconds as f64 / done as f64 / 1000.0;
    Ok(format!(
        "bytes={bytes} depth={depth} op={operation} n={done} median_us={:.2} p90_us={:.2} mean_us={overall:.2} kicks={kicks}",
        at(50),
        at(90)
    ))
}

/// Adds a slot's request to the queue.
///
/// # Safety
///
/// As [`VirtQueue::add`](virtio_drivers::queue::VirtQueue::add): the slot is left alone until it is completed.
unsafe fn add(disk: &mut RawDisk, slot: &mut Slot) -> Result<u16, Failure> {
    let header = slot.header.as_bytes();
    // SAFETY: the caller's promise.
    let head = unsafe {
        if slot.header.kind == WRITE {
            disk.queue.add(&[header, &slot.data], &mut [&mut slot.status])
        } else {
            disk.queue.add(&[header], &mut [&mut slot.data, &mut slot.status])
        }
    };
    Ok(head?)
}

/// Takes a finished request back.
///
/// # Safety
///
/// The slot is the one that was added as `head`.
unsafe fn complete(disk: &mut RawDisk, head: u16, slot: &mut Slot) -> Result<(), Failure> {
    let header = slot.header.as_bytes();
    // SAFETY: the caller's promise.
    unsafe {
        if slot.header.kind == WRITE {
            disk.queue
                .pop_used(head, &[header, &slot.data], &mut [&mut slot.status])
        } else {
            disk.queue
                .pop_used(head, &[header], &mut [&mut slot.data, &mut slot.status])
        }
    }?;
    Ok(())
}
