//! Text output to the serial port, buffered because every byte costs an exit and every call of a service more.

use core::fmt;

use crate::cpu;

/// Collects text; whoever waits or ends flushes first.
pub(crate) struct Console {
    buffer: [u8; 256],
    length: usize,
}

impl Console {
    /// An empty buffer.
    pub(crate) const fn new() -> Self {
        Self {
            buffer: [0; 256],
            length: 0,
        }
    }

    /// Sends what is buffered.
    pub(crate) fn flush(&mut self) {
        cpu::serial_write(self.buffer.get(..self.length).unwrap_or_default());
        self.length = 0;
    }

    fn put(&mut self, byte: u8) {
        if self.length == self.buffer.len() {
            self.flush();
        }
        if let Some(slot) = self.buffer.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }
}

/// "\n" becomes CR LF, as terminals want it. Never fails.
impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}
