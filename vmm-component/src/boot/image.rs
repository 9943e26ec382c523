//! Images read from their start to their end: kernel files, and what comes out of a decompressor.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, Compression, guest};

/// Bytes that flow at once, and between two looks at the cancel flag.
const CHUNK: usize = 128 << 10;

/// Most bytes that a decompressed kernel may have: far beyond any real one, and an end to a payload that
/// decompresses for ever.
const MAX_DECOMPRESSED: u64 = 1 << 30;

/// A file of the client's, read with `pread` only: its offset stays, and if it shrinks a read comes back short.
#[derive(Clone, Copy, Debug)]
pub(super) struct InputFile<'a> {
    file: &'a File,
    len: u64,
    what: &'static str,
    cancel: &'a AtomicBool,
}

impl<'a> InputFile<'a> {
    /// `what` names the file in errors.
    pub(super) fn open(file: &'a File, what: &'static str, cancel: &'a AtomicBool) -> Result<Self, BootError> {
        let metadata = file.metadata().map_err(|source| BootError::Read {
            what,
            offset: 0,
            source,
        })?;
        if !metadata.is_file() {
            return Err(BootError::NotRegular { what });
        }
        Ok(InputFile {
            file,
            len: metadata.len(),
            what,
            cancel,
        })
    }

    /// Bytes of the file when it was opened.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn cancel(&self) -> &'a AtomicBool {
        self.cancel
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    fn check_cancel(&self) -> Result<(), BootError> {
        if self.is_cancelled() {
            Err(BootError::Cancelled)
        } else {
            Ok(())
        }
    }

    fn truncated(&self, end: u64, missing: u64) -> BootError {
        BootError::Truncated {
            what: self.what,
            end,
            missing,
        }
    }

    /// Reads up to `buffer.len()` bytes at `offset`; fewer only at the end of the file.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, BootError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match std::os::unix::fs::FileExt::read_at(self.file, &mut buffer[done..], at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(BootError::Read {
                        what: self.what,
                        offset: at,
                        source,
                    });
                }
            }
        }
        Ok(done)
    }

    /// Reads `range` of the file straight into guest memory at `address`, which must be RAM.
    pub(super) fn read_to_guest(
        &self,
        ram: &GuestMemoryMmap,
        range: Range<u64>,
        address: u64,
    ) -> Result<(), BootError> {
        let mut at = range.start;
        while at < range.end {
            self.check_cancel()?;
            let count = (range.end - at).min(CHUNK as u64 * 8) as usize;
            let target = GuestAddress(address + (at - range.start));
            let done = guest::read_from_file(ram, target, count, self.file, at).map_err(|source| BootError::Read {
                what: self.what,
                offset: at,
                source,
            })?;
            if done == 0 {
                return Err(self.truncated(at, range.end - at));
            }
            at += done as u64;
        }
        Ok(())
    }
}

/// A range of a file as a stream, for decompressors.
#[derive(Debug)]
pub(super) struct FileStream<'a> {
    pub(super) file: InputFile<'a>,
    pub(super) range: Range<u64>,
}

impl Read for FileStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.check_cancel().map_err(io::Error::other)?;
        let count = (self.range.end - self.range.start).min(buffer.len() as u64) as usize;
        let done = self
            .file
            .read_at(&mut buffer[..count], self.range.start)
            .map_err(io::Error::other)?;
        self.range.start += done as u64;
        Ok(done)
    }
}

enum Source<'a> {
    File(InputFile<'a>),
    Decompressor {
        reader: Box<dyn Read + 'a>,
        format: Compression,
        cancel: &'a AtomicBool,
    },
}

/// An image that is read from its start to its end.
pub(super) struct Image<'a> {
    source: Source<'a>,
    /// The first bytes, read ahead.
    head: Vec<u8>,
    /// Of the next byte that the source gives.
    source_position: u64,
    /// Of the next byte to hand out.
    position: u64,
}

impl<'a> Image<'a> {
    pub(super) fn from_file(file: InputFile<'a>) -> Image<'a> {
        Image {
            source: Source::File(file),
            head: Vec::new(),
            source_position: 0,
            position: 0,
        }
    }

    pub(super) fn from_decompressor(
        reader: Box<dyn Read + 'a>,
        format: Compression,
        cancel: &'a AtomicBool,
    ) -> Image<'a> {
        let source = Source::Decompressor { reader, format, cancel };
        Image {
            source,
            head: Vec::new(),
            source_position: 0,
            position: 0,
        }
    }

