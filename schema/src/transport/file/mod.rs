//! What a file descriptor of a client must be before it is used.
//!
//! A client can send anything: a directory, a pipe that blocks, a file of the wrong access mode, a file that it shrinks
//! while it is used. What passes [`check`] can be read with `pread` without blocking for ever and without a signal;
//! an ordinary file that is cut short meanwhile gives an early end, never a SIGBUS, since nothing here maps it. What is mapped, as a guest's
//! memory is, has [`check_shared_memory`].

#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{FileType, OFlags};

/// What is asked of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requirements {
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// A block device will do as well.
    pub block_device: bool,
}

impl Requirements {
    /// A file to read.
    pub const READ: Self = Self {
        readable: true,
        writable: false,
        block_device: false,
    };
    /// A file to read and write.
    pub const READ_WRITE: Self = Self {
        readable: true,
        writable: true,
        block_device: false,
    };

    /// The same, or a block device.
    #[must_use]
    pub const fn or_block_device(self) -> Self {
        Self {
            block_device: true,
            ..self
        }
    }
}

/// What a file turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// An ordinary file, on a disk or in memory: its owner can shrink it at any time.
    Regular,
    /// A block device.
    BlockDevice,
}

/// Why a file is not fit.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is something else.
    #[error("the file is {found}; what is needed is an ordinary file{or_block}", or_block = if *block_device { " or a block device" } else { "" })]
    WrongKind {
        /// What it is.
        found: &'static str,
        /// Whether a block device would have done.
        block_device: bool,
    },
    /// It was not opened for reading.
    #[error("the file is not open for reading")]
    NotReadable,
    /// It was not opened for writing.
    #[error("the file is not open for writing")]
    NotWritable,
    /// It was opened for appending only, which ignores offsets.
    #[error("the file is open for appending, so it cannot be written at an offset")]
    AppendOnly,
    /// It is no file that lives in memory.
    #[error("the file is no shared memory: neither a memfd nor a file of a tmpfs")]
    NotSharedMemory,
    /// It has more than was asked for.
    #[error("the file has more than the {limit} bytes allowed")]
    TooLarge {
        /// Bytes allowed.
        limit: usize,
    },
    /// The kernel refused.
    #[error("the file cannot be read: {0}")]
    Io(#[from] io::Error),
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::RegularFile => "an ordinary file",
        _ => "of an unknown kind",
    }
}

/// Checks that `fd` is a file fit for `requirements`.
///
/// # Errors
/// A [`FileError`] that says what is wrong with it.
pub fn check(fd: &impl AsFd, requirements: Requirements) -> Result<FileKind, FileError> {
    let fd = fd.as_fd();
    let status = rustix::fs::fstat(fd).map_err(io::Error::from)?;
    let kind = match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => FileKind::Regular,
        FileType::BlockDevice if requirements.block_device => FileKind::BlockDevice,
        other => {
            return Err(FileError::WrongKind {
                found: kind_name(other),
                block_device: requirements.block_device,
            });
        }
    };
    check_access(fd, requirements)?;
    Ok(kind)
}

/// Checks that `fd` is shared memory that can be mapped for reading and writing: what answers to `F_GET_SEALS`, whatever its seals are.
///
/// Without F_SEAL_SHRINK its owner can cut it while it is mapped, and who meets what is gone gets SIGBUS: only for what is that owner's own.
///
/// # Errors
/// A [`FileError`] that says what is wrong with it.
pub fn check_shared_memory(fd: &impl AsFd) -> Result<(), FileError> {
    let fd = fd.as_fd();
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(_) => check_access(fd, Requirements::READ_WRITE),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::BADF) => Err(FileError::NotSharedMemory),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

fn check_access(fd: BorrowedFd<'_>, requirements: Requirements) -> Result<(), FileError> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(io::Error::from)?;
    let mode = flags & OFlags::ACCMODE;
    // O_PATH gives no access at all, whatever the access mode says.
    let any = !flags.contains(OFlags::PATH);
    if requirements.readable && !(any && (mode == OFlags::RDONLY || mode == OFlags::RDWR)) {
        return Err(FileError::NotReadable);
    }
    if requirements.writable {
        if !(any && (mode == OFlags::WRONLY || mode == OFlags::RDWR)) {
            return Err(FileError::NotWritable);
        }
        if flags.contains(OFlags::APPEND) {
            return Err(FileError::AppendOnly);
        }
    }
    Ok(())
}

/// As [`check`], for a file to read that is no block device.
///
/// # Errors
/// As [`check`].
pub fn check_regular(fd: &OwnedFd) -> Result<FileKind, FileError> {
    check(fd, Requirements::READ)
}

/// Reads all of a file from its beginning, wherever its offset is. Blocks as long as the storage does.
///
/// # Errors
/// [`FileError::TooLarge`] when there is more than `limit` bytes, or [`FileError::Io`].
pub fn read_all(fd: &impl AsFd, limit: usize) -> Result<Vec<u8>, FileError> {
    const CHUNK: usize = 256 * 1024;
    let fd = fd.as_fd();
    let mut content = Vec::new();
    loop {
        let length = content.len();
        // One byte more than allowed, to see that there is more. What a file says of its size is not trusted.
        let room = CHUNK.min((limit - length).saturating_add(1));
        content.resize(length + room, 0);
        let count = match rustix::io::pread(fd, &mut content[length..], length as u64) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => {
                content.truncate(length);
                continue;
            }
            Err(error) => return Err(io::Error::from(error).into()),
        };
        content.truncate(length + count);
        if content.len() > limit {
            return Err(FileError::TooLarge { limit });
        }
        if count == 0 {
            return Ok(content);
        }
    }
}
