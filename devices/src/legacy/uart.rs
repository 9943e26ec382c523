//! Register model of a 16550A (National Semiconductor PC16550D datasheet): pure state, no I/O, no locks.
//!
//! [`serial`](super::serial) drives it from both sides: the guest's accesses, and bytes from the host.
//!
//! ```text
//!   guest write THR --> returned to the caller (or, in loopback, into the receive FIFO)
//!   host byte --------> receive FIFO (16 bytes, 1 with FIFOs off) --> guest read RBR
//!
//!   sources:  receive data / timeout  > transmitter empty > modem status       IIR shows the highest that is enabled
//!   interrupt line = any enabled source pending (a level; the caller moves the wire)
//! ```
//!
//! The transmitter takes a byte in no time, so THR is always empty. Its interrupt is an event nevertheless: pending when THR has
//! been written or its enable bit gone from 0 to 1, until IIR shows it.
//!
//! Why not vm-superio's model: it clears the receive interrupt with the first byte read, although more bytes wait (a driver that reads one
//! byte per interrupt stalls then); it ignores FCR, so a driver cannot empty the FIFO or turn it off; and it triggers an edge for each
//! cause, where this project's wires carry levels.

use std::collections::VecDeque;

/// Bytes of the receive FIFO.
pub(crate) const FIFO: usize = 16;

/// Register offsets. Some are shared: by direction, or by the divisor latch bit of LCR.
pub(crate) mod offset {
    /// Receive buffer, transmit holding, divisor low.
    pub(crate) const DATA: u8 = 0;
    /// Interrupt enable, divisor high.
    pub(crate) const IER: u8 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub(crate) const IIR_FCR: u8 = 2;
    pub(crate) const LCR: u8 = 3;
    pub(crate) const MCR: u8 = 4;
    pub(crate) const LSR: u8 = 5;
    pub(crate) const MSR: u8 = 6;
    pub(crate) const SCRATCH: u8 = 7;
}

const IER_RECEIVE: u8 = 1 << 0;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_MODEM: u8 = 1 << 3;
const IER_MASK: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMIT: u8 = 0x02;
const IIR_RECEIVE: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS_ON: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;

const LCR_DIVISOR_LATCH: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;

/// Lines of the modem, in MSR's high half: the host end is always ready.
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;
/// The ring indicator's change bit, which only its fall sets.
const MSR_TRAILING_EDGE_RI: u8 = 1 << 2;

/// The registers (see the module's head).
#[derive(Debug)]
pub(crate) struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    /// Change bits of MSR (its low half), cleared by reading it.
    modem_changes: u8,
    overrun: bool,
    transmit_pending: bool,
    received: VecDeque<u8>,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            // 9600 baud, as firmware leaves it.
            divisor: [12, 0],
            modem_changes: 0,
            overrun: false,
            transmit_pending: false,
            received: VecDeque::with_capacity(FIFO),
        }
    }
}

impl Uart {
    /// The level of the interrupt line.
    pub(crate) fn interrupt(&self) -> bool {
        self.identification() != IIR_NONE
    }

    /// How many bytes from the host the receive FIFO takes now. None in loopback: the receiver is cut off from the line. And none before a driver
    /// has raised one of the outputs that say that it is there, as with hardware flow control: it empties the FIFO while it sets the port up,
    /// and what was typed until then would be lost.
    pub(crate) fn room(&self) -> usize {
        if self.looped() || self.mcr & (MCR_DTR | MCR_RTS | MCR_OUT2) == 0 {
            0
        } else {
            self.fifo_len().saturating_sub(self.received.len())
        }
    }

