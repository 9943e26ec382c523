//! I/O APIC: turns wires into interrupt messages (Intel 82093AA datasheet; EOI register and version 0x20 as in later I/O APICs).
//!
//! The local APICs are the hypervisor's ("split irqchip"), so this device needs two ways to it: [`MsiSink`] sends a message, and the
//! hypervisor tells the end of a level-triggered interrupt, which the machine brings to [`IoApic::eoi`].
//!
//! Per pin:
//!
//! ```text
//!   edge:   line rises, not masked ----------------------------------> message      (masked: the edge is lost, datasheet 3.2.4)
//!
//!   level:            asserted, not masked                 eoi(vector), EOI register,
//!             idle -------------------------> remote IRR   or entry made edge-triggered
//!              ^      message                     |
//!              |                                  |
//!              '---- line released ----- idle? <--'---> still asserted and not masked: message again
//! ```
//!
//! Why version 0x20 and not the 82093AA's 0x11: with a split irqchip KVM offers a guest local APICs that can suppress EOI broadcasts. A
//! guest that uses this ends a level-triggered interrupt by writing the I/O APIC's EOI register, which exists from version 0x20 on. Guests
//! that do not use it lose nothing.
//!
//! KVM exits for the EOI of a vector only if its routing table has, for a pin below the number reserved for the I/O APIC, a
//! level-triggered message with that vector and destination. So the machine keeps one route for each pin for which
//! [`RedirectionEntry::eoi_route`] gives a message, told by [`RouteListener`] when it has to look again. A masked pin keeps its route: a
//! driver that masks, then ends the interrupt, is normal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::bus::BusDevice;
use crate::interrupt::{InterruptLine, Msi, MsiSink, lock};

/// Number of pins (82093AA: INTIN0 to INTIN23).
pub const PINS: usize = 24;

/// Bytes of memory space that the device answers: one page, of which three registers exist.
pub const MMIO_LEN: u64 = 0x1000;

/// Offsets in the page (datasheet 3.1; EOI: ICH family datasheets).
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

/// Register indices (datasheet 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION: u8 = 0x10;

/// Version 0x20 with the highest redirection entry in bits 16-23.
const VERSION_VALUE: u32 = 0x20 | ((PINS as u32 - 1) << 16);

/// Bits of [`ID`] that hold something.
const ID_MASK: u32 = 0x0f00_0000;

/// A pin's redirection table entry, in the layout of the register (datasheet 3.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedirectionEntry(u64);

impl RedirectionEntry {
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    /// What a guest can write: all but delivery status, remote IRR and the reserved bits.
    const WRITABLE: u64 = 0xff00_0000_0001_afff;

    /// The entry after power-on: masked, everything else 0.
    pub const RESET: Self = Self(Self::MASKED);

    /// Lowest priority among the destinations.
    const LOWEST_PRIORITY: u32 = 1;

    /// The 64 bits of the register.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Interrupt vector.
    pub fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Delivery mode, 0-7: fixed, lowest priority, SMI, reserved, NMI, INIT, reserved, ExtINT.
    pub fn delivery_mode(self) -> u32 {
        (self.0 >> 8) as u32 & 7
    }

    /// Whether the destination is a set in logical mode, not one physical APIC id.
    pub fn logical(self) -> bool {
        self.0 & 1 << 11 != 0
    }

    /// Destination: an APIC id or a logical set.
    pub fn destination(self) -> u8 {
        (self.0 >> 56) as u8
    }

    /// Whether the interrupt is masked.
    pub fn masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    /// Whether a level-triggered interrupt was delivered and its EOI has not come yet.
    pub fn remote_irr(self) -> bool {
        self.0 & Self::REMOTE_IRR != 0
    }

    /// Whether the pin works level-triggered: the trigger bit counts only in the delivery modes fixed and lowest priority, all others are
    /// edges whatever it says (datasheet 3.2.4, "Delivery Mode").
    pub fn level_triggered(self) -> bool {
        self.0 & Self::LEVEL != 0 && self.delivery_mode() <= Self::LOWEST_PRIORITY
    }

