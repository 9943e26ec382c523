//! Serial port, IOAPIC, CMOS clock and generic event device of the test machine.

use std::collections::VecDeque;

use kvm_bindings::kvm_msi;

const SERIAL_PIN: usize = 4;
const GED_PIN: usize = 9;
/// 2024-02-29 12:34:56, binary, 24 hours; register B says so.
const CMOS: [u8; 14] = [56, 0, 34, 0, 12, 0, 5, 29, 2, 24, 0x26, 0x06, 0, 0x80];

/// State of the devices; methods that raise an interrupt return the message to send.
pub(super) struct Devices {
    serial: bool,
    received: VecDeque<u8>,
    interrupt_enable: u8,
    line_control: u8,
    scratch: u8,
    ioapic_index: u32,
    redirection: [u64; 24],
    cmos_index: u8,
    events: u32,
}

impl Devices {
    /// All devices, the serial port only if `serial`.
    pub(super) fn new(serial: bool) -> Self {
        Self {
            serial,
            received: VecDeque::new(),
            interrupt_enable: 0,
            line_control: 0,
            scratch: 0,
            ioapic_index: 0,
            redirection: [1 << 16; 24],
            cmos_index: 0,
            events: 0,
        }
    }

    pub(super) fn divisor_latch(&self) -> bool {
        self.line_control & 0x80 != 0
    }

    /// The serial port's line is high while it holds a byte, so only the first one makes an edge.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Option<kvm_msi> {
        let edge = self.received.is_empty() && !bytes.is_empty();
        self.received.extend(bytes);
        if edge && self.interrupt_enable & 1 != 0 {
            self.edge(SERIAL_PIN)
        } else {
            None
        }
    }

    pub(super) fn press_power_button(&mut self) -> Option<kvm_msi> {
        self.events |= 1;
        self.edge(GED_PIN)
    }

    pub(super) fn write_port(&mut self, port: u16, data: &[u8]) -> Option<kvm_msi> {
        match port {
            0x3f9 if !self.divisor_latch() => {
                let edge = self.interrupt_enable & 1 == 0 && data[0] & 1 != 0 && !self.received.is_empty();
                self.interrupt_enable = data[0] & 0xf;
                return if edge { self.edge(SERIAL_PIN) } else { None };
            }
            0x3fb => self.line_control = data[0],
            0x3ff => self.scratch = data[0],
            0x70 => self.cmos_index = data[0] & 0x7f,
            _ => {}
        }
        None
    }

    pub(super) fn read_port(&mut self, port: u16, data: &mut [u8]) {
        let value = match port {
            0x3f8..=0x3ff if !self.serial => 0xff,
            0x3f8 => self.received.pop_front().unwrap_or(0),
            0x3f9 => self.interrupt_enable,
            0x3fb => self.line_control,
            0x3fd => 0x60 | u8::from(!self.received.is_empty()),
            0x3ff => self.scratch,
            0x71 if self.cmos_index == 0x32 => 20,
            0x71 => CMOS.get(usize::from(self.cmos_index)).copied().unwrap_or(0),
            0x604 => {
                data.fill(0);
                data.copy_from_slice(&self.events.to_le_bytes()[..data.len()]);
                self.events = 0;
                return;
            }
            _ => 0xff,
        };
        data.fill(value);
    }

    pub(super) fn write_mmio(&mut self, address: u64, data: &[u8]) -> Option<kvm_msi> {
        let value = u64::from(u32::from_le_bytes(data.try_into().ok()?));
        match address {
            0xfec0_0000 => self.ioapic_index = value as u32 & 0xff,
            0xfec0_0010 => {
                let pin = (self.ioapic_index.checked_sub(0x10)? / 2) as usize;
                let entry = self.redirection.get_mut(pin)?;
                *entry = match self.ioapic_index & 1 {
                    0 => *entry & !0xffff_ffff | value,
                    _ => *entry & 0xffff_ffff | value << 32,
                };
            }
            _ => {}
        }
        None
    }

    pub(super) fn read_mmio(&mut self, address: u64, data: &mut [u8]) {
        let value: u32 = match (address, self.ioapic_index) {
            (0xfec0_0000, index) => index,
            (0xfec0_0010, 1) => 0x0017_0011,
            _ => u32::MAX,
        };
        let length = data.len().min(4);
        data[..length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    fn edge(&self, pin: usize) -> Option<kvm_msi> {
        let entry = self.redirection[pin];
        (entry >> 16 & 1 == 0).then(|| kvm_msi {
            address_lo: 0xfee0_0000 | (entry >> 56 << 12) as u32,
            data: (entry & 0x7ff) as u32,
            ..Default::default()
        })
    }
}
