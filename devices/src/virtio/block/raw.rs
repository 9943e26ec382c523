//! An open file, and raw images: the disk is the file.
//!
//! A file that was opened with O_DIRECT takes only memory, positions and lengths that are aligned; what is not aligned in memory goes through a
//! buffer of our own, piece by piece.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::backend::Backend;
use super::buffers::{Bounce, Buffers, MAX_VECTORS};

/// Most bytes that are copied through a buffer of our own at once.
const PIECE: u64 = 1 << 20;
/// Bytes of zeroes that are written again and again where a file cannot zero a range.
const ZEROES: usize = 64 << 10;
/// What direct transfers are aligned to where the kernel does not tell: pages of memory will do for any storage, and sectors for most.
const USUAL_ALIGNMENT: Alignment = Alignment {
    memory: 4096,
    offset: 512,
};

/// RWF_DSYNC: this write survives the host when it returns.
pub(super) const RWF_DSYNC: i32 = 2;
/// RWF_NOWAIT: fails with EAGAIN rather than wait.
const RWF_NOWAIT: i32 = 8;

/// What direct transfers have to be aligned to, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of memory.
    pub(super) memory: u32,
    /// Of positions and lengths.
    pub(super) offset: u32,
}

/// An open regular file or block device.
#[derive(Debug)]
pub(super) struct HostFile {
    fd: OwnedFd,
    /// For one that was opened with O_DIRECT.
    alignment: Option<Alignment>,
    regular: bool,
    /// Its file system can say what is in the page cache.
    tells_cached: AtomicBool,
}

/// Why a descriptor is of no use as an image.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FileProblem {
    NeitherFileNorBlockDevice,
    NotReadable,
    NotWritable,
    NotDirect,
    Host(Errno),
}

impl From<Errno> for FileProblem {
    fn from(errno: Errno) -> Self {
        Self::Host(errno)
    }
}

impl HostFile {
    /// Checks a descriptor; `write` if it has to be writable, `direct` if it has to go around the page cache.
    pub(super) fn new(fd: OwnedFd, write: bool, direct: bool) -> Result<Self, FileProblem> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(FileProblem::NeitherFileNorBlockDevice);
        }
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        let access = flags & OFlags::RWMODE;
        if flags.contains(OFlags::PATH) || access == OFlags::WRONLY {
            return Err(FileProblem::NotReadable);
        }
        if write && access != OFlags::RDWR {
            return Err(FileProblem::NotWritable);
        }
        let is_direct = flags.contains(OFlags::DIRECT);
        if direct && !is_direct {
            return Err(FileProblem::NotDirect);
        }
        Ok(Self {
            alignment: is_direct.then(|| direct_alignment(&fd)),
            regular: kind == FileType::RegularFile,
            tells_cached: AtomicBool::new(true),
            fd,
        })
    }

    /// Its size in bytes, as it is now.
    pub(super) fn size(&self) -> io::Result<u64> {
        // A block device has no size in its status. Nothing here uses the file's position.
        Ok(rustix::fs::seek(&self.fd, SeekFrom::End(0))?)
    }

    /// Makes a regular file so long.
    pub(super) fn resize(&self, bytes: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.fd, bytes)?)
    }

    /// Whether it is a file, and not a block device.
    pub(super) fn is_regular(&self) -> bool {
        self.regular
    }

    /// What transfers have to be aligned to, if it was opened with O_DIRECT.
    pub(super) fn alignment(&self) -> Option<Alignment> {
        self.alignment
    }

    /// Whether the kernel takes `buffers` as they are.
    pub(super) fn takes(&self, buffers: &Buffers) -> bool {
        self.alignment
            .is_none_or(|alignment| buffers.is_aligned(alignment.memory as usize))
    }

    /// One `preadv2`: how many bytes it read.
    fn read_once(&self, offset: u64, to: &[libc::iovec], flags: i32) -> io::Result<u64> {
        transfer(libc::SYS_preadv2, &self.fd, offset, to, flags)
    }

    fn write_once(&self, offset: u64, from: &[libc::iovec], flags: i32) -> io::Result<u64> {
        transfer(libc::SYS_pwritev2, &self.fd, offset, from, flags)
    }

    /// Reads until `to` is full or the file ends: how many bytes that were.
    pub(super) fn read_up_to(&self, offset: u64, to: &Buffers, flags: i32) -> io::Result<u64> {
        if to.bytes() == 0 {
            return Ok(0);
        }
        let mut done = self.read_once(offset, to.vectors(), flags)?;
        if done == 0 || done == to.bytes() {
            return Ok(done);
        }
        let mut rest = to.part(done, to.bytes());
        while rest.bytes() > 0 {
            let n = self.read_once(offset + done, rest.vectors(), flags)?;
            if n == 0 {
                break;
            }
            done += n;
            rest.advance(n);
        }
        Ok(done)
    }

    fn write_aligned(&self, offset: u64, from: &Buffers, flags: i32) -> io::Result<()> {
        if from.bytes() == 0 {
            return Ok(());
        }
        let mut done = self.write_once(offset, from.vectors(), flags)?;
        if done == from.bytes() {
            return Ok(());
        }
        let mut rest = from.part(done, from.bytes());
        while rest.bytes() > 0 {
            let n = self.write_once(offset + done, rest.vectors(), flags)?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done += n;
            rest.advance(n);
        }
        Ok(())
    }

    /// Calls `piece` with a buffer of our own for each piece of a transfer that is not aligned in memory.
    fn bounced(
        &self,
        offset: u64,
        data: &Buffers,
        mut piece: impl FnMut(u64, &Buffers, &mut Bounce) -> io::Result<()>,
    ) -> io::Result<()> {
        let align = self.alignment.map_or(1, |alignment| alignment.memory) as usize;
        let mut bounce = Bounce::new(data.bytes().min(PIECE) as usize, align)?;
        let mut done = 0;
        while done < data.bytes() {
            let part = data.part(done, PIECE);
            piece(offset + done, &part, &mut bounce)?;
            done += part.bytes();
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, flags, offset, len)
    }

    fn zero_by_writing(&self, offset: u64, len: u64) -> io::Result<()> {
        let align = self.alignment.map_or(1, |alignment| alignment.memory) as usize;
        let mut zeroes = Bounce::new(ZEROES, align)?;
        let vector = zeroes.buffers(ZEROES).vectors().to_vec();
        let mut done = 0;
        while done < len {
            let left = len - done;
            if left < ZEROES as u64 {
                return self.write_aligned(offset + done, &zeroes.buffers(left as usize), 0);
            }
            // The same zeroes over and over in one call.
            let times = (left / ZEROES as u64).min(MAX_VECTORS as u64) as usize;
            let n = self.write_once(offset + done, &vector.repeat(times), 0)?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            // A short write of a direct file is short by whole blocks.
            done += n;
        }
        Ok(())
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Whether the host said that a kind of file cannot do something, rather than that it went wrong.
pub(super) fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
}