    /// The message that delivers this interrupt; `None` for the reserved delivery modes.
    ///
    /// The redirection hint asks for one of several destinations, so it is set for lowest priority in logical mode only: in physical mode
    /// it would forbid the destination 0xff (Intel SDM volume 3, "Message Address Register Format").
    pub fn msi(self) -> Option<Msi> {
        let mode = self.delivery_mode();
        if matches!(mode, 3 | 6) {
            return None;
        }
        let hint = self.logical() && mode == Self::LOWEST_PRIORITY;
        let address =
            0xfee0_0000 | u64::from(self.destination()) << 12 | u64::from(hint) << 3 | u64::from(self.logical()) << 2;
        // Level bit: always "assert"; "deassert" means nothing to local APICs.
        let data = u32::from(self.vector()) | mode << 8 | 1 << 14 | u32::from(self.level_triggered()) << 15;
        Some(Msi { address, data })
    }

    /// The message whose EOI has to come back to [`IoApic::eoi`]: that of every level-triggered pin, masked or not.
    pub fn eoi_route(self) -> Option<Msi> {
        if self.level_triggered() { self.msi() } else { None }
    }
}

/// Learns that a pin's [`RedirectionEntry::eoi_route`] changed.
pub trait RouteListener: Send + Sync {
    /// Called on the thread of the vCPU that wrote the entry, before its write ends. Two vCPUs can be here at once, so the listener reads
    /// the newest entry with [`IoApic::redirection`] under a lock of its own instead of being told it.
    fn route_changed(&self, pin: usize);
}

/// One pin: its table entry and its wire.
#[derive(Clone, Copy)]
struct Pin {
    entry: RedirectionEntry,
    /// How many of the lines connected to the pin are asserted.
    asserted: u32,
}

impl Pin {
    /// The message to send if the pin, being level-triggered, has an interrupt to deliver now.
    fn service_level(&mut self) -> Option<Msi> {
        let entry = self.entry;
        if self.asserted == 0 || !entry.level_triggered() || entry.masked() || entry.remote_irr() {
            return None;
        }
        self.entry.0 |= RedirectionEntry::REMOTE_IRR;
        entry.msi()
    }

    /// One line was asserted.
    fn assert(&mut self) -> Option<Msi> {
        self.asserted += 1;
        if self.entry.level_triggered() {
            return self.service_level();
        }
        if self.asserted > 1 || self.entry.masked() {
            None
        } else {
            self.entry.msi()
        }
    }

    /// One line was released.
    fn release(&mut self) {
        self.asserted = self.asserted.saturating_sub(1);
    }

    /// The interrupt with `vector` ended.
    fn end(&mut self, vector: u8) -> Option<Msi> {
        if !self.entry.remote_irr() || self.entry.vector() != vector {
            return None;
        }
        self.entry.0 &= !RedirectionEntry::REMOTE_IRR;
        self.service_level()
    }

    /// The guest wrote half of the entry.
    fn write(&mut self, high: bool, value: u32) -> Option<Msi> {
        let shift = if high { 32 } else { 0 };
        let writable = RedirectionEntry::WRITABLE & (0xffff_ffff << shift);
        self.entry.0 = self.entry.0 & !writable | u64::from(value) << shift & writable;
        if !self.entry.level_triggered() {
            // How software without the EOI register ends an interrupt: level to edge and back.
            self.entry.0 &= !RedirectionEntry::REMOTE_IRR;
        }
        self.service_level()
    }
}

/// The registers.
struct State {
    index: u8,
    id: u32,
    pins: [Pin; PINS],
}

