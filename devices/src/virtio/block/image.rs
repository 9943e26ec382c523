//! Makes an image of the open files of a configuration.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::backend::Backend;
use super::config::{BlockConfig, BlockError, DiskFormat, DiskMode, FileRole};
use super::overlay::Overlay;
use super::qcow2;
use super::raw::{FileProblem, HostFile};

/// What a disk reads from and writes to.
pub(super) struct Image {
    /// Does everything.
    pub(super) backend: Arc<dyn Backend>,
    /// The file of a raw image.
    pub(super) file: Option<Arc<HostFile>>,
    /// What keeps a volatile disk's writes.
    pub(super) overlay: Option<Arc<Overlay>>,
    /// Size of the disk.
    pub(super) bytes: u64,
}

impl Image {
    /// Checks and opens what a configuration names.
    ///
    /// # Errors
    ///
    /// Which file cannot be used, and why.
    pub(super) fn open(config: BlockConfig) -> Result<Self, BlockError> {
        let BlockConfig {
            image,
            backing,
            scratch,
            block_size,
            mode,
            format,
            direct,
            ..
        } = config;
        let write = mode == DiskMode::ReadWrite;
        let file = open_file(image, FileRole::Image, write, direct)?;
        let (lower, file, bytes): (Arc<dyn Backend>, _, _) = match format {
            DiskFormat::Raw => {
                if !backing.is_empty() {
                    return Err(BlockError::BackingUnused {
                        given: backing.len(),
                        used: 0,
                    });
                }
                check_alignment(file.alignment().map_or(1, |alignment| alignment.offset), block_size)?;
                let bytes = size(&file, FileRole::Image)?;
                let file = Arc::new(file);
                (file.clone(), Some(file), bytes)
            }
            DiskFormat::Qcow2 => {
                let image = qcow2::Image::open(file, backing, write)?;
                let bytes = image.bytes();
                (Arc::new(image), None, bytes)
            }
        };
        check_size(bytes, block_size)?;
        if mode != DiskMode::Volatile {
            return Ok(Self {
                backend: lower,
                file,
                overlay: None,
                bytes,
            });
        }
        let scratch = match scratch {
            Some(fd) => fd,
            None => rustix::fs::memfd_create(c"volatile-disk", rustix::fs::MemfdFlags::CLOEXEC)
                .map_err(|errno| host(FileRole::Scratch, "memfd_create", errno.into()))?,
        };
        let scratch = open_file(scratch, FileRole::Scratch, true, false)?;
        let overlay = Arc::new(Overlay::new(lower, scratch, bytes));
        Ok(Self {
            backend: overlay.clone(),
            file,
            overlay: Some(overlay),
            bytes,
        })
    }
}

pub(super) fn host(file: FileRole, operation: &'static str, error: std::io::Error) -> BlockError {
    BlockError::Host { file, operation, error }
}

/// Checks a descriptor that is to be `role`.
pub(super) fn open_file(fd: OwnedFd, role: FileRole, write: bool, direct: bool) -> Result<HostFile, BlockError> {
    HostFile::new(fd, write, direct).map_err(|problem| match problem {
        FileProblem::NeitherFileNorBlockDevice => BlockError::NotAFile { file: role },
        FileProblem::NotReadable => BlockError::NotReadable { file: role },
        FileProblem::NotWritable => BlockError::NotWritable { file: role },
        FileProblem::NotDirect => BlockError::NotDirect { file: role },
        FileProblem::Host(errno) => host(role, "fstat", errno.into()),
    })
}

pub(super) fn size(file: &HostFile, role: FileRole) -> Result<u64, BlockError> {
    file.size().map_err(|error| host(role, "lseek", error))
}

/// A raw image is read and written at whatever block the driver names.
fn check_alignment(needed: u32, block_size: u32) -> Result<(), BlockError> {
    if needed > block_size {
        Err(BlockError::DirectAlignment { needed, block_size })
    } else {
        Ok(())
    }
}

fn check_size(bytes: u64, block_size: u32) -> Result<(), BlockError> {
    if bytes == 0 {
        Err(BlockError::Empty)
    } else if !bytes.is_multiple_of(block_size.into()) {
        Err(BlockError::Size {
            size: bytes,
            block_size,
        })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_blocks_of_storage_need_large_blocks_of_the_disk() {
        for (needed, block_size) in [(1, 512), (512, 512), (512, 4096), (4096, 4096)] {
            assert!(check_alignment(needed, block_size).is_ok());
        }
        let error = check_alignment(4096, 512).unwrap_err();
        assert!(error.to_string().contains("at least 4096 bytes"), "{error}");
    }
}
