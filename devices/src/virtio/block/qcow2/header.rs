//! What the header of a qcow2 image says about itself (QEMU's docs/interop/qcow2.txt), as far as it decides whether the image is served at all.

use std::io;

use crate::virtio::block::buffers::Bounce;
use crate::virtio::block::config::{BlockError, FileRole};
use crate::virtio::block::raw::HostFile;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 3 header that are looked at. Version 2 ends after 72.
const BYTES: usize = 104;
/// What a direct file can be read by.
const READ: usize = 4096;
/// Incompatible feature bit 2: the data lies in a file of its own.
const EXTERNAL_DATA: u64 = 1 << 2;
/// Largest disk: QEMU's own limit, 2^61 bytes.
const MAX_BYTES: u64 = 1 << 61;

/// The first fields of an image.
pub(super) struct Header([u8; BYTES]);

impl Header {
    /// Reads them; what the file is too short for is 0.
    pub(super) fn read(file: &HostFile) -> io::Result<Self> {
        let mut bounce = Bounce::new(READ, READ)?;
        file.read_up_to(0, &bounce.buffers(READ), 0)?;
        let mut bytes = [0; BYTES];
        bytes.copy_from_slice(&bounce.bytes()[..BYTES]);
        Ok(Self(bytes))
    }

    /// Whether `file` begins as an image does.
    pub(super) fn has_magic(file: &HostFile) -> io::Result<bool> {
        Ok(Self::read(file)?.0.starts_with(&MAGIC))
    }

    fn word(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        u32::from_be_bytes(bytes)
    }

    fn long(&self, at: usize) -> u64 {
        u64::from(self.word(at)) << 32 | u64::from(self.word(at + 4))
    }

    /// Refuses what cannot be served, naming the reason.
    pub(super) fn check(&self, file: FileRole) -> Result<(), BlockError> {
        let wrong = |reason: String| Err(BlockError::Qcow2 { file, reason });
        if !self.0.starts_with(&MAGIC) {
            return wrong("it does not begin as one".into());
        }
        let version = self.word(4);
        if !matches!(version, 2 | 3) {
            return wrong(format!("version {version} is not known"));
        }
        if self.word(32) != 0 {
            return Err(BlockError::Encrypted { file });
        }
        if version == 3 && self.long(72) & EXTERNAL_DATA != 0 {
            return Err(BlockError::ExternalData { file });
        }
        let bytes = self.long(24);
        if bytes > MAX_BYTES {
            return wrong(format!("a size of {bytes} bytes is beyond all limits"));
        }
        Ok(())
    }
}
