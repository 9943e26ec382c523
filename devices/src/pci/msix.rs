//! MSI-X (PCI 6.8.2): a table of messages in the function's memory, masks, pending bits, and the way from there into the guest.
//!
//! ```text
//!                      vCPU: writes the table or the capability        device: trigger(vector)
//!                                     |                                        |
//!   per vector:   open <- enabled, bus master, no mask set -> closed            v
//!                  |  route set before it opens               |        open: the vector's eventfd
//!                  '-- a pending message goes out             '-- message pending
//! ```
//!
//! [`Table`] is pure. [`Msix`] puts effects to it: vCPUs change it one at a time, and a device's thread sees of it one atomic gate a vector, so that
//! an interrupt costs a load and the eventfd's write. A message that was on its way when its vector was masked may still arrive just after, as on
//! a real bus.
//!
//! A way that was lent to another process goes round its gate. So it is held back by the machine while the gate is closed, and what was written to it
//! meanwhile counts as pending; that costs a system call for each mask, which vectors that nobody was lent are spared.
//!
//! A vector gets its way into the guest when it is first opened, since most vectors of most devices never are; and a new message is routed
//! when its vector opens, not when it is written, since a route costs a system call and guests write the three parts of a message one by one.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::config_space::{ConfigError, ConfigSpace};
use super::function::{MsiVector, MsiVectors};
use crate::interrupt::{Msi, lock};

/// Most vectors of a function here (the specification allows 2048); so a table fits into a page.
pub const MAX_VECTORS: u16 = 256;
/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Bytes of a table with [`MAX_VECTORS`].
pub const TABLE_BYTES: u64 = ENTRY_BYTES * MAX_VECTORS as u64;
/// Bytes of a pending bit array with [`MAX_VECTORS`]: whole 64-bit words.
pub const PENDING_BYTES: u64 = MAX_VECTORS as u64 / 8;

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Offset of the message control register in the capability.
const CONTROL: u16 = 2;
/// Bits of message control that a guest can write.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
/// Vector control: masked. The only bit there.
const MASKED: u32 = 1;

/// A table entry, as it lies in memory: address, data, vector control.
#[derive(Clone, Copy, Debug)]
struct Entry {
    words: [u32; 4],
}

impl Entry {
    fn msi(&self) -> Msi {
        let [low, high, data, _] = self.words;
        Msi {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        }
    }
}

/// The registers, without effects.
#[derive(Clone, Debug)]
pub struct Table {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
}

impl Table {
    /// A table of `vectors` entries as after a reset: MSI-X is off, all vectors are masked, and the function is no bus master.
    pub fn new(vectors: u16) -> Self {
        let entry = Entry {
            words: [0, 0, 0, MASKED],
        };
        Self {
            entries: vec![entry; usize::from(vectors.min(MAX_VECTORS))],
            enabled: false,
            function_masked: false,
            bus_master: false,
        }
    }

    /// Fills `data` from the table. Aligned reads of 4 or 8 bytes mean something (PCI 6.8.2); all others read as zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_register(offset, data.len()) {
            return;
        }
        for (n, bytes) in data.chunks_exact_mut(4).enumerate() {
            if let Some(word) = self.word(offset + 4 * n as u64) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Takes a write to the table and returns the vector that it changed; what is not an aligned write of 4 or 8 bytes is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<u16> {
        if !is_register(offset, data.len()) {
            return None;
        }
        let vector = u16::try_from(offset / ENTRY_BYTES).ok()?;
        let entry = self.entries.get_mut(usize::from(vector))?;
        let first = (offset % ENTRY_BYTES / 4) as usize;
        for (n, bytes) in data.chunks_exact(4).enumerate() {
            let (Some(word), &[a, b, c, d]) = (entry.words.get_mut(first + n), bytes) else {
                continue;
            };
            *word = u32::from_le_bytes([a, b, c, d]);
            match first + n {
                // Messages go to aligned addresses.
                0 => *word &= !3,
                3 => *word &= MASKED,
                _ => {}
            }
        }
        Some(vector)
    }

    /// Takes the message control register.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & ENABLE != 0;
        self.function_masked = control & FUNCTION_MASK != 0;
    }

    /// The function may write to memory, which is what sending a message is, or not.
    pub fn set_bus_master(&mut self, bus_master: bool) {
        self.bus_master = bus_master;
    }

    /// The message that `vector` may send now; `None` while it is masked, MSI-X or bus mastering is off, or there is no such vector.
    pub fn open(&self, vector: u16) -> Option<Msi> {
        let entry = self.entries.get(usize::from(vector))?;
        (self.enabled && self.bus_master && !self.function_masked && entry.words[3] & MASKED == 0).then(|| entry.msi())
    }

    fn word(&self, offset: u64) -> Option<u32> {
        let entry = self.entries.get(usize::try_from(offset / ENTRY_BYTES).ok()?)?;
        Some(entry.words[(offset % ENTRY_BYTES / 4) as usize])
    }
}

