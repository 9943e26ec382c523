//! Configuration space of a function with a type 0 header: bytes, which of them a guest can write, base address registers and the list of
//! capabilities (PCI 6). Pure: what a write means beyond the bytes is up to the function.
//!
//! A base address register needs no logic of its own: its bits below the size cannot be written, so that all ones written read back as the
//! size's mask, which is how a guest measures it (PCI 6.2.5.1).

/// Bytes of configuration space, with the extended part (PCI Express 7.2.1).
pub const CONFIG_BYTES: u16 = 4096;
/// Bytes that hold something: extended space has no capabilities and reads as zeroes.
const USED: usize = 256;

/// Offsets (PCI 6.1).
pub(super) mod offset {
    pub(in crate::pci) const COMMAND: u16 = 0x04;
    pub(in crate::pci) const STATUS: u16 = 0x06;
    pub(in crate::pci) const HEADER_TYPE: u16 = 0x0e;
    pub(in crate::pci) const BARS: u16 = 0x10;
    pub(in crate::pci) const BARS_END: u16 = 0x28;
    pub(in crate::pci) const CAPABILITIES: u16 = 0x34;
    pub(in crate::pci) const INTERRUPT_LINE: u16 = 0x3c;
    pub(in crate::pci) const INTERRUPT_PIN: u16 = 0x3d;
    /// First byte after the header.
    pub(in crate::pci) const HEADER_END: u16 = 0x40;
}

/// Bits of the command register.
mod command {
    pub(super) const MEMORY: u16 = 1 << 1;
    pub(super) const BUS_MASTER: u16 = 1 << 2;
    pub(super) const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// Status bit: a capability list is there. The other bits stay 0 but [`STATUS_INTERRUPT`].
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Low byte of the status register: the function wants its pin asserted.
const STATUS_INTERRUPT: u8 = 1 << 3;
/// Header type bit: the slot has more functions.
pub(super) const MULTI_FUNCTION: u8 = 1 << 7;

/// Base address registers of a function.
pub const BARS: usize = 6;

/// Who a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface: `0xccsspp`.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Interrupt pin, 1 to 4 for INTA# to INTD#; 0 for none.
    pub interrupt_pin: u8,
}

/// How wide a memory base address register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarWidth {
    /// Anywhere below 4 GiB.
    Bits32,
    /// Anywhere; takes two registers.
    Bits64,
}

#[derive(Clone, Copy, Debug)]
struct BarSpec {
    index: u8,
    width: BarWidth,
    size: u64,
}

/// Why something could not be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A BAR's size is no power of two, too small for a page of its own, or too large for its width.
    #[error("base address register {index}: {size:#x} bytes are no power of two from 4 KiB to what its width can hold")]
    BarSize {
        /// First register.
        index: u8,
        /// Bytes.
        size: u64,
    },
    /// There is no such register, or it is taken.
    #[error("base address register {index} does not exist or is taken")]
    BarIndex {
        /// First register.
        index: u8,
    },
    /// No room is left for a capability.
    #[error("no room for capability {id:#x} of {len} bytes")]
    Capability {
        /// Its id.
        id: u8,
        /// Its bytes.
        len: usize,
    },
}

