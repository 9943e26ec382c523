//! A volatile disk: what the guest writes is kept in a scratch file beside the image, which stays as it is.
//!
//! ```text
//!   disk     |  granule 0  |  granule 1  |  granule 2  | ...     4096 bytes each
//!   kept?    |     no      |     yes     |     no      |
//!   read       from the image   scratch     image
//!   write      to scratch, at the same place; a granule that is written in part is copied from the image first
//! ```
//!
//! What is kept is noted in a map that grows with what is written, so a large disk costs nothing by itself.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::backend::Backend;
use super::buffers::{Bounce, Buffers};
use super::raw::HostFile;
use crate::interrupt::lock;

/// Bytes of a granule: a page, so that what drivers usually write needs no copy.
const GRANULE: u64 = 4096;
/// Granules of one entry of the map.
const PER_CHUNK: u64 = 64 * CHUNK_WORDS as u64;
const CHUNK_WORDS: usize = 64;

/// A set of granules.
#[derive(Default)]
struct Map(BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>);

impl Map {
    fn contains(&self, granule: u64) -> bool {
        let within = (granule % PER_CHUNK) as usize;
        self.0
            .get(&(granule / PER_CHUNK))
            .is_some_and(|chunk| chunk[within / 64] & 1 << (within % 64) != 0)
    }

    fn insert(&mut self, granules: Range<u64>) {
        for granule in granules {
            let within = (granule % PER_CHUNK) as usize;
            let chunk = self
                .0
                .entry(granule / PER_CHUNK)
                .or_insert_with(|| Box::new([0; CHUNK_WORDS]));
            chunk[within / 64] |= 1 << (within % 64);
        }
    }

    /// Whether the first of `granules` is in it, and up to where that holds for all.
    fn run(&self, granules: Range<u64>) -> (bool, u64) {
        let inside = self.contains(granules.start);
        let mut end = granules.start + 1;
        while end < granules.end && self.contains(end) == inside {
            end += 1;
        }
        (inside, end)
    }

    fn contains_all(&self, granules: Range<u64>) -> bool {
        granules.is_empty() || self.run(granules.clone()) == (true, granules.end)
    }
}

/// See the module's head.
pub(super) struct Overlay {
    lower: Arc<dyn Backend>,
    scratch: HostFile,
    kept: RwLock<Map>,
    /// Held by whoever writes to a granule that is not kept yet, from looking at the map to changing it.
    writing: Mutex<()>,
    /// Bytes of the disk.
    bytes: AtomicU64,
}

/// The granules that the range touches.
fn touched(offset: u64, len: u64) -> Range<u64> {
    offset / GRANULE..(offset + len).div_ceil(GRANULE)
}

impl Overlay {
    /// Nothing is kept yet; `scratch` is empty.
    pub(super) fn new(lower: Arc<dyn Backend>, scratch: HostFile, bytes: u64) -> Self {
        Self {
            lower,
            scratch,
            kept: RwLock::default(),
            writing: Mutex::new(()),
            bytes: AtomicU64::new(bytes),
        }
    }

    /// The disk has another size now.
    pub(super) fn resize(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    fn is_kept(&self, granules: Range<u64>) -> bool {
        self.kept
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_all(granules)
    }

    fn keep(&self, granules: Range<u64>) {
        self.kept
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(granules);
    }

    /// Calls `piece` for each stretch of the range that is kept, or is not, with whether it is and its buffers. Ends with the first that says false.
    fn stretches(
        &self,
        offset: u64,
        to: &Buffers,
        mut piece: impl FnMut(bool, u64, &Buffers) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let end = offset + to.bytes();
        let mut at = offset;
        while at < end {
            let (kept, run) = {
                let map = self.kept.read().unwrap_or_else(PoisonError::into_inner);
                map.run(touched(at, end - at))
            };
            let stop = end.min(run.saturating_mul(GRANULE));
            let all = at == offset && stop == end;
            let goes_on = if all {
                piece(kept, at, to)?
            } else {
                piece(kept, at, &to.part(at - offset, stop - at))?
            };
            if !goes_on {
                return Ok(false);
            }
            at = stop;
        }
        Ok(true)
    }

    /// Reads what is kept; beyond its end the scratch file is a hole.
    fn read_kept(&self, offset: u64, to: &Buffers) -> io::Result<()> {
        let n = self.scratch.read_up_to(offset, to, 0)?;
        if n < to.bytes() {
            to.part(n, to.bytes()).zero();
        }
        Ok(())
    }

    /// Copies the granule from the image, unless it is kept. `writing` is held. `cached`: only if that need not wait; false if it would have to.
    fn copy_up(&self, granule: u64, cached: bool) -> io::Result<bool> {
        if self.is_kept(granule..granule + 1) {
            return Ok(true);
        }
        let start = granule * GRANULE;
        // The last granule of a disk may be short.
        let len = self.bytes.load(Ordering::Relaxed).saturating_sub(start).min(GRANULE);
        if len > 0 {
            let mut copy = Bounce::new(GRANULE as usize, GRANULE as usize)?;
            let buffers = copy.buffers(len as usize);
            if !cached {
                self.lower.read(start, &buffers)?;
            } else if !self.lower.read_cached(start, &buffers)? {
                return Ok(false);
            }
            self.scratch.write(start, &buffers, false)?;
        }
        self.keep(granule..granule + 1);
        Ok(true)
    }

    /// Makes sure that the granules which the range touches in part are kept. `writing` is held.
    fn copy_edges(&self, offset: u64, len: u64, cached: bool) -> io::Result<bool> {
        let end = offset + len;
        if !offset.is_multiple_of(GRANULE) && !self.copy_up(offset / GRANULE, cached)? {
            return Ok(false);
        }
        if !end.is_multiple_of(GRANULE) && !self.copy_up(end / GRANULE, cached)? {
            return Ok(false);
        }
        Ok(true)
    }

    fn store(&self, offset: u64, from: &Buffers, cached: bool) -> io::Result<bool> {
        let granules = touched(offset, from.bytes());
        if self.is_kept(granules.clone()) {
            return self.scratch.write(offset, from, false).map(|()| true);
        }
        let _writing = lock(&self.writing);
        if !self.copy_edges(offset, from.bytes(), cached)? {
            return Ok(false);
        }
        self.scratch.write(offset, from, false)?;
        self.keep(granules);
        Ok(true)
    }
}

impl Backend for Overlay {
    fn read(&self, offset: u64, to: &Buffers) -> io::Result<()> {
        self.stretches(offset, to, |kept, at, part| {
            if kept {
                self.read_kept(at, part)?;
            } else {
                self.lower.read(at, part)?;
            }
            Ok(true)
        })
        .map(|_| ())
    }

    fn read_cached(&self, offset: u64, to: &Buffers) -> io::Result<bool> {
        self.stretches(offset, to, |kept, at, part| {
            if kept {
                self.read_kept(at, part).map(|()| true)
            } else {
                self.lower.read_cached(at, part)
            }
        })
    }

    fn write(&self, offset: u64, from: &Buffers, _durable: bool) -> io::Result<()> {
        self.store(offset, from, false).map(|_| ())
    }

    fn write_cached(&self, offset: u64, from: &Buffers) -> io::Result<bool> {
        self.store(offset, from, true)
    }

    fn flush(&self) -> io::Result<()> {
        // What is kept need not survive anything.
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let _writing = lock(&self.writing);
        self.copy_edges(offset, len, false)?;
        // A hole gives the room back, and reads as zeroes whether the guest asked for that or not.
        self.scratch.write_zeroes(offset, len, true)?;
        self.keep(touched(offset, len));
        Ok(())
    }
}
