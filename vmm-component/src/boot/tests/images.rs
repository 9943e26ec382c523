//! Kernel images made up for tests.

/// What goes where in an ELF file and in memory.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) kind: u32,
    pub(super) offset: u64,
    pub(super) virtual_address: u64,
    pub(super) address: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) memory: u64,
}

impl Segment {
    pub(super) fn load(offset: u64, address: u64, bytes: &[u8], memory: u64) -> Segment {
        let virtual_address = address.wrapping_add(0xffff_ffff_8000_0000);
        Segment {
            kind: 1,
            offset,
            virtual_address,
            address,
            bytes: bytes.to_vec(),
            memory,
        }
    }

    pub(super) fn note(offset: u64, bytes: &[u8]) -> Segment {
        let memory = bytes.len() as u64;
        Segment {
            kind: 4,
            offset,
            virtual_address: 0,
            address: 0,
            bytes: bytes.to_vec(),
            memory,
        }
    }
}

/// An x86-64 ELF file.
pub(super) fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&2_u16.to_le_bytes());
    file.extend_from_slice(&62_u16.to_le_bytes());
    file.extend_from_slice(&1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64, 56, segments.len() as u16, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    for segment in segments {
        file.extend_from_slice(&segment.kind.to_le_bytes());
        file.extend_from_slice(&7_u32.to_le_bytes());
        let size = segment.bytes.len() as u64;
        for word in [
            segment.offset,
            segment.virtual_address,
            segment.address,
            size,
            segment.memory,
            4,
        ] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    for segment in segments {
        let (start, end) = (segment.offset as usize, segment.offset as usize + segment.bytes.len());
        if file.len() < end {
            file.resize(end, 0);
        }
        file[start..end].copy_from_slice(&segment.bytes);
    }
    file
}

/// A note segment with a foreign note, then the one that names the PVH entry.
pub(super) fn pvh_note(entry: u64) -> Vec<u8> {
    let mut note = Vec::new();
    for (name, kind, value) in [
        (&b"GNU\0"[..], 3_u32, &[1, 2, 3][..]),
        (b"Xen\0", 18, &entry.to_le_bytes()),
    ] {
        for word in [name.len() as u32, value.len() as u32, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(name);
        note.extend_from_slice(value);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// Bytes that are not all the same, so that a misplaced piece shows, and compress to about a third.
pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at / 3) as u8 ^ (at >> 9) as u8 ^ seed).collect()
}

pub(super) const KERNEL: u64 = 0x100_0000;
pub(super) const PVH_ENTRY: u64 = KERNEL + 0x40;
pub(super) const DATA: u64 = 0x180_0000;
/// Where the data is in the file.
pub(super) const DATA_OFFSET: usize = 0x2_0000;
pub(super) const TEXT_SIZE: usize = 100_000;
pub(super) const DATA_SIZE: usize = 30_000;

/// A kernel as Linux is laid out: text with the notes in it, then data with zeroed memory behind it.
pub(super) fn kernel() -> Vec<u8> {
    let mut text = pattern(TEXT_SIZE, 1);
    let note = pvh_note(PVH_ENTRY);
    text[0x2000..0x2000 + note.len()].copy_from_slice(&note);
    let segments = [
        Segment::load(0x1000, KERNEL, &text, text.len() as u64),
        Segment::load(DATA_OFFSET as u64, DATA, &pattern(DATA_SIZE, 2), 0x10_0000),
        Segment::note(0x3000, &note),
    ];
    elf(KERNEL, &segments)
}

/// Bytes of a bzImage after its payload.
pub(super) const BEHIND_PAYLOAD: usize = 512;

/// A bzImage around a payload.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP: usize = 1024;
    const OFFSET: usize = 0x300;
    let mut image = vec![0; SETUP + OFFSET];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x248, &(OFFSET as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x250, &0xdead_u64.to_le_bytes());
    put(0x258, &KERNEL.to_le_bytes());
    put(0x260, &0x100_0000_u32.to_le_bytes());
    image.extend_from_slice(payload);
    // As the alignment of a real one: the file goes on.
    image.extend_from_slice(&[0; BEHIND_PAYLOAD]);
    image
}

/// The decompressed size, which kernels append to every payload but gzip's.
pub(super) fn with_size(mut payload: Vec<u8>, size: usize) -> Vec<u8> {
    payload.extend_from_slice(&(size as u32).to_le_bytes());
    payload
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    let encoded = ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
    with_size(encoded, bytes.len())
}

pub(super) fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut payload = 0x184c_2102_u32.to_le_bytes().to_vec();
    for block in bytes.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        payload.extend_from_slice(&(block.len() as u32).to_le_bytes());
        payload.extend_from_slice(&block);
    }
    with_size(payload, bytes.len())
}

/// As kernels have it: CRC32, the x86 branch filter.
pub(super) fn xz(bytes: &[u8]) -> Vec<u8> {
    use lzma_rust2::filter::FilterType;
    use lzma_rust2::{CheckType, XzOptions, XzWriter};
    let mut options = XzOptions::with_preset(1);
    options.set_check_sum_type(CheckType::Crc32);
    options.prepend_pre_filter(FilterType::BcjX86, 0);
    let mut writer = XzWriter::new(Vec::new(), options).unwrap();
    std::io::Write::write_all(&mut writer, bytes).unwrap();
    with_size(writer.finish().unwrap(), bytes.len())
}
