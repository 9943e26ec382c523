//! Reads what this guest needs from ACPI's tables: processors, IOAPIC, ECAM, and the registers that power off and reset.
//!
//! Pure, as `boot_info`. Every table is checked (signature, length, checksum) and every walk is bounded; a table that fails is
//! treated as missing. Layouts are from the ACPI specification 6.5: RSDP 5.2.5.3, XSDT 5.2.8, FADT 5.2.9, MADT 5.2.12; MCFG is
//! from the PCI firmware specification 3.2, 4.1.2.

use super::boot_info::{PhysicalMemory, bytes, long, word};

/// Processors kept of a MADT; more are counted only.
pub(crate) const MAX_PROCESSORS: usize = 64;
/// Longest table that is looked at, in bytes.
const MAX_TABLE: u32 = 1 << 16;
/// Header that all tables but the RSDP share, in bytes.
const HEADER: u64 = 36;
/// Where a PC's BIOS may have put the RSDP, on a 16-byte boundary.
const BIOS_AREA: core::ops::Range<u64> = 0xe_0000..0x10_0000;
const RSDP_SIGNATURE: [u8; 8] = *b"RSD PTR ";

/// A register in port space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port(pub(crate) u16);

/// What the tables tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acpi {
    apic_ids: [u32; MAX_PROCESSORS],
    /// Enabled processors.
    pub(crate) processors: usize,
    /// The first IOAPIC's address.
    pub(crate) ioapic: Option<u32>,
    /// ECAM's address and last bus.
    pub(crate) ecam: Option<(u64, u8)>,
    /// The sleep control register (hardware-reduced ACPI).
    pub(crate) sleep_control: Option<Port>,
    /// The reset register and what to write there.
    pub(crate) reset: Option<(Port, u8)>,
}

impl Acpi {
    fn new() -> Self {
        Self {
            apic_ids: [0; MAX_PROCESSORS],
            processors: 0,
            ioapic: None,
            ecam: None,
            sleep_control: None,
            reset: None,
        }
    }

    /// Reads the tables below `rsdp`, or below the RSDP in the BIOS area; `None` if there are none.
    pub(crate) fn read(memory: &impl PhysicalMemory, rsdp: Option<u64>) -> Option<Self> {
        let rsdp = match rsdp {
            Some(rsdp) => rsdp,
            None => BIOS_AREA
                .step_by(16)
                .find(|&address| bytes(memory, address) == Some(RSDP_SIGNATURE))?,
        };
        if bytes(memory, rsdp)? != RSDP_SIGNATURE || !sums_to_zero(memory, rsdp, 20) {
            return None;
        }
        let [revision] = bytes(memory, rsdp.checked_add(15)?)?;
        if revision < 2 || !sums_to_zero(memory, rsdp, 36) {
            return None;
        }
        let xsdt = long(memory, rsdp.checked_add(24)?)?;
        let end = table(memory, xsdt, *b"XSDT")?;
        let mut acpi = Self::new();
        let mut pointer = xsdt + HEADER;
        while pointer + 8 <= end {
            if let Some(address) = long(memory, pointer) {
                acpi.read_table(memory, address);
            }
            pointer += 8;
        }
        Some(acpi)
    }

    fn read_table(&mut self, memory: &impl PhysicalMemory, address: u64) {
        if let Some(end) = table(memory, address, *b"APIC") {
            self.read_madt(memory, address, end);
        } else if let Some(end) = table(memory, address, *b"FACP") {
            self.sleep_control = register(memory, address, end, 244);
            self.reset = register(memory, address, end, 116)
                .zip(bytes(memory, address + 128))
                .map(|(port, [value])| (port, value));
        } else if let Some(end) = table(memory, address, *b"MCFG")
            && address + HEADER + 8 + 16 <= end
            && let (Some(base), Some([_, last])) = (
                long(memory, address + HEADER + 8),
                bytes(memory, address + HEADER + 8 + 10),
            )
        {
            self.ecam = Some((base, last));
        }
    }

    fn read_madt(&mut self, memory: &impl PhysicalMemory, address: u64, end: u64) {
        let mut entry = address + HEADER + 8;
        while let Some([kind, length]) = bytes(memory, entry) {
            let next = entry + u64::from(length);
            if length < 2 || next > end {
                break;
            }
            match (kind, length) {
                // Local APIC: {kind, length, processor, ID, flags}.
                (0, 8) => {
                    if let (Some([id]), Some(flags)) = (bytes(memory, entry + 3), word(memory, entry + 4)) {
                        self.add_processor(id.into(), flags);
                    }
                }
                // Local x2APIC: {kind, length, reserved16, ID, flags, processor}.
                (9, 16) => {
                    if let (Some(id), Some(flags)) = (word(memory, entry + 4), word(memory, entry + 8)) {
                        self.add_processor(id, flags);
                    }
                }
                (1, 12) if self.ioapic.is_none() => self.ioapic = word(memory, entry + 4),
                _ => {}
            }
            entry = next;
        }
    }

    fn add_processor(&mut self, id: u32, flags: u32) {
        // Bit 0 is "enabled"; one that is not is room for hot-plug.
        if flags & 1 == 0 {
            return;
        }
        if let Some(slot) = self.apic_ids.get_mut(self.processors) {
            *slot = id;
        }
        self.processors += 1;
    }

    /// The processors' APIC IDs, at most [`MAX_PROCESSORS`].
    pub(crate) fn apic_ids(&self) -> &[u32] {
        self.apic_ids.get(..self.processors).unwrap_or(&self.apic_ids)
    }
}

/// End of the table at `address` if it has this signature and is sound.
fn table(memory: &impl PhysicalMemory, address: u64, signature: [u8; 4]) -> Option<u64> {
    if bytes(memory, address)? != signature {
        return None;
    }
    let length = word(memory, address.checked_add(4)?)?;
    if u64::from(length) < HEADER || length > MAX_TABLE {
        return None;
    }
    let end = address.checked_add(length.into())?;
    // Room for the few bytes that a walk adds before it looks at the end.
    end.checked_add(0x200)?;
    sums_to_zero(memory, address, length).then_some(end)
}

fn sums_to_zero(memory: &impl PhysicalMemory, address: u64, length: u32) -> bool {
    let sum = (0..u64::from(length)).try_fold(0u8, |sum, offset| {
        let [byte] = bytes(memory, address.checked_add(offset)?)?;
        Some(sum.wrapping_add(byte))
    });
    sum == Some(0)
}

/// The generic address structure at `offset`, if it names a port.
fn register(memory: &impl PhysicalMemory, table: u64, end: u64, offset: u64) -> Option<Port> {
    const SYSTEM_IO: u8 = 1;
    if table + offset + 12 > end {
        return None;
    }
    let [space, ..] = bytes::<4>(memory, table + offset)?;
    let port = u16::try_from(long(memory, table + offset + 4)?).ok()?;
    (space == SYSTEM_IO && port != 0).then_some(Port(port))
}