impl Backend for HostFile {
    fn read(&self, offset: u64, to: &Buffers) -> io::Result<()> {
        let full = |n: u64, to: &Buffers| {
            if n == to.bytes() {
                Ok(())
            } else {
                Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the image ends before the disk does",
                ))
            }
        };
        if self.takes(to) {
            return full(self.read_up_to(offset, to, 0)?, to);
        }
        self.bounced(offset, to, |offset, part, bounce| {
            let len = part.bytes() as usize;
            let buffers = bounce.buffers(len);
            full(self.read_up_to(offset, &buffers, 0)?, part)?;
            part.scatter(&bounce.bytes()[..len])
        })
    }

    fn read_cached(&self, offset: u64, to: &Buffers) -> io::Result<bool> {
        if self.alignment.is_some() || !self.tells_cached.load(Ordering::Relaxed) || to.bytes() == 0 {
            return Ok(false);
        }
        match self.read_once(offset, to.vectors(), RWF_NOWAIT) {
            // What is missing is read again, by the way that waits, which also tells what is wrong.
            Ok(n) => Ok(n == to.bytes()),
            Err(error) => {
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS)
                ) {
                    self.tells_cached.store(false, Ordering::Relaxed);
                }
                Ok(false)
            }
        }
    }

    fn write(&self, offset: u64, from: &Buffers, durable: bool) -> io::Result<()> {
        let flags = if durable { RWF_DSYNC } else { 0 };
        if self.takes(from) {
            return self.write_aligned(offset, from, flags);
        }
        self.bounced(offset, from, |offset, part, bounce| {
            let len = part.bytes() as usize;
            part.gather(&mut bounce.bytes()[..len])?;
            self.write_aligned(offset, &bounce.buffers(len), flags)
        })
    }

    fn write_cached(&self, offset: u64, from: &Buffers) -> io::Result<bool> {
        // Into the page cache. Few file systems can promise not to wait here, and those that are journalled do not even offer to; the time it takes
        // is watched by the device instead.
        if self.alignment.is_some() {
            return Ok(false);
        }
        self.write_aligned(offset, from, 0).map(|()| true)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.punch(offset, len) {
            // A hint only.
            Err(errno) if !is_unsupported(errno) => Err(errno.into()),
            _ => Ok(()),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let zero_range = || {
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.fd, flags, offset, len)
        };
        let punched = if unmap {
            self.punch(offset, len)
        } else {
            Err(Errno::OPNOTSUPP)
        };
        let zeroed = punched.or_else(|errno| {
            if is_unsupported(errno) {
                zero_range()
            } else {
                Err(errno)
            }
        });
        match zeroed {
            Err(errno) if is_unsupported(errno) => self.zero_by_writing(offset, len),
            other => Ok(other?),
        }
    }
}

/// `preadv2` or `pwritev2`, again if a signal came between.
fn transfer(call: i64, fd: &OwnedFd, offset: u64, vectors: &[libc::iovec], flags: i32) -> io::Result<u64> {
    loop {
        // SAFETY: the vectors' memory stays mapped during the call (see `Buffers`), and the kernel checks everything else. The offset's upper half
        // is ignored where a register holds all of it.
        let n = unsafe { libc::syscall(call, fd.as_raw_fd(), vectors.as_ptr(), vectors.len(), offset, 0, flags) };
        if let Ok(n) = u64::try_from(n) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What direct transfers of this file have to be aligned to.
fn direct_alignment(fd: &OwnedFd) -> Alignment {
    let mask = rustix::fs::StatxFlags::from_bits_retain(libc::STATX_DIOALIGN);
    let Ok(status) = rustix::fs::statx(fd, c"", rustix::fs::AtFlags::EMPTY_PATH, mask) else {
        return USUAL_ALIGNMENT;
    };
    let (memory, offset) = (status.stx_dio_mem_align, status.stx_dio_offset_align);
    if status.stx_mask & libc::STATX_DIOALIGN == 0 || !memory.is_power_of_two() || !offset.is_power_of_two() {
        return USUAL_ALIGNMENT;
    }
    Alignment { memory, offset }
}
