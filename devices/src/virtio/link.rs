//! What a device's bus side (vCPUs' threads) and its loop share.
//!
//! ```text
//!   vCPU: registers, configuration --> [ state: a short lock ] <-- loop: orders, done, broken, dead
//!                 |                                                       ^
//!                 '--- orders -----> mailbox eventfd ---------------------'
//!   vCPU: doorbell (mostly ioeventfd) -> a queue's eventfd -> loop
//!   loop: interrupt -> MSI-X gate -> the vector's eventfd;   without MSI-X: ISR bit and pin
//! ```
//!
//! Nothing that a vCPU does here waits for the loop: a device that hangs goes on answering its registers.

mod registers;

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(super) use self::registers::{Activation, Orders, QueueOrder};
use self::registers::{COMMON_BYTES, Effect, NO_VECTOR, Registers};
use super::device::{ConfigLayout, Transport, VirtioDevice};
use super::feature;
use crate::interrupt::{InterruptLine, LevelLatch, lock, publish};
use crate::pci::MsiVectors;
use crate::pci::msix::{MAX_VECTORS, Msix};

/// Bits of the ISR status register (virtio 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Registers and configuration, behind one lock.
struct State {
    registers: Registers,
    config: Vec<u8>,
    writable: Vec<Range<usize>>,
    generation: u8,
}

impl State {
    /// Changes the configuration as the device sees fit; whether anything is different. What goes past the end is dropped.
    fn change_config(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let mut changed = false;
        for (place, byte) in self.config.iter_mut().skip(offset).zip(bytes) {
            changed |= *place != *byte;
            *place = *byte;
        }
        if changed {
            self.generation = self.generation.wrapping_add(1);
        }
        changed
    }
}

/// The interrupt pin and its cause.
struct Pin {
    isr: u8,
    /// The guest has not forbidden it in the command register.
    allowed: bool,
    latch: LevelLatch,
}

/// One queue, as the loop sees it without a lock.
struct Shared {
    vector: AtomicU16,
    /// There once the driver has enabled the queue.
    bell: OnceLock<EventFd>,
    /// Another process listens to the bell.
    lent: AtomicBool,
}

/// See the module's head.
pub(super) struct Link {
    state: Mutex<State>,
    queues: Vec<Shared>,
    config_vector: AtomicU16,
    /// A bell was lent since the loop looked.
    lending: AtomicBool,
    mailbox: EventFd,
    msix: Msix,
    pin: Mutex<Pin>,
    line: Arc<dyn InterruptLine>,
}