    /// What to call the image in errors.
    fn what(&self) -> &'static str {
        match &self.source {
            Source::File(file) => file.what,
            Source::Decompressor { .. } => "kernel payload",
        }
    }

    /// Fills `buffer` from the source; fewer bytes only at its end.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, BootError> {
        let start = self.source_position;
        let done = match &mut self.source {
            Source::File(file) => {
                file.check_cancel()?;
                file.read_at(buffer, start)?
            }
            Source::Decompressor { reader, format, cancel } => {
                let mut done = 0;
                while done < buffer.len() {
                    let result = reader.read(&mut buffer[done..]);
                    if cancel.load(Ordering::Relaxed) {
                        return Err(BootError::Cancelled);
                    }
                    match result {
                        Ok(0) => break,
                        Ok(count) => done += count,
                        Err(source) => {
                            let (format, offset) = (*format, start + done as u64);
                            return Err(BootError::Decompress { format, offset, source });
                        }
                    }
                }
                if start + done as u64 > MAX_DECOMPRESSED {
                    let source = io::Error::other("it is larger than any kernel");
                    return Err(BootError::Decompress {
                        format: *format,
                        offset: MAX_DECOMPRESSED,
                        source,
                    });
                }
                done
            }
        };
        self.source_position += done as u64;
        Ok(done)
    }

    /// The first `count` bytes, without consuming them; fewer only if the image is shorter. Only before the first
    /// `skip_to`, `read_exact` or `load`.
    pub(super) fn peek(&mut self, count: usize) -> Result<&[u8], BootError> {
        let have = self.head.len();
        if have < count {
            let mut more = vec![0; count - have];
            let done = self.fill(&mut more)?;
            self.head.extend_from_slice(&more[..done]);
        }
        Ok(&self.head[..count.min(self.head.len())])
    }

    /// The flag to look at during long work on the image.
    pub(super) fn cancel(&self) -> &'a AtomicBool {
        match &self.source {
            Source::File(file) => file.cancel,
            Source::Decompressor { cancel, .. } => cancel,
        }
    }

    /// The error for a header of `want` bytes in an image of `have`.
    pub(super) fn short(&self, have: usize, want: usize) -> BootError {
        BootError::Truncated {
            what: self.what(),
            end: have as u64,
            missing: (want - have) as u64,
        }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Goes on at `offset`, which must not be before the position.
    pub(super) fn skip_to(&mut self, offset: u64) -> Result<(), BootError> {
        let in_head = self.head.len() as u64;
        if offset > self.source_position {
            if let Source::File(_) = self.source {
                self.source_position = offset;
            } else {
                let mut waste = vec![0; CHUNK];
                while self.source_position < offset {
                    let count = (offset - self.source_position).min(CHUNK as u64) as usize;
                    if self.fill(&mut waste[..count])? < count {
                        return Err(self.truncated(offset - self.source_position));
                    }
                }
            }
        }
        debug_assert!(self.position <= offset && (offset <= in_head || offset == self.source_position));
        self.position = offset;
        Ok(())
    }

    /// What of the head is still to be handed out, at most `count` bytes.
    fn rest_of_head(&self, count: u64) -> Range<usize> {
        let len = self.head.len() as u64;
        let start = self.position.min(len);
        let end = self.position.saturating_add(count).min(len);
        start as usize..end as usize
    }

    fn truncated(&self, missing: u64) -> BootError {
        BootError::Truncated {
            what: self.what(),
            end: self.source_position,
            missing,
        }
    }

    /// Fills `buffer` with the next bytes.
    pub(super) fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), BootError> {
        let head = self.rest_of_head(buffer.len() as u64);
        let (first, rest) = buffer.split_at_mut(head.len());
        first.copy_from_slice(&self.head[head]);
        if !rest.is_empty() {
            let done = self.fill(rest)?;
            if done < rest.len() {
                return Err(self.truncated((rest.len() - done) as u64));
            }
        }
        self.position += buffer.len() as u64;
        Ok(())
    }

    /// Moves the next `count` bytes into guest memory at `address`, which must be RAM.
    pub(super) fn load(&mut self, ram: &GuestMemoryMmap, address: u64, count: u64) -> Result<(), BootError> {
        let head = self.rest_of_head(count);
        let mut done = head.len() as u64;
        ram.write_slice(&self.head[head], GuestAddress(address))?;
        self.position += done;
        if let Source::File(file) = &self.source {
            file.read_to_guest(ram, self.position..self.position + (count - done), address + done)?;
            self.position += count - done;
            self.source_position = self.source_position.max(self.position);
            return Ok(());
        }
        let mut buffer = vec![0; CHUNK.min((count - done) as usize)];
        while done < count {
            let chunk = (count - done).min(CHUNK as u64) as usize;
            self.read_exact(&mut buffer[..chunk])?;
            ram.write_slice(&buffer[..chunk], GuestAddress(address + done))?;
            done += chunk as u64;
        }
        Ok(())
    }

    /// Reads on to the end of a decompressor, so that it checks its checksums. What follows in a file is of no
    /// interest.
    pub(super) fn finish(&mut self) -> Result<(), BootError> {
        if let Source::Decompressor { .. } = self.source {
            let mut waste = vec![0; CHUNK];
            while self.fill(&mut waste)? == CHUNK {}
        }
        Ok(())
    }
}

/// Names what a file is that is no kernel, by its first bytes.
pub(super) fn describe(head: &[u8]) -> String {
    const KNOWN: &[(&[u8], &str)] = &[
        (b"\x1f\x8b", "gzip-compressed data (decompress it first)"),
        (b"\xfd7zXZ\0", "xz-compressed data (decompress it first)"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed data (decompress it first)"),
        (b"\x02\x21\x4c\x18", "lz4-compressed data (decompress it first)"),
        (b"\x04\x22\x4d\x18", "lz4-compressed data (decompress it first)"),
        (b"BZh", "bzip2-compressed data (decompress it first)"),
        (b"\x5d\0\0", "lzma-compressed data (decompress it first)"),
        (b"\x89LZO\0", "lzo-compressed data (decompress it first)"),
        (b"MZ", "a PE/EFI program"),
        (b"070701", "a cpio archive (an initramfs?)"),
        (b"070702", "a cpio archive (an initramfs?)"),
        (b"\x27\x05\x19\x56", "a U-Boot image"),
        (b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"#!", "a script"),
    ];
    if head.is_empty() {
        return "an empty file".into();
    }
    if let Some((_, name)) = KNOWN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return (*name).into();
    }
    if head.get(510..512) == Some(b"\x55\xaa") {
        return "a boot sector without Linux's setup header (a disk image?)".into();
    }
    let text = &head[..head.len().min(32)];
    if text
        .iter()
        .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
    {
        return format!("text that starts with {:?}", String::from_utf8_lossy(text).trim_end());
    }
    let first: Vec<String> = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("a flat image or unknown format that starts with {}", first.join(" "))
}
