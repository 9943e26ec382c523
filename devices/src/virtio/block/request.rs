//! What a driver asks for: a descriptor chain, checked, and taken apart into what the host is to do (virtio 5.2.6).
//!
//! ```text
//!   readable: type, reserved, sector (16 bytes) | data to write, or one range to discard or zero
//!   writable: data that was read, or the id                                        | status (1 byte, the last)
//! ```
//!
//! Where buffers begin and end is the driver's own choice (virtio 2.7.4.1). A chain of a shape that no request has is a [`Violation`]; a request of
//! the right shape that cannot be done is answered by a status.

use vm_memory::{ByteValued, GuestMemoryMmap};

use super::buffers::Buffers;
use crate::virtio::chain::Chain;
use crate::virtio::violation::Violation;

/// Bytes of a sector, the unit of all positions and lengths (virtio 5.2.4).
pub(super) const SECTOR: u64 = 512;
/// Bytes of an id (virtio 5.2.6, VIRTIO_BLK_T_GET_ID).
pub(super) const ID_BYTES: usize = 20;
/// Most sectors of one discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors that are zeroed by one request: 64 MiB, because a host file that cannot zero gets zeroes written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 17;

/// VIRTIO_BLK_S_OK.
pub(super) const OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub(super) const IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub(super) const UNSUPP: u8 = 2;

/// VIRTIO_BLK_T_IN.
pub(super) const T_IN: u32 = 0;
/// VIRTIO_BLK_T_OUT.
pub(super) const T_OUT: u32 = 1;
/// VIRTIO_BLK_T_FLUSH.
pub(super) const T_FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID.
pub(super) const T_GET_ID: u32 = 8;
/// VIRTIO_BLK_T_DISCARD.
pub(super) const T_DISCARD: u32 = 11;
/// VIRTIO_BLK_T_WRITE_ZEROES.
pub(super) const T_WRITE_ZEROES: u32 = 13;

/// `virtio_blk_discard_write_zeroes.flags`: the zeroed range may be deallocated.
pub(super) const FLAG_UNMAP: u32 = 1;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Image to guest memory.
    Read,
    /// Guest memory to image.
    Write,
    /// What was written survives the host.
    Flush,
    /// What the range holds is not needed any more.
    Discard,
    /// The range reads as zeroes.
    WriteZeroes {
        /// It may become a hole.
        unmap: bool,
    },
}

impl Operation {
    /// For reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write zeroes",
        }
    }
}

/// What the image looks like to the driver, as far as requests depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes.
    pub(super) capacity: u64,
    /// Nothing may be changed.
    pub(super) read_only: bool,
    /// DISCARD was negotiated.
    pub(super) discard: bool,
    /// WRITE_ZEROES was negotiated.
    pub(super) write_zeroes: bool,
}

/// A request that has the right shape.
#[derive(Debug)]
pub(super) enum Request {
    /// The host has something to do.
    Work {
        /// What.
        operation: Operation,
        /// Where in the image, in bytes.
        offset: u64,
        /// How many bytes; 0 for a flush.
        len: u64,
        /// From or to where; empty but for reads and writes.
        buffers: Buffers,
    },
    /// The driver wants to know the id.
    GetId,
    /// It is answered without the host.
    Answer(u8),
}

/// The fixed beginning (`struct virtio_blk_req`), little-endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}
// SAFETY: three integers without padding (4 + 4 + 8 bytes), for which every pattern of bits is a value.
unsafe impl ByteValued for Header {}
const HEADER_BYTES: u32 = size_of::<Header>() as u32;

/// `struct virtio_blk_discard_write_zeroes`, little-endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}
// SAFETY: three integers without padding (8 + 4 + 4 bytes), for which every pattern of bits is a value.
unsafe impl ByteValued for Range {}
const RANGE_BYTES: u32 = size_of::<Range>() as u32;

/// Bytes of data that a request carries: what a rate limit counts.
pub(super) fn data_bytes(chain: &Chain) -> u64 {
    let to = chain.readable_bytes().saturating_sub(HEADER_BYTES);
    let from = chain.writable_bytes().saturating_sub(1);
    u64::from(to) + u64::from(from)
}

