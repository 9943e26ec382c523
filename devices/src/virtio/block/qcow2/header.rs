//! What the header of a qcow2 image says about itself (QEMU's docs/interop/qcow2.txt), as far as it decides whether the image is served at all.

use std::io;

use crate::virtio::block::buffers::Bounce;
use crate::virtio::block::config::{BlockError, FileRole};
use crate::virtio::block::image;
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

/// Largest refcount table in bytes: as imago and QEMU have it, about.
const MAX_TABLE: u64 = 32 << 20;
/// Bytes of a table that are read at once.
const TABLE_PIECE: usize = 64 << 10;
/// Bytes of the smallest clusters.
const SMALLEST_CLUSTER: u64 = 512;

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
        let cluster_bits = self.word(20);
        if !(9..=21).contains(&cluster_bits) {
            return wrong(format!("clusters of 2^{cluster_bits} bytes"));
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

    /// Refuses an image that is to be written and whose refcount table cannot be: who looks for a free cluster would search the same block over
    /// and over, for hours.
    pub(super) fn check_refcounts(&self, file: FileRole, opened: &HostFile) -> Result<(), BlockError> {
        let wrong = |reason: &str| {
            Err(BlockError::Qcow2 {
                file,
                reason: format!("its refcount table {reason}"),
            })
        };
        let failed = |error| image::host(file, "read", error);
        // At most 2^32 clusters of 2^21 bytes, which `check` saw to.
        let bytes = u64::from(self.word(56)) << self.word(20);
        let start = self.long(48);
        if bytes > MAX_TABLE || start.checked_add(bytes).is_none() || !start.is_multiple_of(SMALLEST_CLUSTER) {
            return wrong("is too large, or out of place");
        }
        let size = opened.size().map_err(failed)?;
        let mut piece = Bounce::new(TABLE_PIECE, READ).map_err(failed)?;
        let mut blocks = Vec::new();
        for at in (start..start + bytes).step_by(TABLE_PIECE) {
            piece.bytes().fill(0);
            let buffers = piece.buffers(TABLE_PIECE);
            opened.read_up_to(at, &buffers, 0).map_err(failed)?;
            let here = usize::try_from(start + bytes - at)
                .unwrap_or(TABLE_PIECE)
                .min(TABLE_PIECE);
            for entry in piece.bytes()[..here].chunks_exact(8) {
                let block = entry.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
                if block >= size {
                    return wrong("leads out of the file");
                }
                if block != 0 {
                    blocks.push(block);
                }
            }
        }
        blocks.sort_unstable();
        if blocks.windows(2).any(|pair| pair[0] == pair[1]) {
            return wrong("names a block twice");
        }
        Ok(())
    }
}