impl State {
    fn read_window(&self) -> u32 {
        match self.index {
            // The arbitration id follows the id (datasheet 3.2.3).
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            index => match self.pin_of(index) {
                Some((pin, high)) => (self.pins[pin].entry.0 >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    /// Which pin's entry a register index is half of, and whether it is the high half.
    fn pin_of(&self, index: u8) -> Option<(usize, bool)> {
        let entry = usize::from(index.checked_sub(REDIRECTION)?);
        (entry / 2 < PINS).then_some((entry / 2, entry % 2 == 1))
    }
}

/// The I/O APIC (see the module's head).
pub struct IoApic {
    state: Mutex<State>,
    sink: Arc<dyn MsiSink>,
    listener: OnceLock<Arc<dyn RouteListener>>,
}

impl IoApic {
    /// An I/O APIC as after power-on (all pins masked) that sends its messages to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>) -> Arc<Self> {
        let pins = [Pin {
            entry: RedirectionEntry::RESET,
            asserted: 0,
        }; PINS];
        Arc::new(Self {
            state: Mutex::new(State { index: 0, id: 0, pins }),
            sink,
            listener: OnceLock::new(),
        })
    }

    /// A new line to `pin`. Several lines on one pin are ORed; dropping a line releases it. A line to a pin that does not exist leads
    /// nowhere (and is logged).
    pub fn line(self: &Arc<Self>, pin: usize) -> Arc<dyn InterruptLine> {
        if pin >= PINS {
            tracing::error!(pin, "interrupt line to an I/O APIC pin that does not exist");
        }
        Arc::new(Line {
            ioapic: Arc::clone(self),
            pin,
            asserted: AtomicBool::new(false),
        })
    }

    /// Who learns that the EOI route of a pin changed. Only the first call counts: the machine has one routing table.
    pub fn set_route_listener(&self, listener: Arc<dyn RouteListener>) {
        if self.listener.set(listener).is_err() {
            tracing::error!("the I/O APIC has a route listener already");
        }
    }

    /// The redirection table entry of `pin`, as it is now; that of a pin that does not exist is [`RedirectionEntry::RESET`].
    pub fn redirection(&self, pin: usize) -> RedirectionEntry {
        lock(&self.state)
            .pins
            .get(pin)
            .map_or(RedirectionEntry::RESET, |pin| pin.entry)
    }

    /// The hypervisor saw the EOI of a level-triggered interrupt with `vector` (`KVM_EXIT_IOAPIC_EOI`).
    pub fn eoi(&self, vector: u8) {
        let mut again = [None; PINS];
        for (pin, msi) in lock(&self.state).pins.iter_mut().zip(&mut again) {
            *msi = pin.end(vector);
        }
        for msi in again.into_iter().flatten() {
            self.sink.signal(msi);
        }
    }

    /// Changes a pin under the lock, and sends what comes of it after releasing the lock: sending is a system call.
    fn with_pin(&self, pin: usize, change: impl FnOnce(&mut Pin) -> Option<Msi>) {
        let msi = lock(&self.state).pins.get_mut(pin).and_then(change);
        if let Some(msi) = msi {
            self.sink.signal(msi);
        }
    }

    fn write_window(&self, value: u32) {
        let mut state = lock(&self.state);
        let index = state.index;
        let Some((pin, high)) = state.pin_of(index) else {
            if index == ID {
                state.id = value & ID_MASK;
            }
            return;
        };
        let before = state.pins[pin].entry.eoi_route();
        let msi = state.pins[pin].write(high, value);
        let changed = before != state.pins[pin].entry.eoi_route();
        drop(state);
        // The route first: the EOI of the message may come at once.
        if changed && let Some(listener) = self.listener.get() {
            listener.route_changed(pin);
        }
        if let Some(msi) = msi {
            self.sink.signal(msi);
        }
    }
}

impl BusDevice for IoApic {
    /// Registers are 32 bits wide; narrower reads get the bytes asked for, everything outside of a register is 0.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let register = offset & !3;
        let value = match register {
            IOREGSEL => u32::from(lock(&self.state).index),
            IOWIN => lock(&self.state).read_window(),
            _ => 0,
        };
        data.fill(0);
        let from = (offset - register) as usize;
        for (to, byte) in data.iter_mut().zip(&value.to_le_bytes()[from..]) {
            *to = *byte;
        }
    }

    /// The index and EOI registers take their low byte at any width; the window takes whole 32-bit writes only (datasheet 3.0), since half
    /// of an entry makes no sense.
    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (IOREGSEL, [index, ..]) => lock(&self.state).index = *index,
            (EOI, [vector, ..]) => self.eoi(*vector),
            (IOWIN, &[a, b, c, d]) => self.write_window(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

/// A device's line to a pin.
struct Line {
    ioapic: Arc<IoApic>,
    pin: usize,
    /// Changed only under the I/O APIC's lock; atomic because a line is shared.
    asserted: AtomicBool,
}

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        self.ioapic.with_pin(self.pin, |pin| {
            if self.asserted.swap(asserted, Ordering::Relaxed) == asserted {
                return None;
            }
            if asserted {
                return pin.assert();
            }
            pin.release();
            None
        });
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests;
