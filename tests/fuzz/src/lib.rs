//! What the fuzz targets share: a guest whose memory is made once, and files that are rewritten for each input.
//!
//! `tests/fuzz/run 5 elf` runs a target for five seconds, from its seeds and what earlier runs found; by hand, in
//! `tests/`: `cargo +nightly fuzz run elf -- -max_total_time=5`.

pub mod driver;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use libfuzzer_sys::arbitrary;
use sepal_vmm_component::boot::{self, BootEntry, BootError, BootRequest, Protocol};
use sepal_vmm_component::layout;
use sepal_vmm_component::memory::{GuestRam, MIB, MemoryConfig, MemoryMap};
use vm_memory::{Bytes, GuestAddress};

/// A guest to load hostile kernels into, again and again.
pub struct Guest {
    ram: GuestRam,
    map: MemoryMap,
    kernel: File,
    initrd: File,
}

impl Default for Guest {
    fn default() -> Self {
        Self::new(32)
    }
}

impl Guest {
    /// A guest with so many MiB of memory.
    pub fn new(mib: u64) -> Guest {
        let config = MemoryConfig {
            size_bytes: mib * MIB,
            custom: Vec::new(),
            huge_pages: false,
            device_bytes: 0,
        };
        let ram = GuestRam::new(config, &AtomicBool::new(false)).expect("memory for a small guest");
        let map = MemoryMap::new(ram.ranges());
        Guest {
            ram,
            map,
            kernel: memory_file(),
            initrd: memory_file(),
        }
    }

    /// Loads a kernel. An error is as good as success; success must leave an entry in memory and all that goes with
    /// the kernel whole.
    pub fn load(&self, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str, protocol: Option<Protocol>) {
        rewrite(&self.kernel, kernel);
        if let Some(initrd) = initrd {
            rewrite(&self.initrd, initrd);
        }
        let request = BootRequest {
            kernel: &self.kernel,
            initrd: initrd.is_some().then_some(&self.initrd),
            cmdline,
            rsdp: layout::ACPI,
            protocol,
            cancel: &AtomicBool::new(false),
        };
        match boot::load(self.ram.memory(), &self.map, &request) {
            Ok(entry) => self.check(&entry, initrd, cmdline),
            Err(error) => check_error(&error),
        }
    }

    fn check(&self, entry: &BootEntry, initrd: Option<&[u8]>, cmdline: &str) {
        assert!(self.map.is_usable(&(entry.rip..entry.rip + 1)), "{entry:x?}");
        assert!(entry.rip >= layout::BOOT_AREA_END, "{entry:x?}");
        let read = |address: u64, count: usize| {
            let mut bytes = vec![0; count];
            self.ram
                .memory()
                .read_slice(&mut bytes, GuestAddress(address))
                .expect("an address in memory");
            bytes
        };
        assert_eq!(
            read(layout::CMDLINE, cmdline.len() + 1),
            [cmdline.as_bytes(), b"\0"].concat()
        );
        let Some(initrd) = initrd else { return };
        let word32 = |at| u32::from_le_bytes(read(at, 4).try_into().expect("four bytes"));
        let address = match entry.protocol {
            Protocol::Linux64 => word32(entry.boot_info + 0x218),
            Protocol::Pvh => word32(u64::from(word32(entry.boot_info + 16))),
        };
        assert!(
            read(address.into(), initrd.len()) == initrd,
            "the initramfs at {address:#x} differs"
        );
    }
}

/// Errors must be printable, and name what they are about.
fn check_error(error: &BootError) {
    assert!(!error.to_string().is_empty());
    let _ = error.class();
}

fn memory_file() -> File {
    rustix::fs::memfd_create(c"fuzz", rustix::fs::MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into()
}

fn rewrite(file: &File, bytes: &[u8]) {
    file.set_len(0)
        .and_then(|()| file.write_all_at(bytes, 0))
        .expect("writing to a memfd");
}

/// Kernels that are made up lie below this, which is beyond the memory of a guest of [`SMALL`].
const ADDRESSES: u32 = 8 << 20;

/// MiB of a guest for kernels that are made up.
pub const SMALL: u64 = 6;

/// A part of an ELF file, as a fuzzer makes it up.
#[derive(Debug, arbitrary::Arbitrary)]
pub struct Segment {
    note: bool,
    offset: u16,
    address: u32,
    bytes: Vec<u8>,
    /// Bytes in memory beyond those in the file.
    more: u32,
}

impl Segment {
    fn address(&self) -> u64 {
        u64::from(self.address % ADDRESSES)
    }

    /// What it holds; of a note, the PVH entry in front.
    fn contents(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if self.note {
            let mut note = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0".to_vec();
            note.extend_from_slice(&(self.address % ADDRESSES).to_le_bytes());
            bytes.splice(..0, note);
        }
        bytes
    }
}

/// An ELF file around the segments, entered so many bytes into the first of them.
pub fn elf(entry: u8, segments: &[Segment]) -> Vec<u8> {
    let entry = segments.first().map_or(0, Segment::address) + u64::from(entry);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [entry, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64, 56, segments.len() as u16, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let headers = file.len() + segments.len() * 56;
    let mut contents = Vec::new();
    for segment in segments {
        let bytes = segment.contents();
        let offset = headers + usize::from(segment.offset);
        file.extend_from_slice(&if segment.note { 4_u32 } else { 1 }.to_le_bytes());
        file.extend_from_slice(&7_u32.to_le_bytes());
        let (address, size) = (segment.address(), bytes.len() as u64);
        let memory = size + u64::from(segment.more % ADDRESSES);
        for word in [offset as u64, address, address, size, memory, 4] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        contents.push((offset, bytes));
    }
    for (start, bytes) in contents {
        let end = start + bytes.len();
        file.resize(file.len().max(end), 0);
        file[start..end].copy_from_slice(&bytes);
    }
    file
}

/// A bzImage around a payload, with bytes of its setup header changed: offset from 0x1f1, value.
pub fn bzimage(payload: &[u8], changes: &[(u8, u8)]) -> Vec<u8> {
    const SETUP: usize = 1024;
    const HEADER: usize = 0x1f1;
    let mut image = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(HEADER, &[1]);
    put(0x1fe, b"\x55\xaa\xeb\x6aHdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    for (at, value) in changes {
        put(HEADER + usize::from(*at), &[*value]);
    }
    image.extend_from_slice(payload);
    image
}
