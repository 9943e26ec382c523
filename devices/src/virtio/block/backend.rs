//! What an image can do, whatever its format: positions and lengths are bytes of the disk that the guest sees, checked against its capacity.

use std::io;

use super::buffers::Buffers;
use super::request::Operation;

/// An image. Calls may come from several threads at once; those on ranges that overlap may take effect in any order.
pub(super) trait Backend: Send + Sync {
    /// Fills `to` with what is at `offset`.
    fn read(&self, offset: u64, to: &Buffers) -> io::Result<()>;

    /// [`read`](Self::read), if the host has the data in memory. False: it has not, or this cannot be known; `to` may be filled in part.
    fn read_cached(&self, offset: u64, to: &Buffers) -> io::Result<bool>;

    /// Writes `from` to `offset`. `durable`: it survives the host when this returns.
    fn write(&self, offset: u64, from: &Buffers, durable: bool) -> io::Result<()>;

    /// [`write`](Self::write), if it takes hardly longer than to copy the data. False: nothing has happened.
    fn write_cached(&self, offset: u64, from: &Buffers) -> io::Result<bool>;

    /// What was written before survives the host when this returns.
    fn flush(&self) -> io::Result<()>;

    /// What the range holds is not needed any more; it holds anything afterwards.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeroes; with `unmap` its room may be given up.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// Something for the host to do.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) operation: Operation,
    /// First byte on the disk.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Where the data of a read or write lies.
    pub(super) buffers: Buffers,
    /// A write has to survive the host.
    pub(super) durable: bool,
}

impl Job {
    /// Does it, however long it takes.
    pub(super) fn run(&self, backend: &dyn Backend) -> io::Result<()> {
        match self.operation {
            Operation::Read => backend.read(self.offset, &self.buffers),
            Operation::Write => backend.write(self.offset, &self.buffers, self.durable),
            Operation::Flush => backend.flush(),
            Operation::Discard => backend.discard(self.offset, self.len),
            Operation::WriteZeroes { unmap } => backend.write_zeroes(self.offset, self.len, unmap),
        }
    }

    /// Does it if it need not wait for storage. False: it would have to.
    pub(super) fn run_at_once(&self, backend: &dyn Backend) -> io::Result<bool> {
        match self.operation {
            Operation::Flush => Ok(false),
            _ if self.len == 0 => Ok(true),
            Operation::Read => backend.read_cached(self.offset, &self.buffers),
            Operation::Write if !self.durable => backend.write_cached(self.offset, &self.buffers),
            _ => Ok(false),
        }
    }
}
