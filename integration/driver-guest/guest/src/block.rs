//! Block devices: by the crate's driver where it can do it, by queues of our own for many requests at once and the requests that it lacks.

mod bench;
mod requests;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::DeviceType;

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;

pub(crate) use bench::bench;
pub(crate) use requests::{Header, READ, RawDisk, discard, queue_reset, reset_in_flight, zero};

type Disk = VirtIOBlk<Identity, Port>;

/// Sectors moved by one request of the commands that move many.
const BATCH: u64 = 64;
/// How long a change from outside may take, in milliseconds.
const PATIENCE: u64 = 60_000;

fn open(guest: &mut Guest, arguments: Arguments<'_>) -> Result<Disk, Failure> {
    Ok(VirtIOBlk::new(Port::open(guest, DeviceType::Block, arguments.device)?)?)
}

/// What `fill` writes and the host can compute: byte `i` of sector `s` is `seed + s * 7 + i` modulo 251.
fn pattern(seed: u64, sector: u64, into: &mut [u8]) {
    for (index, byte) in (0..).zip(into) {
        let (sector, offset) = (sector + index / SECTOR_SIZE as u64, index % SECTOR_SIZE as u64);
        *byte = (seed.wrapping_add(sector.wrapping_mul(7)).wrapping_add(offset) % 251) as u8;
    }
}

/// `blk-info`: capacity in sectors, whether it is read-only, and its name.
pub(crate) fn info(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut disk = open(guest, arguments)?;
    let mut id = [0; 20];
    let length = disk.device_id(&mut id)?;
    let id = String::from_utf8_lossy(&id[..length]);
    Ok(format!(
        "capacity={} ro={} id={id}",
        disk.capacity(),
        u8::from(disk.readonly())
    ))
}

/// `blk-rw[:SEED]`: writes the first, the last and some sectors between, flushes, and reads them back.
pub(crate) fn read_write(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let seed: u64 = arguments.number(0, 1)?;
    let mut disk = open(guest, arguments)?;
    let capacity = disk.capacity();
    let places: Vec<u64> = (0..8).map(|step| step * (capacity - 8) / 7).collect();
    let mut expected = vec![0; 8 * SECTOR_SIZE];
    for &sector in &places {
        pattern(seed, sector, &mut expected);
        disk.write_blocks(sector as usize, &expected)?;
    }
    disk.flush()?;
    for &sector in &places {
        let mut got = vec![0; 8 * SECTOR_SIZE];
        pattern(seed, sector, &mut expected);
        disk.read_blocks(sector as usize, &mut got)?;
        ensure!(got == expected, "sector {sector} reads back differently");
    }
    Ok(format!("places={}", places.len()))
}

/// `blk-fill:SECTOR:COUNT[:SEED]`: writes the pattern and flushes.
pub(crate) fn fill(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (first, count, seed): (u64, u64, u64) = (
        arguments.number(0, 0)?,
        arguments.number(1, 8)?,
        arguments.number(2, 1)?,
    );
    let mut disk = open(guest, arguments)?;
    let mut buffer = vec![0; BATCH as usize * SECTOR_SIZE];
    for sector in (first..first + count).step_by(BATCH as usize) {
        let piece = &mut buffer[..BATCH.min(first + count - sector) as usize * SECTOR_SIZE];
        pattern(seed, sector, piece);
        disk.write_blocks(sector as usize, piece)?;
    }
    disk.flush()?;
    Ok(String::new())
}

/// `blk-sum[:SECTOR:COUNT]`: FNV-1a of the sectors' bytes, of all sectors without arguments.
pub(crate) fn sum(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut disk = open(guest, arguments)?;
    let first: u64 = arguments.number(0, 0)?;
    let count: u64 = arguments.number(1, disk.capacity().saturating_sub(first))?;
    let mut buffer = vec![0; BATCH as usize * SECTOR_SIZE];
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for sector in (first..first + count).step_by(BATCH as usize) {
        let piece = &mut buffer[..BATCH.min(first + count - sector) as usize * SECTOR_SIZE];
        disk.read_blocks(sector as usize, piece)?;
        for &byte in piece.iter() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(format!("fnv={hash:016x}"))
}

fn expect_error(what: &str, result: Result<(), Error>) -> Outcome {
    match result {
        Err(Error::IoError) => Ok(String::new()),
        other => Err(Failure(format!("{what}: {other:?} instead of an I/O error"))),
    }
}

/// `blk-ro`: the device says that it is read-only, and a write fails as an I/O error.
pub(crate) fn refuses_writes(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut disk = open(guest, arguments)?;
    ensure!(disk.readonly(), "it does not say that it is read-only");
    expect_error("a write", disk.write_blocks(0, &[0; SECTOR_SIZE]))?;
    let mut sector = [0; SECTOR_SIZE];
    disk.read_blocks(0, &mut sector)?;
    Ok(String::new())
}

/// `blk-past-end`: reading the sector after the last one fails as an I/O error, and so does one that begins inside and ends outside.
pub(crate) fn past_end(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut disk = open(guest, arguments)?;
    let capacity = disk.capacity() as usize;
    let mut sectors = [0; 2 * SECTOR_SIZE];
    expect_error("after the end", disk.read_blocks(capacity, &mut sectors[..SECTOR_SIZE]))?;
    expect_error("across the end", disk.read_blocks(capacity - 1, &mut sectors))?;
    disk.read_blocks(capacity - 1, &mut sectors[..SECTOR_SIZE])?;
    Ok(String::new())
}

/// `blk-error:SECTOR`: reading that sector fails as an I/O error, as it does when the host's file does.
pub(crate) fn reads_fail(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut disk = open(guest, arguments)?;
    let mut sector = [0; SECTOR_SIZE];
    expect_error("a read", disk.read_blocks(arguments.number(0, 0)?, &mut sector))
}

/// `blk-wait-size:SECTORS`: waits until the device has so many sectors, and reads the last one.
pub(crate) fn wait_size(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let wanted: u64 = arguments.number(0, 0)?;
    drop(open(guest, arguments)?);
    guest.say("waiting blk-wait-size");
    let end = guest.now() + PATIENCE * 1_000_000;
    loop {
        let mut disk = open(guest, arguments)?;
        let capacity = disk.capacity();
        if capacity == wanted {
            let mut sector = [0; SECTOR_SIZE];
            disk.read_blocks(wanted as usize - 1, &mut sector)?;
            return Ok(String::new());
        }
        ensure!(guest.now() < end, "it still has {capacity} sectors");
    }
}
