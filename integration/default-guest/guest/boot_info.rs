//! What the VMM tells at entry: memory map, command line, ACPI's root; from PVH's start info or Linux's zero page.
//!
//! Pure: memory is read through [`PhysicalMemory`]. Nothing read is trusted; what is malformed is left out.

/// The machine's memory as a parser sees it.
pub(crate) trait PhysicalMemory {
    /// Copies memory from `address` on; false if not all of it can be read.
    fn read(&self, address: u64, into: &mut [u8]) -> bool;
}

/// Reads `N` bytes.
pub(crate) fn bytes<const N: usize>(memory: &impl PhysicalMemory, address: u64) -> Option<[u8; N]> {
    let mut into = [0; N];
    memory.read(address, &mut into).then_some(into)
}

/// Reads a little-endian 32-bit word.
pub(crate) fn word(memory: &impl PhysicalMemory, address: u64) -> Option<u32> {
    bytes(memory, address).map(u32::from_le_bytes)
}

/// Reads a little-endian 64-bit word.
pub(crate) fn long(memory: &impl PhysicalMemory, address: u64) -> Option<u64> {
    bytes(memory, address).map(u64::from_le_bytes)
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Range {
    /// First byte.
    pub(crate) start: u64,
    /// First byte after it, above `start`.
    pub(crate) end: u64,
    /// As e820 and PVH number types: 1 is usable memory.
    pub(crate) kind: u32,
}

impl Range {
    /// Whether it is memory to use.
    pub(crate) fn usable(&self) -> bool {
        self.kind == 1
    }
}

/// Ranges kept of a memory map; more are counted only.
pub(crate) const MAX_RANGES: usize = 32;
/// Bytes kept of the command line.
pub(crate) const MAX_COMMAND_LINE: usize = 2047;
/// Entries looked at in a memory map.
const MAX_ENTRIES: u64 = 1024;
/// `hvm_start_info.magic` (Xen's PVH boot ABI).
const PVH_MAGIC: u32 = 0x336e_c578;
/// Bytes of `hvm_memmap_table_entry`.
const PVH_ENTRY: u64 = 24;
/// Offsets in Linux's `boot_params` (Documentation/arch/x86/zero-page.rst), and the bytes of an e820 entry there.
const ZERO_PAGE_RSDP: u64 = 0x70;
const ZERO_PAGE_ENTRIES: u64 = 0x1e8;
const ZERO_PAGE_COMMAND_LINE: u64 = 0x228;
const ZERO_PAGE_MAP: u64 = 0x2d0;
const E820_ENTRY: u64 = 20;

/// What the VMM told.
pub(crate) struct BootInfo {
    ranges: [Range; MAX_RANGES],
    kept: usize,
    /// Ranges that did not fit.
    pub(crate) more_ranges: usize,
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_length: usize,
    /// Address of ACPI's RSDP, if the VMM told one.
    pub(crate) rsdp: Option<u64>,
}

impl BootInfo {
    fn new() -> Self {
        Self {
            ranges: [Range::default(); MAX_RANGES],
            kept: 0,
            more_ranges: 0,
            command_line: [0; MAX_COMMAND_LINE],
            command_line_length: 0,
            rsdp: None,
        }
    }

    /// From `hvm_start_info` at `address`.
    pub(crate) fn from_pvh(memory: &impl PhysicalMemory, address: u64) -> Self {
        let at = |offset: u64| address.saturating_add(offset);
        let mut info = Self::new();
        if word(memory, address) != Some(PVH_MAGIC) {
            return info;
        }
        info.read_command_line(memory, long(memory, at(24)).unwrap_or(0));
        info.rsdp = long(memory, at(32)).filter(|&rsdp| rsdp != 0);
        // The memory map came with version 1.
        if word(memory, at(4)).is_some_and(|version| version >= 1)
            && let (Some(map), Some(entries)) = (long(memory, at(40)), word(memory, at(48)))
        {
            for index in 0..u64::from(entries).min(MAX_ENTRIES) {
                info.read_range(memory, map.saturating_add(index * PVH_ENTRY));
            }
        }
        info
    }

    /// From Linux's `boot_params` at `address`.
    pub(crate) fn from_zero_page(memory: &impl PhysicalMemory, address: u64) -> Self {
        let at = |offset: u64| address.saturating_add(offset);
        let mut info = Self::new();
        info.read_command_line(memory, word(memory, at(ZERO_PAGE_COMMAND_LINE)).unwrap_or(0).into());
        info.rsdp = long(memory, at(ZERO_PAGE_RSDP)).filter(|&rsdp| rsdp != 0);
        let [entries] = bytes(memory, at(ZERO_PAGE_ENTRIES)).unwrap_or([0]);
        for index in 0..u64::from(entries).min(128) {
            info.read_range(memory, at(ZERO_PAGE_MAP + index * E820_ENTRY));
        }
        info
    }

    /// `{u64 address, u64 bytes, u32 type}`, how both maps' entries begin.
    fn read_range(&mut self, memory: &impl PhysicalMemory, address: u64) {
        let (Some(start), Some(size), Some(kind)) = (
            long(memory, address),
            long(memory, address.saturating_add(8)),
            word(memory, address.saturating_add(16)),
        ) else {
            return;
        };
        let end = start.saturating_add(size);
        if end == start {
            return;
        }
        match self.ranges.get_mut(self.kept) {
            Some(range) => {
                *range = Range { start, end, kind };
                self.kept += 1;
            }
            None => self.more_ranges += 1,
        }
    }

    /// Bytes up to a NUL; what is not printable ASCII becomes '?', so that it cannot steer a terminal.
    fn read_command_line(&mut self, memory: &impl PhysicalMemory, address: u64) {
        if address == 0 {
            return;
        }
        for (index, kept) in (0..).zip(&mut self.command_line) {
            match bytes(memory, address.saturating_add(index)) {
                None | Some([0]) => break,
                Some([byte]) => *kept = if matches!(byte, b' '..=b'~') { byte } else { b'?' },
            }
            self.command_line_length += 1;
        }
    }

    /// The memory map's ranges.
    pub(crate) fn ranges(&self) -> &[Range] {
        self.ranges.get(..self.kept).unwrap_or_default()
    }

    /// The command line.
    pub(crate) fn command_line(&self) -> &str {
        let line = self.command_line.get(..self.command_line_length).unwrap_or_default();
        str::from_utf8(line).unwrap_or_default()
    }

    /// Bytes of usable memory.
    pub(crate) fn usable_bytes(&self) -> u64 {
        let usable = self.ranges().iter().filter(|range| range.usable());
        usable.fold(0, |sum: u64, range| sum.saturating_add(range.end - range.start))
    }

    /// Whether all of `start..end` is usable memory in one range.
    pub(crate) fn is_usable(&self, start: u64, end: u64) -> bool {
        self.ranges()
            .iter()
            .any(|range| range.usable() && range.start <= start && end <= range.end)
    }
}