impl Link {
    /// The link of `device`, which interrupts by `vectors` or, where the guest does not use MSI-X, by `line`.
    ///
    /// # Errors
    ///
    /// The host has no more descriptors.
    pub(super) fn new(
        device: &dyn VirtioDevice,
        vectors: Arc<dyn MsiVectors>,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Self> {
        let sizes: Vec<u16> = device.queue_sizes();
        let ConfigLayout { bytes, writable } = device.config();
        // One a queue and one for the configuration; drivers share them if there are fewer.
        let count = u16::try_from(sizes.len() + 1).unwrap_or(MAX_VECTORS).min(MAX_VECTORS);
        let offered = device.features() | device.transport_features() & feature::TRANSPORT;
        let queue = |_: &u16| Shared {
            vector: AtomicU16::new(NO_VECTOR),
            bell: OnceLock::new(),
            lent: AtomicBool::new(false),
        };
        Ok(Self {
            queues: sizes.iter().map(queue).collect(),
            state: Mutex::new(State {
                registers: Registers::new(offered, &sizes, count),
                config: bytes,
                writable,
                generation: 0,
            }),
            config_vector: AtomicU16::new(NO_VECTOR),
            lending: AtomicBool::new(false),
            mailbox: new_eventfd()?,
            msix: Msix::new(count, vectors),
            pin: Mutex::new(Pin {
                isr: 0,
                allowed: true,
                latch: LevelLatch::default(),
            }),
            line,
        })
    }

    /// The MSI-X capability.
    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Number of queues.
    pub(super) fn queue_count(&self) -> u16 {
        // Queues have u16 indices.
        self.queues.len() as u16
    }

    /// Bytes of device configuration.
    pub(super) fn config_len(&self) -> usize {
        lock(&self.state).config.len()
    }

    // What vCPUs do.

    /// Reads the common configuration structure.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let image: [u8; COMMON_BYTES] = {
            let state = lock(&self.state);
            state.registers.image(state.generation)
        };
        copy_from(&image, offset, data);
    }

    /// Writes the common configuration structure. Returns the queue that was enabled by it, whose bell is there now.
    pub(super) fn write_common(&self, offset: u64, data: &[u8]) -> Option<u16> {
        self.change(|registers| registers.write(offset, data)).enabled
    }

    /// Reads device configuration.
    pub(super) fn read_device_config(&self, offset: u64, data: &mut [u8]) {
        copy_from(&lock(&self.state).config, offset, data);
    }

    /// Writes device configuration, where the driver may.
    pub(super) fn write_device_config(&self, offset: u64, data: &[u8]) {
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut state = lock(&self.state);
        let State { config, writable, .. } = &mut *state;
        let mut taken = false;
        for (at, byte) in (first..).zip(data) {
            if writable.iter().any(|range| range.contains(&at))
                && let Some(place) = config.get_mut(at)
            {
                *place = *byte;
                taken = true;
            }
        }
        drop(state);
        if taken {
            self.change(Registers::config_was_written);
        }
    }

    /// Reads the ISR status register, which clears it.
    pub(super) fn read_isr(&self) -> u8 {
        let mut pin = lock(&self.pin);
        let isr = std::mem::take(&mut pin.isr);
        self.move_pin(pin);
        isr
    }

    /// The guest allowed or forbade the pin, or switched MSI-X on or off.
    pub(super) fn allow_pin(&self, allowed: bool) {
        let mut pin = lock(&self.pin);
        pin.allowed = allowed;
        self.move_pin(pin);
    }

    /// The guest let the function reach memory by itself, or took that away (see [`Registers::set_bus_master`]).
    pub(super) fn set_bus_master(&self, bus_master: bool) {
        self.change(|registers| registers.set_bus_master(bus_master));
    }

    /// Whether the device has something to tell by its pin, allowed or not: the interrupt status of configuration space.
    pub(super) fn pin_pending(&self) -> bool {
        lock(&self.pin).isr != 0 && !self.msix.enabled()
    }

    /// The bell of `queue`, if the queue was ever enabled.
    pub(super) fn bell(&self, queue: u16) -> Option<&EventFd> {
        self.queues.get(usize::from(queue))?.bell.get()
    }

    // What the loop does.

    /// Becomes ready when there are orders.
    pub(super) fn mailbox(&self) -> &EventFd {
        &self.mailbox
    }

    /// Takes the orders.
    pub(super) fn take_orders(&self) -> Orders {
        // Before the orders: whoever writes one after this rings again. An error says that nobody rang.
        let _ = self.mailbox.read();
        lock(&self.state).registers.take_orders()
    }

    /// The device is quiesced, as a reset asked.
    pub(super) fn reset_done(&self) {
        self.change(Registers::reset_done);
    }

    /// A queue is given up, as its reset asked.
    pub(super) fn queue_reset_done(&self, queue: u16) {
        self.change(|registers| registers.queue_reset_done(queue));
    }

    /// The driver broke a rule, and the device is quiesced.
    pub(super) fn broken(&self) {
        self.change(Registers::broken);
    }

    /// The loop is gone for good.
    pub(super) fn dead(&self) {
        self.change(Registers::dead);
    }

    /// Whether somebody else listens to the bell of `queue`.
    pub(super) fn is_lent(&self, queue: u16) -> bool {
        let shared = self.queues.get(usize::from(queue));
        shared.is_some_and(|shared| shared.lent.load(Ordering::SeqCst))
    }

    /// Whether a bell was lent since the last call.
    pub(super) fn lending_changed(&self) -> bool {
        self.lending.swap(false, Ordering::SeqCst)
    }

    /// Nobody else listens to bells any more, nor interrupts.
    pub(super) fn take_back(&self) {
        for shared in &self.queues {
            shared.lent.store(false, Ordering::SeqCst);
        }
        self.msix.take_back();
    }

    // Both.

    /// Changes the registers, and does what follows.
    fn change(&self, change: impl FnOnce(&mut Registers) -> Effect) -> Effect {
        let mut state = lock(&self.state);
        let effect = change(&mut state.registers);
        if effect.vectors {
            // Under the lock, so that the newest is what stays.
            let registers = &state.registers;
            self.config_vector.store(registers.config_vector, Ordering::SeqCst);
            for (shared, queue) in self.queues.iter().zip(&registers.queues) {
                shared.vector.store(queue.vector, Ordering::SeqCst);
            }
        }
        drop(state);
        if let Some(queue) = effect.enabled {
            self.make_bell(queue);
        }
        if effect.ring {
            // Fails only when its counter is full, and then the loop has been told.
            let _ = self.mailbox.write(1);
        }
        if effect.config_interrupt {
            self.interrupt_config();
        }
        if effect.reset {
            self.clear_isr();
        }
        effect
    }

    fn clear_isr(&self) {
        let mut pin = lock(&self.pin);
        pin.isr = 0;
        self.move_pin(pin);
    }

    fn make_bell(&self, queue: u16) {
        let Some(shared) = self.queues.get(usize::from(queue)) else {
            return;
        };
        if shared.bell.get().is_some() {
            return;
        }
        match new_eventfd() {
            // Another vCPU may have been faster; then its bell is as good.
            Ok(bell) => drop(shared.bell.set(bell)),
            Err(error) => tracing::warn!(%error, queue, "no doorbell for a queue: it is dead"),
        }
    }

    fn interrupt_config(&self) {
        if self.msix.enabled() {
            self.msix.trigger(self.config_vector.load(Ordering::SeqCst));
        } else {
            self.raise_pin(ISR_CONFIG);
        }
    }

    fn raise_pin(&self, bit: u8) {
        let mut pin = lock(&self.pin);
        pin.isr |= bit;
        self.move_pin(pin);
    }

    /// Works out the level of the pin, and shows it on the line without holding the lock.
    fn move_pin(&self, mut pin: std::sync::MutexGuard<'_, Pin>) {
        let level = pin.isr != 0 && pin.allowed && !self.msix.enabled();
        let publisher = pin.latch.update(level);
        drop(pin);
        if publisher {
            publish(&self.pin, |pin| &mut pin.latch, &*self.line);
        }
    }
}