/// Takes a chain of queue `queue` apart. `room` is an earlier row of buffers, to be used again.
///
/// # Errors
///
/// The chain has not the shape of a request.
pub(super) fn parse(
    queue: u16,
    chain: &Chain,
    memory: &GuestMemoryMmap,
    limits: &Limits,
    room: Buffers,
) -> Result<Request, Violation> {
    let length = |what, got: u64, expected| Violation::Length {
        queue,
        what,
        got,
        expected,
    };
    let mut reader = chain.reader(memory);
    let Ok(header) = reader.read_obj::<Header>() else {
        return Err(length("request header", chain.readable_bytes().into(), "16"));
    };
    // The last writable byte is for the status.
    let Some(room_in) = chain.writable_bytes().checked_sub(1) else {
        return Err(length("room for the status", 0, "at least 1"));
    };
    let data_out = chain.readable_bytes() - HEADER_BYTES;
    let only_reads = |what| {
        if data_out == 0 {
            Ok(())
        } else {
            Err(Violation::Direction { queue, what })
        }
    };
    let only_writes = |what| {
        if room_in == 0 {
            Ok(())
        } else {
            Err(Violation::Direction { queue, what })
        }
    };
    let sector = u64::from_le(header.sector);
    let mut buffers = room.cleared();

    match u32::from_le(header.kind) {
        T_IN => {
            only_reads("a read has readable data")?;
            whole_sectors(room_in).map_err(|got| length("data of a read", got, "a multiple of 512"))?;
            let Some(offset) = place(sector, room_in.into(), limits.capacity) else {
                return Ok(Request::Answer(IOERR));
            };
            // There are as many bytes.
            let _ = chain
                .writer(memory)
                .each_slice(room_in as usize, |slice| buffers.push(&slice));
            Ok(transfer(Operation::Read, offset, room_in, buffers))
        }
        T_OUT => {
            only_writes("a write has writable data")?;
            whole_sectors(data_out).map_err(|got| length("data of a write", got, "a multiple of 512"))?;
            let Some(offset) = place(sector, data_out.into(), limits.capacity).filter(|_| !limits.read_only) else {
                return Ok(Request::Answer(IOERR));
            };
            // As above.
            let _ = reader.each_slice(data_out as usize, |slice| buffers.push(&slice));
            Ok(transfer(Operation::Write, offset, data_out, buffers))
        }
        T_FLUSH => {
            only_reads("a flush has readable data")?;
            only_writes("a flush has writable data")?;
            Ok(work(Operation::Flush, 0, 0, buffers))
        }
        T_GET_ID => {
            only_reads("a request for the id has readable data")?;
            if (room_in as usize) < ID_BYTES {
                return Err(length("room for the id", room_in.into(), "at least 20"));
            }
            Ok(Request::GetId)
        }
        kind @ (T_DISCARD | T_WRITE_ZEROES) => {
            only_writes("a discard or zeroing has writable data")?;
            if data_out == 0 || !data_out.is_multiple_of(RANGE_BYTES) {
                return Err(length("ranges", data_out.into(), "a multiple of 16 above 0"));
            }
            let range = reader.read_obj::<Range>().unwrap_or_default();
            let one = data_out == RANGE_BYTES;
            Ok(match ranged(kind, &range, one, limits) {
                Ok((operation, offset, len)) => work(operation, offset, len, buffers),
                Err(status) => Request::Answer(status),
            })
        }
        _ => Ok(Request::Answer(UNSUPP)),
    }
}

fn whole_sectors(bytes: u32) -> Result<(), u64> {
    if u64::from(bytes).is_multiple_of(SECTOR) {
        Ok(())
    } else {
        Err(bytes.into())
    }
}

fn work(operation: Operation, offset: u64, len: u32, buffers: Buffers) -> Request {
    Request::Work {
        operation,
        offset,
        len: len.into(),
        buffers,
    }
}

/// A read or write of `len` bytes.
fn transfer(operation: Operation, offset: u64, len: u32, buffers: Buffers) -> Request {
    if buffers.bytes() == u64::from(len) {
        work(operation, offset, len, buffers)
    } else {
        // Guest memory that was there when the chain was taken is gone.
        Request::Answer(IOERR)
    }
}

/// The byte at which `sector` begins, if `bytes` bytes from there on lie in an image of `capacity` bytes.
fn place(sector: u64, bytes: u64, capacity: u64) -> Option<u64> {
    let start = sector.checked_mul(SECTOR)?;
    let end = start.checked_add(bytes)?;
    (end <= capacity).then_some(start)
}

/// A discard or zeroing of one range, or the status that says why not (virtio 5.2.6.2).
fn ranged(kind: u32, range: &Range, one: bool, limits: &Limits) -> Result<(Operation, u64, u32), u8> {
    let discard = kind == T_DISCARD;
    let flags = u32::from_le(range.flags);
    let sectors = u32::from_le(range.sectors);
    let (offered, known_flags, most) = if discard {
        (limits.discard, 0, MAX_DISCARD_SECTORS)
    } else {
        (limits.write_zeroes, FLAG_UNMAP, MAX_ZERO_SECTORS)
    };
    if !offered || flags & !known_flags != 0 {
        return Err(UNSUPP);
    }
    if limits.read_only || !one || sectors > most {
        return Err(IOERR);
    }
    // At most 2^21 sectors: 2^30 bytes.
    let bytes = sectors * SECTOR as u32;
    let offset = place(u64::from_le(range.sector), bytes.into(), limits.capacity).ok_or(IOERR)?;
    let operation = if discard {
        Operation::Discard
    } else {
        Operation::WriteZeroes {
            unmap: flags & FLAG_UNMAP != 0,
        }
    };
    Ok((operation, offset, bytes))
}