/// The two kinds of access that PCI defines for the table and the pending bit array.
fn is_register(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

/// Bits of a vector's gate.
const OPEN: u8 = 1;
const PENDING: u8 = 2;

/// A vector as a device's thread sees it.
#[derive(Default)]
struct Gate {
    state: AtomicU8,
    /// There when the gate first opens.
    way: OnceLock<Arc<dyn MsiVector>>,
    /// Somebody else writes to the way's eventfd.
    lent: AtomicBool,
}

impl Gate {
    fn trigger(&self) {
        let mut state = self.state.load(Ordering::SeqCst);
        while state & OPEN == 0 {
            match self
                .state
                .compare_exchange_weak(state, PENDING, Ordering::SeqCst, Ordering::SeqCst)
            {
                Ok(_) => return,
                Err(now) => state = now,
            }
        }
        self.send();
    }

    fn open(&self) {
        if self.state.swap(OPEN, Ordering::SeqCst) & PENDING != 0 {
            self.send();
        }
    }

    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::SeqCst);
    }

    /// Keeps what somebody else wrote while the way was held back: as pending.
    fn keep_held(&self) {
        if self.way.get().is_some_and(|way| way.take_held()) {
            self.state.fetch_or(PENDING, Ordering::SeqCst);
        }
    }

    fn send(&self) {
        if let Some(way) = self.way.get() {
            way.trigger();
        }
    }
}

/// What only vCPUs' threads touch.
struct Control {
    table: Table,
    /// The message that each vector's way was last given.
    routed: Vec<Option<Msi>>,
    /// Whether each vector's way is held back.
    held: Vec<bool>,
}

/// The MSI-X capability of a function (see the module's head).
pub struct Msix {
    /// Held while routes are set: never taken by a device's thread.
    control: Mutex<Control>,
    enabled: AtomicBool,
    gates: Vec<Gate>,
    vectors: Arc<dyn MsiVectors>,
}

