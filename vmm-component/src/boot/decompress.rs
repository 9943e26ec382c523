//! What a bzImage's payload is compressed with, as a stream.
//!
//! The decoders are in safe Rust where there is a choice, and hold no more than the format's window, which is freed
//! when the kernel is loaded. It grows with what was decompressed, so a kernel costs at most its own size:
//!
//! | format | memory, at most | as kernels have it |
//! |---|---|---|
//! | gzip | 64 KiB | |
//! | lz4 (legacy frames) | 16 MiB: a compressed and a decompressed block | blocks of 8 MiB |
//! | xz | 129 MiB | dictionaries of 32 MiB, since 6.12 of 128 MiB |
//! | zstd | 129 MiB | level 22: a window of 128 MiB |

use std::fmt;
use std::io::{self, BufReader, Read};
use std::ops::Range;

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::BootError;
use super::bzimage;
use super::image::{FileStream, Image, InputFile};

/// Largest window of a zstd frame and dictionary of an xz block, in bytes.
const MAX_WINDOW: u64 = 128 << 20;

/// XzReader counts its tables (about 110 KiB) with the dictionary.
const MAX_XZ_KIB: u32 = (MAX_WINDOW >> 10) as u32 + 1024;

/// The decompressed size of a block of lz4's legacy frame format, except the last.
const LZ4_BLOCK: usize = 8 << 20;
/// The most that a block can have compressed (LZ4_COMPRESSBOUND).
const LZ4_COMPRESSED: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// Bytes that are read from the file at once.
const READ: usize = 64 << 10;

/// How a bzImage's payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all (CONFIG_KERNEL_UNCOMPRESSED).
    None,
    /// gzip.
    Gzip,
    /// xz, usually with the x86 branch filter.
    Xz,
    /// zstd.
    Zstd,
    /// lz4, in its legacy frame format.
    Lz4,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::None => "uncompressed",
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
        })
    }
}

/// The kernel inside a bzImage: `payload` of `file`, decompressed while it is read.
pub(super) fn open<'a>(file: InputFile<'a>, payload: Range<u64>) -> Result<Image<'a>, BootError> {
    let mut magic = [0; 6];
    let have = file.read_at(&mut magic, payload.start)?;
    let format = bzimage::compression(&magic[..have])?;
    let stream = BufReader::with_capacity(READ, FileStream { file, range: payload });
    let reader: Box<dyn Read + 'a> = match format {
        Compression::None => Box::new(stream),
        Compression::Gzip => Box::new(GzDecoder::new(stream)),
        Compression::Xz => Box::new(XzReader::new_mem_limit(stream, false, MAX_XZ_KIB)),
        Compression::Zstd => Box::new(Zstd::new(stream).map_err(|source| {
            if file.is_cancelled() {
                BootError::Cancelled
            } else {
                BootError::Decompress {
                    format,
                    offset: 0,
                    source,
                }
            }
        })?),
        Compression::Lz4 => Box::new(Lz4::new(stream)),
    };
    Ok(Image::from_decompressor(reader, format, file.cancel()))
}

/// zstd with its checksum compared, which `ruzstd` leaves to its caller.
struct Zstd<R: Read> {
    decoder: StreamingDecoder<R, FrameDecoder>,
}

impl<R: Read> Zstd<R> {
    fn new(stream: R) -> io::Result<Self> {
        let decoder = StreamingDecoder::new_with_max_window_size(stream, MAX_WINDOW).map_err(io::Error::other)?;
        Ok(Zstd { decoder })
    }
}

impl<R: Read> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            let frame = &self.decoder.decoder;
            if let (Some(stored), Some(seen)) = (frame.get_checksum_from_data(), frame.get_calculated_checksum())
                && stored != seen
            {
                return Err(io::Error::other(format!(
                    "checksum is {seen:#010x}, should be {stored:#010x}"
                )));
            }
        }
        Ok(count)
    }
}

/// lz4's legacy frame format: a magic number, then blocks, each behind its compressed size. The end is the end of the
/// stream; kernels append the decompressed size in four bytes, too few for a block.
struct Lz4<R> {
    stream: R,
    compressed: Vec<u8>,
    block: Vec<u8>,
    /// What of `block` is still to be handed out.
    ready: Range<usize>,
}

impl<R: Read> Lz4<R> {
    fn new(stream: R) -> Self {
        Lz4 {
            stream,
            compressed: Vec::new(),
            block: Vec::new(),
            ready: 0..0,
        }
    }

    /// The next four bytes, or `None` at the end of the stream.
    fn word(&mut self) -> io::Result<Option<[u8; 4]>> {
        let mut word = [0; 4];
        let mut have = 0;
        while have < word.len() {
            match self.stream.read(&mut word[have..])? {
                0 => return Ok(None),
                count => have += count,
            }
        }
        Ok(Some(word))
    }

    /// Decompresses the next block. False at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let Some(mut word) = self.word()? else { return Ok(false) };
        while word == LZ4_MAGIC {
            let Some(next) = self.word()? else { return Ok(false) };
            word = next;
        }
        let size = u32::from_le_bytes(word) as usize;
        self.compressed.clear();
        let limit = size.min(LZ4_COMPRESSED + 1) as u64;
        self.stream.by_ref().take(limit).read_to_end(&mut self.compressed)?;
        if self.compressed.is_empty() {
            // Not a block but the appended size.
            return Ok(false);
        }
        if size > LZ4_COMPRESSED || self.compressed.len() < size {
            return Err(io::Error::other(format!(
                "a block of {size} bytes, {} follow",
                self.compressed.len()
            )));
        }
        self.block.resize(LZ4_BLOCK, 0);
        let count = lz4_flex::block::decompress_into(&self.compressed, &mut self.block).map_err(io::Error::other)?;
        self.ready = 0..count;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.ready.is_empty() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let count = buffer.len().min(self.ready.len());
        buffer[..count].copy_from_slice(&self.block[self.ready.start..self.ready.start + count]);
        self.ready.start += count;
        Ok(count)
    }
}
