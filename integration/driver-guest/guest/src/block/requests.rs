//! Requests that the crate's driver has not, and resets while requests are in flight.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::device::blk::SECTOR_SIZE;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use zerocopy::{Immutable, IntoBytes};

use super::open;
use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;

/// Entries of the queues here.
pub(crate) const ENTRIES: usize = 128;
/// Features (virtio 5.2.3 and 6).
const READ_ONLY: u64 = 1 << 5;
pub(super) const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const RING_RESET: u64 = 1 << 40;
/// Request types (virtio 5.2.6).
pub(crate) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
const DISCARD_REQUEST: u32 = 11;
const WRITE_ZEROES_REQUEST: u32 = 13;

/// A request's header.
#[derive(Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) kind: u32,
    pub(crate) reserved: u32,
    pub(crate) sector: u64,
}

/// What a discard or write-zeroes request is about.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// A disk with a queue of our own.
pub(crate) struct RawDisk {
    pub(crate) port: Port,
    pub(crate) queue: Box<VirtQueue<Identity, ENTRIES>>,
    pub(crate) capacity: u64,
}

impl RawDisk {
    /// Starts the device with these features, of which it must have all of `required`; its queue polls, or interrupts by an entry of the
    /// MSI-X table.
    pub(crate) fn open(
        guest: &mut Guest,
        number: usize,
        required: u64,
        wanted: u64,
        vector: Option<u16>,
    ) -> Result<Self, Failure> {
        let mut port = Port::open(guest, DeviceType::Block, number)?;
        port.negotiate(required, wanted)?;
        port.queue_vector = vector;
        let mut queue = Box::new(VirtQueue::new(&mut port, 0, false, false)?);
        // Who takes no interrupts polls.
        queue.set_dev_notify(vector.is_some());
        port.finish_init();
        let capacity = port.config64(0)?;
        Ok(Self { port, queue, capacity })
    }

    /// A request whose data the device reads; its status byte.
    fn request(&mut self, kind: u32, data: &[u8]) -> Result<u8, Failure> {
        let header = Header {
            kind,
            ..Header::default()
        };
        let mut status = [0xff];
        self.queue
            .add_notify_wait_pop(&[header.as_bytes(), data], &mut [&mut status], &mut self.port)?;
        Ok(status[0])
    }
}

fn erase(guest: &mut Guest, arguments: Arguments<'_>, feature: u64, kind: u32, flags: u32) -> Outcome {
    let (sector, sectors): (u64, u32) = (arguments.number(0, 8)?, arguments.number(1, 8)?);
    super::fill(guest, arguments)?;
    let mut disk = RawDisk::open(guest, arguments.device, feature, READ_ONLY, None)?;
    let segment = Segment { sector, sectors, flags };
    let status = disk.request(kind, segment.as_bytes())?;
    ensure!(status == 0, "status {status}");
    // Past the end: an I/O error, not a violation.
    let outside = Segment {
        sector: disk.capacity,
        sectors,
        flags,
    };
    let status = disk.request(kind, outside.as_bytes())?;
    ensure!(status == 1, "status {status} past the end");
    drop(disk);
    let mut disk = open(guest, arguments)?;
    let mut data = vec![0xff; sectors as usize * SECTOR_SIZE];
    disk.read_blocks(sector as usize, &mut data)?;
    let left = data.iter().filter(|&&byte| byte != 0).count();
    Ok(format!("left={left}"))
}

/// `blk-zero[:SECTOR:COUNT]`: fills sectors, writes zeroes by one request and reads zeroes.
pub(crate) fn zero(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let words = erase(guest, arguments, WRITE_ZEROES, WRITE_ZEROES_REQUEST, 0)?;
    ensure!(words == "left=0", "bytes that are not zero: {words}");
    Ok(String::new())
}

/// `blk-discard[:SECTOR:COUNT]`: fills sectors, discards them, and says how many bytes are not zero after that.
pub(crate) fn discard(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    erase(guest, arguments, DISCARD, DISCARD_REQUEST, 0)
}

/// Requests in flight, with their buffers.
struct InFlight {
    headers: Vec<Header>,
    data: Vec<Vec<u8>>,
    status: Vec<[u8; 1]>,
}

/// Fills the queue with reads of 64 KiB and rings the doorbell.
fn flood(disk: &mut RawDisk) -> Result<InFlight, Failure> {
    let count = ENTRIES / 3;
    let sectors = disk.capacity - 128;
    let mut flight = InFlight {
        headers: (0..count as u64)
            .map(|index| Header {
                kind: READ,
                reserved: 0,
                sector: index * 128 % sectors,
            })
            .collect(),
        data: vec![vec![0; 65536]; count],
        status: vec![[0xff]; count],
    };
    for ((header, data), status) in flight.headers.iter().zip(&mut flight.data).zip(&mut flight.status) {
        // SAFETY: the caller keeps the buffers until the device was reset.
        unsafe { disk.queue.add(&[header.as_bytes()], &mut [data, status]) }?;
    }
    disk.port.notify(0);
    Ok(flight)
}

/// Changes the buffers and checks for some time that the device, which was reset, does not write to them any more.
fn stays_quiet(guest: &mut Guest, flight: &mut InFlight) -> Result<(), Failure> {
    for data in &mut flight.data {
        data.fill(0xa5);
    }
    let touched = guest.within(200, || {
        flight.data.iter().any(|data| {
            // SAFETY: inside the vector; volatile since a device that misbehaves would write there.
            unsafe { data.as_ptr().read_volatile() != 0xa5 || data.as_ptr().add(65535).read_volatile() != 0xa5 }
        })
    });
    ensure!(!touched, "it writes to buffers after its reset");
    Ok(())
}

/// `blk-reset-in-flight[:ROUNDS]`: resets the device with its queue full; once the status reads 0 it leaves the buffers alone and works again.
pub(crate) fn reset_in_flight(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let rounds: usize = arguments.number(0, 4)?;
    for _ in 0..rounds {
        let mut disk = RawDisk::open(guest, arguments.device, 0, READ_ONLY, None)?;
        let mut flight = flood(&mut disk)?;
        disk.port.set_status(DeviceStatus::empty());
        let (port, start) = (&disk.port, guest.now());
        ensure!(
            guest.within(10_000, || port.get_status().is_empty()),
            "its status does not become 0"
        );
        let micros = (guest.now() - start) / 1000;
        stays_quiet(guest, &mut flight)?;
        ensure!(micros < 10_000_000, "the reset took {micros} us");
    }
    super::info(guest, arguments)
}

/// `blk-queue-reset`: resets the queue alone with requests in flight; the queue works again when it is set up again.
pub(crate) fn queue_reset(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut disk = RawDisk::open(guest, arguments.device, RING_RESET, READ_ONLY, None)?;
    let mut flight = flood(&mut disk)?;
    let registers = disk.port.registers;
    ensure!(registers.reset_queue(guest, 0), "the queue is not reset");
    stays_quiet(guest, &mut flight)?;
    *disk.queue = VirtQueue::new(&mut disk.port, 0, false, false)?;
    let header = Header {
        kind: READ,
        ..Header::default()
    };
    let (mut data, mut status) = (vec![0; SECTOR_SIZE], [0xff]);
    disk.queue
        .add_notify_wait_pop(&[header.as_bytes()], &mut [&mut data, &mut status], &mut disk.port)?;
    ensure!(status[0] == 0, "status {} after the reset", status[0]);
    Ok(String::new())
}