/// The bytes, and which bits a guest can write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; USED],
    writable: [u8; USED],
    bars: Vec<BarSpec>,
    /// Where the link to the next capability goes, and where that may be.
    link: u16,
    free: u16,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; USED],
            writable: [0; USED],
            bars: Vec::new(),
            link: offset::CAPABILITIES,
            free: offset::HEADER_END,
        };
        let class = identity.class.to_le_bytes();
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, class[0], class[1], class[2]]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.set(offset::INTERRUPT_PIN, &[identity.interrupt_pin]);
        let command = command::MEMORY | command::BUS_MASTER | command::INTERRUPT_DISABLE;
        space.allow(offset::COMMAND, &command.to_le_bytes());
        // Scratch bytes for the guest's software.
        space.allow(0x0c, &[0xff]);
        space.allow(offset::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds a memory BAR of `size` bytes at register `index` (and the next, if it is 64 bits wide), not prefetchable, at address 0.
    ///
    /// # Errors
    ///
    /// [`ConfigError::BarSize`] and [`ConfigError::BarIndex`].
    pub fn add_bar(&mut self, index: u8, width: BarWidth, size: u64) -> Result<(), ConfigError> {
        let most = match width {
            BarWidth::Bits32 => 1 << 31,
            BarWidth::Bits64 => 1 << 63,
        };
        if !size.is_power_of_two() || !(4096..=most).contains(&size) {
            return Err(ConfigError::BarSize { index, size });
        }
        let taken = |spec: &BarSpec| {
            spec.registers()
                .any(|r| r == index || (width.registers() == 2 && r == index + 1))
        };
        if usize::from(index) + usize::from(width.registers()) > BARS || self.bars.iter().any(taken) {
            return Err(ConfigError::BarIndex { index });
        }
        let mask = (!(size - 1)).to_le_bytes();
        let at = offset::BARS + 4 * u16::from(index);
        match width {
            BarWidth::Bits32 => self.allow(at, &mask[..4]),
            BarWidth::Bits64 => {
                self.allow(at, &mask);
                // Memory, 64 bits (PCI 6.2.5.1).
                self.set(at, &[0b100]);
            }
        }
        self.bars.push(BarSpec { index, width, size });
        Ok(())
    }

    /// Puts BAR `index` at `address`, as firmware would; bits below its size are lost.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        if let Some(spec) = self.bars.iter().find(|spec| spec.index == index).copied() {
            self.write(
                spec.offset(),
                &address.to_le_bytes()[..usize::from(spec.width.registers()) * 4],
            );
        }
    }

    /// Lets the function's memory be reached, as firmware would.
    pub fn enable_memory(&mut self) {
        let command = self.command() | command::MEMORY;
        self.set(offset::COMMAND, &command.to_le_bytes());
    }

    /// Adds a capability: its body after the id and the link, and which bits of it a guest can write. Returns its offset.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Capability`]: no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        let at = self.free;
        let end = usize::from(at) + 2 + body.len();
        if end > USED || writable.len() > body.len() {
            return Err(ConfigError::Capability {
                id,
                len: body.len() + 2,
            });
        }
        // Below 256, as `end` is.
        self.set(self.link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let status = self.half(offset::STATUS) | STATUS_CAPABILITIES;
        self.set(offset::STATUS, &status.to_le_bytes());
        self.link = at + 1;
        self.free = (end as u16).next_multiple_of(4);
        Ok(at)
    }

    /// Fills `data` with the bytes from `offset` on; what has no byte reads as 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let from = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = from.get(n).copied().unwrap_or(0);
        }
    }

    /// Takes a guest's write of `data` from `offset` on; what it cannot write keeps its value.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset).min(USED);
        let places = self.bytes[at..].iter_mut().zip(&self.writable[at..]);
        for ((byte, mask), new) in places.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Sets bytes, whether a guest can write them or not.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset.into()).zip(data) {
            *byte = *new;
        }
    }

    /// The two bytes at `offset` as a little-endian number.
    pub fn half(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The four bytes at `offset` as a little-endian number.
    pub fn word(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Whether the guest let the function use its interrupt pin.
    pub fn pin_enabled(&self) -> bool {
        self.command() & command::INTERRUPT_DISABLE == 0
    }

    /// Whether the guest lets the function reach memory by itself, which messages are, too (PCI 6.2.2).
    pub fn bus_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0
    }

    /// Shows in the status register whether the function has an interrupt to tell by its pin.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let low = self.half(offset::STATUS) as u8;
        let bit = if pending { STATUS_INTERRUPT } else { 0 };
        self.set(offset::STATUS, &[low & !STATUS_INTERRUPT | bit]);
    }

    /// Each BAR's index, size in bytes, and the address at which the guest wants it, if it lets memory be reached at all.
    pub fn bars(&self) -> impl Iterator<Item = (u8, u64, Option<u64>)> + '_ {
        let enabled = self.command() & command::MEMORY != 0;
        self.bars.iter().map(move |spec| {
            let low = u64::from(self.word(spec.offset()) & !0xf);
            let address = match spec.width {
                BarWidth::Bits32 => low,
                BarWidth::Bits64 => low | u64::from(self.word(spec.offset() + 4)) << 32,
            };
            (spec.index, spec.size, enabled.then_some(address))
        })
    }

    /// Whether a write of `len` bytes at `offset` can move a BAR, or switch the BARs on and off.
    pub fn can_move_bars(offset: u16, len: usize) -> bool {
        let end = usize::from(offset).saturating_add(len);
        let meets = |from: u16, to: u16| offset < to && end > usize::from(from);
        meets(offset::COMMAND, offset::STATUS) || meets(offset::BARS, offset::BARS_END)
    }

    fn command(&self) -> u16 {
        self.half(offset::COMMAND)
    }

    fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (byte, new) in self.writable.iter_mut().skip(offset.into()).zip(mask) {
            *byte = *new;
        }
    }
}

impl BarWidth {
    fn registers(self) -> u8 {
        match self {
            Self::Bits32 => 1,
            Self::Bits64 => 2,
        }
    }
}

impl BarSpec {
    fn registers(&self) -> std::ops::Range<u8> {
        self.index..self.index + self.width.registers()
    }

    fn offset(&self) -> u16 {
        offset::BARS + 4 * u16::from(self.index)
    }
}

#[cfg(test)]
mod tests;