impl Msix {
    /// A capability with `vectors` vectors, 1 to [`MAX_VECTORS`].
    pub fn new(vectors: u16, machine: Arc<dyn MsiVectors>) -> Self {
        let count = vectors.clamp(1, MAX_VECTORS);
        Self {
            control: Mutex::new(Control {
                table: Table::new(count),
                routed: vec![None; count.into()],
                held: vec![false; count.into()],
            }),
            enabled: AtomicBool::new(false),
            gates: (0..count).map(|_| Gate::default()).collect(),
            vectors: machine,
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        // At most `MAX_VECTORS`.
        self.gates.len() as u16
    }

    /// Never: there is at least one vector.
    pub fn is_empty(&self) -> bool {
        self.gates.is_empty()
    }

    /// Adds the capability to `space`, with the table at `table` and the pending bits at `pending` in BAR `bar`. Returns its offset.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Capability`]: no room.
    pub fn add_capability(
        &self,
        space: &mut ConfigSpace,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<u16, ConfigError> {
        let mut body = Vec::with_capacity(10);
        body.extend((self.len() - 1).to_le_bytes());
        // Offsets are multiples of 8; the low bits name the BAR.
        body.extend((table & !7 | u32::from(bar)).to_le_bytes());
        body.extend((pending & !7 | u32::from(bar)).to_le_bytes());
        space.add_capability(CAPABILITY, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// The guest wrote configuration space, where the capability is at `capability`: follows the control register and bus mastering.
    pub fn follow_control(&self, space: &ConfigSpace, capability: u16) {
        let value = space.half(capability + CONTROL);
        let mut control = lock(&self.control);
        let Control { table, .. } = &mut *control;
        let seen = |table: &Table| (table.enabled, table.function_masked, table.bus_master);
        let before = seen(table);
        table.set_control(value);
        table.set_bus_master(space.bus_master());
        if before == seen(table) {
            return;
        }
        let enabled = table.enabled;
        if !enabled {
            self.enabled.store(false, Ordering::SeqCst);
        }
        self.update(&mut control, 0..self.len());
        if enabled {
            self.enabled.store(true, Ordering::SeqCst);
        } else {
            // Whatever was pending is told by the pin, or forgotten with the queues.
            for (gate, held) in self.gates.iter().zip(&control.held) {
                if *held {
                    gate.keep_held();
                }
                gate.state.store(0, Ordering::SeqCst);
            }
        }
    }

    /// Whether the guest uses MSI-X and not the pin.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        lock(&self.control).table.read(offset, data);
    }

    /// Writes the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut control = lock(&self.control);
        if let Some(vector) = control.table.write(offset, data) {
            self.update(&mut control, vector..vector + 1);
        }
    }

    /// Reads the pending bit array, which cannot be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_register(offset, data.len()) {
            return;
        }
        let control = lock(&self.control);
        let gates: Vec<_> = self.gates.iter().zip(&control.held).collect();
        for (n, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize + n) * 8;
            for (bit, (gate, held)) in gates.iter().skip(first).take(8).enumerate() {
                if **held {
                    gate.keep_held();
                }
                let pending = gate.state.load(Ordering::SeqCst) & PENDING != 0;
                *byte |= u8::from(pending) << bit;
            }
        }
    }

    /// Sends the message of `vector`, or keeps it pending while it is masked. A vector that does not exist sends nothing.
    pub fn trigger(&self, vector: u16) {
        if let Some(gate) = self.gates.get(usize::from(vector)) {
            gate.trigger();
        }
    }

    /// The way of `vector` into the guest, if it is open: for a device in another process. From then on it is held back while the vector is masked.
    pub fn lend(&self, vector: u16) -> Option<Arc<dyn MsiVector>> {
        let gate = self.gates.get(usize::from(vector))?;
        // First: whoever closes the gate after it was seen open has to see that it is lent.
        let before = gate.lent.swap(true, Ordering::SeqCst);
        if gate.state.load(Ordering::SeqCst) & OPEN == 0 {
            gate.lent.store(before, Ordering::SeqCst);
            return None;
        }
        gate.way.get().cloned()
    }

    /// Nobody else writes to a way any more.
    pub fn take_back(&self) {
        for gate in &self.gates {
            gate.lent.store(false, Ordering::SeqCst);
        }
    }

    /// Opens and closes gates as the table says now; routes come first, all in one go.
    fn update(&self, control: &mut Control, vectors: std::ops::Range<u16>) {
        let mut routes: Vec<(Arc<dyn MsiVector>, Msi)> = Vec::new();
        let mut opening = Vec::new();
        let Control { table, routed, held } = control;
        for vector in vectors {
            let n = usize::from(vector);
            let (Some(gate), Some(routed), Some(held)) = (self.gates.get(n), routed.get_mut(n), held.get_mut(n)) else {
                continue;
            };
            let Some(msi) = table.open(vector) else {
                gate.close();
                if let Some(way) = gate.way.get()
                    && gate.lent.load(Ordering::SeqCst)
                    && !std::mem::replace(held, true)
                {
                    way.hold(true);
                }
                continue;
            };
            if gate.way.get().is_none() {
                match self.vectors.allocate() {
                    // Only here, and under the lock, so it is not set yet.
                    Ok(way) => drop(gate.way.set(way)),
                    Err(error) => tracing::warn!(%error, vector, "no way for a message into the guest: it is dead"),
                }
            }
            let Some(way) = gate.way.get() else { continue };
            if *routed != Some(msi) {
                *routed = Some(msi);
                routes.push((Arc::clone(way), msi));
            }
            opening.push((gate, way, std::mem::take(held)));
        }
        if !routes.is_empty() {
            self.vectors.route(&routes);
        }
        for (gate, way, held) in opening {
            if held {
                gate.keep_held();
                way.hold(false);
            }
            gate.open();
        }
    }
}

#[cfg(test)]
mod tests;