    /// A byte from the host; must fit ([`room`](Self::room)).
    pub(crate) fn receive(&mut self, byte: u8) {
        if self.received.len() < self.fifo_len() {
            self.received.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    /// The guest reads a register.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        match offset {
            offset::DATA | offset::IER if self.divisor_latch() => self.divisor[usize::from(offset)],
            offset::DATA => self.received.pop_front().unwrap_or(0),
            offset::IER => self.ier,
            offset::IIR_FCR => {
                let id = self.identification();
                if id == IIR_TRANSMIT {
                    self.transmit_pending = false;
                }
                id | if self.fifos_on() { IIR_FIFOS_ON } else { 0 }
            }
            offset::LCR => self.lcr,
            offset::MCR => self.mcr,
            offset::LSR => {
                let ready = if self.received.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut self.overrun) {
                    LSR_OVERRUN
                } else {
                    0
                };
                LSR_TRANSMITTER_EMPTY | ready | overrun
            }
            offset::MSR => self.modem_lines() | std::mem::take(&mut self.modem_changes),
            offset::SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    /// The guest writes a register. A byte that it transmits is the result.
    pub(crate) fn write(&mut self, offset: u8, value: u8) -> Option<u8> {
        match offset {
            offset::DATA | offset::IER if self.divisor_latch() => self.divisor[usize::from(offset)] = value,
            offset::DATA => {
                self.transmit_pending = true;
                if !self.looped() {
                    return Some(value);
                }
                self.receive(value);
            }
            offset::IER => {
                self.transmit_pending |= value & !self.ier & IER_TRANSMIT != 0;
                self.ier = value & IER_MASK;
            }
            offset::IIR_FCR => {
                // Turning the FIFOs on or off empties them (datasheet, "FIFO Control Register", bit 0). Without that bit the others are
                // not programmed.
                if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_ENABLE != 0 && value & FCR_CLEAR_RECEIVE != 0 {
                    self.received.clear();
                }
                self.fcr = if value & FCR_ENABLE != 0 { value } else { 0 };
            }
            offset::LCR => self.lcr = value,
            offset::MCR => {
                let before = self.modem_lines();
                self.mcr = value & MCR_MASK;
                let after = self.modem_lines();
                let changed = (before ^ after) >> 4;
                // The ring indicator counts only when it falls.
                self.modem_changes |= changed & !MSR_TRAILING_EDGE_RI | (before & !after) >> 4 & MSR_TRAILING_EDGE_RI;
            }
            offset::SCRATCH => self.scratch = value,
            // LSR and MSR: factory test only.
            _ => {}
        }
        None
    }

    /// IIR without the FIFO bits: the enabled source with the highest priority. A line error has the receive interrupt's own bytes to
    /// show it, so the line status source is not raised.
    fn identification(&self) -> u8 {
        if self.ier & IER_RECEIVE != 0 && !self.received.is_empty() {
            // Below the trigger level a real chip waits four characters' time for more; the host's bytes come in bursts, so that time is
            // over as soon as they are here.
            return if self.received.len() >= self.trigger() {
                IIR_RECEIVE
            } else {
                IIR_TIMEOUT
            };
        }
        if self.ier & IER_TRANSMIT != 0 && self.transmit_pending {
            return IIR_TRANSMIT;
        }
        if self.ier & IER_MODEM != 0 && self.modem_changes != 0 {
            return IIR_MODEM;
        }
        IIR_NONE
    }

    /// MSR's high half. In loopback the outputs lead to the inputs.
    fn modem_lines(&self) -> u8 {
        if !self.looped() {
            return MSR_CONNECTED;
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |lines, (_, input)| lines | input)
    }

    fn divisor_latch(&self) -> bool {
        self.lcr & LCR_DIVISOR_LATCH != 0
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn fifos_on(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn fifo_len(&self) -> usize {
        if self.fifos_on() { FIFO } else { 1 }
    }

    /// Bytes that make a full receive interrupt.
    fn trigger(&self) -> usize {
        if self.fifos_on() {
            [1, 4, 8, 14][usize::from(self.fcr >> 6)]
        } else {
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_driver_finds_a_16550a() {
        let mut uart = Uart::default();
        // The way of Linux's autoconfiguration: scratch, FIFO bits in IIR, loopback of the modem lines.
        uart.write(offset::SCRATCH, 0xa5);
        assert_eq!(uart.read(offset::SCRATCH), 0xa5);
        uart.write(offset::IER, 0xff);
        assert_eq!(uart.read(offset::IER), 0x0f);
        uart.write(offset::IER, 0);
        assert_eq!(uart.read(offset::IIR_FCR), IIR_NONE);
        uart.write(offset::IIR_FCR, FCR_ENABLE);
        assert_eq!(uart.read(offset::IIR_FCR), IIR_FIFOS_ON | IIR_NONE);
        uart.write(offset::MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);
        assert_eq!(uart.read(offset::MSR) & 0xf0, MSR_CTS | MSR_DCD);
        uart.write(offset::MCR, 0);
        assert_eq!(uart.read(offset::MSR) & 0xf0, MSR_CONNECTED);
        uart.write(offset::LCR, LCR_DIVISOR_LATCH);
        uart.write(offset::DATA, 1);
        assert_eq!((uart.read(offset::DATA), uart.read(offset::IER)), (1, 0));
        uart.write(offset::LCR, 3);
        assert_eq!(uart.read(offset::DATA), 0, "an empty receive buffer");
        assert_eq!(uart.read(offset::LSR), LSR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn the_receive_interrupt_lasts_until_the_last_byte_is_read() {
        let mut uart = Uart::default();
        uart.write(offset::IIR_FCR, FCR_ENABLE | 0x80);
        uart.write(offset::IER, IER_RECEIVE);
        (0..9).for_each(|byte| uart.receive(byte));
        assert_eq!(uart.read(offset::IIR_FCR) & 0x0f, IIR_RECEIVE);
        assert_eq!(uart.read(offset::DATA), 0);
        assert_eq!(uart.read(offset::DATA), 1);
        assert_eq!(
            uart.read(offset::IIR_FCR) & 0x0f,
            IIR_TIMEOUT,
            "below the trigger level"
        );
        for byte in 2..9 {
            assert!(uart.interrupt());
            assert_eq!(uart.read(offset::LSR) & LSR_DATA_READY, LSR_DATA_READY);
            assert_eq!(uart.read(offset::DATA), byte);
        }
        assert!(!uart.interrupt());
        assert_eq!(uart.read(offset::LSR) & LSR_DATA_READY, 0);
    }

    #[test]
    fn the_transmit_interrupt_comes_with_its_enable_bit_and_each_write() {
        let mut uart = Uart::default();
        uart.write(offset::IER, IER_TRANSMIT);
        assert!(uart.interrupt());
        assert_eq!(uart.read(offset::IIR_FCR), IIR_TRANSMIT);
        assert!(!uart.interrupt(), "read from IIR");
        uart.write(offset::IER, IER_TRANSMIT);
        assert!(!uart.interrupt(), "was enabled already");
        assert_eq!(uart.write(offset::DATA, b'x'), Some(b'x'));
        assert!(uart.interrupt());
        uart.write(offset::IER, 0);
        assert!(!uart.interrupt());
    }

    #[test]
    fn reading_iir_for_another_source_keeps_the_transmit_interrupt() {
        let mut uart = Uart::default();
        uart.write(offset::IER, IER_RECEIVE | IER_TRANSMIT);
        uart.receive(b'a');
        assert_eq!(uart.read(offset::IIR_FCR), IIR_RECEIVE);
        uart.read(offset::DATA);
        assert_eq!(uart.read(offset::IIR_FCR), IIR_TRANSMIT);
        assert_eq!(uart.read(offset::IIR_FCR), IIR_NONE);
    }

    #[test]
    fn loopback_returns_what_is_sent_and_shuts_the_host_out() {
        let mut uart = Uart::default();
        uart.write(offset::MCR, MCR_LOOP);
        assert_eq!(uart.room(), 0);
        assert_eq!(uart.write(offset::DATA, 7), None);
        assert_eq!(uart.write(offset::DATA, 8), None);
        assert_eq!(
            uart.read(offset::LSR) & 3,
            LSR_DATA_READY | LSR_OVERRUN,
            "no FIFO: the second byte is lost"
        );
        assert_eq!(uart.read(offset::LSR) & 3, LSR_DATA_READY);
        assert_eq!(uart.read(offset::DATA), 7);
        uart.write(offset::MCR, MCR_RTS);
        assert_eq!(uart.room(), 1);
    }

    #[test]
    fn the_host_is_held_back_until_a_driver_is_there() {
        let mut uart = Uart::default();
        assert_eq!(uart.room(), 0);
        uart.write(offset::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE);
        uart.write(offset::IER, IER_RECEIVE);
        assert_eq!(uart.room(), 0);
        for output in [MCR_DTR, MCR_RTS, MCR_OUT2] {
            uart.write(offset::MCR, output);
            assert_eq!(uart.room(), FIFO);
        }
        uart.write(offset::MCR, MCR_OUT1);
        assert_eq!(uart.room(), 0);
    }

    #[test]
    fn modem_status_changes_raise_and_clear() {
        let mut uart = Uart::default();
        uart.write(offset::IER, IER_MODEM);
        uart.write(offset::MCR, MCR_LOOP | MCR_OUT1);
        assert!(uart.interrupt());
        assert_eq!(uart.read(offset::IIR_FCR), IIR_MODEM);
        assert_eq!(uart.read(offset::MSR), MSR_RI | 0x0b, "RI rose, which does not count");
        assert!(!uart.interrupt());
        uart.write(offset::MCR, MCR_LOOP);
        assert_eq!(uart.read(offset::MSR), MSR_TRAILING_EDGE_RI);
    }

    #[test]
    fn the_fifo_is_emptied_by_its_clear_bit_and_by_switching() {
        let mut uart = Uart::default();
        uart.write(offset::MCR, MCR_RTS);
        uart.receive(1);
        assert_eq!(uart.room(), 0);
        uart.write(offset::IIR_FCR, FCR_ENABLE);
        assert_eq!(uart.room(), FIFO);
        uart.receive(1);
        uart.write(offset::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE);
        assert_eq!(uart.room(), FIFO);
        uart.receive(1);
        uart.write(offset::IIR_FCR, 0);
        assert_eq!(uart.read(offset::LSR) & LSR_DATA_READY, 0);
    }

    proptest! {
        /// Random accesses never panic, the FIFO stays in its bounds, and the line agrees with IIR.
        #[test]
        fn registers_survive_anything(ops in prop::collection::vec((0u8..3, 0u8..=8, any::<u8>()), 1..300)) {
            let mut uart = Uart::default();
            for (kind, offset, value) in ops {
                match kind {
                    0 => { uart.read(offset); }
                    1 => { uart.write(offset, value); }
                    _ => uart.receive(value),
                }
                prop_assert!(uart.received.len() <= FIFO);
                prop_assert!(uart.room() <= FIFO - uart.received.len());
                let level = uart.interrupt();
                prop_assert_eq!(level, uart.read(offset::IIR_FCR) & 1 == 0);
            }
        }
    }
}
