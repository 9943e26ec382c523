//! Tests of boot: images made up here, as a guest finds them in its memory.

mod bzimage;
mod elf;
mod images;
#[cfg(target_arch = "x86_64")]
mod kvm;
mod structures;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::memory::{GuestRam, MIB, MemoryConfig};

/// A guest's memory, and files to boot in it.
struct Guest {
    ram: GuestRam,
    map: MemoryMap,
}

impl Guest {
    fn new(mib: u64) -> Guest {
        let config = MemoryConfig {
            size_bytes: mib * MIB,
            custom: vec![],
            huge_pages: false,
            device_bytes: 0,
        };
        let ram = GuestRam::new(config, &AtomicBool::new(false)).unwrap();
        let map = MemoryMap::new(ram.ranges());
        Guest { ram, map }
    }

    fn memory(&self) -> &GuestMemoryMmap {
        self.ram.memory()
    }

    fn load(&self, kernel: &[u8]) -> Result<BootEntry, BootError> {
        self.load_with(kernel, None, "console=ttyS0", None)
    }

    fn load_with(
        &self,
        kernel: &[u8],
        initrd: Option<&[u8]>,
        cmdline: &str,
        protocol: Option<Protocol>,
    ) -> Result<BootEntry, BootError> {
        let (kernel, initrd) = (file(kernel), initrd.map(file));
        let request = BootRequest {
            kernel: &kernel,
            initrd: initrd.as_ref(),
            cmdline,
            rsdp: layout::ACPI,
            protocol,
            cancel: &AtomicBool::new(false),
        };
        load(self.memory(), &self.map, &request)
    }

    fn bytes(&self, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn word32(&self, address: u64) -> u32 {
        self.memory().read_obj(GuestAddress(address)).unwrap()
    }

    fn word64(&self, address: u64) -> u64 {
        self.memory().read_obj(GuestAddress(address)).unwrap()
    }

    /// What a successful load always leaves: an entry in RAM, and the boot structures whole.
    fn check_loaded(&self, entry: &BootEntry) {
        assert!(self.map.is_usable(&(entry.rip..entry.rip + 1)), "{entry:x?}");
        assert!(entry.rip >= layout::BOOT_AREA_END, "{entry:x?}");
        assert_eq!(self.bytes(layout::CMDLINE, 14), b"console=ttyS0\0");
    }
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}