impl Transport for Link {
    fn interrupt(&self, queue: u16) {
        let Some(shared) = self.queues.get(usize::from(queue)) else {
            return;
        };
        if self.msix.enabled() {
            self.msix.trigger(shared.vector.load(Ordering::SeqCst));
        } else {
            self.raise_pin(ISR_QUEUE);
        }
    }

    fn update_config(&self, offset: usize, bytes: &[u8]) {
        let tell = {
            let mut state = lock(&self.state);
            state.change_config(offset, bytes) && state.registers.driver_ok()
        };
        if tell {
            self.interrupt_config();
        }
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        lock(&self.state).change_config(offset, bytes);
    }

    fn read_config(&self, offset: usize, bytes: &mut [u8]) {
        copy_from(&lock(&self.state).config, offset as u64, bytes);
    }

    fn ring(&self, queue: u16) {
        if let Some(bell) = self.bell(queue) {
            // Fails only when its counter is full, and then it has rung.
            let _ = bell.write(1);
        }
    }

    fn queue_fds(&self, queue: u16) -> (Option<RawFd>, Option<RawFd>) {
        let Some(shared) = self.queues.get(usize::from(queue)) else {
            return (None, None);
        };
        let bell = shared.bell.get().map(AsRawFd::as_raw_fd);
        shared.lent.store(bell.is_some(), Ordering::SeqCst);
        self.lending.store(true, Ordering::SeqCst);
        // The descriptor stays open with its vector, which stays with this link.
        let way = self.msix.lend(shared.vector.load(Ordering::SeqCst));
        let interrupt = way.and_then(|way| way.event_fd().map(AsRawFd::as_raw_fd));
        (bell, interrupt.filter(|_| self.msix.enabled()))
    }
}

fn new_eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Copies from `bytes` at `offset`; what is beyond their end is 0.
fn copy_from(bytes: &[u8], offset: u64, data: &mut [u8]) {
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = bytes.get(first..).unwrap_or_default();
    for (n, byte) in data.iter_mut().enumerate() {
        *byte = from.get(n).copied().unwrap_or(0);
    }
}
